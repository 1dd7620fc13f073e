//! Tells our own changes of nftables tables from those of other programs. It reads netfilter's messages
//! (nfnetlink), and of these only the one for a new generation with the process that made it. `nft monitor` is not
//! used: version 1.0.6 prints its own memory on sets of ranges, and slows down every change.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;

use rustix::net::netlink;

use crate::driver::podman::ear::{Ear, u16_at};

/// Netlink group of nftables messages, as a mask (`NFNLGRP_NFTABLES` is 7).
const GROUP: u32 = 1 << 6;
/// Subsystem 10 is nftables, its message 15 a new generation (`NFT_MSG_NEWGEN`).
const NEW_GENERATION: u16 = 0x0a0f;
/// The attribute with the id of the process that made it (`NFTA_GEN_PROC_PID`).
const MADE_BY: u16 = 2;
/// Maximum number of our own changes that are remembered.
const REMEMBERED: usize = 64;

/// Processes that recently changed tables for us.
static OWN: Mutex<VecDeque<u32>> = Mutex::new(VecDeque::new());

/// Records that a process changes a table for us.
pub(super) fn note_own(pid: u32) {
    let mut own = OWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    own.push_back(pid);
    while own.len() > REMEMBERED {
        own.pop_front();
    }
}

fn is_own(pid: u32) -> bool {
    OWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner).contains(&pid)
}

/// Opens a monitor for changes that another program makes to any table.
pub fn open() -> io::Result<Ear> {
    Ear::open("nftables", Some(netlink::NETFILTER), GROUP, tells_of_others)
}

/// Whether a message is a generation that was not made for us.
fn tells_of_others(message: &[u8]) -> bool {
    u16_at(message, 4) == Some(NEW_GENERATION) && !message.get(20..).and_then(made_by).is_some_and(is_own)
}

fn made_by(mut attributes: &[u8]) -> Option<u32> {
    loop {
        let (length, kind) = (usize::from(u16_at(attributes, 0)?), u16_at(attributes, 2)?);
        if kind & 0x3fff == MADE_BY {
            return Some(u32::from_be_bytes(attributes.get(4..8)?.try_into().ok()?));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(pid: u32) -> Vec<u8> {
        let mut message = vec![0; 20];
        message[..4].copy_from_slice(&36_u32.to_ne_bytes());
        message[4..6].copy_from_slice(&NEW_GENERATION.to_ne_bytes());
        for (kind, value) in [(1_u16, 7_u32), (MADE_BY, pid)] {
            message.extend(8_u16.to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value.to_be_bytes());
        }
        message
    }

    #[test]
    fn only_others_changes_are_heard() {
        note_own(4_000_001);
        assert!(!tells_of_others(&generation(4_000_001)));
        assert!(tells_of_others(&generation(4_000_002)));
        let mut other = generation(4_000_002);
        other[4..6].copy_from_slice(&(0x0a0c_u16).to_ne_bytes());
        assert!(!tells_of_others(&other));
        for cut in 0..36 {
            let _ = tells_of_others(&generation(4_000_002)[..cut]);
        }
    }
}
