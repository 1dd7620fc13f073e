//! Fetches an image in a process and a cgroup of its own. The engine itself unpacks nothing. The memory, processor
//! time and processes that a layer takes are limited. A fetch that takes too long is ended with all processes that
//! it started. The credential is in a file that root owns, never among the arguments.

use std::ffi::OsString;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::io::AsyncReadExt;

use super::engine::{self, EngineSettings};
use crate::driver::{Error, PullSecret};

/// Maximum time of a fetch, and the minimum that every fetch has.
const LIMIT: Duration = Duration::from_secs(900);
const LEAST: Duration = Duration::from_secs(120);
/// Bytes of an image that add one second to its time limit.
const BYTES_A_SECOND: u64 = 4 << 20;
/// Memory limits of one fetch, and of all together, in bytes.
const MEMORY: (u64, u64) = (768 << 20, 1536 << 20);
/// Limits of processes and threads, likewise.
const PIDS: (u32, u32) = (256, 512);
/// Processor time of one fetch, in microseconds of each period of 100,000.
const CPU: u64 = 100_000;
/// Maximum bytes that are read of the engine's error output.
const WORDS: u64 = 16 << 10;
/// Argument that makes the agent's program enter cgroups and become another program.
pub const ENTER: &str = "--enter-cgroups";

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Fetches the images of an engine.
#[derive(Debug)]
pub struct Fetcher {
    engine: EngineSettings,
    /// Name of the cgroup above all fetches.
    group: String,
}

/// Returns the name of the cgroup of an installation's fetches.
#[must_use]
pub fn group(installation: &str) -> String {
    format!("bulkhead-{installation}-pulls")
}

impl Fetcher {
    /// Creates a fetcher for this engine.
    #[must_use]
    pub fn new(engine: EngineSettings, installation: &str) -> Self {
        Self { engine, group: group(installation) }
    }

    /// Ends the fetches that an earlier run of the agent left behind, and removes their files.
    pub fn sweep(&self) {
        for place in places(&self.group) {
            clear(&place);
        }
        let _ = std::fs::remove_dir_all(self.folder());
    }

    fn folder(&self) -> PathBuf {
        self.engine.root.join("pulls")
    }

    /// Fetches an image by digest.
    ///
    /// The credential is bound to the address that the engine really contacts. A credential without an address
    /// would be dropped when the engine's settings redirect the image's name (containers/image, "we must not
    /// blindly send the credentials intended for the primary endpoint to mirrors").
    ///
    /// `begun` receives the folder that holds the fetched data first.
    pub async fn fetch(
        &self,
        image: &str,
        secret: &PullSecret,
        begun: impl FnOnce(&Path),
    ) -> Result<(), Error> {
        let failed =
            |error: std::io::Error| Error::Transient(format!("the image cannot be fetched: {error}"));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let own = FetchResources {
            folder: self.folder().join(number.to_string()),
            groups: places(&self.group).iter().map(|place| place.join(number.to_string())).collect(),
        };
        let auth = own.prepare(&self.engine.pull_host, secret).map_err(failed)?;
        begun(&own.folder);
        if let Err(error) = make_groups(&self.group, &own.groups) {
            tracing::error!(%error, "the image is not fetched: its cgroup, which limits the fetch, cannot be created");
            return Err(failed(error));
        }
        let (program, args, environment) = engine::client(&self.engine);
        let own_program = std::env::current_exe().map_err(failed)?;
        let mut command = tokio::process::Command::new(own_program);
        command.arg(ENTER).args(&own.groups);
        command.args(["--", program]).args(args).args(["pull", "--quiet", "--authfile"]).arg(auth).arg(image);
        let mut child = command
            .env_clear()
            .envs(environment)
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()))
            .env("HOME", &own.folder)
            // Fetched data is on the engine's disk, and is removed with this folder.
            .env("TMPDIR", &own.folder)
            .current_dir(&own.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let mut words = Vec::new();
        let ended = async {
            if let Some(mut errors) = child.stderr.take() {
                (&mut errors).take(WORDS).read_to_end(&mut words).await?;
                tokio::io::copy(&mut errors, &mut tokio::io::sink()).await?;
            }
            child.wait().await
        };
        let limit = limit(secret.bytes());
        match tokio::time::timeout(limit, ended).await {
            Err(_) => Err(Error::Rejected(format!(
                "the image takes longer than {} s to fetch and unpack, which is the limit for its size",
                limit.as_secs()
            ))),
            Ok(Err(error)) => Err(failed(error)),
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => {
                let words = String::from_utf8_lossy(&words);
                tracing::warn!(%status, words = %words.trim(), "an image was not fetched");
                let killed = std::os::unix::process::ExitStatusExt::signal(&status).is_some();
                Err(classify(&words, killed))
            }
        }
    }
}

/// Returns the time limit for an image of this many bytes, unpacked.
fn limit(bytes: u64) -> Duration {
    (LEAST + Duration::from_secs(bytes / BYTES_A_SECOND)).min(LIMIT)
}

