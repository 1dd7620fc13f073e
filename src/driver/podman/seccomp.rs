//! The platform's own system call filter: an allow-list, in the engine's format, compiled in. The engine's default
//! filter lets every container create user namespaces, and with them mounts, raw sockets and packet filters of its
//! own.
//!
//! - A call that is not named fails with `ENOSYS`. Libraries then fall back, and calls of later kernels stay closed
//!   without a change here. Calls that are denied by name fail with `EPERM`.
//! - `clone3` hides its flags in memory, where no filter sees them. It fails with `ENOSYS`, and `clone` allows no
//!   flag of a namespace.
//! - Sockets are `AF_UNIX`, TCP, UDP and ping over `AF_INET` and `AF_INET6`, and `AF_NETLINK` for routes.
//! - `sync` and `syncfs` succeed without effect: they would write out the machine's disk for one app.
//! - A program of another architecture (32-bit, x32) is killed at its first call.

use std::io::Write;
use std::path::{Path, PathBuf};

/// The filter.
pub const PROFILE: &str = include_str!("seccomp.json");
/// Name of the filter's file.
pub const FILE: &str = "seccomp.json";

/// Writes the filter into a folder that root owns, in one step. Does nothing if the file is up to date.
pub fn install(folder: &Path) -> std::io::Result<PathBuf> {
    let path = folder.join(FILE);
    if std::fs::read(&path).is_ok_and(|text| text == PROFILE.as_bytes()) {
        return Ok(path);
    }
    let fresh = folder.join(format!("{FILE}.new"));
    let mut file = std::fs::File::create(&fresh)?;
    file.write_all(PROFILE.as_bytes())?;
    file.sync_data()?;
    std::fs::rename(fresh, &path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;

    fn rules() -> Vec<Value> {
        let profile: Value = serde_json::from_str(PROFILE).unwrap();
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(profile["defaultErrnoRet"], 38);
        for arch in profile["archMap"].as_array().unwrap() {
            assert!(
                arch["subArchitectures"].as_array().is_none_or(Vec::is_empty),
                "no second way in: {arch}"
            );
        }
        profile["syscalls"].as_array().unwrap().clone()
    }

    #[test]
    fn only_an_allowed_call_is_allowed() {
        let closed = [
            "unshare",
            "setns",
            "clone3",
            "mount",
            "umount2",
            "pivot_root",
            "move_mount",
            "open_tree",
            "fsopen",
            "fsconfig",
            "fsmount",
            "fspick",
            "mount_setattr",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "process_madvise",
            "keyctl",
            "add_key",
            "request_key",
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "io_setup",
            "bpf",
            "userfaultfd",
            "perf_event_open",
            "kexec_load",
            "init_module",
            "finit_module",
            "delete_module",
            "reboot",
            "swapon",
            "quotactl",
            "acct",
            "open_by_handle_at",
            "name_to_handle_at",
            "kcmp",
            "fanotify_init",
            "pidfd_getfd",
            "clock_settime",
            "settimeofday",
            "ioperm",
            "iopl",
            "memfd_secret",
            "modify_ldt",
            "syslog",
            "chroot",
            "sethostname",
            "vhangup",
            "lookup_dcookie",
            "sync",
            "syncfs",
            "vmsplice",
            "socketcall",
            "ipc",
        ];
        for rule in rules() {
            let action = rule["action"].as_str().unwrap();
            assert!(matches!(action, "SCMP_ACT_ALLOW" | "SCMP_ACT_ERRNO"), "{rule}");
            for name in rule["names"].as_array().unwrap() {
                let name = name.as_str().unwrap();
                assert!(action != "SCMP_ACT_ALLOW" || !closed.contains(&name), "{name} is allowed");
            }
        }
    }

    #[test]
    fn a_call_that_depends_on_its_arguments_is_never_allowed_without_them() {
        let mut by_name: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        for rule in rules() {
            let bound = rule["args"].as_array().is_some_and(|args| !args.is_empty());
            for name in rule["names"].as_array().unwrap() {
                by_name.entry(name.as_str().unwrap().into()).or_default().push(bound);
            }
        }
        // A rule without arguments replaces all others of its call.
        for (name, bound) in &by_name {
            assert!(bound.len() == 1 || bound.iter().all(|bound| *bound), "{name}");
        }
        for name in ["clone", "socket", "socketpair", "personality"] {
            assert!(by_name[name].iter().all(|bound| *bound), "{name}");
        }
    }

    #[test]
    fn the_file_is_written_and_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let path = install(dir.path()).unwrap();
        std::fs::write(&path, "{\"defaultAction\": \"SCMP_ACT_ALLOW\"}").unwrap();
        assert_eq!(install(dir.path()).unwrap(), path);
        assert_eq!(std::fs::read_to_string(path).unwrap(), PROFILE);
    }
}
