//! Neighbours on one bridge: no instance takes another one's address, whatever it announces and however the
//! bridge is changed.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Switch, instance, two_tenants, until};
use crate::outside::{Live, greets, within};
use crate::support::{HTTPD, Machine, run};

/// Returns the MAC address that belongs to an IP address.
fn card(own: Ipv4Addr) -> String {
    let [a, b, c, d] = own.octets();
    format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Returns the MAC address of a permanent neighbour entry on a bridge, if there is one.
fn known(bridge: &str, own: Ipv4Addr) -> Option<String> {
    let (_, text) = run("ip", &["-4", "neigh", "show", &own.to_string(), "dev", bridge, "nud", "permanent"]);
    text.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).map(str::to_owned)
}

/// Announces an address by gratuitous ARP until it is dropped, with privileges that no app has.
struct Shouting(Arc<AtomicBool>);

impl Shouting {
    fn from(pid: &str, own: Ipv4Addr) -> Self {
        let (stop, pid) = (Arc::new(AtomicBool::new(false)), pid.to_owned());
        let until_then = Arc::clone(&stop);
        std::thread::spawn(move || {
            let own = own.to_string();
            let arping = ["busybox", "arping", "-c", "1", "-w", "1", "-A", "-I", "eth0", &own];
            while !until_then.load(Ordering::Relaxed) {
                let _ = run("nsenter", &[&["-t", &pid, "-n"], &arping[..]].concat());
            }
        });
        Self(stop)
    }
}

