//! Resolves paths in the file tree of an image, as the runtime resolves them once the instance has its root. No
//! file is opened on the way, and no link leads out of the tree.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, readlinkat};
use rustix::io::Errno;

use super::dangers::KERNELS;

/// Maximum number of symbolic links in a path (path_resolution(7)).
const LINKS: usize = 40;
/// Maximum number of names that one check of an image opens, over all of its paths. The process of a check does
/// nothing else.
const STEPS: u32 = 20_000;
/// Names are opened one by one, from the root, through folders only.
const IN_PLACE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);
/// Folders on the path, to check the permission to pass through each of them.
type Passed = Vec<Stat>;

/// Target of a path.
#[derive(Debug)]
pub struct ResolvedPath {
    /// The path with links resolved, from the root.
    pub path: String,
    /// The file at the path; none when it does not exist.
    pub there: Option<(OwnedFd, Stat)>,
    /// The folders above it.
    pub passed: Passed,
}

impl ResolvedPath {
    /// Returns the type of the file.
    #[must_use]
    pub fn kind(&self) -> Option<FileType> {
        self.there.as_ref().map(|(_, stat)| FileType::from_raw_mode(stat.st_mode))
    }

    /// Whether the path leads into a folder that the kernel fills at run time.
    #[must_use]
    pub fn is_kernels(&self) -> bool {
        let first = self.path.split('/').nth(1).unwrap_or_default();
        KERNELS.contains(&first)
    }

    /// Returns the file as a path that this process can open.
    #[must_use]
    pub fn handle(&self) -> Option<String> {
        self.there.as_ref().map(|(file, _)| format!("/proc/self/fd/{}", file.as_raw_fd()))
    }
}

/// Error text when the limit is reached.
const SPENT: &str = "leads, together with the other paths of the image, through more than 20,000 names";

static OPENED: AtomicU32 = AtomicU32::new(0);

/// Whether this check has used up its steps; each call counts as one.
fn is_spent() -> bool {
    OPENED.fetch_add(1, Ordering::Relaxed) >= STEPS
}

/// Resolves a path. The error says what blocks it, in words that follow the name of the path.
pub fn follow(root: BorrowedFd<'_>, path: &str) -> Result<ResolvedPath, String> {
    let mut left: VecDeque<String> = path.split('/').map(str::to_owned).collect();
    let mut walked: Vec<String> = Vec::new();
    let mut passed: Passed = vec![fstat(root).map_err(|error| error.to_string())?];
    let mut there = None;
    let mut links = 0;
    let mut missing = false;
    while let Some(name) = left.pop_front() {
        match name.as_str() {
            "" | "." => continue,
            ".." => {
                if missing {
                    return Err("leads through a folder that does not exist".into());
                }
                if walked.pop().is_some() {
                    passed.pop();
                }
                there = None;
                continue;
            }
            _ => walked.push(name),
        }
        if missing {
            continue;
        }
        if let Some((_, stat)) = there.take()
            && let Some(last) = passed.last_mut()
        {
            *last = stat;
        }
        if is_spent() {
            return Err(SPENT.into());
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = match openat2(root, walked.join("/"), flags, Mode::empty(), IN_PLACE) {
            Ok(found) => found,
            Err(Errno::NOENT) => {
                missing = true;
                continue;
            }
            Err(Errno::NOTDIR) => return Err("leads through a file that is not a folder".into()),
            Err(error) => return Err(format!("cannot be followed: {error}")),
        };
        let stat = fstat(&found).map_err(|error| error.to_string())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            links += 1;
            if links > LINKS {
                return Err("leads through too many links".into());
            }
            let target = readlinkat(&found, "", Vec::new()).map_err(|error| error.to_string())?;
            let target = target
                .into_string()
                .map_err(|_| "leads through a link whose target is not text".to_owned())?;
            walked.pop();
            if target.starts_with('/') {
                walked.clear();
                passed.truncate(1);
            }
            for name in target.split('/').rev() {
                left.push_front(name.to_owned());
            }
            continue;
        }
        passed.push(stat);
        there = Some((found, stat));
        // The kernel's own files hide those of the image.
        if walked.first().is_some_and(|first| KERNELS.contains(&first.as_str())) {
            missing = true;
            there = None;
        }
    }
    if walked.is_empty() {
        let stat = passed[0];
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = openat2(root, ".", flags, Mode::empty(), IN_PLACE).map_err(|error| error.to_string())?;
        return Ok(ResolvedPath { path: "/".into(), there: Some((file, stat)), passed: Vec::new() });
    }
    if there.is_some() {
        passed.pop();
    }
    // The path ends in a link to a folder, or in `..`: its target is the folder itself.
    if there.is_none() && !missing {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found =
            openat2(root, walked.join("/"), flags, Mode::empty(), IN_PLACE).map_err(|e| e.to_string())?;
        let stat = fstat(&found).map_err(|error| error.to_string())?;
        passed.pop();
        there = Some((found, stat));
    }
    Ok(ResolvedPath { path: format!("/{}", walked.join("/")), there, passed })
}

