//! Parts of an image's config that the engine or the runtime takes as instructions, or can never start with. Pure:
//! the preflight of a deploy and the agent each check them.

/// Folders that the kernel fills at run time, whatever the image has there.
pub const KERNELS: [&str; 3] = ["proc", "sys", "dev"];
/// Maximum length of a working directory, in bytes.
const PATH: usize = 1024;

/// Refuses a dangerous config. The error names the part and says why.
///
/// - The engine (Podman 4.3) fills an environment entry without a value from its own environment, and `*` with
///   the whole environment.
/// - A working directory in `/proc` leads the runtime to a folder of the host (CVE-2024-21626).
/// - With an invalid stop signal, the engine creates no container.
pub fn of_config(env: &[String], working_dir: &str, stop_signal: &str) -> Result<(), String> {
    for entry in env {
        environment(entry)?;
    }
    directory(working_dir)?;
    signal(stop_signal)
}

fn environment(entry: &str) -> Result<(), String> {
    let name = entry.split_once('=').map(|(name, _)| name);
    match name {
        None => Err("an environment variable of the image has no value".into()),
        Some(name) if name.trim_start().is_empty() => {
            Err("an environment variable of the image has no name".into())
        }
        Some(_) if entry.contains('\0') => Err("an environment variable of the image has a NUL byte".into()),
        Some(_) => Ok(()),
    }
}

fn directory(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Ok(());
    }
    let Some(inside) = path.strip_prefix('/') else {
        return Err("the working directory of the image is not an absolute path".into());
    };
    if path.len() > PATH || path.contains(|c: char| c.is_control()) {
        return Err("the working directory of the image is too long or has control characters".into());
    }
    let mut parts = inside.split('/').filter(|part| !part.is_empty() && *part != ".").peekable();
    if parts.peek().is_some_and(|first| KERNELS.contains(first)) {
        return Err("the working directory of the image is in /proc, /sys or /dev".into());
    }
    if parts.any(|part| part == ".." || part.len() > 255) {
        return Err("the working directory of the image has .. or a name that is too long".into());
    }
    Ok(())
}

/// Names of signals (signal(7)), as the engine knows them.
const SIGNALS: [&str; 34] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
];

fn signal(text: &str) -> Result<(), String> {
    let refused = || Err("the stop signal of the image is not a signal, such as SIGTERM or 15".to_owned());
    if text.is_empty() {
        return Ok(());
    }
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return match text.parse::<u8>() {
            Ok(1..=64) => Ok(()),
            _ => refused(),
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |prefix: &str, sign: char| {
        let rest = name.strip_prefix(prefix)?;
        if rest.is_empty() {
            return Some(0);
        }
        rest.strip_prefix(sign)?.parse::<u8>().ok().filter(|n| (1..=15).contains(n))
    };
    if SIGNALS.contains(&name)
        || offset("RTMIN", '+').is_some()
        || offset("RTMAX", '-').is_some_and(|n| n < 15)
    {
        return Ok(());
    }
    refused()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_would_take_as_an_order_is_refused() {
        let env = |list: &[&str]| {
            of_config(&list.iter().map(ToString::to_string).collect::<Vec<_>>(), "", "").is_ok()
        };
        assert!(env(&["PATH=/bin", "EMPTY=", "A=b=c", " x=y"]));
        for entry in ["*", "CONTAINERS_*", "HOME", "", "=", "=x", "  =x", "A=\0"] {
            assert!(!env(&["PATH=/bin", entry]), "{entry}");
        }
        let dir = |path: &str| of_config(&[], path, "").is_ok();
        for path in ["", "/", "/app", "/usr/src/app/", "/process", "//app", "/a/./b"] {
            assert!(dir(path), "{path}");
        }
        let long = format!("/{}", "a/".repeat(600));
        for path in [
            "/proc/self/fd/8",
            "//proc/self/cwd",
            "/./proc/1/root",
            "/sys/fs/cgroup",
            "/dev",
            "app",
            "./app",
            "/app/../proc/self/fd/8",
            "/..",
            "/a\nb",
            &long,
        ] {
            assert!(!dir(path), "{path}");
        }
        let signal = |text: &str| of_config(&[], "", text).is_ok();
        for text in ["", "SIGTERM", "term", "15", "SIGRTMIN+3", "RTMAX-1", "64", "SIGQUIT"] {
            assert!(signal(text), "{text}");
        }
        for text in ["FOO", "0", "65", "-1", "99999", "SIG", "SIGRTMIN+99", "SIGTERM\n", "15 ", "RTMIN3"] {
            assert!(!signal(text), "{text}");
        }
    }
}
