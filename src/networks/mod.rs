//! Network policy of tenants: the catalogue of platform services, grants between tenants, egress targets, and
//! the plans compiled from them.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::apps::connections::Connecting;
use crate::driver::workload::Serves;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{AppId, AppName, DomainName, EgressName, ServiceName, TenantName};
use crate::policy::never::{self, Range};
use crate::policy::{Cidr, Flow, Protocol, Target};

pub mod actions;
pub mod api;
pub mod compile;
pub mod connections;
pub mod console;
pub mod explain;
pub mod justify;
pub mod probe;
pub mod reconcile;
pub mod rollouts;
mod store;

fn tcp() -> Protocol {
    Protocol::Tcp
}

/// An address range and port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Addresses. A single address may lie in a private range.
    pub network: Cidr,
    /// Protocol.
    #[serde(default = "tcp")]
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

impl Endpoint {
    /// Reports whether one of `others` contains this endpoint.
    #[must_use]
    pub fn is_among(&self, others: &[Self]) -> bool {
        others.iter().any(|other| {
            other.network.holds(self.network) && (other.protocol, other.port) == (self.protocol, self.port)
        })
    }
}

/// A platform service in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Name.
    pub name: ServiceName,
    /// Description for users.
    pub description: String,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Raised by each change.
    pub generation: i64,
    /// When it was created.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it was last changed.
    #[serde(with = "time::serde::rfc3339")]
    pub changed_at: OffsetDateTime,
}

/// The addresses or the domain of an egress target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EgressTarget {
    /// Addresses.
    Network(Cidr),
    /// A domain: the addresses that it resolves to, until they expire.
    Domain(DomainName),
}

impl EgressTarget {
    /// Returns the flow target for it.
    #[must_use]
    pub fn target(&self) -> Target {
        match self {
            Self::Network(network) => Target::Outside { network: *network },
            Self::Domain(domain) => Target::Domain { domain: domain.clone() },
        }
    }

    /// Reads it from the two columns, one of which is null.
    fn of(network: Option<&str>, domain: Option<&str>) -> Option<Self> {
        match (network, domain) {
            (Some(network), None) => Some(Self::Network(network.parse().ok()?)),
            (None, Some(domain)) => Some(Self::Domain(domain.parse().ok()?)),
            _ => None,
        }
    }
}

impl std::fmt::Display for EgressTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Domain(domain) => domain.fmt(f),
        }
    }
}

/// An approved egress target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approved {
    /// The tenant's name for it.
    pub name: EgressName,
    /// Addresses or domain.
    pub place: EgressTarget,
    /// Protocol.
    pub protocol: Protocol,
    /// Ports.
    pub ports: Vec<u16>,
    /// When it expires, in seconds since 1970.
    pub until: Option<i64>,
}

impl Approved {
    /// Returns the range that still blocks the target, if any. `walls`: the machine's ranges.
    #[must_use]
    pub fn behind(&self, walls: &[Range]) -> Option<Range> {
        match &self.place {
            EgressTarget::Network(network) => never::against_outside(*network, walls),
            // The resolver checks a domain's addresses at each lookup.
            EgressTarget::Domain(_) => None,
        }
    }
}

/// Another tenant's app whose grant was offered and accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The tenant that owns the app.
    pub tenant: TenantName,
    /// Its name.
    pub app: AppName,
    /// The app's id.
    pub id: AppId,
    /// Its protocol and port; `None` if it serves on no port.
    pub port: Option<Serves>,
    /// The only app that may use the grant; `None` for all apps of the tenant.
    pub only: Option<AppName>,
    /// When the grant expires, in seconds since 1970.
    pub until: Option<i64>,
}

/// The decisions from which one tenant's plan is compiled.
#[derive(Debug, Clone)]
pub struct PlanFacts {
    /// Tenant.
    pub tenant: TenantName,
    /// Its apps.
    pub apps: Vec<Connecting>,
    /// Services that it may use.
    pub services: Vec<(ServiceName, Vec<Endpoint>)>,
    /// Services with a pending change, and their coming endpoints. Use of the endpoints that go away is
    /// counted until then.
    pub windows: Vec<(ServiceName, Vec<Endpoint>)>,
    /// Apps of other tenants whose grants this tenant accepted.
    pub grants: Vec<Granted>,
    /// Approved egress targets.
    pub egress: Vec<Approved>,
    /// End of audit mode, in seconds since 1970.
    pub trial: Option<i64>,
    /// When the first of these expires.
    pub ends: Option<OffsetDateTime>,
}

/// The allowed flows of one app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppPlan {
    /// App.
    pub app: AppId,
    /// Its name.
    pub name: AppName,
    /// Its flows.
    pub flows: Vec<Flow>,
}

/// Checks that an address range does not touch the tenants' pool or `wall`, the reserved range that it
/// overlaps.
pub(crate) fn check_network(network: Cidr, path: &str, wall: Option<Range>, pool: Cidr) -> Result<(), Fault> {
    let fault = |message: String| Err(Fault::new(Code(426), Kind::Invalid, path, message));
    if network.overlaps(pool) {
        return fault("these are addresses of tenants: name the app in connects.apps instead".to_owned());
    }
    match wall {
        None => Ok(()),
        // The message does not reveal which addresses the machine has.
        Some(range) if range.is_own() => {
            fault(format!("{network} touches {}: it is always denied", range.words))
        }
        Some(range) if range.wall == never::ReservedKind::Private => fault(format!(
            "{} is {}: only a single address of a service is allowed there",
            range.network, range.words
        )),
        Some(range) => fault(format!("{} is {}: it is always denied", range.network, range.words)),
    }
}

/// Deletes rows past their retention.
pub async fn prune(pool: &sqlx::PgPool) -> Result<(), crate::error::Error> {
    let mut conn = pool.acquire().await?;
    store::prune(&mut conn).await?;
    store::prune_rollouts(&mut conn).await
}
