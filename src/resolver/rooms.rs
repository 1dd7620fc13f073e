//! Limits concurrent work per instance, then per tenant, then in total. A tenant is identified by its bridge. A
//! permit is held only during an answer: an idle connection holds only its own connection permit.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::permits::{FairPermits, Permit};

/// Concurrent queries: per instance, per tenant, in total.
const QUESTIONS: (usize, usize, usize) = (32, 64, 512);
/// Connections: per instance, per tenant, in total.
const CONNECTIONS: (usize, usize, usize) = (8, 64, 1024);
/// Outside look-ups: per tenant and in total.
const OUTSIDE: (usize, usize) = (16, 128);
/// Questions to the agent: per tenant and in total. The agent answers 256 at once; the rest is for the resolver's
/// own question where to listen.
const AGENT: (usize, usize) = (32, 192);

/// An instance: the bridge of its tenant, and its address.
pub(super) type InstanceKey = (Ipv4Addr, Ipv4Addr);

/// A limit per instance within a limit per tenant.
struct Nested {
    instances: FairPermits<InstanceKey>,
    tenants: FairPermits<Ipv4Addr>,
}

/// A permit of both limits.
pub(super) struct NestedPermit {
    _instance: Permit<InstanceKey>,
    _tenant: Permit<Ipv4Addr>,
}

impl Nested {
    fn new((instance, tenant, all): (usize, usize, usize)) -> Self {
        // The total applies to tenants; instances only have a limit each.
        Self { instances: FairPermits::new(instance, usize::MAX), tenants: FairPermits::new(tenant, all) }
    }

    fn take(&self, instance: InstanceKey) -> Option<NestedPermit> {
        let own = self.instances.try_take(&instance).ok()?;
        let tenant = self.tenants.try_take(&instance.0).ok()?;
        Some(NestedPermit { _instance: own, _tenant: tenant })
    }
}

/// All limits.
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

    /// Takes a permit for a query. An instance above its limit is not queued: it retries by itself.
    pub(super) fn question(&self, instance: InstanceKey) -> Option<NestedPermit> {
        self.questions.take(instance)
    }

    /// Takes a permit for a connection.
    pub(super) fn connection(&self, instance: InstanceKey) -> Option<NestedPermit> {
        self.connections.take(instance)
    }

    /// Takes a permit for an outside look-up.
    pub(super) async fn outside(&self, gateway: Ipv4Addr) -> Option<Permit<Ipv4Addr>> {
        self.outside.take(&gateway, Duration::from_secs(1)).await.ok()
    }

    /// Takes a permit for a question to the agent.
    pub(super) async fn agent(&self, gateway: Ipv4Addr) -> Option<Permit<Ipv4Addr>> {
        self.agent.take(&gateway, Duration::from_secs(1)).await.ok()
    }
}
