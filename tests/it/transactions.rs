//! A request that ends early leaves nothing behind on its connection.

use std::time::Duration;

use bulkhead::db::{self, Within};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

#[sqlx::test(migrator = "db::MIGRATOR")]
async fn a_dropped_begin_leaves_no_transaction_open(root: PgPool) {
    let options = (*root.connect_options()).clone();
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    let mut dropped = 0;
    for step in 0..400_u64 {
        let begun = tokio::time::timeout(Duration::from_micros(step * 5), db::begin(&pool, Within::Platform));
        dropped += u64::from(begun.await.is_err());
        let mut conn = pool.acquire().await.unwrap();
        // Outside a transaction each statement has a transaction of its own, and the setting is gone.
        let left: Option<String> =
            sqlx::query_scalar("SELECT nullif(current_setting('app.platform', true), '')")
                .fetch_one(&mut *conn)
                .await
                .unwrap();
        assert_eq!(left, None, "after a drop at {} us", step * 5);
    }
    assert!(dropped > 20, "{dropped} of 400 were dropped");
}
