//! Ranges and blocks of user ids under many writers: none overlaps another, and none is allocated twice.

use bulkhead::config::Pools;
use bulkhead::ids::TenantId;
use sqlx::PgPool;

fn pools(range: u32, block: u32, ranges: u32) -> Pools {
    let uid_start = 65_536;
    Pools {
        uid_start,
        uid_end: uid_start + range * ranges,
        range_size: range,
        block_size: block,
        network: "10.64.0.0/12".parse().unwrap(),
        subnet_prefix: 22,
    }
}

async fn tenants(pool: &PgPool, count: i64) -> Vec<TenantId> {
    let ids: Vec<i64> = sqlx::query_scalar(
        "INSERT INTO tenant (name, display_name) SELECT 'tenant-' || n, 'x' FROM generate_series(1, $1) n RETURNING id",
    )
    .bind(count)
    .fetch_all(pool)
    .await
    .unwrap();
    ids.into_iter().map(TenantId).collect()
}

/// Two million with `BULKHEAD_UID_ALLOCATIONS=2000000`; fewer otherwise, with the same code.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn many_writers_never_share_an_id(pool: PgPool) {
    let wanted: u32 =
        std::env::var("BULKHEAD_UID_ALLOCATIONS").map_or(Ok(12_800), |n| n.parse()).expect("a number");
    let pool = sqlx::postgres::PgPoolOptions::new()
        .max_connections(64)
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let pools = pools(1_024, 1_024, (wanted * 11 / 10).min(2_097_088));
    let tenants = tenants(&pool, 64).await;
    let mut writers = Vec::new();
    for tenant in tenants {
        let (pool, pools) = (pool.clone(), pools.clone());
        writers.push(tokio::spawn(async move {
            let mut given = 0_u32;
            let mut turn = 0_u32;
            while given < wanted / 64 {
                turn += 1;
                let mut tx = pool.begin().await.unwrap();
                bulkhead::uid_ranges::allocate_range(&mut tx, tenant, &pools).await.unwrap();
                // Some transactions roll back: their slot is lost and never reused.
                if turn.is_multiple_of(20) {
                    tx.rollback().await.unwrap();
                } else {
                    tx.commit().await.unwrap();
                    given += 1;
                }
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let (rows, overlaps): (i64, i64) = sqlx::query_as(
        "SELECT count(*), count(*) FILTER (WHERE before > start) FROM \
         (SELECT lower(r) AS start, lag(upper(r)) OVER (ORDER BY lower(r)) AS before FROM uid_range) x",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!((rows, overlaps), (i64::from(wanted / 64 * 64), 0));
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn blocks_of_apps_never_meet_and_a_full_range_is_followed_by_another(pool: PgPool) {
    let pools = pools(1_024, 256, 64);
    let tenant = tenants(&pool, 1).await[0];
    let mut writers = Vec::new();
    for _ in 0..8 {
        let (pool, pools) = (pool.clone(), pools.clone());
        writers.push(tokio::spawn(async move {
            let mut blocks = Vec::new();
            for _ in 0..3 {
                let mut tx = pool.begin().await.unwrap();
                blocks.push(bulkhead::uid_ranges::allocate_block(&mut tx, tenant, &pools).await.unwrap());
                tx.commit().await.unwrap();
            }
            blocks
        }));
    }
    let mut blocks = Vec::new();
    for writer in writers {
        blocks.extend(writer.await.unwrap());
    }
    blocks.sort_by_key(|block| block.ids.start);
    assert_eq!(blocks.len(), 24);
    for pair in blocks.windows(2) {
        assert!(!pair[0].ids.overlaps(pair[1].ids), "{pair:?}");
    }
    let mut conn = pool.acquire().await.unwrap();
    let ranges = bulkhead::uid_ranges::list_ranges_of(&mut conn, tenant).await.unwrap();
    assert!(ranges.len() >= 6);
    for block in blocks {
        let range = ranges.iter().find(|range| range.slot == block.slot).unwrap();
        assert!(range.ids().contains(block.ids), "{block:?} lies in {range:?}");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_pool_that_is_used_up_says_so_and_nothing_returns_to_it(pool: PgPool) {
    let pools = pools(1_024, 1_024, 3);
    let tenants = tenants(&pool, 4).await;
    for tenant in &tenants[..3] {
        let mut tx = pool.begin().await.unwrap();
        bulkhead::uid_ranges::allocate_range(&mut tx, *tenant, &pools).await.unwrap();
        tx.commit().await.unwrap();
    }
    let mut conn = pool.acquire().await.unwrap();
    bulkhead::uid_ranges::release_ranges(&mut conn, tenants[0]).await.unwrap();
    let error = bulkhead::uid_ranges::allocate_range(&mut conn, tenants[3], &pools).await.unwrap_err();
    assert!(error.to_string().contains("BH-424"), "{error}");
    // The database itself refuses to allocate a retired range again.
    let stolen = sqlx::query(
        "INSERT INTO uid_range (slot, tenant_id, pool_start, pool_end, size, block_size) \
         VALUES (1000, $1, 65536 - 1000 * 1024, 1000000, 1024, 1024)",
    )
    .bind(tenants[3].0)
    .execute(&pool)
    .await
    .unwrap_err();
    assert!(stolen.to_string().contains("uid_ranges_do_not_overlap"), "{stolen}");
}
