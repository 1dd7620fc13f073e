//! Tests that plan verification finds planted faults.

use super::*;
use crate::apps::spec::Connects;
use crate::ids::AppId;
use crate::networks::compile::compile;
use crate::networks::{Approved, Endpoint, Granted};
use crate::policy::Protocol;

fn facts() -> PlanFacts {
    let connects = |services: &[&str], apps: &[&str], egress: &[&str]| Connects {
        services: services.iter().map(|name| name.parse().unwrap()).collect(),
        apps: apps.iter().map(|name| name.parse().unwrap()).collect(),
        egress: egress.iter().map(|name| name.parse().unwrap()).collect(),
    };
    let app = |id, name: &str, port, connects| Connecting {
        id: AppId(id),
        name: name.parse().unwrap(),
        port: Option::<u16>::map(port, Serves::tcp),
        connects,
    };
    let end =
        |network: &str, port| Endpoint { network: network.parse().unwrap(), protocol: Protocol::Tcp, port };
    PlanFacts {
        tenant: "acme".parse().unwrap(),
        apps: vec![
            app(1, "api", Some(8080), Connects::default()),
            app(2, "job", None, Connects::default()),
            app(
                3,
                "web",
                Some(8080),
                connects(
                    &["kafka", "search"],
                    &["api", "job", "beta/db", "beta/log"],
                    &["payments", "mail", "pay"],
                ),
            ),
        ],
        windows: Vec::new(),
        services: vec![
            ("kafka".parse().unwrap(), vec![end("10.5.0.2", 9092), end("10.5.0.3", 9092)]),
            ("vault".parse().unwrap(), vec![end("10.5.0.9", 8200)]),
        ],
        grants: vec![
            Granted {
                tenant: "beta".parse().unwrap(),
                app: "db".parse().unwrap(),
                id: AppId(9),
                port: Some(Serves::tcp(5432)),
                only: None,
                until: Some(4_000_000_000),
            },
            Granted {
                tenant: "beta".parse().unwrap(),
                app: "log".parse().unwrap(),
                id: AppId(10),
                port: Some(Serves::tcp(514)),
                only: Some("api".parse().unwrap()),
                until: None,
            },
        ],
        egress: vec![
            Approved {
                name: "payments".parse().unwrap(),
                place: EgressTarget::Network("45.67.89.0/24".parse().unwrap()),
                protocol: Protocol::Tcp,
                ports: vec![443, 8443],
                until: None,
            },
            Approved {
                name: "pay".parse().unwrap(),
                place: EgressTarget::Domain("pay.example.org".parse().unwrap()),
                protocol: Protocol::Tcp,
                ports: vec![443],
                until: None,
            },
        ],
        trial: None,
        ends: None,
    }
}

fn pool() -> Cidr {
    "10.64.0.0/12".parse().unwrap()
}

#[test]
fn what_is_compiled_is_justified_and_what_is_not_to_be_had_is_told() {
    let facts = facts();
    let (plans, gaps) = compile(&facts);
    justify(&facts, &plans, &gaps, pool()).unwrap();
    let web = plans.iter().find(|plan| plan.name.as_str() == "web").unwrap();
    let mut names: Vec<&str> = web.flows.iter().map(|flow| flow.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["api", "beta/db", "kafka", "kafka", "pay", "payments", "payments"]);
    let told: Vec<(&str, &str)> = gaps.iter().map(|gap| (gap.name.as_str(), gap.why)).collect();
    assert_eq!(
        told,
        [
            ("job", "the app serves on no port"),
            ("beta/log", "the app is not granted, or the grant has ended"),
            ("search", "the tenant may not use this service"),
            (
                "mail",
                "the egress target is not approved, has expired, or is blocked by the platform's configuration"
            ),
        ]
    );
    assert!(plans.iter().filter(|plan| plan.name.as_str() != "web").all(|plan| plan.flows.is_empty()));
}

#[test]
fn an_app_is_reached_by_the_protocol_that_it_serves() {
    let mut facts = facts();
    facts.apps[0].port = Some(Serves { protocol: Protocol::Udp, port: 5514 });
    let (mut plans, gaps) = compile(&facts);
    let flow = |plans: &mut [AppPlan]| plans[2].flows.iter().position(|flow| flow.name == "api").unwrap();
    let n = flow(&mut plans);
    assert_eq!((plans[2].flows[n].protocol, plans[2].flows[n].port), (Protocol::Udp, 5514));
    assert_eq!(justify(&facts, &plans, &gaps, pool()), Ok(()));
    plans[2].flows[n].protocol = Protocol::Tcp;
    assert!(justify(&facts, &plans, &gaps, pool()).is_err());
}

