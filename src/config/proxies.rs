//! Networks of trusted proxies, whose `X-Forwarded-For` header counts.

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network in CIDR notation, such as `10.0.0.0/8` or `fd00::/8`. A bare address is a network of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProxyNetwork {
    address: IpAddr,
    prefix: u8,
}

impl ProxyNetwork {
    /// Returns whether an address is in the network.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let shift = 32 - u32::from(self.prefix);
                u32::from(own).checked_shr(shift) == u32::from(other).checked_shr(shift)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let shift = 128 - u32::from(self.prefix);
                u128::from(own).checked_shr(shift) == u128::from(other).checked_shr(shift)
            }
            _ => false,
        }
    }
}

impl FromStr for ProxyNetwork {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not a network: write it as 10.0.0.0/8, fd00::/8 or 192.0.2.7");
        let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(most), |prefix| prefix.parse().map_err(|_| wrong()))?;
        if prefix > most {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }
}

impl TryFrom<String> for ProxyNetwork {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ProxyNetwork> for String {
    fn from(cidr: ProxyNetwork) -> Self {
        format!("{}/{}", cidr.address, cidr.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_hold_their_addresses() {
        let holds =
            |cidr: &str, ip: &str| cidr.parse::<ProxyNetwork>().unwrap().contains(ip.parse().unwrap());
        assert!(holds("10.0.0.0/8", "10.9.8.7") && !holds("10.0.0.0/8", "11.0.0.1"));
        assert!(holds("192.0.2.7", "192.0.2.7") && !holds("192.0.2.7", "192.0.2.6"));
        assert!(holds("0.0.0.0/0", "203.0.113.9") && !holds("0.0.0.0/0", "fd00::1"));
        assert!(holds("fd00::/8", "fdff::1") && !holds("fd00::/8", "2001:db8::1"));
        assert!(holds("127.0.0.0/8", "::ffff:127.0.0.1"));
        for wrong in ["10.0.0.0/33", "fd00::/129", "x", "10.0.0/8", "10.0.0.0/", "10.0.0.0/-1"] {
            assert!(wrong.parse::<ProxyNetwork>().is_err(), "{wrong}");
        }
    }
}
