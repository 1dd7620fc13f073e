//! Secrets are stored only where they must be. Canaries go through every interface; then the test searches
//! the most verbose logs, the database dump, the metrics and every error answer.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Machine, run};

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Serve(std::process::Child);

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts another `serve` over the same database with trace logs.
fn loud(machine: &Machine, dir: &Path, port: u16, metrics: u16) -> Serve {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let mut settings: toml::Table =
        fs::read_to_string(machine.data.join("serve.toml")).unwrap().parse().unwrap();
    let server = settings["server"].as_table_mut().unwrap();
    for (name, port) in [("listen", port), ("pull_listen", free_port()), ("metrics_listen", metrics)] {
        server.insert(name.into(), format!("127.0.0.1:{port}").into());
    }
    settings["log"].as_table_mut().unwrap().insert("level".into(), "trace".into());
    let config = dir.join("serve.toml");
    fs::write(&config, toml::to_string(&settings).unwrap()).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).unwrap();
    let user = format!("bk{}-serve", machine.id);
    let child = Command::new("setpriv")
        .args([
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set=-all",
            "--",
        ])
        .args([env!("CARGO_BIN_EXE_bulkhead"), "serve", "--config", &config.display().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(dir.join("log")).unwrap())
        .spawn()
        .unwrap();
    Serve(child)
}

