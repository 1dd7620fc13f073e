//! A provider that tells one lie at a time and is otherwise correct.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::Mutex;
use std::time::Duration;

use actix_web::{App, HttpResponse, HttpServer, web};
use data_encoding::BASE64URL_NOPAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::PublicKeyData;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
/// State of the provider, with the current lie.
pub(super) struct State {
    pub(super) issuer: String,
    pub(super) pair: rcgen::KeyPair,
    pub(super) thief: rcgen::KeyPair,
    pub(super) lie: Mutex<&'static str>,
    pub(super) nonce: Mutex<String>,
    pub(super) challenge: Mutex<String>,
    pub(super) elsewhere: Mutex<u32>,
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

/// Returns the claims of a valid token, changed by the lie.
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
    // PKCE: a code works only with the verifier of its challenge.
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

pub(super) fn start() -> (web::Data<State>, actix_web::dev::ServerHandle) {
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
