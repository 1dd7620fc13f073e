//! The workload that a driver runs, in neutral words. The types are closed: nothing dangerous has a field here.
//! Neither a tenant nor a compromised `serve` process can therefore ask for it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, AppName, Digest, RepositoryPath, TenantId, TenantName};
use crate::policy::Protocol;

/// A contiguous range of host user ids, and of the same group ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// First id.
    pub start: u32,
    /// Number of ids.
    pub size: u32,
}

impl IdRange {
    /// One past the last id.
    #[must_use]
    pub fn end(self) -> u64 {
        u64::from(self.start) + u64::from(self.size)
    }
    /// Whether the other range lies entirely inside.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }
    /// Whether the two ranges share an id.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        u64::from(self.start) < other.end() && u64::from(other.start) < self.end()
    }
}

/// An IPv4 subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    address: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// Creates a subnet from its network address. Host bits must be zero, and the prefix 8 to 30.
    #[must_use]
    pub fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        if !(8..=30).contains(&prefix) || u32::from(address) & (u32::MAX >> prefix) != 0 {
            return None;
        }
        Some(Self { address, prefix })
    }
    /// The network address.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        self.address
    }
    /// Length of the prefix.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }
    /// Number of addresses, the network and broadcast address included.
    #[must_use]
    pub fn size(self) -> u32 {
        1 << (32 - u32::from(self.prefix))
    }
    /// The n-th address; 0 is the network itself, 1 the gateway.
    #[must_use]
    pub fn nth(self, n: u32) -> Option<Ipv4Addr> {
        (n < self.size()).then(|| Ipv4Addr::from(u32::from(self.address) + n))
    }
    /// The n-th of the subnets with this prefix within this one.
    #[must_use]
    pub fn part(self, prefix: u8, number: u32) -> Option<Self> {
        let count = 1_u32.checked_shl(u32::from(prefix.checked_sub(self.prefix)?))?;
        if number >= count {
            return None;
        }
        Self::new(Ipv4Addr::from(u32::from(self.address) + (number << (32 - u32::from(prefix)))), prefix)
    }
    /// The gateway: the first address.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.address) + 1)
    }
    /// Whether the address lies inside.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & !(u32::MAX >> self.prefix) == u32::from(self.address)
    }
    /// Whether the two subnets share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl std::str::FromStr for Subnet {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, prefix) = text.split_once('/').ok_or("a subnet is ADDRESS/PREFIX")?;
        let address = address.parse().map_err(|_| "the address of the subnet is not IPv4")?;
        let prefix = prefix.parse().map_err(|_| "the prefix of the subnet is not a number")?;
        Self::new(address, prefix).ok_or("a subnet has a prefix of 8 to 30 and no host bits")
    }
}

impl TryFrom<String> for Subnet {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

/// Resources of one tenant on a machine. The agent writes them into its journal; the first write wins for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantGrant {
    /// Name, which is also the registry project.
    pub tenant: TenantName,
    /// Identity.
    pub tenant_id: TenantId,
    /// All id ranges of the tenant, oldest first. A later grant may add a range, never remove one.
    pub ranges: Vec<IdRange>,
    /// Number of its network, never reused; the bridge is `bk<installation><number>`.
    pub network: u32,
    /// Its subnet.
    pub subnet: Subnet,
    /// Limits on the machine. A later grant may change them.
    pub limits: TenantLimits,
}

/// Limits of all instances of a tenant together on a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantLimits {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// The image to run: always from the tenant's own project, always by digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadImage {
    /// Repository without host and tenant.
    pub repository: RepositoryPath,
    /// Digest of the platform manifest that runs.
    pub digest: Digest,
}

/// User and group inside the container, within the app's block: 1 to 1023. The group may be 0, which owns nothing
/// on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InsideUser {
    /// User id inside.
    pub uid: u16,
    /// Group id inside.
    pub gid: u16,
}

/// How the prober checks the health of an instance. The host is always the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum HealthCheck {
    /// A GET must answer with status 200 to 399.
    Http {
        /// Absolute path.
        path: String,
        /// Port.
        port: u16,
    },
    /// A connection must open.
    Tcp {
        /// Port.
        port: u16,
    },
}

/// Effect of a failed check.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthPurpose {
    /// The instance restarts, once its grace period is over.
    #[default]
    Restart,
    /// The instance is not ready, and a release waits for it. The instance keeps running.
    Readiness,
}

