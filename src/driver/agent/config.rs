//! Settings of the agent. The file belongs to root and bounds everything that `serve` can request.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::driver::podman::engine::EngineSettings;
use crate::driver::workload::{IdRange, Subnet};
use crate::ids::Installation;
use crate::policy::Cidr;

/// All settings of `bulkhead-agent`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The four letters of the installation.
    pub installation: Installation,
    /// Folder of the journal, the desired state and the logs. Only root has access.
    pub state_dir: PathBuf,
    /// Socket on which `serve` connects.
    pub socket: PathBuf,
    /// User id of `serve`, the only one whose requests are answered.
    pub peer_uid: u32,
    /// Socket of the container engine.
    pub engine_socket: PathBuf,
    /// User ids that may be allocated to tenants.
    pub id_pool: IdRange,
    /// Exact number of ids in a tenant's range, counted from the start of the pool.
    pub range_size: u32,
    /// Exact number of ids in an app's block.
    pub block_size: u32,
    /// Addresses that may be allocated to tenants.
    pub network_pool: Subnet,
    /// Prefix length of a tenant's subnet: the n-th subnet of the pool belongs to network number n.
    pub subnet_prefix: u8,
    /// A folder on the disk of the engine's storage.
    pub engine_storage: PathBuf,
    /// The engine's folder for state that does not survive a reboot.
    #[serde(default = "usual_run")]
    pub engine_run: PathBuf,
    /// Socket of the prober.
    pub prober_socket: PathBuf,
    /// User id of the prober, the only one that may connect from the host into the bridges.
    pub prober_uid: u32,
    /// Socket on which the resolver connects.
    pub resolver_socket: PathBuf,
    /// User id of the resolver, the only one whose questions are answered.
    pub resolver_uid: u32,
    /// Group of the resolver, which has access to the socket.
    pub resolver_gid: u32,
    /// Blocked ranges: no app reaches them, beside the reserved ranges and the machine's own addresses. A platform
    /// service may use single addresses in them.
    #[serde(default)]
    pub closed: Vec<Cidr>,
    /// Maximum mean rate of new connections of one tenant's apps, in connections per second; a burst may be five
    /// times as large. The kernel tracks the connections of all tenants in one table.
    #[serde(default = "usual_pace")]
    pub new_connections_per_second: u32,
    /// Name of the registry in the engine's configuration, which maps it to Bulkhead.
    pub registry_name: String,
    /// Address of Bulkhead's listener for pulls, to which that name leads.
    pub pull_host: String,
}

const PACE: &str = "new_connections_per_second";

/// Default of [`AgentConfig::new_connections_per_second`].
#[must_use]
pub fn usual_pace() -> u32 {
    1_000
}

/// Default of [`AgentConfig::engine_run`], as in the shipped unit.
#[must_use]
pub fn usual_run() -> PathBuf {
    "/run/bulkhead-engine".into()
}

impl AgentConfig {
    /// Returns the engine's settings, as its own command line needs them.
    #[must_use]
    pub fn engine(&self) -> EngineSettings {
        EngineSettings {
            root: self.engine_storage.clone(),
            run: self.engine_run.clone(),
            socket: self.engine_socket.clone(),
            registry_name: self.registry_name.clone(),
            pull_host: self.pull_host.clone(),
            may_raise_limits: false,
        }
    }

    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let config: Self = toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        config.check().map_err(|why| format!("{}: {why}", path.display()))?;
        Ok(config)
    }

    /// Takes over an operator's settings from an earlier file when the file is written again.
    pub fn keep_from(&mut self, path: &Path) -> Result<(), String> {
        let failed = |key: &str, error: toml::de::Error| format!("{}: {key}{error}", path.display());
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let mut table: toml::Table = text.parse().map_err(|error| failed("", error))?;
        if let Some(closed) = table.remove("closed") {
            self.closed = closed.try_into().map_err(|error| failed("closed: ", error))?;
        }
        if let Some(pace) = table.remove(PACE) {
            self.new_connections_per_second =
                pace.try_into().map_err(|error| failed("new_connections_per_second: ", error))?;
        }
        self.check().map_err(|why| format!("{}: {why}", path.display()))
    }

    fn check(&self) -> Result<(), String> {
        let pool = self.pool();
        if let Some(range) = self.closed.iter().find(|range| range.overlaps(pool)) {
            return Err(format!(
                "closed: {range} overlaps {pool}, the tenants' subnets, which are isolated anyway. Remove {range}"
            ));
        }
        if !(1..=1_000_000).contains(&self.new_connections_per_second) {
            return Err(format!("{PACE} must be between 1 and 1000000"));
        }
        Ok(())
    }

    /// Returns the subnet of the network with this number.
    #[must_use]
    pub fn subnet(&self, number: u32) -> Option<Subnet> {
        self.network_pool.part(self.subnet_prefix, number)
    }

    /// Returns the name of a tenant's bridge and network: at most 15 bytes.
    #[must_use]
    pub fn bridge(&self, number: u32) -> String {
        format!("{}{number}", self.bridge_prefix())
    }

    /// Returns the prefix of all bridge names.
    #[must_use]
    pub fn bridge_prefix(&self) -> String {
        format!("bk{}", self.installation)
    }

    /// Returns the pool of tenants' subnets, as the firewall uses it.
    #[must_use]
    pub fn pool(&self) -> Cidr {
        let pool = self.network_pool;
        Cidr::new(pool.address(), pool.prefix()).unwrap_or(Cidr::of(pool.address()))
    }

    /// Returns the name of the nftables table.
    #[must_use]
    pub fn table(&self) -> String {
        format!("bulkhead_{}", self.installation)
    }
}