/// The child's part: enters the given cgroups, up to `--`, then becomes the program that follows.
#[must_use]
pub fn enter(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    for place in arguments.by_ref().take_while(|argument| argument != "--") {
        // 0 stands for the writing process.
        if let Err(error) = std::fs::write(Path::new(&place).join("cgroup.procs"), "0") {
            eprintln!("{}: {error}", place.display());
            return ExitCode::FAILURE;
        }
    }
    // Users of containers read the files that the engine writes.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if let Some(program) = arguments.next() {
        eprintln!("{}", std::process::Command::new(program).args(arguments).exec());
    }
    ExitCode::FAILURE
}

/// Messages of the engine for an image that can never be unpacked (Podman 4.3.1, as observed), each with the reason
/// for the tenant.
const NEVER: [(&str, &str); 5] = [
    ("duplicates of file paths not supported", "a layer of the image names a path twice"),
    ("invalid header", "a layer of the image is not packed as its media type says"),
    ("does not match config's DiffID", "the layers of the image are not those that its config names"),
    ("unsupported MIME type", "the engine does not support the media type of the image"),
    ("too many layers", "the image has too many layers"),
];

/// Classifies the engine's error text. The text contains Bulkhead's own address, so people see only its meaning. It
/// also contains paths of the image: text that a tenant wrote is never taken for the engine's own words.
fn classify(words: &str, killed: bool) -> Error {
    let later = || Error::Transient("the image could not be fetched; trying again".into());
    let full = || Error::Transient("the machine has no room to unpack this image".into());
    if let Some((_, unpacked)) = words.split_once("processing tar file(") {
        let (inside, outcome) = unpacked.rsplit_once("): ").unwrap_or((unpacked.trim_end_matches(')'), ""));
        // A killed process says nothing about the image.
        if killed || outcome.starts_with("signal: ") {
            return later();
        }
        // `OPERATION PATH: REASON`, or the reason alone.
        let told = if inside.is_empty() { outcome } else { inside };
        if told.starts_with("lsetxattr ") {
            return Error::Rejected(
                "a layer of the image sets extended attributes that the machine's file system does not support"
                    .into(),
            );
        }
        return match told.rsplit(": ").next().unwrap_or_default().trim() {
            "no space left on device" | "disk quota exceeded" => full(),
            "unexpected EOF" | "input/output error" | "cannot allocate memory" => later(),
            "duplicates of file paths not supported" => Error::Rejected(NEVER[0].1.into()),
            _ => Error::Rejected("a layer of the image cannot be unpacked".into()),
        };
    }
    if words.contains("manifest unknown") || words.contains("name unknown") {
        return Error::Rejected("the image is no longer in the registry".into());
    }
    if words.contains("no space left on device") || words.contains("disk quota exceeded") {
        return full();
    }
    // A broken connection says nothing about the image either.
    let broken = ["connection reset", "connection refused", "signal: killed", "timeout", "unexpected EOF"];
    if !killed
        && !broken.iter().any(|sign| words.contains(sign))
        && let Some((_, why)) = NEVER.iter().find(|(sign, _)| words.contains(sign))
    {
        return Error::Rejected((*why).into());
    }
    later()
}

/// Resources of one fetch. Dropping them ends its processes and removes its files, in every case.
struct FetchResources {
    folder: PathBuf,
    groups: Vec<PathBuf>,
}

impl FetchResources {
    /// Creates its folder with the credential in it, and returns the path of the credential.
    fn prepare(&self, host: &str, secret: &PullSecret) -> std::io::Result<PathBuf> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let login = data_encoding::BASE64.encode(format!("engine:{}", secret.expose()).as_bytes());
        let file = self.folder.join("auth.json");
        let mut out = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&file)?;
        std::io::Write::write_all(
            &mut out,
            json!({"auths": {host: {"auth": login}}}).to_string().as_bytes(),
        )?;
        Ok(file)
    }
}

impl Drop for FetchResources {
    fn drop(&mut self) {
        let (folder, groups) = (std::mem::take(&mut self.folder), std::mem::take(&mut self.groups));
        // Processes take a moment to end; the caller does not wait for it.
        let ended = std::thread::Builder::new().spawn(move || {
            for place in groups {
                clear(&place);
            }
            let _ = std::fs::remove_dir_all(folder);
        });
        if let Err(error) = ended {
            // The next start of the agent removes it.
            tracing::error!(%error, "the files of a fetch are not removed yet");
        }
    }
}

/// Returns the folders of a cgroup of this name: one in version 2, or one in each relevant hierarchy of version 1.
fn places(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return vec![root.join(name)];
    }
    ["memory", "pids", "cpu"].iter().map(|controller| root.join(controller).join(name)).collect()
}

