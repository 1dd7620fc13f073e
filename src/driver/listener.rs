//! Finds the owner of a listening TCP port. Any user of the machine can take a fixed loopback port while its owner
//! is down. A secret is therefore sent to a port only after the kernel has named the right user as its owner.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// A listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListeningSocket {
    /// Address on which it listens.
    pub address: SocketAddr,
    /// User whose process opened it.
    pub uid: u32,
}

/// Why a port does not belong to the expected user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// Nothing listens there.
    Nothing,
    /// A process of another user listens there.
    User(u32),
    /// The kernel's table cannot be read.
    Unknown,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing listens there"),
            Self::User(uid) => write!(f, "a process of user id {uid} listens there"),
            Self::Unknown => f.write_str("/proc/net/tcp cannot be read"),
        }
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    // Words of four bytes, each in the machine's byte order.
    for at in (0..ip.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Parses a line of `/proc/net/tcp` or `/proc/net/tcp6`; none unless it is a listener.
fn line(text: &str) -> Option<ListeningSocket> {
    let mut fields = text.split_whitespace();
    let (local, state) = (fields.nth(1)?, fields.nth(1)?);
    let uid = fields.nth(3)?.parse().ok()?;
    (state == "0A").then(|| Some(ListeningSocket { address: address(local)?, uid }))?
}

fn read(table: &str) -> Vec<ListeningSocket> {
    table.lines().skip(1).filter_map(line).collect()
}

/// Returns the listeners that a connection to this address may reach; none when the kernel's table cannot be read.
#[must_use]
pub fn at(target: SocketAddr) -> Option<Vec<ListeningSocket>> {
    let mut found = Vec::new();
    found.extend(read(&std::fs::read_to_string("/proc/net/tcp").ok()?));
    // A machine without IPv6 has no second table.
    found.extend(read(&std::fs::read_to_string("/proc/net/tcp6").unwrap_or_default()));
    found.retain(|listener| reaches(target, listener.address));
    Some(found)
}

fn reaches(target: SocketAddr, listener: SocketAddr) -> bool {
    let ip = listener.ip();
    target.port() == listener.port()
        && (ip == target.ip().to_canonical() || ip.is_unspecified() || target.ip().is_unspecified())
}

/// Fails unless this user owns every listener that a connection to this address may reach, and there is one.
pub fn require(target: SocketAddr, uid: u32) -> Result<(), Foreign> {
    let found = at(target).ok_or(Foreign::Unknown)?;
    if let Some(other) = found.iter().find(|listener| listener.uid != uid) {
        return Err(Foreign::User(other.uid));
    }
    if found.is_empty() { Err(Foreign::Nothing) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000   998        0 31 1 0 100 0 0 10 0\n\
        \x20  1: 0100007F:1F91 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 32 1 0 20 4 30 10 -1\n\
        \x20  2: 00000000000000000000000000000000:1F92 0:0 0A 00000000:00000000 00:00000000 00000000 65534 0 33 1 0 1\n";

    #[test]
    fn listeners_are_read_with_their_user() {
        let found = read(TABLE);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0], ListeningSocket { address: "127.0.0.1:8080".parse().unwrap(), uid: 998 });
        assert_eq!(found[1].uid, 65_534);
        let reach = |target: &str| reaches(target.parse().unwrap(), found[1].address);
        assert!(reach("127.0.0.1:8082") && reach("[::1]:8082") && !reach("127.0.0.1:8080"));
        for bad in ["", "x", "0: 1 2 3", "  0: 0100007F:ZZZZ 0:0 0A 0:0 0:0 0 0 0 0"] {
            assert_eq!(line(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_port_is_ones_own_or_it_is_not() {
        let own = rustix::process::getuid().as_raw();
        for bound in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(bound) else { continue };
            let target = listener.local_addr().unwrap();
            assert_eq!(require(target, own), Ok(()), "{bound}");
            assert_eq!(require(target, own + 1), Err(Foreign::User(own)), "{bound}");
            let loopback = SocketAddr::from(([127, 0, 0, 1], target.port()));
            if !bound.starts_with("[::1]") {
                assert_eq!(require(loopback, own), Ok(()), "{bound}");
            }
            drop(listener);
            assert_eq!(require(target, own), Err(Foreign::Nothing), "{bound}");
        }
    }
}
