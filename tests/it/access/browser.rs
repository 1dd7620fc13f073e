//! The pages in a real browser: no inline code runs, no foreign resource is loaded, the pages are accessible,
//! and no other origin can submit forms.

use std::io::Write;
use std::process::Stdio;

use bulkhead::access::{PlatformRole, Role};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::{PASSWORD, TestApp, node};

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn pages_hold_in_a_browser(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    app.member("bob", "acme", Role::Viewer).await;
    let base = "/api/v1/tenants/acme";
    for (path, body) in [
        ("service-accounts", json!({"name": "ci", "role": "deployer"})),
        ("tokens", json!({"service_account": "ci", "name": "pipeline", "days": 30})),
        ("invitations", json!({"name": "carl@example.org", "role": "viewer"})),
    ] {
        assert_eq!(olga.api("POST", &format!("{base}/{path}"), body).await.0, 201);
    }
    olga.api(
        "POST",
        "/api/v1/me/tokens",
        json!({"name": "<b>mine</b>", "tenant": "acme", "role": "viewer", "days": 3}),
    )
    .await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let (_, made) = ada.api("POST", "/api/v1/invitations", json!({"name": "ian"})).await;
    let invitation = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    let reset = app.ask(&admin, "POST", "/api/v1/accounts/bob/reset", Value::Null).await.1;
    let reset = reset["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    // A network with one object of each kind.
    for (path, body) in [
        (
            "/api/v1/services/kafka",
            json!({"description": "messages", "endpoints": [{"network": "10.5.0.2", "port": 9092}]}),
        ),
        (&format!("{base}/services/kafka"), json!({})),
        (
            &format!("{base}/egress/payments"),
            json!({"network": "192.88.99.0/24", "ports": [443, 8443], "reason": "to be <b>paid</b>"}),
        ),
        (
            &format!("{base}/egress/mail"),
            json!({"network": "192.88.99.7", "ports": [587], "reason": "receipts", "days": 30}),
        ),
        (
            &format!("{base}/egress/payments/decision"),
            json!({"id": 1, "approved": true, "note": "until the audit"}),
        ),
    ] {
        let (status, answer) = app.ask(&admin, "PUT", path, body).await;
        assert!((200..300).contains(&status), "{path}: {answer}");
    }
    let flow = json!([{"app": 1, "name": "web", "flows": [
        {"name": "kafka", "target": {"service": {"network": "10.5.0.2"}}, "protocol": "tcp", "port": 9092},
        {"name": "payments", "target": {"outside": {"network": "192.88.99.0/24"}}, "protocol": "tcp", "port": 443},
        {"name": "beta/api", "target": {"app": {"tenant": "beta", "app": 7}}, "protocol": "tcp", "port": 8080},
    ]}]);
    sqlx::query("INSERT INTO tenant_plan (tenant_id, number, hash, flows) SELECT id, 1, 'x', $1 FROM tenant")
        .bind(flow)
        .execute(&app.root)
        .await
        .unwrap();
    sqlx::query(
        "INSERT INTO network_plan (tenant_id, hash, opens, closes, causes, state) SELECT id, 'x', \
         '[\"web to the service kafka, 10.5.0.2 tcp 9092\"]', '[\"web to old, tcp 8080\"]', \
         '[{\"actor\": \"account:1 olga\", \"words\": \"release 2 of web\", \"at\": \"2026-01-01T00:00:00Z\"}]', 'in_force' FROM tenant",
    )
    .execute(&app.root)
    .await
    .unwrap();
    app.ask("bhk_wrong", "GET", "/api/v1/me", Value::Null).await;
    app.write_denials().await;
    let before = app.number("SELECT count(*) FROM invitation WHERE recipient <> $1", "").await;
    let mut pages: Vec<&str> = vec![
        "/tenants",
        "/people",
        "/audit",
        "/account",
        "/confirm",
        "/tenants/acme",
        "/tenants/acme/members",
        "/tenants/acme/network",
        "/tenants/acme/network?app=web&to=kafka&port=9092",
        "/network",
        "/tenants/acme/tokens",
        "/tenants/acme/activity",
        "/docs",
        "/docs/tenant/network",
        "/docs/architecture",
        "/docs/reference/spec",
        "/docs/permissions",
        "/docs/errors",
        "/nothing/here",
    ];
    pages.extend([invitation.as_str(), reset.as_str()]);
    let task = json!({
        "address": app.one.address, "name": "ada", "password": PASSWORD, "pages": pages,
        "forge": {
            "path": "/tenants/acme/members/invitation", "api": format!("{base}/invitations"),
            "fields": {"form": "x", "name": "mallory", "role": "owner"},
        },
        "shots": std::env::var("BULKHEAD_SHOTS").ok(),
    });
    let work = tokio::task::spawn_blocking(move || {
        let mut child = node("pages.mjs")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(task.to_string().as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    });
    let done = work.await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let seen: Value = serde_json::from_slice(&done.stdout).unwrap();
    for page in seen["pages"].as_array().unwrap() {
        let path = page["path"].as_str().unwrap();
        let wanted = if path == "/nothing/here" { 404 } else { 200 };
        assert_eq!(page["status"], wanted, "{page}");
        assert!(page["title"].as_str().unwrap().ends_with("Bulkhead"), "{page}");
        assert_eq!(page["faults"], json!([]), "{path}");
        assert_eq!(page["wide"], json!([]), "{path} is wider than its window");
        assert!(
            page["stopped"].as_i64().unwrap() >= 2,
            "{path}: the policy blocks the injected elements: {page}"
        );
    }
    assert_eq!(seen["dialogs"], 0, "no injected code ran");
    assert_eq!(seen["foreign"], json!([]), "only resources of this origin are loaded");
    assert_eq!(seen["forged"], 403, "another origin's form");
    assert_eq!(seen["fetched"], "failed", "another origin cannot read responses");
    assert_eq!(seen["framed"], false, "another origin cannot frame the page");
    let cookie = |name: &str| json!({"name": name, "httpOnly": true, "sameSite": "Lax", "path": "/"});
    assert_eq!(seen["cookies"], json!([cookie("bulkhead-loopback"), cookie("bulkhead-known-loopback")]));
    let after = app.number("SELECT count(*) FROM invitation WHERE recipient <> $1", "").await;
    assert_eq!(after, before);
}
