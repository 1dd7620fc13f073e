//! What stays closed under flood, beside others' firewalls, and among neighbours.

use std::time::Duration;

use serde_json::json;

use super::{instance, put, two_tenants};
use crate::outside::{Outside, greets, within};
use crate::support::{Machine, run};

/// Sets a switch of the kernel and sets it back, also when the test fails.
struct Switch(&'static str, String);

impl Switch {
    fn set(path: &'static str, value: &str) -> Self {
        let before = std::fs::read_to_string(path).unwrap_or_default();
        let _ = std::fs::write(path, value);
        Self(path, before)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0, self.1.trim());
    }
}

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
async fn neighbours_cannot_take_each_others_place_with_or_without_br_netfilter() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("acme", "spy", "image: web:1\nport: 8080\n").await.0, 202);
    let asking = "image: web:1\nport: 8080\nconnects: { apps: [api] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (api, _) = instance(&machine, "acme", "api").await;
    let (spy, spy_place) = instance(&machine, "acme", "spy").await;
    let (own, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    for value in ["1", "0"] {
        let _switch = Switch::set("/proc/sys/net/bridge/bridge-nf-call-iptables", value);
        assert!(greets(&web, api, 8080), "br_netfilter {value}: what is named is open");
        for (place, target, port) in [
            (&web, api, 8081),
            (&web, spy, 8080),
            (&spy_place, api, 8080),
            (&spy_place, own, 8080),
            (&beta, api, 8080),
            (&web, foreign, 8080),
        ] {
            assert!(!greets(place, target, port), "br_netfilter {value}: {target} {port}");
        }
    }
    // With rights that no app has, from within: the neighbour's address, its card, and shouting both.
    let spy_pid = machine.pid(&machine.running("acme", "spy").await["observed"]["instances"][0]);
    let inside = |args: &[&str]| run("nsenter", &[&["-t", &spy_pid, "-n", "ip"][..], args].concat());
    let octets = api.octets();
    let card = format!("0a:58:{:02x}:{:02x}:{:02x}:{:02x}", octets[0], octets[1], octets[2], octets[3]);
    assert!(inside(&["addr", "add", &format!("{api}/32"), "dev", "eth0"]).0);
    for _ in 0..3 {
        // Every connection that it begins says "I am there" to the machine.
        let (_, _) = run(
            "nsenter",
            &["-t", &spy_pid, "-n", "busybox", "arping", "-c", "1", "-A", "-I", "eth0", &api.to_string()],
        );
        assert!(greets(&web, api, 8080));
    }
    let hello = |place: &str| {
        // Who answers at the address: only the app itself serves this page.
        greets(place, api, 8080)
    };
    assert!(inside(&["link", "set", "dev", "eth0", "address", &card]).0);
    for _ in 0..5 {
        let _ = run(
            "nsenter",
            &["-t", &spy_pid, "-n", "busybox", "arping", "-c", "1", "-A", "-I", "eth0", &api.to_string()],
        );
        assert!(hello(&web), "the app keeps its place");
    }
    // What is meant for the app never comes to the other one: it listens under the stolen address, in vain.
    let stolen = within(&spy_place, move || {
        let listener = std::net::TcpListener::bind((api, 8085)).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        listener.accept().is_ok()
    });
    assert!(!stolen);
    // IPv6 is closed on the bridge, and stays so when somebody opens it there.
    let bridge = format!("bk{}0", machine.id);
    assert!(run("ip", &["-6", "addr", "show", "dev", &bridge]).1.trim().is_empty());
    let listener = std::net::TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = std::io::Write::write_all(&mut &stream, b"hello\n");
        }
    });
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6"), "0").unwrap();
    assert!(run("ip", &["-6", "addr", "add", "fd00:77::1/64", "dev", &bridge, "nodad"]).0);
    let web_pid = machine.pid(&machine.running("acme", "web").await["observed"]["instances"][0]);
    let _ = run("nsenter", &["-t", &web_pid, "-n", "sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"]);
    let _ = run(
        "nsenter",
        &["-t", &web_pid, "-n", "ip", "-6", "addr", "add", "fd00:77::2/64", "dev", "eth0", "nodad"],
    );
    let reached = within(&web, move || {
        let target = std::net::SocketAddr::new("fd00:77::1".parse().unwrap(), port);
        std::net::TcpStream::connect_timeout(&target, Duration::from_secs(1)).is_ok()
    });
    assert!(!reached, "nothing of a tenant's IPv6 is let in");
}
