//! The registry proxy in front of a dishonest registry. Only parsed requests reach the registry, and an
//! answer with a different digest is undone.

use std::sync::{Arc, Mutex};

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use bulkhead::access::{Authority, Role};
use bulkhead::ids::Digest;
use serde_json::Value;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

/// The requests that the registry received: method, path with query, type of the body.
type Asked = Arc<Mutex<Vec<(String, String, String)>>>;

/// A registry that commits other bytes than requested, unless they are `honest`.
struct Liar {
    asked: Asked,
    honest: Digest,
    other: Digest,
}

async fn answer(req: HttpRequest, mut body: web::Payload, liar: web::Data<Liar>) -> HttpResponse {
    while let Some(Ok(_)) = futures_util::StreamExt::next(&mut body).await {}
    let kind = req.headers().get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let method = req.method().as_str().to_owned();
    liar.asked.lock().unwrap().push((method.clone(), req.uri().to_string(), kind));
    match method.as_str() {
        "POST" => HttpResponse::Accepted()
            .insert_header(("Docker-Upload-UUID", "11-22"))
            .insert_header(("Location", "/v2/acme/web/blobs/uploads/11-22?_state=abc%3D"))
            .finish(),
        "PUT" => {
            let honest = req.query_string().contains(liar.honest.as_str());
            let committed = if honest { &liar.honest } else { &liar.other };
            HttpResponse::Created().insert_header(("Docker-Content-Digest", committed.as_str())).finish()
        }
        "PATCH" => HttpResponse::Accepted()
            .insert_header(("Location", "/v2/acme/web/blobs/uploads/11-22?_state=def%3D"))
            .finish(),
        "HEAD" => HttpResponse::Ok().no_chunking(7).body("1234567"),
        _ => HttpResponse::Accepted().finish(),
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn an_answer_that_names_other_bytes_is_undone(options: PgPoolOptions, connect: PgConnectOptions) {
    let asked = Asked::default();
    let (honest, wanted, other) = (Digest::of(b"honest"), Digest::of(b"wanted"), Digest::of(b"other"));
    let liar =
        web::Data::new(Liar { asked: Arc::clone(&asked), honest: honest.clone(), other: other.clone() });
    let server = HttpServer::new(move || App::new().app_data(liar.clone()).default_service(web::to(answer)))
        .workers(1)
        .disable_signals()
        .bind("127.0.0.1:0")
        .unwrap();
    let registry = format!("http://{}", server.addrs()[0]);
    let server = server.run();
    let handle = server.handle();
    tokio::spawn(server);
    let app = TestApp::with(options, connect, |config| config.registry.url = registry).await;
    let acme = app.tenant("acme").await;
    app.sql("UPDATE tenant SET state = 'active'").await;
    let secret = app.token(Authority::Tenant(acme, Role::Deployer)).await;
    let http = bulkhead::outgoing::client().build().unwrap();
    let at = app.one.address.clone();
    let url =
        format!("{at}/auth/token?service=bulkhead-registry&scope=repository%3Aacme%2Fweb%3Apull%2Cpush");
    let answer: Value =
        http.get(url).basic_auth("acme", Some(&secret)).send().await.unwrap().json().await.unwrap();
    let token = answer["token"].as_str().unwrap().to_owned();
    let send = async |method: reqwest::Method, path: &str, body: &'static str| {
        let kind = "application/x-www-form-urlencoded";
        let request =
            http.request(method, format!("{at}{path}")).bearer_auth(&token).header("content-type", kind);
        request.body(body).send().await.unwrap().status().as_u16()
    };
    let uploads = "/v2/acme/web/blobs/uploads/";
    assert_eq!(send(reqwest::Method::POST, uploads, "").await, 202);
    let forged = format!("{uploads}11-22?digest={wanted}&_state=abc%3D");
    assert_eq!(send(reqwest::Method::PUT, &forged, "").await, 400, "only the platform may know the state");
    let put = format!("{uploads}11-22?digest={}", wanted.as_str().replace(':', "%3a"));
    assert_eq!(send(reqwest::Method::PUT, &put, "digest=sha256:evil").await, 502);
    let seen = asked.lock().unwrap().clone();
    let part = format!("{uploads}11-22?_state=abc%3D");
    assert!(seen.contains(&("PATCH".into(), part, "application/octet-stream".into())), "{seen:?}");
    let expected = format!("{uploads}11-22?_state=def%3D&digest={wanted}");
    assert!(
        seen.contains(&("PUT".into(), expected, "application/octet-stream".into())),
        "only parsed requests: {seen:?}"
    );
    let gone = format!("/v2/acme/web/blobs/{other}");
    assert!(seen.iter().any(|(method, path, _)| method == "DELETE" && *path == gone), "{seen:?}");
    assert_eq!(app.number("SELECT count(*) FROM blob WHERE digest <> $1", "").await, 0);
    let open = "SELECT count(*) FROM upload WHERE id = $1 AND digest IS NULL";
    assert_eq!(app.number(open, "11-22").await, 1, "its bytes still count");
    // The same upload with an honest answer is recorded with its size.
    let put = format!("{uploads}11-22?digest={honest}");
    assert_eq!(send(reqwest::Method::PUT, &put, "x").await, 201);
    assert_eq!(app.number("SELECT size FROM blob WHERE digest = $1", honest.as_str()).await, 7);
    assert_eq!(app.number(open, "11-22").await, 0);
    assert_eq!(send(reqwest::Method::PUT, &put, "x").await, 404, "a finished upload no longer exists");
    handle.stop(false).await;
}
