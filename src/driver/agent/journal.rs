//! The agent's own append-only record of allocations: id range, network and registry project of each tenant, and id
//! block of each app. The first write wins forever. With it the agent rejects a request for another tenant's
//! resources on its own, whatever `serve` sends.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::AgentConfig;
use crate::driver::workload::{IdRange, Subnet, TenantGrant};
use crate::ids::{AppId, AppName, TenantId, TenantName};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum JournalEntry {
    Tenant { tenant: TenantName, tenant_id: TenantId, network: u32, subnet: Subnet },
    Range { tenant: TenantName, range: IdRange },
    Block { tenant: TenantName, app: AppName, app_id: AppId, block: IdRange },
    Retired { tenant: TenantName },
    Removed { app_id: AppId },
}

/// A tenant as recorded.
#[derive(Debug, Clone)]
pub(super) struct TenantRecord {
    /// Identity.
    pub(super) tenant_id: TenantId,
    /// Number of the network.
    pub(super) network: u32,
    /// Subnet.
    pub(super) subnet: Subnet,
    ranges: Vec<IdRange>,
    retired: bool,
}

/// The journal.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    tenants: HashMap<TenantName, TenantRecord>,
    blocks: HashMap<AppId, (TenantName, AppName, IdRange)>,
    /// App of each block by its first id. A new block is compared only with its neighbours.
    starts: BTreeMap<u32, AppId>,
    removed: HashSet<AppId>,
    length: u64,
}

