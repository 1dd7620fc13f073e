//! Checks what the machine must have before a process starts; each finding comes with a remedy. `bulkhead
//! doctor` prints the same checks that `up` runs.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::{DataFolder, numbers, postgres, running, service, surroundings, units};
use crate::driver::disk::{self, DiskConsumer};
use crate::driver::podman::engine::RUNTIME;
use crate::uid_ranges::machine;

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The check passed.
    Ok,
    /// Works, with restrictions.
    Warning,
    /// Does not work.
    Failed,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Name of the check.
    pub check: &'static str,
    /// The result.
    pub status: Status,
    /// The finding, as a sentence.
    pub finding: String,
    /// The remedy; empty if the check passed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

pub(super) fn good(check: &'static str, finding: impl Into<String>) -> Finding {
    Finding { check, status: Status::Ok, finding: finding.into(), remedy: String::new() }
}

pub(super) fn warning(check: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check, status: Status::Warning, finding: finding.into(), remedy: remedy.into() }
}

pub(super) fn failed(check: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check, status: Status::Failed, finding: finding.into(), remedy: remedy.into() }
}

/// Returns the path of a program in the folders where root's programs are installed.
pub(super) fn program(name: &str) -> Option<String> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| format!("{folder}/{name}"))
        .find(|path| Path::new(path).exists())
}

/// Returns whether this process may raise limits: `CAP_SYS_RESOURCE` is bit 24 of the effective set.
#[must_use]
pub fn may_raise_limits() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|caps| caps & (1 << 24) != 0)
}

/// Runs all checks for a data folder and an address.
#[must_use]
pub fn examine(data: &Path, listen: Option<SocketAddr>) -> Vec<Finding> {
    let mut findings = vec![
        root(),
        parts(std::env::current_exe().ok().as_deref().and_then(Path::parent)),
        packages(),
        database(),
        container_runtime(),
        limits(),
        cgroups(),
        nftables(),
        surroundings::firewalls(),
        numbers::numbers(Path::new("/proc")),
        surroundings::connections(),
        surroundings::host_from_within(data),
        space(data),
        running::processes(data),
        running::engine(data),
        running::resolver_settings(data),
    ];
    findings.push(folder(data));
    if let Some(listen) = listen {
        findings.push(address(listen));
    }
    findings.push(id_maps());
    findings.push(user_ids(data));
    findings
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        good("root", "runs as root")
    } else {
        failed("root", "does not run as root", "run it as root: it creates users, networks and containers")
    }
}

/// The two programs must be in one folder: each is started by its name.
fn parts(folder: Option<&Path>) -> Finding {
    let Some(folder) = folder else {
        return failed("programs", "the path of this program is not known", "start it by its full path");
    };
    let missing: Vec<&str> =
        ["bulkhead", "bulkhead-agent"].into_iter().filter(|name| !folder.join(name).is_file()).collect();
    if missing.is_empty() {
        good("programs", "bulkhead and bulkhead-agent are in one folder")
    } else {
        failed(
            "programs",
            format!("not in {}: {}", folder.display(), missing.join(", ")),
            "put bulkhead and bulkhead-agent of one build into one folder, under these names",
        )
    }
}

fn packages() -> Finding {
    let needed = [
        ("podman", "podman"),
        ("nft", "nftables"),
        ("iptables", "iptables"),
        ("docker-registry", "docker-registry"),
        ("ip", "iproute2"),
        ("conntrack", "conntrack"),
        ("setpriv", "util-linux"),
        ("useradd", "passwd"),
    ];
    let mut missing: Vec<&str> =
        needed.iter().filter(|(name, _)| program(name).is_none()).map(|(_, package)| *package).collect();
    if !Path::new("/usr/lib/podman/netavark").exists() && program("netavark").is_none() {
        missing.push("netavark");
    }
    if missing.is_empty() {
        good("packages", "all programs are installed")
    } else {
        let list = missing.join(" ");
        failed("packages", format!("missing: {list}"), format!("deploy/packages, or apt-get install {list}"))
    }
}

fn database() -> Finding {
    match postgres::programs() {
        Some((major, _)) if major >= 14 => good("postgres", format!("Postgres {major}")),
        Some((major, _)) => {
            failed("postgres", format!("Postgres {major} is too old"), "install Postgres 14 or later")
        }
        None => {
            failed("postgres", "Postgres is not installed", "deploy/packages, or apt-get install postgresql")
        }
    }
}

fn container_runtime() -> Finding {
    if program(RUNTIME).is_some() {
        good("runtime", RUNTIME)
    } else {
        failed(
            "runtime",
            "runc is not installed (crun is not used: annotations of an image control it)",
            "apt-get install runc",
        )
    }
}

fn limits() -> Finding {
    if may_raise_limits() {
        good("limits", "CAP_SYS_RESOURCE is available")
    } else {
        warning(
            "limits",
            "no CAP_SYS_RESOURCE: a container gets at most 1024 open files and 1024 processes per user",
            "no action needed here; on a machine of your own, root has this capability",
        )
    }
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return good("cgroups", "version 2");
    }
    let missing: Vec<&str> = ["memory", "cpu", "pids"]
        .into_iter()
        .filter(|name| !Path::new(&format!("/sys/fs/cgroup/{name}")).exists())
        .collect();
    if missing.is_empty() {
        good("cgroups", "version 1: all limits work")
    } else {
        failed(
            "cgroups",
            format!("controllers are missing: {}", missing.join(", ")),
            "mount them, or boot with cgroup version 2",
        )
    }
}

