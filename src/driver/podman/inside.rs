//! What the agent settles inside an instance that is prepared and not started: its writable folders belong to its user,
//! and its standard output and error open again. No process of the app runs yet, so nothing moves meanwhile.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, fstat, fstatfs, open,
    openat, openat2, statat,
};

use super::render::Mount;
use crate::driver::workload::Workload;
use crate::driver::{Error, scratch};

/// The type of a file system in memory (statfs(2)).
const TMPFS: i64 = 0x0102_1994;
/// The mode of a folder that the image does not have.
const OWN: u32 = 0o700;
/// The mode of a folder that many write to.
const SHARED: u32 = 0o1777;

/// The mode of a writable folder: that of the image's own folder, always writable for its user.
#[must_use]
pub fn mode(path: &str, images: Option<u32>) -> u32 {
    match images {
        _ if path == "/tmp" || path == scratch::SHM => SHARED,
        Some(mode) => mode & 0o3777 | OWN,
        None => OWN,
    }
}

/// Gives the instance's user the folders and the pipes that are its own.
pub fn settle(pid: i32, workload: &Workload, mounts: &[Mount]) -> Result<(), Error> {
    if pid <= 1 {
        return Err(Error::Transient("the container has no process".into()));
    }
    // Its number may pass on to another process; what is opened below this folder is of this one, or fails.
    let process = process(pid, workload).map_err(|error| {
        Error::Transient(format!("the prepared process of the instance is not there any more: {error}"))
    })?;
    let host = |id: u16| workload.block.start + u32::from(id);
    let (uid, gid) = (Uid::from_raw(host(workload.user.uid)), Gid::from_raw(host(workload.user.gid)));
    let failed = |what: &str, error: rustix::io::Errno| {
        Error::Transient(format!("{what} of the instance cannot be given to its user: {error}"))
    };
    for mount in mounts {
        give(&process, mount, uid, gid).map_err(|error| failed(&mount.path, error))?;
    }
    for number in [1, 2] {
        let path = format!("fd/{number}");
        // The engine's own pipe; anything else has its rights already.
        let seen =
            statat(&process, &path, AtFlags::empty()).map_err(|error| failed("a standard stream", error))?;
        if FileType::from_raw_mode(seen.st_mode) == FileType::Fifo {
            chownat(&process, &path, Some(uid), Some(gid), AtFlags::empty())
                .map_err(|error| failed("a standard stream", error))?;
        }
    }
    Ok(())
}

/// The folder of a process in `/proc`, of one whose ids are the app's.
fn process(pid: i32, workload: &Workload) -> std::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = open(format!("/proc/{pid}"), flags, Mode::empty())?;
    let map = openat(&folder, "uid_map", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let text = std::io::read_to_string(std::fs::File::from(map))?;
    let mapped = text.split_whitespace().nth(1).and_then(|start| start.parse::<u32>().ok());
    if mapped == Some(workload.block.start) {
        Ok(folder)
    } else {
        Err(std::io::Error::other("another process has its number"))
    }
}

fn give(process: &OwnedFd, mount: &Mount, uid: Uid, gid: Gid) -> rustix::io::Result<()> {
    let root = openat(process, "root", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let folder = openat2(&root, mount.path.trim_start_matches('/'), flags, Mode::empty(), within)?;
    // The mount itself and nothing of the image: a file system in memory, apart from that of the root.
    let other = fstat(&root)?.st_dev == fstat(&folder)?.st_dev;
    if other || fstatfs(&folder)?.f_type != TMPFS {
        return Err(rustix::io::Errno::XDEV);
    }
    fchown(&folder, Some(uid), Some(gid))?;
    fchmod(&folder, Mode::from_raw_mode(mount.mode))
}
