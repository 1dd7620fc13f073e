//! Who is who on a bridge, as the machine sees it. Every address belongs to one card, and the machine is told so:
//! it neither asks nor listens to whoever says something else (`arp off`). What it was told the kernel forgets when
//! the bridge gets another card (or the same one again), goes down, or is told to ask: udev does the first by a policy
//! of its own. Until it is told again nobody is reached there, neither whoever belongs there nor anybody else.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;

use tokio::sync::Mutex;

use super::ear::{Ear, u16_at};
use super::firewall::card;
use super::ports::{batch, failed, is_there, json, set};
use crate::driver::Error;

/// The group of what is told about neighbours, as a mask (`RTMGRP_NEIGH`).
const GROUP: u32 = 1 << 2;
/// A neighbour was forgotten (`RTM_DELNEIGH`).
const FORGOTTEN: u16 = 29;
/// Of IPv4 (`AF_INET`); a bridge's own table of cards is told in the same group.
const IPV4: u8 = 2;
/// A link that asks nobody for a card, and answers nobody (`IFF_NOARP`).
const NO_ARP: u32 = 0x80;

/// Held while a bridge is prepared and told of its neighbours, whom the first makes it forget: two instances may start
/// at once.
static TURN: Mutex<()> = Mutex::const_new(());

/// A bridge's gateway, and who is on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbours {
    /// Address of the machine itself there.
    pub gateway: Ipv4Addr,
    /// Addresses of all instances.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// Those that must be known by now: what is missing of the others is no event.
    pub attached: BTreeSet<Ipv4Addr>,
}

/// Hears that the machine has forgotten some neighbour, on whatever link.
pub fn forgetting() -> io::Result<Ear> {
    Ear::open("neighbours", None, GROUP, |message| {
        u16_at(message, 4) == Some(FORGOTTEN) && message.get(16) == Some(&IPV4)
    })
}

/// Prepares the bridge and tells the machine who has an address on it.
pub async fn introduce(bridge: &str, gateway: Ipv4Addr, own: Ipv4Addr) -> Result<(), Error> {
    let _turn = TURN.lock().await;
    prepare(bridge, gateway).await?;
    batch(&[], &known_as(bridge, own)).await
}

fn known_as(bridge: &str, own: Ipv4Addr) -> String {
    format!("neigh replace {own} lladdr {} dev {bridge} nud permanent\n", card(own))
}

/// Gives a bridge its card and lets it ask nobody. Left to itself a bridge takes the lowest card of its ports, and
/// another one with each port that comes or goes. Whether it was not so.
async fn prepare(bridge: &str, gateway: Ipv4Addr) -> Result<bool, Error> {
    let read = async |file: &str| {
        let text = tokio::fs::read_to_string(format!("/sys/class/net/{bridge}/{file}")).await;
        text.map(|text| text.trim().to_owned()).map_err(failed("the bridge"))
    };
    let card = card(gateway);
    let flags = u32::from_str_radix(read("flags").await?.trim_start_matches("0x"), 16).unwrap_or(0);
    if read("address").await? == card && flags & NO_ARP != 0 {
        return Ok(false);
    }
    set(&["link", "set", "dev", bridge, "arp", "off", "address", &card]).await?;
    Ok(true)
}

/// What was set right, by bridge, and what could not be.
#[derive(Debug, Default)]
pub struct Held {
    /// Bridge and words.
    pub mended: Vec<(String, String)>,
    /// The first that could not be.
    pub failed: Option<Error>,
}

/// Sees to it that each of these bridges is prepared and that its neighbours are known; a bridge that is not there is
/// left.
pub async fn hold(bridges: &BTreeMap<String, Neighbours>) -> Held {
    let _turn = TURN.lock().await;
    let mut held = Held::default();
    let mut there: Vec<_> = bridges.iter().filter(|(bridge, _)| is_there(bridge)).collect();
    // A bridge that goes away in this moment is none of the others' trouble.
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
        Err(error) => return Held { failed: held.failed.or(Some(error)), ..held },
    };
    let mut text = String::new();
    for (bridge, neighbours) in there {
        let of = |own: &&Ipv4Addr| known.get(&(bridge.clone(), **own)) != Some(&card(**own));
        text.extend(neighbours.addresses.iter().filter(of).map(|own| known_as(bridge, *own)));
        let forgotten = neighbours.attached.iter().filter(of).count();
        let another = if changed.contains(bridge) { "it had another card or asked around" } else { "" };
        let what = match (forgotten, another) {
            (0, another) if another.is_empty() || neighbours.attached.is_empty() => continue,
            (0, another) => another.to_owned(),
            (n, "") => format!("the machine had forgotten {n} of its neighbours"),
            (n, another) => format!("{another}, and the machine had forgotten {n} of its neighbours"),
        };
        held.mended.push((bridge.clone(), what));
    }
    if !text.is_empty()
        && let Err(error) = batch(&["-force"], &text).await
    {
        // What of it was done shows with the next look.
        held = Held { mended: Vec::new(), failed: held.failed.or(Some(error)) };
    }
    held
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
