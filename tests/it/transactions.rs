//! A request that ends early leaves nothing behind on its connection.

use bulkhead::db::{self, Within};
use futures_util::FutureExt as _;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

#[sqlx::test(migrator = "db::MIGRATOR")]
async fn a_dropped_begin_leaves_no_transaction_open(root: PgPool) {
    let options = (*root.connect_options()).clone();
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    let mut dropped = 0;
    for polls in 0..200 {
        // Polled this often and then dropped, as the future of a request whose client hangs up.
        let mut begun = Box::pin(db::begin(&pool, Within::Platform));
        let mut is_ready = false;
        for _ in 0..polls {
            is_ready = is_ready || (&mut begun).now_or_never().is_some();
            tokio::task::yield_now().await;
        }
        dropped += u32::from(!is_ready);
        drop(begun);
        // Outside a transaction each statement has a transaction of its own, and the setting is gone.
        let left: Option<String> =
            sqlx::query_scalar("SELECT nullif(current_setting('app.platform', true), '')")
                .fetch_one(&pool)
                .await
                .unwrap();
        assert_eq!(left, None, "dropped after {polls} polls");
    }
    assert!(dropped > 0, "{dropped} of 200 were dropped");
}
