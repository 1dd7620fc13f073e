//! A program that looks around from inside, as its own user, on every way to start an instance: by the image's command
//! and by the spec's, by name and number of a user, after a crash, in a new release, as a singleton.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Kitchen, TENANT, at, podman};

/// One way to start the probe.
struct Start {
    app: &'static str,
    user: &'static str,
    /// Lines of the spec besides name, image and size.
    spec: &'static str,
    ids: Value,
    name: &'static str,
}

fn starts() -> [Start; 6] {
    let start = |app, user, spec, ids, name| Start { app, user, spec, ids, name };
    [
        start("named", "app", "", json!([900, 900, [450, 900]]), "app"),
        start("numbered", "901", "health: {tcp: {}}\n", json!([901, 0, [0]]), "901"),
        start("grouped", "900:0", "health: none\n", json!([900, 0, [0]]), "app"),
        start("root", "0", "singleton: true\n", json!([1000, 1000, [1000]]), "1000"),
        start("distroless", "65532:65532", "stop_grace: 2\n", json!([1000, 1000, [1000]]), "1000"),
        start(
            "commanded",
            "app",
            "command: [python3, /srv/probe.py, /tmp, /var/cache/app, /run/app, /dev/shm]\nenv: {HOME: /tmp}\n",
            json!([900, 900, [450, 900]]),
            "app",
        ),
    ]
}

/// The lines that the probe has printed so far.
async fn printed(kitchen: &Kitchen, app: &str) -> Vec<Value> {
    let path = format!("/api/v1/tenants/{TENANT}/apps/{app}/logs");
    let logs = kitchen.machine.ask(&kitchen.machine.admin, "GET", &path, None).await.1;
    let text = logs.as_str().unwrap_or_default();
    let found = text.lines().filter_map(|line| line.split_once(" out probe ")).map(|(_, found)| found);
    found
        .map(|found| serde_json::from_str(found).unwrap_or_else(|error| panic!("{error}: {found}")))
        .collect()
}

async fn newest(kitchen: &Kitchen, app: &str, runs: usize) -> Value {
    let begun = Instant::now();
    loop {
        let found = printed(kitchen, app).await;
        if found.len() >= runs {
            return found[runs - 1].clone();
        }
        assert!(
            begun.elapsed().as_secs() < 60,
            "{app} printed {} of {runs}: {}",
            found.len(),
            kitchen.log(app).await
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn judge(start: &Start, found: &Value) {
    let app = start.app;
    assert_eq!(found["ids"], start.ids, "{app}: {found}");
    assert_eq!(found["name"], start.name, "{app}: {found}");
    assert_eq!(found["home"][1], true, "{app}: {found}");
    for part in ["scratch", "streams", "devices"] {
        for (name, good) in found[part].as_object().unwrap() {
            assert_eq!(good, true, "{app}: {part} {name}: {found}");
        }
    }
    assert_eq!(found["scratch"].as_object().unwrap().len(), 4, "{app}: {found}");
    for part in ["shared", "temporary", "hosts"] {
        assert_eq!(found[part], true, "{app}: {part}: {found}");
    }
    assert_eq!(found["locale"], json!(["C.UTF-8", "utf-8", true]), "{app}");
    assert_eq!(found["zone"], json!(["UTC", true]), "{app}");
    assert_eq!(found["entropy"], json!([64, 64, 16]), "{app}");
    assert!(found["localhost"].to_string().contains("127.0.0.1"), "{app}: {found}");
    assert!(found["itself"][0].as_str().unwrap().starts_with("10."), "{app}: {found}");
    assert!(found["own"][0].as_str().unwrap().starts_with("10."), "{app}: {found}");
    // A name outside is refused at once (EAI_NONAME), not after a wait.
    assert_eq!(found["foreign"], json!([-2, true]), "{app}");
    assert!(found["read_only"].as_str().unwrap().contains("Read-only file system"), "{app}: {found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_finds_what_it_expects_however_it_is_started() {
    let kitchen = Kitchen::open().await;
    let context = tempfile::tempdir().unwrap();
    fs::copy(at("tests/machine/software/probe.py"), context.path().join("probe.py")).unwrap();
    let auth = kitchen.machine.auth_file(kitchen.folder.path(), &kitchen.robot);
    for start in starts().iter().chain([&Start { app: "probe-peer", ..starts().into_iter().next().unwrap() }])
    {
        // A folder that the image has, owned by root, and one that it does not have.
        let lines = format!(
            "FROM docker.io/library/python:3.11-slim\n\
             RUN groupadd --gid 450 extra && groupadd --gid 900 app && useradd --create-home --uid 900 --gid 900 --groups extra app && mkdir -p /var/cache/app\n\
             COPY probe.py /srv/\nUSER {}\nEXPOSE 8080\n\
             CMD [\"python3\", \"/srv/probe.py\", \"/tmp\", \"/var/cache/app\", \"/run/app\", \"/dev/shm\"]\n",
            start.user
        );
        fs::write(context.path().join("Dockerfile"), lines).unwrap();
        let image = format!("127.0.0.1:{}/{TENANT}/{}:1", kitchen.machine.port, start.app);
        let folder = context.path().display().to_string();
        podman(&["build", "--quiet", "--isolation=chroot", "--pull=never", "--tag", &image, &folder]);
        podman(&["push", "--quiet", "--tls-verify=false", "--authfile", &auth, &image]);
        podman(&["untag", &image]);
    }
    let spec = |app: &str, more: &str| {
        format!(
            "image: {app}:1\ncpu: 100m\nport: 8080\nscratch: {{/tmp: 1Mi, /var/cache/app: 1Mi, /run/app: 1Mi, /dev/shm: 4Mi}}\n{more}"
        )
    };
    let deploy = async |app: &str, text: String| {
        let text = format!("spec: v1\nname: {app}\nmemory: 64Mi\n{text}");
        let path = format!("/api/v1/tenants/{TENANT}/apps/{app}");
        let machine = &kitchen.machine;
        let (status, body) =
            machine.ask(&machine.admin, "PUT", &path, Some(("application/yaml", text))).await;
        assert!(status < 300, "{app}: {status} {body}");
    };
    deploy("probe-peer", spec("probe-peer", "")).await;
    kitchen.runs("probe-peer").await;
    let connects = "connects: {apps: [probe-peer]}\n";
    for start in starts() {
        deploy(start.app, spec(start.app, &format!("{connects}{}", start.spec))).await;
    }
    for start in starts() {
        let instance = kitchen.runs(start.app).await;
        judge(&start, &newest(&kitchen, start.app, 1).await);
        kitchen.ends(start.app, &instance).await;
        judge(&start, &newest(&kitchen, start.app, 2).await);
    }
    // A new release with another environment replaces the instance.
    let start = &starts()[0];
    deploy(start.app, spec(start.app, &format!("{connects}env: {{RELEASE: '2'}}\n"))).await;
    let running = |app: &Value| app["state"] == "running" && app["observed"]["revision"] == 2;
    kitchen.machine.wait(TENANT, start.app, 60, running).await;
    let found = printed(&kitchen, start.app).await;
    judge(start, found.last().unwrap());
}
