//! Failures in the middle of an action: access stays denied, the client sees no detail, and the service
//! survives. A separate program, because failpoints apply to a whole process.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot continue panics")]

#[path = "../it/support/mod.rs"]
#[allow(dead_code, reason = "not every test needs all of it")]
mod support;

use bulkhead::access::{PlatformRole, Role};
use bulkhead::audit::heads::Heads;
use bulkhead::audit::seal;
use bulkhead::audit::verify::verify;
use bulkhead::keys::KeyPurpose;
use bulkhead::routes;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use support::TestApp;

async fn rows(app: &TestApp) -> i64 {
    app.number("SELECT count(*) FROM audit WHERE actor <> $1", "").await
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn when_authentication_fails_no_handler_is_reached(options: PgPoolOptions, connect: PgConnectOptions) {
    let scenario = fail::FailScenario::setup();
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let token = app.admin().await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let before = rows(&app).await;
    for (action, told) in [("return", "a mistake in the middle"), ("panic(oops)", "a panic")] {
        fail::cfg("access::authenticate", action).unwrap();
        for (method, path) in routes::table() {
            if !path.starts_with("/api/") || path.contains("/schemas/") {
                continue;
            }
            let path = path.replace("{tenant}", "acme").replace("{repository:.+}", "x").replace("{id}", "1");
            let path: Vec<&str> =
                path.split('/').map(|p| if p.starts_with('{') { "none" } else { p }).collect();
            let (status, body) =
                app.ask(&token, method.as_str(), &path.join("/"), json!({"name": "beta"})).await;
            assert_eq!(status, 500, "{told}: {method} {path:?}: {body}");
            assert!(body["request_id"].is_string(), "{body}");
            let text = body.to_string();
            assert!(
                !text.contains("oops") && !text.contains("failpoint") && !text.contains("src/"),
                "{text}"
            );
        }
        assert_eq!(ada.get("/account").await.status(), 500);
        fail::remove("access::authenticate");
        // The process survives, and nothing was changed.
        ada.page("/account").await;
        assert_eq!(rows(&app).await, before, "{told}");
    }
    scenario.teardown();
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_seal_that_fails_is_made_later(options: PgPoolOptions, connect: PgConnectOptions) {
    let scenario = fail::FailScenario::setup();
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let key = app.one.platform.desk.keys.of(KeyPurpose::Audit);
    let heads = Heads::in_file(app.config.access.audit_heads.clone());
    let work = &app.one.platform.work;
    fail::cfg("audit::seal_commit", "return").unwrap();
    assert!(seal::seal(work, &key, &heads).await.is_err());
    fail::remove("audit::seal_commit");
    let report = verify(work, &key, &heads).await.unwrap();
    assert!(report.findings.is_empty() && report.rounds == 0 && report.unsealed > 0, "{report:?}");
    app.seal().await;
    app.member("olga", "acme", Role::Owner).await;
    // Crash between the commit and the line in the heads file: the file lacks the newest head.
    seal::seal(work, &key, &Heads::in_file(None)).await.unwrap();
    let report = verify(work, &key, &heads).await.unwrap();
    assert!(report.findings.is_empty(), "a file that lacks one head is not an alarm: {report:?}");
    app.member("bob", "acme", Role::Viewer).await;
    app.seal().await;
    let report = verify(work, &key, &heads).await.unwrap();
    assert!(
        report.findings.is_empty() && report.unsealed == 0 && report.rows == rows(&app).await,
        "{report:?}"
    );
    scenario.teardown();
}

/// The database becomes unavailable during requests: no request is authorized, and clients get 503.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn without_the_database_nobody_gets_in(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let token = app.admin().await;
    app.one.platform.pool.close().await;
    let (status, _) = app.ask(&token, "GET", "/api/v1/tenants", Value::Null).await;
    assert_eq!(status, 503);
    assert_eq!(ada.get("/account").await.status(), 503);
    let answer = app.nobody("ada").post("/login", &[("name", "ada"), ("password", support::PASSWORD)]).await;
    assert_eq!(answer.status(), 503, "without the rate limiter, no password is tried");
    assert!(answer.headers().contains_key("retry-after"));
}
