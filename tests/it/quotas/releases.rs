//! Releases: the newest of each app and the running ones are kept. Others are deleted as new ones are written.

use bulkhead::access::{Authority, Role};
use bulkhead::ids::TenantId;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

const PATH: &str = "/api/v1/tenants/acme/apps/web";

/// Inserts an app with one release and its image, as a deploy leaves it.
pub(crate) async fn insert_app(app: &TestApp, tenant: TenantId) {
    let id = tenant.0;
    for statement in [
        format!(
            "INSERT INTO manifest (tenant_id, repository, digest, media_type, size, total, confirmed, pushed_by) VALUES ({id}, 'web', 'sha256:' || repeat('b', 64), 'x', 5, 10, true, 'x')"
        ),
        format!(
            "INSERT INTO app (tenant_id, name, peak_instances, peak_surge, peak_cpu_millis, peak_memory, uid_slot, uid_start, uid_size) SELECT tenant_id, 'web', 1, 1, 100, 67108864, slot, lower(r), 1024 FROM uid_range WHERE tenant_id = {id}"
        ),
        format!("UPDATE uid_range SET given_blocks = 1 WHERE tenant_id = {id}"),
        format!(
            "UPDATE quota SET used = CASE resource WHEN 'apps' THEN 1 WHEN 'instances' THEN 2 WHEN 'cpu' THEN 200 ELSE 134217728 END WHERE tenant_id = {id} AND resource IN ('apps', 'instances', 'cpu', 'memory')"
        ),
        format!(
            "INSERT INTO release (tenant_id, app_id, revision, spec, repository, index_digest, digest, inside_uid, inside_gid, actor) SELECT tenant_id, id, 1, '{{\"spec\": \"v1\", \"name\": \"web\", \"image\": \"web:1\", \"cpu\": \"100m\", \"memory\": \"64Mi\", \"instances\": 1}}', 'web', 'sha256:' || repeat('b', 64), 'sha256:' || repeat('b', 64), 1000, 1000, 'x' FROM app WHERE tenant_id = {id}"
        ),
    ] {
        app.sql(&statement).await;
    }
}

async fn roll_back(app: &TestApp, token: &str, revision: i64) -> (u16, Value) {
    app.ask(token, "POST", &format!("{PATH}/releases"), json!({"revision": revision})).await
}

async fn kept(app: &TestApp) -> Vec<i64> {
    sqlx::query_scalar("SELECT revision FROM release ORDER BY revision").fetch_all(&app.root).await.unwrap()
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn releases_beyond_the_kept_ones_go_and_those_that_run_stay(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let app = TestApp::with(options, connect, |config| {
        config.limits.requests_per_second = 100_000;
        config.limits.request_burst = 100_000;
    })
    .await;
    let acme = app.tenant("acme").await;
    insert_app(&app, acme).await;
    let owner = app.token(Authority::Tenant(acme, Role::Owner)).await;
    // Release 2 keeps running whatever is deployed after it. Release 1 is the last one the machine observed.
    let observed = json!({
        "tenant": "acme", "app": "web", "app_id": 1, "generation": 1, "revision": 1, "settled": false, "events": [],
        "instances": [{"number": 1, "revision": 2, "state": "running", "since": "2026-11-27T00:00:00Z", "restarts": 0,
                       "address": "10.64.0.2", "container": "x"}],
    });
    app.sql(&format!("UPDATE app SET observed = '{observed}'")).await;
    for revision in 1..150 {
        let (status, answer) = roll_back(&app, &owner, revision).await;
        assert_eq!(status, 202, "{revision}: {answer}");
        let rows = kept(&app).await;
        assert!(rows.len() <= 102, "{} rows after release {}", rows.len(), revision + 1);
    }
    let rows = kept(&app).await;
    assert_eq!(rows[..3], [1, 2, 51], "the running one, the observed one, and the newest 100");
    assert_eq!((rows.len(), rows.last()), (102, Some(&150)));
    // The error tells a deleted release from one that never existed.
    let (status, gone) = roll_back(&app, &owner, 40).await;
    assert_eq!(status, 422);
    assert!(
        gone["faults"][0]["message"].as_str().unwrap().contains("release 40 is no longer kept"),
        "{gone}"
    );
    assert!(gone["faults"][0]["suggestion"].as_str().unwrap().contains("releases"), "{gone}");
    let (_, never) = roll_back(&app, &owner, 900).await;
    assert!(never["faults"][0]["message"].as_str().unwrap().contains("no such revision"), "{never}");
    // Kept releases can be rolled back to, also the oldest.
    for revision in [1, 2, 120] {
        assert_eq!(roll_back(&app, &owner, revision).await.0, 202, "{revision}");
    }
    // A lower limit makes housekeeping delete the others. Running and desired releases stay.
    let admin = app.admin().await;
    let body = json!({"quota": {"releases_kept": 5}});
    assert_eq!(app.ask(&admin, "PATCH", "/api/v1/tenants/acme", body).await.0, 202);
    bulkhead::apps::prune(&app.one.platform.work).await.unwrap();
    assert_eq!(kept(&app).await, [1, 2, 149, 150, 151, 152, 153]);
    bulkhead::apps::prune(&app.one.platform.work).await.unwrap();
    assert_eq!(kept(&app).await.len(), 7, "a second run deletes nothing more");
    // No release of a deleted app is kept.
    app.sql("UPDATE app SET deleted_at = now(), removed_at = now() - interval '2 days'").await;
    bulkhead::apps::prune(&app.one.platform.work).await.unwrap();
    assert_eq!(kept(&app).await, Vec::<i64>::new());
}
