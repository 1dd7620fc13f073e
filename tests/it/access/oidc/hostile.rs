//! A hostile provider, with one lie per case: each is refused, and existing sessions stay unchanged.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::Arc;

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::liar::{State, start};
use super::settings;
use crate::support::{Person, TestApp};
fn query(url: &str) -> HashMap<String, String> {
    let url = reqwest::Url::parse(url).unwrap();
    url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
}

/// Starts a sign-in. Returns the parameters that the browser takes to the provider.
async fn begin(state: &State, person: &mut Person, name: &str) -> Result<HashMap<String, String>, u16> {
    let there = person.get(&format!("/login/providers/{name}")).await;
    if there.status() != 303 {
        return Err(there.status().as_u16());
    }
    let asked = query(there.headers()["location"].to_str().unwrap());
    state.nonce.lock().unwrap().clone_from(&asked["nonce"]);
    state.challenge.lock().unwrap().clone_from(&asked["code_challenge"]);
    Ok(asked)
}

fn callback(name: &str, state: &str, more: &str) -> String {
    format!("/login/providers/{name}/callback?code=c&state={state}{more}")
}

/// Lies of the token endpoint and its token. The browser behaves correctly.
const OF_TOKENS: &[&str] = &[
    "nonce: another",
    "nonce: empty",
    "nonce: missing",
    "iss: another",
    "iss: with a slash",
    "iss: missing",
    "aud: another",
    "aud: ours in capitals",
    "aud: ours and another",
    "aud: none at all",
    "aud: missing",
    "azp: another",
    "exp: over",
    "exp: missing",
    "iat: in the future",
    "iat: long ago",
    "nbf: in the future",
    "sub: empty",
    "sub: too long",
    "sub: a number",
    "sub: missing",
    "at_hash: of another token",
    "alg: none",
    "alg: None in capitals",
    "alg: none with a signature",
    "alg: shared secret of the client",
    "alg: public key as a secret",
    "alg: the key's JSON as a secret",
    "signature: another key",
    "signature: stripped",
    "signature: of other claims",
    "kid: unknown",
    "kid: a path",
    "kid: a query",
    "header: brings its own key",
    "header: names a place for keys",
    "header: an access token's type",
    "token: garbage",
    "token: a redirect",
    "token: an error of the server",
    "token: too large",
    "token: no ID token",
    "token: slow",
];

/// Lies of discovery, each told to a fresh replica without cached metadata.
const OF_DISCOVERY: &[&str] = &[
    "discovery: another issuer",
    "discovery: issuer with a slash",
    "discovery: token endpoint elsewhere",
    "discovery: authorization elsewhere",
    "discovery: keys elsewhere",
    "discovery: script as an address",
    "discovery: too large",
    "discovery: a redirect",
    "discovery: not JSON",
    "discovery: no keys",
];

