//! HTTP: headers of every response, data that no response may reveal, and limits that apply early.

use bulkhead::access::{PlatformRole, Role};
use bulkhead::routes;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::{PASSWORD, TestApp, page};

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn every_answer_bears_its_headers(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let mut paths: Vec<String> = routes::table()
        .into_iter()
        .filter(|(method, _)| method.as_str() == "GET")
        .map(|(_, path)| {
            path.replace("{tenant}", "acme").replace("{file}", "tokens.css").replace("{repository:.+}", "x")
        })
        .map(|path| {
            path.split('/').map(|p| if p.starts_with('{') { "none" } else { p }).collect::<Vec<_>>().join("/")
        })
        .collect();
    paths.extend([
        "/nothing/here".to_owned(),
        "/api/v1/nothing".into(),
        "/%00".into(),
        "/tenants/acme/apps/".into(),
    ]);
    for path in paths {
        app.sql("TRUNCATE throttle").await;
        let origin = [("origin", "https://evil.example"), ("accept", "text/html")];
        let answer = ada.send("GET", &path, &origin, String::new()).await;
        let headers = answer.headers();
        let text = |name: &str| {
            headers.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
        };
        assert!(text("content-security-policy").starts_with("default-src 'none'"), "{path}");
        assert!(!text("content-security-policy").contains("unsafe"), "{path}");
        assert_eq!(text("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(text("referrer-policy"), "same-origin", "{path}");
        assert_eq!(text("cross-origin-opener-policy"), "same-origin", "{path}");
        assert!(text("content-security-policy").contains("frame-ancestors 'none'"), "{path}");
        let wanted = if path.starts_with("/static/") { "public, max-age=3600" } else { "no-store" };
        assert_eq!(text("cache-control"), wanted, "{path}");
        assert!(!headers.contains_key("access-control-allow-origin"), "{path}");
        assert!(!text("x-request-id").is_empty(), "{path}");
        if answer.status().as_u16() >= 300 && answer.status().as_u16() < 400 {
            assert!(text("location").starts_with('/') && !text("location").starts_with("//"), "{path}");
        }
        let body = answer.text().await.unwrap();
        for told in ["SQLSTATE", "sqlx", "/work/", "src/", "panicked", "stack backtrace", "postgres://"] {
            assert!(!body.contains(told), "{path} tells {told}: {body}");
        }
        assert!(!body.contains("<script") && !body.contains("style="), "{path} has something inline");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn forged_requests_change_nothing(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let before: i64 = sqlx::query_scalar("SELECT count(*) FROM audit").fetch_one(&app.root).await.unwrap();
    let token = page::form_token(&olga.page("/account").await);
    let form = page::form(&[("form", &token), ("name", "mallory"), ("role", "owner")]);
    let path = "/tenants/acme/members/invitation";
    let kind = ("content-type", "application/x-www-form-urlencoded");
    let own = olga.address.clone();
    // From another site, in every way that a browser allows.
    for headers in [
        vec![kind, ("origin", "https://evil.example")],
        vec![kind, ("origin", "null")],
        vec![kind],
        vec![kind, ("sec-fetch-site", "cross-site")],
        vec![kind, ("origin", own.as_str()), ("sec-fetch-site", "same-site")],
        vec![("content-type", "text/plain"), ("origin", "https://evil.example")],
    ] {
        let answer = olga.send("POST", path, &headers, form.clone()).await;
        assert_eq!(answer.status(), 403, "{headers:?}");
    }
    // From our own page, but without the token of this session.
    let origin = ("origin", own.as_str());
    let mut eve = app.member("eve", "acme", Role::Viewer).await;
    let others = page::form_token(&eve.page("/account").await);
    for token in ["", "x", others.as_str()] {
        let form = page::form(&[("form", token), ("name", "mallory"), ("role", "owner")]);
        assert_eq!(olga.send("POST", path, &[kind, origin], form).await.status(), 403);
    }
    let without = page::form(&[("name", "mallory"), ("role", "owner")]);
    assert_eq!(olga.send("POST", path, &[kind, origin], without).await.status(), 403);
    // With a session, the API accepts JSON from our own pages only, and nothing that a form can send.
    for headers in [
        vec![("content-type", "application/json"), ("origin", "https://evil.example")],
        vec![("content-type", "text/plain"), origin],
        vec![("content-type", "application/x-www-form-urlencoded"), origin],
    ] {
        let body = json!({"name": "mallory", "role": "owner"}).to_string();
        let status =
            olga.send("POST", "/api/v1/tenants/acme/invitations", &headers, body).await.status().as_u16();
        assert!([400, 403].contains(&status), "{headers:?}: {status}");
    }
    let after: i64 = sqlx::query_scalar("SELECT count(*) FROM audit WHERE action = 'member.invite'")
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert_eq!(after, 2, "only the two invitations of the test's own members");
    // GET requests change nothing.
    for (method, path) in routes::table() {
        if method.as_str() == "GET" {
            app.sql("TRUNCATE throttle").await;
            let path = path.replace("{tenant}", "acme").replace("{repository:.+}", "x");
            let path: Vec<&str> =
                path.split('/').map(|p| if p.starts_with('{') { "none" } else { p }).collect();
            olga.get(&path.join("/")).await;
        }
    }
    let at_last: i64 = sqlx::query_scalar("SELECT count(*) FROM audit").fetch_one(&app.root).await.unwrap();
    assert_eq!(at_last, before + 4, "token, invitation, joining and session of eve; GET requests add no row");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn what_people_type_stays_text(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let admin = app.admin().await;
    for (n, payload) in [
        "<script>alert(1)</script>",
        "\"><img src=x onerror=alert(1)>",
        "' onmouseover='alert(1)",
        "javascript:alert(1)",
        "{{7*7}}",
        "<svg/onload=alert(1)>",
        "</title><script>alert(1)</script>",
    ]
    .iter()
    .enumerate()
    {
        let body = json!({"name": format!("person{n}"), "role": "viewer"});
        let (_, made) = app.ask(&admin, "POST", "/api/v1/tenants/acme/invitations", body).await;
        let path = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
        let mut person = app.nobody("x");
        let answer = person.post(&path, &[("display_name", payload), ("password", PASSWORD)]).await;
        assert_eq!(answer.status(), 303);
        let (status, _) =
            app.ask(&admin, "PATCH", "/api/v1/tenants/acme", json!({"display_name": payload})).await;
        assert_eq!(status, 202);
        let text = person.get("/login").await.text().await.unwrap() + &olga.page("/tenants/acme").await;
        let filter: String = page::form(&[("actor", payload)]);
        let text = text
            + &olga.page("/tenants/acme/members").await
            + &olga.page(&format!("/tenants/acme/activity?{filter}")).await
            + &person.get("/account").await.text().await.unwrap();
        let wrong = app.nobody("x").post("/login", &[("name", payload), ("password", "x")]).await;
        let text = text + &wrong.text().await.unwrap();
        assert!(!text.contains(payload) || !payload.contains(['<', '"', '\'']), "{payload}");
        for sign in ["<script", "onerror=alert", "<svg/onload", "href=\"javascript"] {
            assert!(
                !text.replace("&lt;", "").replace("&#60;", "").contains(sign)
                    || !text.contains(&format!("<{sign}")),
                "{payload}: {sign}"
            );
        }
        app.sql("TRUNCATE throttle").await;
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn what_is_too_much_is_refused_early(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let mut ada = app.person("ada", Some(PlatformRole::Admin)).await;
    let origin = ada.address.clone();
    let json_type = [("origin", origin.as_str()), ("content-type", "application/json")];
    let big = format!("{{\"name\": \"{}\"}}", "x".repeat(200_000));
    assert_eq!(ada.send("POST", "/api/v1/tenants", &json_type, big).await.status(), 413);
    let deep = "[".repeat(60_000);
    assert_eq!(ada.send("POST", "/api/v1/tenants", &json_type, deep).await.status(), 422);
    let form = [("origin", origin.as_str()), ("content-type", "application/x-www-form-urlencoded")];
    let long = format!("name=ada&password={}", "x".repeat(100_000));
    assert!([400, 413].contains(&ada.send("POST", "/login", &form, long).await.status().as_u16()));
    // Headers beyond the server's limit end the connection or the request, never the service.
    let _ = reqwest::Client::new()
        .get(format!("{}/login", app.one.address))
        .header("x-long", "x".repeat(400_000))
        .send()
        .await;
    ada.page("/account").await;
    // Fields that clients must not set.
    for body in [
        json!({"name": "zoe", "platform_role": "auditor", "id": 1}),
        json!({"name": "zoe", "password": "x"}),
        json!({"name": "zoe", "account_id": 1}),
    ] {
        assert_eq!(ada.api("POST", "/api/v1/invitations", body).await.0, 422);
    }
    for (key, value) in
        [("tenant_id", json!(1)), ("created_at", json!("now")), ("platform_role", json!("root"))]
    {
        assert_eq!(ada.api("PATCH", "/api/v1/accounts/ada", json!({key: value})).await.0, 422, "{key}");
    }
    // Names reject text that controls a log or a terminal.
    for bad in ["a\nb", "a\u{1b}[2Jb", "\u{202e}evil"] {
        let (status, _) = ada.api("PATCH", "/api/v1/tenants/none", json!({"display_name": bad})).await;
        assert!(status >= 400);
        let (status, _) = ada.api("POST", "/api/v1/invitations", json!({"name": bad})).await;
        assert_eq!(status, 422);
    }
    let (_, me) = ada.api("GET", "/api/v1/me", Value::Null).await;
    assert_eq!(me["platform_role"], "admin");
    let fields: Vec<&String> = me.as_object().unwrap().keys().collect();
    assert_eq!(
        fields,
        ["actor", "by", "name", "platform_role", "second_factor", "tenants"],
        "no other fields"
    );
}
