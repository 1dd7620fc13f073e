//! Network policy without I/O: flows, the address ranges that no tenant reaches, and the verification of the
//! rules before they are applied. `space.rs` cuts the address space into regions. `read.rs` parses an
//! nftables text back. `proof.rs` verifies the parsed table.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, DomainName, NameError, TenantName};

pub mod never;
pub mod proof;
pub mod read;
mod shape;
pub mod space;

/// The transport protocol of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Returns the name that nftables and the API use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
    /// Parses a name; `None` if it is neither `tcp` nor `udp`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "tcp" => Some(Self::Tcp),
            "udp" => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// IPv4 addresses that share a prefix of 0 to 32 bits. A single address has a prefix of 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// Returns the range, or `None` if a host bit is set or the prefix is longer than 32.
    #[must_use]
    pub const fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        if prefix > 32 || (prefix < 32 && address.to_bits() & (u32::MAX >> prefix) != 0) {
            return None;
        }
        Some(Self { address, prefix })
    }
    /// Returns the range of a single address.
    #[must_use]
    pub const fn of(address: Ipv4Addr) -> Self {
        Self { address, prefix: 32 }
    }
    /// Returns the first address.
    #[must_use]
    pub fn first(self) -> u32 {
        self.address.to_bits()
    }
    /// Returns the last address.
    #[must_use]
    pub fn last(self) -> u32 {
        self.first() | u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0)
    }
    /// Returns the length of the prefix.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }
    /// Returns the address if the range is a single one.
    #[must_use]
    pub fn single(self) -> Option<Ipv4Addr> {
        (self.prefix == 32).then_some(self.address)
    }
    /// Reports whether the two ranges share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first() <= other.last() && other.first() <= self.last()
    }
    /// Reports whether this range contains all of `other`.
    #[must_use]
    pub fn holds(self, other: Self) -> bool {
        self.first() <= other.first() && other.last() <= self.last()
    }
    /// Reports whether the address lies in this range.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        (self.first()..=self.last()).contains(&address.to_bits())
    }
}

impl FromStr for Cidr {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let wrong =
            || NameError("an address such as 192.0.2.7, or a network such as 192.0.2.0/24".to_owned());
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        if prefix.is_empty() || prefix.len() > 2 || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let prefix = prefix.parse().map_err(|_| wrong())?;
        Self::new(address, prefix).ok_or_else(|| {
            NameError("a network, written as its first address and a prefix of at most 32".to_owned())
        })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix == 32 { self.address.fmt(f) } else { write!(f, "{}/{}", self.address, self.prefix) }
    }
}

impl TryFrom<String> for Cidr {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

/// The destination of a flow.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// The instances of an app: one of the same tenant, or one that another tenant granted.
    App {
        /// The tenant that owns the app.
        tenant: TenantName,
        /// The app's id. A later app of the same name is a different target.
        app: AppId,
    },
    /// An endpoint of a platform service. A single one may lie in a private range.
    Service {
        /// Its addresses.
        network: Cidr,
    },
    /// An approved egress target with addresses.
    Outside {
        /// Its addresses.
        network: Cidr,
    },
    /// An approved egress target with a domain: the addresses that DNS returned for it, until they expire.
    Domain {
        /// The domain.
        domain: DomainName,
    },
}

/// A destination that one app may open connections to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// The name in the app's own spec: `api`, `other/api`, `kafka`.
    pub name: String,
    /// Destination.
    pub target: Target,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
    /// When the flow expires, in seconds since 1970. The agent enforces it, even while the control plane is
    /// away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}

/// All flows of one tenant's apps. Everything else is denied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantFlows {
    /// The tenant.
    pub tenant: TenantName,
    /// Number of the plan. The agent refuses a number lower than one it has seen.
    pub plan: i64,
    /// The flows of each app.
    pub apps: Vec<AppFlows>,
    /// End of audit mode, in seconds since 1970. Until then egress is allowed and recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trial_until: Option<i64>,
    /// The flows that are about to be closed. Their packets are counted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub watched: Vec<AppFlows>,
}

/// The flows of one app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppFlows {
    /// The app.
    pub app: AppId,
    /// Its flows.
    pub flows: Vec<Flow>,
}

/// A packet that demonstrates a fault: it can be sent to reproduce it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// Number of the bridge on which the packet arrives.
    pub network: u32,
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub target: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { network, source, target, protocol, port } = self;
        write!(f, "{source} (network {network}) to {target} {protocol} {port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_written_in_one_way() {
        for good in ["192.0.2.7", "192.0.2.0/24", "0.0.0.0/0", "10.0.0.0/8", "255.255.255.255"] {
            assert_eq!(good.parse::<Cidr>().unwrap().to_string(), good);
        }
        assert_eq!("192.0.2.7/32".parse::<Cidr>().unwrap().to_string(), "192.0.2.7");
        for bad in
            ["192.0.2.7/24", "192.0.2.0/33", "192.0.2", "1.2.3.4/", "1.2.3.4/+8", "01.2.3.4", "::1", "a/8"]
        {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert_eq!((all.first(), all.last()), (0, u32::MAX));
        let one: Cidr = "10.0.0.1".parse().unwrap();
        assert_eq!((one.first(), one.last()), (0x0a00_0001, 0x0a00_0001));
    }
}
