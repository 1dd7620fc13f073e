//! The table of processes as systemd units, for `deploy/systemd`. A test compares the files there with this
//! text.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use super::processes::{Layout, Process, TASKS, table};
use crate::driver::podman::engine::EngineSettings;

/// Folder of the settings under systemd.
pub const SETTINGS: &str = "/etc/bulkhead";
/// Folder of the state under systemd.
pub const STATE: &str = "/var/lib/bulkhead";
/// Folder in which `serve` keeps the heads of the audit log's chain.
pub const AUDIT: &str = "/var/lib/bulkhead/audit";
/// Which system user may log in as which database role: `serve`, and root at the command line.
pub const IDENT: &str = "bulkhead bulkhead bulkhead\nbulkhead bulkhead bulkhead_reconciler\nbulkhead root bulkhead\n\
                         bulkhead root bulkhead_reconciler\n";
/// Folder of the sockets: one subfolder for each process, created by its unit.
const SOCKETS: &str = "/run/bulkhead";
/// User of `serve`.
pub const SERVE: &str = "bulkhead";
/// User of the prober.
pub const PROBER: &str = "bulkhead-prober";

/// User of the resolver.
pub const RESOLVER: &str = "bulkhead-resolver";

/// Returns the layout under systemd; the operator provides database and registry.
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

/// The target of all units of the platform.
pub const TARGET: &str = "bulkhead.target";
/// The comment in a target before the path of the data folder.
pub(super) const DATA_MARK: &str = "# Data folder: ";

/// Returns all units: file name and text.
#[must_use]
pub fn units() -> Vec<(String, String)> {
    let table = table(&layout("x", "x", true));
    let units = table.iter().map(|process| (file(process.name), unit(process, None)));
    units.chain([(TARGET.to_owned(), target(table.iter().map(|process| process.name), None))]).collect()
}

/// Returns all units of an installation in a data folder. `program` prepares the folder at each start.
#[must_use]
pub fn units_of(layout: &Layout, data: &Path, program: &Path) -> Vec<(String, String)> {
    let table = table(layout);
    let names: Vec<&str> = table.iter().map(|process| process.name).collect();
    let own = UnitFacts { data, program, names: &names };
    let mut units: Vec<_> =
        table.iter().map(|process| (file(process.name), unit(process, Some(&own)))).collect();
    units.push((file(PREPARE), prepare(&own)));
    units.push((TARGET.to_owned(), target(names.iter().copied().chain([PREPARE]), Some(data))));
    units
}

/// The unit that prepares the data folder before all others start.
const PREPARE: &str = "prepare";

/// Extra facts of an installation in a data folder.
struct UnitFacts<'a> {
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

