//! The table of processes as systemd units, for `deploy/systemd`. A test holds the files there against
//! this text.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use super::processes::{Layout, Process, TASKS, table};
use crate::driver::podman::engine::EngineSettings;

/// Where settings lie when systemd is in charge.
pub const SETTINGS: &str = "/etc/bulkhead";
/// Where state lies.
pub const STATE: &str = "/var/lib/bulkhead";
/// Where `serve` keeps the heads of the audit's chain.
pub const AUDIT: &str = "/var/lib/bulkhead/audit";
/// Who may be whom in the database, by what the system says: `serve`, and root at the command line.
pub const IDENT: &str = "bulkhead bulkhead bulkhead\nbulkhead bulkhead bulkhead_reconciler\nbulkhead root bulkhead\n\
                         bulkhead root bulkhead_reconciler\n";
/// Where sockets lie: one folder for each process, made by its unit.
const SOCKETS: &str = "/run/bulkhead";
/// The users.
pub const SERVE: &str = "bulkhead";
/// The prober's.
pub const PROBER: &str = "bulkhead-prober";

/// The resolver's.
pub const RESOLVER: &str = "bulkhead-resolver";

/// The layout when systemd is in charge: database and registry are given, not the installation's own.
#[must_use]
pub fn layout(registry_name: &str, pull_host: &str, may_raise_limits: bool) -> Layout {
    let (settings, state, sockets) = (PathBuf::from(SETTINGS), PathBuf::from(STATE), PathBuf::from(SOCKETS));
    Layout {
        serve: SERVE.into(),
        prober: PROBER.into(),
        resolver: RESOLVER.into(),
        binaries: "/usr/local/bin".into(),
        serve_settings: settings.join("serve.toml"),
        agent_settings: settings.join("agent.toml"),
        prober_socket: sockets.join("prober/prober.sock"),
        resolver_socket: sockets.join("names/names.sock"),
        resolver_settings: settings.join("resolver.toml"),
        engine: EngineSettings {
            root: state.join("engine"),
            run: "/run/bulkhead-engine".into(),
            socket: sockets.join("engine/podman.sock"),
            registry_name: registry_name.into(),
            pull_host: pull_host.into(),
            may_raise_limits,
        },
        engine_cgroup: None,
        own: None,
    }
}

/// The target that is all of the platform.
pub const TARGET: &str = "bulkhead.target";
/// What a target says before the path of the data folder that its units are for.
pub(super) const DATA_MARK: &str = "# Data folder: ";

/// All units: file name and text.
#[must_use]
pub fn units() -> Vec<(String, String)> {
    let table = table(&layout("x", "x", true));
    let units = table.iter().map(|process| (file(process.name), unit(process, None)));
    units.chain([(TARGET.to_owned(), target(table.iter().map(|process| process.name), None))]).collect()
}

/// All units of an installation in a data folder: `program` is the one that prepares it at each start.
#[must_use]
pub fn units_of(layout: &Layout, data: &Path, program: &Path) -> Vec<(String, String)> {
    let table = table(layout);
    let names: Vec<&str> = table.iter().map(|process| process.name).collect();
    let own = Own { data, program, names: &names };
    let mut units: Vec<_> =
        table.iter().map(|process| (file(process.name), unit(process, Some(&own)))).collect();
    units.push((file(PREPARE), prepare(&own)));
    units.push((TARGET.to_owned(), target(names.iter().copied().chain([PREPARE]), Some(data))));
    units
}

/// The unit that makes the data folder ready before all others.
const PREPARE: &str = "prepare";

/// Of an installation in a data folder.
struct Own<'a> {
    data: &'a Path,
    program: &'a Path,
    /// Names of all its processes.
    names: &'a [&'a str],
}

fn target<'a>(names: impl Iterator<Item = &'a str>, data: Option<&Path>) -> String {
    let names: Vec<String> = names.map(file).collect();
    let head = data.map(|data| format!("{DATA_MARK}{}\n", data.display())).unwrap_or_default();
    format!(
        "{head}[Unit]\nDescription=Bulkhead\nWants={names}\n\n[Install]\nWantedBy=multi-user.target\n",
        names = names.join(" ")
    )
}

