//! Which folders of an instance may be scratch: one rule for the spec, the agent, and the path that an image's own
//! links lead to. Pure.

/// Longest path, in bytes.
pub const LONGEST: usize = 128;
/// The shared memory of an instance: the only scratch below `/dev`.
pub const SHM: &str = "/dev/shm";
/// Folders that the kernel or the platform fills, with everything below them.
const CLOSED: [&str; 6] = ["/dev", "/proc", "/sys", "/etc", "/run/secrets", "/run/.containerenv"];
/// Another name of `/run`, which most images have as a link.
const ALIAS: &str = "/var/run";

/// Whether a path has the form of one: absolute, without `.` and `..`, and without characters that a mount option or
/// a table of mounts gives a meaning.
#[must_use]
pub fn is_path(path: &str) -> bool {
    path.len() > 1
        && path.len() <= LONGEST
        && path.starts_with('/')
        && path[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !path.chars().any(|c| c.is_control() || matches!(c, '\\' | ':' | ','))
}

/// The folder of the kernel's or the platform's that a path is or lies in.
#[must_use]
pub fn closed(path: &str) -> Option<&'static str> {
    if path == SHM {
        return None;
    }
    let plain = path.strip_prefix(ALIAS).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let plain = plain.map(|rest| format!("/run{rest}"));
    let path = plain.as_deref().unwrap_or(path);
    CLOSED.into_iter().find(|closed| path == *closed || is_within(path, closed))
}

/// Whether `path` lies below `other`.
#[must_use]
pub fn is_within(path: &str, other: &str) -> bool {
    path.strip_prefix(other).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_and_the_platform_fill_is_closed() {
        for open in
            ["/run", "/run/nginx", "/var/run/x", "/var/lib/a", "/var/log/nginx", "/data", "/dev/shm", "/runs"]
        {
            assert!(is_path(open) && closed(open).is_none(), "{open}");
        }
        for shut in [
            "/dev",
            "/dev/x",
            "/dev/shm/x",
            "/proc/1",
            "/sys/fs/cgroup",
            "/etc",
            "/etc/nginx",
            "/run/secrets",
            "/run/secrets/x",
            "/var/run/secrets",
            "/var/run/.containerenv",
        ] {
            assert!(closed(shut).is_some(), "{shut}");
        }
        for bad in
            ["/", "a", "/a/", "//a", "/a/../b", "/a/./b", "/a:b", "/a,b", "/a\\b", "/a\nb", &"/a".repeat(65)]
        {
            assert!(!is_path(bad), "{bad}");
        }
    }
}
