//! Rate limit buckets. One statement changes one row, so concurrent replicas count correctly.

use sqlx::PgConnection;

use crate::error::Error;

/// Takes one from a bucket. Returns `None` on success, else the seconds until the next one is available.
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

/// Empties a bucket after a successful authentication, so earlier mistakes no longer count.
pub(in crate::access) async fn forgive(conn: &mut PgConnection, key: &[u8]) -> Result<(), Error> {
    sqlx::query!("DELETE FROM throttle WHERE key = $1", key).execute(conn).await?;
    Ok(())
}
