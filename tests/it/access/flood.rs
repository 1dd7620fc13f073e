//! Floods through the API: requests of one tenant, one token or many anonymous clients do not affect others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bulkhead::access::{Authority, Role};
use serde_json::Value;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

/// Sends requests from a number of clients until `stop`, and counts the responses by kind.
struct Flood {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    refused: Arc<AtomicUsize>,
    failed: Arc<AtomicUsize>,
}

impl Flood {
    fn start(clients: usize, url: &str, token: impl Fn(usize) -> String) -> Self {
        let (stop, refused, failed): (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>) =
            Default::default();
        let http = bulkhead::outgoing::client().build().unwrap();
        let tasks = (0..clients)
            .map(|n| {
                let (http, url, token) = (http.clone(), url.to_owned(), token(n));
                let (stop, refused, failed) = (stop.clone(), refused.clone(), failed.clone());
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        match http
                            .get(&url)
                            .bearer_auth(&token)
                            .send()
                            .await
                            .map(|answer| answer.status().as_u16())
                        {
                            Ok(429) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                            Ok(500..) => drop(failed.fetch_add(1, Ordering::Relaxed)),
                            _ => {}
                        }
                    }
                })
            })
            .collect();
        Self { stop, tasks, refused, failed }
    }

    /// Returns the number of 429 responses and of failures.
    async fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        (self.refused.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }
}

async fn is_served(app: &TestApp, token: &str, path: &str) {
    for _ in 0..20 {
        let asked = Instant::now();
        let (status, body) = app.ask(token, "GET", path, Value::Null).await;
        assert_eq!(status, 200, "{body}");
        assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_rate_is_a_tenants_own_and_told_in_headers(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::with(options, connect, |config| {
        config.limits.requests_per_second = 2;
        config.limits.request_burst = 30;
    })
    .await;
    let (noisy, quiet) = (app.tenant("noisy").await, app.tenant("quiet").await);
    let one = app.token(Authority::Tenant(noisy, Role::Viewer)).await;
    let two = app.token(Authority::Tenant(noisy, Role::Viewer)).await;
    let other = app.token(Authority::Tenant(quiet, Role::Viewer)).await;
    let http = bulkhead::outgoing::client().build().unwrap();
    let url = format!("{}/api/v1/tenants/noisy/apps", app.one.address);
    let mut refused = None;
    for n in 0..60_u64 {
        let token = if n % 2 == 0 { &one } else { &two };
        let answer = http.get(&url).bearer_auth(token).send().await.unwrap();
        let number = |name: &str| -> u64 {
            answer.headers().get(name).unwrap_or_else(|| panic!("{name}")).to_str().unwrap().parse().unwrap()
        };
        assert_eq!(number("ratelimit-limit"), 30);
        assert!(number("ratelimit-remaining") < 30 && number("ratelimit-reset") <= 15);
        if answer.status() == 429 {
            assert_eq!(number("ratelimit-remaining"), 0);
            assert!(number("retry-after") >= 1);
            assert!(answer.headers().contains_key("x-request-id"));
            refused.get_or_insert(n);
        }
    }
    // Two tokens of a tenant share its rate.
    assert!((30..50).contains(&refused.unwrap()), "{refused:?}");
    is_served(&app, &other, "/api/v1/tenants/quiet/apps").await;
    // Requests by a platform role do not count against the tenant.
    app.get(&app.admin().await, "/api/v1/tenants/noisy/apps").await;
    // Requests by a member of another tenant do not count against this tenant.
    for _ in 0..10 {
        let (status, _) = app.ask(&one, "GET", "/api/v1/tenants/quiet/apps", Value::Null).await;
        assert!(status == 404 || status == 429, "{status}");
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn a_flood_of_one_tenant_leaves_the_database_to_others(
    options: PgPoolOptions,
    connect: PgConnectOptions,
) {
    let app = TestApp::with(options, connect, |config| {
        config.server.connections_per_source = 2000;
        config.limits.requests_per_second = 100_000;
        config.limits.request_burst = 1_000_000;
    })
    .await;
    let (noisy, quiet) = (app.tenant("noisy").await, app.tenant("quiet").await);
    let token = app.token(Authority::Tenant(noisy, Role::Viewer)).await;
    let other = app.token(Authority::Tenant(quiet, Role::Viewer)).await;
    is_served(&app, &other, "/api/v1/tenants/quiet/apps").await;
    let url = format!("{}/api/v1/tenants/noisy/apps", app.one.address);
    let flood = Flood::start(400, &url, |_| token.clone());
    tokio::time::sleep(Duration::from_millis(500)).await;
    is_served(&app, &other, "/api/v1/tenants/quiet/apps").await;
    let (refused, failed) = flood.end().await;
    assert!(refused > 0, "the flood was not limited");
    assert_eq!(failed, 0);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn strangers_with_wrong_tokens_have_a_small_share(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::with(options, connect, |config| config.server.connections_per_source = 2000).await;
    let quiet = app.tenant("quiet").await;
    let token = app.token(Authority::Tenant(quiet, Role::Viewer)).await;
    is_served(&app, &token, "/api/v1/tenants/quiet/apps").await;
    let url = format!("{}/api/v1/tenants/quiet/apps", app.one.address);
    let flood = Flood::start(300, &url, |n| format!("bhk_{n:052}"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    is_served(&app, &token, "/api/v1/tenants/quiet/apps").await;
    assert_eq!(flood.end().await.1, 0);
}
