//! A provider that lies, one lie at a time: all refused, and whoever was signed in stays as they were.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use data_encoding::BASE64URL_NOPAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::PublicKeyData;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::settings;
use crate::support::{Person, TestApp};

/// What it knows, and which lie it tells.
struct State {
    issuer: String,
    pair: rcgen::KeyPair,
    thief: rcgen::KeyPair,
    lie: Mutex<&'static str>,
    nonce: Mutex<String>,
    challenge: Mutex<String>,
    elsewhere: Mutex<u32>,
}

fn coordinates(pair: &rcgen::KeyPair) -> (String, String) {
    let der = pair.subject_public_key_info();
    let point = &der[der.len() - 64..];
    (BASE64URL_NOPAD.encode(&point[..32]), BASE64URL_NOPAD.encode(&point[32..]))
}

fn jwk(pair: &rcgen::KeyPair, kid: &str) -> Value {
    let (x, y) = coordinates(pair);
    json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": kid, "x": x, "y": y})
}

async fn discovery(state: web::Data<State>) -> HttpResponse {
    let issuer = &state.issuer;
    let lie = *state.lie.lock().unwrap();
    let mut body = json!({
        "issuer": issuer, "authorization_endpoint": format!("{issuer}/authorize"),
        "token_endpoint": format!("{issuer}/token"), "jwks_uri": format!("{issuer}/jwks"),
        "response_types_supported": ["code"], "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256", "HS256", "none"],
    });
    match lie {
        "discovery: another issuer" => body["issuer"] = json!("https://accounts.example"),
        "discovery: issuer with a slash" => body["issuer"] = json!(format!("{issuer}/")),
        "discovery: token endpoint elsewhere" => {
            body["token_endpoint"] = json!("http://169.254.169.254/token");
        }
        "discovery: authorization elsewhere" => {
            body["authorization_endpoint"] = json!("https://phish.example/authorize");
        }
        "discovery: keys elsewhere" => body["jwks_uri"] = json!("http://127.0.0.1:9/jwks"),
        "discovery: script as an address" => body["authorization_endpoint"] = json!("javascript:alert(1)"),
        "discovery: too large" => body["padding"] = json!("x".repeat(600_000)),
        "discovery: a redirect" => {
            return HttpResponse::Found().insert_header(("location", format!("{issuer}/elsewhere"))).finish();
        }
        "discovery: not JSON" => return HttpResponse::Ok().body("<html>"),
        _ => {}
    }
    HttpResponse::Ok().json(body)
}

async fn keys(state: web::Data<State>) -> HttpResponse {
    match *state.lie.lock().unwrap() {
        "discovery: no keys" => HttpResponse::Ok().json(json!({"keys": []})),
        _ => HttpResponse::Ok().json(json!({"keys": [jwk(&state.pair, "one")]})),
    }
}

fn elsewhere(state: &State) -> HttpResponse {
    *state.elsewhere.lock().unwrap() += 1;
    HttpResponse::Ok().json(json!({}))
}