/// A user inside the container, with all groups.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Person {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Person {
    /// Whether the mode of a file grants this user a right: 4 to read, 2 to write, 1 to execute or pass through.
    #[must_use]
    pub fn may(&self, stat: &Stat, right: u32) -> bool {
        let shift = if stat.st_uid == self.uid {
            6
        } else if stat.st_gid == self.gid || self.groups.contains(&stat.st_gid) {
            3
        } else {
            0
        };
        (stat.st_mode >> shift) & right == right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_within_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in ["run/a", "var", "proc/1", "opt/app/bin"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("file"), "x").unwrap();
        for (name, target) in [
            ("var/run", "/run"),
            ("var/up", "../../../../run"),
            ("deep", "var/run/a"),
            ("dangling", "/run/secrets"),
            ("kernel", "/proc/1"),
            ("around", "opt/app/bin/../../../proc/self/root"),
            ("loop", "loop"),
            ("opt/here", "app/"),
        ] {
            symlink(target, root.join(name)).unwrap();
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let top = rustix::fs::openat(rustix::fs::CWD, root, flags, Mode::empty()).unwrap();
        let at = |path: &str| follow(top.as_fd(), path);
        for (path, leads, is_there) in [
            ("/var/run/nginx", "/run/nginx", false),
            ("/var/run/a", "/run/a", true),
            ("/var/run", "/run", true),
            ("/var/up/x/y", "/run/x/y", false),
            ("/deep", "/run/a", true),
            ("/dangling", "/run/secrets", false),
            ("/dangling/x", "/run/secrets/x", false),
            ("/kernel/root", "/proc/1/root", false),
            ("/around", "/proc/self/root", false),
            ("/opt/here/bin", "/opt/app/bin", true),
            ("/opt/app/..", "/opt", true),
            ("/new/one", "/new/one", false),
            ("/file", "/file", true),
            ("/", "/", true),
        ] {
            let place = at(path).unwrap_or_else(|why| panic!("{path}: {why}"));
            assert_eq!((place.path.as_str(), place.there.is_some()), (leads, is_there), "{path}");
            assert_eq!(place.is_kernels(), leads.starts_with("/proc"), "{path}");
        }
        for bad in ["/loop", "/file/x", "/nowhere/../etc"] {
            assert!(at(bad).is_err(), "{bad}");
        }
        assert_eq!(at("/opt/here/bin").unwrap().passed.len(), 3);
    }

    #[test]
    fn a_path_that_leads_over_and_over_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        for n in 0..30 {
            let next = if n == 29 { "d".to_owned() } else { format!("l{}", n + 1) };
            symlink("d/../".repeat(800) + &next, dir.path().join(format!("l{n}"))).unwrap();
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let top = rustix::fs::openat(rustix::fs::CWD, dir.path(), flags, Mode::empty()).unwrap();
        // In a process of its own the count starts at zero; here other tests have counted too.
        let before = OPENED.swap(0, Ordering::Relaxed);
        let told = follow(top.as_fd(), "/l0").unwrap_err();
        OPENED.store(before, Ordering::Relaxed);
        assert_eq!(told, SPENT);
    }

    #[test]
    fn rights_go_by_owner_then_group_then_others() {
        let stat = |uid, gid, mode| {
            let mut stat = fstat(std::io::stdin()).unwrap();
            (stat.st_uid, stat.st_gid, stat.st_mode) = (uid, gid, mode);
            stat
        };
        let person = Person { uid: 7, gid: 8, groups: vec![0] };
        assert!(person.may(&stat(7, 1, 0o100), 1) && !person.may(&stat(7, 8, 0o011), 1));
        assert!(person.may(&stat(1, 0, 0o010), 1) && !person.may(&stat(1, 8, 0o701), 1));
        assert!(person.may(&stat(1, 1, 0o005), 5) && !person.may(&stat(1, 1, 0o770), 1));
    }
}
