//! A tenant that creates rows without end. Each kind stops at its limit. The last place goes to one request.
//! Creating and revoking in a loop leaves only the kept dead rows.

use bulkhead::access::{Authority, Role};
use bulkhead::ids::TenantId;
use bulkhead::quotas;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

const BASE: &str = "/api/v1/tenants/acme";

/// A kind of rows, and the request that creates the n-th one.
struct Make {
    kind: &'static str,
    method: &'static str,
    path: fn(usize) -> String,
    body: fn(usize) -> Value,
}

const MAKES: &[Make] = &[
    Make {
        kind: "registry_credentials",
        method: "POST",
        path: |_| format!("{BASE}/robots"),
        body: |n| json!({"name": format!("r{n}")}),
    },
    Make {
        kind: "service_accounts",
        method: "POST",
        path: |_| format!("{BASE}/service-accounts"),
        body: |n| json!({"name": format!("s{n}"), "role": "viewer"}),
    },
    Make {
        kind: "api_tokens",
        method: "POST",
        path: |_| format!("{BASE}/tokens"),
        body: |n| json!({"service_account": "first", "name": format!("t{n}"), "days": 1}),
    },
    Make {
        kind: "invitations",
        method: "POST",
        path: |_| format!("{BASE}/invitations"),
        body: |n| json!({"name": format!("p{n}"), "role": "viewer"}),
    },
    Make {
        kind: "egress_targets",
        method: "PUT",
        path: |n| format!("{BASE}/egress/e{n}"),
        body: |_| json!({"domain": "mail.example.org", "protocol": "tcp", "ports": [587], "reason": "x"}),
    },
    Make {
        kind: "grants",
        method: "POST",
        path: |_| format!("{BASE}/grants"),
        body: |n| json!({"app": "web", "tenant": format!("other-{n}")}),
    },
];

async fn start(options: PgPoolOptions, connect: PgConnectOptions) -> (TestApp, TenantId, String) {
    // Rate limits are tested elsewhere.
    let app = TestApp::with(options, connect, |config| {
        config.limits.requests_per_second = 100_000;
        config.limits.request_burst = 100_000;
    })
    .await;
    let acme = app.tenant("acme").await;
    let owner = app.token(Authority::Tenant(acme, Role::Owner)).await;
    let body = json!({"name": "first", "role": "viewer"});
    assert_eq!(app.ask(&owner, "POST", &format!("{BASE}/service-accounts"), body).await.0, 201);
    super::releases::insert_app(&app, acme).await;
    (app, acme, owner)
}

