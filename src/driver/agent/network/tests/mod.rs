//! Tests the compiler against the verifier, and the verifier against planted holes, random packets and a change of
//! every line of the text.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

use crate::driver::podman::firewall::{Rules, compile};
use crate::ids::{AppId, DomainName, TenantName};
use crate::policy::never::{BUILT_IN, Range, ReservedKind};
use crate::policy::proof::{AppAddress, ExpectedFacts, MachineFacts, VerificationError, prove, prove_change};
use crate::policy::read::{Rule, Set, Shell, Table, table};
use crate::policy::{Cidr, Flow, Protocol, Target};

mod random;

const POOL: &str = "10.64.0.0/12";

fn shell() -> Shell {
    let pool = POOL.parse().unwrap();
    Shell { table: "bulkhead_demo".into(), prefix: "bkdemo".into(), prober: 999, pool, pace: 1_000 }
}

fn never() -> Vec<Range> {
    let own = "45.99.99.99".parse().unwrap();
    BUILT_IN.iter().copied().chain([crate::policy::never::own(own)]).collect()
}

fn subnet(network: u32) -> Cidr {
    Cidr::new(Ipv4Addr::from_bits(0x0a40_0000 + (network << 10)), 22).unwrap()
}

fn walls(tenants: u32) -> MachineFacts {
    MachineFacts::new(shell(), never(), (0..tenants).map(|network| (network, subnet(network))).collect())
}

fn tenant(network: u32) -> TenantName {
    format!("tenant{network}").parse().unwrap()
}

fn place(network: u32, hosts: &[u32]) -> AppAddress {
    let addresses = hosts.iter().map(|host| Ipv4Addr::from_bits(subnet(network).first() + host)).collect();
    let gateway = Ipv4Addr::from_bits(subnet(network).first() + 1);
    AppAddress { tenant: tenant(network), network, gateway, addresses }
}

fn flow(name: &str, target: Target, port: u16) -> Flow {
    Flow { name: name.into(), target, protocol: Protocol::Tcp, port, until: None }
}

fn app(network: u32, id: i64) -> Target {
    Target::App { tenant: tenant(network), app: AppId(id) }
}

fn service(network: &str) -> Target {
    Target::Service { network: network.parse().unwrap() }
}

fn outside(network: &str) -> Target {
    Target::Outside { network: network.parse().unwrap() }
}

/// Two tenants, three apps, every kind of flow.
fn example() -> ExpectedFacts {
    let apps = [(1, place(0, &[2, 3])), (2, place(0, &[4])), (3, place(1, &[2]))];
    let flows = [
        (
            1,
            vec![
                flow("api", app(0, 2), 8080),
                flow("tenant1/db", app(1, 3), 5432),
                flow("kafka", service("10.5.0.2"), 9092),
                flow("cdn", service("192.88.99.0/24"), 443),
                Flow { protocol: Protocol::Udp, ..flow("time", service("10.5.0.3"), 123) },
                flow("payments", outside("45.67.0.0/16"), 443),
                flow("payments", outside("45.67.89.0/24"), 443),
            ],
        ),
        (
            3,
            vec![
                flow("mail", outside("1.2.3.4"), 587),
                flow("pay", domain("pay.example"), 443),
                flow("gone", domain("gone.example"), 443),
            ],
        ),
    ];
    ExpectedFacts {
        apps: apps.into_iter().map(|(id, place)| (AppId(id), place)).collect(),
        flows: flows.into_iter().map(|(id, flows)| (AppId(id), flows)).collect(),
        trial: [1].into(),
        watched: std::iter::once((AppId(1), vec![flow("kafka", service("10.5.0.2"), 9092)])).collect(),
        resolved: std::iter::once(found(3, "pay.example", &["45.200.0.1", "45.200.0.2"])).collect(),
    }
}

fn domain(name: &str) -> Target {
    Target::Domain { domain: name.parse().unwrap() }
}

type Found = ((AppId, DomainName), BTreeMap<Ipv4Addr, u64>);

fn found(app: i64, name: &str, addresses: &[&str]) -> Found {
    let end = crate::driver::podman::firewall::seconds() + 1000;
    let addresses = addresses.iter().map(|address| (address.parse().unwrap(), end)).collect();
    ((AppId(app), name.parse().unwrap()), addresses)
}

fn rules(standing: &ExpectedFacts) -> Rules {
    compile(shell(), &never(), standing)
}

