//! The host as a tenant could see it: its listeners beyond loopback, whether they answer from within an instance's
//! network, and the other firewalls on the machine.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::driver::podman::namespace;
use crate::policy::Protocol;

/// A socket that listens on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostSocket {
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Address on which it listens, possibly all of them.
    pub address: IpAddr,
    /// The program, if known.
    pub program: String,
    /// Its systemd unit, if it has one.
    pub unit: String,
    /// Whether it answered from within an instance's network. None while no instance runs, and for UDP, where
    /// silence says nothing.
    pub answers: Option<bool>,
    /// Whether it is the resolver of the apps: the only listener that must answer.
    pub names: bool,
}

/// State of a listening TCP socket in the kernel's list.
pub(super) const LISTENS: &str = "0A";
/// State of a UDP socket that is not connected.
const UNCONNECTED: &str = "07";
/// Maximum number of listeners that are tried, in total and at once.
const TRIED: usize = 64;
const AT_ONCE: usize = 8;

/// Parses an address of the kernel's lists.
pub(super) fn address(hex: &str) -> Option<IpAddr> {
    if hex.len() == 8 {
        return Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()).into());
    }
    let mut octets = [0; 16];
    for (n, word) in octets.chunks_mut(4).enumerate() {
        word.copy_from_slice(&u32::from_str_radix(hex.get(n * 8..n * 8 + 8)?, 16).ok()?.to_ne_bytes());
    }
    Some(Ipv6Addr::from(octets).to_canonical())
}

/// Parses a line of the kernel's list: address, port, inode.
fn listening(line: &str, state: &str) -> Option<(IpAddr, u16, String)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (local, port) = fields.get(1)?.split_once(':')?;
    let (address, port) = (address(local)?, u16::from_str_radix(port, 16).ok()?);
    (*fields.get(3)? == state && !address.is_loopback())
        .then(|| (address, port, (*fields.get(9).unwrap_or(&"")).to_owned()))
}

/// Returns program and unit of each socket, by its inode.
fn owners() -> HashMap<String, (String, String)> {
    let mut found = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let process = entry.path();
        let Ok(files) = std::fs::read_dir(process.join("fd")) else { continue };
        let read = |file: &str| std::fs::read_to_string(process.join(file)).unwrap_or_default();
        let mut own = None;
        for file in files.flatten() {
            let Ok(target) = std::fs::read_link(file.path()) else { continue };
            let target = target.to_string_lossy();
            let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else {
                continue;
            };
            let (program, unit) = own.get_or_insert_with(|| {
                let groups = read("cgroup");
                let unit =
                    groups.split(['/', '\n']).rfind(|part| part.ends_with(".service")).unwrap_or_default();
                (read("comm").trim().to_owned(), unit.to_owned())
            });
            found.insert(inode.to_owned(), (program.clone(), unit.clone()));
        }
    }
    found
}

