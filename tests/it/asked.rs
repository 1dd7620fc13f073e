//! No part of a request is ignored: on every address, each parameter, condition and body is used or refused
//! by name.

use bulkhead::routes;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

async fn send(
    app: &TestApp,
    token: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, String) {
    let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
    let mut request = reqwest::Client::new()
        .request(method, format!("{}{path}", app.one.address))
        .bearer_auth(token)
        .body(body.to_owned());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap_or(Value::Null);
    (status, body["detail"].as_str().unwrap_or_default().to_owned())
}

/// Fills the parameters of an address, for tenant acme.
fn fill(path: &str) -> String {
    path.replace("{tenant}", "acme")
        .replace("{repository:.+}", "none")
        .replace("{id}", "0")
        .replace("{uid}", "5")
        .split('/')
        .map(|part| if part.starts_with('{') { "none" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn every_address_refuses_what_it_does_not_honour(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::with(options, connect, |config| config.limits.request_burst = 100_000).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    let rows = routes::table();
    let api = rows.iter().filter(|(_, path)| path.starts_with("/api/"));
    let mut tried = 0;
    for (method, path) in api {
        let method = method.as_str();
        // Some addresses need a user; the schema is public.
        let address = fill(path);
        let place = format!("{method} {path}");
        let (status, told) = send(&app, &admin, method, &format!("{address}?unicorns=1"), &[], "").await;
        if status == 403 {
            continue;
        }
        assert!(status == 400 && told.contains("unicorns"), "{place}: {status} {told}");
        for (name, value) in [
            ("range", "bytes=0-1"),
            ("content-range", "bytes 0-1/2"),
            ("if-unmodified-since", "Wed, 21 Oct 2015 07:28:00 GMT"),
            ("if-modified-since", "Wed, 21 Oct 2015 07:28:00 GMT"),
            ("if-range", "\"1\""),
            ("x-http-method-override", "DELETE"),
            ("content-encoding", "gzip"),
        ] {
            let query = if path.ends_with("/reach") { "?to=x&port=1" } else { "" };
            let (status, told) =
                send(&app, &admin, method, &format!("{address}{query}"), &[(name, value)], "").await;
            let told = told.to_ascii_lowercase();
            assert!(status == 400 && told.contains(name), "{place} {name}: {status} {told}");
        }
        for name in ["if-match", "if-none-match"] {
            let query = if path.ends_with("/reach") { "?to=x&port=1" } else { "" };
            let (status, told) =
                send(&app, &admin, method, &format!("{address}{query}"), &[(name, "W/\"9\"")], "").await;
            let told = told.to_ascii_lowercase();
            assert!(status == 400 && told.contains(name), "{place} {name}: {status} {told}");
        }
        tried += 1;
    }
    assert!(tried > 80, "{tried}");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn conditions_hold_where_they_are_taken(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    let json_kind = ("content-type", "application/json");
    let service =
        json!({"endpoints": [{"network": "192.0.2.5/32", "protocol": "tcp", "port": 9092}]}).to_string();
    let put = async |headers: &[(&str, &str)]| {
        let headers: Vec<_> = headers.iter().copied().chain([json_kind]).collect();
        send(&app, &admin, "PUT", "/api/v1/services/kafka", &headers, &service).await
    };
    assert_eq!(put(&[("if-match", "*")]).await.0, 412, "the object does not exist yet");
    assert_eq!(put(&[("if-none-match", "*")]).await.0, 201);
    let (status, told) = put(&[("if-none-match", "*")]).await;
    assert!(status == 412 && told.contains("If-None-Match"), "{told}");
    assert_eq!(put(&[("if-match", "*")]).await.0, 200);
    assert_eq!(put(&[("if-match", "\"7\", \"1\"")]).await.0, 200);
    assert_eq!(put(&[("if-match", "\"7\"")]).await.0, 412);
    // An app that does not exist, and one that does, without a registry.
    let spec = "spec: v1\nname: web\nimage: web:1\ncpu: 10m\nmemory: 32Mi\n";
    let deploy = async |headers: &[(&str, &str)]| {
        let headers: Vec<_> = headers.iter().copied().chain([("content-type", "application/yaml")]).collect();
        send(&app, &admin, "PUT", "/api/v1/tenants/acme/apps/web", &headers, spec).await.0
    };
    assert_eq!(deploy(&[("if-match", "*")]).await, 412);
    assert_eq!(deploy(&[("if-match", "\"3\"")]).await, 412);
    assert_eq!(deploy(&[("if-none-match", "*")]).await, 422, "only the image is missing");
    app.sql(
        "INSERT INTO app (tenant_id, name, generation, peak_instances, peak_surge, peak_cpu_millis, peak_memory, \
         uid_slot, uid_start, uid_size) SELECT tenant_id, 'web', 3, 1, 1, 100, 67108864, slot, lower(r), 1024 \
         FROM uid_range WHERE tenant_id = (SELECT id FROM tenant WHERE name = 'acme')",
    )
    .await;
    assert_eq!(deploy(&[("if-none-match", "*")]).await, 412);
    assert_eq!(deploy(&[("if-none-match", "\"3\"")]).await, 412);
    assert_eq!(deploy(&[("if-match", "\"2\"")]).await, 412);
    for (name, value) in [("if-match", "*"), ("if-match", "\"3\""), ("if-none-match", "\"2\"")] {
        assert_eq!(deploy(&[(name, value)]).await, 422, "{name}: {value}");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_body_that_nothing_reads_is_refused(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    let json_kind = [("content-type", "application/json")];
    let suspension = "/api/v1/tenants/acme/suspension";
    let (status, told) = send(&app, &admin, "PUT", suspension, &json_kind, "{\"until\": \"monday\"}").await;
    assert!(status == 400 && told.contains("no body"), "{told}");
    let (status, _) = send(&app, &admin, "GET", "/api/v1/tenants", &json_kind, "{\"limit\": 1}").await;
    assert_eq!(status, 400);
    assert_eq!(send(&app, &admin, "PUT", suspension, &json_kind, "{}").await.0, 202);
    let (status, told) = send(&app, &admin, "DELETE", suspension, &[("expect", "200-maybe")], "").await;
    assert!(status == 400 && told.contains("Expect"), "{told}");
    // A misspelled parameter, and a duplicate one.
    let (status, told) = send(&app, &admin, "GET", "/api/v1/tenants?limt=3", &[], "").await;
    assert!(status == 400 && told.contains("did you mean limit"), "{told}");
    let (status, told) = send(&app, &admin, "GET", "/api/v1/tenants?limit=3&limit=4", &[], "").await;
    assert!(status == 400 && told.contains("twice"), "{told}");
    let (status, told) =
        send(&app, &admin, "PUT", "/api/v1/tenants/acme/apps/web?dryrun=true", &[], "").await;
    assert!(status == 400 && told.contains("did you mean dry_run"), "{told}");
}
