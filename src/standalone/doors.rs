//! The two TCP ports of `serve`: one for clients, one for the engine's pulls. Both are fixed: while `up` is
//! down, any user of the machine can take them. Before anything is sent to a port, the kernel says which user
//! listens on it.

use std::net::SocketAddr;
use std::time::Duration;

use super::{DataFolder, Failed};
use crate::driver::listener::{self, Foreign};

/// Refuses to start while another process listens on a port of `serve`.
pub(super) fn require_free(folder: &DataFolder, listen: SocketAddr) -> Result<(), Failed> {
    for (door, purpose) in [(folder.pull_address(), "pulls"), (listen, "clients")] {
        let Some(found) = listener::at(door) else {
            return Err(Failed(
                "/proc/net/tcp cannot be read, so the owner of the ports is not known: mount /proc".into(),
            ));
        };
        if let Some(other) = found.first() {
            let (port, uid) = (door.port(), other.uid);
            let other = if purpose == "pulls" {
                format!(
                    "remove {}: the next start chooses another port",
                    folder.path.join("ports.json").display()
                )
            } else {
                "give --listen another port".into()
            };
            return Err(Failed(format!(
                "port {port} for {purpose} is taken: a process of user id {uid} listens on it, and nothing was sent to \
                 it. End that process (`ss -ltnp sport = :{port}` names it), or {other}"
            )));
        }
    }
    Ok(())
}

/// Returns whether `serve` listens on this port, and no other user.
pub(super) fn is_served(folder: &DataFolder, door: SocketAddr) -> bool {
    listener::require(door, folder.serve.uid).is_ok()
}

/// Logs an alarm when another user takes a port of `serve`, while `up` runs.
pub(super) async fn watch(folder: &DataFolder, listen: SocketAddr) {
    let mut told = None;
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let taken = [folder.pull_address(), listen].into_iter().find_map(|door| {
            match listener::require(door, folder.serve.uid) {
                Err(Foreign::User(uid)) => Some((door.port(), uid)),
                _ => None,
            }
        });
        if taken != told
            && let Some((port, uid)) = taken
        {
            tracing::error!(port, uid, "ALARM: another user listens on a port of serve; end that process");
        }
        told = taken;
    }
}
