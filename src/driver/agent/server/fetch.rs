//! Fetches images: few at a time, one per tenant, and only from the port of `serve`.

use std::time::Duration;

use super::super::core::{Agent, Gate};
use crate::driver::disk::{self, DiskConsumer};
use crate::driver::workload::Workload;
use crate::driver::{Error, PullSecret, listener};

/// How long a fetch waits for its turn.
const TURN: Duration = Duration::from_secs(60);
/// Fetches an image when the tenant's turn comes, if the disk has room for it.
pub(super) async fn fetch(
    agent: &Agent,
    workload: &Workload,
    image: &str,
    pull: Option<&PullSecret>,
    gate: &Gate,
) -> Result<(), Error> {
    let secret = pull
        .ok_or_else(|| Error::Transient("the image is not here, and the request has no credential".into()))?;
    let recorded = agent.fetching.record(workload, secret.bytes());
    let waiting = agent.fetches.take(&workload.tenant, TURN);
    let turn = tokio::select! {
        turn = waiting => turn,
        () = gate.leave.cancelled() => return Err(Error::Conflict("the app is being removed".into())),
    };
    let _turn = turn.map_err(|_| {
        Error::Transient("other images are being fetched first; this one waits for its turn".into())
    })?;
    // Another app of the tenant may have fetched the same image meanwhile.
    if agent.podman.has_image(image).await? {
        return Ok(());
    }
    require_own_door(&agent.config.pull_host, agent.config.peer_uid)?;
    // Packed and unpacked data exist at the same time for a moment.
    let (storage, needed) = (&agent.config.engine_storage, secret.bytes().saturating_mul(2));
    let full = || Error::Transient("the machine has no room to unpack this image".into());
    if disk::room(DiskConsumer::Engine, storage).is_some_and(|room| !room.has(needed)) {
        tracing::error!(storage = %storage.display(), needed, "an image is not fetched: the disk is too full");
        return Err(full());
    }
    tokio::select! {
        done = agent.fetcher.fetch(image, secret, |folder| recorded.begin(folder.to_owned())) => done,
        () = gate.leave.cancelled() => Err(Error::Conflict("the app is being removed".into())),
        () = no_room(storage) => Err(full()),
    }
}

/// Requires that `serve` itself listens on the port for pulls before the engine gets a credential. While `serve` is
/// down, any user of the machine can take the port.
fn require_own_door(host: &str, uid: u32) -> Result<(), Error> {
    let door = host
        .parse()
        .map_err(|_| Error::Rejected(format!("pull_host {host} is not an IP address and port")))?;
    listener::require(door, uid).map_err(|foreign| {
        tracing::error!(host, %foreign, "ALARM: the port for pulls does not belong to serve; no credential is sent");
        Error::Transient(format!(
            "the image is not fetched: the port for pulls ({host}) does not belong to serve: {foreign}; it is tried again"
        ))
    })
}

/// Returns when the disk is full: images of an earlier version have no recorded size.
async fn no_room(storage: &std::path::Path) {
    loop {
        if disk::room(DiskConsumer::Engine, storage).is_some_and(|room| !room.has(0)) {
            tracing::error!(storage = %storage.display(), "the disk is nearly full: the fetch of an image is cancelled");
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
