//! The host as a tenant sees it.

use std::net::Ipv4Addr;

use serde_json::Value;

use super::{instance, two_tenants, until};
use crate::outside::greets;
use crate::support::{Machine, run};

/// The platform's health checks leave late packets behind. They must not appear among the app's denied
/// connections.
#[tokio::test(flavor = "multi_thread")]
async fn health_checks_are_nobodys_denials() {
    let machine = Machine::start().await;
    super::two_tenants(&machine).await;
    let spec = "image: web:1\nport: 8080\nhealth: { http: { path: / } }\ninstances: 3\n";
    assert_eq!(machine.deploy("acme", "web", spec).await.0, 202);
    machine.running("acme", "web").await;
    tokio::time::sleep(std::time::Duration::from_secs(25)).await;
    let denied = machine.get("/api/v1/tenants/acme/apps/web/denied").await;
    assert_eq!(denied["items"], serde_json::json!([]), "{denied:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_host_answers_to_a_tenant() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    // A program on the machine listens on all addresses and greets every client.
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = std::io::Write::write_all(&mut &stream, b"hello\n");
        }
    });
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (own, web) = instance(&machine, "acme", "web").await;
    let gateway = Ipv4Addr::from_bits(own.to_bits() & !0x3ff | 1);
    assert!(!greets(&web, gateway, port), "the gateway is the machine, and closed");
    let (_, ours) = run("ip", &["-j", "-4", "addr", "show", "dev", "eth0"]);
    let ours: Value = serde_json::from_str(&ours).unwrap_or_default();
    if let Some(address) = ours[0]["addr_info"][0]["local"].as_str() {
        assert!(!greets(&web, address.parse().unwrap(), port), "nor at its other addresses");
    }
    let doctor = |good: bool| {
        let data = machine.data.display().to_string();
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["doctor", "--data", &data, "-o", "json"])
            .output()
            .unwrap();
        let all: Value = serde_json::from_slice(&done.stdout).unwrap();
        let list = all.as_array().or_else(|| all["findings"].as_array()).unwrap().clone();
        let found = list.into_iter().find(|finding| finding["check"] == "host from within").unwrap();
        assert_eq!(found["status"] == "ok", good, "{found}");
        found.to_string()
    };
    assert!(doctor(true).contains("none but the one for names answers"));
    // The platform's page lists the socket and says that it was tested.
    let page = machine.ask(&machine.admin, "GET", "/network", None).await.1.to_string();
    assert!(page.contains(&format!(" tcp {port}")) && page.contains("tested from inside an app"), "{page}");
    // The check can fail: with the agent stopped and the table deleted, the same socket answers.
    machine.signal("agent", "-STOP");
    assert!(run("nft", &["delete", "table", "inet", &machine.table()]).0);
    let open = greets(&web, gateway, port);
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| doctor(false)));
    machine.signal("agent", "-CONT");
    assert!(open, "without the table it is open: so it is the table that closes it");
    assert!(told.unwrap().contains(&format!("port {port}")));
    until(5, "the table is back", || !greets(&web, gateway, port)).await;
}
