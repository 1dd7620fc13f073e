//! The systemd units match the table of processes, and processes without root can do almost nothing.

use std::process::Command;

use std::path::Path;

use bulkhead::driver::podman::engine::EngineSettings;
use bulkhead::standalone::units::{units, units_of};
use bulkhead::standalone::{Layout, OwnParts};

#[test]
fn the_units_in_the_tree_are_the_table() {
    let mut known: Vec<String> = std::fs::read_dir("deploy/systemd")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != "install")
        .collect();
    known.sort();
    let mut names: Vec<String> = units().into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(known, names);
    for (name, text) in units() {
        let there = std::fs::read_to_string(format!("deploy/systemd/{name}")).unwrap();
        assert_eq!(there, text, "{name} is out of date: bulkhead units deploy/systemd");
    }
}

/// `systemd-analyze security` rates a unit from 0 (closed) to 10 (open). Units that face the network or read
/// tenants' data stay below 3.
#[test]
fn what_is_not_root_is_closed() {
    for name in ["bulkhead-serve.service", "bulkhead-prober.service", "bulkhead-resolver.service"] {
        let done = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=29", &format!("deploy/systemd/{name}")])
            .output()
            .expect("systemd-analyze is installed by deploy/packages --test");
        let text =
            String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{text}");
    }
}

/// In a user namespace all foreign users look like one: `serve` could not see the users of its pool's ids.
#[test]
fn serve_sees_whose_processes_the_machine_has() {
    for (name, text) in units() {
        if text.contains("bulkhead serve") {
            assert!(!text.contains("PrivateUsers=yes") && !text.contains("ProtectProc="), "{name}");
        }
    }
}

/// Returns the units of an installation in a data folder, with programs of this machine.
fn folder(has_database: bool, has_registry: bool) -> Vec<(String, String)> {
    let data = Path::new("/var/lib/bulkhead");
    let at = |name: &str| data.join(name);
    let layout = Layout {
        serve: "daemon".into(),
        prober: "daemon".into(),
        resolver: "daemon".into(),
        binaries: Path::new(env!("CARGO_BIN_EXE_bulkhead")).parent().unwrap().into(),
        serve_settings: at("serve.toml"),
        agent_settings: at("agent.toml"),
        prober_socket: at("run/prober/prober.sock"),
        resolver_socket: at("run/names/names.sock"),
        resolver_settings: at("resolver.toml"),
        engine: EngineSettings {
            root: at("engine"),
            run: "/run/bulkhead-abcd".into(),
            socket: at("run/engine/podman.sock"),
            registry_name: "abcd.bulkhead.internal".into(),
            pull_host: "127.0.0.1:5001".into(),
            may_raise_limits: true,
        },
        engine_cgroup: None,
        own: Some(OwnParts {
            postgres: std::fs::read_dir("/usr/lib/postgresql")
                .unwrap()
                .next()
                .unwrap()
                .unwrap()
                .path()
                .join("bin"),
            cluster: at("postgres/data"),
            database_socket: at("run/postgres"),
            database: "daemon".into(),
            registry_settings: at("registry.yml"),
            registry: "daemon".into(),
            registry_data: at("registry/data"),
            collector_socket: at("run/registry/collector.sock"),
            serve_uid: 1,
            has_database,
            has_registry,
        }),
    };
    units_of(&layout, data, Path::new(env!("CARGO_BIN_EXE_bulkhead")))
}

#[test]
fn systemd_reads_the_units_of_a_data_folder() {
    let dir = tempfile::tempdir().unwrap();
    let all = folder(true, true);
    let mut paths = Vec::new();
    for (name, text) in &all {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        paths.push(path);
    }
    let done = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&paths).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    let own: Vec<&str> = said.lines().filter(|line| line.contains("bulkhead")).collect();
    assert!(own.is_empty(), "{own:?}");
    // Every part except root's two is closed.
    for part in ["serve", "prober", "resolver", "postgres", "registry", "collector"] {
        let path = dir.path().join(format!("bulkhead-{part}.service"));
        let done = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=29"])
            .arg(path)
            .output()
            .unwrap();
        assert!(done.status.success(), "{part}: {}", String::from_utf8_lossy(&done.stdout));
    }
}

#[test]
fn what_is_needed_is_ready_first() {
    let all = folder(true, true);
    let text =
        |name: &str| &all.iter().find(|(known, _)| *known == format!("bulkhead-{name}.service")).unwrap().1;
    for part in ["postgres", "registry", "collector", "engine", "prober", "agent", "resolver", "serve"] {
        assert!(text(part).contains("Requires=bulkhead-prepare.service\n"), "{part}");
    }
    for part in ["postgres", "collector", "prober", "agent", "serve"] {
        assert!(text(part).contains("Type=notify\n"), "{part}");
    }
    let order = text("serve").lines().find(|line| line.starts_with("After=bulkhead-agent")).unwrap();
    assert!(
        order.contains("bulkhead-postgres.service") && order.contains("bulkhead-collector.service"),
        "{order}"
    );
    assert!(text("serve").contains("ExecStartPre=+"), "the database is migrated first");
    // The shell's own `$` is escaped for systemd.
    assert!(text("registry").contains("serve \\\"$$0\\\"\""), "{}", text("registry"));
    assert!(text("agent").contains("flock --no-fork --shared --nonblock /var/lib/bulkhead/lock"));
    // Postgres and the collector identify their clients by user id, so they must see the real users.
    for part in ["postgres", "collector", "registry", "serve"] {
        assert!(!text(part).contains("PrivateUsers=yes"), "{part}");
    }
}

#[test]
fn a_given_database_or_registry_has_no_unit() {
    let names = |database, registry| -> String {
        let names: Vec<String> = folder(database, registry).into_iter().map(|(name, _)| name).collect();
        names.join(" ")
    };
    assert!(!names(false, true).contains("postgres") && names(false, true).contains("registry"));
    assert!(names(true, false).contains("postgres"));
    for part in ["registry", "collector"] {
        assert!(!names(true, false).contains(part), "{part}");
    }
    let serve =
        folder(false, false).into_iter().find(|(name, _)| name == "bulkhead-serve.service").unwrap().1;
    assert!(!serve.contains("bulkhead-postgres") && !serve.contains("bulkhead-registry"), "{serve}");
}
