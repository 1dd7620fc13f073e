//! Renders a workload into the engine's create call. Pure. Every field that matters is written here; nothing is
//! copied through.

use serde_json::{Value, json};

use super::cgroups;
use crate::driver::agent::config::AgentConfig;
use crate::driver::scratch;
use crate::driver::workload::Workload;

/// Maximum number of processes and threads of an instance.
pub const PIDS: u32 = 512;
/// Bytes of `/dev/shm` in a release that predates the field for it.
const SHM: u64 = 1 << 20;
/// OOM score adjustment of an instance: when the machine is short of memory, the kernel kills instances before
/// other processes.
const OOM_SCORE: i32 = 500;
/// Files that reveal the machine and its other tenants, in addition to those that the engine itself hides.
const MASKED: [&str; 24] = [
    "/proc/buddyinfo",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/diskstats",
    "/proc/dynamic_debug",
    "/proc/interrupts",
    "/proc/iomem",
    "/proc/ioports",
    "/proc/kallsyms",
    "/proc/key-users",
    "/proc/kmsg",
    "/proc/mdstat",
    "/proc/modules",
    "/proc/pagetypeinfo",
    "/proc/partitions",
    "/proc/pressure",
    "/proc/schedstat",
    "/proc/slabinfo",
    "/proc/softirqs",
    "/proc/swaps",
    "/proc/vmallocinfo",
    "/proc/zoneinfo",
    "/sys/devices/virtual/dmi",
    "/sys/kernel",
];
/// The scheduler's period in microseconds.
const PERIOD: u64 = 100_000;

/// Whether an image may have this annotation, because it is text for people. The engine copies an image's
/// annotations to its containers, where some runtimes take others as instructions.
#[must_use]
pub fn is_harmless_annotation(key: &str) -> bool {
    ["org.opencontainers.image.", "com.docker.", "vnd.docker."].iter().any(|prefix| key.starts_with(prefix))
}

/// Annotations that the engine itself adds to every container that it creates.
const ENGINES_OWN: [&str; 4] = [
    "io.podman.annotations.autoremove",
    "io.podman.annotations.init",
    "io.podman.annotations.privileged",
    "io.podman.annotations.publish-all",
];

/// Checks that the image added nothing to a container that was created.
pub fn check_made(annotations: &[String], healthcheck: &[String]) -> Result<(), String> {
    if annotations.iter().any(|key| !ENGINES_OWN.contains(&key.as_str()) && !is_harmless_annotation(key)) {
        return Err("the image has annotations that a container runtime could take as instructions".into());
    }
    if healthcheck != ["NONE"] {
        return Err("the image's own health check could not be disabled".into());
    }
    Ok(())
}

/// One instance to create.
#[derive(Debug)]
pub struct NewInstance<'a> {
    /// Name of its container.
    pub container: &'a str,
    /// Number.
    pub number: u32,
    /// Gateway of its network.
    pub gateway: std::net::Ipv4Addr,
    /// Its network.
    pub network: &'a str,
    /// Path of the log that the engine writes.
    pub log: &'a str,
    /// Path of the system call filter.
    pub filter: &'a str,
    /// Its `/etc/passwd` and `/etc/group`, as the platform wrote them.
    pub names: [&'a str; 2],
    /// Its writable folders.
    pub scratch: &'a [Mount],
}

/// A writable folder in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Path, with links resolved.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Whether files in it may be executed.
    pub exec: bool,
    /// The mode that the agent gives it before the instance starts.
    pub mode: u32,
}

/// Paths of the two files in an instance.
const NAMES: [&str; 2] = ["/etc/passwd", "/etc/group"];

/// Returns the name of an instance's container.
#[must_use]
pub fn name(config: &AgentConfig, workload: &Workload, number: u32) -> String {
    format!("bk-{}-{}-{}-{}-{number}", config.installation, workload.tenant, workload.app, workload.revision)
}

/// Returns the image as the engine knows it: by digest, under a name that does not change with ports.
#[must_use]
pub fn image(config: &AgentConfig, workload: &Workload) -> String {
    format!(
        "{}/{}/{}@{}",
        config.registry_name, workload.tenant, workload.image.repository, workload.image.digest
    )
}

