//! Kernel limits that all processes of the machine share: process ids and threads.

use std::fs;
use std::path::Path;

use super::doctor::{Finding, good, warning};

/// Maximum processes of one instance.
const PER_INSTANCE: u64 = 512;
/// Below this, a hundred instances at their limit use up all ids.
const FEW_IDS: u64 = 65_536;
/// Below this, four tenants at their default process quota use up all threads.
const FEW_THREADS: u64 = 16_384;

/// Checks whether the machine has enough ids and threads for apps. `proc` is `/proc`; tests pass another
/// folder.
pub(super) fn numbers(proc: &Path) -> Finding {
    let check = "process ids";
    let read = |name: &str| {
        let text = fs::read_to_string(proc.join("sys/kernel").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let (Some(ids), Some(threads)) = (read("pid_max"), read("threads-max")) else {
        return warning(check, "kernel.pid_max and kernel.threads-max cannot be read", "mount /proc");
    };
    let low =
        [("kernel.pid_max", ids, FEW_IDS, 4_194_304), ("kernel.threads-max", threads, FEW_THREADS, 65_536)]
            .into_iter()
            .filter(|(_, have, few, _)| have < few);
    let (mut found, mut settings) = (Vec::new(), Vec::new());
    for (name, have, _, better) in low {
        found.push(format!(
            "{name} is {have}, which {} instances with {PER_INSTANCE} processes use up",
            have / PER_INSTANCE
        ));
        settings.push(format!("{name}={better}"));
    }
    if found.is_empty() {
        return good(check, format!("{ids} process ids, {threads} threads"));
    }
    warning(
        check,
        format!("{}; then no program on this machine can start a process", found.join("; ")),
        format!("sysctl -w {0}; to keep it, write each into /etc/sysctl.d/bulkhead.conf", settings.join(" ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standalone::doctor::Status;

    fn look(ids: &str, threads: &str) -> Finding {
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir_all(proc.path().join("sys/kernel")).unwrap();
        fs::write(proc.path().join("sys/kernel/pid_max"), ids).unwrap();
        fs::write(proc.path().join("sys/kernel/threads-max"), threads).unwrap();
        numbers(proc.path())
    }

    #[test]
    fn few_ids_and_few_threads_are_a_warning_with_the_setting() {
        assert_eq!(look("4194304\n", "23861\n").status, Status::Ok);
        let finding = look("32768\n", "190000\n");
        assert_eq!(finding.status, Status::Warning);
        assert!(finding.finding.contains("64 instances"), "{finding:?}");
        assert!(finding.remedy.contains("kernel.pid_max=4194304"), "{finding:?}");
        assert!(!finding.remedy.contains("threads-max"), "{finding:?}");
        assert!(look("4194304\n", "7000\n").remedy.contains("kernel.threads-max=65536"));
        let both = look("4096", "4096");
        assert!(both.remedy.contains("kernel.pid_max=4194304 kernel.threads-max=65536"), "{both:?}");
        assert_eq!(look("many", "4096").status, Status::Warning);
        assert_eq!(numbers(Path::new("/proc")).check, "process ids");
    }
}