impl Drop for Shouting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns the bridge port of an address.
fn port_of(bridge: &str, own: Ipv4Addr) -> String {
    let (_, text) = run("ip", &["-j", "link", "show", "master", bridge]);
    let links: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let port = links.iter().find(|link| link["ifalias"] == format!("bulkhead:{own}")).unwrap();
    port["ifname"].as_str().unwrap().to_owned()
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
    // With privileges that no app has, the spy takes the neighbour's IP and MAC addresses and announces both.
    let spy_pid = machine.pid(&machine.running("acme", "spy").await["observed"]["instances"][0]);
    let inside = |args: &[&str]| run("nsenter", &[&["-t", &spy_pid, "-n", "ip"][..], args].concat());
    let card = card(api);
    assert!(inside(&["addr", "add", &format!("{api}/32"), "dev", "eth0"]).0);
    for _ in 0..3 {
        // Each announcement claims the address on the bridge.
        let (_, _) = run(
            "nsenter",
            &["-t", &spy_pid, "-n", "busybox", "arping", "-c", "1", "-A", "-I", "eth0", &api.to_string()],
        );
        assert!(greets(&web, api, 8080));
    }
    let hello = |place: &str| {
        // Only the app itself serves this page.
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
    // Packets for the app never reach the spy, which listens under the stolen address.
    let stolen = within(&spy_place, move || {
        let listener = std::net::TcpListener::bind((api, 8085)).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        listener.accept().is_ok()
    });
    assert!(!stolen);
    // IPv6 is disabled on the bridge. When it is enabled there, it stays closed.
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

/// Greets each client, then echoes its input.
const ECHO: [&str; 10] = [
    "/bin/busybox",
    "nc",
    "-ll",
    "-p",
    "8080",
    "-e",
    "/bin/busybox",
    "sh",
    "-c",
    "echo hello; exec /bin/busybox cat",
];

/// A tenant with an app, an app that may connect to it, and one that may not.
struct Street {
    machine: Machine,
    bridge: String,
    gateway: Ipv4Addr,
    api: Ipv4Addr,
    spy: Ipv4Addr,
    own: Ipv4Addr,
    /// Network namespace of `web`, which may connect to the app.
    web: String,
    spy_pid: String,
}

impl Street {
    async fn new() -> Self {
        let machine = Machine::start().await;
        let robot = machine.tenant("acme").await;
        machine.push(&robot, "acme/web:1", &HTTPD);
        machine.push(&robot, "acme/echo:1", &ECHO);
        for (app, image, more) in
            [("api", "echo", ""), ("spy", "web", ""), ("web", "web", "connects: { apps: [api] }\n")]
        {
            let text = format!("image: {image}:1\nport: 8080\n{more}");
            assert_eq!(machine.deploy("acme", app, &text).await.0, 202);
        }
        let (api, _) = instance(&machine, "acme", "api").await;
        let (spy, _) = instance(&machine, "acme", "spy").await;
        let (own, web) = instance(&machine, "acme", "web").await;
        let bridge = format!("bk{}0", machine.id);
        let (_, text) = run("ip", &["-j", "-4", "addr", "show", "dev", &bridge]);
        let links: serde_json::Value = serde_json::from_str(&text).unwrap();
        let gateway: Ipv4Addr = links[0]["addr_info"][0]["local"].as_str().unwrap().parse().unwrap();
        let spy_pid = machine.pid(&machine.running("acme", "spy").await["observed"]["instances"][0]);
        Self { machine, bridge, gateway, api, spy, own, web, spy_pid }
    }

    /// Reports whether the bridge is configured as created and all permanent neighbour entries are right.
    fn is_right(&self) -> bool {
        let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{}/{file}", self.bridge));
        let flags = u32::from_str_radix(read("flags").unwrap().trim().trim_start_matches("0x"), 16).unwrap();
        read("address").unwrap().trim() == card(self.gateway)
            && flags & 0x80 != 0
            && [self.api, self.spy, self.own].iter().all(|own| known(&self.bridge, *own) == Some(card(*own)))
    }

    /// The spy takes the app's address, announces it continuously and answers ARP queries for it.
    fn spy_on(&self) -> Shouting {
        let add =
            ["-t", &self.spy_pid, "-n", "ip", "addr", "add", &format!("{}/32", self.api), "dev", "eth0"];
        assert!(run("nsenter", &add).0);
        Shouting::from(&self.spy_pid, self.api)
    }

    /// Returns the number of recorded repairs of a bridge.
    fn repairs(&self) -> String {
        self.machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'neighbours_repaired'")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_on_a_bridge_is_set_right_whenever_the_machine_forgets() {
    let street = Street::new().await;
    let bridge = street.bridge.as_str();
    assert!(street.is_right());
    let _shouting = street.spy_on();
    let fixed = card(street.gateway);
    let another = ["link", "set", "dev", bridge, "address", "0a:58:ff:ff:ff:01"];
    let same = ["link", "set", "dev", bridge, "address", &fixed];
    let asking = ["link", "set", "dev", bridge, "arp", "on"];
    let away = ["neigh", "del", &street.api.to_string(), "dev", bridge];
    assert_eq!(street.repairs(), "0", "nothing had to be set right");
    for (what, args) in [
        ("another card", &another[..]),
        ("the same card again", &same),
        ("asking", &asking),
        ("forgotten", &away),
    ] {
        assert!(run("ip", args).0, "{what}");
        let took = until(7, what, || street.is_right()).await;
        assert!(greets(&street.web, street.api, 8080), "{what}: the app has its place {took:?} after");
    }
    let begun = Instant::now();
    while street.repairs() == "0" {
        assert!(begun.elapsed() < Duration::from_secs(20), "nothing is told of it");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // While the agent is stopped, the address is unreachable: neither the app nor the spy receives its
    // traffic.
    street.machine.signal("agent", "-STOP");
    assert!(run("ip", &another).0);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert!(!greets(&street.web, street.api, 8080), "nobody answers in its place");
        let (_, text) = run("ip", &["neigh", "show", &street.api.to_string(), "dev", bridge]);
        assert!(!text.contains(&card(street.spy)), "{text}");
    }
    street.machine.signal("agent", "-CONT");
    until(7, "set right", || street.is_right()).await;
    assert!(greets(&street.web, street.api, 8080));
    // A bridge port loses each of its four protections in turn.
    let port = port_of(bridge, street.spy);
    for (switch, wanted, loose) in [
        ("locked", "true", "off"),
        ("isolated", "true", "off"),
        ("learning", "false", "on"),
        ("flood", "false", "on"),
    ] {
        let seen = || run("bridge", &["-j", "-d", "link", "show", "dev", &port]).1;
        let held = format!("\"{switch}\":{wanted}");
        assert!(seen().contains(&held), "{switch}: {}", seen());
        assert!(run("bridge", &["link", "set", "dev", &port, switch, loose]).0);
        until(12, switch, || seen().contains(&held)).await;
    }
    let told = street
        .machine
        .wait("acme", "spy", 20, |app| app["events"].to_string().matches("was closed again").count() >= 4)
        .await;
    assert_eq!(told["observed"]["instances"][0]["restarts"], 0, "{told:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_version_has_left_is_settled_and_goes_on() {
    let street = Street::new().await;
    let Street { machine, bridge, gateway, .. } = &street;
    let live = Live::tcp(&street.web, street.api, 8080);
    until(5, "live", || live.rounds() > 3).await;
    machine.kill("agent");
    // The state of an earlier version: addresses with a subnet prefix, neighbours found by ARP, the bridge as
    // ARP proxy.
    let (_, text) = run("ip", &["-j", "-4", "addr", "show", "dev", bridge]);
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    let prefix = links[0]["addr_info"][0]["prefixlen"].as_u64().unwrap();
    let proxy = format!("/proc/sys/net/ipv4/conf/{bridge}/proxy_arp_pvlan");
    std::fs::write(&proxy, "1").unwrap();
    assert!(run("ip", &["link", "set", "dev", bridge, "arp", "on", "address", "0a:58:ff:ff:ff:01"]).0);
    for (app, own) in [("api", street.api), ("web", street.own)] {
        let pid = machine.pid(&machine.running("acme", app).await["observed"]["instances"][0]);
        for args in [
            &["addr", "add", &format!("{own}/{prefix}"), "dev", "eth0"][..],
            &["neigh", "del", &gateway.to_string(), "dev", "eth0"],
            &["route", "del", &gateway.to_string(), "dev", "eth0"],
        ] {
            assert!(run("nsenter", &[&["-t", &pid, "-n", "ip"], args].concat()).0, "{args:?}");
        }
        let (_, text) = run("nsenter", &["-t", &pid, "-n", "ip", "-4", "addr", "show", "dev", "eth0"]);
        assert!(text.contains(&format!("{own}/{prefix}")), "{text}");
    }
    until(20, "the next agent", || street.is_right()).await;
    assert!(greets(&street.web, street.api, 8080), "at once");
    let pid = machine.pid(&machine.running("acme", "web").await["observed"]["instances"][0]);
    let (_, text) = run("nsenter", &["-t", &pid, "-n", "ip", "-4", "addr", "show", "dev", "eth0"]);
    assert!(text.contains(&format!("{}/32", street.own)) && !text.contains(&format!("/{prefix} ")), "{text}");
    let before = live.rounds();
    until(5, "what was connected goes on", || live.rounds() > before + 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_fills_the_machines_table_of_neighbours() {
    let street = Street::new().await;
    let own = street.own;
    let sent = within(&street.web, move || {
        let socket = std::net::UdpSocket::bind((own, 0)).unwrap();
        let first = u32::from(own) & !0x3ff;
        let all = (first + 1..first + 1023).map(Ipv4Addr::from);
        all.filter(|to| socket.send_to(b"x", (*to, 9)).is_ok()).count()
    });
    assert!(sent > 500, "{sent}");
    let pid = street.machine.pid(&street.machine.running("acme", "web").await["observed"]["instances"][0]);
    let (_, inside) = run("nsenter", &["-t", &pid, "-n", "ip", "-4", "neigh", "show"]);
    assert_eq!(
        inside.trim(),
        format!("{} dev eth0 lladdr {} PERMANENT", street.gateway, card(street.gateway))
    );
    let (_, outside) = run("ip", &["-4", "neigh", "show", "dev", &street.bridge]);
    assert_eq!(outside.lines().count(), 3, "{outside}");
    // The same over IPv6, which is closed.
    let (_, text) = run("nsenter", &["-t", &pid, "-n", "ip", "-j", "link", "show", "dev", "eth0"]);
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    let link = u32::try_from(links[0]["ifindex"].as_u64().unwrap()).unwrap();
    let sent = within(&street.web, move || {
        let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
        let all = (1..1500_u16).map(|n| std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, n));
        all.filter(|to| socket.send_to(b"x", std::net::SocketAddrV6::new(*to, 9, 0, link)).is_ok()).count()
    });
    assert_eq!(sent, 0, "IPv6 is closed within");
    let (_, inside) = run("nsenter", &["-t", &pid, "-n", "ip", "-6", "neigh", "show"]);
    assert_eq!(inside.trim(), "");
    // The same for an app that claims many addresses, with privileges that no app has.
    let first = u32::from(own) & !0x3ff;
    for n in 600..620 {
        let address = Ipv4Addr::from(first + n).to_string();
        let inside = |args: &[&str]| run("nsenter", &[&["-t", &street.spy_pid, "-n"][..], args].concat());
        assert!(inside(&["ip", "addr", "add", &format!("{address}/32"), "dev", "eth0"]).0);
        let gateway = street.gateway.to_string();
        let _ = inside(&["busybox", "arping", "-c", "1", "-w", "1", "-I", "eth0", "-s", &address, &gateway]);
    }
    let (_, outside) = run("ip", &["-4", "neigh", "show", "dev", &street.bridge]);
    assert_eq!(outside.lines().count(), 3, "{outside}");
}
