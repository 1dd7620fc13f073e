//! Netlink monitor: a thread that receives the messages that the kernel sends to a netlink group.

use std::io;
use std::sync::Arc;

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with,
};
use tokio::sync::Notify;

/// Minimum length of a message: its header (`struct nlmsghdr`) and the first word of its payload.
const LEAST: usize = 20;

/// A thread that listens for as long as the process lives.
#[derive(Debug)]
pub struct Ear(Arc<Notify>);

impl Ear {
    /// Starts to listen to groups (a mask) of a netlink family. `matters` decides for each message, header
    /// included, whether it is relevant.
    pub fn open(
        name: &str,
        family: Option<Protocol>,
        groups: u32,
        matters: fn(&[u8]) -> bool,
    ) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, family)?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, groups))?;
        let heard = Arc::new(Notify::new());
        let tell = Arc::clone(&heard);
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match recv(&socket, &mut *buffer, RecvFlags::empty()) {
                    Ok((_, n)) if !any(buffer.get(..n).unwrap_or_default(), matters) => {}
                    Err(rustix::io::Errno::INTR) => {}
                    // A relevant message arrived, or the buffer overflowed and may have lost one.
                    Ok(_) | Err(rustix::io::Errno::NOBUFS) => tell.notify_one(),
                    Err(error) => {
                        tracing::warn!(%error, "the netlink monitor has stopped: kernel messages cannot be read");
                        return;
                    }
                }
            }
        })?;
        Ok(Self(heard))
    }

    /// Returns once a relevant message arrived, or messages were lost.
    pub async fn heard(&self) {
        self.0.notified().await;
    }
}

/// Reads a number of a message, in the machine's byte order.
#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Whether one of these messages is relevant.
fn any(mut bytes: &[u8], matters: fn(&[u8]) -> bool) -> bool {
    while let Some(length) = bytes.get(..4).and_then(|length| length.try_into().ok()).map(u32::from_ne_bytes)
    {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(message) = bytes.get(..length).filter(|message| message.len() >= LEAST) else {
            return false;
        };
        if matters(message) {
            return true;
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, length: u32) -> Vec<u8> {
        let mut message = vec![0; 24];
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message
    }

    fn is_seven(message: &[u8]) -> bool {
        u16_at(message, 4) == Some(7)
    }

    #[test]
    fn each_message_of_a_datagram_is_asked() {
        assert!(any(&message(7, 24), is_seven));
        assert!(!any(&message(8, 24), is_seven));
        // The next one begins at a multiple of four.
        let several = [message(8, 24), message(9, 22), message(7, 24)].concat();
        assert!(any(&several, is_seven));
    }

    #[test]
    fn what_is_no_message_ends_the_reading() {
        assert!(!any(&[0; 64], |_| true), "a message without a length would be read for ever");
        assert!(!any(&message(7, 4_000_000_000), is_seven));
        for cut in 0..24 {
            assert!(!any(&message(7, 24)[..cut], is_seven));
        }
    }
}
