//! Disk space that each component keeps free. Where engine, registry and database share a file system, each has a
//! reserve that the components before it in this order cannot use. The registry stops first, and apps can still be
//! deployed. The engine stops next, and the database can still write. A full disk stops no app.

use std::path::Path;

/// A component that stops writing while the next one still has space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskConsumer {
    /// Accepts pushes.
    Registry,
    /// Fetches and unpacks images.
    Engine,
}

/// Largest reserve of one component, in bytes. On a small disk it is a twentieth of the disk.
const RESERVE: u64 = 1 << 30;

/// Space on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that must stay free.
    pub kept: u64,
}

impl DiskSpace {
    /// Whether this many more bytes can be written.
    #[must_use]
    pub fn has(self, bytes: u64) -> bool {
        self.free.saturating_sub(self.kept) >= bytes && self.free > self.kept
    }
}

/// Returns the bytes that a component keeps free on a disk of this size.
#[must_use]
pub fn kept(part: DiskConsumer, size: u64) -> u64 {
    let one = RESERVE.min(size / 20);
    match part {
        DiskConsumer::Registry => 3 * one,
        DiskConsumer::Engine => 2 * one,
    }
}

/// Returns the space that a component has at `place`; none when it cannot be read.
#[must_use]
pub fn room(part: DiskConsumer, place: &Path) -> Option<DiskSpace> {
    let stat = rustix::fs::statvfs(place).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    // A file system that is out of inodes is as full as one that is out of bytes.
    let free = if stat.f_files > 0 && stat.f_favail < stat.f_files / 50 { 0 } else { bytes(stat.f_bavail) };
    Some(DiskSpace { free, kept: kept(part, bytes(stat.f_blocks)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_stops_before_the_engine_and_both_before_the_database() {
        for size in [1 << 30, 20 << 30, 1 << 40] {
            let (registry, engine) = (kept(DiskConsumer::Registry, size), kept(DiskConsumer::Engine, size));
            assert!(registry > engine && engine > 0 && registry < size / 4, "{size}");
        }
        assert_eq!(kept(DiskConsumer::Engine, 1 << 40), 2 << 30);
        let room = DiskSpace { free: 10, kept: 4 };
        assert!(room.has(6) && room.has(0) && !room.has(7));
        assert!(!DiskSpace { free: 4, kept: 4 }.has(0), "at the reserve nothing starts");
        assert!(room_here().is_some());
    }

    fn room_here() -> Option<DiskSpace> {
        room(DiskConsumer::Engine, Path::new("/"))
    }
}
