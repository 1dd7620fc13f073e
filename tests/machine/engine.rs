//! A hanging engine, and its effect on other tenants.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{HTTPD, Machine, run};

async fn two_tenants(machine: &Machine) {
    for name in ["acme", "evil"] {
        let robot = machine.tenant(name).await;
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
    }
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    machine.running("acme", "web").await;
}

/// Returns the process of an app's first instance, from the agent's record.
fn process(machine: &Machine, app: &str) -> i64 {
    let files = std::fs::read_dir(machine.data.join("agent/apps")).unwrap().flatten();
    let texts = files.filter_map(|file| std::fs::read_to_string(file.path()).ok());
    let kept = texts.filter_map(|text| serde_json::from_str::<Value>(&text).ok());
    let mut own = kept.filter(|kept| kept["workload"]["app"] == app);
    own.next().and_then(|kept| kept["instances"][0]["pid"].as_i64()).unwrap_or(0)
}

fn lives(pid: i64) -> bool {
    std::path::Path::new(&format!("/proc/{pid}/ns/net")).exists()
}

/// Kills an instance's process and waits until another one runs. Returns the seconds in between.
async fn restarts(machine: &Machine, app: &str, limit: u64) -> f64 {
    let before = process(machine, app);
    assert!(lives(before));
    let begun = Instant::now();
    assert!(run("kill", &["-9", &before.to_string()]).0);
    loop {
        let now = process(machine, app);
        if now > 0 && now != before && lives(now) {
            return begun.elapsed().as_secs_f64();
        }
        assert!(
            begun.elapsed() < Duration::from_secs(limit),
            "{app} does not restart\n{}",
            machine.tail("agent")
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn event(machine: &Machine, kind: &str) {
    let begun = Instant::now();
    while machine.sql(&format!("SELECT count(*) FROM machine_event WHERE kind = '{kind}'")) == "0" {
        assert!(begun.elapsed() < Duration::from_secs(20), "no event {kind}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_hangs_is_ended_and_instances_are_restarted() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    let took = restarts(&machine, "web", 20).await;
    println!("with an engine that answers: {took:.1} s");
    let before = std::fs::read_to_string(machine.data.join("run/engine.pid")).unwrap();
    machine.signal("engine", "-STOP");
    let took = restarts(&machine, "web", 20).await;
    println!("with an engine that hangs: {took:.1} s");
    assert_ne!(std::fs::read_to_string(machine.data.join("run/engine.pid")).unwrap(), before);
    for kind in ["engine_hung", "engine_answers"] {
        event(&machine, kind).await;
    }
    // Nothing else was touched, and new requests succeed.
    machine.running("acme", "web").await;
    assert_eq!(machine.deploy("evil", "web", "image: web:1\nport: 8080\n").await.0, 202);
    machine.running("evil", "web").await;
    // The same with a killed engine.
    machine.kill("engine");
    let took = restarts(&machine, "web", 20).await;
    println!("with an engine that was killed: {took:.1} s");
    // Three exits in a row count as flapping, although the app runs.
    machine.wait("acme", "web", 40, |app| app["observed"]["instances"][0]["state"] == "running").await;
    let events = machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'engine_hung'");
    assert_eq!(events, "1", "an engine that is gone is not stopped again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_beside_an_engine_that_hangs_watches_all_the_same() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    machine.signal("engine", "-STOP");
    machine.kill("agent");
    let took = restarts(&machine, "web", 30).await;
    println!("with an agent that has just started and an engine that hangs: {took:.1} s");
    event(&machine, "engine_hung").await;
    machine.running("acme", "web").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_hangs_the_engine_is_put_aside_and_the_others_run() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    std::fs::write(machine.data.join("run/agent.failpoints"), "agent::hang=return(culprit)").unwrap();
    machine.kill("agent");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(machine.deploy("evil", "culprit", "image: web:1\n").await.0, 202);
    // While the agent tries it, another tenant's instance restarts.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let took = restarts(&machine, "web", 20).await;
    println!("beside an app that hangs the engine: {took:.1} s");
    let aside = machine
        .wait("evil", "culprit", 60, |app| {
            app["events"].as_array().unwrap().iter().any(|event| event["kind"] == "put_aside")
        })
        .await;
    assert_ne!(aside["state"], "running", "{aside:#}");
    let hung = || machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'engine_hung'");
    let before = hung();
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(hung(), before, "the agent does not retry it on its own");
    assert_eq!(machine.get("/readyz").await["apps_put_aside"], 1);
    // Nor after a crash of the agent; other apps deploy meanwhile.
    machine.kill("agent");
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    machine.running("acme", "api").await;
    machine.running("acme", "web").await;
    assert_eq!(hung(), before);
    // Another release is tried: the failpoint ended with the agent.
    assert_eq!(machine.deploy("evil", "culprit", "image: web:1\nenv: { A: b }\n").await.0, 202);
    machine.running("evil", "culprit").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_is_deleted_while_it_hangs_the_engine() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("evil", "web", "image: web:1\nport: 8080\n").await.0, 202);
    machine.running("evil", "web").await;
    std::fs::write(machine.data.join("run/agent.failpoints"), "agent::hang=return(culprit)").unwrap();
    machine.kill("agent");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(machine.deploy("evil", "culprit", "image: web:1\n").await.0, 202);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (status, _) = machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/evil/apps/culprit", None).await;
    assert_eq!(status, 202);
    let begun = Instant::now();
    loop {
        let (status, _) = machine.ask(&machine.admin, "GET", "/api/v1/tenants/evil/apps/culprit", None).await;
        if status == 404 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", machine.tail("agent"));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    machine.running("acme", "web").await;
    machine.running("evil", "web").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_seen_is_not_called_running() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    let ready = machine.get("/readyz").await;
    assert_eq!(
        (&ready["agent"], &ready["engine"], &ready["degraded"]),
        (&true.into(), &true.into(), &false.into())
    );
    machine.signal("agent", "-STOP");
    let unseen = machine.wait("acme", "web", 30, |app| app["state"] == "unseen").await;
    assert_eq!(unseen["observed"]["stale"], true, "{unseen:#}");
    assert!(unseen["observed"]["seen_at"].is_string(), "{unseen:#}");
    let ready = machine.get("/readyz").await;
    assert_eq!((&ready["agent"], &ready["degraded"]), (&false.into(), &true.into()), "{ready}");
    machine.signal("agent", "-CONT");
    let seen = machine.running("acme", "web").await;
    assert!(seen["observed"]["stale"].is_null(), "{seen:#}");
    assert_eq!(machine.get("/readyz").await["degraded"], false);
}