#[test]
fn what_is_compiled_is_proven() {
    let standing = example();
    let text = rules(&standing).text();
    let proven = prove(text.clone(), &walls(2), &standing).unwrap();
    assert_eq!(proven.text(), text);
    let table = proven.into_table();
    assert_eq!((table.sources.len(), table.pairs.len(), table.services.len()), (4, 4, 4));
    // The range within the other one is left out: the kernel rejects overlapping elements.
    assert_eq!(table.outside.len(), 2 + 2 + 1);
    assert_eq!((table.resolved.len(), table.gateways.len(), table.trial.len()), (2, 2, 1));
    let empty = ExpectedFacts::default();
    prove(rules(&empty).text(), &walls(0), &empty).unwrap();
}

/// Returns the elements of the text, each with the name of its set.
fn elements(text: &str) -> Vec<(String, String)> {
    let mut set = String::new();
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("  set ") {
            set = name.trim_end_matches(" {").to_owned();
        }
        if let Some(list) = line.strip_prefix("    elements = { ") {
            found.extend(
                list.trim_end_matches(" }").split(", ").map(|element| (set.clone(), element.to_owned())),
            );
        }
    }
    found
}

fn put(text: &str, set: &str, element: &str) -> String {
    let head = format!("  set {set} {{\n");
    let (before, after) = text.split_once(&head).unwrap();
    let (body, rest) = after.split_once("  }\n").unwrap();
    let body = if body.contains("    elements = { ") {
        body.replacen(" }\n", &format!(", {element} }}\n"), 1)
    } else {
        format!("{body}    elements = {{ {element} }}\n")
    };
    format!("{before}{head}{body}  }}\n{rest}")
}

fn refused(text: String, standing: &ExpectedFacts) -> bool {
    prove(text, &walls(2), standing).is_err()
}

#[test]
fn every_element_matters() {
    let standing = example();
    let text = rules(&standing).text();
    let all = elements(&text);
    assert!(all.len() > 25);
    for (set, element) in &all {
        // Removing an element closes a required flow or opens a reserved range.
        let without = text
            .replace(&format!(", {element},"), ",")
            .replace(&format!(", {element} }}"), " }")
            .replace(&format!("{{ {element}, "), "{ ")
            .replace(&format!("    elements = {{ {element} }}\n"), "");
        assert_ne!(without, text);
        // A resolved address is open for a while only: its presence is not required, and it may occur twice.
        if set == "resolved" {
            assert!(!refused(without, &standing));
        } else {
            assert!(refused(without, &standing), "{set}: {element} was taken away");
            assert!(refused(put(&text, set, element), &standing), "{set}: {element} stands twice");
        }
        let parts: Vec<&str> = element.split(" . ").collect();
        for n in 0..parts.len() {
            for other in [
                "\"bkdemo1\"",
                "\"bkdemo0\"",
                "\"bkdemo7\"",
                "10.64.0.2",
                "10.64.4.2",
                "10.64.0.1",
                "169.254.169.254",
                "0.0.0.0/0",
                "udp",
                "tcp",
                "22",
            ] {
                let mut changed = parts.clone();
                if changed[n] == other {
                    continue;
                }
                changed[n] = other;
                let changed = changed.join(" . ");
                if all.contains(&(set.clone(), changed.clone())) {
                    continue;
                }
                // An element without a timeout, or for an arbitrary range, is refused; a second address is not.
                if set == "resolved" && n == 2 && other == "0.0.0.0/0" {
                    assert!(refused(put(&text, set, &changed), &standing), "{set}: {changed}");
                }
                assert!(refused(put(&text, set, &changed), &standing), "{set}: {changed} was added");
            }
        }
    }
}

