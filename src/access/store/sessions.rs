//! Sessions, pending sign-ins, and known places.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::AccountId;

/// A session to insert.
pub(in crate::access) struct NewSession<'a> {
    pub(in crate::access) hash: &'a [u8],
    pub(in crate::access) account: AccountId,
    pub(in crate::access) method: &'a str,
    pub(in crate::access) place: &'a str,
    pub(in crate::access) agent: &'a str,
}

/// Inserts a session. An account has at most 100; the oldest ones end.
pub(in crate::access) async fn insert_session(
    conn: &mut PgConnection,
    new: &NewSession<'_>,
) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "WITH gone AS (DELETE FROM session WHERE id IN (SELECT id FROM session WHERE account_id = $2 \
           ORDER BY id DESC OFFSET 99 LIMIT 20)) \
         INSERT INTO session (hash, account_id, method, place, agent) VALUES ($1, $2, $3, $4, $5) RETURNING id",
        new.hash,
        new.account.0,
        new.method,
        new.place,
        new.agent
    )
    .fetch_one(conn)
    .await?)
}

/// Deletes a session. Returns its sign-in method.
pub(in crate::access) async fn delete_session(
    conn: &mut PgConnection,
    hash: &[u8],
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!("DELETE FROM session WHERE hash = $1 RETURNING method", hash)
        .fetch_optional(conn)
        .await?)
}

/// Deletes one of an account's own sessions.
pub(in crate::access) async fn delete_session_of(
    conn: &mut PgConnection,
    account: AccountId,
    id: i64,
) -> Result<bool, Error> {
    let done = sqlx::query!("DELETE FROM session WHERE account_id = $1 AND id = $2", account.0, id)
        .execute(conn)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Deletes all sessions of an account except `keep`, and all its pending sign-ins.
pub(in crate::access) async fn delete_sessions_but(
    conn: &mut PgConnection,
    account: AccountId,
    keep: Option<i64>,
) -> Result<u64, Error> {
    sqlx::query!("DELETE FROM sign_in WHERE account_id = $1", account.0).execute(&mut *conn).await?;
    let done =
        sqlx::query!("DELETE FROM session WHERE account_id = $1 AND id IS DISTINCT FROM $2", account.0, keep)
            .execute(conn)
            .await?;
    Ok(done.rows_affected())
}

/// Gives a session a new reference and marks it as confirmed now.
pub(in crate::access) async fn rotate_session(
    conn: &mut PgConnection,
    id: i64,
    hash: &[u8],
) -> Result<bool, Error> {
    let done = sqlx::query!("UPDATE session SET hash = $2, confirmed_at = now() WHERE id = $1", id, hash)
        .execute(conn)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// A session as shown.
#[derive(Debug, Serialize)]
pub(in crate::access) struct SessionRow {
    pub(in crate::access) id: i64,
    pub(in crate::access) method: String,
    pub(in crate::access) place: String,
    pub(in crate::access) agent: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(in crate::access) last_seen_at: OffsetDateTime,
}

pub(in crate::access) async fn list_sessions(
    conn: &mut PgConnection,
    account: AccountId,
) -> Result<Vec<SessionRow>, Error> {
    Ok(sqlx::query_as!(
        SessionRow,
        "SELECT id, method, place, agent, created_at, last_seen_at FROM session WHERE account_id = $1 \
         AND created_at > now() - interval '12 hours' AND last_seen_at > now() - interval '30 minutes' \
         ORDER BY id DESC LIMIT 200",
        account.0
    )
    .fetch_all(conn)
    .await?)
}

/// A pending sign-in.
pub(in crate::access) struct PendingSignIn {
    pub(in crate::access) account_id: Option<i64>,
    pub(in crate::access) provider: Option<String>,
    pub(in crate::access) session_id: Option<i64>,
}

pub(in crate::access) async fn insert_sign_in(
    conn: &mut PgConnection,
    hash: &[u8],
    kind: &str,
    begun: &PendingSignIn,
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO sign_in (hash, kind, account_id, provider, session_id, expires_at) \
         VALUES ($1, $2, $3, $4, $5, now() + interval '10 minutes')",
        hash,
        kind,
        begun.account_id,
        begun.provider,
        begun.session_id
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts one more attempt. Returns `None` if the sign-in is missing, expired, or was tried too often.
pub(in crate::access) async fn try_sign_in(
    conn: &mut PgConnection,
    hash: &[u8],
    kind: &str,
) -> Result<Option<PendingSignIn>, Error> {
    Ok(sqlx::query_as!(
        PendingSignIn,
        "UPDATE sign_in SET tries = tries + 1 WHERE hash = $1 AND kind = $2 AND expires_at > now() AND tries < 5 \
         RETURNING account_id, provider, session_id",
        hash,
        kind
    )
    .fetch_optional(conn)
    .await?)
}

pub(in crate::access) async fn is_sign_in_good(
    conn: &mut PgConnection,
    hash: &[u8],
    kind: &str,
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM sign_in WHERE hash = $1 AND kind = $2 AND expires_at > now() AND tries < 5)
           AS "yes!""#,
        hash,
        kind
    )
    .fetch_one(conn)
    .await?)
}

/// Marks a login attempt at a provider as used. Returns false if it was already marked. The row outlives the
/// attempt.
pub(in crate::access) async fn mark_used(
    conn: &mut PgConnection,
    hash: &[u8],
    kind: &str,
    begun: &PendingSignIn,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "INSERT INTO sign_in (hash, kind, account_id, provider, session_id, expires_at) \
         VALUES ($1, $2, $3, $4, $5, now() + interval '1 hour') ON CONFLICT DO NOTHING",
        hash,
        kind,
        begun.account_id,
        begun.provider,
        begun.session_id
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Uses a pending sign-in up. Of two concurrent calls, one succeeds.
pub(in crate::access) async fn use_sign_in(
    conn: &mut PgConnection,
    hash: &[u8],
    kind: &str,
) -> Result<Option<PendingSignIn>, Error> {
    Ok(sqlx::query_as!(
        PendingSignIn,
        "DELETE FROM sign_in WHERE hash = $1 AND kind = $2 AND expires_at > now() AND tries <= 5 \
         RETURNING account_id, provider, session_id",
        hash,
        kind
    )
    .fetch_optional(conn)
    .await?)
}

pub(in crate::access) async fn is_place_known(
    conn: &mut PgConnection,
    account: AccountId,
    place: &[u8],
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM known_place WHERE account_id = $1 AND place = $2) AS "yes!""#,
        account.0,
        place
    )
    .fetch_one(conn)
    .await?)
}

pub(in crate::access) async fn know_place(
    conn: &mut PgConnection,
    account: AccountId,
    place: &[u8],
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO known_place (account_id, place) VALUES ($1, $2) \
         ON CONFLICT (account_id, place) DO UPDATE SET last_at = now()",
        account.0,
        place
    )
    .execute(conn)
    .await?;
    Ok(())
}
