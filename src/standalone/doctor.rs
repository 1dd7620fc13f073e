//! What the machine must have, checked before anything is started; each finding with its remedy.
//! `bulkhead doctor` prints the same checks that `up` makes.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use super::{Folder, numbers, postgres, running, service, surroundings, units};
use crate::driver::disk::{self, Part};
use crate::driver::podman::engine::RUNTIME;
use crate::uid_ranges::machine;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Good.
    Ok,
    /// It works, with less.
    Warning,
    /// It cannot work.
    Failed,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found.
    pub finding: String,
    /// What to do about it; empty when it is good.
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

/// Where a program is, looked for where root's programs are.
pub(super) fn program(name: &str) -> Option<String> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| format!("{folder}/{name}"))
        .find(|path| Path::new(path).exists())
}

/// Whether this process may raise limits: `CAP_SYS_RESOURCE` is bit 24 of the effective set.
#[must_use]
pub fn may_raise_limits() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|caps| caps & (1 << 24) != 0)
}

/// All checks for a data folder and an address.
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
        good("root", "this is root")
    } else {
        failed("root", "this is not root", "run it as root: it makes users, networks and containers")
    }
}

/// The two programs stand side by side and are started by their names.
fn parts(folder: Option<&Path>) -> Finding {
    let Some(folder) = folder else {
        return failed("programs", "the place of this program is not known", "start it by its full path");
    };
    let missing: Vec<&str> =
        ["bulkhead", "bulkhead-agent"].into_iter().filter(|name| !folder.join(name).is_file()).collect();
    if missing.is_empty() {
        good("programs", "bulkhead and bulkhead-agent stand side by side")
    } else {
        failed(
            "programs",
            format!("not in {}: {}", folder.display(), missing.join(", ")),
            "put both programs of one build, bulkhead and bulkhead-agent, into one folder, under these names",
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
        good("packages", "all programs are there")
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
            "runc is not there (crun takes orders from images and is not used)",
            "apt-get install runc",
        )
    }
}

fn limits() -> Finding {
    if may_raise_limits() {
        good("limits", "CAP_SYS_RESOURCE is there")
    } else {
        warning(
            "limits",
            "no CAP_SYS_RESOURCE: containers get at most 1024 open files and 1024 processes of one user",
            "nothing to do; on a machine of your own, root has it",
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
        good("cgroups", "version 1: all limits hold")
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
            "load nf_tables, or run where root may change the network (CAP_NET_ADMIN)",
        ),
        Err(error) => failed("nftables", error.to_string(), "apt-get install nftables"),
    }
}

fn space(data: &Path) -> Finding {
    let place = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let rooms = (disk::room(Part::Registry, place), disk::room(Part::Engine, place));
    let (Some(registry), Some(engine)) = rooms else {
        return failed("space", "the free space cannot be told", "choose another --data");
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
        failed("space", found, "free at least 1 GiB more than is kept, or choose another --data")
    } else if free < 10 * 1024 || !registry.has(0) {
        warning("space", found, "images and logs need room")
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
    // Only what is already there counts as the folder itself; what is above it may be like /tmp.
    let foreign = if data.exists() {
        super::folder::foreign(&place)
    } else {
        super::folder::foreign(&place.join("new"))
    };
    if let Some(foreign) = foreign {
        return failed(
            "data folder",
            format!("{} can be changed by somebody who is not root", foreign.display()),
            "choose a --data below folders of root's",
        );
    }
    if Folder::exists(data) {
        good("data folder", format!("{} is there", data.display()))
    } else if service::is_given(data) {
        good(
            "data folder",
            format!("{} is the state of the units, with settings in {}", data.display(), units::SETTINGS),
        )
    } else if data.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        failed(
            "data folder",
            format!("{} holds something else", data.display()),
            "choose an empty or new folder: nothing foreign is overwritten",
        )
    } else {
        good("data folder", format!("{} will be made", data.display()))
    }
}

fn address(listen: SocketAddr) -> Finding {
    if !listen.ip().is_loopback() {
        return failed(
            "address",
            format!("{listen} is beyond loopback, and up serves plain text"),
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

/// Containers get ids of their own through id-mapped layers, since Linux 5.19 on overlay.
fn id_maps() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 19) {
        good("id maps", "layers of images are shared between apps")
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
            "every share of 1879048192 to 2147352575 is claimed or used",
            "uninstall an installation that is not needed, or find who uses these ids (bulkhead doctor on each)",
        );
    };
    // An installation's own containers are the processes that may have ids of its share.
    let own = super::claims::installation_of(&service::settings_folder(data));
    let found = machine::look(Path::new("/"), pool, own.as_ref());
    if let Some(clash) = found.clashes.first() {
        return failed(
            "user ids",
            format!("the pool is used by others ({} place(s), the first is {clash})", found.clashes.len()),
            "free these ids, or set another pool with bulkhead serve (pools.uid_start, pools.uid_end)",
        );
    }
    match found.warnings.first() {
        Some(text) => warning("user ids", text.clone(), "choose a pool from 1879048192 to 2147352575"),
        None => good("user ids", format!("nobody uses {} to {}", pool.start, pool.end() - 1)),
    }
}
