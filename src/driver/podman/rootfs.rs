//! Checks the contents of an image before the engine starts anything from it. The engine reads `etc/passwd` and
//! `etc/group` of an image as root while it holds the container's lock. A FIFO there blocks it for good, and a
//! large file takes its memory. The image is therefore mounted read-only, exactly as the kernel will show it to the
//! container (whiteouts and `trusted.overlay.*` attributes included). Its files are examined without opening them
//! first.
//!
//! A child process makes the mount in a mount namespace of its own. The mount ends with the child in every case.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use super::client::ImageSeen;
use super::program::{self, Program};
use super::tree::{self, Person};
use super::{content, dangers};
use crate::driver::{Error, scratch};

/// Maximum size of `etc/passwd` and `etc/group` of an image, in bytes.
pub const NAMES: u64 = 256 << 10;
/// Argument that makes the agent's program check an image instead.
pub const ARGUMENT: &str = "--look-at-image";
/// Time limit of a check.
const PATIENCE: Duration = Duration::from_secs(20);
/// Maximum number of layers of an image: one mount cannot name more.
const LAYERS: usize = 128;
/// Paths are opened below the root, and through no symbolic link.
const IN_PLACE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// Input of a check.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RootfsQuestion {
    /// Folder of the engine's layers.
    overlay: PathBuf,
    /// Ids of the layers, topmost first.
    layers: Vec<String>,
    /// The image's working directory.
    working_dir: String,
    /// Requirements of the instance.
    wanted: Wanted,
}

/// Requirements of an instance on an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Writable folders, as the spec names them.
    pub scratch: Vec<String>,
    /// The size of each writable folder in bytes, in the same order.
    pub sizes: Vec<u64>,
    /// The writable folders in which files may be executed.
    pub exec: Vec<String>,
    /// The first word of the command.
    pub word: String,
    /// `PATH` of the program.
    pub path: Option<String>,
    /// User that runs it.
    pub person: Person,
}

/// A writable folder, with the image's links resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScratchFolder {
    /// The path with links resolved.
    pub path: String,
    /// The mode of the image's folder at that path, if it has one.
    pub mode: Option<u32>,
}

/// Data that a check returns.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootfsFacts {
    /// `etc/passwd` and `etc/group`.
    pub names: AccountFiles,
    /// Each writable folder, in the order of the question.
    pub scratch: Vec<ScratchFolder>,
    /// Why the instance cannot start, and what to change.
    pub trouble: Option<String>,
}

/// Result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RootfsVerdict {
    /// Nothing in the image is harmful.
    Fine(RootfsFacts),
    /// The image is refused, for this reason.
    Refused(String),
    /// The image could not be checked.
    Failed(String),
}

/// `etc/passwd` and `etc/group` of an image; empty when absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccountFiles {
    /// `etc/passwd`.
    pub passwd: Vec<u8>,
    /// `etc/group`.
    pub group: Vec<u8>,
}

/// Checks an image of the engine: first its config, then its files.
pub async fn look(image: &ImageSeen, wanted: &Wanted) -> Result<RootfsFacts, Error> {
    dangers::of_config(&image.env, &image.working_dir, &image.stop_signal).map_err(Error::Rejected)?;
    let question =
        question(image, wanted).map_err(|why| Error::Transient(format!("the image's layers: {why}")))?;
    let failed = |error: std::io::Error| Error::Transient(format!("the image cannot be checked: {error}"));
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = tokio::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(program)
        .arg(ARGUMENT)
        // Layers are named by short relative paths: one mount takes 4096 bytes of options.
        .current_dir(&question.overlay)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let text = serde_json::to_vec(&question).map_err(|error| Error::Transient(error.to_string()))?;
    let asked = async {
        if let Some(mut input) = child.stdin.take() {
            input.write_all(&text).await?;
        }
        child.wait_with_output().await
    };
    let Ok(done) = tokio::time::timeout(PATIENCE, asked).await else {
        return Err(Error::Transient("the check of the image did not finish in time".into()));
    };
    match serde_json::from_slice(&done.map_err(failed)?.stdout) {
        Ok(RootfsVerdict::Fine(found)) => Ok(found),
        Ok(RootfsVerdict::Refused(why)) => Err(Error::Rejected(why)),
        Ok(RootfsVerdict::Failed(why)) => {
            Err(Error::Transient(format!("the image cannot be checked: {why}")))
        }
        Err(_) => Err(Error::Transient("the check of the image gave no answer".into())),
    }
}