#[test]
fn planted_flows_are_found() {
    let facts = facts();
    let (plans, gaps) = compile(&facts);
    let target = |network: &str| Target::Service { network: network.parse().unwrap() };
    let outside = |network: &str| Target::Outside { network: network.parse().unwrap() };
    let domain = |name: &str| Target::Domain { domain: name.parse().unwrap() };
    let app = |tenant: &str, id| Target::App { tenant: tenant.parse().unwrap(), app: AppId(id) };
    for (n, name, to, protocol, port) in [
        (0, "kafka", target("10.5.0.2"), Protocol::Tcp, 9092),
        (2, "vault", target("10.5.0.9"), Protocol::Tcp, 8200),
        (2, "kafka", target("10.5.0.9"), Protocol::Tcp, 9092),
        (2, "kafka", target("10.5.0.2"), Protocol::Tcp, 9093),
        (2, "kafka", target("10.5.0.2"), Protocol::Udp, 9092),
        (2, "kafka", target("10.5.0.0/24"), Protocol::Tcp, 9092),
        (2, "payments", outside("45.67.0.0/16"), Protocol::Tcp, 443),
        (2, "payments", outside("45.67.89.0/24"), Protocol::Tcp, 22),
        (2, "payments", outside("0.0.0.0/0"), Protocol::Tcp, 443),
        (2, "payments", target("45.67.89.0/24"), Protocol::Tcp, 443),
        (2, "pay", domain("other.example.org"), Protocol::Tcp, 443),
        (2, "pay", domain("pay.example.org"), Protocol::Tcp, 80),
        (2, "payments", domain("pay.example.org"), Protocol::Tcp, 443),
        (1, "pay", domain("pay.example.org"), Protocol::Tcp, 443),
        (2, "mail", outside("45.67.89.0/24"), Protocol::Tcp, 443),
        (2, "beta/db", app("beta", 9), Protocol::Tcp, 5432),
        (2, "beta/db", app("beta", 10), Protocol::Tcp, 5432),
        (2, "beta/db", app("beta", 9), Protocol::Tcp, 5433),
        (2, "beta/db", app("gamma", 9), Protocol::Tcp, 5432),
        (2, "beta/log", app("beta", 10), Protocol::Tcp, 514),
        (2, "api", app("acme", 3), Protocol::Tcp, 8080),
        (2, "api", app("beta", 1), Protocol::Tcp, 8080),
        (2, "api", app("acme", 1), Protocol::Udp, 8080),
        (1, "api", app("acme", 1), Protocol::Tcp, 8080),
    ] {
        let mut planted = plans.clone();
        planted[n].flows.push(Flow { name: name.into(), target: to, protocol, port, until: None });
        assert!(justify(&facts, &planted, &gaps, pool()).is_err(), "{:?}", planted[n].flows.last());
    }
}

#[test]
fn what_was_decided_is_not_left_out() {
    let facts = facts();
    let (plans, gaps) = compile(&facts);
    for n in 0..plans[2].flows.len() {
        let mut less = plans.clone();
        let gone = less[2].flows.remove(n);
        assert!(justify(&facts, &less, &gaps, pool()).is_err(), "without {gone:?}");
    }
    assert!(justify(&facts, &plans[..2], &gaps, pool()).is_err());
    let mut other = plans.clone();
    other[0].app = AppId(77);
    assert!(justify(&facts, &other, &gaps, pool()).is_err());
}

#[test]
fn a_service_that_came_to_lie_behind_a_wall_is_not_opened() {
    let mut facts = facts();
    facts.services[0].1[0].network = "10.64.0.2".parse().unwrap();
    let (plans, gaps) = compile(&facts);
    assert!(justify(&facts, &plans, &gaps, pool()).unwrap_err().contains("reserved range"));
    facts.services[0].1[0].network = "169.254.169.254".parse().unwrap();
    let (plans, gaps) = compile(&facts);
    assert!(justify(&facts, &plans, &gaps, pool()).is_err());
}
