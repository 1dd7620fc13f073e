//! Settings of the root half. The file is root's; what stands in it bounds what `serve` can ever ask.

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
    /// Folder of the journal, the desired state and the logs. Root's alone.
    pub state_dir: PathBuf,
    /// Socket on which `serve` asks.
    pub socket: PathBuf,
    /// User id of `serve`: the only one that is answered.
    pub peer_uid: u32,
    /// Socket of the container engine.
    pub engine_socket: PathBuf,
    /// Ids that tenants may be given.
    pub id_pool: IdRange,
    /// Ids of a tenant's range: exactly so many, from the pool's start on.
    pub range_size: u32,
    /// Ids of an app's block: exactly so many.
    pub block_size: u32,
    /// Addresses that tenants may be given.
    pub network_pool: Subnet,
    /// Prefix of a tenant's subnet: the n-th of the pool belongs to the network with the number n.
    pub subnet_prefix: u8,
    /// A folder on the disk of the engine's storage.
    pub engine_storage: PathBuf,
    /// The engine's folder of what is gone after a reboot.
    #[serde(default = "usual_run")]
    pub engine_run: PathBuf,
    /// Socket of the prober.
    pub prober_socket: PathBuf,
    /// User id of the prober: the only one that may connect from the host into the bridges.
    pub prober_uid: u32,
    /// Socket on which the resolver asks.
    pub resolver_socket: PathBuf,
    /// User id of the resolver: the only one that is answered there.
    pub resolver_uid: u32,
    /// Its group, which reaches the socket.
    pub resolver_gid: u32,
    /// Addresses that no app reaches either, beside the built-in ranges and the machine's own; a platform service may
    /// have single ones in them.
    #[serde(default)]
    pub closed: Vec<Cidr>,
    /// How many connections the apps of one tenant may begin in a second, in the mean; five times as many at once. The
    /// kernel tracks those of all tenants in one table.
    #[serde(default = "usual_pace")]
    pub new_connections_per_second: u32,
    /// Name under which the engine knows the registry; its own configuration leads it to Bulkhead.
    pub registry_name: String,
    /// Where that name leads: Bulkhead's listener for pulls.
    pub pull_host: String,
}

const PACE: &str = "new_connections_per_second";

/// How many connections the apps of one tenant may begin in a second unless a person has set another number.
#[must_use]
pub fn usual_pace() -> u32 {
    1_000
}

/// Where the engine keeps what is gone after a reboot, in the shipped unit.
#[must_use]
pub fn usual_run() -> PathBuf {
    "/run/bulkhead-engine".into()
}

impl AgentConfig {
    /// The engine, as its own command line knows it.
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

    /// Reads the file.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let config: Self = toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        config.check().map_err(|why| format!("{}: {why}", path.display()))?;
        Ok(config)
    }

    /// What a person has set in an earlier file is kept when the file is written anew.
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
                "closed: {range} touches {pool}, where tenants are: they are closed to each other in any case"
            ));
        }
        if !(1..=1_000_000).contains(&self.new_connections_per_second) {
            return Err(format!("{PACE} is 1 to 1000000"));
        }
        Ok(())
    }

    /// The subnet of the network with this number.
    #[must_use]
    pub fn subnet(&self, number: u32) -> Option<Subnet> {
        self.network_pool.part(self.subnet_prefix, number)
    }

    /// Name of a tenant's bridge and network: at most 15 bytes.
    #[must_use]
    pub fn bridge(&self, number: u32) -> String {
        format!("{}{number}", self.bridge_prefix())
    }

    /// What the names of all its bridges begin with.
    #[must_use]
    pub fn bridge_prefix(&self) -> String {
        format!("bk{}", self.installation)
    }

    /// The pool of tenants' subnets, as the firewall sees it.
    #[must_use]
    pub fn pool(&self) -> Cidr {
        let pool = self.network_pool;
        Cidr::new(pool.address(), pool.prefix()).unwrap_or(Cidr::of(pool.address()))
    }

    /// Name of the nftables table.
    #[must_use]
    pub fn table(&self) -> String {
        format!("bulkhead_{}", self.installation)
    }
}