/// Builds the question from the folders that the engine names: `.../overlay/IDENTITY/diff`.
fn question(image: &ImageSeen, wanted: &Wanted) -> Result<RootfsQuestion, String> {
    let mut overlay = None;
    let mut layers = Vec::new();
    for folder in &image.layers {
        let layer = folder.parent().ok_or("a layer has no folder")?;
        let (name, above) = (layer.file_name().and_then(|name| name.to_str()), layer.parent());
        let (Some(name), Some(above)) = (name, above) else { return Err("a layer has no name".into()) };
        if folder.file_name().is_none_or(|last| last != "diff")
            || name.len() != 64
            || !name.bytes().all(|b| b.is_ascii_hexdigit())
            || overlay.as_deref().is_some_and(|known: &Path| known != above)
        {
            return Err("a layer is not in the engine's folder of layers".into());
        }
        overlay = Some(above.to_owned());
        layers.push(name.to_owned());
    }
    let overlay = overlay.ok_or("there are none")?;
    if layers.len() > LAYERS {
        return Err("there are too many".into());
    }
    Ok(RootfsQuestion { overlay, layers, working_dir: image.working_dir.clone(), wanted: wanted.clone() })
}

/// The child's part: reads the question, mounts, checks, answers. It runs in its own mount namespace.
#[must_use]
pub fn answer() -> std::process::ExitCode {
    let verdict = ask().unwrap_or_else(RootfsVerdict::Failed);
    let text = serde_json::to_vec(&verdict).unwrap_or_default();
    match std::io::stdout().write_all(&text) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(_) => std::process::ExitCode::FAILURE,
    }
}

fn ask() -> Result<RootfsVerdict, String> {
    let mut text = Vec::new();
    std::io::stdin().take(1 << 20).read_to_end(&mut text).map_err(|error| error.to_string())?;
    let question: RootfsQuestion = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let root = open_root(&question)?;
    Ok(examine(root.as_fd(), &question.working_dir, &question.wanted))
}

/// Opens the image as the kernel shows it.
fn open_root(question: &RootfsQuestion) -> Result<OwnedFd, String> {
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |path: &Path| {
        openat(CWD, path, folder, Mode::empty()).map_err(|error| format!("{}: {error}", path.display()))
    };
    if let [only] = &question.layers[..] {
        return open(&question.overlay.join(only).join("diff"));
    }
    let mut lower = Vec::new();
    for layer in &question.layers {
        let link = std::fs::read_to_string(question.overlay.join(layer).join("link"))
            .map_err(|error| error.to_string())?;
        if link.is_empty() || !link.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err("a layer has no short name".into());
        }
        lower.push(format!("l/{link}"));
    }
    let options =
        std::ffi::CString::new(format!("lowerdir={}", lower.join(":"))).map_err(|error| error.to_string())?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("overlay", &question.overlay, "overlay", flags, Some(options.as_c_str()))
        .map_err(|error| format!("it cannot be mounted: {error}"))?;
    open(&question.overlay)
}

