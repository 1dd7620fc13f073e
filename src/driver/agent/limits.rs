//! Resource limits of each tenant, as `serve` last sent them. The agent keeps its own copy, one file per tenant:
//! after a reboot, instances start within their tenant's limits before `serve` is up. The limits of all tenants
//! together follow from the machine; `serve` cannot set them.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::core::{Agent, lock};
use crate::driver::podman::cgroups::{self, Capacity, CgroupLimits};
use crate::driver::workload::TenantLimits;
use crate::driver::{Error, InstanceState};
use crate::ids::TenantName;

/// All tenants' limits.
#[derive(Debug)]
pub(super) struct LimitBook {
    folder: PathBuf,
    by_tenant: HashMap<TenantName, TenantLimits>,
    /// Limits that this process has set, by group. A different value was set from outside.
    set: HashMap<String, CgroupLimits>,
}

impl LimitBook {
    /// Reads the stored limits. A file that cannot be read is logged; `serve` sends its limits again.
    pub(super) fn open(folder: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut by_tenant = HashMap::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let (Some(name), true) = (name, path.extension().is_some_and(|e| e == "json")) else { continue };
            let read = std::fs::read(&path).map_err(|error| error.to_string());
            match read.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string())) {
                Ok(limits) => drop(by_tenant.insert(name, limits)),
                Err(error) => tracing::error!(path = %path.display(), error, "a limits file cannot be read"),
            }
        }
        Ok(Self { folder: folder.to_owned(), by_tenant, set: HashMap::new() })
    }

    /// Stores a tenant's limits on disk, then uses them.
    pub(super) fn take(&mut self, tenant: &TenantName, limits: &TenantLimits) -> Result<(), Error> {
        check(limits).map_err(|why| Error::Rejected(why.into()))?;
        if self.by_tenant.get(tenant) == Some(limits) {
            return Ok(());
        }
        self.save(tenant, limits).map_err(|error| Error::Transient(error.to_string()))?;
        self.by_tenant.insert(tenant.clone(), *limits);
        Ok(())
    }

    fn save(&self, tenant: &TenantName, limits: &TenantLimits) -> std::io::Result<()> {
        let fresh = self.folder.join(format!("{tenant}.new"));
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(limits)?)?;
        file.sync_data()?;
        std::fs::rename(fresh, self.folder.join(format!("{tenant}.json")))
    }

    fn forget(&mut self, tenant: &TenantName, group: &str) {
        self.by_tenant.remove(tenant);
        self.set.remove(group);
        let _ = std::fs::remove_file(self.folder.join(format!("{tenant}.json")));
    }
}

/// Checks the bounds of limits.
fn check(limits: &TenantLimits) -> Result<(), &'static str> {
    let good = (10..=10_000_000).contains(&limits.cpu_millis)
        && ((8 << 20)..=(1 << 50)).contains(&limits.memory)
        && (16..=4_000_000).contains(&limits.pids);
    if good { Ok(()) } else { Err("a tenant's limits are out of bounds") }
}

impl Agent {
    /// Creates a tenant's group and its parent if they are missing, and sets their limits, before anything starts
    /// in them. Limits that were changed from outside are restored, and an event reports it.
    ///
    /// # Errors
    /// [`Error::Transient`] if the kernel refuses.
    pub(super) fn ensure_group(&self, tenant: &TenantName) -> Result<(), Error> {
        let id = &self.config.installation;
        let limits = lock(&self.limits).by_tenant.get(tenant).copied();
        // The limits of a tenant from an earlier version are unknown until `serve` sends them. Until then only the
        // limit of all tenants applies.
        let own = limits
            .map_or_else(CgroupLimits::default, |limits| cgroups::of_tenant(&self.widened(tenant, limits)));
        self.set_group(cgroups::of_all(id), Capacity::of_this_machine().of_all_tenants())?;
        self.set_group(cgroups::parent(id, tenant), own)
    }