#[test]
fn planted_holes_are_found_with_a_packet_that_shows_them() {
    let standing = example();
    let text = rules(&standing).text();
    for (set, element, target) in [
        ("outside", "\"bkdemo0\" . 10.64.0.2 . 0.0.0.0/0 . tcp . 443", "0.0.0.0"),
        ("outside", "\"bkdemo0\" . 10.64.0.2 . 169.254.0.0/16 . tcp . 80", "169.254.0.0"),
        ("services", "\"bkdemo0\" . 10.64.0.2 . 169.254.169.254 . tcp . 80", "169.254.169.254"),
        ("services", "\"bkdemo0\" . 10.64.0.2 . 168.63.129.16 . tcp . 80", "168.63.129.16"),
        ("services", "\"bkdemo0\" . 10.64.0.2 . 100.100.100.200 . tcp . 80", "100.100.100.200"),
        ("services", "\"bkdemo0\" . 10.64.0.2 . 45.99.99.99 . tcp . 22", "45.99.99.99"),
        ("outside", "\"bkdemo0\" . 10.64.0.2 . 45.0.0.0/8 . tcp . 22", "45.99.99.99"),
        ("services", "\"bkdemo0\" . 10.64.0.2 . 10.64.4.2 . tcp . 5432", "10.64.4.2"),
        // A granted pair in the other direction, on another port, over UDP, from an app without the grant.
        ("pairs", "\"bkdemo1\" . 10.64.4.2 . 10.64.0.2 . tcp . 5432", "10.64.0.2"),
        ("pairs", "\"bkdemo0\" . 10.64.0.2 . 10.64.4.2 . tcp . 5433", "10.64.4.2"),
        ("pairs", "\"bkdemo0\" . 10.64.0.2 . 10.64.4.2 . udp . 5432", "10.64.4.2"),
        ("pairs", "\"bkdemo0\" . 10.64.0.4 . 10.64.4.2 . tcp . 5432", "10.64.4.2"),
        // A service on another port, for another tenant, and at a neighbouring address.
        ("services", "\"bkdemo0\" . 10.64.0.2 . 10.5.0.2 . tcp . 9093", "10.5.0.2"),
        ("services", "\"bkdemo1\" . 10.64.4.2 . 10.5.0.2 . tcp . 9092", "10.5.0.2"),
        ("services", "\"bkdemo0\" . 10.64.0.2 . 10.5.0.4 . tcp . 9092", "10.5.0.4"),
        // A domain's element inside, on another port, of an app that names none; elements without a timeout follow
        // below.
        ("resolved", "\"bkdemo1\" . 10.64.4.2 . 169.254.169.254 . tcp . 443 timeout 60s", "169.254.169.254"),
        ("resolved", "\"bkdemo1\" . 10.64.4.2 . 10.64.0.2 . tcp . 443 timeout 60s", "10.64.0.2"),
        ("resolved", "\"bkdemo1\" . 10.64.4.2 . 10.5.0.2 . tcp . 443 timeout 60s", "10.5.0.2"),
        ("resolved", "\"bkdemo1\" . 10.64.4.2 . 45.200.0.1 . tcp . 80 timeout 60s", "45.200.0.1"),
        ("resolved", "\"bkdemo1\" . 10.64.4.2 . 45.200.0.1 . udp . 443 timeout 60s", "45.200.0.1"),
        ("resolved", "\"bkdemo0\" . 10.64.0.2 . 45.200.0.1 . tcp . 443 timeout 60s", "45.200.0.1"),
        // A wider range than approved, and the pool.
        ("outside", "\"bkdemo1\" . 10.64.4.2 . 1.2.3.0/28 . tcp . 587", "1.2.3.0"),
        ("outside", "\"bkdemo0\" . 10.64.0.2 . 10.64.4.0/22 . tcp . 443", "10.64.4.0"),
        ("pairs", "\"bkdemo0\" . 10.64.0.2 . 10.65.0.2 . tcp . 443", "10.65.0.2"),
    ] {
        let Err(VerificationError::Breached(count, told)) =
            prove(put(&text, set, element), &walls(2), &standing)
        else {
            panic!("{set}: {element} was not found")
        };
        assert!(
            count >= 1 && told.iter().any(|b| b.witness.target.to_string() == target),
            "{element}: {told:?}"
        );
    }
    for element in ["", " timeout 0s", " timeout 60", " timeout 99999s", " timeout -1s", " timeout 1h"] {
        let element = format!("\"bkdemo1\" . 10.64.4.2 . 45.200.0.3 . tcp . 443{element}");
        assert!(refused(put(&text, "resolved", &element), &standing), "{element}");
    }
    for element in [
        "\"bkdemo0\" . 10.64.4.1",
        "\"bkdemo0\" . 10.64.0.2",
        "\"bkdemo0\" . 169.254.169.254",
        "\"bkdemo9\" . 10.64.0.1",
    ] {
        assert!(refused(put(&text, "gateways", element), &standing), "{element}");
    }
    for element in ["\"bkdemo0\"", "\"bkdemo9\"", "\"bk*\"", "\"eth0\""] {
        assert!(refused(put(&text, "trial", element), &standing), "{element}");
    }
    // Sources: another tenant's address, the gateway, and an address without an instance.
    for element in [
        "\"bkdemo0\" . 0a:58:0a:40:04:02 . 10.64.4.2",
        "\"bkdemo0\" . 0a:58:0a:40:00:01 . 10.64.0.1",
        "\"bkdemo0\" . 0a:58:0a:40:00:09 . 10.64.0.9",
        "\"bkdemo9\" . 0a:58:0a:40:00:02 . 10.64.0.2",
        // The MAC address of another instance, one in upper case, and none.
        "\"bkdemo0\" . 0a:58:0a:40:00:03 . 10.64.0.2",
        "\"bkdemo0\" . 0A:58:0a:40:00:02 . 10.64.0.2",
        "\"bkdemo0\" . 10.64.0.2",
    ] {
        assert!(refused(put(&text, "sources", element), &standing), "{element}");
    }
}