/// Checks a file tree. It opens only regular files of limited size.
fn examine(root: BorrowedFd<'_>, working_dir: &str, wanted: &Wanted) -> RootfsVerdict {
    match open_in(root, "etc") {
        Ok(None) => {}
        Ok(Some(etc)) if kind(&etc) == Some(FileType::Directory) => {}
        Ok(Some(_)) => return refused("its etc is not a directory"),
        Err(why) => return RootfsVerdict::Failed(why),
    }
    let (passwd, group) = match (file(root, "etc/passwd"), file(root, "etc/group")) {
        (Ok(passwd), Ok(group)) => (passwd, group),
        (Err(verdict), _) | (_, Err(verdict)) => return verdict,
    };
    if let Err(why) = examine_working_dir(root, working_dir) {
        return refused(why);
    }
    let names = AccountFiles { passwd, group };
    let (scratch, trouble) = match folders(root, &wanted.scratch) {
        Ok(scratch) => {
            let full = overfull(root, &scratch, wanted);
            (scratch, full)
        }
        Err(why) => (Vec::new(), Some(why)),
    };
    let is_closed = |(_, asked): &(&ScratchFolder, &String)| !wanted.exec.contains(asked);
    let program = Program {
        word: wanted.word.clone(),
        path: wanted.path.clone(),
        working_dir: if working_dir.is_empty() { "/".to_owned() } else { working_dir.to_owned() },
        person: wanted.person.clone(),
        scratch: scratch.iter().map(|folder| folder.path.clone()).collect(),
        closed: scratch
            .iter()
            .zip(&wanted.scratch)
            .filter(is_closed)
            .map(|(folder, _)| folder.path.clone())
            .collect(),
    };
    let trouble = trouble.or_else(|| program::check(root, &program).err());
    RootfsVerdict::Fine(RootfsFacts { names, scratch, trouble })
}

/// Returns the writable folders with the image's links resolved. The error is a sentence that names the folder that
/// is not possible.
fn folders(root: BorrowedFd<'_>, asked: &[String]) -> Result<Vec<ScratchFolder>, String> {
    let mut all: Vec<ScratchFolder> = Vec::new();
    for path in asked {
        // The kernel's own folder is not in the image.
        let folder = if path == scratch::SHM {
            ScratchFolder { path: path.clone(), mode: None }
        } else {
            let place =
                tree::follow(root, path).map_err(|why| format!("the scratch {path} {why} in the image"))?;
            let mode = match place.kind() {
                None => None,
                Some(FileType::Directory) => place.there.as_ref().map(|(_, stat)| stat.st_mode & 0o7777),
                Some(_) => {
                    let instead = "name a path that the image does not have, or the folder above it";
                    return Err(format!("the scratch {path} is a file in the image; {instead}"));
                }
            };
            ScratchFolder { path: place.path, mode }
        };
        let leads = if folder.path == *path {
            String::new()
        } else {
            format!(" leads to {} in the image and", folder.path)
        };
        if !scratch::is_path(&folder.path) {
            return Err(format!(
                "the scratch {path}{leads} cannot be a folder of its own; name another folder"
            ));
        }
        if let Some(closed) = scratch::closed(&folder.path) {
            return Err(format!(
                "the scratch {path}{leads} lies in {closed}, which the platform fills itself; name another folder"
            ));
        }
        let meets = |other: &ScratchFolder| {
            other.path == folder.path
                || scratch::is_within(&other.path, &folder.path)
                || scratch::is_within(&folder.path, &other.path)
        };
        if let Some(n) = all.iter().position(meets) {
            return Err(format!(
                "the scratch {path}{leads} lies in or around the scratch {}; name only one of the two",
                asked[n]
            ));
        }
        all.push(folder);
    }
    Ok(all)
}

/// Returns a sentence about the first writable folder that is smaller than the files of the image that it starts with.
fn overfull(root: BorrowedFd<'_>, scratch: &[ScratchFolder], wanted: &Wanted) -> Option<String> {
    const MIB: u64 = 1 << 20;
    let all = scratch.iter().zip(&wanted.scratch).zip(&wanted.sizes);
    all.filter(|((folder, _), _)| folder.mode.is_some()).find_map(|((folder, asked), size)| {
        let needed = content::measure(root, &folder.path);
        (needed > *size).then(|| {
            format!(
                "the scratch {asked} has {} KiB, and the image has {} KiB of files in that folder, which are copied into \
                 the scratch at each start; write {asked}: {}Mi or more under scratch, with as much more memory, or delete \
                 the files in the Dockerfile",
                size / 1024,
                needed / 1024,
                (needed + needed / 4).div_ceil(MIB)
            )
        })
    })
}

fn refused(why: &str) -> RootfsVerdict {
    RootfsVerdict::Refused(format!("the image is refused: {why}"))
}

fn kind(file: &OwnedFd) -> Option<FileType> {
    fstat(file).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
}

