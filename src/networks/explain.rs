//! Why something is closed, and what to ask for: in words, from what the tenant may know.

use std::net::Ipv4Addr;

use serde::Serialize;

use super::{AppPlan, Service};
use crate::driver::workload::Subnet;
use crate::ids::{AppName, TenantName};
use crate::policy::never::{BUILT_IN, Range};
use crate::policy::{Cidr, Flow, Protocol, Target};

/// Where somebody wants to get to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// Under a name of `connects`.
    Name(String),
    /// An address.
    Address(Ipv4Addr),
}

/// What is known about an address that packets were sent to.
#[derive(Debug)]
pub struct Known {
    /// The pool of tenants' addresses.
    pub pool: Cidr,
    /// The tenant's own subnet.
    pub subnet: Subnet,
    /// The own app that has the address.
    pub app: Option<AppName>,
    /// Services that the tenant may use.
    pub services: Vec<Service>,
    /// What the platform's configuration closes.
    pub closed: Vec<Range>,
}

/// Why it is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Closed {
    /// What is there, as far as the tenant may know.
    pub why: String,
    /// What would open it; absent where nothing does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ask: Option<String>,
}

fn closed(why: impl Into<String>, ask: impl Into<Option<String>>) -> Closed {
    Closed { why: why.into(), ask: ask.into() }
}

/// Why packets to an address are not let through.
#[must_use]
pub fn address(target: Ipv4Addr, protocol: Protocol, port: u16, known: &Known) -> Closed {
    if target == known.subnet.gateway() && port == 53 {
        return closed("the platform's own name server: names are answered there to every app", None);
    }
    if target == known.subnet.gateway() {
        return closed("the platform's own machine: nothing of it is reachable", None);
    }
    if let Some(app) = &known.app {
        let ask = format!("name {app} in connects.apps, and use the port that it serves on");
        return closed(format!("the own app {app}, which this app does not name"), ask);
    }
    if known.subnet.contains(target) {
        return closed("an address of the tenant that no app has", None);
    }
    if known.pool.contains(target) {
        let ask = "its owner can offer a grant; an owner here accepts it, and the app names it as TENANT/APP";
        return closed("an address of another tenant, or of none", ask.to_owned());
    }
    let at = |service: &&Service| service.endpoints.iter().any(|endpoint| endpoint.network.contains(target));
    if let Some(service) = known.services.iter().find(at) {
        let exact = service
            .endpoints
            .iter()
            .any(|e| e.network.contains(target) && e.port == port && e.protocol == protocol);
        return if exact {
            let ask = format!("name {} in connects.services", service.name);
            closed(format!("the service {}, which this app does not name", service.name), ask)
        } else {
            closed(format!("the service {}, which does not answer on {protocol} {port}", service.name), None)
        };
    }
    if let Some(range) = BUILT_IN
        .iter()
        .chain(&known.closed)
        .filter(|range| range.network.contains(target))
        .max_by_key(|range| range.network.prefix())
    {
        let ask = (!range.is_own() && range.wall == crate::policy::never::Wall::Private).then(|| {
            "if a platform service is there, the platform's admin puts it into the catalogue".to_owned()
        });
        return closed(format!("{} ({})", range.words, range.network), ask);
    }
    let ask = format!(
        "ask for an egress target with {target} {protocol} {port}; once approved, name it in connects.egress"
    );
    closed("the outside, which is closed but for approved targets", ask)
}

/// Why packets were not let through to what the app names by now; `own`: to an address of an app of its tenant.
#[must_use]
pub fn allowed(name: &str, own: bool) -> Closed {
    let why = if own {
        format!(
            "{name}, which this app names: no instance of it had the address then, or the plan was not in force yet"
        )
    } else {
        format!("{name}, which this app names: the plan was not in force yet")
    };
    closed(why, None)
}

