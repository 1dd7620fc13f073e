//! Inspects the image of an instance before the engine creates a container from it. Collects the names of the
//! instance's users and groups. This check does not depend on the result that `serve` found at the deployment.

use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::super::core::{Agent, lock};
use crate::driver::Error;
use crate::driver::podman::client::ImageSeen;
use crate::driver::podman::render::Mount;
use crate::driver::podman::rootfs::{self, RootfsFacts, Wanted};
use crate::driver::podman::tree::Person;
use crate::driver::podman::{inside, passwd, render};
use crate::driver::workload::Workload;
use crate::ids::{Digest, TenantName};

/// The result of inspecting an image, cached while this process lives. An image id always stands for the same
/// bytes.
pub(in crate::driver::agent) type ImageInspection = Result<Arc<RootfsFacts>, String>;

/// Maximum number of cached results.
const HELD: usize = 256;
/// Maximum number of concurrent inspections, per tenant and in total. Each is a process that takes a few
/// milliseconds and has a time limit.
pub(in crate::driver::agent) const LOOKS: (usize, usize) = (1, 4);
/// How long an inspection waits for its turn.
const TURN: Duration = Duration::from_secs(20);
/// Names longer than this are not cached.
const SHORT: usize = 16 << 10;

/// The parts of an instance that come from its image: its two files, and the places of its writable folders.
pub(super) struct Prepared {
    /// `/etc/passwd` and `/etc/group`.
    pub(super) names: [PathBuf; 2],
    /// The writable folders.
    pub(super) scratch: Vec<Mount>,
}

/// Inspects an instance's image, writes its `/etc/passwd` and `/etc/group`, and finds its writable folders.
pub(super) async fn prepare(
    agent: &Agent,
    dir: &Path,
    number: u32,
    workload: &Workload,
) -> Result<Prepared, Error> {
    let image = render::image(&agent.config, workload);
    let seen = agent.podman.image(&image).await?;
    let seen = seen.ok_or_else(|| Error::Transient("no such image in the engine's store".into()))?;
    let wanted = wanted(workload, &seen);
    let asked = serde_json::to_vec(&wanted).map_err(|error| Error::Transient(error.to_string()))?;
    let key = format!("{} {}", seen.id, Digest::of(&asked));
    let held = lock(&agent.looked).get(&key).cloned();
    let found = match held {
        Some(held) => held.map_err(Error::Rejected)?,
        None => look(agent, &workload.tenant, &seen, &wanted, key).await?,
    };
    if let Some(why) = &found.trouble {
        return Err(Error::Rejected(why.clone()));
    }
    let names = passwd::write(&found.names, workload.user, &seen.working_dir);
    let [first, second] = files(dir, number);
    for (path, bytes) in [(&first, &names.passwd), (&second, &names.group)] {
        write(path, bytes, workload.block.start).map_err(|error| Error::Transient(error.to_string()))?;
    }
    let scratch = workload.scratch.iter().zip(&found.scratch);
    let scratch = scratch.map(|((path, scratch), folder)| Mount {
        path: folder.path.clone(),
        size: scratch.size,
        exec: scratch.exec,
        mode: inside::mode(path, folder.mode),
    });
    Ok(Prepared { names: [first, second], scratch: scratch.collect() })
}

fn wanted(workload: &Workload, seen: &ImageSeen) -> Wanted {
    let path =
        |list: &[String]| list.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).map(str::to_owned);
    let words = match (&workload.command, &workload.args) {
        (Some(command), _) => [command.as_slice(), &[]],
        (None, Some(args)) => [seen.entrypoint.as_slice(), args],
        (None, None) => [seen.entrypoint.as_slice(), &seen.cmd],
    };
    let person = Person {
        uid: workload.user.uid.into(),
        gid: workload.user.gid.into(),
        groups: workload.groups.iter().map(|group| u32::from(*group)).collect(),
    };
    let exec = workload.scratch.iter().filter(|(_, scratch)| scratch.exec);
    Wanted {
        scratch: workload.scratch.keys().cloned().collect(),
        sizes: workload.scratch.values().map(|scratch| scratch.size).collect(),
        exec: exec.map(|(path, _)| path.clone()).collect(),
        word: words.concat().first().cloned().unwrap_or_default(),
        path: workload.env.get("PATH").cloned().or_else(|| path(&seen.env)),
        person,
    }
}

async fn look(
    agent: &Agent,
    tenant: &TenantName,
    seen: &ImageSeen,
    wanted: &Wanted,
    key: String,
) -> Result<Arc<RootfsFacts>, Error> {
    let turn = agent.looks.take(tenant, TURN).await;
    let _turn =
        turn.map_err(|_| Error::Transient("other images are inspected first; it is tried again".into()))?;
    let found = rootfs::look(seen, wanted).await.map(Arc::new);
    let verdict = match &found {
        Ok(found) if found.names.passwd.len() + found.names.group.len() <= SHORT => Ok(Arc::clone(found)),
        Err(Error::Rejected(why)) => Err(why.clone()),
        _ => return found,
    };
    let mut looked = lock(&agent.looked);
    if looked.len() >= HELD {
        // Evicts a random entry: a tenant with many entries then evicts few of the other tenants' entries.
        let one = looked.keys().nth(rand::random_range(0..looked.len())).cloned();
        one.map(|one| looked.remove(&one));
    }
    looked.insert(key, verdict);
    found
}

/// Returns the paths of an instance's `passwd` and `group` files.
pub(super) fn files(dir: &Path, number: u32) -> [PathBuf; 2] {
    ["passwd", "group"].map(|name| dir.join(format!("{number}.{name}")))
}

/// Creates a new file each time: the previous one may still be mounted. Inside the container, the file belongs to
/// root.
fn write(path: &Path, bytes: &[u8], root: u32) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o444).open(path)?;
    std::io::Write::write_all(&mut file, bytes)?;
    chown(path, Some(root), Some(root))
}
