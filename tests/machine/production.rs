//! The same binary in production: a second `serve` beside the first, with TLS and metrics; invalid settings;
//! the needs of the units.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead::config::Config;

use crate::support::{HTTPD, Machine, run};

/// A process that is stopped when the test ends.
struct Serve(Child);

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn write(path: &Path, text: &str) -> String {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_serve_with_tls_shares_the_work() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let certificate = write(&dir.path().join("tls.pem"), &made.cert.pem());
    let key = write(&dir.path().join("tls.key"), &made.signing_key.serialize_pem());
    let (port, pull, metrics) = (free_port(), free_port(), free_port());
    let mut settings: toml::Table =
        fs::read_to_string(machine.data.join("serve.toml")).unwrap().parse().unwrap();
    let server = settings["server"].as_table_mut().unwrap();
    for (name, value) in [
        ("listen", format!("0.0.0.0:{port}")),
        ("pull_listen", format!("127.0.0.1:{pull}")),
        ("metrics_listen", format!("127.0.0.1:{metrics}")),
        ("external_url", format!("https://localhost:{port}")),
        ("tls_certificate", certificate),
        ("tls_key", key),
    ] {
        server.insert(name.into(), value.into());
    }
    let config = write(&dir.path().join("serve.toml"), &toml::to_string(&settings).unwrap());
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
        .args([env!("CARGO_BIN_EXE_bulkhead"), "serve", "--config", &config])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut second = Serve(child);
    let http = bulkhead::outgoing::client()
        .tls_certs_merge([reqwest::Certificate::from_pem(made.cert.pem().as_bytes()).unwrap()])
        .build()
        .unwrap();
    let address = format!("https://localhost:{port}");
    let begun = Instant::now();
    let answer = loop {
        match http.get(format!("{address}/readyz")).send().await {
            Ok(answer) => break answer,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(20), "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(answer.status(), 200);
    assert!(answer.headers()["strict-transport-security"].to_str().unwrap().starts_with("max-age="));
    assert!(http.get(format!("http://localhost:{port}/readyz")).send().await.is_err(), "no plain text");
    // A session over TLS uses the cookie prefix that only TLS can set.
    let first = fs::read_to_string(machine.data.join("secrets/first-admin-link")).unwrap();
    let code = first.trim().rsplit('/').next().unwrap();
    let login = http
        .post(format!("{address}/first-admin/{code}"))
        .header("origin", &address)
        .header("content-type", "application/x-www-form-urlencoded")
        .body("name=ada&password=wholly+unguessable+sentence+7")
        .send()
        .await
        .unwrap();
    let cookie = login.headers()["set-cookie"].to_str().unwrap();
    assert!(
        cookie.starts_with("__Host-bulkhead=") && cookie.contains("Secure") && cookie.contains("HttpOnly")
    );
    assert!(!cookie.contains("Domain") && cookie.contains("Path=/"), "{cookie}");
    // Each of the two may carry out changes that the other accepted.
    let spec = "spec: v1\nname: web\nimage: web:1\ncpu: 50m\nmemory: 64Mi\nstop_grace: 1\nport: 8080\n";
    let put = http
        .put(format!("{address}/api/v1/tenants/acme/apps/web"))
        .bearer_auth(&machine.admin)
        .header("content-type", "application/yaml")
        .body(spec)
        .send()
        .await
        .unwrap();
    assert_eq!(put.status(), 202);
    let app = machine.running("acme", "web").await;
    assert_eq!(app["observed"]["instances"].as_array().unwrap().len(), 1);
    // Metrics have their own listener and are served only there.
    let text = http.get(format!("http://127.0.0.1:{metrics}/metrics")).send().await.unwrap();
    assert!(text.text().await.unwrap().contains("bulkhead_http_responses_total{class=\"2xx\"}"));
    assert_eq!(http.get(format!("{address}/metrics")).send().await.unwrap().status(), 404);
    // On SIGTERM it finishes its requests and exits.
    assert!(run("kill", &["-TERM", &second.0.id().to_string()]).0);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = second.0.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not stop");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(status.success(), "{status}");
    assert_eq!(machine.running("acme", "web").await["observed"]["instances"], app["observed"]["instances"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_work_are_refused_with_the_reason() {
    let machine = Machine::start().await;
    let config = machine.data.join("serve.toml").display().to_string();
    let serve = |name: &str, value: &str| {
        let done = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["serve", "--config", &config, "--print-config"])
            .env(name, value)
            .output()
            .unwrap();
        let text =
            String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        (done.status.success(), text)
    };
    let (good, text) = serve("BULKHEAD_SERVER__WORKERS", "3");
    assert!(good && text.contains("workers = 3"), "{text}");
    for (name, value, why) in [
        ("BULKHEAD_SERVER__LISTEN", "0.0.0.0:8080", "would be plain text"),
        ("BULKHEAD_SERVER__LISEN", "127.0.0.1:1", "names no setting"),
        ("BULKHEAD_POOLS__UID_END", "4000000000", "2147483647"),
    ] {
        let (good, text) = serve(name, value);
        assert!(!good && text.contains(why), "{name}: {text}");
    }
    // A foreign process has an id of the pool: serve and the doctor report it at start.
    let pool = machine.agent_config()["id_pool"]["start"].as_integer().unwrap() + 5_000_000;
    let foreign = Serve(
        Command::new("setpriv")
            .args(["--reuid", &pool.to_string(), "--clear-groups", "sleep", "60"])
            .spawn()
            .unwrap(),
    );
    tokio::time::sleep(Duration::from_millis(300)).await;
    let done = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["serve", "--config", &config])
        .env("BULKHEAD_SERVER__LISTEN", format!("127.0.0.1:{}", free_port()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    let who = format!("process {} uses 1 id(s) from {pool}", foreign.0.id());
    assert!(!done.status.success() && text.contains(&who), "{text}");
    let data = machine.data.display().to_string();
    let (good, text) = run(env!("CARGO_BIN_EXE_bulkhead"), &["doctor", "--data", &data]);
    assert!(!good && text.contains("the pool is in use outside Bulkhead"), "{text}");
    drop(foreign);
    // A database of another installation is not used.
    let done = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["serve", "--config", &config])
        .env("BULKHEAD_INSTALLATION", "zzzz")
        .env("BULKHEAD_SERVER__LISTEN", format!("127.0.0.1:{}", free_port()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && text.contains("belongs to the installation"), "{text}");
}

#[test]
fn what_the_units_need_is_written_once_and_can_be_undone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (settings, state) = (at("etc"), at("state"));
    let bulkhead = |more: &[&str]| {
        let mut args = vec!["settings", "--settings", &settings, "--state", &state];
        args.extend(more);
        run(env!("CARGO_BIN_EXE_bulkhead"), &args)
    };
    let (good, text) = bulkhead(&[]);
    assert!(good, "{text}");
    // A complete registry file, and each command in the order that works on a fresh machine.
    let steps = [
        "/etc/docker/registry/config.yml",
        "version: 0.1",
        "rootdirectory: /var/lib/docker-registry",
        "addr: 127.0.0.1:5000",
        "rootcertbundle: ",
        "enable docker-registry",
        "pg_createcluster",
        "restart postgresql",
        "createdb bulkhead",
        "bulkhead migrate",
        "enable --now bulkhead.target",
    ];
    let places: Vec<usize> =
        steps.iter().map(|step| text.find(step).unwrap_or_else(|| panic!("{step}: {text}"))).collect();
    assert!(places.is_sorted(), "{text}");
    let config = Config::load(&dir.path().join("etc/serve.toml"), &[]).unwrap();
    let agent: toml::Table = fs::read_to_string(at("etc/agent.toml")).unwrap().parse().unwrap();
    assert_eq!(agent["installation"].as_str(), Some(config.installation.as_str()));
    assert_eq!(agent["pull_host"].as_str(), Some(config.server.pull_listen.to_string().as_str()));
    for (file, mode) in [("signing-key.pem", 0o440), ("serve.toml", 0o440), ("agent.toml", 0o400)] {
        let seen = fs::metadata(at(&format!("etc/{file}"))).unwrap().permissions().mode();
        assert_eq!(seen & 0o777, mode, "{file}");
    }
    let key = fs::read_to_string(at("etc/signing-key.pem")).unwrap();
    let (good, text) = bulkhead(&[]);
    assert!(good && !text.contains("written "), "{text}");
    assert_eq!(fs::read_to_string(at("etc/signing-key.pem")).unwrap(), key);
    let (good, text) = bulkhead(&["--undo"]);
    assert!(good && !Path::new(&at("etc/serve.toml")).exists(), "{text}");
}

#[test]
fn the_doctor_says_what_is_there_and_what_to_do() {
    let (_, text) = run(env!("CARGO_BIN_EXE_bulkhead"), &["doctor", "-o", "json"]);
    let findings: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    for check in
        ["root", "packages", "postgres", "runtime", "cgroups", "nftables", "space", "id maps", "user ids"]
    {
        let finding = findings.iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("{check}"));
        assert!(finding["status"] == "ok" || finding["remedy"].is_string(), "{finding}");
    }
    // A folder with other files is not touched, and a path that is too long is reported.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("theirs"), "x").unwrap();
    let path = dir.path().display().to_string();
    let (good, text) = run(env!("CARGO_BIN_EXE_bulkhead"), &["doctor", "--data", &path]);
    assert!(!good && text.contains("holds files of another program"), "{text}");
    let (good, text) =
        run(env!("CARGO_BIN_EXE_bulkhead"), &["up", "--data", &path, "--listen", "127.0.0.1:1"]);
    assert!(!good && text.contains("existing files are never overwritten"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // Things that a machine may lack, removed in a mount namespace, or missing rights.
    let doctor = env!("CARGO_BIN_EXE_bulkhead");
    for (take, check) in [
        ("mount -t tmpfs x /usr/lib/podman", "missing: netavark"),
        ("mount -t tmpfs x /usr/lib/postgresql", "Postgres is not installed"),
        ("mount -t tmpfs x /sys/fs/cgroup", "controllers are missing: memory, cpu, pids"),
        (
            "mkdir -p /tmp/bulkhead-small && mount -t tmpfs -o size=64m,mode=755 x /tmp/bulkhead-small",
            "MiB are free at",
        ),
    ] {
        let script = format!(
            "{take} && {doctor} doctor --data /tmp/bulkhead-small; rmdir /tmp/bulkhead-small 2>/dev/null; true"
        );
        let (_, text) = run("unshare", &["--mount", "sh", "-c", &script]);
        let line = text.lines().find(|line| line.contains(check)).unwrap_or_else(|| panic!("{take}: {text}"));
        assert!(line.starts_with("FAILED"), "{line}");
    }
    let _ = fs::remove_dir("/tmp/bulkhead-small");
    let (_, text) = run("setpriv", &["--bounding-set=-net_admin", "--inh-caps=-net_admin", doctor, "doctor"]);
    assert!(text.lines().any(|line| line.starts_with("FAILED  nftables")), "{text}");
    let (_, text) =
        run("setpriv", &["--bounding-set=-sys_resource", "--inh-caps=-sys_resource", doctor, "doctor"]);
    assert!(text.contains("no CAP_SYS_RESOURCE: a container gets at most 1024 open files"), "{text}");
    // Each program needs the other beside it.
    let alone = tempfile::tempdir().unwrap();
    fs::copy(doctor, alone.path().join("bulkhead")).unwrap();
    let (_, text) = run(&alone.path().join("bulkhead").display().to_string(), &["doctor"]);
    let line = text.lines().find(|line| line.contains("programs")).unwrap();
    assert!(line.starts_with("FAILED") && line.contains("bulkhead-agent"), "{line}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let (good, text) =
        run(env!("CARGO_BIN_EXE_bulkhead"), &["up", "--data", "/tmp/bulkhead-never", "--listen", &listen]);
    assert!(!good && text.contains("cannot be used") && !Path::new("/tmp/bulkhead-never").exists(), "{text}");
    let (good, text) = run(
        env!("CARGO_BIN_EXE_bulkhead"),
        &["up", "--data", "/tmp/bulkhead-never", "--listen", "0.0.0.0:0"],
    );
    assert!(!good && text.contains("is not a loopback address"), "{text}");
}
