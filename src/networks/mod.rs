//! Who may talk to whom beyond a tenant's own apps: the catalogue of platform services, grants between
//! tenants, the outside; and the plans that follow from all of it.

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

/// Where a service answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Its addresses; a single one may lie in a private range.
    pub network: Cidr,
    /// Protocol.
    #[serde(default = "tcp")]
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

impl Endpoint {
    /// Whether one of these is, or holds, all of this.
    #[must_use]
    pub fn is_among(&self, others: &[Self]) -> bool {
        others.iter().any(|other| {
            other.network.holds(self.network) && (other.protocol, other.port) == (self.protocol, self.port)
        })
    }
}

/// A platform service, as the catalogue has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Name.
    pub name: ServiceName,
    /// What it is, for people.
    pub description: String,
    /// Where it answers.
    pub endpoints: Vec<Endpoint>,
    /// Raised by each change.
    pub generation: i64,
    /// When it came into the catalogue.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it was last changed.
    #[serde(with = "time::serde::rfc3339")]
    pub changed_at: OffsetDateTime,
}

/// Where a place outside is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At these addresses.
    Network(Cidr),
    /// Wherever this name leads, while it does.
    Domain(DomainName),
}

impl Place {
    /// Where a flow to it leads.
    #[must_use]
    pub fn target(&self) -> Target {
        match self {
            Self::Network(network) => Target::Outside { network: *network },
            Self::Domain(domain) => Target::Domain { domain: domain.clone() },
        }
    }

    /// From the one column or the other.
    fn of(network: Option<&str>, domain: Option<&str>) -> Option<Self> {
        match (network, domain) {
            (Some(network), None) => Some(Self::Network(network.parse().ok()?)),
            (None, Some(domain)) => Some(Self::Domain(domain.parse().ok()?)),
            _ => None,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Domain(domain) => domain.fmt(f),
        }
    }
}

/// A place outside that was approved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approved {
    /// What the tenant calls it.
    pub name: EgressName,
    /// Where it is.
    pub place: Place,
    /// Protocol.
    pub protocol: Protocol,
    /// Ports.
    pub ports: Vec<u16>,
    /// When it ends by itself, in seconds since 1970.
    pub until: Option<i64>,
}

impl Approved {
    /// What keeps it closed all the same, if something does. `walls`: those of the machine.
    #[must_use]
    pub fn behind(&self, walls: &[Range]) -> Option<Range> {
        match &self.place {
            Place::Network(network) => never::against_outside(*network, walls),
            // Where a name leads is looked at each time.
            Place::Domain(_) => None,
        }
    }
}

/// Another tenant's app that both sides agreed about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub app: AppName,
    /// Its identity.
    pub id: AppId,
    /// Where it serves; none while it serves on no port.
    pub port: Option<Serves>,
    /// The one app that it is granted to; none for all apps of the tenant.
    pub only: Option<AppName>,
    /// When it ends by itself, in seconds since 1970.
    pub until: Option<i64>,
}

/// Everything that decides about the connections of one tenant's apps.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Tenant.
    pub tenant: TenantName,
    /// Its apps.
    pub apps: Vec<Connecting>,
    /// Services that it may use.
    pub services: Vec<(ServiceName, Vec<Endpoint>)>,
    /// Services that are about to change for it, and what they will be: what of them is used until then is counted.
    pub windows: Vec<(ServiceName, Vec<Endpoint>)>,
    /// Apps that others have granted to it, and that it has accepted.
    pub grants: Vec<Granted>,
    /// Approved places outside.
    pub egress: Vec<Approved>,
    /// Until when what its apps send outside is let through and written down, in seconds since 1970.
    pub trial: Option<i64>,
    /// When the first of these ends by itself.
    pub ends: Option<OffsetDateTime>,
}

/// What one app may begin to talk to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppPlan {
    /// App.
    pub app: AppId,
    /// Its name.
    pub name: AppName,
    /// Its flows.
    pub flows: Vec<Flow>,
}

/// Holds an address or network against what nobody reaches. `own`: the machine's own addresses.
pub(crate) fn check_network(network: Cidr, path: &str, wall: Option<Range>, pool: Cidr) -> Result<(), Fault> {
    let fault = |message: String| Err(Fault::new(Code(426), Kind::Invalid, path, message));
    if network.overlaps(pool) {
        return fault("these are addresses of tenants: apps are named in connects.apps".to_owned());
    }
    match wall {
        None => Ok(()),
        // Which addresses the machine has is nobody's business.
        Some(range) if range.is_own() => {
            fault(format!("{network} touches {}: nothing opens it", range.words))
        }
        Some(range) if range.wall == never::Wall::Private => fault(format!(
            "{} is {}: only a single address of a service may lie there",
            range.network, range.words
        )),
        Some(range) => fault(format!("{} is {}: nothing opens it", range.network, range.words)),
    }
}

/// Removes what has had its time.
pub async fn prune(pool: &sqlx::PgPool) -> Result<(), crate::error::Error> {
    let mut conn = pool.acquire().await?;
    store::prune(&mut conn).await?;
    store::prune_rollouts(&mut conn).await
}