/// Returns a handle to a path, without opening the file and without following links; none when it does not exist.
fn open_in(root: BorrowedFd<'_>, path: &str) -> Result<Option<OwnedFd>, String> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat2(root, path, flags, Mode::empty(), IN_PLACE) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

/// Returns the bytes of a regular file of limited size; empty when it is absent.
fn file(root: BorrowedFd<'_>, path: &'static str) -> Result<Vec<u8>, RootfsVerdict> {
    let Some(found) = open_in(root, path).map_err(RootfsVerdict::Failed)? else { return Ok(Vec::new()) };
    let failed = |error: &dyn std::fmt::Display| RootfsVerdict::Failed(format!("{path}: {error}"));
    let stat = fstat(&found).map_err(|error| failed(&error))?;
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "",
        FileType::Fifo => "a FIFO",
        FileType::Symlink => "a symbolic link",
        FileType::Directory => "a directory",
        _ => "a device or socket",
    };
    if !what.is_empty() {
        return Err(refused(&format!("its {path} is {what}, not a regular file")));
    }
    if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > NAMES {
        return Err(refused(&format!("its {path} is larger than 256 KiB")));
    }
    // The file is opened only now. The mount is read-only, so its contents do not change.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = openat2(root, path, flags, Mode::empty(), IN_PLACE).map_err(|error| failed(&error))?;
    let mut bytes = Vec::new();
    std::fs::File::from(opened).take(NAMES).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
    Ok(bytes)
}