    /// Raises limits that are lower than the current use. Lowered limits refuse new instances and stop none.
    /// Instances that are stopping do not count. An app counts at most the instances of its description and one for
    /// an update.
    fn widened(&self, tenant: &TenantName, mut limits: TenantLimits) -> TenantLimits {
        let (mut cpu, mut memory) = (0_u64, 0_u64);
        let apps: Vec<_> = lock(&self.apps).values().filter(|app| app.tenant == *tenant).cloned().collect();
        for app in apps {
            let kept = lock(&app.kept);
            let live = kept.instances.iter().filter(|i| i.state != InstanceState::Stopping).count() as u64;
            let count = live.min(u64::from(kept.workload.instances) + 1);
            cpu = cpu.saturating_add(count.saturating_mul(kept.workload.cpu_millis.into()));
            memory = memory.saturating_add(count.saturating_mul(kept.workload.memory));
        }
        limits.cpu_millis = limits.cpu_millis.max(cpu);
        limits.memory = limits.memory.max(memory);
        limits
    }

    fn set_group(&self, group: String, bounds: CgroupLimits) -> Result<(), Error> {
        let changed = self
            .groups
            .ensure(&group, &bounds)
            .map_err(|error| Error::Transient(format!("control group: {error}")))?;
        let known = lock(&self.limits).set.insert(group, bounds) == Some(bounds);
        if known && !changed.is_empty() {
            let text = format!("limits were changed from outside and are restored: {}", changed.join("; "));
            self.machine_event("bounds_repaired", text);
        }
        Ok(())
    }

    /// Repairs the limits of all tenants that have apps here. Removes groups of offboarded tenants: the last
    /// process of an instance may outlive the offboarding by moments.
    pub(super) fn keep_groups(&self) {
        let tenants: BTreeSet<TenantName> = lock(&self.apps).values().map(|app| app.tenant.clone()).collect();
        for tenant in &tenants {
            if let Err(error) = self.ensure_group(tenant) {
                tracing::warn!(%error, %tenant, "a tenant's limits cannot be set");
            }
        }
        let id = &self.config.installation;
        for tenant in self.groups.tenants(id) {
            // The name of an offboarded tenant is never reused, so the tenant cannot return meanwhile.
            let has_left = lock(&self.journal).tenant(&tenant).is_none();
            if has_left && !tenants.contains(&tenant) {
                let _ = self.groups.remove(&cgroups::parent(id, &tenant));
            }
        }
    }

    /// Removes the limits and the group of an offboarded tenant.
    pub(super) fn forget_group(&self, tenant: &TenantName) {
        let group = cgroups::parent(&self.config.installation, tenant);
        lock(&self.limits).forget(tenant, &group);
        if !self.groups.remove(&group) {
            tracing::info!(%tenant, "the control group of an offboarded tenant is still in use; it is removed later");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked_and_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let acme: TenantName = "acme".parse().unwrap();
        let limits = TenantLimits { cpu_millis: 2000, memory: 1 << 30, pids: 4096 };
        let mut book = LimitBook::open(dir.path()).unwrap();
        book.take(&acme, &limits).unwrap();
        for wrong in [
            TenantLimits { cpu_millis: 0, ..limits },
            TenantLimits { memory: u64::MAX, ..limits },
            TenantLimits { pids: 1, ..limits },
        ] {
            assert!(matches!(book.take(&acme, &wrong), Err(Error::Rejected(_))));
        }
        std::fs::write(dir.path().join("evil.json"), "{").unwrap();
        let again = LimitBook::open(dir.path()).unwrap();
        assert_eq!(again.by_tenant, HashMap::from([(acme.clone(), limits)]));
        let mut again = again;
        again.forget(&acme, "/bulkhead-abcd/t-acme");
        assert!(LimitBook::open(dir.path()).unwrap().by_tenant.is_empty());
    }
}