fn prepare(own: &UnitFacts<'_>) -> String {
    // Waits only for the disk. If a foreground `up` holds the folder's lock, this unit fails and no other
    // starts.
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

/// A process that is not root can see and do almost nothing.
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

/// The agent removes namespaces and loads tables. It must share the machine's mounts, so no setting here may
/// create a mount namespace. A child of it unpacks images, and most images contain set-user-id files
/// (containers gain nothing by them). Creating such files therefore stays allowed.
const ROOT_HALF: &str = "NoNewPrivileges=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
CapabilityBoundingSet=~CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_BOOT CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MAC_ADMIN \
CAP_MAC_OVERRIDE CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_CONTROL CAP_AUDIT_READ CAP_LEASE CAP_SYS_PACCT \
CAP_LINUX_IMMUTABLE CAP_BPF CAP_CHECKPOINT_RESTORE
";

/// Settings that root's two processes share. ProtectSystem, ProtectHome, PrivateTmp and similar settings are
/// missing on purpose. Each creates a mount namespace for the unit, and the agent and the machine would no
/// longer see the engine's namespaces and file systems (systemd.exec(5), MountFlags). System calls that are
/// denied here are denied to containers too, which may not use them anyway.
const ROOT: &str = "RestrictRealtime=yes
LockPersonality=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
";

/// The engine loads the AppArmor profile and creates containers.
const ENGINE: &str = "CapabilityBoundingSet=~CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_BOOT CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_SYSLOG \
CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_CONTROL CAP_AUDIT_READ CAP_LEASE CAP_SYS_PACCT CAP_LINUX_IMMUTABLE
";

/// Under memory pressure, the kernel kills an instance before a part of the platform.
const LAST_TO_GO: &str = "OOMScoreAdjust=-900\n";

fn unit(process: &Process, own: Option<&UnitFacts<'_>>) -> String {
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
    // Lets the group of the registry's folder (the group of `serve`) use the socket.
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
        // Containers and their monitors outlive a restart and an upgrade of the engine's service. With this
        // variable set, the engine leaves a monitor in the engine's cgroup, under the engine's limits.
        "engine" => {
            *out += "UnsetEnvironment=INVOCATION_ID\nOOMPolicy=continue\n";
            *out +=
                "KillMode=process\nDelegate=yes\nStateDirectory=bulkhead/engine\nStateDirectoryMode=0700\n";
            *out += &folder("0700");
            *out += ROOT;
            *out += ENGINE;
        }
        "agent" => {
            // The group can reach the socket; the agent checks the user id of each client.
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
            // The list of processes and their owners stays visible: the agent compares the pool of user ids
            // with them. In a user namespace, all other users would look like one.
            let _ = writeln!(
                out,
                "User={user}\nGroup={user}\nStateDirectory=bulkhead/audit\nStateDirectoryMode=0700"
            );
            *out += "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n";
            *out += &UNPRIVILEGED.replace("PrivateUsers=yes\n", "");
        }
    }
}

/// Sets how systemd detects that a process is ready, and the command that runs before it.
fn readiness(process: &Process, own: Option<&UnitFacts<'_>>, out: &mut String) {
    let (kind, seconds) = match process.name {
        // After a crash, the cluster replays its log first.
        "postgres" => ("notify", 1800),
        // Migrates the database first.
        "serve" if own.is_some() => ("notify", 1800),
        "agent" | "prober" | "collector" | "serve" => ("notify", 300),
        _ => ("exec", 90),
    };
    let _ = writeln!(out, "Type={kind}\nTimeoutStartSec={seconds}");
    if let Some(own) = own.filter(|_| process.name == "serve") {
        let prepare =
            [show(own.program), "prepare".into(), "--database".into(), "--data".into(), show(own.data)];
        // Runs as root, outside the sandbox: `serve` itself may not change tables.
        let _ = writeln!(out, "ExecStartPre=+{}", words(&prepare));
    }
}

/// The same rules for an installation in a data folder, which sets owners and modes itself.
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
        // Postgres looks the socket's peer up in the system's users. Its query compiler writes programs into
        // memory.
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
            // New files in the socket's folder inherit its group. The collector identifies `serve` by user
            // id.
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
    // The only capability outside root: binding port 53.
    UNPRIVILEGED
        .replace(
            "CapabilityBoundingSet=\nAmbientCapabilities=\n",
            "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n",
        )
        .replace("PrivateUsers=yes\n", "")
}

fn command(process: &Process, own: Option<&UnitFacts<'_>>) -> String {
    let mut all = process.command.clone();
    // systemd requires absolute paths.
    if let Some(first) = all.first_mut().filter(|first| !first.starts_with('/')) {
        *first = format!("/usr/bin/{first}");
    }
    // The agent holds the lock of the data folder: no `up` can take the folder meanwhile.
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

/// Quotes a word for systemd (systemd.service(5), quoting); `%` and `$` are escaped.
fn word(text: &str) -> String {
    let plain = text.replace('%', "%%").replace('$', "$$");
    let bare = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%$".contains(c);
    if !plain.is_empty() && plain.chars().all(bare) {
        return plain;
    }
    format!("\"{}\"", plain.replace('\\', "\\\\").replace('"', "\\\""))
}
