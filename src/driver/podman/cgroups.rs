//! Cgroups above those of single instances. One group holds all tenants and leaves the platform room. Below it, a
//! group for each tenant has the tenant's whole quota. Instances and the processes that watch them run in the group
//! of their tenant. The same limits are written for version 1, with a tree for each controller, and for version 2,
//! with one tree.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use crate::driver::workload::TenantLimits;
use crate::ids::{Installation, TenantName};

/// Where the hierarchies are mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The scheduler's period in microseconds.
const PERIOD: u64 = 100_000;
/// Controllers that limit tenants.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The kernel rounds memory limits to pages, which are this large on some machines.
const PAGE: u64 = 64 << 10;
/// Bytes beyond a tenant's quota. The quota is for the instances, but the processes that watch and clean up after
/// them count in the same group.
const WATCHERS: u64 = 256 << 20;
const BUSY: io::ErrorKind = io::ErrorKind::ResourceBusy;
/// Weights of all tenants together, for version 1 and version 2. The platform's processes have the defaults, 1024
/// and 100.
const SHARES: u64 = 512;
const WEIGHT: u64 = 50;

/// Limits of a group; none means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CgroupLimits {
    /// Thousandths of a core.
    pub cpu_millis: Option<u64>,
    /// Bytes.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Whether the group yields when others need the processors.
    pub yields: bool,
}

/// Capacity of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes of memory.
    pub memory: u64,
    /// Maximum number of processes and threads.
    pub pids: u64,
}

impl Capacity {
    /// Reads the capacity of this machine. A value that cannot be read sets no limit.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        let ids = number("/proc/sys/kernel/pid_max").unwrap_or(u64::MAX);
        let threads = number("/proc/sys/kernel/threads-max").unwrap_or(u64::MAX);
        Self { memory: kib.map_or(u64::MAX, |kib| kib << 10), pids: ids.min(threads) }
    }

    /// Returns the limits of all tenants together; the rest is reserved for the platform. The reserve is a fifth of
    /// the memory, from 1 to 4 GiB, and an eighth of the processes, from 1,024 to 8,192. It is never more than half
    /// of either.
    #[must_use]
    pub fn of_all_tenants(self) -> CgroupLimits {
        let reserve = (self.memory / 5).clamp(1 << 30, 4 << 30).min(self.memory / 2);
        let pids = (self.pids / 8).clamp(1024, 8192).min(self.pids / 2);
        CgroupLimits {
            cpu_millis: None,
            memory: Some(self.memory - reserve),
            pids: Some(self.pids - pids),
            yields: true,
        }
    }
}

/// Returns the limits for a tenant's whole quota.
#[must_use]
pub fn of_tenant(limits: &TenantLimits) -> CgroupLimits {
    CgroupLimits {
        cpu_millis: Some(limits.cpu_millis),
        memory: Some(limits.memory.saturating_add(WATCHERS)),
        pids: Some(limits.pids),
        yields: false,
    }
}

/// Returns the group of all tenants, as the engine names it.
#[must_use]
pub fn of_all(installation: &Installation) -> String {
    format!("/bulkhead-{installation}")
}

/// Returns the group of a tenant. No tenant's group has the name of a group that the engine creates.
#[must_use]
pub fn parent(installation: &Installation, tenant: &TenantName) -> String {
    format!("{}/t-{tenant}", of_all(installation))
}

/// The cgroup hierarchies of a machine.
#[derive(Debug, Clone)]
pub struct Groups {
    root: PathBuf,
    unified: bool,
}

