//! The table of processes as systemd units, for `deploy/systemd`. A test holds the files there against
//! this text.

use std::fmt::Write as _;
use std::path::PathBuf;

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

/// All units: file name and text.
#[must_use]
pub fn units() -> Vec<(String, String)> {
    let table = table(&layout("x", "x", true));
    let names: Vec<String> = table.iter().map(|process| file(process.name)).collect();
    let target = format!(
        "[Unit]\nDescription=Bulkhead\nWants={names}\n\n[Install]\nWantedBy=multi-user.target\n",
        names = names.join(" ")
    );
    let units = table.iter().map(|process| (file(process.name), unit(process)));
    units.chain([("bulkhead.target".to_owned(), target)]).collect()
}

fn file(name: &str) -> String {
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

fn unit(process: &Process) -> String {
    let mut out = String::from(
        "# Written by `bulkhead units` from the table of processes that `bulkhead up` runs: do not edit.\n",
    );
    let after: Vec<String> = process.after.iter().map(|name| file(name)).collect();
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
    let _ = writeln!(out, "StartLimitIntervalSec=0\n\n[Service]\nExecStart={}", command(process));
    for (name, value) in &process.environment {
        let _ = writeln!(out, "Environment={name}={value}");
    }
    if process.stop != Signal::TERM {
        let _ = writeln!(out, "KillSignal={}", process.stop.as_raw());
    }
    out.push_str("Restart=always\nRestartSec=1\nTimeoutStopSec=20\n");
    if process.name != "engine" {
        out.push_str("UMask=0077\n");
    }
    if let Some(files) = process.files {
        let _ = writeln!(out, "LimitNOFILE={files}\nLimitCORE=0");
    }
    if let Some(memory) = process.memory {
        let _ = writeln!(out, "MemoryMax={memory}M\nTasksMax={}", process.tasks.unwrap_or(TASKS));
    }
    out.push_str(LAST_TO_GO);
    own_rules(process, &mut out);
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
            // The one capability of all that is not root: to listen where names are asked for.
            *out += &UNPRIVILEGED
                .replace(
                    "CapabilityBoundingSet=\nAmbientCapabilities=\n",
                    "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n",
                )
                .replace("PrivateUsers=yes\n", "");
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

fn command(process: &Process) -> String {
    let mut words = process.command.clone();
    // systemd wants whole paths.
    if let Some(first) = words.first_mut().filter(|first| !first.starts_with('/')) {
        *first = format!("/usr/bin/{first}");
    }
    words.join(" ")
}
