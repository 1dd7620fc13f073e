//! Measures the folder of an image that a scratch folder covers: the runtime copies its files into memory at each start.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat};

/// Most entries that one measurement reads.
const ENTRIES: usize = 50_000;
/// Bytes of a page: tmpfs stores a file in whole pages (tmpfs(5)).
const PAGE: u64 = 4096;

/// Returns the bytes of memory that the regular files below a path take in a tmpfs.
///
/// Follows no link. Stops after 50,000 entries, so that the result is a lower bound for larger folders. A folder that
/// cannot be read counts as empty: the start itself then reports the failure.
#[must_use]
pub(super) fn measure(root: BorrowedFd<'_>, path: &str) -> u64 {
    let mut folders = vec![path.trim_start_matches('/').to_owned()];
    let (mut entries, mut bytes) = (0, 0_u64);
    while let Some(folder) = folders.pop() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let Ok(opened) = openat2(root, &folder, flags, Mode::empty(), resolve) else { continue };
        let Ok(listing) = Dir::read_from(opened.as_fd()) else { continue };
        for entry in listing.flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            entries += 1;
            if entries > ENTRIES {
                return bytes;
            }
            let Ok(stat) = statat(opened.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => {
                    let size = u64::try_from(stat.st_size).unwrap_or_default();
                    bytes = bytes.saturating_add(size.div_ceil(PAGE).saturating_mul(PAGE));
                }
                FileType::Directory => {
                    if let Ok(name) = name.to_str() {
                        folders.push(format!("{folder}/{name}"));
                    }
                }
                _ => {}
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, openat};
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn regular_files_count_in_whole_pages_and_links_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("data/sub/deep")).unwrap();
        fs::create_dir(root.join("other")).unwrap();
        fs::write(root.join("other/large"), vec![0; 100_000]).unwrap();
        fs::write(root.join("data/one"), "x").unwrap();
        fs::write(root.join("data/sub/deep/two"), vec![0; 4097]).unwrap();
        fs::write(root.join("data/empty"), "").unwrap();
        symlink("/other", root.join("data/link")).unwrap();
        symlink("../other/large", root.join("data/file-link")).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let top = openat(CWD, root, flags, Mode::empty()).unwrap();
        assert_eq!(measure(top.as_fd(), "/data"), 3 * PAGE);
        assert_eq!(measure(top.as_fd(), "/nowhere"), 0);
        assert_eq!(measure(top.as_fd(), "/data/one"), 0);
        assert_eq!(measure(top.as_fd(), "/data/link"), 0);
    }
}
