//! Rounds and seals of the audit log.

use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;

/// A row, as the chain covers it.
#[derive(Debug, Clone)]
pub(in crate::audit) struct Sealable {
    pub(in crate::audit) id: i64,
    pub(in crate::audit) at: OffsetDateTime,
    pub(in crate::audit) tenant_id: Option<i64>,
    pub(in crate::audit) actor: String,
    pub(in crate::audit) via: Option<String>,
    pub(in crate::audit) action: String,
    pub(in crate::audit) object: String,
    pub(in crate::audit) result: String,
    pub(in crate::audit) request_id: String,
    pub(in crate::audit) detail: String,
}

/// Takes the lock of the sealer. Only one replica seals at a time, so no round is made twice.
pub(in crate::audit) async fn try_lock(conn: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock(4712) AS "got!""#).fetch_one(conn).await?)
}

/// The last round, and the upper bound of the next one: no transaction below the bound is still open.
pub(in crate::audit) struct Horizon {
    pub(in crate::audit) number: i64,
    pub(in crate::audit) mac: Option<Vec<u8>>,
    pub(in crate::audit) from: String,
    pub(in crate::audit) to: String,
    /// The database was restored into another cluster, whose transaction numbers start lower.
    pub(in crate::audit) restored: bool,
    /// Whether there are rows to seal.
    pub(in crate::audit) some: bool,
}

pub(in crate::audit) async fn horizon(conn: &mut PgConnection, at_once: i64) -> Result<Horizon, Error> {
    Ok(sqlx::query_as!(
        Horizon,
        r#"WITH last AS (
               SELECT number, mac, tx_to FROM audit_round ORDER BY number DESC LIMIT 1
           ), h AS (
               SELECT coalesce((SELECT number FROM last), 0) AS number, (SELECT mac FROM last) AS mac,
                      coalesce((SELECT tx_to FROM last), '0'::xid8) AS tx_from,
                      pg_snapshot_xmin(pg_current_snapshot()) AS tx_to
           ), cut AS (
               -- Of very many rows a part at a time; the rows of one transaction stay together.
               SELECT greatest(max(x.tx), (min(x.tx)::text::numeric + 1)::text::xid8) AS tx, count(*) AS n FROM
                 (SELECT a.tx FROM audit a, h WHERE a.tx >= h.tx_from AND a.tx < h.tx_to ORDER BY a.tx LIMIT $1) x
           )
           SELECT number AS "number!", mac, tx_from::text AS "from!",
                  CASE WHEN cut.n = $1 THEN cut.tx ELSE tx_to END::text AS "to!",
                  tx_to < tx_from AS "restored!", tx_to < tx_from OR cut.n > 0 AS "some!"
           FROM h, cut"#,
        at_once
    )
    .fetch_one(conn)
    .await?)
}

