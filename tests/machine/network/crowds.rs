//! One tenant cannot exhaust the resources that all tenants of a machine share.

use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Switch, instance, two_tenants, until};
use crate::outside::{greets, within};
use crate::support::{Machine, run};

/// Waits for a matching entry among the denied connections of acme's `web`.
async fn denied(machine: &Machine, which: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let denied = machine.get("/api/v1/tenants/acme/apps/web/denied").await;
        if let Some(item) = denied["items"].as_array().unwrap().iter().find(|item| which(item)) {
            return item.clone();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{denied:#}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Returns the machine's own address on the bridge of an instance.
fn gateway_of(own: Ipv4Addr) -> Ipv4Addr {
    let (_, text) = run("ip", &["-4", "route", "get", &own.to_string()]);
    text.split_whitespace().skip_while(|word| *word != "src").nth(1).unwrap().parse().unwrap()
}

/// Opens a connection and ends it with a packet whose TTL expires at the machine.
fn ends_in_hiding(target: Ipv4Addr, port: u16) -> std::io::Result<()> {
    let stream = TcpStream::connect((target, port))?;
    stream.set_ttl(1)?;
    Ok(rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_uses_up_the_connections_that_all_tenants_share() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    for tenant in ["acme", "beta"] {
        assert_eq!(machine.deploy(tenant, "api", "image: web:1\nport: 8080\n").await.0, 202);
        let asking = "image: web:1\nport: 8080\nconnects: { apps: [api] }\n";
        assert_eq!(machine.deploy(tenant, "web", asking).await.0, 202);
    }
    let (own, acme) = instance(&machine, "acme", "web").await;
    let (_, beta) = instance(&machine, "beta", "web").await;
    let (acme_api, _) = instance(&machine, "acme", "api").await;
    let (beta_api, _) = instance(&machine, "beta", "api").await;
    let gateway = gateway_of(own);
    // A connection that ends this way leaves the connection tracking table: the machine sees the reset,
    // although it forwards it no further.
    assert_eq!(within(&acme, move || (0..50).filter(|_| ends_in_hiding(acme_api, 8080).is_ok()).count()), 50);
    let args =
        ["-L", "-p", "tcp", "-s", &own.to_string(), "-d", &acme_api.to_string(), "--state", "ESTABLISHED"];
    let (_, text) = run("conntrack", &args);
    assert!(text.contains(" 0 flow entries"), "{text}");
    // Any app may send DNS queries: each from another port, without waiting for an answer.
    let begun = Instant::now();
    let sent = within(&acme, move || {
        let one = |port| UdpSocket::bind((own, port))?.send_to(&[0; 12], (gateway, 53));
        (2_000..42_000_u16).filter(|port| one(*port).is_ok()).count()
    });
    let took = begun.elapsed();
    assert!(sent > 35_000, "{sent}");
    let of_acme = || run("conntrack", &["-L", "-s", &own.to_string()]).1.lines().count() as u64;
    let (tracked, most) = (of_acme(), 5_100 + 1_000 * (took.as_secs() + 2));
    assert!((4_000..=most).contains(&tracked), "{tracked} of at most {most} in {took:?}");
    // When the table is nearly full, the tenant with the most entries loses them, and an event says so.
    {
        let _switch = Switch::set("/proc/sys/net/netfilter/nf_conntrack_max", "5500");
        until(20, "relieved", || of_acme() < 1_000).await;
    }
    let begun = Instant::now();
    loop {
        let events = machine.get("/api/v1/network/events").await.to_string();
        if events.contains("connections_crowded") && events.contains("belong to acme") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{events}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // Other tenants are not affected, and the tenant can connect again. The rate limited connections are
    // reported.
    assert!(greets(&beta, beta_api, 8080), "another tenant");
    until(5, "its own turn", || greets(&acme, acme_api, 8080)).await;
    let hasty = denied(&machine, |item| item["hasty"] == true).await;
    assert!(hasty["why"].as_str().unwrap().contains("more connections at once"), "{hasty:#}");
    assert_eq!((&hasty["port"], &hasty["protocol"]), (&json!(53), &json!("udp")), "{hasty:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_sets_how_many_connections_a_tenant_begins_and_it_stays_so() {
    let mut machine = Machine::start().await;
    let path = machine.data.join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("new_connections_per_second = 1000"), "{text}");
    machine.down();
    std::fs::write(&path, text.replace("per_second = 1000", "per_second = 2500")).unwrap();
    machine.up().await;
    let (_, rules) = run("nft", &["list", "chain", "inet", &machine.table(), "begin"]);
    assert!(rules.contains("limit rate over 2500/second burst 12500 packets"), "{rules}");
    assert!(std::fs::read_to_string(&path).unwrap().contains("new_connections_per_second = 2500"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_probe_does_not_hear_from_among_a_crowd_is_no_verdict() {
    let mut machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    let asking = "image: web:1\nport: 8080\nconnects: { apps: [api] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (own, acme) = instance(&machine, "acme", "web").await;
    let gateway = gateway_of(own);
    let path = machine.data.join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    machine.down();
    std::fs::write(&path, text.replace("per_second = 1000", "per_second = 1")).unwrap();
    machine.up().await;
    machine.running("acme", "web").await;
    // Opens a connection every few milliseconds. The tenant's limit here is one a second.
    let stop = Arc::new(AtomicBool::new(false));
    let (until_then, place) = (Arc::clone(&stop), acme.clone());
    let crowd = std::thread::spawn(move || {
        within(&place, move || {
            for port in (2_000..60_000).cycle() {
                if until_then.load(Ordering::Relaxed) {
                    return;
                }
                let _ =
                    UdpSocket::bind((own, port)).and_then(|socket| socket.send_to(&[0; 12], (gateway, 53)));
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut answers = Vec::new();
    for _ in 0..5 {
        let path = "/api/v1/tenants/acme/apps/web/reach?to=api&port=8080";
        answers.push(machine.ask(&machine.admin, "POST", path, None).await);
    }
    stop.store(true, Ordering::Relaxed);
    crowd.join().unwrap();
    let untold = |(status, answer): &&(u16, Value)| {
        *status == 409 && answer.to_string().contains("rate of new connections")
    };
    assert!(answers.iter().filter(untold).count() >= 3, "{answers:#?}");
    // The platform's own probes report no fault.
    let events = machine.get("/api/v1/network/events").await.to_string();
    assert!(!events.contains("probe_"), "{events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_owner_now_and_what_never_leaves_is_said_so() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    let asking = "image: web:1\nport: 8080\nconnects: { apps: [api] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (_, acme) = instance(&machine, "acme", "web").await;
    let (api, _) = instance(&machine, "acme", "api").await;
    // An address that is reserved for an app that it names, and that no instance has now.
    let files = std::fs::read_dir(machine.data.join("agent/apps")).unwrap().flatten();
    let kept: Vec<Value> =
        files.map(|file| serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap()).collect();
    let kept = kept.iter().find(|kept| kept["workload"]["addresses"][0] == api.to_string()).unwrap();
    let spare: Ipv4Addr = kept["workload"]["addresses"][1].as_str().unwrap().parse().unwrap();
    assert!(!greets(&acme, spare, 8080));
    let item = denied(&machine, |item| item["target"] == spare.to_string()).await;
    assert!(item["why"].as_str().unwrap().contains("no instance had the address"), "{item:#}");
    // Traffic that never leaves the app is open and not probed.
    for inside in ["127.0.0.1", "0.0.0.0"] {
        let path = format!("/api/v1/tenants/acme/apps/web/reach?to={inside}&port=1");
        let (status, answer) = machine.ask(&machine.admin, "POST", &path, None).await;
        assert!(status == 200 && answer["open"] == true && answer["agrees"] == true, "{answer}");
        assert!(answer["words"].as_str().unwrap().contains("never leaves the app"), "{answer}");
    }
}
