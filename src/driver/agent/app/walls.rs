//! Hardens and checks an instance's process directly, independent of the engine's answers: no further user
//! namespaces, and an active system call filter.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::born;
use crate::driver::Error;

/// Time limit of the program that writes the sysctl.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a process may take from its start to its own program: tries, and the pause between them.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// Sets the limit of user namespaces below a prepared process's own namespace to zero: a second barrier behind the
/// filter. The runtime has no such setting. The kernel accepts it from within that namespace, before any code of
/// the app runs.
pub(super) async fn close_user_namespaces(pid: i32) -> Result<(), Error> {
    let failed = |why: String| Error::Transient(format!("user namespaces cannot be closed: {why}"));
    if pid <= 0 {
        return Err(failed("the container has no process".into()));
    }
    let run = Command::new("nsenter")
        .arg(format!("--user=/proc/{pid}/ns/user"))
        .args(["sysctl", "-q", "-w", "user.max_user_namespaces=0"])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(PATIENCE, run).await {
        Ok(Ok(done)) if done.status.success() => Ok(()),
        Ok(Ok(done)) => Err(failed(String::from_utf8_lossy(&done.stderr).trim().chars().take(200).collect())),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed("nsenter does not finish in time".into())),
    }
}

/// Waits until a started process is under a system call filter. A process that has already ended needs none.
pub(super) async fn require_filter(pid: i32) -> Result<(), Error> {
    let Some(own) = born(pid) else { return Ok(()) };
    for _ in 0..TRIES {
        match filter_of(&std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()) {
            Some(2) => return Ok(()),
            _ if born(pid) != Some(own) => return Ok(()),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
    Err(Error::Rejected("the engine started it without the system call filter; it was stopped".into()))
}

/// Returns the kind of system call filter from the text of `/proc/PID/status`; 2 is a filter of rules.
fn filter_of(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Seccomp:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_filter_is_read() {
        assert_eq!(filter_of("Name:\tx\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"), Some(2));
        assert_eq!(filter_of("Seccomp_filters:\t1\n"), None);
    }

    #[tokio::test]
    async fn a_process_without_a_filter_is_refused() {
        let own = i32::try_from(std::process::id()).unwrap();
        if filter_of(&std::fs::read_to_string("/proc/self/status").unwrap()) == Some(0) {
            assert!(matches!(require_filter(own).await, Err(Error::Rejected(_))));
        }
        assert!(require_filter(i32::MAX).await.is_ok(), "none is left to be filtered");
    }
}
