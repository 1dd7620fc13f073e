//! Allocations of user id ranges per second, compared with a simpler design: a counter row that each
//! transaction locks. Sixteen writers, on disk, each allocation committed separately.

use std::time::{Duration, Instant};

use bulkhead::config::Pools;
use bulkhead::ids::TenantId;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::Machine;
use crate::{Row, median, spread};

const WRITERS: usize = 16;
const TIME: Duration = Duration::from_secs(3);

async fn ours(pool: &PgPool, tenants: &[i64]) -> f64 {
    let pools = Pools {
        uid_start: 65_536,
        uid_end: 2_147_483_647,
        range_size: 1_024,
        block_size: 1_024,
        network: "10.64.0.0/12".parse().unwrap(),
        subnet_prefix: 22,
    };
    count(tenants, |tenant| {
        let pools = &pools;
        async move {
            let mut tx = pool.begin().await.unwrap();
            bulkhead::uid_ranges::allocate_range(&mut tx, TenantId(tenant), pools).await.unwrap();
            tx.commit().await.unwrap();
        }
    })
    .await
}

async fn peer(pool: &PgPool, tenants: &[i64]) -> f64 {
    count(tenants, |tenant| async move {
        let mut tx = pool.begin().await.unwrap();
        let slot: i64 =
            sqlx::query_scalar("UPDATE counter SET n = n + 1 RETURNING n").fetch_one(&mut *tx).await.unwrap();
        sqlx::query("INSERT INTO given (slot, tenant_id) VALUES ($1, $2)")
            .bind(slot)
            .bind(tenant)
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.commit().await.unwrap();
    })
    .await
}

async fn count<F: Future<Output = ()>>(tenants: &[i64], once: impl Fn(i64) -> F) -> f64 {
    let begun = Instant::now();
    let once = &once;
    let writers = tenants.iter().map(|tenant| async move {
        let mut done = 0_u32;
        while begun.elapsed() < TIME {
            once(*tenant).await;
            done += 1;
        }
        done
    });
    let done: u32 = futures_util::future::join_all(writers).await.iter().sum();
    f64::from(done) / begun.elapsed().as_secs_f64()
}

pub(crate) async fn measure() -> Row {
    let machine = Machine::start().await;
    let options = PgConnectOptions::new_without_pgpass()
        .socket(machine.data.join("run/postgres"))
        .username("postgres")
        .database("postgres");
    let root = PgPoolOptions::new().connect_with(options.clone()).await.unwrap();
    sqlx::query("CREATE DATABASE uids").execute(&root).await.unwrap();
    let pool = PgPoolOptions::new()
        .max_connections(u32::try_from(WRITERS).unwrap())
        .connect_with(options.database("uids"))
        .await
        .unwrap();
    bulkhead::db::MIGRATOR.run(&pool).await.unwrap();
    sqlx::query("CREATE TABLE counter (n bigint NOT NULL)").execute(&pool).await.unwrap();
    sqlx::query("INSERT INTO counter VALUES (0)").execute(&pool).await.unwrap();
    sqlx::query(
        "CREATE TABLE given (slot bigint PRIMARY KEY, tenant_id bigint NOT NULL REFERENCES tenant (id))",
    )
    .execute(&pool)
    .await
    .unwrap();
    let tenants: Vec<i64> = sqlx::query_scalar(
        "INSERT INTO tenant (name, display_name) SELECT 'tenant-' || n, 'x' FROM generate_series(1, $1) n RETURNING id",
    )
    .bind(i64::try_from(WRITERS).unwrap())
    .fetch_all(&pool)
    .await
    .unwrap();
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        mine.push(ours(&pool, &tenants).await);
        theirs.push(peer(&pool, &tenants).await);
    }
    pool.close().await;
    Row {
        what: "user id ranges allocated per second, 16 writers, on disk",
        ours: spread(&mine, 0),
        peer: format!("a locked counter row {}", spread(&theirs, 0)),
        result: format!("{:.1} times the peer", median(&mine) / median(&theirs)),
        goal: "5 times",
    }
}
