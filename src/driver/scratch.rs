//! Folders of an instance that may be scratch. The same rule serves the spec, the agent, and the path that an
//! image's own links lead to. Pure.

/// Maximum length of a path, in bytes.
pub const LONGEST: usize = 128;
/// The shared memory of an instance: the only scratch below `/dev`.
pub const SHM: &str = "/dev/shm";
/// Folders that the kernel or the platform fills, with everything below them.
const CLOSED: [&str; 6] = ["/dev", "/proc", "/sys", "/etc", "/run/secrets", "/run/.containerenv"];
/// Second name of `/run`; most images have it as a link.
const ALIAS: &str = "/var/run";

/// Whether a path is well-formed: absolute, without `.` and `..`, and without characters that have a meaning in a
/// mount option or a mount table.
#[must_use]
pub fn is_path(path: &str) -> bool {
    path.len() > 1
        && path.len() <= LONGEST
        && path.starts_with('/')
        && path[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !path.chars().any(|c| c.is_control() || matches!(c, '\\' | ':' | ','))
}

/// Returns the folder of the kernel or the platform that contains the path, or is the path.
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
