//! The systemd units are the table of processes, and what is not root may nearly nothing.

use std::process::Command;

use bulkhead::standalone::units::units;

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

/// `systemd-analyze security` rates a unit from 0 (closed) to 10 (open); what faces the network or
/// reads what tenants send stays under 3.
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

/// In a user namespace all foreign users are one: `serve` would not see who uses ids of its pool.
#[test]
fn serve_sees_whose_processes_the_machine_has() {
    for (name, text) in units() {
        if text.contains("bulkhead serve") {
            assert!(!text.contains("PrivateUsers=yes") && !text.contains("ProtectProc="), "{name}");
        }
    }
}