/// Returns the limits of a cgroup: file and value, for version 2 and for each controller of version 1.
fn bounds(place: &Path, memory: u64, pids: u32, cpu: Option<u64>) -> Vec<(&'static str, String)> {
    let controller = |name: &str| place.starts_with(Path::new("/sys/fs/cgroup").join(name));
    let cpu = cpu.map(|quota| quota.to_string());
    if controller("memory") {
        vec![("memory.limit_in_bytes", memory.to_string())]
    } else if controller("pids") {
        vec![("pids.max", pids.to_string())]
    } else if controller("cpu") {
        cpu.map(|quota| ("cpu.cfs_quota_us", quota))
            .into_iter()
            .chain([("cpu.shares", "256".into())])
            .collect()
    } else {
        let cpu = cpu.map(|quota| ("cpu.max", format!("{quota} 100000")));
        let rest = [
            ("memory.max", memory.to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("pids.max", pids.to_string()),
            ("cpu.weight", "25".to_owned()),
        ];
        rest.into_iter().chain(cpu).collect()
    }
}

fn make_groups(parent: &str, groups: &[PathBuf]) -> std::io::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    for (above, own) in places(parent).iter().zip(groups) {
        let controllers = "+memory +pids +cpu";
        let version2 = Path::new("/sys/fs/cgroup/cgroup.subtree_control");
        if version2.exists() {
            // Where systemd is in charge, it has already done so.
            let _ = std::fs::write(version2, controllers);
            // Not every machine can weight disk access; where it can, unpacking yields.
            let _ = std::fs::write(version2, "+io");
        }
        make(above, &bounds(above, MEMORY.1, PIDS.1, Some((cores * CPU / 2).max(CPU / 2))))?;
        if version2.exists() {
            let _ = std::fs::write(above.join("io.weight"), "10");
        }
        if version2.exists() {
            std::fs::write(above.join("cgroup.subtree_control"), controllers)?;
        }
        make(own, &bounds(own, MEMORY.0, PIDS.0, None))?;
    }
    Ok(())
}

fn make(place: &Path, bounds: &[(&str, String)]) -> std::io::Result<()> {
    std::fs::create_dir_all(place)?;
    for (file, value) in bounds {
        let path = place.join(file);
        // Without swap this file does not exist.
        if let Err(error) = std::fs::write(&path, value)
            && !file.contains("swap")
        {
            return Err(std::io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
    }
    Ok(())
}

/// Ends all processes of a cgroup and of the groups within it, and removes it.
fn clear(place: &Path) {
    for _ in 0..50 {
        let inner = std::fs::read_dir(place).into_iter().flatten().flatten();
        for entry in inner.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            clear(&entry.path());
        }
        if std::fs::remove_dir(place).is_ok() || !place.exists() {
            return;
        }
        let list = std::fs::read_to_string(place.join("cgroup.procs")).unwrap_or_default();
        for process in list.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
            let _ = kill_process(process, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    tracing::warn!(place = %place.display(), "a cgroup of a fetch is still in use");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_never_be_unpacked_is_told_from_what_may_work_later() {
        let rejected = |words: &str| matches!(classify(words, false), Error::Rejected(_));
        for words in [
            "Error: writing blob: adding layer with blob \"sha256:c6\": processing tar file(): duplicates of file paths not supported",
            "Error: writing blob: adding layer with blob \"sha256:f1\": processing tar file(open /a/b: not a directory): exit status 1",
            "Error: writing blob: layer 1 does not match config's DiffID \"sha256:00\"",
            "manifest unknown",
            // The tenant chooses the paths.
            "Error: writing blob: processing tar file(lsetxattr /timeout: operation not permitted): exit status 1",
            "Error: writing blob: processing tar file(lsetxattr /big: no space left on device): exit status 1",
            "Error: processing tar file(open /x: connection refused: not a directory): exit status 1",
            "Error: processing tar file(mkdir /): signal: killed: file exists): exit status 1",
        ] {
            assert!(rejected(words), "{words}");
        }
        for words in [
            "processing tar file(write /a: no space left on device): exit status 1",
            "pinging container registry 127.0.0.1:1: connection refused",
            "processing tar file(): signal: killed",
            "processing tar file(unexpected EOF): exit status 1",
            "",
        ] {
            assert!(!rejected(words), "{words}");
        }
        assert!(matches!(classify("processing tar file(): unexpected EOF", true), Error::Transient(_)));
    }

    #[test]
    fn an_image_has_the_time_that_its_size_needs() {
        assert_eq!(limit(0), Duration::from_secs(120));
        assert_eq!(limit(400 << 20), Duration::from_secs(220));
        assert_eq!(limit(u64::MAX), LIMIT);
    }

    #[test]
    fn both_versions_of_cgroups_have_the_same_bounds() {
        let of = |place: &str| bounds(Path::new(place), 7, 8, Some(9));
        assert_eq!(of("/sys/fs/cgroup/memory/x"), [("memory.limit_in_bytes", "7".to_owned())]);
        assert_eq!(of("/sys/fs/cgroup/pids/x"), [("pids.max", "8".to_owned())]);
        assert_eq!(of("/sys/fs/cgroup/cpu/x")[0], ("cpu.cfs_quota_us", "9".to_owned()));
        let two = of("/sys/fs/cgroup/bulkhead-x-pulls");
        for bound in [("memory.max", "7"), ("pids.max", "8"), ("cpu.max", "9 100000")] {
            assert!(two.contains(&(bound.0, bound.1.to_owned())), "{bound:?}");
        }
    }
}
