//! Determines the source of a request for limits: the peer, or the client that a trusted proxy reports.

use std::net::{IpAddr, Ipv6Addr};

use crate::config::{ProxyNetwork, Server};

/// Returns the network of a customer: one IPv4 address, or an IPv6 /64.
#[must_use]
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let s = v6.segments();
            IpAddr::V6(Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// The proxies whose forwarded client address is trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Proxies {
    /// None.
    #[default]
    None,
    /// The last entry of every peer: the operator guarantees that only the proxy reaches this server.
    EachPeer,
    /// Peers in these networks.
    Named(Vec<ProxyNetwork>),
}

impl Proxies {
    /// Reads the settings.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        match (server.behind_proxy, server.trusted_proxies.is_empty()) {
            (false, _) => Self::None,
            (true, true) => Self::EachPeer,
            (true, false) => Self::Named(server.trusted_proxies.clone()),
        }
    }

    /// Returns whether a peer is a trusted proxy.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        match self {
            Self::None => false,
            Self::EachPeer => true,
            Self::Named(networks) => networks.iter().any(|network| network.contains(peer)),
        }
    }

    /// Returns the client behind a peer. With named proxies this is the right-most entry that is not a named
    /// proxy. Entries left of it are claims of the client.
    ///
    /// `forwarded` holds the values of `X-Forwarded-For` in order. They are bytes: the part that a client wrote
    /// need not be text.
    #[must_use]
    pub fn client<'a>(&self, peer: IpAddr, forwarded: impl DoubleEndedIterator<Item = &'a [u8]>) -> IpAddr {
        if !self.trusts(peer) {
            return peer;
        }
        let mut nearest = peer;
        for entry in forwarded.rev().flat_map(|line| line.rsplit(|byte| *byte == b',')) {
            // A trusted proxy did not write this unreadable entry. The previous hop is all that is known.
            let Some(address) = address(entry) else { return nearest };
            nearest = address.to_canonical();
            if !matches!(self, Self::Named(_)) || !self.trusts(nearest) {
                return nearest;
            }
        }
        nearest
    }
}

fn address(entry: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(entry).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(proxies: &Proxies, peer: &str, lines: &[&str]) -> String {
        proxies.client(peer.parse().unwrap(), lines.iter().map(|line| line.as_bytes())).to_string()
    }

    #[test]
    fn only_the_word_of_a_trusted_proxy_counts() {
        let named = Proxies::Named(vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(client(&Proxies::None, "192.0.2.1", &["198.51.100.1"]), "192.0.2.1");
        assert_eq!(client(&Proxies::EachPeer, "192.0.2.1", &["1.1.1.1, 198.51.100.1"]), "198.51.100.1");
        assert_eq!(client(&named, "192.0.2.1", &["198.51.100.1"]), "192.0.2.1");
        // The right-most hop that is not a trusted proxy, also over several lines; the client invented
        // everything left of it.
        assert_eq!(client(&named, "10.0.0.1", &["6.6.6.6, 198.51.100.1", "10.0.0.9"]), "198.51.100.1");
        assert_eq!(client(&named, "10.0.0.1", &["6.6.6.6, nonsense, 10.0.0.9"]), "10.0.0.9");
        assert_eq!(client(&named, "10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn bytes_that_are_no_text_hide_no_client() {
        let line: &[u8] = b"\xff, 198.51.100.1";
        for proxies in [Proxies::EachPeer, Proxies::Named(vec!["10.0.0.0/8".parse().unwrap()])] {
            let client = proxies.client("10.0.0.1".parse().unwrap(), std::iter::once(line));
            assert_eq!(client.to_string(), "198.51.100.1");
        }
    }

    #[test]
    fn a_customer_is_an_address_or_a_64() {
        let net = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(net("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(net("::ffff:192.0.2.7"), "192.0.2.7");
    }
}
