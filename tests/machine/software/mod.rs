//! The recipes in `docs/recipes`, as users run them: built with podman from Debian's packages, pushed,
//! deployed by their own specs, and tested with a client of their own protocol.

mod probe;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Machine, run};

const TENANT: &str = "acme";

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs podman with a store of the tests' own.
fn podman(args: &[&str]) -> String {
    let storage = at("target/test-software/storage").display().to_string();
    let own =
        ["--root", &storage, "--runroot", "/run/bulkhead-test-software", "--cgroup-manager", "cgroupfs"];
    let (good, text) = run("podman", &[&own[..], &["--events-backend", "none"], args].concat());
    assert!(good, "podman {args:?}: {text}");
    text
}

struct Kitchen {
    machine: Machine,
    robot: (String, String),
    folder: tempfile::TempDir,
}

impl Kitchen {
    async fn open() -> Self {
        let (good, text) = run(&at("tests/software/fetch").display().to_string(), &[]);
        assert!(good, "tests/software/fetch: {text}");
        let machine = Machine::start().await;
        let robot = machine.tenant(TENANT).await;
        let quota = json!({"quota": {"cpu": "8", "memory": "8Gi", "apps": 30, "instances": 60}});
        let (status, body) = machine.send("PATCH", "/api/v1/tenants/acme", quota).await;
        assert_eq!(status, 202, "{body}");
        Self { machine, robot, folder: tempfile::tempdir().unwrap() }
    }

    /// Builds a recipe's image unchanged and pushes it.
    fn push(&self, name: &str) {
        let image = format!("127.0.0.1:{}/{TENANT}/{name}:1", self.machine.port);
        let context = at("docs/recipes").join(name).display().to_string();
        podman(&["build", "--quiet", "--isolation=chroot", "--pull=never", "--tag", &image, &context]);
        let auth = self.machine.auth_file(self.folder.path(), &self.robot);
        podman(&["push", "--quiet", "--tls-verify=false", "--authfile", &auth, &image]);
        podman(&["untag", &image]);
    }

    /// Deploys a recipe by its own spec.
    async fn deploy(&self, name: &str) {
        let spec = fs::read_to_string(at("docs/recipes").join(name).join("app.yaml")).unwrap();
        self.hand_in(name, spec).await;
    }

    async fn hand_in(&self, name: &str, spec: String) {
        let path = format!("/api/v1/tenants/{TENANT}/apps/{name}");
        let (status, body) =
            self.machine.ask(&self.machine.admin, "PUT", &path, Some(("application/yaml", spec))).await;
        assert!(status < 300, "{name}: {status} {body}");
        let warnings = body["warnings"].as_array().into_iter().flatten();
        let codes: Vec<&str> = warnings.filter_map(|warning| warning["code"].as_str()).collect();
        // The user of distroless images lies beyond an app's ids.
        let expected: &[&str] = if name == "go" { &["BH-211"] } else { &[] };
        assert_eq!(codes, expected, "{name}: {body}");
    }

    /// Waits until an app runs. Returns its only instance.
    async fn runs(&self, name: &str) -> Value {
        let app = self.machine.wait(TENANT, name, 180, |app| app["state"] == "running").await;
        app["observed"]["instances"][0].clone()
    }

    /// Runs a program of this machine in the network of an instance. Returns its output.
    fn beside(&self, instance: &Value, command: &[&str]) -> (bool, String) {
        let pid = self.machine.pid(instance);
        run("nsenter", &[&["-t", &pid, "-n"], command].concat())
    }

    /// Runs a program of the image in an instance.
    fn within(&self, instance: &Value, command: &[&str]) -> (bool, String) {
        let pid = self.machine.pid(instance);
        run("nsenter", &[&["-t", &pid, "-n", "-m"], command].concat())
    }

    fn page(&self, instance: &Value, port: u16) -> String {
        let url = format!("http://127.0.0.1:{port}/");
        self.beside(instance, &["curl", "-sS", "-m", "5", "--noproxy", "*", &url]).1
    }

    /// Returns a server's answer to lines of text.
    fn talk(&self, instance: &Value, port: u16, lines: &str) -> String {
        let script =
            format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{lines}' >&3; timeout 1 cat <&3; true");
        self.beside(instance, &["bash", "-c", &script]).1
    }

    async fn log(&self, name: &str) -> String {
        let path = format!("/api/v1/tenants/{TENANT}/apps/{name}/logs");
        self.machine.ask(&self.machine.admin, "GET", &path, None).await.1.to_string()
    }

