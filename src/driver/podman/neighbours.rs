//! Who is who on a bridge, as the machine sees it. Every address belongs to one card, and the machine is told so
//! once and for good: whoever else answers for it is not heard. The kernel forgets all that it was told about a
//! bridge whenever that gets another card (and even when it gets the same one again), which others than we may do:
//! udev by a policy of its own, a person. So it is looked after.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::net::Ipv4Addr;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::ear::{Ear, u16_at};
use super::firewall::card;
use super::ports::{failed, is_there, json, set};
use crate::driver::Error;

/// The group of what is told about neighbours, as a mask (`RTMGRP_NEIGH`).
const GROUP: u32 = 1 << 2;
/// A neighbour was forgotten (`RTM_DELNEIGH`).
const FORGOTTEN: u16 = 29;
/// Of IPv4 (`AF_INET`); a bridge's own table of cards is told in the same group.
const IPV4: u8 = 2;

/// Held while a bridge gets its card and the neighbours that this makes it forget: two instances may start at once.
static TURN: Mutex<()> = Mutex::const_new(());

/// A bridge's gateway, and who is on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbours {
    /// Address of the machine itself there.
    pub gateway: Ipv4Addr,
    /// Addresses of the instances.
    pub addresses: BTreeSet<Ipv4Addr>,
}

/// Hears that the machine has forgotten some neighbour, on whatever link.
pub fn forgetting() -> io::Result<Ear> {
    Ear::open("neighbours", None, GROUP, |message| {
        u16_at(message, 4) == Some(FORGOTTEN) && message.get(16) == Some(&IPV4)
    })
}

/// Gives the bridge its card and tells the machine who has an address on it.
pub async fn introduce(bridge: &str, gateway: Ipv4Addr, own: Ipv4Addr) -> Result<(), Error> {
    let _turn = TURN.lock().await;
    keep_card(bridge, gateway).await?;
    set(&["neigh", "replace", &own.to_string(), "lladdr", &card(own), "dev", bridge, "nud", "permanent"])
        .await
}

/// Gives a bridge its card. Left to itself a bridge takes the lowest card of its ports, and another one with each
/// port that comes or goes. Whether it had another one.
async fn keep_card(bridge: &str, gateway: Ipv4Addr) -> Result<bool, Error> {
    let fixed = card(gateway);
    let there = tokio::fs::read_to_string(format!("/sys/class/net/{bridge}/address")).await;
    if there.map_err(failed("the bridge"))?.trim() == fixed {
        return Ok(false);
    }
    set(&["link", "set", "dev", bridge, "address", &fixed]).await?;
    Ok(true)
}

/// Sees to it that each of these bridges has its card and that its neighbours are known for good. What had to be
/// mended, in words, by bridge; a bridge that is not there is left.
pub async fn hold(bridges: &BTreeMap<String, Neighbours>) -> Result<Vec<(String, String)>, Error> {
    let _turn = TURN.lock().await;
    let mut mended = Vec::new();
    let there: BTreeMap<_, _> = bridges.iter().filter(|(bridge, _)| is_there(bridge)).collect();
    for (bridge, neighbours) in &there {
        // A bridge that goes away in this moment is none of the others' trouble.
        match keep_card(bridge, neighbours.gateway).await {
            Ok(true) => mended.push(((*bridge).clone(), "the bridge had another card".to_owned())),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, bridge, "a bridge's card cannot be kept"),
        }
    }
    let known = known().await?;
    let mut batch = String::new();
    for (bridge, neighbours) in &there {
        let mut forgotten = 0;
        for own in &neighbours.addresses {
            let card = card(*own);
            if known.get(&((*bridge).as_str().to_owned(), *own)) != Some(&card) {
                forgotten += 1;
                let _ = writeln!(batch, "neigh replace {own} lladdr {card} dev {bridge} nud permanent");
            }
        }
        if forgotten > 0 {
            mended.push((
                (*bridge).clone(),
                format!("the machine had forgotten {forgotten} of its neighbours"),
            ));
        }
    }
    if !batch.is_empty() {
        run(&batch).await?;
    }
    Ok(mended)
}

/// The cards that the machine knows for good, by link and address.
async fn known() -> Result<BTreeMap<(String, Ipv4Addr), String>, Error> {
    let value = json(&["-j", "-4", "neigh", "show", "nud", "permanent"]).await?;
    let known = value.as_array().into_iter().flatten().filter_map(|entry| {
        let text = |key: &str| entry[key].as_str();
        Some(((text("dev")?.to_owned(), text("dst")?.parse().ok()?), text("lladdr")?.to_owned()))
    });
    Ok(known.collect())
}

/// Gives `ip` several commands at once; one that fails does not keep it from the others.
async fn run(batch: &str) -> Result<(), Error> {
    let mut ip = Command::new("ip")
        .args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed("ip"))?;
    if let Some(mut stdin) = ip.stdin.take() {
        stdin.write_all(batch.as_bytes()).await.map_err(failed("ip"))?;
    }
    let done = ip.wait_with_output().await.map_err(failed("ip"))?;
    if done.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&done.stderr).lines().next().unwrap_or_default().to_owned();
    Err(Error::Transient(format!("the neighbours of a bridge: {text}")))
}