/// Checks the working directory. The runtime enters it as root and follows links. By way of `/proc/self/fd` it
/// would enter a folder of the host (CVE-2024-21626).
fn examine_working_dir(root: BorrowedFd<'_>, working_dir: &str) -> Result<(), &'static str> {
    let inside = working_dir.trim_start_matches('/');
    if inside.is_empty() {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match openat2(root, inside, flags, Mode::empty(), IN_PLACE) {
        Ok(found) if kind(&found) == Some(FileType::Directory) => return Ok(()),
        // The engine creates it.
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::LOOP) => {}
        _ => return Err("its working directory is not a directory"),
    }
    let found = openat2(root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .map_err(|_| "its working directory leads through a link to nowhere")?;
    if kind(&found) != Some(FileType::Directory) {
        return Err("its working directory is not a directory");
    }
    let own = std::fs::read_link(format!("/proc/self/fd/{}", rustix::fd::AsRawFd::as_raw_fd(&root)));
    let real = std::fs::read_link(format!("/proc/self/fd/{}", rustix::fd::AsRawFd::as_raw_fd(&found)));
    let (Ok(own), Ok(real)) = (own, real) else { return Err("its working directory has no path") };
    let first = real.strip_prefix(&own).ok().and_then(|path| path.components().next());
    match first {
        Some(Component::Normal(name)) if dangers::KERNELS.iter().any(|own| name == *own) => {
            Err("its working directory leads into /proc, /sys or /dev")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn verdict(dir: &Path, working_dir: &str) -> RootfsVerdict {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        examine(openat(CWD, dir, flags, Mode::empty()).unwrap().as_fd(), working_dir, &wanted(&[]))
    }

    fn wanted(scratch: &[&str]) -> Wanted {
        Wanted {
            scratch: scratch.iter().map(ToString::to_string).collect(),
            sizes: vec![8192; scratch.len()],
            exec: Vec::new(),
            word: String::new(),
            path: None,
            person: Person { uid: 1, gid: 1, groups: Vec::new() },
        }
    }

    fn why(dir: &Path, working_dir: &str) -> String {
        match verdict(dir, working_dir) {
            RootfsVerdict::Refused(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(verdict(root, ""), RootfsVerdict::Fine(RootfsFacts::default()));
        fs::create_dir(root.join("etc")).unwrap();
        fs::write(root.join("etc/passwd"), "app:x:1:1::/:/bin/sh\n").unwrap();
        let RootfsVerdict::Fine(found) = verdict(root, "/") else { panic!() };
        assert_eq!(found.names.passwd, b"app:x:1:1::/:/bin/sh\n");
        // Opening it would block for ever.
        let fifo = root.join("etc/group");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        assert!(why(root, "").contains("etc/group is a FIFO"));
        fs::remove_file(&fifo).unwrap();
        symlink("/etc/shadow", &fifo).unwrap();
        assert!(why(root, "").contains("symbolic link"));
        fs::remove_file(&fifo).unwrap();
        fs::create_dir(&fifo).unwrap();
        assert!(why(root, "").contains("a directory"));
        fs::remove_dir(&fifo).unwrap();
        fs::File::create(&fifo).unwrap().set_len(NAMES + 1).unwrap();
        assert!(why(root, "").contains("larger"));
        fs::remove_dir_all(root.join("etc")).unwrap();
        symlink("/etc", root.join("etc")).unwrap();
        assert!(why(root, "").contains("its etc is not a directory"));
    }

    #[test]
    fn a_working_directory_stays_within_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("proc/self/fd/8")).unwrap();
        fs::create_dir_all(root.join("srv/app")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        symlink("/srv/app", root.join("good")).unwrap();
        symlink("/proc/self/fd/8", root.join("bad")).unwrap();
        symlink("bad", root.join("worse")).unwrap();
        symlink("/nowhere", root.join("dangling")).unwrap();
        for fine in ["", "/", "/srv/app", "/srv/new/one", "/good"] {
            assert!(matches!(verdict(root, fine), RootfsVerdict::Fine(_)), "{fine}");
        }
        for bad in ["/bad", "/worse", "/dangling", "/file", "/file/x", "/bad/../bad"] {
            assert!(matches!(verdict(root, bad), RootfsVerdict::Refused(_)), "{bad}");
        }
    }

    #[test]
    fn scratch_lies_where_the_images_links_lead_and_never_in_the_platforms_folders() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for folder in ["run", "var/lib/db", "data"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::set_permissions(root.join("data"), std::os::unix::fs::PermissionsExt::from_mode(0o2750)).unwrap();
        for (name, target) in [
            ("var/run", "/run"),
            ("kernel", "/proc"),
            ("sys-link", "../../sys/fs"),
            ("secret", "/run/secrets"),
            ("config", "etc"),
            ("top", "/"),
            ("shm", "/dev/shm/x"),
            ("same", "var/../data"),
        ] {
            symlink(target, root.join(name)).unwrap();
        }
        fs::write(root.join("file"), "").unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let top = openat(CWD, root, flags, Mode::empty()).unwrap();
        let look = |asked: &[&str]| match examine(top.as_fd(), "", &wanted(asked)) {
            RootfsVerdict::Fine(RootfsFacts { trouble: Some(why), .. }) => Err(why),
            RootfsVerdict::Fine(found) => {
                Ok(found.scratch.into_iter().map(|f| (f.path, f.mode)).collect::<Vec<_>>())
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(
            look(&["/var/run/nginx", "/data", "/var/lib/db/x", "/dev/shm", "/tmp"]).unwrap(),
            [
                ("/run/nginx".into(), None),
                ("/data".into(), Some(0o2750)),
                ("/var/lib/db/x".into(), None),
                ("/dev/shm".into(), None),
                ("/tmp".into(), None)
            ]
        );
        assert_eq!(look(&["/var/run"]).unwrap()[0].0, "/run");
        for (bad, sign) in [
            ("/kernel", "/proc"),
            ("/kernel/x", "/proc"),
            ("/sys-link/x", "/sys"),
            ("/secret", "/run/secrets"),
            ("/config", "/etc"),
            ("/config/x", "/etc"),
            ("/shm", "/dev"),
            ("/top", "cannot be a folder"),
            ("/file", "is a file"),
            ("/file/x", "not a folder"),
        ] {
            let why = look(&[bad]).unwrap_err();
            assert!(why.contains(sign) && why.contains(bad), "{bad}: {why}");
        }
        fs::write(root.join("data/first"), vec![0; 8192]).unwrap();
        assert_eq!(look(&["/data"]).unwrap()[0].0, "/data");
        fs::write(root.join("data/one-more"), "x").unwrap();
        let why = look(&["/same"]).unwrap_err();
        assert!(why.contains("has 12 KiB of files") && why.contains("/same: 1Mi"), "{why}");
        for twice in [["/data", "/same"], ["/run", "/var/run/x"], ["/var/run/x/y", "/run/x"]] {
            assert!(look(&twice).unwrap_err().contains("one of the two"), "{twice:?}");
        }
    }
}
