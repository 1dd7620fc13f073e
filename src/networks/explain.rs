//! Explains why a connection is denied and what would allow it, without revealing more than the tenant may
//! know.

use std::net::Ipv4Addr;

use serde::Serialize;

use super::{AppPlan, Service};
use crate::driver::workload::Subnet;
use crate::ids::{AppName, TenantName};
use crate::policy::never::{BUILT_IN, Range};
use crate::policy::{Cidr, Flow, Protocol, Target};

/// The destination of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// A name under `connects`.
    Name(String),
    /// An address.
    Address(Ipv4Addr),
}

/// The facts about a destination address.
#[derive(Debug)]
pub struct AddressFacts {
    /// The pool of tenants' addresses.
    pub pool: Cidr,
    /// The tenant's own subnet.
    pub subnet: Subnet,
    /// The tenant's own app at the address, if any.
    pub app: Option<AppName>,
    /// Services that the tenant may use.
    pub services: Vec<Service>,
    /// Ranges that the platform's configuration blocks.
    pub closed: Vec<Range>,
}

/// The explanation of a denied connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Closed {
    /// The destination, as far as the tenant may know.
    pub why: String,
    /// The step that would allow it; absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ask: Option<String>,
}

fn closed(why: impl Into<String>, ask: impl Into<Option<String>>) -> Closed {
    Closed { why: why.into(), ask: ask.into() }
}

/// Explains why packets to an address are denied.
#[must_use]
pub fn address(target: Ipv4Addr, protocol: Protocol, port: u16, known: &AddressFacts) -> Closed {
    if target == known.subnet.gateway() && port == 53 {
        return closed("the platform's own name server: it answers every app", None);
    }
    if target == known.subnet.gateway() {
        return closed("the platform's own machine: apps never reach it", None);
    }
    if let Some(app) = &known.app {
        let ask = format!("name {app} in connects.apps, and use its port");
        return closed(format!("the tenant's own app {app}, which this app does not name"), ask);
    }
    if known.subnet.contains(target) {
        return closed("an unused address of the tenant: no app has it", None);
    }
    if known.pool.contains(target) {
        let ask = "an owner there offers a grant, an owner here accepts it; then name it as TENANT/APP";
        return closed("an address of another tenant, or an unused one", ask.to_owned());
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
        let ask = (!range.is_own() && range.wall == crate::policy::never::ReservedKind::Private).then(|| {
            "if this is a platform service, ask the platform's admin to add it to the catalogue".to_owned()
        });
        return closed(format!("{} ({})", range.words, range.network), ask);
    }
    let ask = format!(
        "request an egress target for {target} {protocol} {port}; once it is approved, name it in connects.egress"
    );
    closed("an address outside the platform: only approved egress targets are allowed", ask)
}

/// Explains why packets to a destination that the app names now were denied. `own`: the destination is the
/// tenant's own app.
#[must_use]
pub fn allowed(name: &str, own: bool) -> Closed {
    let why = if own {
        format!(
            "{name}, which this app names: no instance had the address then, or the plan was not applied yet"
        )
    } else {
        format!("{name}, which this app names: the plan was not applied yet")
    };
    closed(why, None)
}

/// Explains why an allowed connection was rate limited.
#[must_use]
pub fn hasty() -> Closed {
    closed(
        "allowed, but rate limited: the tenant's apps open more connections at once than one tenant may",
        "reuse open connections; the platform's admin can raise the limit".to_owned(),
    )
}

/// Names the rules that may allow an address that no flow of the plan contains.
#[must_use]
pub fn unnamed(plan: &AppPlan, protocol: Protocol, port: u16, on_trial: bool) -> String {
    let may = |flow: &&Flow| {
        matches!(flow.target, Target::App { .. } | Target::Domain { .. })
            && (flow.protocol, flow.port) == (protocol, port)
    };
    let names: Vec<&str> = plan.flows.iter().filter(may).map(|flow| flow.name.as_str()).collect();
    match (names.as_slice(), on_trial) {
        ([], true) => "audit mode".to_owned(),
        ([], false) => "an applied rule".to_owned(),
        (names, _) => format!("{}, which leads there now", names.join(" or ")),
    }
}

/// Returns the flow of a plan that allows a destination, if any.
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
            // The plan does not know a domain's current addresses.
            (To::Address(_), Target::Domain { .. }) => false,
        };
        there && flow.protocol == protocol && flow.port == port
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(app: Option<&str>) -> AddressFacts {
        let now = time::OffsetDateTime::UNIX_EPOCH;
        AddressFacts {
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
