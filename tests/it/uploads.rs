//! Uploads to a registry that writes all bytes it receives, fast or slowly. Two requests of one upload never
//! reach it at the same time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use actix_web::dev::ServerHandle;
use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use bulkhead::access::{Authority, Role};
use bulkhead::ids::Digest;
use serde_json::Value;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::TestApp;

/// The state of the fake registry.
#[derive(Default)]
pub(crate) struct Seen {
    /// Bodies that it reads now, and the maximum so far.
    now: AtomicUsize,
    most: AtomicUsize,
    /// Its answer to PUT instead of 201.
    refuses: Mutex<Option<u16>>,
    /// Digests that it does not have.
    pub(crate) lacks: Mutex<Vec<String>>,
    /// Method and path of each request.
    pub(crate) asked: Mutex<Vec<(String, String)>>,
}

async fn answer(req: HttpRequest, mut body: web::Payload, seen: web::Data<Arc<Seen>>) -> HttpResponse {
    let method = req.method().as_str().to_owned();
    seen.asked.lock().unwrap().push((method.clone(), req.path().to_owned()));
    if matches!(method.as_str(), "PATCH" | "PUT" | "DELETE") && req.path().contains("/uploads/") {
        let now = seen.now.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most.fetch_max(now, Ordering::SeqCst);
    }
    while let Some(Ok(_)) = futures_util::StreamExt::next(&mut body).await {}
    if matches!(method.as_str(), "PATCH" | "PUT" | "DELETE") && req.path().contains("/uploads/") {
        seen.now.fetch_sub(1, Ordering::SeqCst);
    }
    if seen.lacks.lock().unwrap().iter().any(|digest| req.path().contains(digest.as_str())) {
        return HttpResponse::NotFound().finish();
    }
    if method == "DELETE" && req.path().contains("/bad/") {
        return HttpResponse::InternalServerError().finish();
    }
    match method.as_str() {
        "POST" if req.query_string().contains("mount=") && req.path().contains("/other/") => {
            HttpResponse::Created().finish()
        }
        "POST" => {
            let id = format!("up-{}", seen.asked.lock().unwrap().len());
            let location = format!("/v2/acme/web/blobs/uploads/{id}?_state=abc%3D");
            HttpResponse::Accepted()
                .insert_header(("Docker-Upload-UUID", id))
                .insert_header(("Location", location))
                .finish()
        }
        "PUT" => {
            let refuses = *seen.refuses.lock().unwrap();
            if let Some(status) = refuses {
                return HttpResponse::build(status.try_into().unwrap()).finish();
            }
            let query = req.query_string().replace("%3A", ":");
            let digest = query.split("digest=").nth(1).unwrap_or_default().to_owned();
            HttpResponse::Created().insert_header(("Docker-Content-Digest", digest)).finish()
        }
        "PATCH" => HttpResponse::Accepted()
            .insert_header(("Location", format!("{}?_state=def%3D", req.path())))
            .finish(),
        "HEAD" => HttpResponse::Ok().no_chunking(8).body("12345678"),
        _ => HttpResponse::Accepted().finish(),
    }
}

/// A platform in front of such a registry.
pub(crate) struct Before {
    pub(crate) app: TestApp,
    pub(crate) seen: Arc<Seen>,
    pub(crate) token: String,
    pub(crate) http: reqwest::Client,
    handle: ServerHandle,
}

pub(crate) const UPLOADS: &str = "/v2/acme/web/blobs/uploads/";

impl Before {
    pub(crate) async fn start(options: PgPoolOptions, connect: PgConnectOptions) -> Self {
        let seen = Arc::new(Seen::default());
        let data = web::Data::new(Arc::clone(&seen));
        let server =
            HttpServer::new(move || App::new().app_data(data.clone()).default_service(web::to(answer)))
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
        let scope = "repository%3Aacme%2Fweb%3Apull%2Cpush&scope=repository%3Aacme%2Fother%3Apull%2Cpush";
        let url = format!("{}/auth/token?service=bulkhead-registry&scope={scope}", app.one.address);
        let answer: Value =
            http.get(url).basic_auth("acme", Some(&secret)).send().await.unwrap().json().await.unwrap();
        let token = answer["token"].as_str().unwrap().to_owned();
        Self { app, seen, token, http, handle }
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: &'static [u8]) -> (u16, String, String) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let url = format!("{}{path}", self.app.one.address);
        let answer = self.http.request(method, url).bearer_auth(&self.token).body(body).send().await.unwrap();
        let header = answer.headers().get("location").and_then(|value| value.to_str().ok());
        let (status, location) = (answer.status().as_u16(), header.unwrap_or_default().to_owned());
        (status, location, answer.text().await.unwrap_or_default())
    }