    /// Kills an instance's process, and waits for the restart.
    async fn ends(&self, name: &str, instance: &Value) -> Value {
        let (good, text) = run("kill", &["-9", &self.machine.pid(instance)]);
        assert!(good, "{text}");
        let app = self
            .machine
            .wait(TENANT, name, 60, |app| {
                app["state"] == "running" && app["observed"]["instances"][0]["restarts"] == 1
            })
            .await;
        app["observed"]["instances"][0].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_software_runs_by_its_recipe() {
    let kitchen = Kitchen::open().await;
    let mut names: Vec<String> = fs::read_dir(at("docs/recipes"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    for name in &names {
        kitchen.push(name);
        kitchen.deploy(name).await;
    }
    for name in &names {
        let instance = kitchen.runs(name).await;
        match name.as_str() {
            "nginx" => {
                assert!(kitchen.page(&instance, 8080).contains("Welcome to nginx"));
                assert!(
                    kitchen.log(name).await.contains("GET / HTTP/1.1"),
                    "the log is a link to /dev/stdout"
                );
            }
            "supervisor" => {
                assert!(kitchen.page(&instance, 8080).contains("Welcome to nginx"));
                assert!(kitchen.talk(&instance, 6379, "PING\\r\\n").contains("PONG"));
            }
            "haproxy" => {
                assert!(kitchen.page(&instance, 8080).contains("hello from haproxy"));
                let (good, text) = kitchen.within(&instance, &["test", "-S", "/run/haproxy/admin.sock"]);
                assert!(good, "{text}");
            }
            "caddy" | "go" | "java" => {
                assert!(kitchen.page(&instance, 8080).contains(&format!("hello from {name}")));
            }
            "gunicorn" => assert!(kitchen.page(&instance, 8000).contains("hello from gunicorn")),
            "node" => assert!(kitchen.page(&instance, 3000).contains("hello from node")),
            "memcached" => assert!(kitchen.talk(&instance, 11211, "version\\r\\n").contains("VERSION")),
            "redis" => {
                let said = kitchen.talk(&instance, 6379, "SET key value\\r\\nGET key\\r\\n");
                assert!(said.contains("OK") && said.contains("value"), "{said}");
            }
            "mosquitto" => publishes(&kitchen, &instance),
            "postgres" => keeps_nothing(&kitchen, &instance).await,
            other => panic!("no client is known for the recipe {other}"),
        }
    }
    unpacked_libraries_need_the_word(&kitchen).await;
}

/// A message reaches a subscribed client.
fn publishes(kitchen: &Kitchen, instance: &Value) {
    let pid = kitchen.machine.pid(instance);
    let mut listens = std::process::Command::new("nsenter")
        .args(["-t", &pid, "-n", "-m", "mosquitto_sub", "-t", "news", "-C", "1", "-W", "10"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while listens.try_wait().unwrap().is_none() {
        assert!(begun.elapsed().as_secs() < 15, "the message does not arrive");
        kitchen.within(instance, &["mosquitto_pub", "-t", "news", "-m", "hello"]);
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut said = String::new();
    std::io::Read::read_to_string(&mut listens.stdout.take().unwrap(), &mut said).unwrap();
    assert_eq!(said.trim(), "hello");
}

/// A database works, and its data in scratch is gone after a restart, as the recipe states.
async fn keeps_nothing(kitchen: &Kitchen, instance: &Value) {
    let ask = |instance: &Value, statement: &str| {
        kitchen.beside(instance, &["psql", "-h", "127.0.0.1", "-U", "postgres", "-Atc", statement])
    };
    let (good, text) = ask(instance, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n");
    assert!(good, "{text}");
    // Parallel queries use memory that processes share.
    let (good, text) = ask(instance, "SET force_parallel_mode = on; SELECT sum(n) FROM t");
    assert!(good && text.contains("500500"), "{text}");
    let again = kitchen.ends("postgres", instance).await;
    let (good, text) = ask(&again, "SELECT count(*) FROM t");
    assert!(!good && text.contains("does not exist"), "{text}");
}

/// Libraries that the Java recipe unpacks into `/tmp` are not mapped without `exec: true`, and the log says
/// so.
async fn unpacked_libraries_need_the_word(kitchen: &Kitchen) {
    let spec = fs::read_to_string(at("docs/recipes/java/app.yaml")).unwrap();
    let plain = spec.replace("{size: 32Mi, exec: true}", "32Mi").replace("name: java", "name: plain");
    assert_ne!(plain, spec);
    kitchen.hand_in("plain", plain).await;
    let begun = Instant::now();
    while !kitchen.log("plain").await.contains("failed to map segment from shared object") {
        assert!(begun.elapsed().as_secs() < 60, "{}", kitchen.log("plain").await);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
