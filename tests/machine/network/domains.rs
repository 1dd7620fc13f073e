//! Egress targets with a domain, and DNS answers that lie.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::json;

use super::{delete, instance, put, two_tenants, until};
use crate::outside::{Live, Outside, greets, within};
use crate::support::{Machine, run};

/// Returns the answer that busybox's DNS client gets for a name inside an app.
async fn look_up(machine: &Machine, tenant: &str, app: &str, name: &str) -> String {
    let container = machine.running(tenant, app).await["observed"]["instances"][0]["container"].clone();
    let script = format!("busybox nslookup -type=a {name} 2>&1");
    machine.podman(&["exec", container.as_str().unwrap(), "/bin/busybox", "sh", "-c", &script]).1
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn a_domain_opens_what_it_leads_to_and_a_lying_resolver_gets_nobody_inside() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(443);
    let asked = world.names(vec![
        ("pay.example.org", vec![world.allowed()]),
        ("other.example.org", vec![world.other()]),
        // Names that resolve to internal addresses, alone and among others.
        ("evil.example.org", vec![world.metadata()]),
        (
            "mixed.example.org",
            vec![world.private(), world.allowed(), Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::LOCALHOST],
        ),
        ("empty.example.org", vec![]),
    ]);
    std::fs::write(machine.data.join("resolver.toml"), format!("upstream = [\"{}:53\"]\n", world.far()))
        .unwrap();
    machine.kill("resolver");
    two_tenants(&machine).await;
    for name in ["pay", "evil", "mixed", "empty", "missing"] {
        let wish = json!({"domain": format!("{name}.example.org"), "ports": [443], "reason": "to be paid"});
        let asked = put(&machine, &format!("/api/v1/tenants/acme/egress/{name}"), wish).await;
        let decision = json!({"id": asked["id"], "approved": true});
        put(&machine, &format!("/api/v1/tenants/acme/egress/{name}/decision"), decision).await;
    }
    for bad in ["*.example.org", "example", "EXAMPLE.org", "1.2.3.4", "a..b.org"] {
        let (status, answer) = machine
            .send(
                "PUT",
                "/api/v1/tenants/acme/egress/bad",
                json!({"domain": bad, "ports": [443], "reason": "x"}),
            )
            .await;
        assert_eq!(status, 422, "{bad}: {answer}");
    }
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    let asking =
        "image: web:1\nport: 8080\nconnects: { apps: [api], egress: [pay, evil, mixed, empty, missing] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (own, web) = instance(&machine, "acme", "web").await;
    let (_, other) = instance(&machine, "acme", "api").await;
    let (_, beta) = instance(&machine, "beta", "web").await;
    // Approved, but not looked up yet: closed. A lookup opens the address before its answer arrives.
    assert!(!greets(&web, world.allowed(), 443));
    let mut told = String::new();
    for _ in 0..30 {
        told = look_up(&machine, "acme", "web", "pay.example.org").await;
        if told.contains(&world.allowed().to_string()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(
        told.contains(&world.allowed().to_string()),
        "{told}\n{}\n{}",
        machine.tail("resolver"),
        machine.tail("agent")
    );
    assert!(greets(&web, world.allowed(), 443), "open as soon as it was told");
    assert!(
        !greets(&web, world.other(), 443)
            && !greets(&other, world.allowed(), 443)
            && !greets(&beta, world.allowed(), 443)
    );
    // An internal address in an answer is neither returned nor opened.
    let told = look_up(&machine, "acme", "web", "evil.example.org").await;
    assert!(told.contains("SERVFAIL") && !told.contains("169.254."), "{told}");
    let told = look_up(&machine, "acme", "web", "mixed.example.org").await;
    assert!(told.contains(&world.allowed().to_string()), "{told}");
    for inside in [world.private().to_string(), "10.77.0.1".to_owned(), "127.0.0.1".to_owned()] {
        assert!(!told.contains(&inside), "{told}");
    }
    for closed in [world.metadata(), world.private()] {
        assert!(!greets(&web, closed, 443), "{closed}");
    }
    let events = machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'name_refused'");
    assert!(events.parse::<i64>().unwrap() >= 2, "{events}");
    let told = look_up(&machine, "acme", "web", "missing.example.org").await;
    assert!(told.contains("NXDOMAIN"), "{told}");
    // A name that the app may not use does not exist, and the query never leaves the machine.
    for (tenant, app, name) in [
        ("acme", "web", "secret-4711.example.org"),
        ("acme", "web", "secret-4711.pay.example.org"),
        ("acme", "api", "pay.example.org"),
        ("beta", "web", "pay.example.org"),
        ("beta", "web", "api"),
        ("beta", "web", "api.acme"),
    ] {
        let told = look_up(&machine, tenant, app, name).await;
        assert!(told.contains("NXDOMAIN"), "{tenant}/{app} {name}: {told}");
    }
    assert!(!asked.lock().unwrap().iter().any(|name| name.contains("secret")), "{:?}", asked.lock().unwrap());
    // The same server resolves the tenant's own apps, without an upstream query.
    let (api, _) = instance(&machine, "acme", "api").await;
    assert!(look_up(&machine, "acme", "web", "api").await.contains(&api.to_string()));
    assert!(!asked.lock().unwrap().iter().any(|name| name == "api"));
    // Another bridge's DNS server does not answer.
    let gateway = |of: Ipv4Addr| Ipv4Addr::from_bits(of.to_bits() & !0x3ff | 1);
    let (foreign, _) = instance(&machine, "beta", "web").await;
    let mine = gateway(own);
    let theirs = gateway(foreign);
    let answered = within(&web, move || {
        let ask = |server: Ipv4Addr| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
            let question = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'a', b'p', b'i', 0, 0, 1, 0, 1];
            let _ = socket.send_to(&question, (server, 53));
            socket.recv(&mut [0; 512]).is_ok()
        };
        (ask(mine), ask(theirs))
    });
    assert_eq!(answered, (true, false));
    // The table is deleted and loaded again: addresses with a timeout stay open, or are found again.
    assert!(run("nft", &["delete", "table", "inet", &machine.table()]).0);
    until(5, "after a flush", || greets(&web, world.allowed(), 443)).await;
    // The approval ends: closed, and open connections with it, although the DNS answer is still valid.
    let live = Live::tcp(&web, world.allowed(), 443);
    until(5, "live", || live.rounds() > 3).await;
    for name in ["pay", "mixed"] {
        delete(&machine, &format!("/api/v1/tenants/acme/egress/{name}")).await;
    }
    until(5, "withdrawn", || !greets(&web, world.allowed(), 443)).await;
    // Rounds that had arrived by then are counted a moment later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = live.rounds();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(live.rounds(), before);
    assert!(look_up(&machine, "acme", "web", "pay.example.org").await.contains("NXDOMAIN"));
}
