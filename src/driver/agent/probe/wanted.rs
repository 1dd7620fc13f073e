//! Lists the probes of an app: connections that must be denied, and connections that must be allowed.

use std::net::Ipv4Addr;
use std::sync::Arc;

use time::OffsetDateTime;

use super::ProbeInstance;
use crate::driver::ProbeOutcome;
use crate::driver::agent::app::AgentApp;
use crate::driver::agent::core::{Agent, lock};
use crate::policy::{Flow, Protocol, Target};

/// The port of a probe where no rule depends on the port.
const ANY: u16 = 1;
/// Metadata addresses of clouds, and a link-local one.
const METADATA: [Ipv4Addr; 4] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(169, 254, 1, 1),
];
/// An address in each private range.
const PRIVATE: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 255, 255, 254),
    Ipv4Addr::new(172, 31, 255, 254),
    Ipv4Addr::new(192, 168, 255, 254),
    Ipv4Addr::new(100, 127, 255, 254),
];
/// An outside address without a host: relays of 6to4 were deprecated (RFC 7526).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 88, 99, 1);
/// Maximum number of an app's flows that are probed.
const FLOWS: usize = 8;
/// Label of another tenant's instance.
pub(super) const FOREIGN: &str = "an app of another tenant";

/// A probe.
#[derive(Debug, Clone)]
pub(super) struct Try {
    pub(super) what: String,
    pub(super) address: Ipv4Addr,
    pub(super) protocol: Protocol,
    pub(super) port: u16,
    pub(super) open: bool,
    /// The target instance, if it is one of this machine.
    pub(super) peer: Option<ProbeInstance>,
}

impl Try {
    /// Returns whether two probes have the same target.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.address, self.protocol, self.port, self.open)
            == (other.address, other.protocol, other.port, other.open)
    }

    /// Returns whether an outcome is a fault. A timeout on an allowed flow is not: the target may be busy or down.
    /// Between instances a denial always comes from this machine.
    pub(super) fn is_bad(&self, outcome: ProbeOutcome) -> bool {
        match outcome {
            outcome if !self.open => outcome.is_through(),
            ProbeOutcome::Prohibited => true,
            ProbeOutcome::Unreachable => self.peer.is_some(),
            _ => false,
        }
    }
}

/// An app to probe from.
pub(super) struct From {
    pub(super) app: Arc<AgentApp>,
    pub(super) place: ProbeInstance,
    pub(super) flows: Vec<Flow>,
    pub(super) gateway: Ipv4Addr,
}

impl Agent {
    /// Returns the connections that must be denied to an app by any plan, except those that its plan allows.
    pub(super) fn must_close(&self, from: &From) -> Vec<Try> {
        let tcp = |what: &str, address, port| Try {
            what: what.to_owned(),
            address,
            protocol: Protocol::Tcp,
            port,
            open: false,
            peer: None,
        };
        let mut out: Vec<Try> = METADATA.iter().map(|at| tcp("metadata", *at, ANY)).collect();
        out.push(tcp("this machine", from.gateway, ANY));
        out.extend(self.walls().own.first().map(|own| tcp("this machine", *own, ANY)));
        // The same foreign addresses for every app: the probes reveal no other tenant's addresses.
        let (pool, prefix) = (self.config.network_pool, self.config.subnet_prefix);
        let others = [pool.part(prefix, 0), pool.part(prefix, 1)].into_iter().flatten();
        if let Some(other) = others.into_iter().find(|other| other.gateway() != from.gateway) {
            out.push(tcp("another tenant's name server", other.gateway(), 53));
            out.extend(other.nth(2).map(|at| tcp("another tenant", at, ANY)));
        }
        out.extend(
            PRIVATE.iter().filter(|at| !pool.contains(**at)).map(|at| tcp("a private range", *at, ANY)),
        );
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if !lock(&self.flows).on_trial(&from.app.tenant, now) {
            out.push(tcp("an address outside", OUTSIDE, ANY));
            out.push(Try { protocol: Protocol::Udp, ..tcp("an outside name server", OUTSIDE, 53) });
        }
        out.extend(self.neighbour(from, true));
        out.extend(self.neighbour(from, false));
        let opens = |to: &Try| {
            from.flows.iter().any(|flow| {
                let there = match &flow.target {
                    Target::Service { network } | Target::Outside { network } => network.contains(to.address),
                    Target::App { .. } | Target::Domain { .. } => false,
                };
                there && (flow.protocol, flow.port) == (to.protocol, to.port)
            })
        };
        out.retain(|to| !opens(to));
        out
    }

    /// Returns an instance of an app that this app does not name: of the own tenant, or of another.
    fn neighbour(&self, from: &From, own: bool) -> Option<Try> {
        let mut apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.sort_by_key(|app| app.id);
        apps.into_iter()
            .filter(|app| app.id != from.app.id && (app.tenant == from.app.tenant) == own)
            .filter(|app| {
                let names =
                    |flow: &Flow| matches!(&flow.target, Target::App { app: to, .. } if *to == app.id);
                !from.flows.iter().any(names)
            })
            .find_map(|app| {
                let port = lock(&app.kept).workload.port?;
                let peer = self.places(&app.tenant, app.id).into_iter().next()?;
                let what = if own { "an app that it does not name" } else { FOREIGN };
                Some(Try {
                    what: what.to_owned(),
                    address: peer.address,
                    protocol: Protocol::Tcp,
                    port,
                    open: false,
                    peer: Some(peer),
                })
            })
    }

    /// Returns the connections that an app's plan allows. Counted flows are left out: the count must only contain
    /// the app's own packets.
    pub(super) fn must_open(&self, from: &From) -> Vec<Try> {
        let counted = lock(&self.flows).watched(&from.app.tenant, from.app.id).to_vec();
        // The name does not matter: counters have none.
        let is_counted = |flow: &Flow| {
            let network = |flow: &Flow| match flow.target {
                Target::Service { network } => Some(network),
                _ => None,
            };
            let same = |own: &&Flow| (own.protocol, own.port) == (flow.protocol, flow.port);
            counted.iter().filter(same).any(|own| match (network(own), network(flow)) {
                (Some(own), Some(to)) => own.overlaps(to),
                _ => false,
            })
        };
        let tcp = |flow: &&Flow| flow.protocol == Protocol::Tcp && !is_counted(flow);
        from.flows
            .iter()
            .filter(tcp)
            .filter_map(|flow| {
                let (address, peer) = match &flow.target {
                    Target::App { tenant, app } => {
                        let peer = self.places(tenant, *app).into_iter().next()?;
                        (peer.address, Some(peer))
                    }
                    Target::Service { network } => (network.single()?, None),
                    // Hosts outside must not receive a connection every minute.
                    Target::Outside { .. } | Target::Domain { .. } => return None,
                };
                let (what, protocol, port) = (flow.name.clone(), flow.protocol, flow.port);
                Some(Try { what, address, protocol, port, open: true, peer })
            })
            .take(FLOWS)
            .collect()
    }
}
