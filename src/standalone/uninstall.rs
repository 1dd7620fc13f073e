//! Reverts `up`: removes containers, networks, table, users, claim and data folder of one installation.
//! Nothing else is touched.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::{DataFolder, Failed, claims, forwarding, given, postgres, processes, service};
use crate::driver::podman::cgroups;
use crate::driver::podman::client::Podman;
use crate::driver::podman::engine::{self, EngineSettings};
use crate::driver::podman::firewall::kernel;
use crate::driver::podman::{ports, pull};

/// Removes an installation. `confirm` is its four-letter id.
pub async fn uninstall(data: &Path, confirm: &str) -> Result<(), Failed> {
    if !DataFolder::exists(data) && service::is_given(data) {
        let left = given::uninstall(confirm).await?;
        tracing::warn!("{left}");
        return Ok(());
    }
    if !DataFolder::exists(data) {
        return Err(Failed(format!("{} is not a data folder of Bulkhead", data.display())));
    }
    let folder = service::open_to_remove(data, confirm)?;
    let id = folder.claim.installation.clone();
    if confirm != id.as_str() {
        return Err(Failed(format!(
            "this removes the installation {id} with all its tenants, apps and images: confirm with --confirm {id}"
        )));
    }
    let bin = postgres::programs().map(|(_, bin)| bin).unwrap_or_default();
    for process in processes::table(&folder.layout(&bin, Path::new("/"))).iter().rev() {
        process.end_leftover(&folder.path);
    }
    let (engine, group) = (folder.engine(), folder.engine_cgroup());
    let parts = EngineParts { settings: &engine, id: id.as_str(), group: Some(&group), below: &folder.path };
    remove_containers(&parts).await?;
    kernel::remove(&folder.agent_config().table()).await;
    unmount_below(&folder.engine().run);
    let _ = std::fs::remove_dir_all(&folder.engine().run);
    for user in [&folder.serve, &folder.db, &folder.registry, &folder.prober, &folder.resolver] {
        discard_user(&user.name);
    }
    claims::release(&folder.path)?;
    let others = !claims::all().is_empty();
    let net = Path::new("/sys/class/net");
    if let Some(said) = forwarding::restore(Path::new("/proc"), net, &folder.path, others) {
        tracing::warn!("{said}");
    }
    let failed = |error: std::io::Error| Failed::doing(folder.path.display(), error);
    for entry in std::fs::read_dir(&folder.path).map_err(failed)?.flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let path = entry.path();
        if is_folder { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.map_err(failed)?;
    }
    match std::fs::remove_dir(&folder.path) {
        // The folder is a mount point: an empty folder counts as removed.
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => Ok(()),
        other => other.map_err(failed),
    }
}

/// Removes a user of the platform.
pub(super) fn discard_user(name: &str) {
    let _ = Command::new("userdel")
        .arg(name)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// An engine whose service is stopped, and the parts to remove.
pub(super) struct EngineParts<'a> {
    /// The engine.
    pub(super) settings: &'a EngineSettings,
    /// Id of the installation: four letters.
    pub(super) id: &'a str,
    /// Its own cgroup, unless systemd created it.
    pub(super) group: Option<&'a str>,
    /// The folder that contains its mounts.
    pub(super) below: &'a Path,
}

/// Removes containers, networks, cgroups and mounts of an installation.
pub(super) async fn remove_containers(parts: &EngineParts<'_>) -> Result<(), Failed> {
    let (program, args, environment) = engine::command(parts.settings);
    let socket = parts.settings.socket.clone();
    let _ = std::fs::remove_file(&socket);
    let mut service = tokio::process::Command::new(program)
        .args(args)
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Failed::doing("the container engine", error))?;
    let failed = |error: crate::driver::Error| Failed(error.to_string());
    let podman = Podman::new(&socket).map_err(failed)?;
    let mut tries = 0;
    while podman.ping().await.is_err() {
        tries += 1;
        if tries > 100 {
            return Err(Failed("the container engine does not answer; nothing was removed".into()));
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let id = parts.id;
    for container in podman.list(id, std::time::Duration::from_secs(20)).await.map_err(failed)? {
        podman.remove(container.name()).await.map_err(failed)?;
    }
    let prefix = format!("bk{id}");
    for network in podman.networks().await.map_err(failed)?.iter().filter(|name| name.starts_with(&prefix)) {
        podman.remove_network(network).await.map_err(failed)?;
        ports::remove_bridge(network).await.map_err(failed)?;
    }
    let _ = service.kill().await;
    remove_cgroups(id, parts.group).await;
    unmount_below(parts.below);
    Ok(())
}

/// How long to wait for the monitors of removed containers to exit, in tenths of a second.
const PATIENCE: usize = 20;

/// Removes the containers' cgroup in each hierarchy, and the engine's own. Monitors of containers exit
/// shortly after the containers. Monitors of exec commands sometimes do not exit.
async fn remove_cgroups(id: &str, engine: Option<&str>) {
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let roots = hierarchies.map(|entry| entry.path()).chain([PathBuf::from("/sys/fs/cgroup")]);
    let own = [format!("bulkhead-{id}"), pull::group(id)];
    let names: Vec<String> = own.into_iter().chain(engine.map(str::to_owned)).collect();
    let mut places: Vec<PathBuf> =
        roots.flat_map(|root| names.iter().map(move |name| root.join(name)).collect::<Vec<_>>()).collect();
    places.retain(|place| place.is_dir());
    for round in 0..2 * PATIENCE {
        places.retain(|place| !cgroups::remove(place));
        if places.is_empty() {
            return;
        }
        if round == PATIENCE {
            for place in &places {
                end_processes(place);
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    tracing::warn!(?places, "these cgroups are still in use");
}

fn end_processes(place: &Path) {
    for inner in folders(place) {
        end_processes(&inner);
    }
    let list = std::fs::read_to_string(place.join("cgroup.procs")).unwrap_or_default();
    for process in list.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
        let _ = kill_process(process, Signal::KILL);
    }
}

fn folders(place: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Unmounts the storage that the engine leaves mounted, deepest first: a mount prevents the removal of the
/// folder.
pub(super) fn unmount_below(folder: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let below = format!("{}/", folder.display());
    let mut mounts: Vec<&str> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|path| path.starts_with(&below))
        .collect();
    mounts.sort_by_key(|path| std::cmp::Reverse(path.len()));
    for mount in mounts {
        let _ = Command::new("umount").arg(mount).stderr(Stdio::null()).status();
    }
}
