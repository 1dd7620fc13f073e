//! Platform services and egress targets: who may use them, for how long, and that open connections are
//! closed.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{delete, instance, put, two_tenants, until};
use crate::outside::{Live, Outside, greets};
use crate::support::{Machine, run};

/// Returns the `Connected` condition of acme's `web`.
async fn connected(machine: &Machine) -> serde_json::Value {
    let app = machine.app("acme", "web").await;
    let all = app["conditions"].as_array().unwrap();
    all.iter().find(|one| one["type"] == "Connected").unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_for_those_who_may_use_it_and_ask_for_it() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093] {
        world.serve(port);
    }
    world.push(123);
    two_tenants(&machine).await;
    let endpoints = json!([{"network": world.service(), "port": 9092}, {"network": world.service(), "port": 123, "protocol": "udp"}]);
    put(&machine, "/api/v1/services/kafka", json!({"description": "messages", "endpoints": endpoints})).await;
    // Without access, the deploy is refused with a fault that says what to do.
    let asking = "image: web:1\nport: 8080\nconnects: { services: [kafka] }\n";
    let (status, body) = machine.deploy("acme", "web", asking).await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-427")), "{body}");
    put(&machine, "/api/v1/tenants/acme/services/kafka", json!({})).await;
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("acme", "other", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    let (_, other) = instance(&machine, "acme", "other").await;
    let (_, beta) = instance(&machine, "beta", "web").await;
    assert!(greets(&web, world.service(), 9092), "what is asked for is open: {}", machine.tail("agent"));
    assert!(!greets(&web, world.service(), 9093), "on its port alone");
    assert!(!greets(&other, world.service(), 9092), "an app that does not ask gets nothing");
    assert!(!greets(&beta, world.service(), 9092), "nor a tenant that may not");
    for closed in [world.metadata(), world.private(), world.allowed()] {
        assert!(!greets(&web, closed, 9092), "{closed}");
    }
    // The service's name resolves only in the app that names it.
    let hosts = async |tenant: &str, app: &str| {
        let name = machine.running(tenant, app).await["observed"]["instances"][0]["container"].clone();
        machine.podman(&["exec", name.as_str().unwrap(), "/bin/busybox", "cat", "/etc/hosts"]).1
    };
    assert!(hosts("acme", "web").await.contains(&format!("{} kafka", world.service())));
    assert!(!hosts("acme", "other").await.contains("kafka"));
    // The answer from the plan, and the denied connections with their reason.
    let reach = machine.get("/api/v1/tenants/acme/apps/web/reach?to=kafka&port=9092").await;
    assert_eq!((&reach["open"], &reach["in_force"]), (&json!(true), &json!(true)), "{reach}");
    let path = format!("/api/v1/tenants/acme/apps/other/reach?to={}&port=9092", world.service());
    let reach = machine.get(&path).await;
    assert!(
        reach["open"] == false && reach["ask"].as_str().unwrap().contains("connects.services"),
        "{reach}"
    );
    // A probe of the service is answered, although the peer cannot be identified. The other app's probe is
    // denied at once.
    let tried = |app: &str, to: String, port: u16| {
        format!("/api/v1/tenants/acme/apps/{app}/reach?to={to}&port={port}")
    };
    let (_, probe) = machine.send("POST", &tried("web", "kafka".into(), 9092), json!({})).await;
    assert_eq!((&probe["probe"], &probe["agrees"]), (&json!("opened"), &json!(true)), "{probe}");
    for closed in [world.service(), world.metadata(), world.private(), world.allowed()] {
        let (_, probe) = machine.send("POST", &tried("other", closed.to_string(), 9092), json!({})).await;
        assert_eq!(
            (&probe["probe"], &probe["agrees"]),
            (&json!("prohibited"), &json!(true)),
            "{closed}: {probe}"
        );
    }
    // The platform's own probes do not appear among the app's denied connections; the app's do.
    let begun = Instant::now();
    loop {
        assert!(!greets(&other, world.service(), 9092));
        let denied = machine.get("/api/v1/tenants/acme/apps/other/denied").await;
        let told = denied["items"].as_array().unwrap().iter().any(|item| {
            item["target"] == json!(world.service())
                && item["port"] == 9092
                && item["why"].to_string().contains("kafka")
        });
        if told {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{denied}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // An unknown name gets an answer with a suggestion.
    let (status, probe) = machine.send("POST", &tried("web", "pay.example".into(), 443), json!({})).await;
    assert!(status == 200 && probe["ask"].to_string().contains("egress target"), "{probe}");
    // An endpoint without query parameters rejects a query.
    let (status, answer) =
        machine.send("DELETE", "/api/v1/tenants/acme/services/kafka?dry_run=true", json!({})).await;
    assert_eq!(status, 400, "{answer}");
    // Removing access closes open connections over TCP and over UDP, where only the service still sends.
    let tcp = Live::tcp(&web, world.service(), 9092);
    let udp = Live::udp(&web, world.service(), 123);
    until(5, "both live", || tcp.rounds() > 3 && udp.rounds() > 3).await;
    assert_eq!(connected(&machine).await["status"], "true");
    delete(&machine, "/api/v1/tenants/acme/services/kafka").await;
    let condition = connected(&machine).await;
    assert!(
        condition["status"] == "false" && condition["message"].to_string().contains("kafka"),
        "{condition}"
    );
    until(5, "closed", || !greets(&web, world.service(), 9092)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = (tcp.rounds(), udp.rounds());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((tcp.rounds(), udp.rounds()), before, "nothing passes any more, in either direction");
    let reach = machine.get("/api/v1/tenants/acme/apps/web/reach?to=kafka&port=9092").await;
    assert!(reach["open"] == false && reach["why"].to_string().contains("has ended"), "{reach}");
    // The plan lists the closed flows and the decision behind it.
    let plans = machine.get("/api/v1/tenants/acme/network/plans").await;
    let newest = &plans["items"][0];
    assert_eq!(newest["state"], "in_force", "{newest}");
    assert!(newest["closes"].to_string().contains("web to the service kafka"), "{newest}");
    assert!(newest["causes"].to_string().contains("no longer use the service kafka"), "{newest}");
    assert_eq!(newest["opens"], json!([]));
    // Earlier plans name the deploy that opened flows.
    let all = plans["items"].to_string();
    assert!(all.contains("web is deployed"), "{all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outside_is_open_where_it_was_approved_and_until_then() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(443);
    two_tenants(&machine).await;
    let asked = json!({"network": world.allowed(), "ports": [443], "reason": "to be paid"});
    put(&machine, "/api/v1/tenants/acme/egress/payments", asked).await;
    let asking = "image: web:1\nport: 8080\nconnects: { egress: [payments] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 422, "asked for is not approved");
    let waiting = machine.get("/api/v1/egress").await;
    assert_eq!(
        (&waiting["items"][0]["tenant"], &waiting["items"][0]["reason"]),
        (&json!("acme"), &json!("to be paid"))
    );
    let id = waiting["items"][0]["id"].clone();
    // A decision refers to one request: a decision with another id is a conflict.
    let other = json!({"id": id.as_i64().unwrap() + 1, "approved": true});
    let (status, answer) = machine.send("PUT", "/api/v1/tenants/acme/egress/payments/decision", other).await;
    assert_eq!(status, 409, "{answer}");
    let decision = json!({"id": id, "approved": true, "days": 1});
    put(&machine, "/api/v1/tenants/acme/egress/payments/decision", decision).await;
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    assert!(greets(&web, world.allowed(), 443), "{}", machine.tail("agent"));
    for closed in [world.other(), world.service(), world.private(), world.metadata()] {
        assert!(!greets(&web, closed, 443), "{closed}");
    }
    // No connection comes in from outside, although a route leads through this machine.
    let (own, _) = instance(&machine, "acme", "web").await;
    assert!(!greets(&world.place(), own, 8080), "from outside by plain routing");
    // The approval expires.
    let live = Live::tcp(&web, world.allowed(), 443);
    until(5, "live", || live.rounds() > 3).await;
    machine.sql("UPDATE egress_target SET expires_at = now() + interval '2 seconds'; UPDATE work SET due_at = now() WHERE kind = 'network'");
    until(10, "expired", || !greets(&web, world.allowed(), 443)).await;
    // Rounds that had arrived by then are counted a moment later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = live.rounds();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(live.rounds(), before, "what ran over it is cut");
    // A target in a reserved range cannot be requested.
    for network in [
        "169.254.169.254",
        "10.1.2.3",
        "0.0.0.0/0",
        "168.63.129.16",
        "100.100.100.200",
        "127.0.0.1",
        "10.64.0.2",
        "224.0.0.1",
        "::1",
    ] {
        let body = json!({"network": network, "ports": [443], "reason": "x"});
        let (status, answer) = machine.send("PUT", "/api/v1/tenants/acme/egress/bad", body).await;
        assert_eq!(status, 422, "{network}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_lets_out_what_it_writes_down_and_nothing_behind_a_wall() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(443);
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    assert!(!greets(&web, world.allowed(), 443));
    let path = "/api/v1/tenants/acme/network/trial";
    let (status, answer) = machine.send("PUT", path, json!({"hours": 200})).await;
    assert_eq!(status, 422, "{answer}");
    put(&machine, path, json!({"hours": 1})).await;
    until(5, "let out", || greets(&web, world.allowed(), 443)).await;
    for closed in [world.service(), world.private(), world.metadata()] {
        assert!(!greets(&web, closed, 443), "{closed}: walls stay");
    }
    let reach = format!("/api/v1/tenants/acme/apps/web/reach?to={}&port=443", world.allowed());
    let (_, probe) = machine.send("POST", &reach, json!({})).await;
    assert!(probe["open"] == true && probe["agrees"] == true, "{probe}");
    assert_eq!(probe["through"], "audit mode", "{probe}");
    assert!(!greets(&web, foreign, 8080), "other tenants stay closed");
    assert!(!greets(&beta, world.allowed(), 443), "and others are not on trial");
    assert!(!greets(&world.place(), foreign, 8080), "nothing comes in");
    // Traffic that would be denied is recorded, with its destination.
    let begun = Instant::now();
    loop {
        let denied = machine.get("/api/v1/tenants/acme/apps/web/denied").await;
        let told = denied["items"].as_array().unwrap().iter().any(|item| {
            item["let_through"] == true
                && item["target"] == json!(world.allowed())
                && item["ask"].to_string().contains("egress target")
        });
        if told {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{denied}");
        assert!(greets(&web, world.allowed(), 443));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // The end of audit mode denies the traffic and closes open connections.
    let live = Live::tcp(&web, world.allowed(), 443);
    until(5, "live", || live.rounds() > 3).await;
    delete(&machine, path).await;
    until(5, "closed", || !greets(&web, world.allowed(), 443)).await;
    // Rounds that had arrived by then are counted a moment later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = live.rounds();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(live.rounds(), before);
    // Connection tracking forgets it too: no reply can come back.
    let own = instance(&machine, "acme", "web").await.0.to_string();
    let tracked = || {
        let text = run("conntrack", &["-L", "-p", "tcp", "-s", &own, "-d", &world.allowed().to_string()]).1;
        text.contains("ESTABLISHED")
    };
    until(5, "forgotten", || !tracked()).await;
    let plans = machine.get("/api/v1/tenants/acme/network/plans").await;
    assert!(plans["items"][0]["closes"].to_string().contains("audit mode"), "{plans}");
    assert!(plans["items"][1]["opens"].to_string().contains("audit mode"), "{plans}");
    // Audit mode also ends by itself: the agent enforces the time.
    put(&machine, path, json!({"hours": 1})).await;
    until(5, "let out again", || greets(&web, world.allowed(), 443)).await;
    machine.sql("UPDATE network_trial SET until = now() + interval '3 seconds'; UPDATE work SET due_at = now() WHERE kind = 'network'");
    until(15, "over", || !greets(&web, world.allowed(), 443)).await;
}
