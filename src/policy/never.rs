//! The reserved ranges: addresses that no tenant reaches. They are ranges, not single addresses, because
//! providers move their metadata services within them. Sources: cloud-init's data sources; Microsoft's and
//! Alibaba's documentation for the two addresses that lie in ranges which look harmless.

use super::Cidr;

/// Whether a platform service may have an address in a reserved range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReservedKind {
    /// Never.
    Closed,
    /// Single addresses may be endpoints of a platform service.
    Private,
}

/// A reserved range and its description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Addresses.
    pub network: Cidr,
    /// Whether a platform service may have an address there.
    pub wall: ReservedKind,
    /// Description, as messages show it.
    pub words: &'static str,
}

/// Description of the machine's own addresses.
const OWN: &str = "an address of the platform's own machine";

impl Range {
    /// Reports whether the range is an address of the machine.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.words == OWN
    }
}

const fn range(octets: [u8; 4], prefix: u8, wall: ReservedKind, words: &'static str) -> Range {
    let [a, b, c, d] = octets;
    match Cidr::new(std::net::Ipv4Addr::new(a, b, c, d), prefix) {
        Some(network) => Range { network, wall, words },
        None => Range { network: Cidr::of(std::net::Ipv4Addr::UNSPECIFIED), wall, words },
    }
}

/// The built-in list, for all clouds.
pub const BUILT_IN: &[Range] = &[
    range([0, 0, 0, 0], 8, ReservedKind::Closed, "this network"),
    range([10, 0, 0, 0], 8, ReservedKind::Private, "a private range"),
    range([100, 64, 0, 0], 10, ReservedKind::Private, "a range shared by carriers"),
    range([100, 100, 100, 200], 32, ReservedKind::Closed, "metadata of a cloud (Alibaba)"),
    range([127, 0, 0, 0], 8, ReservedKind::Closed, "loopback"),
    range([168, 63, 129, 16], 32, ReservedKind::Closed, "metadata of a cloud (Azure WireServer)"),
    range([169, 254, 0, 0], 16, ReservedKind::Closed, "link-local, where clouds have their metadata"),
    range([172, 16, 0, 0], 12, ReservedKind::Private, "a private range"),
    range(
        [192, 0, 0, 0],
        24,
        ReservedKind::Closed,
        "protocol assignments, with metadata of a cloud (Oracle)",
    ),
    range([192, 0, 2, 0], 24, ReservedKind::Private, "a range for documentation"),
    range([192, 168, 0, 0], 16, ReservedKind::Private, "a private range"),
    range([198, 18, 0, 0], 15, ReservedKind::Private, "a range for benchmarks"),
    range([198, 51, 100, 0], 24, ReservedKind::Private, "a range for documentation"),
    range([203, 0, 113, 0], 24, ReservedKind::Private, "a range for documentation"),
    range([224, 0, 0, 0], 4, ReservedKind::Closed, "multicast"),
    range([240, 0, 0, 0], 4, ReservedKind::Closed, "reserved"),
];

/// Returns the range of an address of the machine.
#[must_use]
pub fn own(network: Cidr) -> Range {
    Range { network, wall: ReservedKind::Closed, words: OWN }
}

/// Returns a range that the configuration blocks. A platform service may have single addresses there.
#[must_use]
pub fn configured(network: Cidr) -> Range {
    Range { network, wall: ReservedKind::Private, words: "blocked by this platform's configuration" }
}

/// Returns the ranges that are not inside another one: an nftables set rejects ranges that overlap.
pub fn outermost(ranges: &[Range]) -> impl Iterator<Item = Cidr> + '_ {
    let within = |range: &Range, other: &Range| {
        other.network.overlaps(range.network) && other.network.prefix() < range.network.prefix()
    };
    ranges
        .iter()
        .filter(move |range| !ranges.iter().any(|other| within(range, other)))
        .map(|range| range.network)
}

/// Returns the range that forbids a service at this network, if any. `extra`: the machine's own ranges.
#[must_use]
pub fn against_service<'a>(network: Cidr, extra: impl IntoIterator<Item = &'a Range>) -> Option<Range> {
    let hit = |range: &&Range| range.network.overlaps(network);
    BUILT_IN
        .iter()
        .chain(extra)
        .filter(hit)
        .find(|range| range.wall == ReservedKind::Closed || network.single().is_none())
        .copied()
}

/// Returns the range that forbids an egress target at this network, if any.
#[must_use]
pub fn against_outside<'a>(network: Cidr, extra: impl IntoIterator<Item = &'a Range>) -> Option<Range> {
    BUILT_IN.iter().chain(extra).find(|range| range.network.overlaps(network)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn metadata_of_every_cloud_is_closed_to_both() {
        for address in [
            "169.254.169.254",
            "169.254.169.252",
            "169.254.170.2",
            "169.254.170.23",
            "169.254.42.42",
            "169.254.0.23",
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(against_service(cidr(address), &[]).is_some(), "{address}");
            assert!(against_outside(cidr(address), &[]).is_some(), "{address}");
        }
        for network in ["0.0.0.0/0", "168.0.0.0/8", "128.0.0.0/1", "100.100.0.0/16"] {
            assert!(against_service(cidr(network), &[]).is_some(), "{network}");
            assert!(against_outside(cidr(network), &[]).is_some(), "{network}");
        }
    }

    #[test]
    fn a_private_range_is_open_to_single_addresses_of_services_alone() {
        for network in ["10.1.2.3", "172.16.0.9", "192.168.1.1", "100.64.0.1"] {
            assert_eq!(against_service(cidr(network), &[]), None, "{network}");
            assert!(against_outside(cidr(network), &[]).is_some(), "{network}");
        }
        assert!(against_service(cidr("10.1.2.0/24"), &[]).is_some());
        assert_eq!(against_service(cidr("192.88.99.0/24"), &[]), None);
        assert_eq!(against_outside(cidr("1.1.1.1"), &[]), None);
        assert!(against_service(cidr("10.1.2.3"), &[own(cidr("10.1.2.3"))]).is_some());
    }

    #[test]
    fn every_range_of_the_list_is_what_it_says() {
        assert_eq!(BUILT_IN.iter().filter(|range| range.network.first() == 0).count(), 1);
    }
}
