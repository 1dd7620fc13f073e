//! Failures are repaired or shown with their true cause, and no data is lost.

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
    // The app backs off and restarts while serve hangs: the agent does not depend on serve.
    machine.signal("serve", "-STOP");
    let kept = || {
        let files = std::fs::read_dir(machine.data.join("agent/apps")).unwrap();
        let texts = files.map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
        let all: Vec<serde_json::Value> = texts.filter_map(|text| serde_json::from_str(&text).ok()).collect();
        let bad = all.into_iter().find(|kept| kept["workload"]["app"] == "bad").unwrap();
        bad["instances"][0]["restarts"].as_i64().unwrap()
    };
    let (before, begun) = (kept(), std::time::Instant::now());
    while kept() == before {
        assert!(begun.elapsed().as_secs() < 30, "no restart while serve hangs");
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    machine.signal("serve", "-CONT");
    let waits: Vec<i64> = machine.get("/api/v1/tenants/acme/apps/bad").await["events"]
        .as_array()
        .unwrap()
        .iter()
        .rev()
        .filter_map(|event| {
            event["text"].as_str()?.rsplit_once("starts again in ")?.1.strip_suffix(" s")?.parse().ok()
        })
        .collect();
    assert!(waits.len() >= 2 && waits.is_sorted() && waits.first() < waits.last(), "{waits:?}");
    // A failing release does not affect the running one.
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
    // A container is removed by hand. Killing and removing are two steps of the engine. The agent must not
    // observe in between: it would correctly restart the killed container.
    let pid = std::fs::read_to_string(machine.data.join("run/agent.pid")).unwrap();
    let agent = pid.split(' ').next().unwrap();
    assert!(run("kill", &["-STOP", agent]).0);
    let removed = machine.podman(&["rm", "-f", first["container"].as_str().unwrap()]).0;
    assert!(run("kill", &["-CONT", agent]).0 && removed);
    let second = machine
        .wait("acme", "web", 20, |app| number(app) > first["number"].as_i64() && app["state"] == "running")
        .await;
    assert!(second["events"].to_string().contains("the instance is replaced by"), "{}", second["events"]);
    // Its monitor is killed: the engine still reports "running".
    let instance = second["observed"]["instances"][0].clone();
    let (_, conmon) =
        machine.podman(&["inspect", "-f", "{{.State.ConmonPid}}", instance["container"].as_str().unwrap()]);
    let pid = machine.pid(&instance);
    assert!(run("kill", &["-9", conmon.trim(), &pid]).0);
    machine
        .wait("acme", "web", 20, |app| number(app) > instance["number"].as_i64() && app["state"] == "running")
        .await;
    // The container is stopped by hand: the agent restarts it.
    let before = machine.app("acme", "web").await["observed"]["instances"][0].clone();
    assert!(machine.podman(&["stop", "-t", "0", before["container"].as_str().unwrap()]).0);
    machine
        .wait("acme", "web", 20, |app| {
            app["state"] == "running" && app["observed"]["instances"][0]["started"] != before["started"]
        })
        .await;
    // Its network is removed: first only the bridge, then the engine's record with all containers on it.
    let bridge = format!("bk{}0", machine.id);
    for away in ["link", "network"] {
        let before = machine.app("acme", "web").await["observed"]["instances"][0].clone();
        if away == "link" {
            assert!(run("ip", &["link", "delete", &bridge]).0);
        } else {
            assert!(machine.podman(&["network", "rm", "-f", "-t", "0", &bridge]).0);
        }
        let after = machine
            .wait("acme", "web", 30, |app| {
                app["state"] == "running" && app["observed"]["instances"][0]["started"] != before["started"]
            })
            .await;
        assert!(machine.fetches(&after["observed"]["instances"][0], &[], "http://127.0.0.1:8080/"), "{away}");
        assert!(run("ip", &["link", "show", &bridge]).0, "{away}");
    }
    // Port isolation is turned off: the agent turns it on again.
    let (_, ports) = run("ip", &["-o", "link", "show", "master", &bridge]);
    let port = ports.split_whitespace().nth(1).unwrap().split('@').next().unwrap().to_owned();
    let flag = format!("/sys/class/net/{port}/brport/isolated");
    assert!(run("ip", &["link", "set", "dev", &port, "type", "bridge_slave", "isolated", "off"]).0);
    let begun = std::time::Instant::now();
    while std::fs::read_to_string(&flag).unwrap().trim() != "1" {
        assert!(begun.elapsed().as_secs() < 5, "the port stays unisolated");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    // An event follows its repair by a moment.
    for told in ["network had been removed", "open to its neighbours"] {
        machine.wait("acme", "web", 10, |app| app["events"].to_string().contains(told)).await;
    }
    // The agent and serve are killed: running apps continue, and the new processes find them.
    let before = machine.app("acme", "web").await["observed"]["instances"][0].clone();
    let pid = machine.pid(&before);
    for name in ["agent", "serve"] {
        let text = std::fs::read_to_string(machine.data.join(format!("run/{name}.pid"))).unwrap();
        assert!(run("kill", &["-9", text.split(' ').next().unwrap()]).0, "{name}");
    }
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(machine.pid(&before), pid);
    machine.running("acme", "web").await;
    // The whole platform stops and starts: the app's process stays the same.
    machine.down();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "apps continue without the platform");
    machine.up().await;
    let after = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    assert_eq!((machine.pid(&after), after["number"].as_i64()), (pid, before["number"].as_i64()));
    // A second `up` on the same folder reports it and exits.
    let data = machine.data.display().to_string();
    let (good, text) =
        run(env!("CARGO_BIN_EXE_bulkhead"), &["up", "--data", &data, "--listen", "127.0.0.1:1"]);
    assert!(!good && text.contains("the platform runs on"), "{text}");
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
    machine.push(&robot, "acme/quiet:1", &HTTPD);
    machine.deploy("acme", "quiet", "image: quiet:1\nport: 8080\nhealth: { http: { path: / } }\n").await;
    let quiet = machine.running("acme", "quiet").await["observed"]["instances"][0].clone();
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
    let after = machine.running("acme", "quiet").await["observed"]["instances"][0].clone();
    assert_eq!((after["started"].clone(), after["restarts"].as_i64()), (quiet["started"].clone(), Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_needs_more_memory_than_it_has_is_told_so() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let script = "x=x; while true; do x=$x$x; done";
    machine.push(&robot, "acme/hungry:1", &["/bin/busybox", "sh", "-c", script]);
    machine.deploy("acme", "hungry", "image: hungry:1\n").await;
    let hungry = machine
        .wait("acme", "hungry", 60, |app| app["observed"]["instances"][0]["last_end"].is_object())
        .await;
    // The kernel's own message, if it is readable; never a guess.
    let readable = std::fs::File::open("/dev/kmsg").is_ok();
    let wanted = if readable { "out_of_memory" } else { "killed" };
    assert_eq!(hungry["observed"]["instances"][0]["last_end"]["cause"], wanted, "{hungry:#}");
    // Another app that is killed by a signal is not reported as out of memory.
    machine.push(&robot, "acme/shot:1", &["/bin/busybox", "sleep", "1000"]);
    machine.deploy("acme", "shot", "image: shot:1\n").await;
    let shot = machine.running("acme", "shot").await["observed"]["instances"][0].clone();
    assert!(run("kill", &["-9", &machine.pid(&shot)]).0);
    let shot =
        machine.wait("acme", "shot", 20, |app| app["observed"]["instances"][0]["last_end"].is_object()).await;
    assert_eq!(shot["observed"]["instances"][0]["last_end"]["cause"], "killed", "{shot:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_log_comes_at_once_and_ends_with_the_right_to_it() {
    use futures_util::StreamExt as _;
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let script = "i=0; while true; do echo tick $i; i=$((i+1)); busybox sleep 1; done";
    machine.push(&robot, "acme/clock:1", &["/bin/busybox", "sh", "-c", script]);
    machine.deploy("acme", "clock", "image: clock:1\n").await;
    machine.running("acme", "clock").await;
    let token = machine.token(&["--tenant", "acme", "--role", "viewer", "--name", "reader"]);
    let http = bulkhead::outgoing::client().build().unwrap();
    let follow = || {
        http.get(format!("{}/api/v1/tenants/acme/apps/clock/logs?follow=true&tail=1", machine.address()))
            .bearer_auth(&token)
            .header("accept", "application/x-ndjson")
            .send()
    };
    let mut stream = follow().await.unwrap().bytes_stream();
    let mut text = String::new();
    while text.matches("tick").count() < 3 {
        let more = tokio::time::timeout(std::time::Duration::from_secs(10), stream.next()).await;
        text.push_str(&String::from_utf8_lossy(&more.expect("lines arrive").unwrap().unwrap()));
    }
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().all(|line| line["stream"] == "stdout" && line["instance"] == 1), "{text}");
    // More readers than one tenant may have: the last ones get an error, and the platform continues.
    let mut others = Vec::new();
    for _ in 0..20 {
        others.push(follow().await.unwrap());
    }
    assert_eq!(machine.deploy("acme", "other", "image: clock:1\n").await.0, 202);
    machine.running("acme", "other").await;
    drop(others);
    // Revoking the token ends the stream.
    machine.sql("UPDATE api_token SET revoked_at = now() WHERE name = 'reader'");
    let begun = std::time::Instant::now();
    while stream.next().await.is_some_and(|more| more.is_ok()) {
        assert!(begun.elapsed().as_secs() < 12, "the stream continues");
    }
    assert!(begun.elapsed().as_secs() < 12);
    assert_eq!(follow().await.unwrap().status(), 401);
}
