//! Fetching images: few at a time, one of each tenant, from `serve`'s own port alone.

use std::time::Duration;

use super::super::core::{Agent, Gate};
use crate::driver::disk::{self, Part};
use crate::driver::workload::Workload;
use crate::driver::{Error, PullSecret, listener};

/// How long a fetch waits for its turn.
const TURN: Duration = Duration::from_secs(60);
/// Fetches an image: few at a time, one of each tenant, and only what the disk has room for.
pub(super) async fn fetch(
    agent: &Agent,
    workload: &Workload,
    image: &str,
    pull: Option<&PullSecret>,
    gate: &Gate,
) -> Result<(), Error> {
    let secret =
        pull.ok_or_else(|| Error::Transient("the image is not here and there is no credential".into()))?;
    let recorded = agent.fetching.record(workload, secret.bytes());
    let waiting = agent.fetches.take(&workload.tenant, TURN);
    let turn = tokio::select! {
        turn = waiting => turn,
        () = gate.leave.cancelled() => return Err(Error::Conflict("the app is being removed".into())),
    };
    let _turn = turn.map_err(|_| {
        Error::Transient("other images are being fetched; this one has its turn after them".into())
    })?;
    // Another app of the tenant may have had the same image.
    if agent.podman.has_image(image).await? {
        return Ok(());
    }
    require_own_door(&agent.config.pull_host, agent.config.peer_uid)?;
    // Packed and unpacked, it lies there twice for a moment.
    let (storage, needed) = (&agent.config.engine_storage, secret.bytes().saturating_mul(2));
    let full = || Error::Transient("the machine has no room to unpack this image".into());
    if disk::room(Part::Engine, storage).is_some_and(|room| !room.has(needed)) {
        tracing::error!(storage = %storage.display(), needed, "no image is fetched: the rest of the disk is kept free");
        return Err(full());
    }
    tokio::select! {
        done = agent.fetcher.fetch(image, secret, |folder| recorded.begin(folder.to_owned())) => done,
        () = gate.leave.cancelled() => Err(Error::Conflict("the app is being removed".into())),
        () = no_room(storage) => Err(full()),
    }
}

/// The engine gets a credential only for a port that `serve` itself listens on: while `serve` is down, any user of the
/// machine can take the port.
fn require_own_door(host: &str, uid: u32) -> Result<(), Error> {
    let door = host.parse().map_err(|_| Error::Rejected(format!("pull_host {host} is not an address")))?;
    listener::require(door, uid).map_err(|foreign| {
        tracing::error!(host, %foreign, "ALARM: the port for pulls is not serve's; nothing is sent to it");
        Error::Transient(format!(
            "the image is not fetched: the port for pulls ({host}) is not serve's: {foreign}; trying again"
        ))
    })
}

/// Returns when the disk runs full: an image of an earlier version was never measured.
async fn no_room(storage: &std::path::Path) {
    loop {
        if disk::room(Part::Engine, storage).is_some_and(|room| !room.has(0)) {
            tracing::error!(storage = %storage.display(), "the disk runs full: no image is unpacked");
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