async fn standing(app: &TestApp) -> (i64, i64, i64) {
    sqlx::query_as(
        "SELECT (SELECT count(*) FROM account), (SELECT count(*) FROM session), (SELECT count(*) FROM account_identity)",
    )
    .fetch_one(&app.root)
    .await
    .unwrap()
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn no_lie_lets_anybody_in(options: PgPoolOptions, connect: PgConnectOptions) {
    let dir = tempfile::tempdir().unwrap();
    let (state, handle) = start();
    let (second, second_handle) = start();
    let providers = [
        settings("evil", &state.issuer, &dir.path().join("one")),
        settings("other", &second.issuer, &dir.path().join("two")),
    ];
    let app = TestApp::with(options, connect, |config| config.access.providers.extend(providers)).await;
    app.tenant("acme").await;
    // The session of a signed-in user must stay unchanged.
    let victim = app.person("victim", None).await;
    let tell = |lie: &'static str| *state.lie.lock().unwrap() = lie;
    let before = standing(&app).await;
    let refused = std::cell::Cell::new(0);
    let check = async |lie: &str, person: &mut Person, url: &str| {
        app.sql("TRUNCATE throttle").await;
        let answer = person.get(url).await;
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        assert_eq!(status, 401, "{lie}: {text}");
        assert!(!text.contains("<script") && !text.contains("the-secret"), "{lie}: {text}");
        assert_eq!(person.cookie, victim.cookie, "{lie}: the session is unchanged");
        person.page("/account").await;
        assert_eq!(standing(&app).await, before, "{lie}");
        refused.set(refused.get() + 1);
    };
    for lie in OF_TOKENS {
        tell(lie);
        let mut person = victim.clone();
        let asked = begin(&state, &mut person, "evil").await.unwrap();
        check(lie, &mut person, &callback("evil", &asked["state"], "")).await;
    }
    // Lies on the path back: the token is valid, but the callback is wrong.
    tell("");
    for lie in [
        "state: another",
        "state: missing",
        "state: of another browser",
        "cookie: missing",
        "cookie: of another browser",
        "cookie: changed",
        "cookie: of another provider",
        "code: missing",
        "code: of somebody who began elsewhere",
        "iss: of another provider",
        "answer: an error",
        "mix-up: one provider's answer at another's address",
    ] {
        let mut person = victim.clone();
        let asked = begin(&state, &mut person, "evil").await.unwrap();
        let mut thief = app.nobody("thief");
        let url = match lie {
            "state: another" => callback("evil", "another", ""),
            "state: missing" => "/login/providers/evil/callback?code=c".into(),
            "state: of another browser" => {
                let other = begin(&state, &mut thief, "evil").await.unwrap();
                callback("evil", &other["state"], "")
            }
            "cookie: missing" => {
                person.way = None;
                callback("evil", &asked["state"], "")
            }
            "cookie: of another browser" => {
                begin(&state, &mut thief, "evil").await.unwrap();
                person.way = thief.way.clone();
                callback("evil", &asked["state"], "")
            }
            "cookie: changed" => {
                person.way = person.way.map(|way| way.replacen("=s.", "=c.", 1));
                callback("evil", &asked["state"], "")
            }
            "cookie: of another provider" => {
                begin(&second, &mut person, "other").await.unwrap();
                callback("evil", &asked["state"], "")
            }
            "code: missing" => format!("/login/providers/evil/callback?state={}", asked["state"]),
            "code: of somebody who began elsewhere" => {
                *state.challenge.lock().unwrap() = "the challenge of another browser".into();
                callback("evil", &asked["state"], "")
            }
            "iss: of another provider" => {
                callback("evil", &asked["state"], "&iss=https%3A%2F%2Faccounts.example")
            }
            "answer: an error" => callback("evil", &asked["state"], "&error=access_denied"),
            _ => callback("other", &asked["state"], ""),
        };
        check(lie, &mut person, &url).await;
    }
    for lie in OF_DISCOVERY {
        tell(lie);
        let fresh = app.another().await;
        let mut person = victim.clone();
        person.address.clone_from(&fresh.address);
        match begin(&state, &mut person, "evil").await {
            Err(status) => {
                assert_eq!(status, 401, "{lie}");
                refused.set(refused.get() + 1);
            }
            Ok(asked) => {
                let url = format!("{}{}", fresh.address, callback("evil", &asked["state"], ""));
                check(lie, &mut person, &url).await;
            }
        }
        assert_eq!(standing(&app).await, before, "{lie}");
        fresh.stop().await;
    }
    tell("");
    assert_eq!(
        *state.elsewhere.lock().unwrap(),
        0,
        "no redirect was followed and no key fetched from elsewhere"
    );
    assert!(refused.get() >= 60, "{} lies", refused.get());
    // Control: without a lie, the same flow signs in, once.
    app.sql("TRUNCATE throttle").await;
    let mut person = app.nobody("mallory");
    let asked = begin(&state, &mut person, "evil").await.unwrap();
    let way = person.way.clone();
    let url = callback("evil", &asked["state"], "");
    let answer = person.get(&url).await;
    assert_eq!(answer.status(), 303, "{}", answer.text().await.unwrap());
    assert!(person.cookie.is_some());
    assert_eq!(standing(&app).await.2, before.2 + 1);
    let mut replay = app.nobody("replay");
    replay.way = way;
    assert_eq!(replay.get(&url).await.status(), 401, "a replay is refused");
    assert!(replay.cookie.is_none());
    // The same subject at two providers is two accounts.
    let mut twin = app.nobody("twin");
    let asked = begin(&second, &mut twin, "other").await.unwrap();
    assert_eq!(twin.get(&callback("other", &asked["state"], "")).await.status(), 303);
    let name =
        async |person: &mut Person| person.api("GET", "/api/v1/me", Value::Null).await.1["name"].clone();
    assert_ne!(name(&mut person).await, name(&mut twin).await);
    handle.stop(false).await;
    second_handle.stop(false).await;
}

/// A provider whose certificate is not trusted is refused.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn tls_is_verified(options: PgPoolOptions, connect: PgConnectOptions) {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let issuer = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let own = issuer.clone();
    let server = HttpServer::new(move || {
        let issuer = own.clone();
        App::new().default_service(web::to(move |req: HttpRequest| {
            let issuer = issuer.clone();
            let body = if req.path() == "/jwks" {
                json!({"keys": []})
            } else {
                json!({
                    "issuer": issuer, "authorization_endpoint": format!("{issuer}/authorize"),
                    "token_endpoint": format!("{issuer}/token"), "jwks_uri": format!("{issuer}/jwks"),
                    "response_types_supported": ["code"], "subject_types_supported": ["public"],
                    "id_token_signing_alg_values_supported": ["ES256"],
                })
            };
            async move { HttpResponse::Ok().json(body) }
        }))
    })
    .workers(1)
    .disable_signals()
    .listen_rustls_0_23(listener, tls)
    .unwrap()
    .run();
    let handle = server.handle();
    tokio::spawn(server);
    std::fs::write(dir.path().join("ca.pem"), made.cert.pem()).unwrap();
    let strange = settings("strange", &issuer, &dir.path().join("secret"));
    let mut known = settings("known", &issuer, &dir.path().join("secret"));
    known.ca = Some(dir.path().join("ca.pem"));
    let app =
        TestApp::with(options, connect, |config| config.access.providers.extend([strange, known])).await;
    assert_eq!(app.nobody("x").get("/login/providers/strange").await.status(), 401);
    assert_eq!(
        app.nobody("x").get("/login/providers/known").await.status(),
        303,
        "its own CA makes it trusted"
    );
    handle.stop(false).await;
}
