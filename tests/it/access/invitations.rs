//! Single-use links: they work once, for their recipient, before they expire, even with concurrent requests.

use bulkhead::access::{PlatformRole, Role};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::{PASSWORD, TestApp, page};

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn an_invitation_opens_once_for_its_recipient(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.tenant("beta").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let fields = [("name", "Bob@example.org"), ("role", "deployer")];
    let answer = olga.submit("/tenants/acme/members", "/tenants/acme/members/invitation", &fields).await;
    assert_eq!(answer.status(), 200);
    let link = page::secrets(&answer.text().await.unwrap()).pop().unwrap();
    let path = link.strip_prefix(&app.one.address).unwrap().to_owned();
    // Opening the page does not use the link up, and the list does not show the link.
    let mut bob = app.nobody("bob@example.org");
    for _ in 0..2 {
        let text = bob.page(&path).await;
        assert!(
            text.contains("bob@example.org") && text.contains("acme") && text.contains("deployer"),
            "{text}"
        );
    }
    let code = path.rsplit('/').next().unwrap().to_owned();
    let list = olga.api("GET", "/api/v1/tenants/acme/invitations", Value::Null).await.1.to_string();
    assert!(list.contains("bob@example.org") && !list.contains(&code), "{list}");
    assert!(!olga.page("/tenants/acme/members").await.contains(&code));
    // A forged form and a weak password do not use the link up.
    let fields = [("display_name", "Bob"), ("password", PASSWORD)];
    assert_eq!(bob.post_from("http://evil.example", &path, &fields).await.status(), 403);
    let weak = bob.post(&path, &[("display_name", "Bob"), ("password", "password1")]).await;
    assert_eq!(weak.status(), 422);
    // Two concurrent requests: one succeeds.
    let another = app.another().await;
    let (mut one, mut two) = (bob.clone(), bob.clone());
    two.address.clone_from(&another.address);
    let (a, b) = tokio::join!(one.post(&path, &fields), two.post(&path, &fields));
    let mut answers = [a.status().as_u16(), b.status().as_u16()];
    answers.sort_unstable();
    assert!(answers == [303, 404] || answers == [303, 422], "{answers:?}");
    another.stop().await;
    let bob = if one.cookie.is_some() { &mut one } else { &mut two };
    bob.address.clone_from(&app.one.address);
    assert_eq!(bob.get(&path).await.status(), 404, "used up");
    assert!(bob.page("/tenants/acme").await.contains("acme"));
    let me = bob.api("GET", "/api/v1/me", Value::Null).await.1;
    assert_eq!(me["tenants"][0]["role"], "deployer", "{me}");
    // A recipient with an account accepts as that account only.
    let admin = app.admin().await;
    let body = json!({"name": "bob@example.org", "role": "viewer"});
    let (_, made) = app.ask(&admin, "POST", "/api/v1/tenants/beta/invitations", body).await;
    let path = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    assert!(app.nobody("x").page(&path).await.contains("Sign in as bob@example.org"));
    assert_eq!(olga.post(&path, &fields).await.status(), 403, "the invitation is for another account");
    let thief = app.nobody("x").post(&path, &fields).await;
    assert_eq!(thief.status(), 422, "no second account of the same name");
    assert_eq!(bob.post(&path, &[]).await.status(), 303);
    assert_eq!(bob.api("GET", "/api/v1/me", Value::Null).await.1["tenants"].as_array().unwrap().len(), 2);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn an_invitation_has_its_time_and_can_be_taken_back(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    let invite = async || {
        let body = json!({"name": "bob", "role": "viewer"});
        let (status, made) = app.ask(&admin, "POST", "/api/v1/tenants/acme/invitations", body).await;
        assert_eq!(status, 201, "{made}");
        let path = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
        (made["id"].as_i64().unwrap(), path)
    };
    let (_, first) = invite().await;
    let (id, second) = invite().await;
    assert_eq!(app.nobody("bob").get(&first).await.status(), 404, "a newer link replaces it");
    assert_eq!(app.nobody("bob").get(&second).await.status(), 200);
    let path = format!("/api/v1/tenants/acme/invitations/{id}");
    assert_eq!(app.ask(&admin, "DELETE", &path, Value::Null).await.0, 204);
    assert_eq!(app.nobody("bob").get(&second).await.status(), 404);
    assert_eq!(app.ask(&admin, "DELETE", &path, Value::Null).await.0, 404);
    let (_, third) = invite().await;
    app.sql("UPDATE invitation SET expires_at = now() - interval '1 second'").await;
    assert_eq!(app.nobody("bob").get(&third).await.status(), 404, "expired");
    // An invitation into a suspended tenant cannot be accepted.
    let (_, fourth) = invite().await;
    assert_eq!(app.ask(&admin, "PUT", "/api/v1/tenants/acme/suspension", Value::Null).await.0, 202);
    let answer = app.nobody("bob").post(&fourth, &[("display_name", "B"), ("password", PASSWORD)]).await;
    assert_eq!(answer.status(), 422);
    for (body, field) in [
        (json!({"name": "Bob Builder", "role": "viewer"}), "name"),
        (json!({"name": "bob", "role": "admin"}), "role"),
        (json!({"name": "bob", "role": "viewer", "hours": 1000}), "hours"),
    ] {
        assert_eq!(app.ask(&admin, "DELETE", "/api/v1/tenants/acme/suspension", Value::Null).await.0, 202);
        let (status, answer) = app.ask(&admin, "POST", "/api/v1/tenants/acme/invitations", body).await;
        assert_eq!((status, answer["faults"][0]["path"].as_str()), (422, Some(field)), "{answer}");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_new_password_by_link(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.tenant("beta").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let mut bob = app.member("bob", "acme", Role::Deployer).await;
    let (_, made) = bob
        .api("POST", "/api/v1/me/tokens", json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 1}))
        .await;
    let token = made["token"].as_str().unwrap().to_owned();
    let reset = "/api/v1/tenants/acme/members/bob/reset";
    let (status, made) = olga.api("POST", reset, Value::Null).await;
    assert_eq!(status, 201, "{made}");
    let link = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    let mut tab = app.nobody("bob");
    assert!(tab.page(&link).await.contains("New password for bob"));
    assert_eq!(tab.post(&link, &[("password", "short")]).await.status(), 422);
    assert_eq!(tab.post(&link, &[("password", "a fresh and odd sentence")]).await.status(), 303);
    assert_eq!(tab.post(&link, &[("password", "another odd sentence here")]).await.status(), 404, "once");
    assert_eq!(bob.get("/account").await.status(), 401, "sessions end");
    assert_eq!(app.ask(&token, "GET", "/api/v1/tenants/acme", Value::Null).await.0, 401, "tokens too");
    assert_eq!(bob.sign_in(PASSWORD).await, 401);
    assert_eq!(bob.sign_in("a fresh and odd sentence").await, 303);
    // An owner cannot create a reset link for a member of another tenant: it would give access to that tenant.
    let (_, made) = olga.api("POST", reset, Value::Null).await;
    let link = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    let admin = app.admin().await;
    let body = json!({"name": "bob", "role": "owner"});
    let (_, invitation) = app.ask(&admin, "POST", "/api/v1/tenants/beta/invitations", body).await;
    let path = invitation["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    assert_eq!(bob.post(&path, &[]).await.status(), 303);
    assert_eq!(olga.api("POST", reset, Value::Null).await.0, 409);
    let answer = tab.post(&link, &[("password", "a third and odd sentence")]).await;
    assert_eq!(answer.status(), 422, "the earlier link no longer works either");
    assert_eq!(bob.sign_in("a fresh and odd sentence").await, 303, "nothing changed");
    // The same holds for platform roles. An admin can create reset links for all accounts.
    assert_eq!(app.ask(&admin, "POST", "/api/v1/accounts/bob/reset", Value::Null).await.0, 201);
    assert_eq!(olga.api("POST", "/api/v1/accounts/bob/reset", Value::Null).await.0, 404);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn there_is_no_account_before_the_first_admins(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    for (name, password) in [("admin", "admin"), ("root", ""), ("bulkhead", "bulkhead"), ("", "")] {
        assert_eq!(app.nobody(name).sign_in(password).await, 401);
    }
    for token in ["bhk_", "bhk_admin", " ", "bhk_none"] {
        assert_eq!(app.ask(token, "GET", "/api/v1/me", Value::Null).await.0, 401);
    }
    let mut conn = app.one.platform.pool.acquire().await.unwrap();
    assert!(!bulkhead::access::has_admin(&mut conn).await.unwrap());
    let pool = &app.one.platform.pool;
    let link = bulkhead::access::first_admin::make_link(pool).await.unwrap();
    let path = bulkhead::access::first_admin::make_link(pool).await.unwrap();
    assert_eq!(app.nobody("x").get(&link).await.status(), 404, "a newer link replaces it");
    let mut ada = app.nobody("ada");
    ada.page(&path).await;
    let bad = ada.post(&path, &[("name", "Ada Lovelace"), ("password", PASSWORD)]).await;
    assert_eq!(bad.status(), 422);
    let fields = [("name", "ada"), ("display_name", "Ada"), ("password", PASSWORD)];
    assert_eq!(ada.post_from("http://evil.example", &path, &fields).await.status(), 403);
    assert_eq!(ada.post(&path, &fields).await.status(), 303);
    assert_eq!(ada.post(&path, &fields).await.status(), 404, "once");
    assert!(bulkhead::access::has_admin(&mut conn).await.unwrap());
    assert!(ada.page("/people").await.contains("ada"));
    let mut second = app.person("sue", Some(PlatformRole::Admin)).await;
    assert!(second.page("/people").await.contains("sue"));
}

/// Removing, demoting or disabling an account revokes the links that it created or received.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_link_does_not_outlive_its_maker(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    app.member("olga", "acme", Role::Owner).await;
    let mut dave = app.member("dave", "acme", Role::Owner).await;
    let invite = "/api/v1/tenants/acme/invitations";
    let path_of =
        |made: &Value| made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    let (_, made) = dave.api("POST", invite, json!({"name": "mallory", "role": "owner", "hours": 168})).await;
    let theirs = path_of(&made);
    let (_, made) =
        app.ask(&admin, "POST", invite, json!({"name": "dave", "role": "owner", "hours": 3})).await;
    let for_them = path_of(&made);
    let member = "/api/v1/tenants/acme/members/dave";
    assert_eq!(app.ask(&admin, "PUT", member, json!({"role": "viewer"})).await.0, 200);
    for path in [&theirs, &for_them] {
        assert_eq!(app.nobody("x").get(path).await.status(), 404, "demoted");
    }
    assert_eq!(app.ask(&admin, "PUT", member, json!({"role": "owner"})).await.0, 200);
    let (_, made) = dave.api("POST", invite, json!({"name": "mallory", "role": "owner"})).await;
    assert_eq!(app.ask(&admin, "DELETE", member, Value::Null).await.0, 204);
    assert_eq!(app.nobody("x").get(&path_of(&made)).await.status(), 404, "removed");
    // The same holds on the platform, and for a disabled account.
    let mut eve = app.person("eve", Some(PlatformRole::Admin)).await;
    app.person("ada", Some(PlatformRole::Admin)).await;
    let (_, made) =
        eve.api("POST", "/api/v1/invitations", json!({"name": "mallory", "platform_role": "admin"})).await;
    assert_eq!(app.ask(&admin, "PATCH", "/api/v1/accounts/eve", json!({"disabled": true})).await.0, 200);
    assert_eq!(app.nobody("x").get(&path_of(&made)).await.status(), 404, "disabled");
    // An invitation that a token creates must not outlive the token.
    app.sql("UPDATE api_token SET expires_at = now() + interval '2 hours'").await;
    assert_eq!(
        app.ask(&admin, "POST", invite, json!({"name": "zed", "role": "viewer", "hours": 3})).await.0,
        422
    );
    assert_eq!(
        app.ask(&admin, "POST", invite, json!({"name": "zed", "role": "viewer", "hours": 1})).await.0,
        201
    );
    // A token with the name of an account does not act as that account.
    let mut alice = app.member("alice", "acme", Role::Viewer).await;
    let body = json!({"name": "bob", "tenant": "acme", "role": "viewer", "days": 1});
    let (_, token) = alice.api("POST", "/api/v1/me/tokens", body).await;
    let token = token["token"].as_str().unwrap();
    app.person("bob", None).await;
    let (_, made) =
        app.ask(&admin, "POST", invite, json!({"name": "bob", "role": "owner", "hours": 1})).await;
    let bearer = format!("Bearer {token}");
    let origin = app.one.address.clone();
    let headers = [
        ("authorization", bearer.as_str()),
        ("origin", origin.as_str()),
        ("content-type", "application/x-www-form-urlencoded"),
    ];
    let answer = app.nobody("x").send("POST", &path_of(&made), &headers, String::new()).await;
    assert_eq!(answer.status(), 403);
    let role: String = sqlx::query_scalar(
        "SELECT m.role FROM membership m JOIN account a ON a.id = m.account_id WHERE a.name = 'alice'",
    )
    .fetch_one(&app.root)
    .await
    .unwrap();
    assert_eq!(role, "viewer");
    // An invitation never lowers a role, on the platform either.
    let mut ada = app.nobody("ada");
    assert_eq!(ada.sign_in(PASSWORD).await, 303);
    let (_, made) = app
        .ask(
            &admin,
            "POST",
            "/api/v1/invitations",
            json!({"name": "ada", "platform_role": "auditor", "hours": 1}),
        )
        .await;
    assert_eq!(ada.post(&path_of(&made), &[]).await.status(), 303);
    assert_eq!(ada.api("GET", "/api/v1/me", Value::Null).await.1["platform_role"], "admin");
}

/// A password change revokes all reset links and ends every pending sign-in.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_new_password_ends_what_was_under_way(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let admin = app.admin().await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let mut bob = app.member("bob", "acme", Role::Viewer).await;
    let path_of =
        |made: &Value| made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    let by_owner = path_of(&olga.api("POST", "/api/v1/tenants/acme/members/bob/reset", Value::Null).await.1);
    let by_admin = path_of(&app.ask(&admin, "POST", "/api/v1/accounts/bob/reset", Value::Null).await.1);
    let fields = [("current", PASSWORD), ("new", "a wholly new odd sentence")];
    assert_eq!(bob.submit("/account", "/account/password", &fields).await.status(), 303);
    for path in [&by_owner, &by_admin] {
        assert_eq!(app.nobody("x").get(path).await.status(), 404);
    }
    // An attacker has the password and waits at the second factor while the password changes.
    app.sql("INSERT INTO second_factor (account_id, sealed, confirmed_at) SELECT id, '\\x00', now() FROM account WHERE name = 'bob'").await;
    let mut thief = app.nobody("bob");
    assert_eq!(thief.sign_in("a wholly new odd sentence").await, 303);
    assert_eq!(thief.get("/login/second-factor").await.status(), 200);
    let reset = path_of(&app.ask(&admin, "POST", "/api/v1/accounts/bob/reset", Value::Null).await.1);
    let answer = app.nobody("x").post(&reset, &[("password", "one more odd sentence here")]).await;
    assert_eq!(answer.status(), 303);
    assert_eq!(thief.get("/login/second-factor").await.status(), 303, "the sign-in must start again");
    // Text that cannot be stored is a client error, not a server error.
    assert_eq!(app.nobody("x").post("/login", &[("name", "a\0b"), ("password", "x")]).await.status(), 400);
}
