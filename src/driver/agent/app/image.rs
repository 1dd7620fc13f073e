//! The image of an instance, looked at before the engine makes a container of it, and the names of users and groups
//! that the instance gets. Independent of what `serve` has found at the deploy.

use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Semaphore;

use super::super::core::{Agent, lock};
use crate::driver::Error;
use crate::driver::podman::client::ImageSeen;
use crate::driver::podman::rootfs::{self, Names};
use crate::driver::podman::{passwd, render};
use crate::driver::workload::Workload;

/// What was found in an image while this process lives: an identity stands for the same bytes for ever.
pub(in crate::driver::agent) type Looked = Result<Arc<Names>, String>;

/// Most images whose verdict is held.
const HELD: usize = 256;
/// Looks at a time: each is a process of a few milliseconds, bounded in time.
static LOOKS: Semaphore = Semaphore::const_new(4);
/// Names longer than this are looked up again each time.
const SHORT: usize = 16 << 10;

/// Writes an instance's `/etc/passwd` and `/etc/group`, after a look at its image; their paths.
pub(super) async fn write_names(
    agent: &Agent,
    dir: &Path,
    number: u32,
    workload: &Workload,
) -> Result<[PathBuf; 2], Error> {
    let image = render::image(&agent.config, workload);
    let seen = agent.podman.image(&image).await?;
    let seen = seen.ok_or_else(|| Error::Transient("no such image in the engine's store".into()))?;
    let held = lock(&agent.looked).get(&seen.id).cloned();
    let names = match held {
        Some(held) => held.map_err(Error::Rejected)?,
        None => look(agent, &seen).await?,
    };
    let names = passwd::write(&names, workload.user, &seen.working_dir);
    let [first, second] = files(dir, number);
    for (path, bytes) in [(&first, &names.passwd), (&second, &names.group)] {
        write(path, bytes, workload.block.start).map_err(|error| Error::Transient(error.to_string()))?;
    }
    Ok([first, second])
}

async fn look(agent: &Agent, seen: &ImageSeen) -> Result<Arc<Names>, Error> {
    let _turn = LOOKS.acquire().await.map_err(|error| Error::Transient(error.to_string()))?;
    let found = rootfs::look(seen).await.map(Arc::new);
    let verdict = match &found {
        Ok(names) if names.passwd.len() + names.group.len() <= SHORT => Ok(Arc::clone(names)),
        Err(Error::Rejected(why)) => Err(why.clone()),
        _ => return found,
    };
    let mut looked = lock(&agent.looked);
    if looked.len() >= HELD {
        looked.clear();
    }
    looked.insert(seen.id.clone(), verdict);
    found
}

/// Where an instance's files lie.
pub(super) fn files(dir: &Path, number: u32) -> [PathBuf; 2] {
    ["passwd", "group"].map(|name| dir.join(format!("{number}.{name}")))
}

/// A new file each time: the one before may still be mounted. Inside, it belongs to root.
fn write(path: &Path, bytes: &[u8], root: u32) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o444).open(path)?;
    std::io::Write::write_all(&mut file, bytes)?;
    chown(path, Some(root), Some(root))
}
