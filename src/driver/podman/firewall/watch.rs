//! Hears from the kernel that somebody has changed a table: netfilter's own messages (nfnetlink), of which
//! only "there is a new generation, made by this process" is read. `nft monitor` is not used: version 1.0.6
//! prints its own memory on sets of ranges, and slows down every change.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with};
use tokio::sync::Notify;

/// The group of nftables' messages, as a mask (`NFNLGRP_NFTABLES` is 7).
const GROUP: u32 = 1 << 6;
/// Subsystem 10 is nftables, its message 15 a new generation (`NFT_MSG_NEWGEN`).
const NEW_GENERATION: u16 = 0x0a0f;
/// The attribute with the id of the process that made it (`NFTA_GEN_PROC_PID`).
const MADE_BY: u16 = 2;
/// Most of our own changes that are remembered.
const REMEMBERED: usize = 64;

/// Processes by which we have changed tables ourselves, lately.
static OWN: Mutex<VecDeque<u32>> = Mutex::new(VecDeque::new());

/// Notes that a process changes a table on our behalf.
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

/// An ear at the kernel: a thread that listens for as long as the process lives.
#[derive(Debug)]
pub struct Watch(Arc<Notify>);

impl Watch {
    /// Begins to listen.
    pub fn open() -> io::Result<Self> {
        let kind = (AddressFamily::NETLINK, SocketType::RAW);
        let socket = socket_with(kind.0, kind.1, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, GROUP))?;
        let heard = Arc::new(Notify::new());
        let tell = Arc::clone(&heard);
        std::thread::Builder::new().name("nftables".into()).spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match recv(&socket, &mut *buffer, RecvFlags::empty()) {
                    Ok((_, n)) if !tells_of_others(buffer.get(..n).unwrap_or_default()) => {}
                    Err(rustix::io::Errno::INTR) => {}
                    // More came than fitted: something has changed.
                    Ok(_) | Err(rustix::io::Errno::NOBUFS) => tell.notify_one(),
                    Err(error) => {
                        tracing::warn!(%error, "the kernel's messages are not heard any more");
                        return;
                    }
                }
            }
        })?;
        Ok(Self(heard))
    }

    /// Returns once somebody else has changed some table, or messages were missed.
    pub async fn changed(&self) {
        self.0.notified().await;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Whether one of these messages is a generation that was not made on our behalf.
fn tells_of_others(mut bytes: &[u8]) -> bool {
    while let Some(length) = bytes.get(..4).and_then(|length| length.try_into().ok()).map(u32::from_ne_bytes)
    {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(message) = bytes.get(..length).filter(|message| message.len() >= 20) else { return false };
        if u16_at(message, 4) == Some(NEW_GENERATION) && !made_by(&message[20..]).is_some_and(is_own) {
            return true;
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
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
        let both = [generation(4_000_001), generation(4_000_002)].concat();
        assert!(tells_of_others(&both));
        let mut other = generation(4_000_002);
        other[4..6].copy_from_slice(&(0x0a0c_u16).to_ne_bytes());
        assert!(!tells_of_others(&other));
        for cut in 0..36 {
            let _ = tells_of_others(&generation(4_000_002)[..cut]);
        }
        assert!(!tells_of_others(&[0; 64]));
    }
}
