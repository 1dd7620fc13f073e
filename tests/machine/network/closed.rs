//! What stays closed under flood, and beside others' firewalls.

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
    // A flood of datagrams toward everything that is closed, while the table is replaced again and again.
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
    // As Docker, ufw and firewalld do: a chain beside ours, here for this test's bridges alone.
    let table = format!("foreign_{}", machine.id);
    let bridges = format!("bk{}*", machine.id);
    for (policy, reach) in [("accept", true), ("drop", false)] {
        for priority in ["-300", "300"] {
            // A drop policy would stop other tests' packets too: here it is a rule for this test's bridges alone.
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
            // One rule that names our bridges is told, whatever its chain does with the others.
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
    let (_, text) = run("ip", &["-4", "route", "get", &own.to_string()]);
    let gateway: std::net::Ipv4Addr =
        text.split_whitespace().skip_while(|word| *word != "src").nth(1).unwrap().parse().unwrap();
    // What every app may do: ask for names, each time from another port, without waiting for an answer.
    let begun = std::time::Instant::now();
    let sent = within(&acme, move || {
        let one = |port| std::net::UdpSocket::bind((own, port))?.send_to(&[0; 12], (gateway, 53));
        (2_000..42_000_u16).filter(|port| one(*port).is_ok()).count()
    });
    let took = begun.elapsed();
    assert!(sent > 35_000, "{sent}");
    let (_, text) = run("conntrack", &["-L", "-s", &own.to_string(), "-p", "udp"]);
    let (tracked, most) = (text.lines().count() as u64, 5_000 + 1_000 * (took.as_secs() + 2));
    assert!((4_000..=most).contains(&tracked), "{tracked} of at most {most} in {took:?}");
    // Nobody else notices, and it has its turn again soon.
    assert!(greets(&beta, beta_api, 8080), "another tenant");
    super::until(5, "its own turn", || greets(&acme, acme_api, 8080)).await;
    let begun = std::time::Instant::now();
    loop {
        let denied = machine.get("/api/v1/tenants/acme/apps/web/denied").await;
        let hasty = denied["items"].as_array().unwrap().iter().find(|item| item["hasty"] == true).cloned();
        if let Some(hasty) = hasty {
            assert!(hasty["why"].as_str().unwrap().contains("more connections at once"), "{hasty:#}");
            assert_eq!((&hasty["port"], &hasty["protocol"]), (&json!(53), &json!("udp")), "{hasty:#}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{denied:#}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // An address that is kept for an app that it names, and that no instance has now.
    let files = std::fs::read_dir(machine.data.join("agent/apps")).unwrap().flatten();
    let kept = files.map(|file| serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap());
    let kept = kept.collect::<Vec<serde_json::Value>>();
    let api = kept.iter().find(|kept| kept["workload"]["addresses"][0] == acme_api.to_string()).unwrap();
    let spare: std::net::Ipv4Addr = api["workload"]["addresses"][1].as_str().unwrap().parse().unwrap();
    assert!(!greets(&acme, spare, 8080));
    let begun = std::time::Instant::now();
    loop {
        let denied = machine.get("/api/v1/tenants/acme/apps/web/denied").await;
        let item =
            denied["items"].as_array().unwrap().iter().find(|item| item["target"] == spare.to_string());
        if let Some(item) = item {
            assert!(item["why"].as_str().unwrap().contains("no instance of it had the address"), "{item:#}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{denied:#}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // What never leaves the app is open, and not tried.
    for inside in ["127.0.0.1", "0.0.0.0"] {
        let path = format!("/api/v1/tenants/acme/apps/web/reach?to={inside}&port=1");
        let (status, answer) = machine.ask(&machine.admin, "POST", &path, None).await;
        assert!(status == 200 && answer["open"] == true && answer["agrees"] == true, "{answer}");
        assert!(answer["words"].as_str().unwrap().contains("never leaves the app"), "{answer}");
    }
    // A person sets another number: it holds from the next start on, and is kept by the one after.
    let path = machine.data.join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("new_connections_per_second = 1000"), "{text}");
    let mut machine = machine;
    machine.down();
    std::fs::write(&path, text.replace("per_second = 1000", "per_second = 2500")).unwrap();
    machine.up().await;
    let (_, rules) = run("nft", &["list", "chain", "inet", &machine.table(), "begin"]);
    assert!(rules.contains("limit rate over 2500/second burst 12500 packets"), "{rules}");
    assert!(std::fs::read_to_string(&path).unwrap().contains("new_connections_per_second = 2500"));
}
