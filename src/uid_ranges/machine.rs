//! Checks the pool of user ids against ids that the machine already uses. An escaped process must own nothing
//! on the host. An overlap with an allocated id is a clash. An overlap with a range that systemd reserves
//! (<https://systemd.io/UIDS-GIDS/>) is a warning.

use std::path::Path;

use serde::Serialize;

use crate::driver::workload::IdRange;
use crate::ids::Installation;

/// Range that systemd reserves for its own containers.
const SYSTEMD_CONTAINERS: IdRange = IdRange { start: 524_288, size: 1_879_048_192 - 524_288 };

/// A user of ids on the machine that overlap the pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Clash {
    /// Where it was found, such as `/etc/subuid`.
    pub place: String,
    /// The account or process that uses the ids.
    pub owner: String,
    /// First id.
    pub start: u64,
    /// Number of ids.
    pub size: u64,
}

impl std::fmt::Display for Clash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} uses {} id(s) from {}", self.place, self.owner, self.size, self.start)
    }
}

/// Result of the check.
#[derive(Debug, Default)]
pub struct Findings {
    /// Overlaps with allocated ids.
    pub clashes: Vec<Clash>,
    /// Overlaps with reserved ranges.
    pub warnings: Vec<String>,
}

/// Checks the machine below `root` (`/`, except in tests). Processes in the cgroup of an existing
/// `installation` are its own containers: only root can move a process there.
#[must_use]
pub fn look(root: &Path, pool: IdRange, installation: Option<&Installation>) -> Findings {
    let mut findings = Findings::default();
    for file in ["etc/passwd", "etc/group"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        findings.clashes.extend(accounts(&format!("/{file}"), &text, pool));
    }
    for file in ["etc/subuid", "etc/subgid"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        findings.clashes.extend(subordinates(&format!("/{file}"), &text, pool));
    }
    findings.clashes.extend(processes(&root.join("proc"), pool, installation));
    if pool.overlaps(SYSTEMD_CONTAINERS) {
        findings.warnings.push(
            "the pool overlaps 524288 to 1879048191, which systemd reserves for its own containers; \
             systemd-nspawn may use the same ids"
                .into(),
        );
    }
    findings
}

fn accounts(place: &str, text: &str, pool: IdRange) -> Vec<Clash> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let (name, id) = (fields.next()?, fields.nth(1)?.parse::<u32>().ok()?);
            pool.overlaps(IdRange { start: id, size: 1 }).then(|| Clash {
                place: place.to_owned(),
                owner: name.to_owned(),
                start: id.into(),
                size: 1,
            })
        })
        .collect()
}

fn subordinates(place: &str, text: &str, pool: IdRange) -> Vec<Clash> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let start = fields.next()?.parse::<u64>().ok()?;
            let size = fields.next()?.trim().parse::<u64>().ok()?;
            let overlaps = start < pool.end() && u64::from(pool.start) < start.saturating_add(size);
            overlaps.then(|| Clash { place: place.to_owned(), owner: name.to_owned(), start, size })
        })
        .collect()
}

/// Whether a process is in the cgroup of the installation's containers.
fn is_own(process: &Path, installation: &Installation) -> bool {
    let text = std::fs::read_to_string(process.join("cgroup")).unwrap_or_default();
    let own = format!("/bulkhead-{installation}/");
    text.lines().any(|line| line.splitn(3, ':').nth(2).is_some_and(|path| path.starts_with(&own)))
}

fn processes(proc: &Path, pool: IdRange, installation: Option<&Installation>) -> Vec<Clash> {
    let Ok(entries) = std::fs::read_dir(proc) else { return Vec::new() };
    let mut clashes = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) else { continue };
        let Ok(status) = std::fs::read_to_string(entry.path().join("status")) else { continue };
        let ids = status
            .lines()
            .filter(|line| line.starts_with("Uid:") || line.starts_with("Gid:"))
            .flat_map(|line| line.split_whitespace().skip(1))
            .filter_map(|id| id.parse::<u32>().ok());
        for id in ids {
            if pool.overlaps(IdRange { start: id, size: 1 })
                && !installation.is_some_and(|own| is_own(&entry.path(), own))
            {
                clashes.push(Clash {
                    place: "/proc".into(),
                    owner: format!("process {pid}"),
                    start: id.into(),
                    size: 1,
                });
                break;
            }
        }
    }
    clashes
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: IdRange = IdRange { start: 1_900_000_000, size: 65_536 };

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn a_quiet_machine_has_no_clash() {
        let dir = machine(&[
            ("etc/passwd", "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"),
            ("etc/subuid", "dev:100000:65536\n"),
            ("proc/1/status", "Name:\tinit\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n"),
        ]);
        let found = look(dir.path(), POOL, None);
        assert_eq!(found.clashes, []);
        assert!(found.warnings.is_empty());
    }

    #[test]
    fn accounts_subordinate_ids_and_processes_clash() {
        let dir = machine(&[
            ("etc/passwd", "ldap:x:1900000005:1::/:/bin/sh\n"),
            ("etc/group", "big:x:1900000006:\n"),
            ("etc/subuid", "dev:1899999999:2\n"),
            ("etc/subgid", "dev:1900065536:10\n"),
            ("proc/7/status", "Uid:\t1900000007\t0\t0\t0\nGid:\t0\t0\t0\t0\n"),
            ("proc/7/cgroup", "4:memory:/bulkhead-other/libpod-a\n0::/x/bulkhead-test/\n"),
            ("proc/8/status", "Uid:\t1900000008\t0\t0\t0\nGid:\t0\t0\t0\t0\n"),
            ("proc/8/cgroup", "4:memory:/bulkhead-test/libpod-b\n0::/\n"),
        ]);
        let found = look(dir.path(), POOL, Some(&"test".parse().unwrap()));
        let places: Vec<_> = found.clashes.iter().map(|c| (c.place.as_str(), c.owner.as_str())).collect();
        assert_eq!(
            places,
            [("/etc/passwd", "ldap"), ("/etc/group", "big"), ("/etc/subuid", "dev"), ("/proc", "process 7")]
        );
    }

    #[test]
    fn a_reservation_of_systemd_is_only_a_warning() {
        let dir = machine(&[]);
        let found = look(dir.path(), IdRange { start: 600_000, size: 65_536 }, None);
        assert!(found.clashes.is_empty());
        assert_eq!(found.warnings.len(), 1);
    }
}
