//! Valid flows, with the certified `oidc-provider`.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use bulkhead::access::PlatformRole;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::{free_port, settings};
use crate::support::{Person, TestApp, node, page};

/// The provider's process. Dropping it ends the process.
struct Certified(Child);

impl Drop for Certified {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Certified {
    fn start(port: u16, app: &str, groups: &Path) -> Self {
        let mut child = node("provider.mjs")
            .env("ISSUER", format!("http://127.0.0.1:{port}"))
            .env("PORT", port.to_string())
            .env("REDIRECT", format!("{app}/login/providers/good/callback"))
            .env("HOME", format!("{app}/login"))
            .env("GROUPS", groups)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "ready");
        // The process keeps writing, and a closed pipe would end it.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        Self(child)
    }
}

/// Acts as a browser at the provider: follows redirects with cookies, and submits the login page.
async fn at_provider(start: &str, login: &str, cookies: &mut HashMap<String, String>) -> String {
    let http = bulkhead::outgoing::client().build().unwrap();
    let origin = start.split('/').take(3).collect::<Vec<_>>().join("/");
    let mut url = start.to_owned();
    let mut form: Option<String> = None;
    for _ in 0..12 {
        let jar: Vec<String> = cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let request = match form.take() {
            Some(body) => {
                http.post(&url).header("content-type", "application/x-www-form-urlencoded").body(body)
            }
            None => http.get(&url),
        };
        let answer = request.header("cookie", jar.join("; ")).send().await.unwrap();
        for header in answer.headers().get_all("set-cookie") {
            let pair = header.to_str().unwrap().split(';').next().unwrap();
            let (name, value) = pair.split_once('=').unwrap();
            cookies.insert(name.to_owned(), value.to_owned());
        }
        if let Some(next) = answer.headers().get("location") {
            let next = next.to_str().unwrap();
            url = if next.starts_with('/') { format!("{origin}{next}") } else { next.to_owned() };
            if !url.starts_with(&origin) {
                return url;
            }
            continue;
        }
        let text = answer.text().await.unwrap();
        let action = text.split("action=\"").nth(1).unwrap_or_else(|| panic!("{text}"));
        action.split('"').next().unwrap().clone_into(&mut url);
        form = Some(page::form(&[("prompt", "login"), ("login", login), ("password", "x")]));
    }
    panic!("the provider does not redirect back");
}

