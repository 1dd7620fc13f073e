//! Static neighbour entries of the machine on tenants' bridges. Every address belongs to one MAC address, and the
//! machine has a permanent entry for it. The machine sends no ARP requests on a bridge and ignores ARP from others
//! (`arp off`).
//!
//! The kernel drops these entries when the bridge gets another MAC address (or the same one again), goes down, or
//! has ARP turned on. udev does the first by a policy of its own. Until the entries are restored, the machine
//! reaches no address on that bridge, neither the right instance nor another one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;

use tokio::sync::Mutex;

use super::ear::{Ear, u16_at};
use super::firewall::card;
use super::ports::{batch, failed, is_there, json, set};
use crate::driver::Error;

/// Netlink group of neighbour messages, as a mask (`RTMGRP_NEIGH`).
const GROUP: u32 = 1 << 2;
/// Message type: a neighbour entry was removed (`RTM_DELNEIGH`).
const FORGOTTEN: u16 = 29;
/// Address family IPv4 (`AF_INET`). The same group also reports a bridge's own forwarding table.
const IPV4: u8 = 2;
/// Link flag: the link neither sends nor answers ARP (`IFF_NOARP`).
const NO_ARP: u32 = 0x80;

/// Held while a bridge is prepared and its entries are written. Preparing a bridge drops its entries, and two
/// instances may start at once.
static TURN: Mutex<()> = Mutex::const_new(());

/// Gateway of a bridge, and the addresses on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbours {
    /// Address of the machine itself on the bridge.
    pub gateway: Ipv4Addr,
    /// Addresses of all instances.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// Addresses whose entries must exist by now. A missing entry of another address is no event.
    pub attached: BTreeSet<Ipv4Addr>,
}

/// Opens a monitor for removed neighbour entries, on any link.
pub fn forgetting() -> io::Result<Ear> {
    Ear::open("neighbours", None, GROUP, |message| {
        u16_at(message, 4) == Some(FORGOTTEN) && message.get(16) == Some(&IPV4)
    })
}

/// Prepares the bridge, and writes the neighbour entry of an address on it.
pub async fn introduce(bridge: &str, gateway: Ipv4Addr, own: Ipv4Addr) -> Result<(), Error> {
    let _turn = TURN.lock().await;
    prepare(bridge, gateway).await?;
    batch(&[], &known_as(bridge, own)).await
}

fn known_as(bridge: &str, own: Ipv4Addr) -> String {
    format!("neigh replace {own} lladdr {} dev {bridge} nud permanent\n", card(own))
}

/// Sets the MAC address of a bridge and turns its ARP off. By default a bridge takes the lowest MAC address of its
/// ports, and another one as ports come and go. Returns whether it had to change the bridge.
async fn prepare(bridge: &str, gateway: Ipv4Addr) -> Result<bool, Error> {
    let read = async |file: &str| {
        let text = tokio::fs::read_to_string(format!("/sys/class/net/{bridge}/{file}")).await;
        text.map(|text| text.trim().to_owned()).map_err(failed("the bridge cannot be read"))
    };
    let card = card(gateway);
    let flags = u32::from_str_radix(read("flags").await?.trim_start_matches("0x"), 16).unwrap_or(0);
    if read("address").await? == card && flags & NO_ARP != 0 {
        return Ok(false);
    }
    set(&["link", "set", "dev", bridge, "arp", "off", "address", &card]).await?;
    Ok(true)
}

/// Repaired bridges, and the first failure.
#[derive(Debug, Default)]
pub struct RepairedBridges {
    /// Name of the bridge, and a description of the repair.
    pub mended: Vec<(String, String)>,
    /// The first error.
    pub failed: Option<Error>,
}

/// Ensures that each of these bridges is prepared and has its neighbour entries. Skips bridges that do not exist.
pub async fn hold(bridges: &BTreeMap<String, Neighbours>) -> RepairedBridges {
    let _turn = TURN.lock().await;
    let mut held = RepairedBridges::default();
    let mut there: Vec<_> = bridges.iter().filter(|(bridge, _)| is_there(bridge)).collect();
    // A bridge that disappears at this moment does not affect the others.
    let mut changed = BTreeSet::new();
    for (bridge, neighbours) in &there {
        match prepare(bridge, neighbours.gateway).await {
            Ok(true) => _ = changed.insert((*bridge).clone()),
            Ok(false) => {}
            Err(_) if !is_there(bridge) => {}
            Err(error) => held.failed = held.failed.or(Some(error)),
        }
    }
    there.retain(|(bridge, _)| is_there(bridge));
    let known = match known().await {
        Ok(known) => known,
        Err(error) => return RepairedBridges { failed: held.failed.or(Some(error)), ..held },
    };
    let mut text = String::new();
    for (bridge, neighbours) in there {
        let of = |own: &&Ipv4Addr| known.get(&(bridge.clone(), **own)) != Some(&card(**own));
        text.extend(neighbours.addresses.iter().filter(of).map(|own| known_as(bridge, *own)));
        let forgotten = neighbours.attached.iter().filter(of).count();
        let another =
            if changed.contains(bridge) { "its MAC address or its ARP setting was wrong" } else { "" };
        let what = match (forgotten, another) {
            (0, another) if another.is_empty() || neighbours.attached.is_empty() => continue,
            (0, another) => another.to_owned(),
            (n, "") => format!("static neighbour entries were missing ({n})"),
            (n, another) => format!("{another}, and static neighbour entries were missing ({n})"),
        };
        held.mended.push((bridge.clone(), what));
    }
    if !text.is_empty()
        && let Err(error) = batch(&["-force"], &text).await
    {
        // The next check shows which of the entries were written.
        held = RepairedBridges { mended: Vec::new(), failed: held.failed.or(Some(error)) };
    }
    held
}

/// Returns the permanent neighbour entries of the machine: MAC address, by link and IP address.
async fn known() -> Result<BTreeMap<(String, Ipv4Addr), String>, Error> {
    let value = json(&["-j", "-4", "neigh", "show", "nud", "permanent"]).await?;
    let known = value.as_array().into_iter().flatten().filter_map(|entry| {
        let text = |key: &str| entry[key].as_str();
        Some(((text("dev")?.to_owned(), text("dst")?.parse().ok()?), text("lladdr")?.to_owned()))
    });
    Ok(known.collect())
}