/// Why packets are not let through that begin a connection which is allowed.
#[must_use]
pub fn hasty() -> Closed {
    closed(
        "allowed, but the tenant's apps begin more connections at once than this machine takes from one tenant",
        "keep connections open instead of beginning new ones; the platform's admin can set another number"
            .to_owned(),
    )
}

/// What may open an address that no name of the plan says, and that the rules in force do open.
#[must_use]
pub fn unnamed(plan: &AppPlan, protocol: Protocol, port: u16, on_trial: bool) -> String {
    let may = |flow: &&Flow| {
        matches!(flow.target, Target::App { .. } | Target::Domain { .. })
            && (flow.protocol, flow.port) == (protocol, port)
    };
    let names: Vec<&str> = plan.flows.iter().filter(may).map(|flow| flow.name.as_str()).collect();
    match (names.as_slice(), on_trial) {
        ([], true) => "the trial".to_owned(),
        ([], false) => "a rule that is in force".to_owned(),
        (names, _) => format!("{}, which leads there now", names.join(" or ")),
    }
}

/// The flow of a plan that leads somewhere, if one does.
#[must_use]
pub fn flow<'a>(
    plan: &'a AppPlan,
    to: &To,
    (protocol, port): (Protocol, u16),
    at: Option<(&TenantName, crate::ids::AppId)>,
) -> Option<&'a Flow> {
    plan.flows.iter().find(|flow| {
        let there = match (to, &flow.target) {
            (To::Name(name), Target::Domain { domain }) => flow.name == *name || domain.as_str() == name,
            (To::Name(name), _) => flow.name == *name,
            (To::Address(address), Target::Service { network } | Target::Outside { network }) => {
                network.contains(*address)
            }
            (To::Address(_), Target::App { tenant, app }) => at == Some((tenant, *app)),
            // Which addresses a name has now, the plan does not know.
            (To::Address(_), Target::Domain { .. }) => false,
        };
        there && flow.protocol == protocol && flow.port == port
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(app: Option<&str>) -> Known {
        let now = time::OffsetDateTime::UNIX_EPOCH;
        Known {
            pool: "10.64.0.0/12".parse().unwrap(),
            subnet: "10.64.0.0/22".parse().unwrap(),
            app: app.map(|app| app.parse().unwrap()),
            closed: vec![crate::policy::never::configured("45.67.0.0/16".parse().unwrap())],
            services: vec![Service {
                name: "kafka".parse().unwrap(),
                description: String::new(),
                endpoints: vec![super::super::Endpoint {
                    network: "10.5.0.2".parse().unwrap(),
                    protocol: Protocol::Tcp,
                    port: 9092,
                }],
                generation: 1,
                created_at: now,
                changed_at: now,
            }],
        }
    }

    #[test]
    fn every_sort_of_address_is_told_as_what_it_is() {
        for (target, port, app, why, ask) in [
            ("10.64.0.1", 22, None, "own machine", None),
            ("10.64.0.9", 8080, Some("api"), "own app api", Some("connects.apps")),
            ("10.64.0.9", 8080, None, "no app has", None),
            ("10.64.4.2", 8080, None, "another tenant", Some("grant")),
            ("10.5.0.2", 9092, None, "service kafka", Some("connects.services")),
            ("10.5.0.2", 22, None, "does not answer", None),
            ("10.5.0.3", 22, None, "private", Some("catalogue")),
            ("169.254.169.254", 80, None, "link-local", None),
            ("168.63.129.16", 80, None, "metadata", None),
            ("100.100.100.200", 80, None, "metadata", None),
            ("45.67.8.9", 443, None, "configuration", Some("catalogue")),
            ("1.1.1.1", 443, None, "outside", Some("egress target")),
        ] {
            let told = address(target.parse().unwrap(), Protocol::Tcp, port, &known(app));
            assert!(told.why.contains(why), "{target}: {told:?}");
            assert_eq!(told.ask.is_some(), ask.is_some(), "{target}: {told:?}");
            assert!(ask.is_none_or(|ask| told.ask.unwrap().contains(ask)), "{target}");
        }
    }
}