/// Returns the sockets that listen on the host beyond loopback.
#[must_use]
pub fn listeners() -> Vec<HostSocket> {
    let owners = owners();
    let mut found = Vec::new();
    for (list, protocol, state) in [
        ("tcp", Protocol::Tcp, LISTENS),
        ("tcp6", Protocol::Tcp, LISTENS),
        ("udp", Protocol::Udp, UNCONNECTED),
        ("udp6", Protocol::Udp, UNCONNECTED),
    ] {
        let text = std::fs::read_to_string(format!("/proc/net/{list}")).unwrap_or_default();
        for (address, port, inode) in text.lines().skip(1).filter_map(|line| listening(line, state)) {
            let (program, unit) = owners.get(&inode).cloned().unwrap_or_default();
            found.push(HostSocket { protocol, port, address, program, unit, answers: None, names: false });
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Returns where each TCP listener is tried from within a network namespace: index in the list, address, port. A
/// listener on all addresses is tried at the gateway; a listener on one address is tried there.
pub fn targets(sandbox: &str, listeners: &mut [HostSocket]) -> Vec<(usize, Ipv4Addr, u16)> {
    let Some(gateway) = namespace::begin(sandbox, gateway).wait().ok().flatten() else { return Vec::new() };
    for listener in listeners.iter_mut() {
        listener.names = listener.port == 53 && listener.address == IpAddr::V4(gateway);
    }
    listeners
        .iter()
        .enumerate()
        .filter(|(_, listener)| listener.protocol == Protocol::Tcp)
        .take(TRIED)
        .map(|(n, listener)| match listener.address {
            IpAddr::V4(own) if !own.is_unspecified() => (n, own, listener.port),
            _ => (n, gateway, listener.port),
        })
        .collect()
}

/// Tries listeners from within a network namespace.
pub fn try_from_within(sandbox: &str, targets: &[(usize, Ipv4Addr, u16)], listeners: &mut [HostSocket]) {
    // A few at a time: each attempt takes a thread of its own, which enters the namespace and ends.
    for few in targets.chunks(AT_ONCE) {
        let tries: Vec<_> = few
            .iter()
            .map(|(n, own, port)| {
                let (n, port, own) = (*n, *port, *own);
                let answers = move || {
                    let patience = Duration::from_millis(400);
                    TcpStream::connect_timeout(&(own, port).into(), patience)
                        .map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionRefused, |_| true)
                };
                (n, namespace::begin(sandbox, answers))
            })
            .collect();
        for (n, one) in tries {
            if let Ok(answers) = one.wait()
                && let Some(listener) = listeners.get_mut(n)
            {
                listener.answers = Some(answers);
            }
        }
    }
}

/// Returns the default gateway of this thread's network.
fn gateway() -> Option<Ipv4Addr> {
    let text = std::fs::read_to_string("/proc/thread-self/net/route").ok()?;
    text.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if *fields.get(1)? != "00000000" {
            return None;
        }
        Some(Ipv4Addr::from(u32::from_str_radix(fields.get(2)?, 16).ok()?.to_ne_bytes()))
    })
}

/// Returns the tables of other programs, as `family` and `name`, from the output of `nft -j list tables`.
#[must_use]
pub fn foreign_tables(json: &[u8]) -> Vec<(String, String)> {
    let value: Value = serde_json::from_slice(json).unwrap_or_default();
    let tables = value["nftables"].as_array().into_iter().flatten().map(|part| &part["table"]);
    tables
        .filter_map(|table| Some((table["family"].as_str()?.to_owned(), table["name"].as_str()?.to_owned())))
        .filter(|(_, name)| !name.starts_with("bulkhead_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_is_read() {
        let line = "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1";
        let (address, port, inode) = listening(line, LISTENS).unwrap();
        assert_eq!((address.to_string().as_str(), port, inode.as_str()), ("0.0.0.0", 8080, "4711"));
        assert_eq!(listening(line, UNCONNECTED), None);
        let loopback = line.replace("00000000:1F90", "0100007F:1F90");
        assert_eq!(listening(&loopback, LISTENS), None, "loopback does not count");
        let six = line.replace("00000000:1F90", "00000000000000000000000000000000:0016");
        assert_eq!(listening(&six, LISTENS).unwrap().1, 22);
        let six = line.replace("00000000:1F90", "00000000000000000000000001000000:0016");
        assert_eq!(listening(&six, LISTENS), None);
        assert_eq!(listening("", LISTENS), None);
    }

    #[test]
    fn what_listens_here_is_found_with_its_program() {
        let socket = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let all = listeners();
        let own =
            all.iter().find(|listener| listener.port == port && listener.protocol == Protocol::Tcp).unwrap();
        assert!(!own.program.is_empty(), "{own:?}");
        let hidden = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = hidden.local_addr().unwrap().port();
        assert!(!listeners().iter().any(|listener| listener.port == port && listener.address.is_loopback()));
    }

    #[test]
    fn only_others_tables_count() {
        let tables = serde_json::json!({"nftables": [{"metainfo": {}}, {"table": {"family": "ip", "name": "nat"}},
            {"table": {"family": "inet", "name": "bulkhead_abcd"}}]});
        assert_eq!(foreign_tables(tables.to_string().as_bytes()), [("ip".to_owned(), "nat".to_owned())]);
        assert!(foreign_tables(b"no json").is_empty());
    }
}