/// Health check, and the time that a start may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// How to check.
    pub check: HealthCheck,
    /// Seconds after a start in which a failure does not count.
    pub grace: u16,
    /// Effect of a failure.
    #[serde(default)]
    pub purpose: HealthPurpose,
}

impl Health {
    /// Creates a check that the spec asks for: an instance that fails it restarts.
    #[must_use]
    pub fn new(check: HealthCheck, grace: u16) -> Self {
        Self { check, grace, purpose: HealthPurpose::Restart }
    }
}

/// Port on which an app serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serves {
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

impl Serves {
    /// A TCP port.
    #[must_use]
    pub fn tcp(port: u16) -> Self {
        Self { protocol: Protocol::Tcp, port }
    }
}

/// How a new revision replaces the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Update {
    /// Starts one new instance at a time. The old one stops when the new one is healthy.
    Rolling,
    /// Stops the old instance before the new one starts (`singleton`).
    Replace,
}

/// A memory-backed writable folder of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ScratchForm", into = "ScratchForm")]
pub struct Scratch {
    /// Bytes.
    pub size: u64,
    /// Whether files in it may be executed.
    pub exec: bool,
}

impl Scratch {
    /// Creates a folder of this size in which no file may be executed.
    #[must_use]
    pub fn of(size: u64) -> Self {
        Self { size, exec: false }
    }
}

/// The serialized form: records of earlier versions hold only a number.
#[derive(Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum ScratchForm {
    Size(u64),
    Full { size: u64, exec: bool },
}

impl From<ScratchForm> for Scratch {
    fn from(form: ScratchForm) -> Self {
        match form {
            ScratchForm::Size(size) => Self::of(size),
            ScratchForm::Full { size, exec } => Self { size, exec },
        }
    }
}

impl From<Scratch> for ScratchForm {
    fn from(scratch: Scratch) -> Self {
        match scratch {
            Scratch { size, exec: false } => Self::Size(size),
            Scratch { size, exec } => Self::Full { size, exec },
        }
    }
}

/// One app as a driver runs it. Every field that matters is here; nothing is copied through from the tenant's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Tenant.
    pub tenant: TenantName,
    /// App.
    pub app: AppName,
    /// Identity of the app. A new app under the same name is another app.
    pub app_id: AppId,
    /// Release to run. A change of revision starts an update.
    pub revision: i64,
    /// Generation of the desired state. A driver refuses a lower one than it has stored.
    pub generation: i64,
    /// Lease epoch of the writer. At an equal generation, a driver refuses a lower epoch.
    pub epoch: i64,
    /// Image.
    pub image: WorkloadImage,
    /// Entrypoint; if absent, the image's own.
    pub command: Option<Vec<String>>,
    /// Arguments; if absent, the image's own, or none when only `command` is given.
    pub args: Option<Vec<String>>,
    /// User inside the container.
    pub user: InsideUser,
    /// Supplementary groups of the user, from the image's `/etc/group`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<u16>,
    /// The app's block of host ids.
    pub block: IdRange,
    /// CPU limit, in thousandths of a core.
    pub cpu_millis: u32,
    /// Memory limit, in bytes. Scratch, shm and /tmp count within it.
    pub memory: u64,
    /// Number of instances; 0 keeps the app stopped.
    pub instances: u32,
    /// How to update.
    pub update: Update,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// The only port on which the app serves.
    pub port: Option<u16>,
    /// Health check.
    pub health: Option<Health>,
    /// Memory-backed writable folders, by path. `/tmp` is always among them, in new releases also `/dev/shm`.
    pub scratch: BTreeMap<String, Scratch>,
    /// Seconds between SIGTERM and SIGKILL.
    pub stop_grace: u16,
    /// Addresses of the tenant's subnet that belong to this app: one for each instance, and one more for
    /// `Update::Rolling`.
    pub addresses: Vec<Ipv4Addr>,
}

impl Workload {
    /// Whether instances of this workload are also instances of the other one, so that none has to be replaced.
    /// Revision, generation, epoch and the number of instances may differ. The addresses that both have must be the
    /// same.
    #[must_use]
    pub fn runs_the_same(&self, other: &Self) -> bool {
        let shared = self.addresses.len().min(other.addresses.len());
        if self.addresses[..shared] != other.addresses[..shared] {
            return false;
        }
        let alike = Self {
            revision: self.revision,
            generation: self.generation,
            epoch: self.epoch,
            instances: self.instances,
            addresses: self.addresses.clone(),
            ..other.clone()
        };
        *self == alike
    }
}
