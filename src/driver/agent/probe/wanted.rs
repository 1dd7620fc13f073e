//! What is tried from an app: what must be closed to it, and what must be open.

use std::net::Ipv4Addr;
use std::sync::Arc;

use time::OffsetDateTime;

use super::Place;
use crate::driver::ProbeOutcome;
use crate::driver::agent::app::App;
use crate::driver::agent::core::{Agent, lock};
use crate::policy::{Flow, Protocol, Target};

/// The port that is tried where no wall looks at ports.
const ANY: u16 = 1;
/// Metadata of clouds, and link-local beside it.
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
/// An address outside at which nobody has been since relays of 6to4 were given up (RFC 7526).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 88, 99, 1);
/// Most flows of an app that are tried.
const FLOWS: usize = 8;
/// What an instance of somebody else is called.
pub(super) const FOREIGN: &str = "an app of another tenant";

/// Something to be tried.
#[derive(Debug, Clone)]
pub(super) struct Try {
    pub(super) what: String,
    pub(super) address: Ipv4Addr,
    pub(super) protocol: Protocol,
    pub(super) port: u16,
    pub(super) open: bool,
    /// The instance that is there, where it is one of ours.
    pub(super) peer: Option<Place>,
}

impl Try {
    /// Whether it is the same as another one.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.address, self.protocol, self.port, self.open)
            == (other.address, other.protocol, other.port, other.open)
    }

    /// Whether an outcome is not as it must be. Silence, where it must be open, is somebody who is busy or away;
    /// between instances no refusal is anybody's but this machine's.
    pub(super) fn is_bad(&self, outcome: ProbeOutcome) -> bool {
        match outcome {
            outcome if !self.open => outcome.is_through(),
            ProbeOutcome::Prohibited => true,
            ProbeOutcome::Unreachable => self.peer.is_some(),
            _ => false,
        }
    }
}

/// An app to try from.
pub(super) struct From {
    pub(super) app: Arc<App>,
    pub(super) place: Place,
    pub(super) flows: Vec<Flow>,
    pub(super) gateway: Ipv4Addr,
}

impl Agent {
    /// What must be closed to an app, whatever its plan says; what its plan opens is left out.
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
        // Of the others' addresses the same ones for everybody: what is tried tells nobody who is where.
        let (pool, prefix) = (self.config.network_pool, self.config.subnet_prefix);
        let others = [pool.part(prefix, 0), pool.part(prefix, 1)].into_iter().flatten();
        if let Some(other) = others.into_iter().find(|other| other.gateway() != from.gateway) {
            out.push(tcp("the name server of others", other.gateway(), 53));
            out.extend(other.nth(2).map(|at| tcp("another tenant", at, ANY)));
        }
        out.extend(
            PRIVATE.iter().filter(|at| !pool.contains(**at)).map(|at| tcp("a private range", *at, ANY)),
        );
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if !lock(&self.flows).on_trial(&from.app.tenant, now) {
            out.push(tcp("the outside", OUTSIDE, ANY));
            out.push(Try { protocol: Protocol::Udp, ..tcp("another name server", OUTSIDE, 53) });
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

    /// An instance of an app that this one does not name: of the own tenant, or of another.
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

    /// What must be open to an app by its plan. What is counted is left alone: the count is the app's.
    pub(super) fn must_open(&self, from: &From) -> Vec<Try> {
        let counted = lock(&self.flows).watched(&from.app.tenant, from.app.id).to_vec();
        // Under whatever name: a count knows none.
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
                    // Whoever is there outside is not to be knocked at each minute.
                    Target::Outside { .. } | Target::Domain { .. } => return None,
                };
                let (what, protocol, port) = (flow.name.clone(), flow.protocol, flow.port);
                Some(Try { what, address, protocol, port, open: true, peer })
            })
            .take(FLOWS)
            .collect()
    }
}