/// The claims of a good token, as the lie changes them.
fn claims(state: &State, lie: &str) -> Map<String, Value> {
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let mut claims = json!({
        "iss": state.issuer, "sub": "mallory", "aud": "bulkhead", "iat": now, "exp": now + 300,
        "nonce": *state.nonce.lock().unwrap(), "auth_time": now, "groups": ["ops", "acme-own"],
        "preferred_username": "mallory",
    });
    let changed: &[(&str, Value)] = &match lie {
        "nonce: another" => vec![("nonce", json!("another"))],
        "nonce: empty" => vec![("nonce", json!(""))],
        "iss: another" => vec![("iss", json!("https://accounts.example"))],
        "iss: with a slash" => vec![("iss", json!(format!("{}/", state.issuer)))],
        "aud: another" => vec![("aud", json!("somebody-else"))],
        "aud: ours in capitals" => vec![("aud", json!("BULKHEAD"))],
        "aud: ours and another" => {
            vec![("aud", json!(["bulkhead", "somebody-else"])), ("azp", json!("bulkhead"))]
        }
        "aud: none at all" => vec![("aud", json!([]))],
        "azp: another" => vec![("azp", json!("somebody-else"))],
        "exp: over" => vec![("exp", json!(now - 10)), ("iat", json!(now - 300))],
        "iat: in the future" => vec![("iat", json!(now + 3_600))],
        "iat: long ago" => vec![("iat", json!(now - 86_400))],
        "nbf: in the future" => vec![("nbf", json!(now + 3_600))],
        "sub: empty" => vec![("sub", json!(""))],
        "sub: too long" => vec![("sub", json!("s".repeat(300)))],
        "sub: a number" => vec![("sub", json!(1))],
        "at_hash: of another token" => vec![("at_hash", json!("AAAAAAAAAAAAAAAAAAAAAA"))],
        _ => Vec::new(),
    };
    for (name, value) in changed {
        claims[*name] = value.clone();
    }
    let mut claims = claims.as_object().unwrap().clone();
    for (named, gone) in [
        ("nonce: missing", "nonce"),
        ("exp: missing", "exp"),
        ("iss: missing", "iss"),
        ("aud: missing", "aud"),
        ("sub: missing", "sub"),
    ] {
        if lie == named {
            claims.remove(gone);
        }
    }
    claims
}

fn sign(pair: &rcgen::KeyPair, header: &Header, claims: &Map<String, Value>) -> String {
    let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).unwrap();
    jsonwebtoken::encode(header, claims, &key).unwrap()
}

fn by_hand(header: &Value, claims: &Map<String, Value>, signature: &[u8]) -> String {
    let part = |text: String| BASE64URL_NOPAD.encode(text.as_bytes());
    let body = format!("{}.{}", part(header.to_string()), part(json!(claims).to_string()));
    format!("{body}.{}", BASE64URL_NOPAD.encode(signature))
}

fn token(state: &State, lie: &str) -> String {
    let claims = claims(state, lie);
    let mut header = Header::new(Algorithm::ES256);
    header.kid = Some("one".into());
    let shared = |secret: &[u8]| {
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("one".into());
        jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(secret)).unwrap()
    };
    match lie {
        "alg: none" => by_hand(&json!({"alg": "none", "typ": "JWT"}), &claims, b""),
        "alg: None in capitals" => by_hand(&json!({"alg": "NONE", "kid": "one"}), &claims, b""),
        "alg: none with a signature" => by_hand(&json!({"alg": "none", "kid": "one"}), &claims, b"x"),
        "alg: shared secret of the client" => shared(b"the-secret-of-the-client"),
        "alg: public key as a secret" => shared(state.pair.public_key_pem().as_bytes()),
        "alg: the key's JSON as a secret" => shared(jwk(&state.pair, "one").to_string().as_bytes()),
        "signature: another key" => sign(&state.thief, &header, &claims),
        "signature: stripped" => {
            let good = sign(&state.pair, &header, &claims);
            format!("{}.", good.rsplit_once('.').unwrap().0)
        }
        "signature: of other claims" => {
            let (good, bad) = (sign(&state.pair, &header, &Map::new()), sign(&state.thief, &header, &claims));
            format!("{}.{}", bad.rsplit_once('.').unwrap().0, good.rsplit_once('.').unwrap().1)
        }
        "kid: unknown" => {
            header.kid = Some("two".into());
            sign(&state.thief, &header, &claims)
        }
        "kid: a path" => {
            header.kid = Some("../../../../dev/null".into());
            sign(&state.thief, &header, &claims)
        }
        "kid: a query" => {
            header.kid = Some("x' UNION SELECT 'k".into());
            sign(&state.thief, &header, &claims)
        }
        "header: brings its own key" => {
            header.jwk = Some(serde_json::from_value(jwk(&state.thief, "one")).unwrap());
            sign(&state.thief, &header, &claims)
        }
        "header: names a place for keys" => {
            header.kid = Some("thief".into());
            header.jku = Some(format!("{}/elsewhere", state.issuer));
            sign(&state.thief, &header, &claims)
        }
        "header: an access token's type" => {
            header.typ = Some("at+jwt".into());
            sign(&state.thief, &header, &claims)
        }
        "token: garbage" => "not.a.token".into(),
        _ => sign(&state.pair, &header, &claims),
    }
}