/// Returns everything that was written: the logs, the dump, the metrics.
async fn written(machine: &Machine, log: &Path, metrics: u16) -> [(&'static str, String); 3] {
    let url = format!("http://127.0.0.1:{metrics}/metrics");
    let numbers = reqwest::get(url).await.unwrap().text().await.unwrap();
    assert!(numbers.contains("bulkhead_http_responses_total"));
    let socket = machine.data.join("run/postgres").display().to_string();
    let (good, dump) = run("pg_dump", &["-h", &socket, "-U", "postgres", "bulkhead"]);
    assert!(good && dump.contains("COPY public.account") && dump.contains("ada"), "the dump is complete");
    let mut logs = fs::read_to_string(log).unwrap();
    assert!(logs.contains("TRACE") && logs.lines().count() > 100, "the log is at its most verbose level");
    for name in ["serve", "agent", "registry", "postgres", "prober", "resolver", "engine"] {
        logs += &fs::read_to_string(machine.data.join(format!("log/{name}.log"))).unwrap_or_default();
    }
    [("a log", logs), ("the dump", dump), ("the metrics", numbers)]
}

#[expect(clippy::too_many_lines, reason = "one story: every door, one after another")]
#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_in_no_log_dump_metric_or_error() {
    let machine = Machine::start().await;
    let (dir, (port, metrics)) = (tempfile::tempdir().unwrap(), (free_port(), free_port()));
    let log = dir.path().join("log");
    let _serve = loud(&machine, dir.path(), port, metrics);
    let address = format!("http://127.0.0.1:{port}");
    let http = bulkhead::outgoing::client().build().unwrap();
    let begun = Instant::now();
    while http.get(format!("{address}/readyz")).send().await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", fs::read_to_string(&log).unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut canaries: Vec<(&str, String)> = Vec::new();
    let mut errors = String::new();
    let form = "application/x-www-form-urlencoded";
    let post = |path: String, body: String, cookie: String| {
        http.post(format!("{address}{path}"))
            .header("origin", &address)
            .header("content-type", form)
            .header("cookie", cookie)
            .body(body)
            .send()
    };
    let session_of = |answer: &reqwest::Response| {
        let text = answer.headers()["set-cookie"].to_str().unwrap();
        text.split(';').next().unwrap().to_owned()
    };
    // The first admin: link, password, session.
    let link = fs::read_to_string(machine.data.join("secrets/first-admin-link")).unwrap();
    let code = link.trim().rsplit('/').next().unwrap().to_owned();
    let password = "Canary_of_a_password!7261";
    let answer = post(format!("/first-admin/{code}"), format!("name=ada&password={password}"), String::new())
        .await
        .unwrap();
    assert_eq!(answer.status(), 303);
    let cookie = session_of(&answer);
    canaries.push(("first admin's link", code.clone()));
    canaries.push(("password", password.to_owned()));
    canaries.push(("session", cookie.split('=').nth(1).unwrap().to_owned()));
    let api = |method: &str, path: &str, body: Value| {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let request = http
            .request(method, format!("{address}{path}"))
            .header("origin", &address)
            .header("cookie", &cookie);
        if body.is_null() { request.send() } else { request.json(&body).send() }
    };
    let answer = async |method: &str, path: &str, body: Value| -> Value {
        let answer = api(method, path, body).await.unwrap();
        assert!(answer.status().is_success(), "{method} {path}: {}", answer.status());
        answer.json().await.unwrap_or(Value::Null)
    };
    answer("POST", "/api/v1/tenants", json!({"name": "acme"})).await;
    let made = answer("POST", "/api/v1/me/tokens", json!({"name": "x", "role": "admin", "days": 1})).await;
    let token = made["token"].as_str().unwrap().to_owned();
    canaries.push(("API token", token.clone()));
    let made = answer("POST", "/api/v1/tenants/acme/robots", json!({"name": "ci", "push": true})).await;
    let robot = (made["login"].as_str().unwrap().to_owned(), made["secret"].as_str().unwrap().to_owned());
    canaries.push(("robot's secret", robot.1.clone()));
    let made =
        answer("POST", "/api/v1/tenants/acme/invitations", json!({"name": "bob", "role": "viewer"})).await;
    let invitation = made["link"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    canaries.push(("invitation", invitation.clone()));
    let made = answer("POST", "/api/v1/me/second-factor", Value::Null).await;
    canaries.push(("second factor", made["secret"].as_str().unwrap().to_owned()));
    // Used, misused, mistyped: in the wrong field, the wrong header, the wrong endpoint.
    let mut wrong = vec![
        api("GET", &format!("/api/v1/tenants?token={token}"), Value::Null).await.unwrap(),
        api("POST", "/api/v1/tenants", json!({"name": password})).await.unwrap(),
        api("PUT", "/api/v1/me/password", json!({"current": "x", "new": password})).await.unwrap(),
        api("PUT", "/api/v1/me/second-factor", json!({"code": "canary"})).await.unwrap(),
        post("/login".into(), format!("name={password}&password=x"), String::new()).await.unwrap(),
        post("/login".into(), format!("name=ada&password={password}x"), String::new()).await.unwrap(),
        post(format!("/invitations/{invitation}"), "password=short".into(), String::new()).await.unwrap(),
        post(format!("/reset/{invitation}"), format!("password={password}"), String::new()).await.unwrap(),
        http.get(format!("{address}/api/v1/me")).bearer_auth(format!("{token}x")).send().await.unwrap(),
        http.get(format!("{address}/auth/token?service=bulkhead-registry"))
            .basic_auth(&robot.0, Some(format!("{}x", robot.1)))
            .send()
            .await
            .unwrap(),
        http.get(format!("{address}/v2/acme/web/manifests/1")).bearer_auth(&robot.1).send().await.unwrap(),
    ];
    for answer in wrong.drain(..) {
        let status = answer.status();
        assert!(status.is_client_error() || status.is_success(), "{status}");
        let headers = format!("{:?}\n", answer.headers());
        errors.extend([headers, answer.text().await.unwrap()]);
    }
    let good = http
        .get(format!("{address}/auth/token?service=bulkhead-registry&scope=repository:acme/web:pull"))
        .basic_auth(&robot.0, Some(&robot.1))
        .send()
        .await
        .unwrap();
    let bearer = good.json::<Value>().await.unwrap()["token"].as_str().unwrap().to_owned();
    http.get(format!("{address}/v2/acme/web/tags/list")).bearer_auth(&bearer).send().await.unwrap();
    canaries.push(("registry token", bearer));
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let written = written(&machine, &log, metrics).await;
    let text = fs::read_to_string(format!("{}.out", machine.data.display())).unwrap();
    assert!(text.contains(&code), "the only place that shows the first link");
    for (what, canary) in canaries {
        for (place, text) in written.iter().map(|(place, text)| (*place, text)).chain([("an error", &errors)])
        {
            if let Some(at) = text.find(&canary) {
                let from = text[..at].rfind('\n').map_or(0, |n| n + 1);
                panic!("{what} is in {place}: {}", text[from..].lines().next().unwrap_or_default());
            }
        }
    }
}
