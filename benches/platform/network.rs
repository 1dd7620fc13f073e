//! The firewall at 10, 1,000 and 10,000 tenants: compile, verify, load, replace, add a tenant, and the cost
//! per packet. Tenants are set elements in the kernel here, not running bridges. One of them has a real port
//! that carries the packets.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead::driver::podman::firewall::{compile, kernel};
use bulkhead::ids::{AppId, TenantName};
use bulkhead::policy::never::BUILT_IN;
use bulkhead::policy::proof::{AppAddress, ExpectedFacts, MachineFacts, prove, prove_change};
use bulkhead::policy::read::{Shell, table};
use bulkhead::policy::{Cidr, Flow, Protocol, Target};
use serde_json::json;

use crate::outside::{greets, of, within};
use crate::support::{HTTPD, Machine, run};
use crate::{Row, median, spread};

const TABLE: &str = "bulkhead_bnch";

fn shell() -> Shell {
    Shell {
        table: TABLE.into(),
        prefix: "bkbnch".into(),
        prober: 65_000,
        pace: 1_000,
        pool: "10.0.0.0/8".parse().unwrap(),
    }
}

fn subnet(network: u32) -> Cidr {
    Cidr::new(Ipv4Addr::from_bits(0x0a00_0000 + (network << 10)), 22).unwrap()
}

fn tenant(network: u32) -> TenantName {
    format!("tenant{network}").parse().unwrap()
}

fn flow(name: &str, target: Target, port: u16) -> Flow {
    Flow { name: name.into(), target, protocol: Protocol::Udp, port, until: None }
}

/// Returns tenants with one app each: five services, two egress targets, and a grant for every tenth.
fn standing(tenants: u32) -> ExpectedFacts {
    let mut standing = ExpectedFacts::default();
    for network in 0..tenants {
        let id = AppId(i64::from(network) + 1);
        let address = Ipv4Addr::from_bits(subnet(network).first() + 2);
        standing.apps.insert(
            id,
            AppAddress {
                tenant: tenant(network),
                network,
                gateway: Ipv4Addr::from_bits(subnet(network).first() + 1),
                addresses: vec![address],
            },
        );
        let mut flows: Vec<Flow> = (0..5)
            .map(|n| {
                let network = Cidr::of(Ipv4Addr::new(172, 31, 250, 2 + n));
                flow("service", Target::Service { network }, 9092)
            })
            .collect();
        for outside in ["45.67.0.0/16", "192.88.99.0/24"] {
            flows.push(flow("outside", Target::Outside { network: outside.parse().unwrap() }, 443));
        }
        if network % 10 == 0 {
            let other = (network + 1) % tenants;
            let target = Target::App { tenant: tenant(other), app: AppId(i64::from(other) + 1) };
            flows.push(Flow { protocol: Protocol::Tcp, ..flow("grant", target, 8080) });
        }
        standing.flows.insert(id, flows);
    }
    standing
}

fn walls(tenants: u32) -> MachineFacts {
    MachineFacts::new(
        shell(),
        BUILT_IN.to_vec(),
        (0..tenants).map(|network| (network, subnet(network))).collect(),
    )
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1000.0
}

/// A sender behind the first tenant's port, and a service that answers, each in its own namespace.
struct Wire;

