//! Where a request comes from, for bounds and throttles: the peer, or what a trusted proxy says of its client.

use std::net::{IpAddr, Ipv6Addr};

use crate::config::{Cidr, Server};

/// The network that an address stands for: one IPv4 address, or the /64 that one IPv6 customer has.
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

/// Whose word about a client counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Proxies {
    /// No peer's.
    #[default]
    None,
    /// The last entry of each peer: the operator says that only the proxy reaches us.
    EachPeer,
    /// That of peers in these networks.
    Named(Vec<Cidr>),
}

impl Proxies {
    /// As the settings say.
    #[must_use]
    pub fn of(server: &Server) -> Self {
        match (server.behind_proxy, server.trusted_proxies.is_empty()) {
            (false, _) => Self::None,
            (true, true) => Self::EachPeer,
            (true, false) => Self::Named(server.trusted_proxies.clone()),
        }
    }

    /// Whether a peer is a proxy of ours.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        match self {
            Self::None => false,
            Self::EachPeer => true,
            Self::Named(networks) => networks.iter().any(|network| network.contains(peer)),
        }
    }

    /// The client behind a peer: with named proxies the right-most entry that is none of them. The entries left of it
    /// are the client's own words.
    ///
    /// `forwarded`: the values of `X-Forwarded-For`, in order. They are bytes: what a client has written left of a
    /// proxy's own entry need not be text.
    #[must_use]
    pub fn client<'a>(&self, peer: IpAddr, forwarded: impl DoubleEndedIterator<Item = &'a [u8]>) -> IpAddr {
        if !self.trusts(peer) {
            return peer;
        }
        let mut nearest = peer;
        for entry in forwarded.rev().flat_map(|line| line.rsplit(|byte| *byte == b',')) {
            // What cannot be read was not written by a proxy of ours: the hop before it is all that is known.
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
        // The right-most hop that is none of ours, also over several lines; what is left of it is made up.
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