impl Journal {
    /// Opens the journal. A line that cannot be read is an error: the agent does not start with a partial record.
    /// Only an incomplete last line, left by a crash, is dropped: its request was never confirmed.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error.to_string()),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| error.to_string())?;
        file.set_len(whole as u64).and_then(|()| file.sync_all()).map_err(|error| error.to_string())?;
        // Syncs the file's entry in its folder too.
        if let Some(folder) = path.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| error.to_string())?;
        }
        let mut journal = Self {
            file,
            tenants: HashMap::new(),
            blocks: HashMap::new(),
            starts: BTreeMap::new(),
            removed: HashSet::new(),
            length: whole as u64,
        };
        for (n, line) in text[..whole].lines().enumerate() {
            let entry =
                serde_json::from_str(line).map_err(|error| format!("journal, line {}: {error}", n + 1))?;
            journal.take(entry);
        }
        Ok(journal)
    }

    fn take(&mut self, entry: JournalEntry) {
        match entry {
            JournalEntry::Tenant { tenant, tenant_id, network, subnet } => {
                let recorded =
                    TenantRecord { tenant_id, network, subnet, ranges: Vec::new(), retired: false };
                self.tenants.insert(tenant, recorded);
            }
            JournalEntry::Range { tenant, range } => {
                if let Some(recorded) = self.tenants.get_mut(&tenant) {
                    recorded.ranges.push(range);
                }
            }
            JournalEntry::Block { tenant, app, app_id, block } => {
                self.starts.insert(block.start, app_id);
                self.blocks.insert(app_id, (tenant, app, block));
            }
            JournalEntry::Removed { app_id } => {
                self.removed.insert(app_id);
            }
            JournalEntry::Retired { tenant } => {
                if let Some(recorded) = self.tenants.get_mut(&tenant) {
                    recorded.retired = true;
                }
            }
        }
    }

    fn write(&mut self, entry: JournalEntry) -> Result<(), String> {
        let mut line = serde_json::to_vec(&entry).map_err(|error| error.to_string())?;
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line).and_then(|()| self.file.sync_data()) {
            // An incomplete line must not stay: the next line would be appended to it, and neither could be read.
            self.file.set_len(self.length).map_err(|worse| format!("{error}; and {worse}"))?;
            return Err(error.to_string());
        }
        self.length += line.len() as u64;
        self.take(entry);
        Ok(())
    }

    /// Records a tenant's allocation, or compares it with the recorded one. Ranges may be added; nothing else ever
    /// changes.
    pub(super) fn claim_tenant(&mut self, config: &AgentConfig, grant: &TenantGrant) -> Result<(), String> {
        if grant.ranges.is_empty() || grant.ranges.len() > 256 {
            return Err("a tenant has 1 to 256 id ranges".into());
        }
        for range in &grant.ranges {
            if !config.id_pool.contains(*range) {
                return Err("an id range lies outside the installation's pool".into());
            }
            if range.size != config.range_size
                || !(range.start - config.id_pool.start).is_multiple_of(config.range_size)
            {
                return Err("an id range has the wrong size or is not aligned to the pool".into());
            }
            if self
                .tenants
                .iter()
                .any(|(name, r)| *name != grant.tenant && r.ranges.iter().any(|own| own.overlaps(*range)))
            {
                return Err("an id range belongs to another tenant".into());
            }
        }
        if config.subnet(grant.network) != Some(grant.subnet) {
            return Err("the network's number and subnet do not belong together in the pool".into());
        }
        if let Some(known) = self.tenants.get(&grant.tenant) {
            if known.retired {
                return Err("this tenant has left; its name and ids are retired and never reused".into());
            }
            if (known.tenant_id, known.network, known.subnet)
                != (grant.tenant_id, grant.network, grant.subnet)
            {
                return Err("the journal has another id, network or subnet for this tenant".into());
            }
        } else {
            let taken = |r: &TenantRecord| {
                r.network == grant.network
                    || r.tenant_id == grant.tenant_id
                    || r.subnet.overlaps(grant.subnet)
            };
            if self.tenants.values().any(taken) {
                return Err("the id, network or subnet belongs to another tenant".into());
            }
            self.write(JournalEntry::Tenant {
                tenant: grant.tenant.clone(),
                tenant_id: grant.tenant_id,
                network: grant.network,
                subnet: grant.subnet,
            })?;
        }
        for range in &grant.ranges {
            let known = self.tenants.get(&grant.tenant).is_some_and(|r| r.ranges.contains(range));
            if !known {
                self.write(JournalEntry::Range { tenant: grant.tenant.clone(), range: *range })?;
            }
        }
        Ok(())
    }

    /// Records an app's block, or compares it with the recorded one.
    pub(super) fn claim_block(
        &mut self,
        config: &AgentConfig,
        tenant: &TenantName,
        app: &AppName,
        app_id: AppId,
        block: IdRange,
    ) -> Result<TenantRecord, String> {
        let recorded = self.tenant(tenant).ok_or("this tenant is not in the journal")?.clone();
        if self.removed.contains(&app_id) {
            return Err("this app was removed; its id is never reused".into());
        }
        if !recorded.ranges.iter().any(|range| range.contains(block)) {
            return Err("the block lies outside the tenant's ranges".into());
        }
        if block.size != config.block_size
            || !(block.start - config.id_pool.start).is_multiple_of(config.block_size)
        {
            return Err("the block has the wrong size or is not aligned to the range's own blocks".into());
        }
        if let Some((owner, name, own)) = self.blocks.get(&app_id) {
            if (owner, name, *own) != (tenant, app, block) {
                return Err("the journal has another tenant, name or block for this app".into());
            }
            return Ok(recorded);
        }
        // All blocks have one size and are aligned: two overlapping blocks start at the same id.
        if self.starts.contains_key(&block.start) {
            return Err("the block belongs to another app".into());
        }
        self.write(JournalEntry::Block { tenant: tenant.clone(), app: app.clone(), app_id, block })?;
        Ok(recorded)
    }

    /// Returns a tenant that was not offboarded.
    #[must_use]
    pub(super) fn tenant(&self, name: &TenantName) -> Option<&TenantRecord> {
        self.tenants.get(name).filter(|recorded| !recorded.retired)
    }

    /// Returns a tenant, also one that was offboarded.
    #[must_use]
    pub(super) fn ever(&self, name: &TenantName) -> Option<&TenantRecord> {
        self.tenants.get(name)
    }

    /// Returns the subnet of each network, also those of offboarded tenants.
    #[must_use]
    pub(super) fn subnets(&self) -> Vec<(u32, Subnet)> {
        self.tenants.values().map(|recorded| (recorded.network, recorded.subnet)).collect()
    }

    /// Returns the tenant and number of each network, by the name of its bridge.
    #[must_use]
    pub(super) fn bridges(&self, config: &AgentConfig) -> HashMap<String, (TenantName, u32)> {
        let bridge = |(name, recorded): (&TenantName, &TenantRecord)| {
            (config.bridge(recorded.network), (name.clone(), recorded.network))
        };
        self.tenants.iter().map(bridge).collect()
    }

    /// Returns every tenant's subnet, by its first address.
    pub(super) fn by_subnet(&self) -> BTreeMap<Ipv4Addr, (TenantName, Subnet)> {
        let one = |(name, recorded): (&TenantName, &TenantRecord)| {
            (recorded.subnet.address(), (name.clone(), recorded.subnet))
        };
        self.tenants.iter().map(one).collect()
    }

    /// Returns the recorded tenant and name of an app.
    #[must_use]
    pub(super) fn app(&self, id: AppId) -> Option<(&TenantName, &AppName)> {
        self.blocks.get(&id).map(|(tenant, app, _)| (tenant, app))
    }

    /// Returns whether an app was removed.
    pub(super) fn is_removed(&self, id: AppId) -> bool {
        self.removed.contains(&id)
    }

    /// Records that an app is removed. A removed app can never be recorded again.
    pub(super) fn remove_app(&mut self, id: AppId) -> Result<(), String> {
        if self.removed.contains(&id) { Ok(()) } else { self.write(JournalEntry::Removed { app_id: id }) }
    }

    /// Records that a tenant was offboarded.
    pub(super) fn retire(&mut self, tenant: &TenantName) -> Result<(), String> {
        if self.tenant(tenant).is_some() {
            self.write(JournalEntry::Retired { tenant: tenant.clone() })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AgentConfig {
        toml::from_str(
            r#"installation = "test"
            state_dir = "/x"
            socket = "/x"
            peer_uid = 1
            engine_socket = "/x"
            prober_socket = "/x"
            prober_uid = 2
            resolver_socket = "/x"
            resolver_uid = 3
            resolver_gid = 3
            registry_name = "x"
            pull_host = "x"
            network_pool = "10.64.0.0/12"
            range_size = 65536
            block_size = 1024
            subnet_prefix = 22
            engine_storage = "/x"
            [id_pool]
            start = 1879048192
            size = 6553600
            "#,
        )
        .unwrap()
    }

    fn grant(name: &str, n: u32) -> TenantGrant {
        TenantGrant {
            tenant: name.parse().unwrap(),
            tenant_id: TenantId(n.into()),
            ranges: vec![IdRange { start: 1_879_048_192 + n * 65_536, size: 65_536 }],
            network: n,
            subnet: format!("10.64.{}.0/22", n * 4).parse().unwrap(),
            limits: crate::driver::TenantLimits { cpu_millis: 2000, memory: 1 << 30, pids: 4096 },
        }
    }

    #[test]
    fn the_first_write_wins_and_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (app, block) = ("web".parse().unwrap(), IdRange { start: 1_879_048_192, size: 1024 });
        let mut journal = Journal::open(&path).unwrap();
        journal.claim_tenant(&config(), &grant("acme", 0)).unwrap();
        journal.claim_tenant(&config(), &grant("acme", 0)).unwrap();
        journal.claim_block(&config(), &"acme".parse().unwrap(), &app, AppId(1), block).unwrap();
        drop(journal);
        // A crash in the middle of a line loses only that line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"tenant\":{\"ten").unwrap();
        let mut journal = Journal::open(&path).unwrap();
        let claim =
            |journal: &mut Journal, grant: &TenantGrant| journal.claim_tenant(&config(), grant).unwrap_err();
        for (n, steal) in [
            TenantGrant { ranges: grant("acme", 0).ranges, ..grant("evil", 1) },
            TenantGrant { subnet: grant("acme", 0).subnet, ..grant("evil", 1) },
            TenantGrant { network: 0, ..grant("evil", 1) },
            TenantGrant { tenant_id: TenantId(0), ..grant("evil", 1) },
            TenantGrant { network: 7, ..grant("acme", 0) },
            TenantGrant { ranges: vec![IdRange { start: 0, size: 65_536 }], ..grant("evil", 1) },
            TenantGrant { ranges: vec![IdRange { start: 1_885_601_791, size: 65_536 }], ..grant("evil", 1) },
            TenantGrant { subnet: "192.168.0.0/22".parse().unwrap(), ..grant("evil", 1) },
            TenantGrant { ranges: vec![], ..grant("evil", 1) },
            TenantGrant { ranges: vec![IdRange { start: 1_879_113_728, size: 131_072 }], ..grant("evil", 1) },
            TenantGrant { ranges: vec![IdRange { start: 1_879_113_729, size: 65_536 }], ..grant("evil", 1) },
            TenantGrant { network: u32::MAX, ..grant("evil", 1) },
            TenantGrant { subnet: "10.64.0.0/12".parse().unwrap(), ..grant("evil", 1) },
        ]
        .iter()
        .enumerate()
        {
            assert!(!claim(&mut journal, steal).is_empty(), "{n}");
        }
        journal.claim_tenant(&config(), &grant("good", 2)).unwrap();
        let good = "good".parse().unwrap();
        let block_of = |journal: &mut Journal, tenant, id, block| {
            journal.claim_block(&config(), tenant, &app, AppId(id), block).map(drop)
        };
        assert!(block_of(&mut journal, &good, 2, block).unwrap_err().contains("outside"));
        let acme = "acme".parse().unwrap();
        assert!(block_of(&mut journal, &acme, 2, block).unwrap_err().contains("another app"));
        let other = IdRange { start: 1_879_049_216, size: 1024 };
        assert!(block_of(&mut journal, &acme, 1, other).unwrap_err().contains("another"));
        for odd in [
            IdRange { start: 1_879_049_217, size: 1024 },
            IdRange { start: 1_879_049_216, size: 2048 },
            IdRange { start: 1_879_049_216, size: 16 },
        ] {
            assert!(block_of(&mut journal, &acme, 3, odd).unwrap_err().contains("own"), "{odd:?}");
        }
        block_of(&mut journal, &acme, 3, other).unwrap();
        journal.remove_app(AppId(3)).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert!(block_of(&mut journal, &acme, 3, other).unwrap_err().contains("removed"));
        journal.retire(&acme).unwrap();
        assert!(claim(&mut journal, &grant("acme", 0)).contains("left"));
    }
}
