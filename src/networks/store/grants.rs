//! Grants: the offer is the giver's row, the answer the receiver's. Nobody writes the other's.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{AppId, AppName, TenantId, TenantName};

/// A grant that this tenant gives.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Given {
    /// Number.
    pub id: i64,
    /// Its app.
    pub app: String,
    /// To whom.
    pub tenant: String,
    /// To which app of theirs; to all without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_app: Option<String>,
    /// `offered`, `accepted`, or `ended` by the other side.
    pub state: String,
    /// By whom.
    pub offered_by: String,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub offered_at: OffsetDateTime,
    /// Its end.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
}

/// A grant that this tenant is given.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Received {
    /// Number.
    pub id: i64,
    /// Whose app.
    pub tenant: String,
    /// Which.
    pub app: String,
    /// To which app here; to all without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_app: Option<String>,
    /// `offered` or `accepted`.
    pub state: String,
    /// When it was offered.
    #[serde(with = "time::serde::rfc3339")]
    pub offered_at: OffsetDateTime,
    /// Its end.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
}

/// An offer to be made.
pub(in crate::networks) struct NewOffer<'a> {
    pub(in crate::networks) app: AppId,
    pub(in crate::networks) app_name: &'a AppName,
    pub(in crate::networks) to_tenant: &'a TenantName,
    pub(in crate::networks) to_app: Option<&'a AppName>,
    pub(in crate::networks) days: Option<i32>,
}

pub(in crate::networks) async fn insert_offer(
    conn: &mut PgConnection,
    tenant: TenantId,
    offer: &NewOffer<'_>,
    who: &str,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        "INSERT INTO grant_offer (tenant_id, app_id, app, to_tenant, to_app, offered_by, expires_at) \
         VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(days => $7)) RETURNING id",
        tenant.0,
        offer.app.0,
        offer.app_name.as_str(),
        offer.to_tenant.as_str(),
        offer.to_app.map(AppName::as_str),
        who,
        offer.days
    )
    .fetch_one(conn)
    .await
}

/// What this tenant gives and has not withdrawn, by number.
pub(in crate::networks) async fn list_given(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: i64,
    limit: i64,
) -> Result<Vec<Given>, Error> {
    Ok(sqlx::query_as!(
        Given,
        r#"SELECT o.id, o.app, o.to_tenant AS tenant, o.to_app,
           CASE WHEN o.expires_at <= now() THEN 'expired' WHEN a.ended_at IS NOT NULL THEN 'ended'
                WHEN a.accepted_at IS NOT NULL THEN 'accepted' ELSE 'offered' END AS "state!",
           o.offered_by, o.offered_at, o.expires_at
           FROM grant_offer o LEFT JOIN network_answers() a ON a.offer_id = o.id
           WHERE o.tenant_id = $1 AND o.withdrawn_at IS NULL AND o.id > $2 ORDER BY o.id LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// What this tenant is given, by number. The function answers for the tenant of the transaction.
pub(in crate::networks) async fn list_received(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<Received>, Error> {
    Ok(sqlx::query_as!(
        Received,
        r#"SELECT id AS "id!", from_tenant AS "tenant!", app AS "app!", to_app,
           CASE WHEN accepted_at IS NULL THEN 'offered' ELSE 'accepted' END AS "state!",
           offered_at AS "offered_at!", expires_at
           FROM network_offers_to() WHERE id > $1 ORDER BY id LIMIT $2"#,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// What is offered to this tenant under a number: whose, which app, and whether it was accepted.
pub(in crate::networks) async fn find_received(
    conn: &mut PgConnection,
    id: i64,
) -> Result<Option<(TenantId, String, bool)>, Error> {
    let row = sqlx::query!(
        r#"SELECT from_tenant_id AS "from!", from_tenant || '/' || app AS "name!", accepted_at IS NOT NULL AS "accepted!"
           FROM network_offers_to() WHERE id = $1"#,
        id
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (TenantId(row.from), row.name, row.accepted)))
}

/// Which of these apps of others this tenant may name, as `TENANT/APP`, for the app `own`.
pub(in crate::networks) async fn list_accepted(
    conn: &mut PgConnection,
    names: &[String],
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT DISTINCT from_tenant || '/' || app AS "name!" FROM network_offers_to()
           WHERE accepted_at IS NOT NULL AND from_tenant || '/' || app = ANY ($1)"#,
        names
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::networks) async fn insert_answer(
    conn: &mut PgConnection,
    tenant: TenantId,
    from: TenantId,
    offer: i64,
    who: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO grant_answer (tenant_id, from_tenant_id, offer_id, accepted_by) VALUES ($1, $2, $3, $4)",
        tenant.0,
        from.0,
        offer,
        who
    )
    .execute(conn)
    .await
    .map(drop)
}

/// Ends what this tenant has accepted. Whether there was something to end.
pub(in crate::networks) async fn end_answer(
    conn: &mut PgConnection,
    tenant: TenantId,
    offer: i64,
    who: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE grant_answer SET ended_by = $3, ended_at = now() \
         WHERE tenant_id = $1 AND offer_id = $2 AND ended_at IS NULL",
        tenant.0,
        offer,
        who
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Withdraws what this tenant has offered: the app, and to whom.
pub(in crate::networks) async fn withdraw_offer(
    conn: &mut PgConnection,
    tenant: TenantId,
    offer: i64,
    who: &str,
) -> Result<Option<(String, String)>, Error> {
    let row = sqlx::query!(
        "UPDATE grant_offer SET withdrawn_by = $3, withdrawn_at = now() \
         WHERE tenant_id = $1 AND id = $2 AND withdrawn_at IS NULL RETURNING app, to_tenant",
        tenant.0,
        offer,
        who
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.app, row.to_tenant)))
}

/// Wakes whoever has accepted one offer of this tenant, or any of an app's.
pub(in crate::networks) async fn wake_receivers(
    conn: &mut PgConnection,
    app: Option<AppId>,
    offer: Option<i64>,
    why: &str,
) -> Result<(), Error> {
    sqlx::query!("SELECT network_wake_receivers($1, $2, $3)", app.map(|app| app.0), offer, why)
        .fetch_one(conn)
        .await?;
    Ok(())
}

/// How many offers a tenant has open, how many of them to one other, and how many it made within 24 hours.
pub(in crate::networks) async fn count_offers(
    conn: &mut PgConnection,
    tenant: TenantId,
    to: &TenantName,
) -> Result<(i64, i64, i64), Error> {
    let row = sqlx::query!(
        r#"SELECT count(*) AS "all!", count(*) FILTER (WHERE to_tenant = $2) AS "to_one!",
           (SELECT count(*) FROM grant_offer d WHERE d.tenant_id = $1 AND d.offered_at > now() - interval '24 hours') AS "today!"
           FROM grant_offer WHERE tenant_id = $1 AND withdrawn_at IS NULL"#,
        tenant.0,
        to.as_str()
    )
    .fetch_one(conn)
    .await?;
    Ok((row.all, row.to_one, row.today))
}

/// Holds an offer to this tenant as it is until the transaction ends: whoever withdraws it meanwhile waits, and
/// then sees that it was accepted. Whether it is still open.
pub(in crate::networks) async fn lock_offer(conn: &mut PgConnection, offer: i64) -> Result<bool, Error> {
    let open =
        sqlx::query_scalar!(r#"SELECT network_lock_offer($1) AS "open!""#, offer).fetch_one(conn).await?;
    Ok(open)
}
