//! Buckets: one row each, changed in one statement, so that replicas never count past each other.

use sqlx::PgConnection;

use crate::error::Error;

/// Takes one from the bucket. None when it was there to take; else the seconds until it is.
pub(in crate::access) async fn take(
    conn: &mut PgConnection,
    key: &[u8],
    every: f64,
    burst: f64,
) -> Result<Option<f64>, Error> {
    let taken = sqlx::query_scalar!(
        r#"INSERT INTO throttle AS t (key, tat) VALUES ($1, clock_timestamp() + make_interval(secs => $2))
           ON CONFLICT (key) DO UPDATE SET tat = greatest(t.tat, clock_timestamp()) + make_interval(secs => $2)
           WHERE greatest(t.tat, clock_timestamp()) + make_interval(secs => $2)
                 <= clock_timestamp() + make_interval(secs => $3)
           RETURNING true AS "taken!""#,
        key,
        every,
        every * burst
    )
    .fetch_optional(&mut *conn)
    .await?;
    if taken.is_some() {
        return Ok(None);
    }
    let wait = sqlx::query_scalar!(
        r#"SELECT extract(epoch FROM tat - clock_timestamp())::float8 AS "left!" FROM throttle WHERE key = $1"#,
        key
    )
    .fetch_optional(conn)
    .await?;
    Ok(Some((wait.unwrap_or(0.0) - every * (burst - 1.0)).max(1.0)))
}

/// Empties a bucket: whoever has proved to be there does not pay for earlier mistakes.
pub(in crate::access) async fn forgive(conn: &mut PgConnection, key: &[u8]) -> Result<(), Error> {
    sqlx::query!("DELETE FROM throttle WHERE key = $1", key).execute(conn).await?;
    Ok(())
}
