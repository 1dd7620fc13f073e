//! Listeners inside an instance, for the sentence that says why its port does not answer. Only a limited part of
//! the kernel's list is read: an app can open any number of sockets.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;

use super::host::{LISTENS, address};

/// Maximum bytes of a list that are read; listeners come first in it.
const READ: u64 = 64 << 10;
/// Maximum number of listeners that are named.
const NAMED: usize = 5;

/// Returns the TCP listeners in the network of a process.
#[must_use]
pub fn of(pid: i32) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = ["tcp", "tcp6"]
        .iter()
        .filter_map(|list| File::open(format!("/proc/{pid}/net/{list}")).ok())
        .flat_map(|file| BufReader::new(file.take(READ)).lines().map_while(Result::ok).collect::<Vec<_>>())
        .filter_map(|line| listener(&line))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn listener(line: &str) -> Option<SocketAddr> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (local, port) = fields.get(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    (*fields.get(3)? == LISTENS).then(|| Some(SocketAddr::new(address(local)?, port)))?
}

/// Says why a port accepts no connections, and what to change.
#[must_use]
pub fn explain(port: u16, listening: &[SocketAddr]) -> String {
    let shown = |at: &SocketAddr| {
        if at.ip().is_unspecified() { format!("port {}", at.port()) } else { at.to_string() }
    };
    let list = |all: &[SocketAddr]| {
        let rest = if all.len() > NAMED { " and more" } else { "" };
        all.iter().take(NAMED).map(shown).collect::<Vec<_>>().join(", ") + rest
    };
    let own: Vec<SocketAddr> = listening.iter().filter(|at| at.port() == port).copied().collect();
    let loopback = !own.is_empty() && own.iter().all(|at| at.ip().is_loopback());
    if loopback {
        return format!(
            "port {port} accepts no connections: the app listens on {} only; listen on 0.0.0.0",
            list(&own)
        );
    }
    if !own.is_empty() {
        return format!("port {port} accepts no connections, though the app listens on {}", list(&own));
    }
    if listening.is_empty() {
        return format!("port {port} accepts no connections: nothing listens in the instance");
    }
    format!(
        "port {port} accepts no connections: the app listens on {}; write its port in the spec, or let it listen on {port}",
        list(listening)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_is_named_with_what_to_change() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(explain(8080, &[]).ends_with("nothing listens in the instance"));
        let loopback = explain(8080, &[at("127.0.0.1:8080"), at("0.0.0.0:9000")]);
        assert!(loopback.contains("listens on 127.0.0.1:8080 only; listen on 0.0.0.0"), "{loopback}");
        let six = explain(8080, &[at("[::1]:8080")]);
        assert!(six.contains("[::1]:8080 only"), "{six}");
        let other = explain(8080, &[at("0.0.0.0:3000")]);
        assert!(other.contains("listens on port 3000; write its port in the spec"), "{other}");
        assert!(explain(8080, &[at("[::]:3000")]).contains("listens on port 3000;"));
        let busy = explain(8080, &[at("0.0.0.0:8080"), at("127.0.0.1:8080")]);
        assert!(busy.contains("though the app listens on port 8080, 127.0.0.1:8080"), "{busy}");
        let many: Vec<SocketAddr> = (3000..3100).map(|port| SocketAddr::from(([0; 4], port))).collect();
        assert!(explain(8080, &many).len() < 200);
    }

    #[test]
    fn the_kernels_list_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1";
        assert_eq!(listener(line), Some("127.0.0.1:8080".parse().unwrap()));
        assert_eq!(listener(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(listener("  sl  local_address rem_address   st tx_queue rx_queue"), None);
        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(of(pid).contains(&own.local_addr().unwrap()));
    }
}
