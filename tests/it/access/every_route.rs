//! Each route as each actor, against a golden matrix: a change of permissions shows up as a change of this
//! file.

use std::fmt::Write as _;

use bulkhead::access::{Authority, PlatformRole, Role};
use bulkhead::routes;
use serde_json::Value;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::{Person, TestApp, page};

/// Routes that end the actor's own access run last.
const LAST: &[&str] = &["/api/v1/me/tenants/{tenant}", "/tenants/{tenant}/leave", "/logout"];

enum Who {
    Session(Person),
    Token(String),
    Nobody,
}

fn fill(path: &str, tenant: &str) -> String {
    path.replace("{tenant}", tenant)
        .replace("{repository:.+}", "none")
        .replace("{id}", "0")
        .replace("{uid}", "5")
        .replace("{file}", "tokens.css")
        .split('/')
        .map(|part| if part.starts_with('{') { "none" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

async fn ask(app: &TestApp, who: &mut Who, method: &str, path: &str) -> u16 {
    let api = path.starts_with("/api/");
    match who {
        Who::Session(person) => {
            let origin = person.address.clone();
            let form = if method == "POST" && !api {
                // Posts only the form token.
                let text = person.page("/account").await;
                page::form(&[("form", &page::form_token(&text))])
            } else {
                String::new()
            };
            let kind = if api { "text/plain" } else { "application/x-www-form-urlencoded" };
            let headers = [("origin", origin.as_str()), ("content-type", kind)];
            person.send(method, path, &headers, form).await.status().as_u16()
        }
        Who::Token(token) => app.ask(token, method, path, Value::Null).await.0,
        Who::Nobody => app.ask("", method, path, Value::Null).await.0,
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn every_route_answers_everybody_as_the_matrix_says(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let acme = app.tenant("acme").await;
    let evil = app.tenant("evil").await;
    app.tenant("idle").await;
    let idle_owner = app.member("ida", "idle", Role::Owner).await;
    let admin_token = app.admin().await;
    let stranger = app.member("eve", "evil", Role::Owner).await;
    let expired = app.token(Authority::Tenant(acme, Role::Owner)).await;
    let other = app.token(Authority::Tenant(evil, Role::Owner)).await;
    let actors = vec![
        ("anonymous", "acme", Who::Nobody),
        ("stranger", "acme", Who::Session(stranger)),
        ("viewer", "acme", Who::Session(app.member("vera", "acme", Role::Viewer).await)),
        ("deployer", "acme", Who::Session(app.member("dora", "acme", Role::Deployer).await)),
        ("owner", "acme", Who::Session(app.member("olga", "acme", Role::Owner).await)),
        ("auditor", "acme", Who::Session(app.person("audrey", Some(PlatformRole::Auditor)).await)),
        ("admin", "acme", Who::Session(app.person("ada", Some(PlatformRole::Admin)).await)),
        ("suspended", "idle", Who::Session(idle_owner)),
        ("expired", "acme", Who::Token(expired)),
        ("othertoken", "acme", Who::Token(other)),
    ];
    app.sql("UPDATE api_token SET expires_at = now() - interval '1 second' WHERE id = (SELECT max(id) FROM api_token WHERE tenant_id = (SELECT id FROM tenant WHERE name = 'acme'))").await;
    let mut rows = routes::table();
    rows.sort_by_key(|(_, path)| LAST.iter().position(|last| last == path).map_or(0, |at| at + 1));
    let mut matrix: Vec<Vec<u16>> = vec![Vec::new(); rows.len()];
    let mut names = Vec::new();
    for (name, tenant, mut who) in actors {
        if name == "suspended" {
            let (status, _) =
                app.ask(&admin_token, "PUT", "/api/v1/tenants/idle/suspension", Value::Null).await;
            assert_eq!(status, 202);
        }
        names.push(name);
        for ((method, path), row) in rows.iter().zip(&mut matrix) {
            app.sql("TRUNCATE throttle").await;
            row.push(ask(&app, &mut who, method.as_str(), &fill(path, tenant)).await);
        }
    }
    let mut golden = format!("{:62}{}\n", "", names.iter().map(|n| format!("{n:>11}")).collect::<String>());
    for ((method, path), row) in rows.iter().zip(&matrix) {
        let cells: String = row.iter().map(|status| format!("{status:>11}")).collect();
        let _ = writeln!(golden, "{:62}{cells}", format!("{method} {path}"));
    }
    insta::assert_snapshot!("matrix", golden);
    // Invariants, independent of the golden file.
    for ((method, path), row) in rows.iter().zip(&matrix) {
        let cell = |name: &str| row[names.iter().position(|known| *known == name).unwrap()];
        let within = path.contains("{tenant}");
        if within || path.starts_with("/api/v1/accounts") || path.starts_with("/people") {
            assert!(
                [401, 404].contains(&cell("anonymous")),
                "{method} {path}: anonymous requests are refused"
            );
            assert_eq!(cell("expired"), 401, "{method} {path}: an expired token is refused");
            for name in ["stranger", "othertoken"] {
                assert_eq!(cell(name), 404, "{method} {path}: {name} must not learn that it exists");
            }
        }
        if within && method.as_str() != "GET" && !LAST.contains(&path.as_str()) {
            assert!(
                [403, 409].contains(&cell("suspended")),
                "{method} {path}: a suspended tenant cannot change"
            );
        }
        assert!(row.iter().all(|status| *status < 500), "{method} {path}: {row:?}");
    }
}