/// Lists the rows of the transactions between two numbers, ordered by tenant and number.
pub(in crate::audit) async fn list_between(
    conn: &mut PgConnection,
    horizon: &Horizon,
) -> Result<Vec<Sealable>, Error> {
    Ok(sqlx::query_as!(
        Sealable,
        r#"SELECT id, at, tenant_id, actor, via, action, object, result, request_id, detail::text AS "detail!"
           FROM audit WHERE tx >= $1::text::xid8 AND tx < $2::text::xid8
           ORDER BY coalesce(tenant_id, 0), id"#,
        horizon.from,
        horizon.to
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the rows without a seal, of any transaction. Needed once, after the database was restored.
pub(in crate::audit) async fn list_unsealed(
    conn: &mut PgConnection,
    to: &str,
) -> Result<Vec<Sealable>, Error> {
    Ok(sqlx::query_as!(
        Sealable,
        r#"SELECT id, at, tenant_id, actor, via, action, object, result, request_id, detail::text AS "detail!"
           FROM audit WHERE (tx < $1::text::xid8 OR tx >= pg_snapshot_xmax(pg_current_snapshot())) AND id NOT IN (SELECT unnest(ids) FROM audit_seal)
           ORDER BY coalesce(tenant_id, 0), id"#,
        to
    )
    .fetch_all(conn)
    .await?)
}

pub(in crate::audit) async fn insert_round(
    conn: &mut PgConnection,
    number: i64,
    horizon: &Horizon,
    last_id: i64,
    mac: &[u8],
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO audit_round (number, tx_to, last_id, mac) VALUES ($1, $2::text::xid8, $3, $4)",
        number,
        horizon.to,
        last_id,
        mac
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A seal.
#[derive(Debug, Clone)]
pub(in crate::audit) struct Seal {
    pub(in crate::audit) round: i64,
    pub(in crate::audit) tenant_id: Option<i64>,
    pub(in crate::audit) number: i64,
    pub(in crate::audit) ids: Vec<i64>,
    pub(in crate::audit) first_at: OffsetDateTime,
    pub(in crate::audit) last_at: OffsetDateTime,
    pub(in crate::audit) macs: Vec<u8>,
    pub(in crate::audit) mac: Vec<u8>,
}

pub(in crate::audit) async fn insert_seal(conn: &mut PgConnection, seal: &Seal) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO audit_seal (round, tenant_id, number, ids, first_at, last_at, macs, mac) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        seal.round,
        seal.tenant_id,
        seal.number,
        &seal.ids,
        seal.first_at,
        seal.last_at,
        seal.macs,
        seal.mac
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Returns number and MAC of a tenant's last seal.
pub(in crate::audit) async fn last_seal(
    conn: &mut PgConnection,
    tenant: Option<i64>,
) -> Result<Option<(i64, Vec<u8>)>, Error> {
    let row = sqlx::query!(
        "SELECT number, mac FROM audit_seal WHERE coalesce(tenant_id, 0) = coalesce($1::bigint, 0) \
         ORDER BY number DESC LIMIT 1",
        tenant
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.number, row.mac)))
}

/// A stored round.
#[derive(Debug)]
pub(in crate::audit) struct RoundRow {
    pub(in crate::audit) number: i64,
    pub(in crate::audit) tx_to: String,
    pub(in crate::audit) last_id: i64,
    pub(in crate::audit) mac: Vec<u8>,
}

pub(in crate::audit) async fn list_rounds(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<RoundRow>, Error> {
    Ok(sqlx::query_as!(
        RoundRow,
        r#"SELECT number, tx_to::text AS "tx_to!", last_id, mac FROM audit_round
           WHERE number > $1 ORDER BY number LIMIT $2"#,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the seals of rounds, in the order in which the rounds' MACs cover them.
pub(in crate::audit) async fn list_seals(
    conn: &mut PgConnection,
    first: i64,
    last: i64,
) -> Result<Vec<Seal>, Error> {
    Ok(sqlx::query_as!(
        Seal,
        "SELECT round, tenant_id, number, ids, first_at, last_at, macs, mac FROM audit_seal \
         WHERE round >= $1 AND round <= $2 ORDER BY round, coalesce(tenant_id, 0), number",
        first,
        last
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the rows with these numbers between two times. The times select the months.
pub(in crate::audit) async fn list_rows(
    conn: &mut PgConnection,
    ids: &[i64],
    first: OffsetDateTime,
    last: OffsetDateTime,
) -> Result<Vec<Sealable>, Error> {
    Ok(sqlx::query_as!(
        Sealable,
        r#"SELECT id, at, tenant_id, actor, via, action, object, result, request_id, detail::text AS "detail!"
           FROM audit WHERE id = ANY($1) AND at >= $2 AND at <= $3"#,
        ids,
        first,
        last
    )
    .fetch_all(conn)
    .await?)
}

/// Returns which of these rows exist with a changed time.
pub(in crate::audit) async fn list_moved(conn: &mut PgConnection, ids: &[i64]) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!("SELECT DISTINCT id FROM audit WHERE id = ANY($1)", ids).fetch_all(conn).await?)
}

/// Counts the rows that must have a seal, and the rows that are too new to have one.
pub(in crate::audit) async fn count_rows(conn: &mut PgConnection, to: &str) -> Result<(i64, i64), Error> {
    let row = sqlx::query!(
        r#"SELECT count(*) FILTER (WHERE tx < $1::text::xid8 OR tx >= pg_snapshot_xmax(pg_current_snapshot())) AS "sealed!",
                  count(*) FILTER (WHERE tx >= $1::text::xid8 AND tx < pg_snapshot_xmax(pg_current_snapshot())) AS "new!" FROM audit"#,
        to
    )
    .fetch_one(conn)
    .await?;
    Ok((row.sealed, row.new))
}

/// Lists rows of finished transactions without a seal: they were inserted outside the platform.
pub(in crate::audit) async fn list_inserted(conn: &mut PgConnection, to: &str) -> Result<Vec<i64>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT id AS "id!" FROM audit WHERE tx < $1::text::xid8 OR tx >= pg_snapshot_xmax(pg_current_snapshot())
           EXCEPT SELECT unnest(ids) FROM audit_seal ORDER BY 1 LIMIT 100"#,
        to
    )
    .fetch_all(conn)
    .await?)
}

/// Lists the retired months: first day, and time of retirement.
pub(in crate::audit) async fn list_retired(
    conn: &mut PgConnection,
) -> Result<Vec<(time::Date, OffsetDateTime)>, Error> {
    let rows = sqlx::query!("SELECT month, retired_at FROM audit_retired").fetch_all(conn).await?;
    Ok(rows.into_iter().map(|row| (row.month, row.retired_at)).collect())
}

/// Makes the rest of the transaction see one snapshot of the database, without a statement timeout.
pub(in crate::audit) async fn look_at_one_moment(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::raw_sql(
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL statement_timeout = 0",
    )
    .execute(conn)
    .await?;
    Ok(())
}