async fn exchange(state: web::Data<State>, form: web::Form<HashMap<String, String>>) -> HttpResponse {
    let lie = *state.lie.lock().unwrap();
    // PKCE as a provider does it: a code opens only for whoever began with its challenge.
    let verifier = form.get("code_verifier").cloned().unwrap_or_default();
    let challenge = BASE64URL_NOPAD.encode(&Sha256::digest(verifier.as_bytes()));
    if challenge != *state.challenge.lock().unwrap() {
        return HttpResponse::BadRequest()
            .json(json!({"error": "invalid_grant", "error_description": "PKCE"}));
    }
    match lie {
        "token: a redirect" => {
            return HttpResponse::TemporaryRedirect()
                .insert_header(("location", format!("{}/elsewhere", state.issuer)))
                .finish();
        }
        "token: an error of the server" => return HttpResponse::InternalServerError().body("oops <script>"),
        "token: too large" => return HttpResponse::Ok().body("x".repeat(600_000)),
        "token: no ID token" => {
            return HttpResponse::Ok().json(json!({"access_token": "a", "token_type": "Bearer"}));
        }
        "token: slow" => tokio::time::sleep(Duration::from_secs(15)).await,
        _ => {}
    }
    let id_token = token(&state, lie);
    HttpResponse::Ok()
        .json(json!({"access_token": "a", "token_type": "Bearer", "expires_in": 60, "id_token": id_token}))
}

fn start() -> (web::Data<State>, actix_web::dev::ServerHandle) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let state = web::Data::new(State {
        issuer: format!("http://{}", listener.local_addr().unwrap()),
        pair: rcgen::KeyPair::generate().unwrap(),
        thief: rcgen::KeyPair::generate().unwrap(),
        lie: Mutex::new(""),
        nonce: Mutex::default(),
        challenge: Mutex::default(),
        elsewhere: Mutex::default(),
    });
    let inner = state.clone();
    let server = HttpServer::new(move || {
        App::new()
            .app_data(inner.clone())
            .route("/.well-known/openid-configuration", web::get().to(discovery))
            .route("/jwks", web::get().to(keys))
            .route("/token", web::post().to(exchange))
            .default_service(web::to(|state: web::Data<State>| async move { elsewhere(&state) }))
    })
    .workers(1)
    .disable_signals()
    .listen(listener)
    .unwrap()
    .run();
    let handle = server.handle();
    tokio::spawn(server);
    (state, handle)
}

fn query(url: &str) -> HashMap<String, String> {
    let url = reqwest::Url::parse(url).unwrap();
    url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
}

/// Begins a sign-in: what the browser takes to the provider.
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

/// Lies of the token endpoint and its token: the browser does everything right.
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

/// Lies of discovery: told to a platform that has asked nothing yet.
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
    // Somebody who is signed in while it is tried: nothing of theirs may change.
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
        assert_eq!(person.cookie, victim.cookie, "{lie}: the session is as it was");
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
    // Lies of whoever sits between: the token is good, the browser is sent back wrongly.
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
    // The control: without a lie the very same way lets in. Once.
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
    assert_eq!(replay.get(&url).await.status(), 401, "a second time it opens nothing");
    assert!(replay.cookie.is_none());
    // The same subject at two providers is two people.
    let mut twin = app.nobody("twin");
    let asked = begin(&second, &mut twin, "other").await.unwrap();
    assert_eq!(twin.get(&callback("other", &asked["state"], "")).await.status(), 303);
    let name =
        async |person: &mut Person| person.api("GET", "/api/v1/me", Value::Null).await.1["name"].clone();
    assert_ne!(name(&mut person).await, name(&mut twin).await);
    handle.stop(false).await;
    second_handle.stop(false).await;
}

/// A certificate that nobody vouches for is no provider.
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
        "with its certificate it is reached"
    );
    handle.stop(false).await;
}