/// Returns the body of the engine's create call (libpod's specification of a container).
#[must_use]
pub fn create(config: &AgentConfig, workload: &Workload, instance: &NewInstance<'_>) -> Value {
    let w = workload;
    let map = json!([{"container_id": 0, "host_id": w.block.start, "size": w.block.size}]);
    // The engine's own /dev/shm is a mount on the host. The engine fails to unmount it after an instance has
    // ended by itself ("device or resource busy"). This mount ends with the instance.
    let old_shm = Mount { path: scratch::SHM.to_owned(), size: SHM, exec: false, mode: 0o1777 };
    let has_shm = instance.scratch.iter().any(|mount| mount.path == scratch::SHM);
    let mounts: Vec<Value> = instance
        .scratch
        .iter()
        .chain((!has_shm).then_some(&old_shm))
        .map(|mount| {
            let exec = if mount.exec { "exec" } else { "noexec" };
            json!({
                "destination": mount.path, "type": "tmpfs", "source": "tmpfs",
                "options": [format!("size={}", mount.size), "mode=1777", exec, "nosuid", "nodev", "rw"],
            })
        })
        .chain(NAMES.iter().zip(instance.names).map(|(path, source)| {
            json!({
                "destination": path, "type": "bind", "source": source,
                "options": ["bind", "ro", "noexec", "nosuid", "nodev"],
            })
        }))
        .collect();
    let quota = (u64::from(w.cpu_millis) * PERIOD / 1000).max(1000);
    let mut spec = json!({
        "name": instance.container,
        "image": image(config, w),
        "image_volume_mode": "ignore",
        "hostname": w.app,
        "env": w.env,
        "env_host": false,
        "httpproxy": false,
        "labels": {
            "bulkhead.installation": config.installation, "bulkhead.tenant": w.tenant, "bulkhead.app": w.app,
            "bulkhead.app-id": w.app_id.to_string(), "bulkhead.revision": w.revision.to_string(),
            "bulkhead.generation": w.generation.to_string(), "bulkhead.epoch": w.epoch.to_string(),
            "bulkhead.number": instance.number.to_string(),
        },
        "user": format!("{}:{}", w.user.uid, w.user.gid),
        "groups": w.groups.iter().map(ToString::to_string).collect::<Vec<_>>(),
        // The engine neither reads nor copies the image's own files.
        "manage_password": false,
        "userns": {"nsmode": "private"},
        "idmappings": {
            "HostUIDMapping": false, "HostGIDMapping": false, "UIDMap": map, "GIDMap": map,
        },
        "pidns": {"nsmode": "private"},
        "ipcns": {"nsmode": "none"},
        "utsns": {"nsmode": "private"},
        "cgroupns": {"nsmode": "private"},
        "netns": {"nsmode": "bridge"},
        "Networks": {instance.network: {"interface_name": "eth0"}},
        "publish_image_ports": false,
        "dns_server": [instance.gateway],
        "use_image_hosts": false,
        "use_image_resolve_conf": false,
        "privileged": false,
        "cap_drop": ["ALL"],
        "cap_add": [],
        "no_new_privileges": true,
        "seccomp_profile_path": instance.filter,
        "mask": MASKED,
        "read_only_filesystem": true,
        "mounts": mounts,
        "cgroup_parent": cgroups::parent(&config.installation, &w.tenant),
        "resource_limits": {
            "cpu": {"quota": quota, "period": PERIOD},
            "memory": {"limit": w.memory, "swap": w.memory},
            "pids": {"limit": PIDS},
        },
        // When the machine is short of memory, the kernel kills instances first and the platform last.
        "oom_score_adj": OOM_SCORE,
        "restart_policy": "no",
        "stop_timeout": w.stop_grace,
        "stdin": false,
        "terminal": false,
        "init": false,
        // The engine would run an image's own check as root and outside the instance's limits.
        "healthconfig": {"Test": ["NONE"]},
        "systemd": "false",
        "sdnotifyMode": "ignore",
        // A pipe: with a size limit, the engine's monitor would put a file in its place.
        "log_configuration": {"driver": "k8s-file", "path": instance.log},
    });
    if let Some(command) = &w.command {
        spec["entrypoint"] = json!(command);
        // With an empty list the engine does not append the image's own CMD to another program.
        spec["command"] = json!(w.args.clone().unwrap_or_default());
    } else if let Some(args) = &w.args {
        spec["command"] = json!(args);
    }
    spec
}