/// Goes to the provider from one of Bulkhead's addresses, comes back, and returns the final response.
async fn through(person: &mut Person, begin: &str, login: &str) -> reqwest::Response {
    let mut cookies = HashMap::new();
    let there = person.get(begin).await;
    assert_eq!(there.status(), 303, "{}", there.text().await.unwrap());
    let there = there.headers()["location"].to_str().unwrap().to_owned();
    for part in ["code_challenge_method=S256", "state=", "nonce=", "response_type=code"] {
        assert!(there.contains(part), "{there}");
    }
    let back = at_provider(&there, login, &mut cookies).await;
    person.get(&back).await
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn people_come_through_a_provider_with_what_it_says_of_them(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let dir = tempfile::tempdir().unwrap();
    let groups = dir.path().join("groups.json");
    let say = |what: Value| fs::write(&groups, what.to_string()).unwrap();
    say(json!({"alice": ["acme-dev"], "ops": ["ops"], "nobody": []}));
    let port = free_port();
    let provider = settings("good", &format!("http://127.0.0.1:{port}"), &dir.path().join("secret"));
    let app = TestApp::with(options, connect, |config| config.access.providers.push(provider)).await;
    app.tenant("acme").await;
    app.tenant("beta").await;
    let mut alice = app.nobody("alice");
    assert!(alice.page("/login").await.contains("Sign in with The good provider"));
    // While the provider is unreachable, the page says so, and other sign-in methods work.
    let away = alice.get("/login/providers/good").await;
    assert_eq!(away.status(), 401);
    assert!(away.text().await.unwrap().contains("cannot be reached"));
    let running = Certified::start(port, &app.one.address, &groups);
    // The failure is cached for ten seconds, so requests do not queue behind it.
    assert_eq!(alice.get("/login/providers/good").await.status(), 401);
    tokio::time::sleep(std::time::Duration::from_secs(11)).await;
    let answer = through(&mut alice, "/login/providers/good", "alice").await;
    assert_eq!(answer.status(), 303, "{}", answer.text().await.unwrap());
    assert!(alice.cookie.is_some());
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert_eq!(me["name"], "alice");
    assert_eq!(
        (&me["tenants"][0]["name"], &me["tenants"][0]["role"]),
        (&json!("acme"), &json!("deployer")),
        "{me}"
    );
    let account = app.number("SELECT id FROM account WHERE name = $1", "alice").await;
    // Roles follow the provider: a role that it no longer grants is removed at the next sign-in.
    say(json!({"alice": ["beta-see", "ops", "unknown"], "nobody": []}));
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert_eq!(me["platform_role"], "admin");
    assert_eq!(me["tenants"].as_array().unwrap().len(), 1, "{me}");
    assert_eq!(me["tenants"][0]["name"], "beta");
    say(json!({"alice": []}));
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert!(me.get("platform_role").is_none() && me["tenants"] == json!([]), "{me}");
    assert_eq!(
        app.number("SELECT id FROM account WHERE name = $1", "alice").await,
        account,
        "the same account"
    );
    // Roles that were set by hand stay.
    let admin = app.admin().await;
    let body = json!({"name": "alice", "role": "owner"});
    let (_, made) = app.ask(&admin, "POST", "/api/v1/tenants/acme/invitations", body).await;
    let path = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    assert_eq!(alice.post(&path, &[]).await.status(), 303);
    say(json!({"alice": ["acme-dev"]}));
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert_eq!(me["tenants"][0]["role"], "owner", "{me}");
    // Roles that the provider granted expire two weeks after the last sign-in through it. Roles that were set
    // by hand stay.
    say(json!({"alice": ["beta-see", "ops"]}));
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    assert_eq!(alice.api("GET", "/api/v1/me", Value::Null).await.1["platform_role"], "admin");
    let body = json!({"name": "x", "role": "admin", "days": 90});
    let token = alice.api("POST", "/api/v1/me/tokens", body).await.1["token"].as_str().unwrap().to_owned();
    app.get(&token, "/api/v1/tenants").await;
    let local = alice.api("PUT", "/api/v1/me/password", json!({"new": "a password past the provider"})).await;
    assert_eq!(local.0, 409, "no password beside the provider: {local:?}");
    app.sql("UPDATE account_identity SET last_used_at = now() - interval '15 days'").await;
    assert_eq!(app.ask(&token, "GET", "/api/v1/tenants", Value::Null).await.0, 404);
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert!(me.get("platform_role").is_none(), "{me}");
    assert_eq!(me["tenants"].as_array().unwrap().len(), 1, "acme, set by hand: {me}");
    assert_eq!(alice.api("GET", "/api/v1/tenants/beta", Value::Null).await.0, 404);
    assert_eq!(alice.api("GET", "/api/v1/tenants/acme", Value::Null).await.0, 200);
    // A user whom the provider knows, but who has no role here, is refused.
    let mut nobody = app.nobody("nobody");
    let refused = through(&mut nobody, "/login/providers/good", "nobody").await;
    assert_eq!(refused.status(), 401);
    assert!(refused.text().await.unwrap().contains("no role here"));
    assert!(nobody.cookie.is_none());
    // A local account of the same name is a different account.
    say(json!({"bob": ["acme-dev"], "alice": ["acme-dev"]}));
    let mut local = app.person("bob", None).await;
    let mut bob = app.nobody("bob");
    assert_eq!(through(&mut bob, "/login/providers/good", "bob").await.status(), 303);
    let name = bob.api("GET", "/api/v1/me", Value::Null).await.1["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("bob-") && name.len() == 10, "{name}");
    assert_eq!(local.api("GET", "/api/v1/me", Value::Null).await.1["tenants"], json!([]));
    // A disabled account is refused, although the provider authenticates it.
    app.person("ada", Some(PlatformRole::Admin)).await;
    assert_eq!(app.ask(&admin, "PATCH", "/api/v1/accounts/alice", json!({"disabled": true})).await.0, 200);
    assert_eq!(alice.get("/account").await.status(), 401);
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 401);
    drop(running);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_provider_confirms_links_and_signs_out(options: PgPoolOptions, connect: PgConnectOptions) {
    let dir = tempfile::tempdir().unwrap();
    let groups = dir.path().join("groups.json");
    fs::write(&groups, r#"{"alice": ["acme-dev"], "eve": ["acme-dev"]}"#).unwrap();
    let port = free_port();
    let provider = settings("good", &format!("http://127.0.0.1:{port}"), &dir.path().join("secret"));
    let app = TestApp::with(options, connect, |config| config.access.providers.push(provider)).await;
    app.tenant("acme").await;
    let _running = Certified::start(port, &app.one.address, &groups);
    let mut alice = app.nobody("alice");
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    // A user without a password confirms the session at the provider, which authenticates again.
    app.sql("UPDATE session SET confirmed_at = now() - interval '1 hour'").await;
    let body = json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 1});
    assert_eq!(alice.api("POST", "/api/v1/me/tokens", body.clone()).await.0, 403);
    let text = alice.page("/confirm").await;
    assert!(text.contains("Confirm with The good provider") && !text.contains("type=\"password\""), "{text}");
    let before = alice.cookie.clone();
    let other = through(&mut alice, "/confirm/good", "eve").await;
    assert_eq!(other.status(), 401, "another provider account cannot confirm the session");
    assert_eq!(alice.api("POST", "/api/v1/me/tokens", body.clone()).await.0, 403);
    assert_eq!(through(&mut alice, "/confirm/good", "alice").await.status(), 303);
    assert_ne!(alice.cookie, before);
    assert_eq!(alice.api("POST", "/api/v1/me/tokens", body).await.0, 201);
    // After sign-out, the page links to the provider's sign-out.
    let answer = alice.submit("/account", "/logout", &[]).await;
    let text = answer.text().await.unwrap();
    let address = text
        .split("class=\"button\" href=\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .replace("&amp;", "&")
        .replace("&#38;", "&");
    assert!(
        address.starts_with(&format!("http://127.0.0.1:{port}/session/end?client_id=bulkhead&")),
        "{address}"
    );
    assert_eq!(reqwest::get(&address).await.unwrap().status(), 200, "the provider accepts it");
    assert!(alice.cookie.is_none());
    // A local account links the provider after both were authenticated. Either then signs in.
    let mut zoe = app.person("zoe", None).await;
    assert!(zoe.page("/account").await.contains("Link The good provider"));
    assert_eq!(
        through(&mut zoe, "/account/providers/good", "alice").await.status(),
        401,
        "alice is linked to an account already"
    );
    assert_eq!(through(&mut zoe, "/account/providers/good", "zoe-there").await.status(), 303);
    let mut again = app.nobody("zoe");
    assert_eq!(through(&mut again, "/login/providers/good", "zoe-there").await.status(), 303);
    assert_eq!(again.api("GET", "/api/v1/me", Value::Null).await.1["name"], "zoe");
    // The link can be removed. The last way to sign in stays, unless an admin removes it.
    assert_eq!(zoe.submit("/account", "/account/providers/removal", &[("name", "good")]).await.status(), 303);
    assert_eq!(
        through(&mut again, "/login/providers/good", "zoe-there").await.status(),
        401,
        "no longer linked"
    );
    let mut alice = app.nobody("alice");
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    assert_eq!(alice.api("DELETE", "/api/v1/me/providers/good", Value::Null).await.0, 409);
    let admin = app.admin().await;
    assert_eq!(app.ask(&admin, "DELETE", "/api/v1/accounts/alice/providers", Value::Null).await.0, 204);
    assert_eq!(alice.get("/account").await.status(), 401);
    // A page of another site cannot start the flow.
    let foreign = [("sec-fetch-site", "cross-site"), ("accept", "text/html")];
    for path in ["/account/providers/good", "/confirm/good"] {
        assert_eq!(zoe.send("GET", path, &foreign, String::new()).await.status(), 403, "{path}");
    }
    // Linking requires a recently confirmed session.
    app.sql("UPDATE session SET confirmed_at = now() - interval '1 hour'").await;
    let stale = zoe.get("/account/providers/good").await;
    assert_eq!(stale.headers()["location"], "/confirm?next=/account");
}
