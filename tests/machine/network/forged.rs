//! Forged packets, which apps have no privilege to send: made by hand in an app's namespace, whole and
//! fragmented.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::net::{self, AddressFamily, RawProtocol, RecvFlags, SendFlags, SocketType, ipproto};
use serde_json::json;

use super::{instance, put, two_tenants, until};
use crate::outside::{Outside, greets, within};
use crate::support::{Machine, run};

/// The payload of every packet of this test.
const MARK: &[u8] = b"forged by a test of bulkhead";
/// All IPv4 packets of an interface, before any firewall there.
const ETH_P_IP: u16 = 0x0800;

/// Counts packets with the mark that arrive in a namespace.
struct Ear {
    heard: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Ear {
    fn at(place: &str) -> Self {
        let ear = Self { heard: Arc::default(), stop: Arc::default() };
        let (heard, stop, place) = (Arc::clone(&ear.heard), Arc::clone(&ear.stop), place.to_owned());
        let (ready, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            within(&place, move || {
                let protocol = RawProtocol::new(u32::from(ETH_P_IP.to_be())).unwrap();
                let socket = net::socket(
                    AddressFamily::PACKET,
                    SocketType::DGRAM,
                    Some(net::Protocol::from_raw(protocol)),
                )
                .unwrap();
                let patience = Some(Duration::from_millis(50));
                net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Recv, patience).unwrap();
                ready.send(()).unwrap();
                let mut buffer = vec![0; 65536];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, _)) = net::recv(&socket, &mut buffer[..], RecvFlags::empty()) else {
                        continue;
                    };
                    // Packets that leave the namespace are captured as well.
                    if buffer[..length].windows(MARK.len()).any(|part| part == MARK) {
                        heard.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        });
        wait.recv().unwrap();
        ear
    }

    fn heard(&self) -> usize {
        self.heard.load(Ordering::Relaxed)
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Builds an IPv4 packet. `piece`: the fragment's offset in units of eight bytes, and whether more follow.
fn packet(source: Ipv4Addr, target: Ipv4Addr, protocol: u8, piece: (u16, bool), body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + body.len()).unwrap();
    let fragment = piece.0 | if piece.1 { 0x2000 } else { 0 };
    let mut out = vec![0x45, 0];
    out.extend(length.to_be_bytes());
    out.extend(0x7777_u16.to_be_bytes());
    out.extend(fragment.to_be_bytes());
    // The kernel fills in the checksum.
    out.extend([64, protocol, 0, 0]);
    out.extend(source.octets());
    out.extend(target.octets());
    out.extend(body);
    out
}

/// Builds a datagram from port 4000, without a checksum, which is optional.
fn datagram(port: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in [4000, port, u16::try_from(8 + body.len()).unwrap(), 0] {
        out.extend(field.to_be_bytes());
    }
    out.extend(body);
    out
}

fn raw() -> OwnedFd {
    net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)).unwrap()
}

