//! Denied traffic stays denied under a flood and beside other firewalls.

use std::time::Duration;

use serde_json::json;

use super::{instance, put, two_tenants};
use crate::outside::{Outside, greets, within};
use crate::support::{Machine, run};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forbidden_stays_so_under_replacement_flood_and_forgery() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(9092);
    two_tenants(&machine).await;
    for tenant in ["acme", "beta"] {
        assert_eq!(machine.deploy(tenant, "web", "image: web:1\nport: 8080\n").await.0, 202);
    }
    let (own, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    // Floods a denied destination with datagrams while the table is replaced again and again.
    let target = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (counted, place) = (std::sync::Arc::clone(&target), beta.clone());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (until_then, ready) = (std::sync::Arc::clone(&stop), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        within(&place, move || {
            let socket = std::net::UdpSocket::bind((foreign, 5000)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            ready.0.send(()).unwrap();
            let mut buffer = [0; 64];
            while !until_then.load(std::sync::atomic::Ordering::Relaxed) {
                if socket.recv_from(&mut buffer).is_ok() {
                    counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            }
        });
    });
    ready.1.recv().unwrap();
    let flooding = std::sync::Arc::clone(&stop);
    let sent = std::thread::spawn(move || {
        within(&web, move || {
            let socket = std::net::UdpSocket::bind((own, 0)).unwrap();
            let mut sent = 0_usize;
            while !flooding.load(std::sync::atomic::Ordering::Relaxed) {
                sent += usize::from(socket.send_to(b"flood", (foreign, 5000)).is_ok());
            }
            sent
        })
    });
    let table = machine.table();
    let dump = run("nft", &["-s", "list", "table", "inet", &table]).1;
    let text = format!("add table inet {table}\ndelete table inet {table}\n{dump}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    for n in 0..200 {
        let (good, words) = run("nft", &["-f", file.path().to_str().unwrap()]);
        assert!(good, "{n}: {words}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = sent.join().unwrap();
    assert!(sent > 1000, "{sent} were sent");
    assert_eq!(target.load(std::sync::atomic::Ordering::Relaxed), 0, "of {sent}");
    println!("0 of {sent} forbidden packets came through 200 replacements");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_firewall_is_told_and_opens_nothing() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(9092);
    two_tenants(&machine).await;
    put(
        &machine,
        "/api/v1/services/kafka",
        json!({"endpoints": [{"network": world.service(), "port": 9092}]}),
    )
    .await;
    put(&machine, "/api/v1/tenants/acme/services/kafka", json!({})).await;
    let asking = "image: web:1\nport: 8080\nconnects: { services: [kafka] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    assert!(greets(&web, world.service(), 9092), "{}", machine.tail("agent"));
    let doctor = || {
        let data = machine.data.display().to_string();
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["doctor", "--data", &data, "-o", "json"])
            .output()
            .unwrap();
        String::from_utf8(done.stdout).unwrap()
    };
    // Docker, ufw and firewalld add a chain beside ours; this one applies only to this test's bridges.
    let table = format!("foreign_{}", machine.id);
    let bridges = format!("bk{}*", machine.id);
    for (policy, reach) in [("accept", true), ("drop", false)] {
        for priority in ["-300", "300"] {
            // A drop policy would stop other tests' packets too, so this is a rule for this test's bridges
            // only.
            let rule =
                if policy == "drop" { format!("iifname \"{bridges}\" drop") } else { "accept".to_owned() };
            let head = format!("type filter hook forward priority {priority}; policy accept;");
            let body = format!("table inet {table} {{\n chain c {{\n  {head}\n  {rule}\n }}\n}}\n");
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), body).unwrap();
            assert!(run("nft", &["-f", file.path().to_str().unwrap()]).0);
            assert_eq!(greets(&web, world.service(), 9092), reach, "{policy} at {priority}");
            assert!(
                !greets(&beta, world.service(), 9092) && !greets(&web, foreign, 8080),
                "{policy} at {priority}"
            );
            // A rule that names our bridges is reported, whatever its chain does with other traffic.
            assert_eq!(
                doctor().contains(&format!("inet {table} c")),
                policy == "drop",
                "{policy}: {}",
                doctor()
            );
            assert!(run("nft", &["delete", "table", "inet", &table]).0);
        }
    }
    assert!(doctor().contains("other firewalls"));
}
