//! Grants: the offer is a row of the giver, the answer a row of the receiver. Neither side writes the other's
//! row.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{AppId, AppName, TenantId, TenantName};

/// A grant that this tenant offers.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct OfferedGrant {
    /// Number.
    pub id: i64,
    /// The tenant's own app.
    pub app: String,
    /// The receiving tenant.
    pub tenant: String,
    /// The only app that may use the grant; absent for all apps of that tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_app: Option<String>,
    /// `offered`, `accepted`, or `ended` by the other side.
    pub state: String,
    /// Actor who offered it.
    pub offered_by: String,
    /// When it was offered.
    #[serde(with = "time::serde::rfc3339")]
    pub offered_at: OffsetDateTime,
    /// When it expires.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
}

/// A grant that this tenant receives.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Received {
    /// Number.
    pub id: i64,
    /// The offering tenant.
    pub tenant: String,
    /// The granted app.
    pub app: String,
    /// The only app here that may use the grant; absent for all apps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_app: Option<String>,
    /// `offered` or `accepted`.
    pub state: String,
    /// When it was offered.
    #[serde(with = "time::serde::rfc3339")]
    pub offered_at: OffsetDateTime,
    /// When it expires.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
}

/// A new offer.
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

/// Lists the grants that this tenant offers and has not withdrawn, by number.
pub(in crate::networks) async fn list_given(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: i64,
    limit: i64,
) -> Result<Vec<OfferedGrant>, Error> {
    Ok(sqlx::query_as!(
        OfferedGrant,
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

/// Lists the grants that this tenant receives, by number. The SQL function reads the tenant from the
/// transaction.
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

/// Returns the offer of a number to this tenant: the offering tenant, the app, and whether it is accepted.
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

/// Returns those of the names, as `TENANT/APP`, that this tenant has accepted.
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

/// Ends a grant that this tenant accepted. Returns whether there was one.
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

/// Withdraws an offer of this tenant. Returns the app and the receiving tenant.
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

/// Wakes the tenants that accepted one offer of this tenant, or any offer of an app.
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

/// Returns a tenant's number of open offers, of those to one other tenant, and of those made within 24 hours.
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

/// Locks an offer to this tenant until the transaction ends. A concurrent withdrawal waits and then sees the
/// acceptance. Returns whether the offer is still open.
pub(in crate::networks) async fn lock_offer(conn: &mut PgConnection, offer: i64) -> Result<bool, Error> {
    let open =
        sqlx::query_scalar!(r#"SELECT network_lock_offer($1) AS "open!""#, offer).fetch_one(conn).await?;
    Ok(open)
}