#[test]
fn every_line_of_the_shape_matters() {
    let standing = example();
    let text = rules(&standing).text();
    let lines: Vec<&str> = text.lines().collect();
    for n in 0..lines.len() {
        let mut without = lines.clone();
        let gone = without.remove(n);
        // An open address of a name is not required; everything else is.
        if !gone.contains(" timeout ") {
            assert!(refused(without.join("\n") + "\n", &standing), "without {gone}");
        }
        let mut twice = lines.clone();
        twice.insert(n, gone);
        assert!(refused(twice.join("\n") + "\n", &standing), "twice {gone}");
        for (from, to) in [
            ("drop", "accept"),
            ("accept", "drop"),
            ("goto", "jump"),
            ("!= ", ""),
            ("\"bkdemo*\"", "\"bk*\""),
            ("reply", "original"),
            ("established", "new"),
            ("999", "0"),
            ("10.64.0.0/12", "0.0.0.0/0"),
            ("- 10", "+ 10"),
            ("+ 10", "- 10"),
            ("1000/second", "9000/second"),
            ("burst 5000", "burst 50000"),
            ("== 0", "!= 0"),
        ] {
            if gone.contains(from) && !gone.contains("elements") {
                let mut changed = lines.clone();
                let other = gone.replacen(from, to, 1);
                changed[n] = &other;
                assert!(refused(changed.join("\n") + "\n", &standing), "{other}");
            }
        }
    }
    for more in ["add rule inet bulkhead_demo through accept\n", "flush ruleset\n", "\n"] {
        assert!(refused(format!("{text}{more}"), &standing) && refused(format!("{more}{text}"), &standing));
    }
}

#[test]
fn a_change_is_proven_like_the_whole_and_says_the_same() {
    let before = example();
    let mut after = example();
    after.apps.insert(AppId(4), place(1, &[3]));
    after
        .flows
        .get_mut(&AppId(1))
        .unwrap()
        .retain(|flow| flow.name != "tenant1/db" && flow.name != "payments");
    // A name that is resolved again, another address of it, and one that the app may no longer resolve.
    after.resolved = [found(3, "pay.example", &["45.200.0.2", "45.200.0.3"])].into_iter().collect();
    after.flows.get_mut(&AppId(1)).unwrap().push(flow("payments", outside("45.67.89.0/24"), 443));
    let (old, new) = (rules(&before), rules(&after));
    let known = prove(old.text(), &walls(2), &before).unwrap().into_table();
    let text = new.change(&old).unwrap();
    assert!(text.len() < 2000 && text.contains("delete element") && text.contains("add element"), "{text}");
    let proven = prove_change(text.clone(), &known, &walls(2), &after).unwrap().into_table();
    assert_eq!(proven, table(&new.text(), &shell()).unwrap());
    assert_eq!(new.withdrawn(&old).len(), 2 + 2 + 1);
    // Withdrawn elements must be deleted: a change that leaves them, or adds more, is refused.
    for line in text.lines().filter(|line| !(line.starts_with("add") && line.contains(" resolved "))) {
        let rest: String =
            text.lines().filter(|other| *other != line).map(|line| format!("{line}\n")).collect();
        assert!(prove_change(rest, &known, &walls(2), &after).is_err(), "without {line}");
    }
    for more in [
        "add element inet bulkhead_demo services { \"bkdemo0\" . 10.64.0.2 . 169.254.169.254 . tcp . 80 }",
        "delete element inet bulkhead_demo never { 169.254.0.0/16 }",
        "delete element inet bulkhead_demo sources { \"bkdemo5\" . 0a:58:0a:40:00:02 . 10.64.0.2 }",
        "add element inet other pairs { \"bkdemo0\" . 10.64.0.2 . 10.64.0.3 . tcp . 80 }",
        "add rule inet bulkhead_demo through accept",
        "flush ruleset",
        "",
    ] {
        assert!(prove_change(format!("{text}{more}\n"), &known, &walls(2), &after).is_err(), "{more}");
    }
}