impl Groups {
    /// Uses the hierarchies that are mounted below a folder.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), unified: root.join("cgroup.controllers").exists() }
    }

    fn folder(&self, controller: &str, group: &str) -> PathBuf {
        let group = group.trim_start_matches('/');
        if self.unified { self.root.join(group) } else { self.root.join(controller).join(group) }
    }

    /// Creates a group and sets the limits that differ. Returns the changes of a group that existed before. A limit
    /// that the kernel cannot lower yet waits for a later call.
    pub fn ensure(&self, group: &str, bounds: &CgroupLimits) -> io::Result<Vec<String>> {
        let mut changed = Vec::new();
        for controller in CONTROLLERS {
            let folder = self.folder(controller, group);
            let fresh = !folder.is_dir();
            std::fs::create_dir_all(&folder)?;
            if self.unified {
                self.delegate(group)?;
            }
            for (file, value) in self.values(controller, bounds) {
                let path = folder.join(file);
                // Not every machine counts swap; all other files must exist.
                if file.contains("sw") && !path.exists() {
                    continue;
                }
                let before = std::fs::read_to_string(&path).unwrap_or_default();
                if before.trim() == value {
                    continue;
                }
                match write(&path, &value) {
                    Ok(()) => {}
                    // Version 1 refuses a limit below the current use, or below the limit of a group within.
                    Err(error) if !fresh && matches!(error.kind(), BUSY | io::ErrorKind::InvalidInput) => {
                        tracing::warn!(%error, "a cgroup limit cannot be lowered yet");
                        continue;
                    }
                    Err(error) => return Err(error),
                }
                if !fresh {
                    changed.push(format!("{group} {file}: {} instead of {value}", before.trim()));
                }
            }
        }
        Ok(changed)
    }

    /// Enables the controllers at each level, as version 2 requires. The group itself is included, for its
    /// instances.
    fn delegate(&self, group: &str) -> io::Result<()> {
        let mut place = self.root.clone();
        let parts = group.split('/').filter(|part| !part.is_empty());
        for part in std::iter::once(None).chain(parts.map(Some)) {
            place.extend(part);
            let path = place.join("cgroup.subtree_control");
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            if !CONTROLLERS.iter().all(|name| there.split_whitespace().any(|own| own == *name)) {
                write(&path, "+cpu +memory +pids")?;
            }
        }
        Ok(())
    }

    /// Returns files and their values, as the kernel prints them.
    fn values(&self, controller: &str, bounds: &CgroupLimits) -> Vec<(&'static str, String)> {
        let text = |value: Option<u64>| value.map_or_else(|| "max".to_owned(), |value| value.to_string());
        let quota = bounds.cpu_millis.map(|millis| (millis * PERIOD / 1000).max(1000));
        let memory = bounds.memory.map(|bytes| bytes / PAGE * PAGE);
        match (controller, self.unified) {
            ("cpu", true) => vec![
                ("cpu.max", format!("{} {PERIOD}", text(quota))),
                ("cpu.weight", if bounds.yields { WEIGHT } else { 100 }.to_string()),
            ],
            ("cpu", false) => vec![
                ("cpu.cfs_period_us", PERIOD.to_string()),
                ("cpu.cfs_quota_us", quota.map_or_else(|| "-1".to_owned(), |quota| quota.to_string())),
                ("cpu.shares", if bounds.yields { SHARES } else { 1024 }.to_string()),
            ],
            ("memory", true) => {
                vec![("memory.max", text(memory)), ("memory.swap.max", "0".to_owned())]
            }
            // The limit with swap must never be below the limit without it. It is raised first, or lowered
            // last.
            ("memory", false) => memory
                .map(|bytes| {
                    let bytes = bytes.to_string();
                    vec![("memory.limit_in_bytes", bytes.clone()), ("memory.memsw.limit_in_bytes", bytes)]
                })
                .unwrap_or_default(),
            _ => vec![("pids.max", text(bounds.pids))],
        }
    }

    /// Returns the tenants that have a group in any hierarchy.
    #[must_use]
    pub fn tenants(&self, installation: &Installation) -> BTreeSet<TenantName> {
        let all = of_all(installation);
        let places: BTreeSet<PathBuf> =
            CONTROLLERS.iter().map(|controller| self.folder(controller, &all)).collect();
        let inner = places.iter().flat_map(|place| std::fs::read_dir(place).into_iter().flatten().flatten());
        inner.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("t-")?.parse().ok()).collect()
    }

    /// Removes a group and the groups within it. Returns whether it is gone from every hierarchy.
    #[must_use]
    pub fn remove(&self, group: &str) -> bool {
        let mut places: Vec<PathBuf> = if self.unified {
            vec![self.folder("", group)]
        } else {
            // The engine creates the group in every hierarchy, not only in those of `CONTROLLERS`.
            let all = std::fs::read_dir(&self.root).into_iter().flatten().flatten();
            all.map(|entry| entry.path().join(group.trim_start_matches('/'))).collect()
        };
        places.retain(|place| !remove(place));
        places.is_empty()
    }
}

