//! Rollouts of a service that tenants use: observation window, canary tenants, all tenants, rollback.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{instance, put, until};
use crate::outside::{Live, Outside, greets};
use crate::support::{HTTPD, Machine};

const ASKING: &str = "image: web:1\nport: 8080\nconnects: { services: [kafka] }\n";

fn endpoints(world: &Outside, ports: &[u16]) -> Value {
    ports.iter().map(|port| json!({"network": world.service(), "port": port})).collect()
}

/// Creates three tenants, each with an app that uses the service at 9092. Returns the apps' network
/// namespaces.
async fn three_users(machine: &Machine, world: &Outside) -> Vec<String> {
    put(machine, "/api/v1/services/kafka", json!({"endpoints": endpoints(world, &[9092])})).await;
    let mut places = Vec::new();
    for name in ["acme", "beta", "gamma"] {
        let robot = machine.tenant(name).await;
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
        put(machine, &format!("/api/v1/tenants/{name}/services/kafka"), json!({})).await;
        assert_eq!(machine.deploy(name, "web", ASKING).await.0, 202);
    }
    for name in ["acme", "beta", "gamma"] {
        let (_, place) = instance(machine, name, "web").await;
        assert!(greets(&place, world.service(), 9092), "{name}: {}", machine.tail("agent"));
        places.push(place);
    }
    places
}

async fn change(machine: &Machine, world: &Outside, ports: &[u16], rollout: Value) -> i64 {
    let body = json!({"endpoints": endpoints(world, ports), "rollout": rollout});
    let (status, answer) = machine.send("PUT", "/api/v1/services/kafka", body).await;
    assert_eq!(status, 202, "{answer}");
    answer["rollout"].as_i64().unwrap()
}

async fn rollout(machine: &Machine, id: i64) -> Value {
    machine.get(&format!("/api/v1/network/rollouts/{id}")).await
}

