//! Packet forwarding of the machine. The engine turns it on for the first network. An uninstall turns it off
//! again if it was off before and no other program needs it.

use std::fs;
use std::path::Path;

/// File in the data folder that holds the machine's setting from before the installation.
const RECORD: &str = "ip_forward-before";
const SETTING: &str = "sys/net/ipv4/ip_forward";

fn value(proc: &Path) -> String {
    fs::read_to_string(proc.join(SETTING)).unwrap_or_default().trim().to_owned()
}

/// Records whether the machine forwards packets, before a new data folder creates its first network.
pub(super) fn remember(proc: &Path, data: &Path) -> std::io::Result<()> {
    fs::write(data.join(RECORD), value(proc))
}

/// Turns forwarding off if it was off before. `others` says whether other installations exist; `net` is
/// `/sys/class/net`. Returns why forwarding stays on, if it does.
pub(super) fn restore(proc: &Path, net: &Path, data: &Path, others: bool) -> Option<String> {
    let before = fs::read_to_string(data.join(RECORD)).unwrap_or_default();
    if before.trim() != "0" || value(proc) != "1" {
        return None;
    }
    let why = if others {
        "another installation of this machine needs it".to_owned()
    } else if let Some(bridge) = bridge_of_others(net) {
        format!("the bridge {bridge} of another program may need it")
    } else {
        match fs::write(proc.join(SETTING), "0") {
            Ok(()) => return None,
            Err(error) => error.to_string(),
        }
    };
    Some(format!("net.ipv4.ip_forward stays 1: {why}. To turn it off: sysctl -w net.ipv4.ip_forward=0"))
}

/// Returns a bridge of another program, which may forward packets through it.
fn bridge_of_others(net: &Path) -> Option<String> {
    let entries = fs::read_dir(net).ok()?.flatten();
    entries
        .filter(|entry| entry.path().join("bridge").is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| !name.starts_with("bk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new(forwards: &str) -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(place.0.path().join("proc/sys/net/ipv4")).unwrap();
            fs::create_dir_all(place.0.path().join("net/eth0")).unwrap();
            fs::create_dir_all(place.0.path().join("net/bkabcd1/bridge")).unwrap();
            place.set(forwards);
            remember(&place.0.path().join("proc"), place.0.path()).unwrap();
            place.set("1\n");
            place
        }

        fn set(&self, text: &str) {
            fs::write(self.0.path().join("proc").join(SETTING), text).unwrap();
        }

        fn restored(&self, others: bool) -> (Option<String>, String) {
            let root = self.0.path();
            let said = restore(&root.join("proc"), &root.join("net"), root, others);
            (said, value(&root.join("proc")))
        }
    }

    #[test]
    fn forwarding_is_as_before_unless_others_need_it() {
        assert_eq!(Place::new("0\n").restored(false), (None, "0".into()));
        assert_eq!(Place::new("1\n").restored(false), (None, "1".into()), "it was on before");
        let (said, value) = Place::new("0\n").restored(true);
        assert!(value == "1" && said.unwrap().contains("another installation"));
        let place = Place::new("0\n");
        fs::create_dir_all(place.0.path().join("net/docker0/bridge")).unwrap();
        let (said, value) = place.restored(false);
        assert!(value == "1" && said.unwrap().contains("docker0"));
        // A folder of an earlier version has no record: the setting stays.
        let place = Place::new("0\n");
        fs::remove_file(place.0.path().join(RECORD)).unwrap();
        assert_eq!(place.restored(false), (None, "1".into()));
    }
}
