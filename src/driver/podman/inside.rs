//! Settings inside an instance that is prepared but not started. Its user becomes the owner of its writable
//! folders, and can open its standard output and error again. No process of the app runs yet, so nothing changes
//! meanwhile.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, fstat, fstatfs, open,
    openat, openat2, statat,
};

use super::render::Mount;
use crate::driver::workload::Workload;
use crate::driver::{Error, scratch};

/// Type of a file system in memory (statfs(2)).
const TMPFS: i64 = 0x0102_1994;
/// Mode of a folder that the image does not have.
const OWN: u32 = 0o700;
/// Mode of a folder with many writers.
const SHARED: u32 = 0o1777;

/// Returns the mode of a writable folder: that of the image's own folder, always writable for its user.
#[must_use]
pub fn mode(path: &str, images: Option<u32>) -> u32 {
    match images {
        _ if path == "/tmp" || path == scratch::SHM => SHARED,
        Some(mode) => mode & 0o3777 | OWN,
        None => OWN,
    }
}

/// Makes the instance's user the owner of its folders and pipes.
pub fn settle(pid: i32, workload: &Workload, mounts: &[Mount]) -> Result<(), Error> {
    if pid <= 1 {
        return Err(Error::Transient("the container has no process".into()));
    }
    // The process id may pass to another process. Everything opened below this folder is of this process, or
    // fails.
    let process = process(pid, workload).map_err(|error| {
        Error::Transient(format!("the prepared process of the instance no longer exists: {error}"))
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
        // The engine's own pipe; any other file has the right owner already.
        let seen =
            statat(&process, &path, AtFlags::empty()).map_err(|error| failed("a standard stream", error))?;
        if FileType::from_raw_mode(seen.st_mode) == FileType::Fifo {
            chownat(&process, &path, Some(uid), Some(gid), AtFlags::empty())
                .map_err(|error| failed("a standard stream", error))?;
        }
    }
    Ok(())
}

/// Opens the `/proc` folder of a process, and checks that its ids are the app's.
fn process(pid: i32, workload: &Workload) -> std::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = open(format!("/proc/{pid}"), flags, Mode::empty())?;
    let map = openat(&folder, "uid_map", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let text = std::io::read_to_string(std::fs::File::from(map))?;
    let mapped = text.split_whitespace().nth(1).and_then(|start| start.parse::<u32>().ok());
    if mapped == Some(workload.block.start) {
        Ok(folder)
    } else {
        Err(std::io::Error::other("another process has its process id"))
    }
}

fn give(process: &OwnedFd, mount: &Mount, uid: Uid, gid: Gid) -> rustix::io::Result<()> {
    let root = openat(process, "root", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let folder = openat2(&root, mount.path.trim_start_matches('/'), flags, Mode::empty(), within)?;
    // It must be the mount itself, not the image: a file system in memory, different from the root's.
    let other = fstat(&root)?.st_dev == fstat(&folder)?.st_dev;
    if other || fstatfs(&folder)?.f_type != TMPFS {
        return Err(rustix::io::Errno::XDEV);
    }
    fchown(&folder, Some(uid), Some(gid))?;
    fchmod(&folder, Mode::from_raw_mode(mount.mode))
}
