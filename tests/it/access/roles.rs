//! Roles: an actor cannot give more than its own role, and a revoked role ends at once.

use bulkhead::access::extract::still_may;
use bulkhead::access::{Authority, Means, ReadTenant, Role, credentials};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn members_change_leave_and_are_removed(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let mut bob = app.member("bob", "acme", Role::Viewer).await;
    let path = "/api/v1/tenants/acme/members/bob";
    assert_eq!(bob.api("PUT", path, json!({"role": "owner"})).await.0, 403, "not for oneself");
    assert_eq!(olga.api("PUT", path, json!({"role": "deployer"})).await.0, 200);
    let robots = "/api/v1/tenants/acme/robots";
    assert_eq!(bob.api("POST", robots, json!({"name": "ci"})).await.0, 403);
    assert_eq!(olga.api("PUT", path, json!({"role": "owner"})).await.0, 200);
    assert_eq!(bob.api("POST", robots, json!({"name": "ci"})).await.0, 201, "with the next request");
    // Of two owners, one may leave; the last one may not.
    assert_eq!(olga.api("DELETE", "/api/v1/me/tenants/acme", Value::Null).await.0, 204);
    assert_eq!(olga.api("GET", "/api/v1/tenants/acme", Value::Null).await.0, 404, "an outsider now");
    assert_eq!(bob.api("DELETE", "/api/v1/me/tenants/acme", Value::Null).await.0, 409);
    assert_eq!(bob.api("PUT", path, json!({"role": "viewer"})).await.0, 409);
    // A removed member's own tokens are revoked.
    let mut vera = app.member("vera", "acme", Role::Viewer).await;
    let body = json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 1});
    let token = vera.api("POST", "/api/v1/me/tokens", body).await.1["token"].as_str().unwrap().to_owned();
    app.get(&token, "/api/v1/tenants/acme").await;
    assert_eq!(
        bob.submit("/tenants/acme/members", "/tenants/acme/members/removal", &[("name", "vera")])
            .await
            .status(),
        303
    );
    assert_eq!(app.ask(&token, "GET", "/api/v1/tenants/acme", Value::Null).await.0, 401);
    assert_eq!(vera.api("GET", "/api/v1/tenants/acme", Value::Null).await.0, 404);
    assert!(vera.page("/").await.contains("do not belong to a tenant"));
}

/// If two owners demote each other at the same time, one stays an owner.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_tenant_keeps_an_owner_whatever_races(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let olga = app.member("olga", "acme", Role::Owner).await;
    let bob = app.member("bob", "acme", Role::Owner).await;
    for _ in 0..10 {
        app.sql("UPDATE membership SET role = 'owner'").await;
        let (mut one, mut two) = (olga.clone(), bob.clone());
        let (a, b) = tokio::join!(
            one.api("PUT", "/api/v1/tenants/acme/members/bob", json!({"role": "viewer"})),
            two.api("PUT", "/api/v1/tenants/acme/members/olga", json!({"role": "viewer"}))
        );
        let owners: i64 = sqlx::query_scalar("SELECT count(*) FROM membership WHERE role = 'owner'")
            .fetch_one(&app.root)
            .await
            .unwrap();
        assert!(owners >= 1, "{a:?} {b:?}");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_stream_ends_with_the_right_to_it(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let acme = app.tenant("acme").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let bob = app.member("bob", "acme", Role::Viewer).await;
    let name = "acme".parse().unwrap();
    let pool = &app.one.platform.pool;
    let reference = bob.cookie.as_ref().unwrap().split('=').nth(1).unwrap();
    let session = Means::Session { id: 0, hash: credentials::hash(reference), recent: true };
    let token = app.token(Authority::Tenant(acme, Role::Viewer)).await;
    let bearer =
        Means::Token { id: 0, hash: credentials::hash(&token), expires_at: time::OffsetDateTime::now_utc() };
    let may = async |means: &Means| still_may::<ReadTenant>(pool, means, &name).await.unwrap();
    assert!(may(&session).await && may(&bearer).await);
    let admin = app.admin().await;
    assert_eq!(app.ask(&admin, "PUT", "/api/v1/tenants/acme/suspension", Value::Null).await.0, 202);
    assert!(!may(&session).await && !may(&bearer).await, "a suspended tenant's streams end");
    // Its members can still read, but not change.
    assert_eq!(olga.api("GET", "/api/v1/tenants/acme", Value::Null).await.1["state"], "suspended");
    assert_eq!(olga.api("POST", "/api/v1/tenants/acme/robots", json!({"name": "ci"})).await.0, 409);
    assert_eq!(app.ask(&admin, "DELETE", "/api/v1/tenants/acme/suspension", Value::Null).await.0, 202);
    assert!(may(&session).await && may(&bearer).await);
    assert_eq!(olga.api("DELETE", "/api/v1/tenants/acme/members/bob", Value::Null).await.0, 204);
    assert!(!may(&session).await, "removed");
    app.sql("UPDATE api_token SET revoked_at = now() WHERE tenant_id IS NOT NULL").await;
    assert!(!may(&bearer).await, "revoked");
    // Offboarding ends the access of all members.
    let (status, _) =
        app.ask(&admin, "PUT", "/api/v1/tenants/acme/offboarding", json!({"confirm": "acme"})).await;
    assert_eq!(status, 202);
    assert_eq!(olga.api("GET", "/api/v1/tenants/acme", Value::Null).await.0, 404);
}