async fn used(app: &TestApp, owner: &str, kind: &str) -> i64 {
    app.get(owner, &format!("{BASE}/quota")).await["quota"][kind]["used"].as_i64().unwrap()
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_thousand_of_each_kind_stop_at_the_limit(options: PgPoolOptions, connect: PgConnectOptions) {
    let (app, _, owner) = start(options, connect).await;
    let quota = app.get(&owner, &format!("{BASE}/quota")).await["quota"].clone();
    for make in MAKES {
        // Egress targets that wait for approval have a lower limit of their own, with another error.
        let tries = if make.kind == "egress_targets" { 20 } else { 1_000 };
        let before = quota[make.kind]["used"].as_i64().unwrap();
        let limit = quota[make.kind]["limit"].as_i64().unwrap();
        let answers: Vec<(u16, Value)> = futures_util::stream::iter(0..tries)
            .map(|n| {
                let (path, body) = ((make.path)(n), (make.body)(n));
                let (app, owner) = (&app, &owner);
                async move { app.ask(owner, make.method, &path, body).await }
            })
            .buffer_unordered(6)
            .collect()
            .await;
        let made = answers.iter().filter(|(status, _)| *status == 201).count();
        if make.kind == "egress_targets" {
            assert_eq!(made, 20);
            app.sql("UPDATE egress_target SET state = 'approved'").await;
            continue;
        }
        assert_eq!(i64::try_from(made).unwrap(), limit - before, "{}", make.kind);
        assert_eq!(used(&app, &owner, make.kind).await, limit, "{}", make.kind);
        for (status, answer) in answers.iter().filter(|(status, _)| *status != 201) {
            assert_eq!((*status, &answer["code"]), (422, &json!("BH-423")), "{}: {answer}", make.kind);
            let fault = &answer["faults"][0];
            assert_eq!(fault["path"], make.kind);
            assert!(
                fault["message"].as_str().unwrap().contains(&format!("limit {limit}, used {limit}, asked 1"))
            );
            assert!(fault["suggestion"].as_str().unwrap().contains(make.kind));
        }
    }
    // Another tenant can still create rows.
    let other = app.tenant("other").await;
    let token = app.token(Authority::Tenant(other, Role::Owner)).await;
    let (status, answer) =
        app.ask(&token, "POST", "/api/v1/tenants/other/robots", json!({"name": "ci"})).await;
    assert_eq!(status, 201, "{answer}");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_last_place_of_each_kind_goes_to_one(options: PgPoolOptions, connect: PgConnectOptions) {
    let (app, _, owner) = start(options, connect).await;
    let admin = app.admin().await;
    for make in MAKES {
        let limit = used(&app, &owner, make.kind).await + 1;
        let body = json!({"quota": {make.kind: limit}});
        assert_eq!(app.ask(&admin, "PATCH", BASE, body).await.0, 202);
        let answers = join_all((0..8).map(|n| {
            let (path, body) = ((make.path)(n), (make.body)(n));
            let (app, owner) = (&app, &owner);
            async move { app.ask(owner, make.method, &path, body).await.0 }
        }))
        .await;
        assert_eq!(answers.iter().filter(|status| **status == 201).count(), 1, "{}: {answers:?}", make.kind);
        assert_eq!(answers.iter().filter(|status| **status == 422).count(), 7, "{}: {answers:?}", make.kind);
        assert_eq!(used(&app, &owner, make.kind).await, limit, "{}", make.kind);
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_last_seat_goes_to_one_and_the_invitation_stays(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let (app, acme, owner) = start(options, connect).await;
    let admin = app.admin().await;
    let mut links = Vec::new();
    for name in ["ann", "bob"] {
        let body = json!({"name": name, "role": "viewer"});
        let (status, made) = app.ask(&owner, "POST", &format!("{BASE}/invitations"), body).await;
        assert_eq!(status, 201, "{made}");
        links.push((name, made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned()));
    }
    assert_eq!(app.ask(&admin, "PATCH", BASE, json!({"quota": {"members": 1}})).await.0, 202);
    let answers = join_all(links.iter().map(|(name, link)| {
        let mut person = app.nobody(name);
        async move {
            let fields = [("display_name", *name), ("password", crate::support::PASSWORD)];
            person.post(link, &fields).await.status().as_u16()
        }
    }))
    .await;
    assert_eq!(answers.iter().filter(|status| **status == 303).count(), 1, "{answers:?}");
    assert_eq!(used(&app, &owner, "members").await, 1);
    assert_eq!(used(&app, &owner, "invitations").await, 1, "the other link still works");
    // An existing member takes no place. The other user can join when there is room.
    assert_eq!(app.ask(&admin, "PATCH", BASE, json!({"quota": {"members": 2}})).await.0, 202);
    let left = links.iter().zip(&answers).find(|(_, status)| **status != 303).unwrap().0;
    app.join(left.0, &format!("{}{}", app.one.address, left.1)).await;
    let members: i64 = sqlx::query_scalar("SELECT count(*) FROM membership WHERE tenant_id = $1")
        .bind(acme.0)
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert_eq!(members, 2);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn rows_made_and_revoked_in_a_loop_do_not_pile_up(options: PgPoolOptions, connect: PgConnectOptions) {
    let (app, acme, owner) = start(options, connect).await;
    let id = acme.0;
    // Rows as days of such a loop would leave them.
    for statement in [
        format!(
            "INSERT INTO robot (tenant_id, name, push, hash, created_by, expires_at, revoked_at) SELECT {id}, 'old', false, sha256(n::text::bytea), 'x', now() + interval '1 day', now() FROM generate_series(1, 1100) n"
        ),
        format!(
            "INSERT INTO service_account (tenant_id, name, role, created_by, deleted_at) SELECT {id}, 'old', 'viewer', 'x', now() FROM generate_series(1, 1100)"
        ),
        format!(
            "INSERT INTO api_token (hash, name, tenant_id, role, created_by, expires_at, revoked_at) SELECT sha256(('t' || n)::bytea), 'old', {id}, 'viewer', 'x', now() + interval '1 day', now() FROM generate_series(1, 1100) n"
        ),
        format!(
            "INSERT INTO invitation (hash, kind, tenant_id, role, recipient, created_by, expires_at, revoked_at) SELECT sha256(('i' || n)::bytea), 'invitation', {id}, 'viewer', 'old', 'x', now() + interval '1 day', now() FROM generate_series(1, 1100) n"
        ),
        format!(
            "INSERT INTO egress_target (tenant_id, name, domain, protocol, ports, reason, asked_by, state) SELECT {id}, 'old', 'a.example', 'tcp', '{{1}}', 'x', 'x', 'withdrawn' FROM generate_series(1, 1100)"
        ),
    ] {
        app.sql(&statement).await;
    }
    let tables = ["robot", "service_account", "api_token", "invitation", "egress_target"];
    for (make, table) in MAKES.iter().zip(tables) {
        for n in 0..6 {
            let (status, answer) = app.ask(&owner, make.method, &(make.path)(n), (make.body)(n)).await;
            assert_eq!(status, 201, "{answer}");
        }
        let rows = app.number("SELECT count(*) FROM audit WHERE object = $1", "nothing").await
            + sqlx::query_scalar::<_, i64>(sqlx::AssertSqlSafe(format!(
                "SELECT count(*) FROM {table} WHERE tenant_id = {id}"
            )))
            .fetch_one(&app.root)
            .await
            .unwrap();
        assert!(rows <= 1_000 + 8, "{table}: {rows} rows");
    }
    // Housekeeping deletes rows that have been dead for 90 days. Younger and live rows stay.
    app.sql("UPDATE api_token SET revoked_at = now() - interval '91 days' WHERE name = 'old' AND id % 2 = 0")
        .await;
    app.sql("UPDATE service_account SET deleted_at = now() - interval '91 days' WHERE name = 'old'").await;
    let live = app.number("SELECT count(*) FROM api_token WHERE name <> $1", "old").await;
    quotas::prune(&app.one.platform.work).await.unwrap();
    assert_eq!(app.number("SELECT count(*) FROM api_token WHERE name <> $1", "old").await, live);
    let left = app.number("SELECT count(*) FROM api_token WHERE name = $1", "old").await;
    assert!((400..=600).contains(&left), "{left}");
    assert_eq!(app.number("SELECT count(*) FROM service_account WHERE name = $1", "old").await, 0);
    assert_eq!(app.number("SELECT count(*) FROM robot WHERE name = $1", "old").await, 1_000);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_platforms_own_rows_have_a_bound(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::with(options, connect, |config| {
        config.limits.platform_invitations = 5;
        config.limits.platform_tokens = 9;
    })
    .await;
    let admin = app.admin().await;
    let answers =
        join_all(
            (0..12).map(|n| {
                let (app, admin) = (&app, &admin);
                async move {
                    app.ask(admin, "POST", "/api/v1/invitations", json!({"name": format!("p{n}")})).await
                }
            }),
        )
        .await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 5);
    let (status, refused) = answers.into_iter().find(|(status, _)| *status != 201).unwrap();
    assert_eq!((status, &refused["faults"][0]["path"]), (422, &json!("platform_invitations")));
    assert!(refused["faults"][0]["suggestion"].as_str().unwrap().contains("limits.platform_invitations"));
    app.sql("UPDATE invitation SET revoked_at = now()").await;
    let mut ada = app.person("ada", Some(bulkhead::access::PlatformRole::Admin)).await;
    let mut made = 0;
    for n in 0..12 {
        let body = json!({"name": format!("t{n}"), "role": "auditor", "days": 1});
        let (status, answer) = ada.api("POST", "/api/v1/me/tokens", body).await;
        assert!([201, 422].contains(&status), "{answer}");
        made += i64::from(status == 201);
    }
    let live = app.number("SELECT count(*) FROM api_token WHERE tenant_id IS NULL AND name <> $1", "x").await;
    assert_eq!(live, 9, "ada created {made} of them");
    // Root on the machine can still create tokens.
    app.get(&app.admin().await, "/api/v1/tenants").await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn keys_of_repeated_requests_have_a_bound(options: PgPoolOptions, connect: PgConnectOptions) {
    let (app, _, owner) = start(options, connect).await;
    let ask = |key: &'static str, n: usize| {
        let request = reqwest::Client::new()
            .post(format!("{}{BASE}/grants", app.one.address))
            .bearer_auth(&owner)
            .header("idempotency-key", key)
            .json(&json!({"app": "web", "tenant": format!("other-{n}")}));
        async move { request.send().await.unwrap().status().as_u16() }
    };
    assert_eq!(ask("one", 1).await, 201);
    app.sql("INSERT INTO idempotency (actor, key, request_hash, status, response) SELECT actor, n::text, '\\x00', 201, '{}' FROM idempotency, generate_series(1, 1999) n").await;
    assert_eq!(ask("two", 2).await, 409, "the limit is 2,000 keys");
    assert_eq!(ask("one", 1).await, 201, "a stored key still replays its response");
    assert_eq!(used(&app, &owner, "grants").await, 1, "the refused request changed nothing");
}

/// The audit log keeps every change for months, so a tenant has a limit of changes per day. It can always
/// revoke.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn changes_of_a_day_have_a_limit_and_revoking_has_none(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let (app, _, owner) = start(options, connect).await;
    let admin = app.admin().await;
    let before = used(&app, &owner, "changes_per_day").await;
    let body = json!({"quota": {"changes_per_day": 100}});
    assert_eq!(app.ask(&admin, "PATCH", BASE, body).await.0, 202);
    app.sql("UPDATE quota SET used = 95 WHERE resource = 'changes_per_day' AND since IS NOT NULL").await;
    assert!(before > 0, "earlier changes count");
    let answers =
        join_all((0..12).map(|n| {
            let (app, owner) = (&app, &owner);
            async move {
                app.ask(owner, "POST", &format!("{BASE}/robots"), json!({"name": format!("r{n}")})).await
            }
        }))
        .await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 5);
    let (status, refused) = answers.iter().find(|(status, _)| *status != 201).unwrap();
    assert_eq!((*status, &refused["faults"][0]["path"]), (422, &json!("changes_per_day")));
    assert!(refused["faults"][0]["suggestion"].as_str().unwrap().contains("next day"), "{refused}");
    assert_eq!(used(&app, &owner, "changes_per_day").await, 100);
    assert_eq!(used(&app, &owner, "registry_credentials").await, 5, "no change without an audit event");
    // The same holds for a release: no deploy without an audit event.
    let body = json!({"revision": 1});
    assert_eq!(app.ask(&owner, "POST", &format!("{BASE}/apps/web/releases"), body).await.0, 422);
    let robots = app.get(&owner, &format!("{BASE}/robots")).await;
    let name = robots["items"][0]["name"].as_str().unwrap();
    assert_eq!(app.ask(&owner, "DELETE", &format!("{BASE}/robots/{name}"), Value::Null).await.0, 204);
    assert_eq!(app.ask(&admin, "PUT", &format!("{BASE}/suspension"), Value::Null).await.0, 202);
    assert_eq!(app.ask(&admin, "DELETE", &format!("{BASE}/suspension"), Value::Null).await.0, 202);
    // The count restarts the next day.
    app.sql("UPDATE quota SET since = since - 1 WHERE since IS NOT NULL").await;
    assert_eq!(used(&app, &owner, "changes_per_day").await, 0);
    assert_eq!(app.ask(&owner, "POST", &format!("{BASE}/robots"), json!({"name": "again"})).await.0, 201);
    assert_eq!(used(&app, &owner, "changes_per_day").await, 1);
}

/// An account keeps at most 100 sessions, the newest ones.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn sessions_of_an_account_have_a_bound(options: PgPoolOptions, connect: PgConnectOptions) {
    let (app, _, _) = start(options, connect).await;
    let mut ann = app.member("ann", "acme", Role::Viewer).await;
    app.sql("INSERT INTO session (hash, account_id, method, place, agent) SELECT sha256(n::text::bytea), account_id, 'password', 'x', 'x' FROM session, generate_series(1, 110) n").await;
    assert_eq!(ann.sign_in(crate::support::PASSWORD).await, 303);
    ann.page("/account").await;
    let left = app.number("SELECT count(*) FROM session WHERE method = $1", "password").await;
    assert!(left <= 100, "{left}");
}
