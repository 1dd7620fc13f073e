//! Computes how many connections this process supports, from its descriptors and memory. A reserve remains for
//! the database, the agent and the registry.

use std::fs;

use super::admit::ConnectionLimits;
use crate::config::Config;

/// Descriptors reserved for files, the agent, the registry and listeners.
const RESERVE: u64 = 256;
/// Maximum memory of a connection: a head, a body of the API, buffers of the answer.
const EACH: u64 = 128 << 10;
/// Minimum number of connections on any machine.
const LEAST: u64 = 64;

/// Raises the soft limit of descriptors to the hard limit and returns it.
fn descriptors() -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            limit = raised;
        }
    }
    limit.current.unwrap_or(1 << 20)
}

/// Returns the bytes that this process may use: the smallest limit of its control groups and the machine.
fn memory() -> u64 {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let files = own.lines().flat_map(limit_files);
    let limits = files.filter_map(|file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok());
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    limits.chain(machine).min().unwrap_or(1 << 30)
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Returns the files that may limit memory for a line of /proc/self/cgroup: of the group and of its ancestors.
fn limit_files(line: &str) -> Vec<String> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (root, file) = match parts.next() {
        Some("") => ("/sys/fs/cgroup", "memory.max"),
        Some(names) if names.split(',').any(|name| name == "memory") => {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let mut path = parts.next().unwrap_or("/").trim_end_matches('/');
    let mut found = vec![format!("{root}{path}/{file}")];
    while let Some((above, _)) = path.rsplit_once('/') {
        path = above;
        found.push(format!("{root}{path}/{file}"));
    }
    found
}

fn bear(descriptors: u64, memory: u64, database: u64) -> usize {
    // A request may need a second connection, to the registry or the agent.
    let by_descriptors = descriptors.saturating_sub(RESERVE + 2 * database) / 2;
    let by_memory = memory / 2 / EACH;
    usize::try_from(by_descriptors.min(by_memory).max(LEAST)).unwrap_or(usize::MAX)
}

/// Returns the limits of the public listener.
#[must_use]
pub fn bounds(config: &Config) -> ConnectionLimits {
    let all = config
        .server
        .connections
        .unwrap_or_else(|| bear(descriptors(), memory(), u64::from(config.database.connections)));
    ConnectionLimits { all, per_source: config.server.connections_per_source.min(all) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_follows_the_scarcer_of_descriptors_and_memory() {
        assert_eq!(bear(1 << 20, 1 << 30, 16), 4096);
        assert_eq!(bear(1024, 1 << 40, 16), 368);
        assert_eq!(bear(100, 1 << 40, 16), 64);
    }

    #[test]
    fn both_generations_of_control_groups_are_looked_at() {
        assert_eq!(
            limit_files("0::/system.slice/bulkhead.service"),
            [
                "/sys/fs/cgroup/system.slice/bulkhead.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max",
            ]
        );
        assert_eq!(
            limit_files("5:cpu,memory:/x"),
            ["/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert!(limit_files("3:pids:/x").is_empty());
        assert_eq!(total("MemTotal:       2 kB\n"), Some(2048));
    }
}
