//! What breaks is repaired or shown with its true reason, and nothing is lost.

use crate::support::{HTTPD, Machine, run};

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_fails_says_why_and_backs_off() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let script = "echo starting; echo 'cannot reach the database' >&2; exit 3";
    machine.push(&robot, "acme/bad:1", &["/bin/busybox", "sh", "-c", script]);
    machine.push(&robot, "acme/ill:1", &["/bin/busybox", "sleep", "1000"]);
    machine.deploy("acme", "bad", "image: bad:1\n").await;
    machine.deploy("acme", "ill", "image: ill:1\nport: 8080\nhealth: { tcp: {}, grace: 0 }\n").await;
    let bad = machine
        .wait("acme", "bad", 30, |app| app["observed"]["instances"][0]["restarts"].as_i64() >= Some(1))
        .await;
    let end = &bad["observed"]["instances"][0]["last_end"];
    assert_eq!((end["cause"].as_str(), end["exit_code"].as_i64()), (Some("exited"), Some(3)), "{bad:#}");
    assert!(bad["summary"].as_str().unwrap().contains("cannot reach the database"), "{}", bad["summary"]);
    let (status, log) =
        machine.ask(&machine.admin, "GET", "/api/v1/tenants/acme/apps/bad/logs?tail=10", None).await;
    assert_eq!(status, 200);
    assert!(log.as_str().unwrap().contains("err cannot reach the database"), "{log}");
    let ill = machine
        .wait("acme", "ill", 40, |app| app["observed"]["instances"][0]["last_end"]["cause"] == "unhealthy")
        .await;
    assert!(ill["summary"].as_str().unwrap().contains("health check"), "{}", ill["summary"]);
    // A bad release leaves the good one alone.
    machine.push(&robot, "acme/bad:2", &HTTPD);
    machine.deploy("acme", "bad", "image: bad:2\nport: 8080\n").await;
    machine.running("acme", "bad").await;
    machine.deploy("acme", "bad", "image: bad:1\nport: 8080\n").await;
    let both = machine
        .wait("acme", "bad", 30, |app| {
            app["observed"]["instances"].as_array().is_some_and(|all| {
                all.len() == 2 && all.iter().any(|i| i["revision"] == 3 && i["last_end"].is_object())
            })
        })
        .await;
    let old = both["observed"]["instances"].as_array().unwrap().iter().find(|i| i["revision"] == 2).unwrap();
    assert_eq!(old["state"], "running", "{both:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_removed_from_outside_comes_back() {
    let mut machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    let first = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    let number = |app: &serde_json::Value| app["observed"]["instances"][0]["number"].as_i64();
    // A container is removed by hand.
    assert!(machine.podman(&["rm", "-f", first["container"].as_str().unwrap()]).0);
    let second = machine
        .wait("acme", "web", 20, |app| number(app) > first["number"].as_i64() && app["state"] == "running")
        .await;
    assert!(second["events"].to_string().contains("made anew"), "{}", second["events"]);
    // Its monitor is killed: the engine goes on saying "running".
    let instance = second["observed"]["instances"][0].clone();
    let (_, conmon) =
        machine.podman(&["inspect", "-f", "{{.State.ConmonPid}}", instance["container"].as_str().unwrap()]);
    let pid = machine.pid(&instance);
    assert!(run("kill", &["-9", conmon.trim(), &pid]).0);
    machine
        .wait("acme", "web", 20, |app| number(app) > instance["number"].as_i64() && app["state"] == "running")
        .await;
    // The agent and serve are killed: what runs goes on running and is found again.
    let before = machine.app("acme", "web").await["observed"]["instances"][0].clone();
    let pid = machine.pid(&before);
    for name in ["agent", "serve"] {
        let text = std::fs::read_to_string(machine.data.join(format!("run/{name}.pid"))).unwrap();
        assert!(run("kill", &["-9", text.split(' ').next().unwrap()]).0, "{name}");
    }
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(machine.pid(&before), pid);
    machine.running("acme", "web").await;
    // The whole platform stops and starts: the same process is still there.
    machine.down();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "apps go on without the platform");
    machine.up().await;
    let after = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    assert_eq!((machine.pid(&after), after["number"].as_i64()), (pid, before["number"].as_i64()));
    // A second `up` on the same folder says so and leaves.
    let data = machine.data.display().to_string();
    let (good, text) =
        run(env!("CARGO_BIN_EXE_bulkhead"), &["up", "--data", &data, "--listen", "127.0.0.1:1"]);
    assert!(!good, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_race_for_the_last_quota_has_one_winner_for_each_place() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &["/bin/busybox", "sleep", "1000"]);
    let (status, _) =
        machine.send("PATCH", "/api/v1/tenants/acme", serde_json::json!({"quota": {"instances": 5}})).await;
    assert_eq!(status, 202);
    let all = (0..200).map(|n| {
        let machine = &machine;
        async move { machine.deploy("acme", &format!("app{n}"), "image: web:1\nsingleton: true\n").await.0 }
    });
    let answers = futures_util::future::join_all(all).await;
    let accepted = answers.iter().filter(|status| **status == 202).count();
    let refused = answers.iter().filter(|status| matches!(**status, 422 | 503)).count();
    assert_eq!((accepted, accepted + refused), (5, 200), "{answers:?}");
    let tenant = machine.get("/api/v1/tenants/acme").await;
    assert_eq!(tenant["quota"]["instances"], serde_json::json!({"limit": 5, "used": 5}));
}

#[tokio::test(flavor = "multi_thread")]
async fn loud_logs_hurt_nobody() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let script = "i=0; while [ $i -lt 40000 ]; do echo \"line $i {\\\"level\\\":\\\"fatal\\\"} 2099-01-01T00:00:00Z\"; i=$((i+1)); done; \
                  busybox head -c 30000000 /dev/zero | busybox tr '\\0' x; echo; busybox printf '\\033[2Jcleared\\n'; sleep 1000";
    machine.push(&robot, "acme/loud:1", &["/bin/busybox", "sh", "-c", script]);
    machine.deploy("acme", "loud", "image: loud:1\n").await;
    machine.running("acme", "loud").await;
    let mut text = String::new();
    for _ in 0..60 {
        let (_, log) =
            machine.ask(&machine.admin, "GET", "/api/v1/tenants/acme/apps/loud/logs?tail=50", None).await;
        text = log.as_str().unwrap_or_default().to_owned();
        if text.contains("cleared") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    assert!(text.contains("\\u{1b}[2Jcleared"), "{}", &text[text.len().saturating_sub(500)..]);
    assert!(!text.contains('\u{1b}'));
    assert!(text.len() < 50 * 17_000, "lines are cut");
    let (_, size) = run("du", &["-sm", &machine.data.join("agent/logs").display().to_string()]);
    let megabytes: u64 = size.split_whitespace().next().unwrap().parse().unwrap();
    assert!(megabytes < 64, "{size}");
}
