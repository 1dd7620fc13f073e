//! Who may ask how much at once. Every room is given per instance, then per tenant, then in all; a tenant is known by
//! its bridge. Room is held while something is answered: a silent connection holds none but its own.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::permits::{FairPermits, Permit};

/// Questions that are answered at once: of an instance, of a tenant, in all.
const QUESTIONS: (usize, usize, usize) = (32, 64, 512);
/// Connections: of an instance, of a tenant, in all.
const CONNECTIONS: (usize, usize, usize) = (8, 64, 1024);
/// Look-ups outside: of a tenant and in all.
const OUTSIDE: (usize, usize) = (16, 128);
/// Questions to the agent: of a tenant and in all. The agent answers 256 at once; what is left is for the resolver's
/// own question where to listen.
const AGENT: (usize, usize) = (32, 192);

/// An instance: the bridge of its tenant, and its address.
pub(super) type Instance = (Ipv4Addr, Ipv4Addr);

/// Room per instance within room per tenant.
struct Nested {
    instances: FairPermits<Instance>,
    tenants: FairPermits<Ipv4Addr>,
}

/// A place in both.
pub(super) struct Place {
    _instance: Permit<Instance>,
    _tenant: Permit<Ipv4Addr>,
}

impl Nested {
    fn new((instance, tenant, all): (usize, usize, usize)) -> Self {
        // The total is the tenants': here, each instance alone is bounded.
        Self { instances: FairPermits::new(instance, usize::MAX), tenants: FairPermits::new(tenant, all) }
    }

    fn take(&self, instance: Instance) -> Option<Place> {
        let own = self.instances.try_take(&instance).ok()?;
        let tenant = self.tenants.try_take(&instance.0).ok()?;
        Some(Place { _instance: own, _tenant: tenant })
    }
}

/// All rooms.
pub(super) struct Rooms {
    questions: Nested,
    connections: Nested,
    outside: FairPermits<Ipv4Addr>,
    agent: FairPermits<Ipv4Addr>,
}

impl Rooms {
    pub(super) fn new() -> Self {
        Self {
            questions: Nested::new(QUESTIONS),
            connections: Nested::new(CONNECTIONS),
            outside: FairPermits::new(OUTSIDE.0, OUTSIDE.1),
            agent: FairPermits::new(AGENT.0, AGENT.1),
        }
    }

    /// For a question, while it is answered. An instance that asks faster is not queued: it asks again by itself.
    pub(super) fn question(&self, instance: Instance) -> Option<Place> {
        self.questions.take(instance)
    }

    /// For a connection, as long as it stands.
    pub(super) fn connection(&self, instance: Instance) -> Option<Place> {
        self.connections.take(instance)
    }

    /// For a look-up outside.
    pub(super) async fn outside(&self, gateway: Ipv4Addr) -> Option<Permit<Ipv4Addr>> {
        self.outside.take(&gateway, Duration::from_secs(1)).await.ok()
    }

    /// For a question to the agent.
    pub(super) async fn agent(&self, gateway: Ipv4Addr) -> Option<Permit<Ipv4Addr>> {
        self.agent.take(&gateway, Duration::from_secs(1)).await.ok()
    }
}
