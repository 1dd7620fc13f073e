//! Who may talk to whom, pure: flows, the addresses that nobody may reach, and the proof that what will
//! be applied allows nothing else. `space.rs` cuts the address space into regions, `read.rs` reads an
//! nftables text back, `proof.rs` judges what it read.

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

/// What carries a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its name, as people and nftables write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
    /// The protocol of this name.
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

/// IPv4 addresses that share a prefix, 0 to 32 bits long; a single address is one of 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// From a network address and its length; none if a host bit is set or the length is over 32.
    #[must_use]
    pub const fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        if prefix > 32 || (prefix < 32 && address.to_bits() & (u32::MAX >> prefix) != 0) {
            return None;
        }
        Some(Self { address, prefix })
    }
    /// A single address.
    #[must_use]
    pub const fn of(address: Ipv4Addr) -> Self {
        Self { address, prefix: 32 }
    }
    /// The first address.
    #[must_use]
    pub fn first(self) -> u32 {
        self.address.to_bits()
    }
    /// The last address.
    #[must_use]
    pub fn last(self) -> u32 {
        self.first() | u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0)
    }
    /// Length of the prefix.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }
    /// The address, if it is a single one.
    #[must_use]
    pub fn single(self) -> Option<Ipv4Addr> {
        (self.prefix == 32).then_some(self.address)
    }
    /// Whether the two share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first() <= other.last() && other.first() <= self.last()
    }
    /// Whether all of another lies inside.
    #[must_use]
    pub fn holds(self, other: Self) -> bool {
        self.first() <= other.first() && other.last() <= self.last()
    }
    /// Whether the address lies inside.
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
            NameError("a network is written with its first address and a prefix of at most 32".to_owned())
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

/// Where a flow leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// The instances of an app: the own tenant's, or another's that has granted it.
    App {
        /// Its tenant.
        tenant: TenantName,
        /// Its identity: another app of the same name is not meant.
        app: AppId,
    },
    /// An endpoint of a platform service. A single one may lie in a private range.
    Service {
        /// Its addresses.
        network: Cidr,
    },
    /// The outside, as approved.
    Outside {
        /// Its addresses.
        network: Cidr,
    },
    /// The outside under a name: the addresses that are found for it, while they are good.
    Domain {
        /// The name.
        domain: DomainName,
    },
}

/// What one app may begin to talk to, and how.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// What the app calls it in its own spec: `api`, `other/api`, `kafka`.
    pub name: String,
    /// Where to.
    pub target: Target,
    /// Protocol.
    pub protocol: Protocol,
    /// Port there.
    pub port: u16,
    /// When it ends by itself, in seconds since 1970: held where it is applied, whoever else is there or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}

/// Everything that the apps of one tenant may begin to talk to: what is not here is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantFlows {
    /// Tenant.
    pub tenant: TenantName,
    /// Number of the plan: a lower one than seen is refused.
    pub plan: i64,
    /// By app.
    pub apps: Vec<AppFlows>,
    /// Until when what they send outside is let through and written down, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trial_until: Option<i64>,
    /// Of the flows of its apps those that are about to close: their packets are counted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub watched: Vec<AppFlows>,
}

/// The flows of one app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppFlows {
    /// App.
    pub app: AppId,
    /// Its flows.
    pub flows: Vec<Flow>,
}

/// A packet that stands for a fault: whoever reads it can try it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// Number of the bridge that it comes from.
    pub network: u32,
    /// Source.
    pub source: Ipv4Addr,
    /// Target.
    pub target: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the target.
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