    /// Starts an upload. Returns its path with its state.
    async fn begin(&self) -> String {
        let (status, location, text) = self.send("POST", UPLOADS, b"").await;
        assert_eq!(status, 202, "{text}");
        location
    }

    /// Sends the first byte of a request, then waits.
    async fn held(&self, method: &str, path: &str) -> TcpStream {
        self.held_of(method, path, 1 << 20).await
    }

    async fn held_of(&self, method: &str, path: &str, bytes: usize) -> TcpStream {
        let before = self.seen.now.load(Ordering::SeqCst);
        let at = self.app.one.address.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {at}\r\nAuthorization: Bearer {}\r\n\
             Content-Type: application/octet-stream\r\nContent-Length: {bytes}\r\n\r\nE",
            self.token
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let begun = Instant::now();
        while self.seen.now.load(Ordering::SeqCst) == before {
            assert!(begun.elapsed() < Duration::from_secs(10), "the registry does not see it");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        stream
    }

    /// Polls until the request is no longer refused because of another request on the upload. Returns the
    /// time.
    async fn freed(&self, method: &str, path: &str) -> (Duration, u16) {
        let begun = Instant::now();
        loop {
            let (status, _, text) = self.send(method, path, b"12345678").await;
            if status != 409 {
                return (begun.elapsed(), status);
            }
            assert!(text.contains("another request for this upload"), "{text}");
            assert!(begun.elapsed() < Duration::from_secs(20), "{text}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Returns how often the registry received this request.
    pub(crate) fn asked(&self, method: &str, path: &str) -> usize {
        let asked = self.seen.asked.lock().unwrap();
        asked.iter().filter(|(own, at)| own == method && at.contains(path)).count()
    }

    pub(crate) async fn stop(self) {
        self.handle.stop(false).await;
    }
}

fn with(location: &str, digest: &Digest) -> String {
    format!("{location}?digest={}", digest.as_str().replace(':', "%3A"))
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn one_request_at_a_time_writes_to_an_upload(options: PgPoolOptions, connect: PgConnectOptions) {
    let before = Before::start(options, connect).await;
    let good = Digest::of(b"12345678");
    // A PATCH has sent one byte and waits; other requests commit, cancel and write to the same state.
    let upload = before.begin().await;
    let open = before.held("PATCH", &upload).await;
    for (method, path) in
        [("PUT", with(&upload, &good)), ("DELETE", upload.clone()), ("PATCH", upload.clone())]
    {
        let (status, _, text) = before.send(method, &path, b"12345678").await;
        assert_eq!(status, 409, "{method}: {text}");
    }
    assert_eq!(before.app.number("SELECT count(*) FROM upload WHERE part IS NOT NULL", "").await, 1);
    assert!(before.app.number("SELECT sum(bytes)::bigint FROM upload", "").await > 0, "it counts on");
    // The PATCH is cut off: the registry has answered, so its bytes count, and the next request continues
    // there.
    drop(open);
    let (waited, status) = before.freed("GET", &upload).await;
    assert_eq!(status, 204);
    let (again, status) = before.freed("PUT", &with(&upload, &good)).await;
    assert_eq!(status, 201);
    assert!(waited + again < Duration::from_secs(5), "{waited:?} {again:?}");
    // A waiting PUT, beside another PUT: the second changes nothing that the first has recorded.
    let upload = before.begin().await;
    let open = before.held("PUT", &with(&upload, &good)).await;
    let (status, _, _) = before.send("PUT", &with(&upload, &Digest::of(b"other")), b"other").await;
    assert_eq!(status, 409);
    assert_eq!(before.app.number("SELECT count(*) FROM upload WHERE part IS NOT NULL", "").await, 1);
    assert_eq!(before.app.number("SELECT count(*) FROM upload WHERE digest IS NOT NULL", "").await, 0);
    drop(open);
    assert_eq!(before.freed("DELETE", &upload).await.1, 204);
    assert_eq!(before.app.number("SELECT count(*) FROM upload", "").await, 0);
    // An answer frees the upload at once, even a refusal; so does the expiry of a claim after a crash.
    let upload = before.begin().await;
    *before.seen.refuses.lock().unwrap() = Some(400);
    assert_eq!(before.send("PUT", &with(&upload, &good), b"12345678").await.0, 400);
    *before.seen.refuses.lock().unwrap() = None;
    assert_eq!(before.send("PATCH", &upload, b"1234").await.0, 202);
    before.app.sql("UPDATE upload SET part = 'x', part_until = now() + interval '1 second'").await;
    assert_eq!(before.freed("PUT", &with(&upload, &good)).await.1, 201);
    // An upload with an unsettled commit accepts no more requests.
    let upload = before.begin().await;
    before.app.sql(&format!("UPDATE upload SET digest = '{good}'")).await;
    assert_eq!(before.send("PUT", &with(&upload, &good), b"12345678").await.0, 409);
    assert_eq!(before.send("DELETE", &upload, b"").await.0, 409);
    assert_eq!(before.seen.most.load(Ordering::SeqCst), 1, "never two at the same time");
    before.stop().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_stream_ends_with_the_right_to_push(options: PgPoolOptions, connect: PgConnectOptions) {
    const ALL: usize = 40 << 20;
    let before = Before::start(options, connect).await;
    for (change, back) in [
        ("UPDATE tenant SET state = 'suspended'", "UPDATE tenant SET state = 'active'"),
        (
            "UPDATE api_token SET revoked_at = now() WHERE tenant_id IS NOT NULL",
            "UPDATE api_token SET revoked_at = NULL WHERE tenant_id IS NOT NULL",
        ),
        ("SELECT 1", "SELECT 1"),
    ] {
        let upload = before.begin().await;
        let mut open = before.held_of("PATCH", &upload, ALL).await;
        let id = upload.rsplit('/').next().unwrap().split('?').next().unwrap();
        let bytes = async || before.app.number("SELECT bytes FROM upload WHERE id = $1", id).await;
        while bytes().await == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        before.app.sql(change).await;
        let block = vec![7; 1 << 20];
        let mut left = ALL - 1;
        while left > 0 && open.write_all(&block[..left.min(block.len())]).await.is_ok() {
            left -= left.min(block.len());
        }
        let begun = Instant::now();
        while before.seen.now.load(Ordering::SeqCst) > 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{change}: the registry still reads");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        before.app.sql(back).await;
        let bytes = bytes().await;
        if change == "SELECT 1" {
            assert_eq!((left, bytes), (0, 40 << 20));
        } else {
            assert!((1 << 20..=17 << 20).contains(&bytes), "{change}: {bytes}");
        }
    }
    before.stop().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn streams_that_wait_for_their_quota_leave_the_database_to_others(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let before = Before::start(options, connect).await;
    let admin = before.app.admin().await;
    let mut uploads = Vec::new();
    for _ in 0..12 {
        uploads.push(before.begin().await);
    }
    let mut gate = before.app.root.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM quota WHERE resource = 'registry_bytes' FOR UPDATE")
        .execute(&mut *gate)
        .await
        .unwrap();
    let at = before.app.one.address.strip_prefix("http://").unwrap();
    let mut open = Vec::new();
    for upload in &uploads {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = format!(
            "PATCH {upload} HTTP/1.1\r\nHost: {at}\r\nAuthorization: Bearer {}\r\nContent-Length: 1048576\r\n\r\nE",
            before.token
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        open.push(stream);
    }
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                 AND wait_event_type = 'Lock' AND $1 = ''";
    let begun = Instant::now();
    while before.app.number(waits, "").await == 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "no stream reserves");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(before.app.number(waits, "").await <= 2, "a quarter of the connections");
    let begun = Instant::now();
    assert_eq!(before.app.get(&admin, "/api/v1/tenants").await["items"][0]["name"], "acme");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    gate.rollback().await.unwrap();
    drop(open);
    before.stop().await;
}