/// Waits until a rollout meets a condition.
async fn wait(machine: &Machine, id: i64, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let seen = rollout(machine, id).await;
        if holds(&seen) {
            return seen;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {seen:#}\n{}", machine.tail("serve"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn decide(machine: &Machine, method: &str, id: i64, what: &str) -> u16 {
    machine.send(method, &format!("/api/v1/network/rollouts/{id}/{what}"), json!({})).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_reaches_some_first_then_all_and_turns_back_by_itself() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093] {
        world.serve(port);
    }
    let places = three_users(&machine, &world).await;
    let open = |place: &str, port| greets(place, world.service(), port);
    // A tenant that may not use the service cannot be a canary tenant.
    let body = json!({"endpoints": endpoints(&world, &[9093]), "rollout": {"canaries": ["nobody"]}});
    let (status, answer) = machine.send("PUT", "/api/v1/services/kafka", body).await;
    assert!(status == 422 && answer.to_string().contains("rollout.canaries[0]"), "{answer}");
    // Port 9999 does not answer: the canary tenant's probe fails, and the rollout rolls back before it
    // reaches others.
    let others = [Live::tcp(&places[1], world.service(), 9092), Live::tcp(&places[2], world.service(), 9092)];
    until(5, "live", || others.iter().all(|live| live.rounds() > 3)).await;
    let id = change(&machine, &world, &[9999], json!({"canaries": ["acme"], "observe_seconds": 1})).await;
    let seen = wait(&machine, id, "back", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "rolled_back", "{seen:#}");
    assert!(seen["message"].to_string().contains("acme/web to"), "{seen:#}");
    assert!(
        seen["checks"]["items"].as_array().unwrap().iter().any(|check| check["good"] == false),
        "{seen:#}"
    );
    until(5, "open again", || open(&places[0], 9092)).await;
    let rounds: Vec<usize> = others.iter().map(Live::rounds).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(others.iter().zip(rounds).all(|(live, before)| live.rounds() > before), "others never noticed");
    for tenant in ["beta", "gamma"] {
        let plans = machine.get(&format!("/api/v1/tenants/{tenant}/network/plans")).await;
        assert!(!plans.to_string().contains("rollout"), "{tenant}: {plans:#}");
    }
    // A change that works. While it runs, the same request returns the same rollout, and another one
    // conflicts.
    let id = change(&machine, &world, &[9093], json!({"canaries": ["acme"], "observe_seconds": 3})).await;
    assert_eq!(change(&machine, &world, &[9093], json!({})).await, id);
    let body = json!({"endpoints": endpoints(&world, &[9094])});
    assert_eq!(machine.send("PUT", "/api/v1/services/kafka", body).await.0, 409);
    wait(&machine, id, "looked at", |seen| seen["stage"] == "canary" && seen["until"].is_string()).await;
    assert!(open(&places[0], 9093) && !open(&places[0], 9092), "the first");
    assert!(open(&places[1], 9092) && !open(&places[1], 9093), "not yet the others");
    // Each tenant sees the endpoints that apply to it.
    let told = async |tenant: &str| machine.get(&format!("/api/v1/tenants/{tenant}/services")).await;
    assert_eq!(told("acme").await["items"][0]["endpoints"][0]["port"], 9093);
    assert_eq!(told("beta").await["items"][0]["endpoints"][0]["port"], 9092);
    // A paused rollout stays in its stage; a resumed one continues.
    assert_eq!(decide(&machine, "PUT", id, "pause").await, 204);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let seen = rollout(&machine, id).await;
    assert!(seen["stage"] == "canary" && seen["paused_by"].is_string() && seen["reached"] == 1, "{seen:#}");
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 202);
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 409);
    let seen = wait(&machine, id, "done", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "done", "{seen:#}");
    for place in &places {
        assert!(open(place, 9093) && !open(place, 9092));
    }
    let rounds: Vec<usize> = others.iter().map(Live::rounds).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(
        rounds,
        others.iter().map(Live::rounds).collect::<Vec<_>>(),
        "what ran over the old one is cut"
    );
    let checks = seen["checks"]["items"].as_array().unwrap();
    assert!(checks.len() >= 5 && checks.iter().all(|check| check["good"] == true), "{seen:#}");
    assert!(checks.iter().any(|check| check["must_be"] == "closed" && check["stage"] == "canary"));
    let service = machine.get("/api/v1/services/kafka").await;
    assert_eq!((&service["endpoints"][0]["port"], &service["generation"]), (&json!(9093), &json!(2)));
    assert_eq!(decide(&machine, "PUT", id, "abort").await, 409);
    assert_eq!(decide(&machine, "PUT", 999, "abort").await, 404);
    // Each plan was tested after it was applied.
    let begun = Instant::now();
    loop {
        let plans = machine.get("/api/v1/tenants/beta/network/plans").await;
        let probed = &plans["items"][0]["probed"];
        if probed["apps"] == 1 {
            assert!(probed["faults"] == json!([]) && probed["closed"].as_i64() > Some(8), "{plans:#}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{plans:#}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // The audit log has every action.
    let audit = machine.get("/api/v1/audit?limit=100").await.to_string();
    for action in ["service.put", "rollout.pause", "rollout.resume", "rollout.rolled-back", "rollout.done"] {
        assert!(audit.contains(action), "{action}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_counts_what_would_be_cut_and_waits_for_somebody_to_know() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093, 9094] {
        world.serve(port);
    }
    let places = three_users(&machine, &world).await;
    // A connection from before the rollout, of only one of the three apps.
    let live = Live::tcp(&places[1], world.service(), 9092);
    until(5, "live", || live.rounds() > 3).await;
    let staging = json!({"window_hours": 2, "canaries": ["acme"], "observe_seconds": 0});
    let id = change(&machine, &world, &[9093], staging.clone()).await;
    let seen = wait(&machine, id, "counted", |seen| seen["uses"]["in_all"] == 1).await;
    let used = &seen["uses"]["items"][0];
    assert_eq!((&used["tenant"], &used["app"], &used["port"]), (&json!("beta"), &json!("web"), &json!(9092)));
    assert!(greets(&places[0], world.service(), 9092), "nothing has changed");
    let seen = wait(&machine, id, "counted", |seen| seen["uses"]["in_all"] == 2).await;
    assert_eq!((&seen["stage"], &seen["reached"]), (&json!("window"), &json!(0)), "{seen:#}");
    // A request with other stages is a conflict, and so is one while the rollout rolls back.
    let body = json!({"endpoints": endpoints(&world, &[9093]), "rollout": {"window_hours": 7}});
    let (status, answer) = machine.send("PUT", "/api/v1/services/kafka", body).await;
    assert!(status == 409 && answer.to_string().contains("other endpoints or stages"), "{answer}");
    // An abort during the observation window changes nothing for tenants.
    assert_eq!(decide(&machine, "PUT", id, "abort").await, 202);
    let body = json!({"endpoints": endpoints(&world, &[9093]), "rollout": staging});
    let (status, answer) = machine.send("PUT", "/api/v1/services/kafka", body).await;
    let fresh = answer["rollout"].as_i64();
    assert!(status == 409 || fresh.is_some_and(|fresh| fresh != id), "{status} {answer}");
    if let Some(fresh) = fresh {
        assert_eq!(decide(&machine, "PUT", fresh, "abort").await, 202);
        wait(&machine, fresh, "aborted", |seen| seen["stage"] == "over").await;
    }
    let seen = wait(&machine, id, "aborted", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "aborted", "{seen:#}");
    let flows = machine.data.join("agent/flows/beta.json");
    let counted = || std::fs::read_to_string(&flows).unwrap().contains("watched");
    until(5, "counted no more", || !counted()).await;
    assert_eq!(decide(&machine, "DELETE", id, "window").await, 409);
    // Ended early, a window with recorded use needs approval.
    let id = change(&machine, &world, &[9093], staging).await;
    wait(&machine, id, "counted", |seen| seen["uses"]["in_all"] == 1).await;
    assert_eq!(decide(&machine, "PUT", id, "pause").await, 204);
    assert_eq!(decide(&machine, "DELETE", id, "window").await, 409, "it is paused");
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 202);
    assert_eq!(decide(&machine, "DELETE", id, "window").await, 202);
    let seen = wait(&machine, id, "waits", |seen| seen["paused_by"] == "platform").await;
    assert!(seen["stage"] == "window" && seen["message"].to_string().contains("beta/web"), "{seen:#}");
    let before = live.rounds();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(live.rounds() > before, "nobody is cut without a word");
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 202);
    let seen = wait(&machine, id, "done", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "done", "{seen:#}");
    until(5, "reached", || places.iter().all(|place| greets(place, world.service(), 9093))).await;
    assert!(!greets(&places[1], world.service(), 9092));
    // A change that removes an unused endpoint continues by itself. It uses another port: clients of a closed
    // connection retry for minutes.
    let id = change(&machine, &world, &[9093, 9094], json!({"observe_seconds": 0})).await;
    wait(&machine, id, "opened", |seen| seen["outcome"] == "done").await;
    let id = change(&machine, &world, &[9093], json!({"window_hours": 1, "observe_seconds": 0})).await;
    wait(&machine, id, "counting", |seen| seen["message"].to_string().contains("0 so far")).await;
    assert_eq!(decide(&machine, "DELETE", id, "window").await, 202);
    let seen = wait(&machine, id, "done", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "done", "{seen:#}");
    let audit = machine.get("/api/v1/audit?limit=100").await.to_string();
    assert!(audit.contains("in 0 min no app used") && audit.contains("seconds_left"), "{audit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_stops_a_rollout_and_is_told_to_whoever_lets_it_go_on() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093] {
        world.serve(port);
    }
    let _places = three_users(&machine, &world).await;
    let looked_at =
        |seen: &Value| seen["paused_by"].is_null() && seen["stage"] == "canary" && seen["until"].is_string();
    let id = change(&machine, &world, &[9093], json!({"canaries": ["acme"], "observe_seconds": 600})).await;
    wait(&machine, id, "looked at", looked_at).await;
    let alarm = |n: u32| {
        machine.sql(&format!(
            "INSERT INTO machine_event (seq, at, kind, text) \
             VALUES (90000{n}, now(), 'probe_alarm', 'ALARM: beta/web to 192.0.2.{n} tcp 1'); \
             UPDATE work SET due_at = now() WHERE kind = 'rollout'"
        ))
    };
    alarm(1);
    let seen = wait(&machine, id, "stops", |seen| seen["paused_by"] == "platform").await;
    assert!(seen["message"].to_string().contains("192.0.2.1") && seen["reached"] == 1, "{seen:#}");
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 202);
    wait(&machine, id, "goes on", looked_at).await;
    // A user pauses the rollout while an alarm is found: the message has both.
    let pausing = format!(
        "BEGIN; UPDATE network_rollout SET paused_by = 'somebody', paused_at = now(), message = 'paused: lunch' \
         WHERE id = {id}; SELECT pg_sleep(3); COMMIT"
    );
    std::thread::scope(|scope| {
        scope.spawn(|| machine.sql(&pausing));
        std::thread::sleep(Duration::from_millis(800));
        alarm(2);
    });
    let seen = wait(&machine, id, "told", |seen| seen["message"].to_string().contains("192.0.2.2")).await;
    assert!(seen["message"].to_string().contains("lunch") && seen["paused_by"] == "somebody", "{seen:#}");
    let audit = machine.get("/api/v1/audit?limit=100").await.to_string();
    assert_eq!(audit.matches("\"rollout.paused\"").count(), 2, "{audit}");
    assert_eq!(decide(&machine, "PUT", id, "abort").await, 202);
    let seen = wait(&machine, id, "aborted", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "aborted", "{seen:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_a_rollout_may_be_the_last() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093] {
        world.serve(port);
    }
    let places = three_users(&machine, &world).await;
    let points = [
        ("serve", "rollouts::stepped"),
        ("serve", "rollouts::staged"),
        ("serve", "rollouts::reached"),
        ("serve", "networks::planned"),
        ("serve", "networks::plan_committed"),
        ("serve", "networks::applied"),
        ("serve", "rollouts::finished"),
        ("agent", "agent::flows"),
        ("agent", "agent::flows_kept"),
        ("agent", "agent::firewall_changed"),
    ];
    for (n, (process, point)) in points.into_iter().enumerate() {
        let (new, old) = if n % 2 == 0 { (9093, 9092) } else { (9092, 9093) };
        let deaths = machine.deaths(process);
        machine.arm(process, point).await;
        let body = json!({"endpoints": endpoints(&world, &[new]), "rollout": {"canaries": ["beta"], "observe_seconds": 0}});
        let (status, answer) = machine
            .insist(
                "PUT",
                "/api/v1/services/kafka",
                &[("content-type", "application/json")],
                &body.to_string(),
            )
            .await;
        assert!([200, 202].contains(&status), "{point}: {answer}");
        let list = machine.get("/api/v1/network/rollouts").await;
        let id = list["items"][0]["id"].as_i64().unwrap();
        assert_eq!(list["items"].as_array().unwrap().len(), n + 1, "{point}: one rollout for one change");
        let seen = wait(&machine, id, point, |seen| seen["stage"] == "over").await;
        assert_eq!(seen["outcome"], "done", "{point}: {seen:#}");
        assert_eq!(machine.deaths(process), deaths + 1, "{point} was passed and {process} died there");
        until(10, point, || {
            places.iter().all(|at| greets(at, world.service(), new) && !greets(at, world.service(), old))
        })
        .await;
    }
    // Rolling back survives a crash, too.
    let deaths = machine.deaths("serve");
    machine.arm("serve", "rollouts::left").await;
    let body = json!({"endpoints": endpoints(&world, &[9999]), "rollout": {"canaries": ["beta"]}});
    let headers = [("content-type", "application/json")];
    let (status, answer) = machine.insist("PUT", "/api/v1/services/kafka", &headers, &body.to_string()).await;
    assert_eq!(status, 202, "{answer}");
    let id = answer["rollout"].as_i64().unwrap();
    let seen = wait(&machine, id, "back", |seen| seen["stage"] == "over").await;
    assert_eq!((&seen["outcome"], machine.deaths("serve")), (&json!("rolled_back"), deaths + 1), "{seen:#}");
    until(10, "as before", || places.iter().all(|at| greets(at, world.service(), 9092))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_does_meanwhile_turns_nothing_back() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093] {
        world.serve(port);
    }
    let places = three_users(&machine, &world).await;
    let looked_at = |seen: &Value| seen["stage"] == "canary" && seen["until"].is_string();
    // The canary tenant stops using the service while it is observed: the rollout continues.
    let id = change(&machine, &world, &[9093], json!({"canaries": ["acme"], "observe_seconds": 4})).await;
    wait(&machine, id, "looked at", looked_at).await;
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let seen = wait(&machine, id, "done", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "done", "{seen:#}");
    assert!(greets(&places[1], world.service(), 9093) && greets(&places[2], world.service(), 9093));
    // The canary tenant's app stops. The change may be the cause, so the rollout needs approval.
    let id = change(&machine, &world, &[9092], json!({"canaries": ["beta"], "observe_seconds": 4})).await;
    wait(&machine, id, "looked at", looked_at).await;
    assert_eq!(machine.deploy("beta", "web", &format!("{ASKING}instances: 0\n")).await.0, 202);
    let seen = wait(&machine, id, "asks", |seen| seen["paused_by"] == "platform").await;
    assert!(seen["message"].to_string().contains("beta/web ran before"), "{seen:#}");
    assert!(!greets(&places[2], world.service(), 9092), "nobody else is reached meanwhile");
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 202);
    let seen = wait(&machine, id, "done", |seen| seen["stage"] == "over").await;
    assert_eq!(seen["outcome"], "done", "{seen:#}");
    until(5, "reached", || greets(&places[2], world.service(), 9092)).await;
    // A pause extends the observation window by its length.
    let id = change(&machine, &world, &[9093], json!({"window_hours": 1})).await;
    wait(&machine, id, "counting", |seen| seen["message"].to_string().contains("so far")).await;
    assert_eq!(decide(&machine, "PUT", id, "pause").await, 204);
    machine.sql(
        "UPDATE network_rollout SET until = now() - interval '1 hour', paused_at = now() - interval '2 hours' \
         WHERE stage = 'window'",
    );
    assert_eq!(decide(&machine, "DELETE", id, "pause").await, 202);
    let seen = wait(&machine, id, "counting", |seen| seen["message"].to_string().contains("so far")).await;
    assert!(seen["stage"] == "window" && seen["until"].as_str() > seen["stage_at"].as_str(), "{seen:#}");
    assert_eq!(decide(&machine, "PUT", id, "abort").await, 202);
    wait(&machine, id, "aborted", |seen| seen["outcome"] == "aborted" && seen["stage"] == "over").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_configuration_closes_stays_closed_for_all() {
    let mut machine = Machine::start().await;
    let world = Outside::new();
    world.serve(443);
    super::two_tenants(&machine).await;
    let asked = json!({"network": world.allowed(), "ports": [443], "reason": "to be paid"});
    put(&machine, "/api/v1/tenants/acme/egress/payments", asked.clone()).await;
    let waiting = machine.get("/api/v1/egress").await;
    let decision = json!({"id": waiting["items"][0]["id"], "approved": true});
    put(&machine, "/api/v1/tenants/acme/egress/payments/decision", decision).await;
    let asking = "image: web:1\nport: 8080\nconnects: { egress: [payments] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    assert!(greets(&web, world.allowed(), 443), "{}", machine.tail("agent"));
    // Block the range by configuration: an approved target in it is closed, and a new request is refused.
    machine.down();
    let file = machine.data.join("agent.toml");
    let text =
        std::fs::read_to_string(&file).unwrap().replace("closed = []", "closed = [\"192.88.99.0/24\"]");
    assert!(text.contains("192.88.99.0/24"), "{text}");
    std::fs::write(&file, text).unwrap();
    machine.up().await;
    until(20, "closed", || !greets(&web, world.allowed(), 443)).await;
    let (status, answer) = machine.send("PUT", "/api/v1/tenants/beta/egress/payments", asked).await;
    assert!(status == 422 && answer.to_string().contains("configuration"), "{answer}");
    let (status, answer) = machine.deploy("acme", "web", asking).await;
    assert!(status == 422 && answer.to_string().contains("configuration"), "{answer}");
    let begun = Instant::now();
    while machine.get("/api/v1/tenants/acme/apps/web/reach?to=payments&port=443").await["open"] != false {
        assert!(begun.elapsed() < Duration::from_secs(40), "the plan says otherwise");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let path = format!("/api/v1/tenants/acme/apps/web/reach?to={}&port=80", world.allowed());
    assert!(machine.get(&path).await["why"].to_string().contains("configuration"));
    // A single address of a service is allowed there.
    put(&machine, "/api/v1/services/pay", json!({"endpoints": [{"network": world.allowed(), "port": 443}]}))
        .await;
    put(&machine, "/api/v1/tenants/beta/services/pay", json!({})).await;
    let asking = "image: web:1\nport: 8080\nconnects: { services: [pay] }\n";
    assert_eq!(machine.deploy("beta", "web", asking).await.0, 202);
    let (_, beta) = instance(&machine, "beta", "web").await;
    until(10, "a service", || greets(&beta, world.allowed(), 443)).await;
    // The tenants' own pool cannot be blocked, and the agent says so.
    machine.down();
    let text = std::fs::read_to_string(&file).unwrap().replace("192.88.99.0/24", "10.0.0.0/8");
    std::fs::write(&file, text).unwrap();
    let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"))
        .args(["--config", file.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!done.status.success());
    let words = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    assert!(words.contains("closed: 10.0.0.0/8 overlaps"), "{words}");
    let text = std::fs::read_to_string(&file).unwrap().replace("closed = [\"10.0.0.0/8\"]", "closed = []");
    std::fs::write(&file, text).unwrap();
    machine.up().await;
}
