//! A cgroup for each process that `up` runs, with limits on memory and tasks: the same limits that systemd
//! sets for units. The kernel kills a process that exceeds its memory, and `up` restarts it. Other processes
//! keep their memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where cgroups are mounted.
pub(super) const CGROUPS: &str = "/sys/fs/cgroup";

/// Enters every cgroup that the first argument lists, then executes the program that follows. The kernel
/// reads 0 as the writing process, and children inherit the cgroup of their parent.
const ENTER: &str =
    "for place in $0; do echo 0 >\"$place\" || echo \"cannot enter $place\" >&2; done; exec \"$@\"";

/// The limits of one process.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProcessLimits<'a> {
    /// Name of the cgroup.
    pub(super) name: &'a str,
    /// Memory in MiB.
    pub(super) memory: u32,
    /// Processes and threads.
    pub(super) tasks: u32,
}

/// Returns the folders of a cgroup below `root`: one on version 2, one for each controller on version 1.
pub(super) fn places(root: &Path, name: &str) -> Vec<PathBuf> {
    if root.join("cgroup.controllers").exists() {
        return vec![root.join(name)];
    }
    ["memory", "pids"].iter().map(|controller| root.join(controller).join(name)).collect()
}

impl ProcessLimits<'_> {
    /// Creates the cgroup and sets its limits. Returns the arguments to put before the command.
    pub(super) fn prepare(&self, root: &Path) -> io::Result<Vec<String>> {
        let bytes = (u64::from(self.memory) << 20).to_string();
        let tasks = self.tasks.to_string();
        let places = places(root, self.name);
        if let [unified] = places.as_slice() {
            // An error is ignored: the controllers may be enabled already.
            let _ = fs::write(root.join("cgroup.subtree_control"), "+memory +pids");
            make(unified)?;
            fs::write(unified.join("memory.max"), &bytes)?;
            fs::write(unified.join("pids.max"), &tasks)?;
            // Absent without swap.
            let _ = fs::write(unified.join("memory.swap.max"), "0");
        } else if let [memory, pids] = places.as_slice() {
            make(memory)?;
            fs::write(memory.join("memory.limit_in_bytes"), &bytes)?;
            make(pids)?;
            fs::write(pids.join("pids.max"), &tasks)?;
        }
        let doors: Vec<String> =
            places.iter().map(|place| place.join("cgroup.procs").display().to_string()).collect();
        Ok(["sh", "-c", ENTER, &doors.join(" ")].map(str::to_owned).to_vec())
    }
}

fn make(place: &Path) -> io::Result<()> {
    match fs::create_dir(place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Removes a cgroup whose processes have ended.
pub(super) fn release(root: &Path, name: &str) {
    for place in places(root, name) {
        let _ = fs::remove_dir(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGINE: ProcessLimits<'_> =
        ProcessLimits { name: "bulkhead-abcd-engine", memory: 1_024, tasks: 1_024 };

    fn read(path: PathBuf) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn version_2_has_one_cgroup_with_both_limits() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::write(root.join("cgroup.controllers"), "cpu memory pids").unwrap();
        let words = ENGINE.prepare(root).unwrap();
        let own = root.join(ENGINE.name);
        assert_eq!(words.last().unwrap(), &own.join("cgroup.procs").display().to_string());
        assert_eq!(read(own.join("memory.max")), "1073741824");
        assert_eq!(read(own.join("pids.max")), "1024");
        assert_eq!(read(root.join("cgroup.subtree_control")), "+memory +pids");
        // An existing cgroup of an earlier run is reused.
        assert!(ENGINE.prepare(root).is_ok());
    }

    #[test]
    fn version_1_has_one_cgroup_for_each_controller() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        // Without the controller there is no cgroup to enter: an error.
        assert!(ENGINE.prepare(root).is_err());
        fs::create_dir(root.join("memory")).unwrap();
        fs::create_dir(root.join("pids")).unwrap();
        let words = ENGINE.prepare(root).unwrap();
        assert_eq!(words.last().unwrap().split(' ').count(), 2);
        assert_eq!(read(root.join("memory").join(ENGINE.name).join("memory.limit_in_bytes")), "1073741824");
        assert_eq!(read(root.join("pids").join(ENGINE.name).join("pids.max")), "1024");
    }

    #[test]
    fn the_program_enters_first_and_runs_even_where_it_cannot() {
        let root = tempfile::tempdir().unwrap();
        let door = root.path().join("cgroup.procs");
        let run = |doors: &str| {
            std::process::Command::new("sh")
                .args(["-c", ENTER, doors, "echo", "a b"])
                .output()
                .unwrap()
                .stdout
        };
        assert_eq!(run(&door.display().to_string()), b"a b\n");
        assert_eq!(read(door), "0\n");
        assert_eq!(run("/nowhere/cgroup.procs"), b"a b\n");
    }
}
