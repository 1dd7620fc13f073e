//! The good paths, with the certified `oidc-provider`.

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

/// The provider's process, which ends with the test.
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
        // It goes on talking; a closed pipe would end it.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        Self(child)
    }
}

/// A browser at the provider: follows its redirects with its cookies, and answers its login page.
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
    panic!("the provider does not send anybody back");
}

/// Goes to the provider from one of our addresses and comes back; the answer to that.
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
    // While it is away, that is said, and others sign in.
    let away = alice.get("/login/providers/good").await;
    assert_eq!(away.status(), 401);
    assert!(away.text().await.unwrap().contains("cannot be reached"));
    let running = Certified::start(port, &app.one.address, &groups);
    // That it was away is remembered for ten seconds: nobody queues behind the same failure.
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
    // What it says is what is; what it does not say any more is gone with the next sign-in.
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
        "the same person"
    );
    // What was decided here by hand stays, whatever the provider says.
    let admin = app.admin().await;
    let body = json!({"name": "alice", "role": "owner"});
    let (_, made) = app.ask(&admin, "POST", "/api/v1/tenants/acme/invitations", body).await;
    let path = made["link"].as_str().unwrap().strip_prefix(&app.one.address).unwrap().to_owned();
    assert_eq!(alice.post(&path, &[]).await.status(), 303);
    say(json!({"alice": ["acme-dev"]}));
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert_eq!(me["tenants"][0]["role"], "owner", "{me}");
    // Two weeks after the provider last vouched for somebody, what it gave is as if it were not there; what was
    // given by hand holds.
    say(json!({"alice": ["beta-see", "ops"]}));
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    assert_eq!(alice.api("GET", "/api/v1/me", Value::Null).await.1["platform_role"], "admin");
    let body = json!({"name": "x", "role": "admin", "days": 90});
    let token = alice.api("POST", "/api/v1/me/tokens", body).await.1["token"].as_str().unwrap().to_owned();
    app.get(&token, "/api/v1/tenants").await;
    let local = alice.api("PUT", "/api/v1/me/password", json!({"new": "a password past the provider"})).await;
    assert_eq!(local.0, 409, "no way past the provider: {local:?}");
    app.sql("UPDATE account_identity SET last_used_at = now() - interval '15 days'").await;
    assert_eq!(app.ask(&token, "GET", "/api/v1/tenants", Value::Null).await.0, 404);
    let me = alice.api("GET", "/api/v1/me", Value::Null).await.1;
    assert!(me.get("platform_role").is_none(), "{me}");
    assert_eq!(me["tenants"].as_array().unwrap().len(), 1, "acme, by hand: {me}");
    assert_eq!(alice.api("GET", "/api/v1/tenants/beta", Value::Null).await.0, 404);
    assert_eq!(alice.api("GET", "/api/v1/tenants/acme", Value::Null).await.0, 200);
    // Whom it knows and to whom nothing here belongs is not let in.
    let mut nobody = app.nobody("nobody");
    let refused = through(&mut nobody, "/login/providers/good", "nobody").await;
    assert_eq!(refused.status(), 401);
    assert!(refused.text().await.unwrap().contains("nothing here is yours yet"));
    assert!(nobody.cookie.is_none());
    // A local account of the same name is somebody else.
    say(json!({"bob": ["acme-dev"], "alice": ["acme-dev"]}));
    let mut local = app.person("bob", None).await;
    let mut bob = app.nobody("bob");
    assert_eq!(through(&mut bob, "/login/providers/good", "bob").await.status(), 303);
    let name = bob.api("GET", "/api/v1/me", Value::Null).await.1["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("bob-") && name.len() == 10, "{name}");
    assert_eq!(local.api("GET", "/api/v1/me", Value::Null).await.1["tenants"], json!([]));
    // Who is disabled here is out, though the provider vouches on.
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
    // Who has no password here proves to be there at the provider, which asks anew.
    app.sql("UPDATE session SET confirmed_at = now() - interval '1 hour'").await;
    let body = json!({"name": "x", "tenant": "acme", "role": "viewer", "days": 1});
    assert_eq!(alice.api("POST", "/api/v1/me/tokens", body.clone()).await.0, 403);
    let text = alice.page("/confirm").await;
    assert!(text.contains("Confirm with The good provider") && !text.contains("type=\"password\""), "{text}");
    let before = alice.cookie.clone();
    let other = through(&mut alice, "/confirm/good", "eve").await;
    assert_eq!(other.status(), 401, "somebody else at the provider confirms nothing");
    assert_eq!(alice.api("POST", "/api/v1/me/tokens", body.clone()).await.0, 403);
    assert_eq!(through(&mut alice, "/confirm/good", "alice").await.status(), 303);
    assert_ne!(alice.cookie, before);
    assert_eq!(alice.api("POST", "/api/v1/me/tokens", body).await.0, 201);
    // Signing out says what is left to do at the provider.
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
    assert_eq!(reqwest::get(&address).await.unwrap().status(), 200, "and the provider takes it");
    assert!(alice.cookie.is_none());
    // A local account links it, with both proven at once; from then on either opens.
    let mut zoe = app.person("zoe", None).await;
    assert!(zoe.page("/account").await.contains("Link The good provider"));
    assert_eq!(
        through(&mut zoe, "/account/providers/good", "alice").await.status(),
        401,
        "alice is somebody already"
    );
    assert_eq!(through(&mut zoe, "/account/providers/good", "zoe-there").await.status(), 303);
    let mut again = app.nobody("zoe");
    assert_eq!(through(&mut again, "/login/providers/good", "zoe-there").await.status(), 303);
    assert_eq!(again.api("GET", "/api/v1/me", Value::Null).await.1["name"], "zoe");
    // And takes it away again; whoever has no other way in keeps it, but for an admin.
    assert_eq!(zoe.submit("/account", "/account/providers/removal", &[("name", "good")]).await.status(), 303);
    assert_eq!(
        through(&mut again, "/login/providers/good", "zoe-there").await.status(),
        401,
        "nobody any more"
    );
    let mut alice = app.nobody("alice");
    assert_eq!(through(&mut alice, "/login/providers/good", "alice").await.status(), 303);
    assert_eq!(alice.api("DELETE", "/api/v1/me/providers/good", Value::Null).await.0, 409);
    let admin = app.admin().await;
    assert_eq!(app.ask(&admin, "DELETE", "/api/v1/accounts/alice/providers", Value::Null).await.0, 204);
    assert_eq!(alice.get("/account").await.status(), 401);
    // Another site's page cannot begin it.
    let foreign = [("sec-fetch-site", "cross-site"), ("accept", "text/html")];
    for path in ["/account/providers/good", "/confirm/good"] {
        assert_eq!(zoe.send("GET", path, &foreign, String::new()).await.status(), 403, "{path}");
    }
    // Linking asks for a fresh proof of the session first.
    app.sql("UPDATE session SET confirmed_at = now() - interval '1 hour'").await;
    let stale = zoe.get("/account/providers/good").await;
    assert_eq!(stale.headers()["location"], "/confirm?next=/account");
}