/// Removes a group and the groups within it. Returns whether it is gone.
#[must_use]
pub fn remove(place: &Path) -> bool {
    let inner = std::fs::read_dir(place).into_iter().flatten().flatten();
    for entry in inner.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let _ = remove(&entry.path());
    }
    std::fs::remove_dir(place).is_ok() || !place.exists()
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    let wrote = std::fs::write(path, value);
    // Version 1 refuses to raise the memory limit above the limit with swap: raise that one first.
    let wrote = match wrote {
        Err(error) if error.raw_os_error() == Some(22) && path.ends_with("memory.limit_in_bytes") => {
            let both = path.with_file_name("memory.memsw.limit_in_bytes");
            std::fs::write(both, value).map_err(|_| error).and_then(|()| std::fs::write(path, value))
        }
        other => other,
    };
    wrote.map_err(|error| io::Error::new(error.kind(), format!("{} = {value}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: PathBuf) -> String {
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    const LIMITS: TenantLimits = TenantLimits { cpu_millis: 1500, memory: 1 << 30, pids: 100 };

    #[test]
    fn version_2_has_one_tree_and_controllers_handed_down() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        std::fs::write(root.path().join("cgroup.subtree_control"), "cpu memory pids\n").unwrap();
        let tenant = root.path().join("bulkhead-abcd/t-acme");
        std::fs::create_dir_all(&tenant).unwrap();
        // The kernel creates these files with the folder.
        std::fs::write(tenant.join("memory.swap.max"), "max\n").unwrap();
        let groups = Groups::below(root.path());
        groups.ensure("/bulkhead-abcd/t-acme", &of_tenant(&LIMITS)).unwrap();
        assert_eq!(read(tenant.join("cpu.max")), "150000 100000");
        assert_eq!(read(tenant.join("memory.max")), ((1_u64 << 30) + WATCHERS).to_string());
        assert_eq!(read(tenant.join("memory.swap.max")), "0");
        assert_eq!(read(tenant.join("pids.max")), "100");
        assert_eq!(read(tenant.join("cgroup.subtree_control")), "+cpu +memory +pids");
        assert_eq!(read(root.path().join("bulkhead-abcd/cgroup.subtree_control")), "+cpu +memory +pids");
        assert_eq!(
            read(root.path().join("cgroup.subtree_control")),
            "cpu memory pids\n",
            "existing controllers are kept"
        );
    }

    #[test]
    fn version_1_has_a_tree_for_each_and_is_repaired() {
        let root = tempfile::tempdir().unwrap();
        let at = |text: &str| root.path().join(text);
        for controller in CONTROLLERS {
            std::fs::create_dir_all(at(controller)).unwrap();
        }
        let groups = Groups::below(root.path());
        let bounds = Capacity { memory: 16 << 30, pids: 32_768 }.of_all_tenants();
        assert!(
            groups.ensure("/bulkhead-abcd", &bounds).unwrap().is_empty(),
            "a new group reports no changes"
        );
        groups.ensure("/bulkhead-abcd/t-acme", &of_tenant(&LIMITS)).unwrap();
        assert_eq!(read(at("pids/bulkhead-abcd/pids.max")), "28672");
        assert_eq!(read(at("cpu/bulkhead-abcd/cpu.shares")), "512");
        assert_eq!(read(at("cpu/bulkhead-abcd/cpu.cfs_quota_us")), "-1");
        assert_eq!(read(at("cpu/bulkhead-abcd/t-acme/cpu.cfs_quota_us")), "150000");
        assert!(
            groups.ensure("/bulkhead-abcd/t-acme", &of_tenant(&LIMITS)).unwrap().is_empty(),
            "nothing to do"
        );
        std::fs::write(at("pids/bulkhead-abcd/t-acme/pids.max"), "max\n").unwrap();
        let changed = groups.ensure("/bulkhead-abcd/t-acme", &of_tenant(&LIMITS)).unwrap();
        assert_eq!(changed, ["/bulkhead-abcd/t-acme pids.max: max instead of 100"]);
        assert_eq!(read(at("pids/bulkhead-abcd/t-acme/pids.max")), "100");
        // A group that the engine created in only one hierarchy counts too.
        std::fs::create_dir_all(at("cpu/bulkhead-abcd/t-left")).unwrap();
        std::fs::create_dir_all(at("cpu/bulkhead-abcd/libpod")).unwrap();
        let id: Installation = "abcd".parse().unwrap();
        let names: Vec<String> = groups.tenants(&id).iter().map(ToString::to_string).collect();
        assert_eq!(names, ["acme", "left"]);
        assert!(groups.remove("/bulkhead-abcd/t-left") && groups.tenants(&id).len() == 1);
    }

    #[test]
    fn the_platform_keeps_room_on_every_machine() {
        for (memory, pids) in
            [(512 << 20, 4096), (2 << 30, 32_768), (24 << 30, 4 << 20), (u64::MAX, u64::MAX)]
        {
            let bounds = Capacity { memory, pids }.of_all_tenants();
            let (left, most) = (memory - bounds.memory.unwrap(), bounds.memory.unwrap());
            assert!(left >= (1 << 30).min(memory / 2) && most >= memory / 2, "{memory}: {left}");
            assert!(pids - bounds.pids.unwrap() >= 1024.min(pids / 2), "{pids}");
        }
    }

    #[test]
    fn no_tenant_is_named_like_a_group_of_the_engine() {
        let id: Installation = "abcd".parse().unwrap();
        assert_eq!(parent(&id, &"conmon".parse().unwrap()), "/bulkhead-abcd/t-conmon");
    }
}
