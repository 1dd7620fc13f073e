//! Stored responses of requests with an `Idempotency-Key`.

use sqlx::PgConnection;

use crate::error::Error;

/// Maximum number of keys per account or token within 24 hours.
const KEYS: i64 = 2_000;

/// Returns the stored response to a request with this key: hash of the request, status, body.
pub(in crate::access) async fn find_answer(
    conn: &mut PgConnection,
    actor: &str,
    key: &str,
) -> Result<Option<(Vec<u8>, i32, serde_json::Value)>, Error> {
    let row = sqlx::query!(
        "SELECT request_hash, status, response FROM idempotency \
         WHERE actor = $1 AND key = $2 AND created_at > now() - interval '24 hours'",
        actor,
        key
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.request_hash, row.status, row.response)))
}

/// Stores a response, in the transaction of the change. Returns false if the key exists.
pub(in crate::access) async fn insert_answer(
    conn: &mut PgConnection,
    actor: &str,
    key: &str,
    request_hash: &[u8],
    answer: (i32, &serde_json::Value),
) -> Result<bool, Error> {
    let kept = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM (SELECT FROM idempotency WHERE actor = $1 LIMIT $2) n"#,
        actor,
        KEYS
    )
    .fetch_one(&mut *conn)
    .await?;
    if kept >= KEYS {
        return Err(Error::Conflict(format!(
            "an account or token keeps at most {KEYS} Idempotency-Keys within 24 hours; send the request without one, \
             or wait"
        )));
    }
    sqlx::query!(
        "DELETE FROM idempotency WHERE actor = $1 AND key = $2 AND created_at < now() - interval '24 hours'",
        actor,
        key
    )
    .execute(&mut *conn)
    .await?;
    let done = sqlx::query!(
        "INSERT INTO idempotency (actor, key, request_hash, status, response) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT DO NOTHING",
        actor,
        key,
        request_hash,
        answer.0,
        answer.1
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Writes the response of a started request.
pub(in crate::access) async fn finish_answer(
    conn: &mut PgConnection,
    actor: &str,
    key: &str,
    request_hash: &[u8],
    answer: (i32, &serde_json::Value),
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE idempotency SET status = $4, response = $5 \
         WHERE actor = $1 AND key = $2 AND request_hash = $3 AND status = 0",
        actor,
        key,
        request_hash,
        answer.0,
        answer.1
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Removes a started request that changed nothing. The key can be used again.
pub(in crate::access) async fn forget_answer(
    conn: &mut PgConnection,
    actor: &str,
    key: &str,
    request_hash: &[u8],
) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM idempotency WHERE actor = $1 AND key = $2 AND request_hash = $3 AND status = 0",
        actor,
        key,
        request_hash
    )
    .execute(conn)
    .await?;
    Ok(())
}