fn nftables() -> Finding {
    let done = Command::new("nft").args(["list", "tables"]).stdin(Stdio::null()).output();
    match done {
        Ok(done) if done.status.success() => {
            let br = if Path::new("/proc/sys/net/bridge").exists() { "with" } else { "without" };
            good("nftables", format!("works ({br} br_netfilter; both are fine)"))
        }
        Ok(done) => failed(
            "nftables",
            String::from_utf8_lossy(&done.stderr).trim().to_owned(),
            "load nf_tables, or run where root has CAP_NET_ADMIN",
        ),
        Err(error) => failed("nftables", error.to_string(), "apt-get install nftables"),
    }
}

fn space(data: &Path) -> Finding {
    let place = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let rooms = (disk::room(DiskConsumer::Registry, place), disk::room(DiskConsumer::Engine, place));
    let (Some(registry), Some(engine)) = rooms else {
        return failed("space", "the free space cannot be read", "choose another --data");
    };
    let mebi = |bytes: u64| bytes >> 20;
    let free = mebi(engine.free);
    let kept = format!(
        "pushes stop below {} MiB and fetches of images below {} MiB, so that the database can write",
        mebi(registry.kept),
        mebi(engine.kept)
    );
    let found = format!("{free} MiB are free at {}; {kept}", place.display());
    if free < 1024 || !engine.has(0) {
        failed("space", found, "free at least 1 GiB above the reserve, or choose another --data")
    } else if free < 10 * 1024 || !registry.has(0) {
        warning("space", found, "free some space: images and logs need it")
    } else {
        good("space", found)
    }
}

fn folder(data: &Path) -> Finding {
    if data.as_os_str().len() > 70 {
        return failed(
            "data folder",
            "its path is too long for sockets",
            "choose a --data of at most 70 characters",
        );
    }
    let place = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let place = place.canonicalize().unwrap_or_else(|_| place.to_owned());
    // Check an existing folder itself. Of a new folder, check the parent, which may be like /tmp.
    let foreign = if data.exists() {
        super::folder::foreign(&place)
    } else {
        super::folder::foreign(&place.join("new"))
    };
    if let Some(foreign) = foreign {
        return failed(
            "data folder",
            format!("a user other than root can change {}", foreign.display()),
            "choose a --data whose parent folders only root can change",
        );
    }
    if DataFolder::exists(data) {
        good("data folder", format!("{} exists", data.display()))
    } else if service::is_given(data) {
        good(
            "data folder",
            format!(
                "{} holds the state of the systemd units, whose settings are in {}",
                data.display(),
                units::SETTINGS
            ),
        )
    } else if data.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        failed(
            "data folder",
            format!("{} holds files of another program", data.display()),
            "choose an empty or new folder: existing files are never overwritten",
        )
    } else {
        good("data folder", format!("{} will be created", data.display()))
    }
}

fn address(listen: SocketAddr) -> Finding {
    if !listen.ip().is_loopback() {
        return failed(
            "address",
            format!("{listen} is not a loopback address, and up serves plain HTTP"),
            "use --listen 127.0.0.1:PORT here; for a network, bulkhead serve with a certificate (deploy/systemd)",
        );
    }
    match TcpListener::bind(listen) {
        Ok(_) => good("address", format!("{listen} is free")),
        Err(error) => failed(
            "address",
            format!("{listen} cannot be used: {error}"),
            "stop what listens there (ss -ltnp), or choose another --listen",
        ),
    }
}

/// Containers get separate ids through id-mapped layers, which overlay supports since Linux 5.19.
fn id_maps() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 19) {
        good("id maps", "apps share the layers of images")
    } else {
        warning(
            "id maps",
            format!("Linux {} copies an image once for each app that runs it", release.trim()),
            "Linux 5.19 or later shares the layers",
        )
    }
}

fn user_ids(data: &Path) -> Finding {
    let Some(pool) = super::claims::prospect(&service::settings_folder(data)) else {
        return failed(
            "user ids",
            "every share of 1879048192 to 2147352575 is claimed or in use",
            "uninstall an installation that is not needed, or find the processes that use these ids (bulkhead doctor on each)",
        );
    };
    // The installation's own containers are the only processes that may have ids of its share.
    let own = super::claims::installation_of(&service::settings_folder(data));
    let found = machine::look(Path::new("/"), pool, own.as_ref());
    if let Some(clash) = found.clashes.first() {
        return failed(
            "user ids",
            format!(
                "the pool is in use outside Bulkhead ({} place(s), the first is {clash})",
                found.clashes.len()
            ),
            "free these ids, or set another pool with bulkhead serve (pools.uid_start, pools.uid_end)",
        );
    }
    match found.warnings.first() {
        Some(text) => warning("user ids", text.clone(), "choose a pool from 1879048192 to 2147352575"),
        None => good("user ids", format!("{} to {} are free", pool.start, pool.end() - 1)),
    }
}