impl Wire {
    fn lay() -> Self {
        let wire = Self;
        for args in [
            "netns add bkbncha",
            "netns add bkbnchb",
            "link add bkbnch0 type veth peer name eth0 netns bkbncha",
            "link add bnchworld type veth peer name eth0 netns bkbnchb",
            "addr add 10.0.0.1/22 dev bkbnch0",
            "link set bkbnch0 up",
            "addr add 172.31.250.1/24 dev bnchworld",
            "link set bnchworld up",
            "-n bkbncha addr add 10.0.0.2/22 dev eth0",
            "-n bkbncha link set eth0 address 0a:58:0a:00:00:02 up",
            "-n bkbncha route add default via 10.0.0.1",
            "-n bkbnchb addr add 172.31.250.2/24 dev eth0",
            "-n bkbnchb addr add 192.88.99.1/32 dev eth0",
            "-n bkbnchb link set eth0 up",
            "-n bkbnchb route add default via 172.31.250.1",
            "route add 192.88.99.1/32 via 172.31.250.2",
        ] {
            let (good, text) = run("ip", &args.split(' ').collect::<Vec<_>>());
            assert!(good, "ip {args}: {text}");
        }
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        for (address, port) in [("172.31.250.2", 9092), ("192.88.99.1", 443)] {
            let (ready, wait) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                enter("bkbnchb");
                let socket = UdpSocket::bind((address.parse::<Ipv4Addr>().unwrap(), port)).unwrap();
                ready.send(()).unwrap();
                let mut buffer = [0; 16];
                while let Ok((n, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..n], from);
                }
            });
            wait.recv().unwrap();
        }
        wire
    }

    /// Returns the fastest of many round trips, in microseconds.
    fn trip(target: &'static str, port: u16) -> f64 {
        std::thread::spawn(move || {
            enter("bkbncha");
            let socket = UdpSocket::bind("10.0.0.2:0").unwrap();
            socket.connect((target, port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut least = f64::MAX;
            let mut buffer = [0; 16];
            for _ in 0..20_000 {
                let begun = Instant::now();
                socket.send(b"x").unwrap();
                socket.recv(&mut buffer).unwrap();
                least = least.min(begun.elapsed().as_secs_f64() * 1e6);
            }
            least
        })
        .join()
        .unwrap()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for args in ["link del bkbnch0", "link del bnchworld", "netns del bkbncha", "netns del bkbnchb"] {
            run("ip", &args.split(' ').collect::<Vec<_>>());
        }
        run("nft", &["delete", "table", "inet", TABLE]);
    }
}

fn enter(name: &str) {
    let file = std::fs::File::open(format!("/var/run/netns/{name}")).unwrap();
    let network = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(file.as_fd(), network).unwrap();
}

/// Returns whether a connection opens within 20 ms.
fn knock(place: &str, target: Ipv4Addr, port: u16) -> bool {
    within(place, move || {
        std::net::TcpStream::connect_timeout(&(target, port).into(), Duration::from_millis(20)).is_ok()
    })
}

/// Measures the time from the accepted grant to the first packet, on a running platform.
async fn accepted() -> Row {
    let machine = Machine::start().await;
    for name in ["acme", "beta"] {
        let robot = machine.tenant(name).await;
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
    }
    machine.deploy("beta", "api", "image: web:1\nport: 8080\n").await;
    let api = machine.running("beta", "api").await["observed"]["instances"][0].clone();
    let api: Ipv4Addr = api["address"].as_str().unwrap().parse().unwrap();
    let mut place = String::new();
    let mut took = Vec::new();
    for round in 0..6 {
        let offer = json!({"app": "api", "tenant": "acme"});
        let (_, grant) = machine.send("POST", "/api/v1/tenants/beta/grants", offer).await;
        let path = format!("/api/v1/tenants/acme/grants/{}/acceptance", grant["id"]);
        let begun = Instant::now();
        assert_eq!(machine.send("PUT", &path, json!({})).await.0, 202);
        if round == 0 {
            // Without the first grant, no app could name it.
            machine.deploy("acme", "web", "image: web:1\nport: 8080\nconnects: { apps: [beta/api] }\n").await;
            place = of(&machine.pid(&machine.running("acme", "web").await["observed"]["instances"][0]));
        }
        // Poll: the kernel sends only a few rejects per second, and a missing reject would cost a second of
        // waiting.
        while !knock(&place, api, 8080) {
            assert!(begun.elapsed() < Duration::from_secs(20), "the connection stays blocked");
        }
        if round > 0 {
            took.push(ms(begun));
        }
        let path = format!("/api/v1/tenants/beta/grants/{}", grant["id"]);
        machine.ask(&machine.admin, "DELETE", &path, None).await;
        while greets(&place, api, 8080) {}
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    Row {
        what: "accepted grant to first packet, ms",
        ours: spread(&took, 0),
        peer: "limit 250".into(),
        result: format!("{:.2} of the limit", median(&took) / 250.0),
        goal: "at most 250",
    }
}

pub(crate) async fn measure() -> Vec<Row> {
    let wire = Wire::lay();
    let mut rows = vec![proof()];
    let bare: Vec<f64> = (0..5).map(|_| Wire::trip("172.31.250.2", 9092)).collect();
    let (mut loads, mut replaces, mut adds, mut trips) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for tenants in [10, 1_000, 10_000] {
        let walls = walls(tenants + 1);
        let before = standing(tenants);
        let rules = compile(shell(), BUILT_IN, &before);
        run("nft", &["delete", "table", "inet", TABLE]);
        let mut took = Vec::new();
        for _ in 0..5 {
            let proven = prove(rules.text(), &walls, &before).unwrap();
            let begun = Instant::now();
            kernel::apply(&proven).await.unwrap();
            took.push(ms(begun));
        }
        loads.push(took.remove(0));
        replaces.push(median(&took));
        trips.push((Wire::trip("172.31.250.2", 9092), Wire::trip("192.88.99.1", 443)));
        // One more tenant, as a change of elements: compiled, verified as a whole, applied.
        let known = prove(rules.text(), &walls, &before).unwrap().into_table();
        let mut took = Vec::new();
        let mut after = before.clone();
        let last = AppId(i64::from(tenants) + 1);
        after.apps.extend(standing(tenants + 1).apps.remove_entry(&last));
        for _ in 0..5 {
            let begun = Instant::now();
            let next = compile(shell(), BUILT_IN, &after);
            let change = next.change(&rules).unwrap();
            let there = prove_change(change, &known, &walls, &after).unwrap();
            kernel::apply(&there).await.unwrap();
            took.push(ms(begun));
            let changed = there.into_table();
            let back = rules.change(&next).unwrap();
            kernel::apply(&prove_change(back, &changed, &walls, &before).unwrap()).await.unwrap();
        }
        adds.push(median(&took));
    }
    drop(wire);
    let three = |values: &[f64], digits: usize| {
        values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>().join(" / ")
    };
    rows.push(Row {
        what: "firewall loaded at 10 / 1,000 / 10,000 tenants (elements of sets, not running bridges), ms",
        ours: three(&loads, 0),
        peer: "limit 1000".into(),
        result: format!("{:.2} of the limit; replaced in {}", loads[2] / 1000.0, three(&replaces, 0)),
        goal: "10,000 in 1 s",
    });
    rows.push(Row {
        what: "one more tenant at 10 / 1,000 / 10,000: compiled, verified as a whole, applied, ms",
        ours: three(&adds, 1),
        peer: "limit 30".into(),
        result: format!("{:.2} of the limit at 10,000", adds[2] / 30.0),
        goal: "at most 30",
    });
    let services: Vec<f64> = trips.iter().map(|(service, _)| *service).collect();
    let outside: Vec<f64> = trips.iter().map(|(_, outside)| *outside).collect();
    rows.push(Row {
        what: "round trip of a packet to a service at 10 / 1,000 / 10,000 tenants, fastest of 20,000, microseconds",
        ours: format!("{}; to a range outside {}", three(&services, 1), three(&outside, 1)),
        peer: format!("no table {}", spread(&bare, 1)),
        result: format!("10,000 against 10: {:.2}", services[2] / services[0]),
        goal: "flat",
    });
    rows.push(accepted().await);
    rows
}

fn proof() -> Row {
    let (standing, walls) = (standing(10_000), walls(10_000));
    let (mut makes, mut reads, mut proves) = (Vec::new(), Vec::new(), Vec::new());
    let mut size = 0;
    for _ in 0..5 {
        let begun = Instant::now();
        let text = compile(shell(), BUILT_IN, &standing).text();
        makes.push(ms(begun));
        size = text.len();
        let begun = Instant::now();
        let read = table(&text, &walls.shell).unwrap();
        reads.push(ms(begun));
        drop(read);
        let begun = Instant::now();
        prove(text, &walls, &standing).unwrap();
        proves.push(ms(begun));
    }
    let judged = (median(&proves) - median(&reads)).max(0.0);
    Row {
        what: "rules of 10,000 tenants compiled and verified, ms (parsing their text is separate)",
        ours: format!(
            "{:.0} compiled, {judged:.0} verified; {:.0} parsed ({} KiB)",
            median(&makes),
            median(&reads),
            (size >> 10)
        ),
        peer: "limit 100".into(),
        result: format!("{:.2} of the limit", (median(&makes) + judged) / 100.0),
        goal: "100 together",
    }
}
