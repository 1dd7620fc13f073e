//! `Idempotency-Key` on every change: one request, one effect, one response. A replayed secret is not stored in
//! clear text.

use bulkhead::access::Role;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

struct Asks<'a> {
    app: &'a TestApp,
    token: String,
}

impl Asks<'_> {
    async fn ask(&self, key: &str, method: &str, path: &str, body: Value) -> (u16, bool, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = reqwest::Client::new()
            .request(method, format!("{}{path}", self.app.one.address))
            .bearer_auth(&self.token)
            .header("idempotency-key", key);
        if !body.is_null() {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let replayed = answer.headers().contains_key("idempotency-replayed");
        (status, replayed, serde_json::from_str(&answer.text().await.unwrap()).unwrap_or(Value::Null))
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn what_gives_a_secret_gives_the_same_one_again(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.member("olga", "acme", Role::Owner).await;
    let asks = Asks { app: &app, token: app.admin().await };
    let base = "/api/v1/tenants/acme";
    asks.ask("first", "POST", &format!("{base}/service-accounts"), json!({"name": "ci", "role": "deployer"}))
        .await;
    for (n, (path, body, secret)) in [
        (format!("{base}/robots"), json!({"name": "ci", "push": true}), "secret"),
        (format!("{base}/tokens"), json!({"service_account": "ci", "name": "x", "days": 30}), "token"),
        (format!("{base}/invitations"), json!({"name": "vera", "role": "viewer"}), "link"),
        (format!("{base}/members/olga/reset"), Value::Null, "link"),
        ("/api/v1/invitations".to_owned(), json!({"name": "audrey", "platform_role": "auditor"}), "link"),
        ("/api/v1/accounts/olga/reset".to_owned(), Value::Null, "link"),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("key-{n}");
        let (status, replayed, first) = asks.ask(&key, "POST", &path, body.clone()).await;
        assert!(status == 201 && !replayed, "{path}: {status} {first}");
        let (status, replayed, again) = asks.ask(&key, "POST", &path, body.clone()).await;
        assert!(status == 201 && replayed && again == first, "{path}: {status} {again}");
        let secret = first[secret].as_str().unwrap();
        let secret = secret.rsplit('/').next().unwrap();
        let kept: String = sqlx::query_scalar("SELECT string_agg(i::text, ' ') FROM idempotency i")
            .fetch_one(&app.root)
            .await
            .unwrap();
        assert!(secret.len() > 20 && !kept.contains(secret), "{path}: a secret stands in the database");
        // The same key with a different request.
        let (status, _, told) = asks.ask(&key, "PATCH", base, json!({"display_name": "x"})).await;
        assert!(
            status == 409 && told["detail"].as_str().unwrap().contains("another request"),
            "{path}: {told}"
        );
    }
    let rows = app.number("SELECT count(*) FROM robot WHERE name = $1", "ci").await;
    assert_eq!(rows, 1);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn every_change_takes_a_key(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.tenant("idle").await;
    let asks = Asks { app: &app, token: app.admin().await };
    let service = json!({"endpoints": [{"network": "192.0.2.5/32", "protocol": "tcp", "port": 9092}]});
    for (n, (method, path, body)) in [
        ("PATCH", "/api/v1/tenants/acme", json!({"display_name": "Acme"})),
        ("PUT", "/api/v1/services/kafka", service),
        ("PUT", "/api/v1/tenants/acme/services/kafka", Value::Null),
        ("DELETE", "/api/v1/tenants/acme/services/kafka", Value::Null),
        ("DELETE", "/api/v1/services/kafka", Value::Null),
        ("PUT", "/api/v1/tenants/idle/suspension", Value::Null),
        ("POST", "/api/v1/tenants", json!({"name": "third"})),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("key {n}");
        let first = asks.ask(&key, method, path, body.clone()).await;
        assert!((200..300).contains(&first.0), "{method} {path}: {first:?}");
        let again = asks.ask(&key, method, path, body).await;
        assert_eq!((again.0, &again.2), (first.0, &first.2), "{method} {path}");
    }
    let events = app.number("SELECT count(*) FROM audit WHERE action = $1", "tenant.change").await;
    assert_eq!(events, 1, "a repeated change is not done twice");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_request_that_was_cut_off_is_told_so_and_a_refused_one_frees_its_key(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let asks = Asks { app: &app, token: app.admin().await };
    let path = "/api/v1/tenants/acme/robots";
    // A refused request frees its key for the corrected request.
    assert_eq!(asks.ask("k", "POST", path, json!({"name": "NO"})).await.0, 422);
    assert_eq!(asks.ask("k", "POST", path, json!({"name": "ci"})).await.0, 201);
    // Simulate a crash between the change and the response.
    app.sql("UPDATE idempotency SET status = 0, response = 'null' WHERE key = 'k'").await;
    let (status, _, told) = asks.ask("k", "POST", path, json!({"name": "ci"})).await;
    let told = told["detail"].as_str().unwrap().to_owned();
    assert!(status == 409 && told.contains("new key") && told.contains("revoke"), "{told}");
    // A request that cannot use a key is refused, and the error names the header.
    let (status, _, told) = asks.ask("g", "GET", path, Value::Null).await;
    assert!(status == 400 && told["detail"].as_str().unwrap().contains("Idempotency-Key"), "{told}");
    let long = "x".repeat(201);
    assert_eq!(asks.ask(&long, "POST", path, json!({"name": "cj"})).await.0, 400);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn two_at_once_are_one(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let asks = Asks { app: &app, token: app.admin().await };
    let path = "/api/v1/tenants/acme/invitations";
    let one = || asks.ask("same", "POST", path, json!({"name": "vera", "role": "viewer"}));
    let (a, b, c) = tokio::join!(one(), one(), one());
    let mut statuses = [a.0, b.0, c.0];
    statuses.sort_unstable();
    assert!(
        statuses.iter().all(|status| [201, 409].contains(status)) && statuses.contains(&201),
        "{statuses:?}"
    );
    let open = app.get(&asks.token, path).await;
    assert_eq!(open["items"].as_array().unwrap().len(), 1, "{statuses:?}");
    assert_eq!(one().await.0, 201);
}