fn send(place: &str, packets: Vec<Vec<u8>>) {
    within(place, move || {
        let socket = raw();
        for packet in packets {
            let target = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
            // None of these is rejected by the namespace itself: such a packet would never reach the
            // firewall.
            net::sendto(&socket, &packet, SendFlags::empty(), &SocketAddrV4::new(target, 0)).unwrap();
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_sources_and_pieces_of_packets_go_nowhere() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.push(123);
    two_tenants(&machine).await;
    let endpoints = json!([{"network": world.service(), "port": 123, "protocol": "udp"}]);
    put(&machine, "/api/v1/services/time", json!({"endpoints": endpoints})).await;
    put(&machine, "/api/v1/tenants/acme/services/time", json!({})).await;
    let asking = "image: web:1\nport: 8080\nconnects: { services: [time] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (own, web) = instance(&machine, "acme", "web").await;
    let (sister, api) = instance(&machine, "acme", "api").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    let ears = [Ear::at(&world.place()), Ear::at(&beta), Ear::at(&api)];
    let udp = 17;
    // Check that the listeners work: an allowed datagram arrives, whole and in three fragments.
    send(&web, vec![packet(own, world.service(), udp, (0, false), &datagram(123, MARK))]);
    until(5, "one piece", || ears[0].heard() == 1).await;
    let large: Vec<u8> = MARK.iter().copied().cycle().take(4000).collect();
    let whole = datagram(123, &large);
    let pieces = |target| {
        let part = |n: usize, more| {
            let end = (n * 1400 + 1400).min(whole.len());
            packet(own, target, udp, (u16::try_from(n * 175).unwrap(), more), &whole[n * 1400..end])
        };
        vec![part(0, true), part(1, true), part(2, false)]
    };
    send(&web, pieces(world.service()));
    until(5, "in pieces", || ears[0].heard() > 1).await;
    let before = ears[0].heard();
    // Forged sources: another tenant's app, the tenant's other app, the bridge, the service, an unused
    // address, this machine.
    let lies = [
        foreign,
        sister,
        Ipv4Addr::from(u32::from(own) & !0x3ff | 1),
        world.service(),
        Ipv4Addr::from(u32::from(own) & !0x3ff | 0x3f0),
        Ipv4Addr::new(198, 18, 0, 1),
        Ipv4Addr::new(8, 8, 8, 8),
    ];
    let forged = lies
        .iter()
        .flat_map(|lie| [world.service(), foreign, sister].map(|to| (*lie, to)))
        .filter(|(lie, to)| lie != to)
        .map(|(lie, to)| packet(lie, to, udp, (0, false), &datagram(123, MARK)));
    send(&web, forged.collect());
    // To denied destinations: later fragments without the first, and all fragments. To an allowed one: a
    // first fragment whose port a later fragment overwrites. Other protocols.
    for target in [foreign, sister, world.metadata(), world.private()] {
        send(&web, pieces(target));
        send(&web, vec![packet(own, target, udp, (175, false), MARK)]);
        for protocol in [47, 132, 4] {
            send(&web, vec![packet(own, target, protocol, (0, false), MARK)]);
        }
    }
    let open = datagram(123, &[b'.'; 16]);
    let rewritten = datagram(124, MARK);
    send(
        &web,
        vec![
            packet(own, world.service(), udp, (0, true), &open),
            packet(own, world.service(), udp, (0, true), &rewritten[..24]),
            packet(own, world.service(), udp, (3, false), &rewritten[24..]),
        ],
    );
    send(&web, vec![packet(own, world.service(), udp, (175, false), MARK)]);
    send(&web, vec![packet(own, world.service(), 47, (0, false), MARK)]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let heard: Vec<usize> = ears.iter().map(Ear::heard).collect();
    assert_eq!(heard, [before, 0, 0], "at the service, at another tenant, at the own tenant's other app");
    assert!(greets(&beta, foreign, 8080), "and all of them live");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_somebody_publishes_on_the_machine_is_closed_to_tenants() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    let (foreign, _) = instance(&machine, "beta", "web").await;
    let port = std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    // A container engine publishes a port like this: traffic to the machine's address is forwarded to a
    // container, here even to another tenant's.
    let table = format!("published_{}", machine.id);
    let rule = format!("fib daddr type local tcp dport {port} dnat ip to {foreign}:8080");
    let body = format!(
        "table inet {table} {{\n chain come {{\n  type nat hook prerouting priority dstnat; policy accept;\n  {rule}\n }}\n \
         chain own {{\n  type nat hook output priority -100; policy accept;\n  {rule}\n }}\n}}\n"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), body).unwrap();
    let (good, text) = run("nft", &["-f", file.path().to_str().unwrap()]);
    assert!(good, "{text}");
    let _away = Away(table);
    let gateway = Ipv4Addr::from(u32::from(super::instance(&machine, "acme", "web").await.0) & !0x3ff | 1);
    let world = Outside::new();
    for address in [gateway, Ipv4Addr::new(198, 18, 0, 1), world.far()] {
        assert!(!greets(&web, address, port), "{address}");
    }
    // The rule itself works for a client that is allowed: the prober's user.
    let prober = machine.agent_config()["prober_uid"].as_integer().unwrap().to_string();
    let asked = run(
        "setpriv",
        &[
            "--reuid",
            &prober,
            "--clear-groups",
            "curl",
            "-s",
            "-m",
            "3",
            &format!("http://{gateway}:{port}/"),
        ],
    );
    assert!(asked.0, "{}", asked.1);
}

/// A table that is deleted on drop.
struct Away(String);

impl Drop for Away {
    fn drop(&mut self) {
        run("nft", &["delete", "table", "inet", &self.0]);
    }
}

/// Sends a datagram with `hops` as its TTL. Returns the type, code and sender of the ICMP message that comes
/// back, if any.
fn echo_of(place: &str, target: Ipv4Addr, hops: u32) -> Option<(u8, u8, Ipv4Addr)> {
    within(place, move || {
        let ear = net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
        let patience = Some(Duration::from_millis(800));
        net::sockopt::set_socket_timeout(&ear, net::sockopt::Timeout::Recv, patience).unwrap();
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_ttl(hops).unwrap();
        let _ = socket.send_to(b"x", (target, 7));
        let mut buffer = [0; 512];
        loop {
            let (length, _) = net::recv(&ear, &mut buffer[..], RecvFlags::empty()).ok()?;
            // The message quotes the datagram behind its own headers. The platform probes from here too, so
            // check that it is ours.
            let ours = length >= 52 && buffer[44..48] == target.octets() && buffer[50..52] == [0, 7];
            if ours {
                let from = Ipv4Addr::new(buffer[12], buffer[13], buffer[14], buffer[15]);
                return Some((buffer[20], buffer[21], from));
            }
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_learns_from_a_refusal_which_bridges_there_are() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (own, web) = instance(&machine, "acme", "web").await;
    let (foreign, _) = instance(&machine, "beta", "web").await;
    let base = u32::from(foreign) & !0x3ff;
    let world = Outside::new();
    // Another tenant's bridge, instance and unused address; an unused subnet; this machine; outside.
    let nobody = base + 0x400 * 40;
    let targets = [
        Ipv4Addr::from(base | 1),
        foreign,
        Ipv4Addr::from(base | 0x3f0),
        Ipv4Addr::from(nobody | 1),
        Ipv4Addr::from(nobody | 2),
        Ipv4Addr::new(198, 18, 0, 1),
        world.other(),
    ];
    let gateway = Ipv4Addr::from(u32::from(own) & !0x3ff | 1);
    for hops in [1, 2, 64] {
        let mut told = Vec::new();
        for target in targets {
            told.push((target, echo_of(&web, target, hops)));
            // The kernel sends one or two ICMP errors a second to one address.
            tokio::time::sleep(Duration::from_millis(1100)).await;
        }
        let wanted = (hops > 1).then_some((3, 13, gateway));
        assert!(told.iter().all(|(_, echo)| *echo == wanted), "{hops} hops: {told:?}");
    }
}
