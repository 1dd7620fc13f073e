//! Rows of limits and use: reserved, released, set by an admin, shown; and hidden from other tenants.

use bulkhead::access::{Authority, Role};
use bulkhead::db;
use bulkhead::error::Error;
use bulkhead::ids::TenantId;
use bulkhead::quotas::{self, Resource};
use futures_util::future::join_all;
use serde_json::json;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

async fn used(pool: &PgPool, tenant: TenantId, resource: Resource) -> i64 {
    let mut tx = db::begin(pool, tenant).await.unwrap();
    quotas::read(&mut tx, tenant).await.unwrap().of(resource).used
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn amounts_are_taken_and_given_back_and_never_overflow(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let app = TestApp::new(options, connect).await;
    let acme = app.tenant("acme").await;
    for pool in [&app.one.platform.pool, &app.one.platform.work] {
        let mut tx = db::begin(pool, acme).await.unwrap();
        quotas::reserve(&mut tx, acme, Resource::ImageBytes, 1_000).await.unwrap();
        quotas::reserve(&mut tx, acme, Resource::ImageBytes, 0).await.unwrap();
        let refused = quotas::reserve(&mut tx, acme, Resource::ImageBytes, i64::MAX).await;
        let Err(Error::QuotaExceeded(faults)) = refused else { panic!("{refused:?}") };
        assert_eq!(faults[0].path, "image_bytes");
        for part in ["limit 85899345920 bytes", "used 1000", "asked 9223372036854775807"] {
            assert!(faults[0].message.contains(part), "{}", faults[0].message);
        }
        assert!(quotas::reserve(&mut tx, acme, Resource::ImageBytes, -5).await.is_err());
        tx.commit().await.unwrap();
        assert_eq!(used(pool, acme, Resource::ImageBytes).await, 1_000);
        let mut tx = db::begin(pool, acme).await.unwrap();
        quotas::release(&mut tx, acme, Resource::ImageBytes, -9).await.unwrap();
        quotas::release(&mut tx, acme, Resource::ImageBytes, i64::MAX).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(used(pool, acme, Resource::ImageBytes).await, 0, "never below 0");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_last_bytes_go_to_one(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let acme = app.tenant("acme").await;
    app.sql("UPDATE quota SET limit_ = 10 WHERE resource = 'image_bytes'").await;
    let pool = &app.one.platform.pool;
    let tries = join_all((0..16).map(|_| async {
        let mut tx = db::begin(pool, acme).await.unwrap();
        let done = quotas::reserve(&mut tx, acme, Resource::ImageBytes, 3).await;
        tx.commit().await.unwrap();
        done.is_ok()
    }))
    .await;
    assert_eq!(tries.iter().filter(|good| **good).count(), 3);
    assert_eq!(used(pool, acme, Resource::ImageBytes).await, 9);
}

/// A transaction that takes several resources locks the gate first, so no two of them deadlock.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn many_resources_at_once_do_not_lock_each_other_up(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let acme = app.tenant("acme").await;
    let admin = app.admin().await;
    let pool = &app.one.platform.pool;
    let both = [Resource::ImageBytes, Resource::Tags, Resource::Manifests];
    let take = |turned: bool| async move {
        for _ in 0..10 {
            let mut order = both;
            if turned {
                order.reverse();
            }
            let mut tx = db::begin(pool, acme).await.unwrap();
            quotas::enter(&mut tx, acme).await.unwrap();
            for resource in order {
                quotas::reserve(&mut tx, acme, resource, 1).await.unwrap();
            }
            tx.commit().await.unwrap();
        }
    };
    let set = || async {
        for n in 0..10 {
            let body =
                json!({"quota": {"tags": 9_000 + n, "image_bytes": "50Gi", "manifests": 15_000, "apps": 9}});
            let (status, answer) = app.ask(&admin, "PATCH", "/api/v1/tenants/acme", body).await;
            assert_eq!(status, 202, "{answer}");
        }
    };
    tokio::join!(take(false), take(true), take(false), set(), set());
    assert_eq!(used(pool, acme, Resource::ImageBytes).await, 30);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn another_tenants_limits_are_out_of_reach(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let (acme, evil) = (app.tenant("acme").await, app.tenant("evil").await);
    let pool = &app.one.platform.pool;
    let mut tx = db::begin(pool, evil).await.unwrap();
    assert!(quotas::read(&mut tx, acme).await.unwrap().iter().next().is_none(), "no row is visible");
    quotas::release(&mut tx, acme, Resource::Memory, 1).await.unwrap();
    quotas::add_used(&mut tx, acme, &[(Resource::Memory, 5)]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(used(pool, acme, Resource::Memory).await, 0, "no row is changed");
    let mut tx = db::begin(pool, evil).await.unwrap();
    assert!(quotas::reserve(&mut tx, acme, Resource::Memory, 1).await.is_err());
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn an_admin_sets_each_limit_and_everybody_sees_it(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::with(options, connect, |config| config.limits.service_accounts = 7).await;
    let admin = app.admin().await;
    let body = json!({"name": "acme", "quota": {"registry_bytes": "1Gi", "api_tokens": 3, "cpu": "2"}});
    let (status, answer) = app.ask(&admin, "POST", "/api/v1/tenants", body).await;
    assert_eq!(status, 202, "{answer}");
    let acme = TenantId(app.number("SELECT id FROM tenant WHERE name = $1", "acme").await);
    let viewer = app.token(Authority::Tenant(acme, Role::Viewer)).await;
    let seen = app.get(&viewer, "/api/v1/tenants/acme/quota").await;
    let quota = &seen["quota"];
    for resource in Resource::of_tenants() {
        let limit = &quota[resource.name()]["limit"];
        assert!(limit.is_i64() || resource == Resource::Cpu, "{resource}: {quota}");
    }
    assert_eq!(quota["image_bytes"], json!({"limit": 4_i64 << 30, "used": 0}), "four times the packed bytes");
    assert_eq!(quota["pids"], json!({"limit": 4096}));
    assert_eq!(quota["api_tokens"], json!({"limit": 3, "used": 1}));
    assert_eq!(quota["service_accounts"]["limit"], 7, "the settings' limit");
    let cpu = json!({"limit": "2", "used": "0", "limit_millis": 2_000, "used_millis": 0});
    assert_eq!(quota["cpu"], cpu);
    assert_eq!(quota["releases_kept"], json!({"limit": 100}));
    // The tenant's own response shows reserved and stored resources.
    let tenant = app.get(&viewer, "/api/v1/tenants/acme").await;
    assert_eq!(tenant["quota"]["memory"], json!({"limit": 8_i64 << 30, "used": 0}));
    assert_eq!(tenant["quota"].as_object().unwrap().len(), 7, "{tenant}");
    let list = app.get(&admin, "/api/v1/tenants").await;
    assert_eq!(list["items"][0]["quota"], tenant["quota"]);
    // Set limits, then return to the defaults of the settings.
    let patch = |quota| app.ask(&admin, "PATCH", "/api/v1/tenants/acme", json!({"quota": quota}));
    assert_eq!(patch(json!({"service_accounts": 2, "pids": 512, "image_bytes": "2Gi"})).await.0, 202);
    let quota = app.get(&viewer, "/api/v1/tenants/acme/quota").await["quota"].clone();
    assert_eq!(quota["service_accounts"]["limit"], 2);
    assert_eq!((&quota["pids"]["limit"], &quota["image_bytes"]["limit"]), (&json!(512), &json!(2_i64 << 30)));
    assert_eq!(quota["cpu"], cpu, "a resource that is not named keeps its limit");
    assert_eq!(patch(json!({"service_accounts": "default"})).await.0, 202);
    let quota = app.get(&viewer, "/api/v1/tenants/acme/quota").await["quota"].clone();
    assert_eq!(quota["service_accounts"]["limit"], 7);
    let (status, wrong) =
        patch(json!({"platform_tokens": 3, "pids": "default", "robots": 1, "cpu": 16_000})).await;
    assert_eq!(status, 422);
    let paths: Vec<_> = wrong["faults"].as_array().unwrap().iter().map(|f| f["path"].clone()).collect();
    assert_eq!(paths, ["quota.cpu", "quota.pids", "quota.platform_tokens", "quota.robots"]);
    // Cores, as in a spec. A limit from a response can be sent again, and the response shows the new limit.
    for (given, limit) in
        [(json!(16), "16"), (json!("16000m"), "16"), (json!(0.25), "250m"), (json!("1.5"), "1500m")]
    {
        let (status, answer) = patch(json!({"cpu": given})).await;
        assert!(status == 202 && answer["quota"]["cpu"]["limit"] == limit, "{given}: {answer}");
        let again = patch(json!({"cpu": answer["quota"]["cpu"]["limit"]})).await.1;
        assert_eq!(again["quota"]["cpu"]["limit"], limit);
    }
    // A tenant cannot raise its own limits.
    let owner = app.token(Authority::Tenant(acme, Role::Owner)).await;
    let body = json!({"quota": {"api_tokens": 9_999}});
    assert_eq!(app.ask(&owner, "PATCH", "/api/v1/tenants/acme", body).await.0, 403);
    // The page shows every resource.
    let mut vera = app.member("vera", "acme", Role::Viewer).await;
    let page = vera.page("/tenants/acme").await;
    for resource in Resource::of_tenants() {
        assert!(page.contains(resource.definition().label), "{resource} is not on the page");
    }
}
