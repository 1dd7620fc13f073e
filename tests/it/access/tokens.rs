//! API tokens and service accounts: scope, lifetime, last use, and the role of the holder.

use bulkhead::access::{PlatformRole, Role};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_service_account_does_what_its_role_says_now(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let base = "/api/v1/tenants/acme";
    let (status, _) = olga
        .api("POST", &format!("{base}/service-accounts"), json!({"name": "ci", "role": "deployer"}))
        .await;
    assert_eq!(status, 201);
    let again =
        olga.api("POST", &format!("{base}/service-accounts"), json!({"name": "ci", "role": "viewer"})).await;
    assert_eq!(again.0, 409);
    let body = json!({"service_account": "ci", "name": "pipeline", "days": 30});
    let (status, made) = olga.api("POST", &format!("{base}/tokens"), body).await;
    assert_eq!(status, 201, "{made}");
    let token = made["token"].as_str().unwrap().to_owned();
    assert!(token.starts_with("bhk_") && token.len() > 50);
    app.get(&token, &format!("{base}/apps")).await;
    let me = app.get(&token, "/api/v1/me").await;
    assert_eq!(me["actor"]["id"], "service:ci", "{me}");
    assert!(me["actor"]["via"].as_str().unwrap().ends_with(" pipeline"), "{me}");
    // The last use is recorded; the token itself is not stored.
    let list = olga.api("GET", &format!("{base}/tokens"), Value::Null).await.1;
    let row = &list["items"][0];
    assert_eq!(row["service_account"], "ci");
    assert!(row["last_used_at"].is_string(), "{list}");
    let dump: String = sqlx::query_scalar("SELECT string_agg(k::text, ' ') FROM api_token k")
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert!(!dump.contains(&token[4..]));
    // Scope: not beyond the role, not beyond the tenant, and no access to user accounts.
    let (status, _) = app.ask(&token, "POST", &format!("{base}/robots"), json!({"name": "x"})).await;
    assert_eq!(status, 403);
    for (method, path) in [("GET", "/api/v1/tenants"), ("GET", "/api/v1/accounts"), ("GET", "/api/v1/audit")]
    {
        assert_eq!(app.ask(&token, method, path, Value::Null).await.0, 404, "{path}");
    }
    for (method, path) in [
        ("GET", "/api/v1/me/sessions"),
        ("PUT", "/api/v1/me/password"),
        ("POST", "/api/v1/me/second-factor"),
        ("POST", "/api/v1/me/tokens"),
    ] {
        let body = match path {
            "/api/v1/me/password" => json!({"new": "some odd sentence again"}),
            "/api/v1/me/tokens" => json!({"name": "x", "role": "viewer", "tenant": "acme", "days": 1}),
            _ => Value::Null,
        };
        assert_eq!(app.ask(&token, method, path, body).await.0, 403, "{method} {path}");
    }
    // A lower role of the service account applies to existing tokens.
    app.sql("UPDATE service_account SET role = 'viewer'").await;
    let spec = json!({"spec": "v1"});
    assert_eq!(app.ask(&token, "PUT", &format!("{base}/apps/web"), spec).await.0, 403);
    app.get(&token, &format!("{base}/apps")).await;
    assert_eq!(olga.api("DELETE", &format!("{base}/service-accounts/ci"), Value::Null).await.0, 204);
    assert_eq!(app.ask(&token, "GET", &format!("{base}/apps"), Value::Null).await.0, 401);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn nobody_gives_more_or_longer_than_they_have(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut bob = app.member("bob", "acme", Role::Deployer).await;
    let mut make = async |body: Value| bob.api("POST", "/api/v1/me/tokens", body).await;
    for (body, status) in [
        (json!({"name": "x", "tenant": "acme", "role": "owner", "days": 1}), 403),
        (json!({"name": "x", "role": "admin", "days": 1}), 403),
        (json!({"name": "x", "tenant": "other", "role": "viewer", "days": 1}), 422),
        (json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 366}), 422),
        (json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 0}), 422),
        (json!({"name": "", "tenant": "acme", "role": "viewer", "days": 1}), 422),
        (json!({"name": "a\u{202e}b", "tenant": "acme", "role": "viewer", "days": 1}), 422),
        (json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 1, "tenant_id": 1}), 422),
        (json!({"name": "x", "tenant": "acme", "role": "deployer", "days": 1}), 201),
    ] {
        let (got, answer) = make(body.clone()).await;
        assert_eq!(got, status, "{body}: {answer}");
    }
    // A token that another token creates must not outlive it.
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let (_, made) = olga
        .api(
            "POST",
            "/api/v1/me/tokens",
            json!({"name": "short", "tenant": "acme", "role": "owner", "days": 2}),
        )
        .await;
    let token = made["token"].as_str().unwrap().to_owned();
    let base = "/api/v1/tenants/acme";
    let (status, _) = app
        .ask(&token, "POST", &format!("{base}/service-accounts"), json!({"name": "ci", "role": "owner"}))
        .await;
    assert_eq!(status, 201);
    let longer = json!({"service_account": "ci", "name": "x", "days": 30});
    assert_eq!(app.ask(&token, "POST", &format!("{base}/tokens"), longer).await.0, 422);
    let shorter = json!({"service_account": "ci", "name": "x", "days": 1});
    assert_eq!(app.ask(&token, "POST", &format!("{base}/tokens"), shorter).await.0, 201);
    // Without days, the token gets the default lifetime, at most that of the token that creates it.
    let usual = json!({"service_account": "ci", "name": "usual"});
    let (status, made) = app.ask(&token, "POST", &format!("{base}/tokens"), usual.clone()).await;
    assert_eq!(status, 201, "{made}");
    let own: String = olga.api("GET", "/api/v1/me/tokens", Value::Null).await.1["items"][0]["expires_at"]
        .as_str()
        .unwrap()
        .into();
    assert_eq!(
        made["expires_at"].as_str().unwrap()[..16],
        own[..16],
        "it expires with the token that created it"
    );
    let (status, made) = olga.api("POST", &format!("{base}/tokens"), usual).await;
    let days = app.number("SELECT extract(day FROM max(expires_at) + interval '1 hour' - now())::bigint FROM api_token WHERE name = $1", "usual").await;
    assert_eq!((status, days), (201, 90), "{made}");
    let (_, told) = app
        .ask(
            &token,
            "POST",
            &format!("{base}/tokens"),
            json!({"service_account": "ci", "name": "x", "days": 3}),
        )
        .await;
    assert!(told["faults"][0]["suggestion"].as_str().unwrap().starts_with("set days to at most 1"), "{told}");
    // A user can revoke only its own tokens.
    let list = olga.api("GET", "/api/v1/me/tokens", Value::Null).await.1;
    assert_eq!(list["items"][0]["tenant"], "acme", "{list}");
    let id = list["items"][0]["id"].as_i64().unwrap();
    assert_eq!(
        bob.api("DELETE", &format!("/api/v1/me/tokens/{id}"), Value::Null).await.0,
        404,
        "another user's token"
    );
    assert_eq!(olga.api("DELETE", &format!("/api/v1/me/tokens/{id}"), Value::Null).await.0, 204);
    assert_eq!(app.ask(&token, "GET", base, Value::Null).await.0, 401);
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let (_, made) =
        ada.api("POST", "/api/v1/me/tokens", json!({"name": "x", "role": "auditor", "days": 1})).await;
    let auditor = made["token"].as_str().unwrap().to_owned();
    app.get(&auditor, "/api/v1/accounts").await;
    let body = json!({"name": "zoe", "platform_role": "admin"});
    assert_eq!(app.ask(&auditor, "POST", "/api/v1/invitations", body).await.0, 403, "the lower role applies");
}