fn prepare(own: &Own<'_>) -> String {
    // It waits for nothing but the disk. A foreground `up` has the folder locked, and then nothing is started.
    format!(
        "# Written by `bulkhead install`: do not edit.\n[Unit]\nDescription=Bulkhead: data folder\nPartOf={TARGET}\n\
         After=local-fs.target\n\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={}\nTimeoutStartSec=300\n\
         UMask=0077\n\n[Install]\nWantedBy={TARGET}\n",
        words(&[show(own.program), "prepare".into(), "--data".into(), show(own.data)])
    )
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

pub(super) fn file(name: &str) -> String {
    format!("bulkhead-{name}.service")
}

/// Who is not root sees and may nearly nothing.
const UNPRIVILEGED: &str = "NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
";

/// The root half takes down namespaces and loads tables: it shares the machine's mounts, so nothing here
/// may give it mounts of its own. Images are unpacked by a child of it: files with the bits of set-user-id are in most
/// of them (no container gains anything by these), so that making such files cannot be forbidden.
const ROOT_HALF: &str = "NoNewPrivileges=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
CapabilityBoundingSet=~CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_BOOT CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MAC_ADMIN \
CAP_MAC_OVERRIDE CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_CONTROL CAP_AUDIT_READ CAP_LEASE CAP_SYS_PACCT \
CAP_LINUX_IMMUTABLE CAP_BPF CAP_CHECKPOINT_RESTORE
";

/// What root's two processes have in common. ProtectSystem, ProtectHome, PrivateTmp and their like are not here: each
/// gives a unit mounts of its own, and then the engine's namespaces and file systems are no longer the agent's and the
/// machine's (systemd.exec(5), MountFlags). System calls that are closed here are closed for containers too, which
/// have none of them anyway.
const ROOT: &str = "RestrictRealtime=yes
LockPersonality=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
";

/// The engine loads AppArmor's profile and makes containers.
const ENGINE: &str = "CapabilityBoundingSet=~CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_BOOT CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_SYSLOG \
CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_CONTROL CAP_AUDIT_READ CAP_LEASE CAP_SYS_PACCT CAP_LINUX_IMMUTABLE
";

/// The kernel ends an instance before a part of the platform.
const LAST_TO_GO: &str = "OOMScoreAdjust=-900\n";

fn unit(process: &Process, own: Option<&Own<'_>>) -> String {
    let writer = if own.is_some() { "bulkhead install" } else { "bulkhead units" };
    let mut out = format!(
        "# Written by `{writer}` from the table of processes that `bulkhead up` runs: do not edit.\n"
    );
    let mut after: Vec<String> = process.after.iter().map(|name| file(name)).collect();
    if let Some(own) = own.filter(|_| process.name == "serve") {
        let private = ["postgres", "registry", "collector"].iter().filter(|name| own.names.contains(name));
        after.extend(private.map(|name| file(name)));
    }
    let _ = writeln!(out, "[Unit]\nDescription=Bulkhead: {}\nPartOf=bulkhead.target", process.purpose);
    let mut order = after.clone();
    if process.name == "serve" {
        order.extend(["network-online.target".into(), "postgresql.service".into()]);
        let _ = writeln!(out, "Wants=network-online.target {}", after.join(" "));
    } else if !after.is_empty() {
        let _ = writeln!(out, "Wants={}", after.join(" "));
    }
    if !order.is_empty() {
        let _ = writeln!(out, "After={}", order.join(" "));
    }
    if own.is_some() {
        let _ = writeln!(out, "Requires={0}\nAfter={0}", file(PREPARE));
    }
    out.push_str("StartLimitIntervalSec=0\n\n[Service]\n");
    readiness(process, own, &mut out);
    let _ = writeln!(out, "ExecStart={}", command(process, own));
    for (name, value) in &process.environment {
        let _ = writeln!(out, "Environment={}", word(&format!("{name}={value}")));
    }
    if process.stop != Signal::TERM {
        let _ = writeln!(out, "KillSignal={}", process.stop.as_raw());
    }
    out.push_str("Restart=always\nRestartSec=1\nTimeoutStopSec=20\n");
    // The group of the registry's folder, which is that of `serve`, reaches its socket.
    match process.name {
        "engine" => {}
        "registry" => out.push_str("UMask=0007\n"),
        _ => out.push_str("UMask=0077\n"),
    }
    if let Some(files) = process.files {
        let _ = writeln!(out, "LimitNOFILE={files}\nLimitCORE=0");
    }
    if let Some(memory) = process.memory {
        let _ = writeln!(out, "MemoryMax={memory}M\nTasksMax={}", process.tasks.unwrap_or(TASKS));
    }
    out.push_str(LAST_TO_GO);
    match own {
        Some(own) => folder_rules(process, own.data, &mut out),
        None => own_rules(process, &mut out),
    }
    let _ = writeln!(out, "\n[Install]\nWantedBy=bulkhead.target");
    out
}

fn own_rules(process: &Process, out: &mut String) {
    let folder =
        |mode: &str| format!("RuntimeDirectory=bulkhead/{}\nRuntimeDirectoryMode={mode}\n", process.name);
    match process.name {
        // Containers and their monitors outlive the engine's service, a restart and an upgrade of it. The engine
        // leaves a monitor in its own cgroup, and so under its own limits, where it sees this variable.
        "engine" => {
            *out += "UnsetEnvironment=INVOCATION_ID\nOOMPolicy=continue\n";
            *out +=
                "KillMode=process\nDelegate=yes\nStateDirectory=bulkhead/engine\nStateDirectoryMode=0700\n";
            *out += &folder("0700");
            *out += ROOT;
            *out += ENGINE;
        }
        "agent" => {
            // The group reaches the socket; whoever asks there is checked by user id.
            let _ = writeln!(out, "Group={SERVE}\nStateDirectory=bulkhead/agent\nStateDirectoryMode=0700");
            *out += &folder("0750");
            *out += ROOT;
            *out += ROOT_HALF;
        }
        "prober" => {
            *out += &folder("0700");
            let _ = writeln!(out, "User={PROBER}\nGroup={PROBER}\nProtectProc=invisible");
            *out += "RestrictAddressFamilies=AF_UNIX AF_INET\n";
            *out += UNPRIVILEGED;
        }
        "resolver" => {
            let _ = writeln!(out, "User={RESOLVER}\nGroup={RESOLVER}\nProtectProc=invisible");
            *out += "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";
            *out += &resolver_rules();
        }
        _ => {
            let user = process.user.as_deref().unwrap_or("root");
            // The list of processes stays visible, and their owners as they are: the pool of user ids is held against
            // them. In a user namespace all others would seem to be one user.
            let _ = writeln!(
                out,
                "User={user}\nGroup={user}\nStateDirectory=bulkhead/audit\nStateDirectoryMode=0700"
            );
            *out += "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";
            *out += &UNPRIVILEGED.replace("PrivateUsers=yes\n", "");
        }
    }
}

/// What tells systemd that a process does its work, and what goes before it.
fn readiness(process: &Process, own: Option<&Own<'_>>, out: &mut String) {
    let (kind, seconds) = match process.name {
        // A cluster that was not stopped replays its log first.
        "postgres" => ("notify", 1800),
        // It brings the database to its version first.
        "serve" if own.is_some() => ("notify", 1800),
        "agent" | "prober" | "collector" | "serve" => ("notify", 300),
        _ => ("exec", 90),
    };
    let _ = writeln!(out, "Type={kind}\nTimeoutStartSec={seconds}");
    if let Some(own) = own.filter(|_| process.name == "serve") {
        let prepare =
            [show(own.program), "prepare".into(), "--database".into(), "--data".into(), show(own.data)];
        // With root's rights, outside of the sandbox: `serve` itself may not change tables.
        let _ = writeln!(out, "ExecStartPre=+{}", words(&prepare));
    }
}

/// The same rules for an installation in a data folder, whose owners and modes are the folder's.
fn folder_rules(process: &Process, data: &Path, out: &mut String) {
    if let Some(user) = &process.user {
        let _ = writeln!(out, "User={user}\nGroup={user}");
    }
    let writes = |places: &[&str]| {
        let places: Vec<String> = places.iter().map(|place| word(&show(&data.join(place)))).collect();
        format!("ReadWritePaths={}\n", places.join(" "))
    };
    match process.name {
        "engine" => {
            *out += "UnsetEnvironment=INVOCATION_ID\nOOMPolicy=continue\nKillMode=process\nDelegate=yes\n";
            *out += ROOT;
            *out += ENGINE;
        }
        "agent" => {
            *out += ROOT;
            *out += ROOT_HALF;
        }
        "prober" => {
            *out += &writes(&["run/prober"]);
            *out += "ProtectProc=invisible\nRestrictAddressFamilies=AF_UNIX AF_INET\n";
            *out += UNPRIVILEGED;
        }
        "resolver" => {
            *out += "ProtectProc=invisible\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";
            *out += &resolver_rules();
        }
        // It holds who is at the other end of its socket against its own list of users; its compiler of queries writes
        // programs into memory.
        "postgres" => {
            *out += &writes(&["postgres", "run/postgres"]);
            *out +=
                "KillMode=mixed\nProtectProc=invisible\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";
            *out += &UNPRIVILEGED
                .replace("PrivateUsers=yes\n", "")
                .replace("MemoryDenyWriteExecute=yes\n", "")
                .replace("RemoveIPC=yes\n", "");
        }
        "registry" | "collector" => {
            *out += &writes(&["registry", "run/registry"]);
            *out += "ProtectProc=invisible\nRestrictAddressFamilies=AF_UNIX\n";
            // The folder of the socket hands its group on; the collector knows `serve` by its user id.
            *out += &UNPRIVILEGED.replace("PrivateUsers=yes\n", "").replace("RestrictSUIDSGID=yes\n", "");
        }
        _ => {
            *out += &writes(&["audit"]);
            *out += "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";
            *out += &UNPRIVILEGED.replace("PrivateUsers=yes\n", "");
        }
    }
}

fn resolver_rules() -> String {
    // The one capability of all that is not root: to listen where names are asked for.
    UNPRIVILEGED
        .replace(
            "CapabilityBoundingSet=\nAmbientCapabilities=\n",
            "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n",
        )
        .replace("PrivateUsers=yes\n", "")
}

fn command(process: &Process, own: Option<&Own<'_>>) -> String {
    let mut all = process.command.clone();
    // systemd wants whole paths.
    if let Some(first) = all.first_mut().filter(|first| !first.starts_with('/')) {
        *first = format!("/usr/bin/{first}");
    }
    // The lock of the data folder is held as long as the agent runs: no `up` takes the folder meanwhile.
    if let Some(own) = own.filter(|_| process.name == "agent") {
        let lock = show(&own.data.join("lock"));
        let flock = ["/usr/bin/flock", "--no-fork", "--shared", "--nonblock", &lock];
        all.splice(0..0, flock.map(str::to_owned));
    }
    words(&all)
}

fn words(all: &[String]) -> String {
    all.iter().map(|one| word(one)).collect::<Vec<_>>().join(" ")
}

/// A word as systemd reads it back (systemd.service(5), quoting): `%` and `$` stand for themselves.
fn word(text: &str) -> String {
    let plain = text.replace('%', "%%").replace('$', "$$");
    let bare = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%$".contains(c);
    if !plain.is_empty() && plain.chars().all(bare) {
        return plain;
    }
    format!("\"{}\"", plain.replace('\\', "\\\\").replace('"', "\\\""))
}
