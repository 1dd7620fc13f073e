//! Parses the nftables text that will be applied: a whole table, or a change of its sets. The parser knows
//! one shape. That shape is written here a second time, deliberately apart from the code that prints it. A
//! text that differs from the shape in one character cannot be verified and is rejected.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use rustc_hash::FxHashSet;

use super::shape::SHAPE;
use super::{Cidr, Protocol};

/// The parts of the table's shape that differ between installations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    /// Name of the table.
    pub table: String,
    /// Prefix of the bridges' names; a number follows.
    pub prefix: String,
    /// User id of the prober, the only process of the host that may open connections to instances.
    pub prober: u32,
    /// The pool of tenants' subnets.
    pub pool: Cidr,
    /// New connections per second that the apps of a tenant may open.
    pub pace: u32,
}

impl Shell {
    /// Returns the burst: the number of connections that may be opened at once.
    #[must_use]
    pub fn burst(&self) -> u32 {
        self.pace.saturating_mul(5)
    }
}

/// An element of a set: which source may open connections to which destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Number of the network on which the packet arrives.
    pub network: u32,
    /// Source address.
    pub source: u32,
    /// First destination address.
    pub first: u32,
    /// Last destination address.
    pub last: u32,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

/// A set of rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Between instances.
    Pairs,
    /// To single addresses of services. Checked before the reserved ranges.
    Services,
    /// To ranges. Checked after the reserved ranges.
    Outside,
    /// To addresses of domains, each with a timeout. Checked after the reserved ranges.
    Resolved,
    /// Flows whose packets are counted. It allows nothing.
    Watched,
}

impl Set {
    /// Returns the set's name in the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pairs => "pairs",
            Self::Services => "services",
            Self::Outside => "outside",
            Self::Resolved => "resolved",
            Self::Watched => "watched",
        }
    }
}

/// The sets of a table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Network and address of each instance.
    pub sources: FxHashSet<(u32, u32)>,
    /// Between instances.
    pub pairs: FxHashSet<Rule>,
    /// To single addresses of services.
    pub services: FxHashSet<Rule>,
    /// To ranges.
    pub outside: FxHashSet<Rule>,
    /// To addresses of domains. An element may have expired since: this is an upper bound.
    pub resolved: FxHashSet<Rule>,
    /// Flows whose packets are counted.
    pub watched: FxHashSet<Rule>,
    /// Networks in audit mode: their egress is allowed and recorded.
    pub trial: FxHashSet<u32>,
    /// Network and address of each bridge, which accepts DNS queries.
    pub gateways: FxHashSet<(u32, u32)>,
    /// Reserved and blocked ranges: first and last addresses.
    pub never: BTreeSet<(u32, u32)>,
}

impl Table {
    /// Returns a set of rules.
    #[must_use]
    pub fn set(&self, set: Set) -> &FxHashSet<Rule> {
        match set {
            Set::Pairs => &self.pairs,
            Set::Services => &self.services,
            Set::Outside => &self.outside,
            Set::Resolved => &self.resolved,
            Set::Watched => &self.watched,
        }
    }

    fn set_mut(&mut self, set: Set) -> &mut FxHashSet<Rule> {
        match set {
            Set::Pairs => &mut self.pairs,
            Set::Services => &mut self.services,
            Set::Outside => &mut self.outside,
            Set::Resolved => &mut self.resolved,
            Set::Watched => &mut self.watched,
        }
    }
}

/// Why a text cannot be parsed: the line, counted from one, and the fault on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct Unreadable {
    /// Line.
    pub line: usize,
    /// The fault.
    pub why: &'static str,
}

fn filled(line: &str, shell: &Shell) -> String {
    let words: Vec<String> = line
        .split(' ')
        .map(|word| match word {
            "T" => shell.table.clone(),
            "B" => format!("\"{}*\"", shell.prefix),
            "U" => shell.prober.to_string(),
            "P" => shell.pool.to_string(),
            "R/second" => format!("{}/second", shell.pace),
            "S" => shell.burst().to_string(),
            word => word.to_owned(),
        })
        .collect();
    words.join(" ")
}

/// Parses a whole table.
pub fn table(text: &str, shell: &Shell) -> Result<Table, Unreadable> {
    let mut out = Table::default();
    let mut lines = text.split('\n').enumerate().peekable();
    for expected in SHAPE.split('\n') {
        let at = lines.peek().map_or(0, |(n, _)| n + 1);
        let fail = |why| Err(Unreadable { line: at, why });
        if let Some(set) = expected.strip_prefix('=') {
            let elements = lines.peek().and_then(|(_, line)| line.strip_prefix("    elements = { "));
            if let Some(elements) = elements {
                let Some(elements) = elements.strip_suffix(" }") else {
                    return fail("the list of elements is not closed");
                };
                fill(&mut out, set, elements, shell).map_err(|why| Unreadable { line: at, why })?;
                lines.next();
            }
            continue;
        }
        match lines.next() {
            Some((_, line)) if line == filled(expected, shell) => {}
            Some(_) => return fail("the line differs from the expected shape"),
            None => return fail("the table ends before the expected shape does"),
        }
    }
    match lines.next() {
        None => Ok(out),
        Some((n, _)) => Err(Unreadable { line: n + 1, why: "there is text after the table" }),
    }
}

fn fill(out: &mut Table, set: &str, elements: &str, shell: &Shell) -> Result<(), &'static str> {
    const TWICE: &str = "an element is listed twice";
    for element in elements.split(", ") {
        let fresh = match set {
            "sources" => out.sources.insert(sender(element, shell)?),
            "gateways" => out.gateways.insert(source(element, shell)?),
            "trial" => out.trial.insert(network(element, shell)?),
            // Adding an element again renews its timeout.
            "resolved" => {
                out.resolved.insert(rule(timed(element)?, Set::Resolved, shell)?);
                true
            }
            "never" => {
                let network: Cidr = element.parse().map_err(|_| "not a network")?;
                out.never.insert((network.first(), network.last()))
            }
            _ => {
                let set = named(set)?;
                out.set_mut(set).insert(rule(element, set, shell)?)
            }
        };
        if !fresh {
            return Err(TWICE);
        }
    }
    Ok(())
}

/// Maximum timeout of a domain's element, in seconds.
const LONGEST: u32 = 8 * 3600;

/// Returns an element without its timeout. The timeout is mandatory.
fn timed(element: &str) -> Result<&str, &'static str> {
    let (element, time) = element.split_once(" timeout ").ok_or("a domain's element has no timeout")?;
    let seconds = time.strip_suffix('s').and_then(number).ok_or("not a timeout in seconds")?;
    if (1..=LONGEST).contains(&seconds) { Ok(element) } else { Err("the timeout is zero or over 8 hours") }
}

fn named(set: &str) -> Result<Set, &'static str> {
    [Set::Pairs, Set::Services, Set::Outside, Set::Resolved, Set::Watched]
        .into_iter()
        .find(|known| known.name() == set)
        .ok_or("there is no such set of rules")
}

fn number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit());
    let value = text.parse().ok().filter(|_| plain)?;
    // Only one spelling of a number: else two names would mean the same bridge.
    (text.len() == 1 || !text.starts_with('0')).then_some(value)
}

fn network(text: &str, shell: &Shell) -> Result<u32, &'static str> {
    text.strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .and_then(|text| text.strip_prefix(shell.prefix.as_str()))
        .and_then(number)
        .ok_or("not a bridge of this installation")
}

fn address(text: &str) -> Result<u32, &'static str> {
    text.parse::<Ipv4Addr>().map(Ipv4Addr::to_bits).map_err(|_| "not an address")
}

fn source(element: &str, shell: &Shell) -> Result<(u32, u32), &'static str> {
    let (bridge, own) = element.split_once(" . ").ok_or("an element has too few parts")?;
    Ok((network(bridge, shell)?, address(own)?))
}

/// Parses a source. Its MAC address must be the one derived from its IP address: `0a:58` and the four bytes.
fn sender(element: &str, shell: &Shell) -> Result<(u32, u32), &'static str> {
    let (bridge, rest) = element.split_once(" . ").ok_or("an element has too few parts")?;
    let (card, own) = rest.split_once(" . ").ok_or("an element has too few parts")?;
    let own = address(own)?;
    let byte = |part: &str| {
        let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        u8::from_str_radix(part, 16).ok().filter(|_| plain)
    };
    let bytes: Option<Vec<u8>> = card.split(':').map(byte).collect();
    let [a, b, c, d] = own.to_be_bytes();
    if bytes.is_none_or(|bytes| bytes != [0x0a, 0x58, a, b, c, d]) {
        return Err("the MAC address does not match the IP address");
    }
    Ok((network(bridge, shell)?, own))
}

fn rule(element: &str, set: Set, shell: &Shell) -> Result<Rule, &'static str> {
    let mut parts = element.split(" . ");
    let mut part = || parts.next().ok_or("an element has too few parts");
    let (bridge, own, target, protocol, port) = (part()?, part()?, part()?, part()?, part()?);
    if parts.next().is_some() {
        return Err("an element has too many parts");
    }
    let (first, last) = if matches!(set, Set::Outside | Set::Watched) {
        let target: Cidr = target.parse().map_err(|_| "not a network")?;
        (target.first(), target.last())
    } else {
        let target = address(target)?;
        (target, target)
    };
    Ok(Rule {
        network: network(bridge, shell)?,
        source: address(own)?,
        first,
        last,
        protocol: Protocol::parse(protocol).ok_or("the protocol is neither tcp nor udp")?,
        port: number(port)
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port > 0)
            .ok_or("not a port")?,
    })
}

/// Parses a change, one `add element` or `delete element` a line. Returns the table after the change.
pub fn change(text: &str, before: &Table, shell: &Shell) -> Result<Table, Unreadable> {
    let mut out = before.clone();
    for (n, line) in text.lines().enumerate() {
        edit(&mut out, line, shell).map_err(|why| Unreadable { line: n + 1, why })?;
    }
    Ok(out)
}

fn edit(out: &mut Table, line: &str, shell: &Shell) -> Result<(), &'static str> {
    let (verb, rest) =
        line.split_once(" element inet ").ok_or("neither `add element` nor `delete element`")?;
    let rest = rest
        .strip_prefix(shell.table.as_str())
        .and_then(|rest| rest.strip_prefix(' '))
        .ok_or("the change is for another table")?;
    let (set, elements) = rest.split_once(" { ").ok_or("the change has no elements")?;
    let elements = elements.strip_suffix(" }").ok_or("the list of elements is not closed")?;
    // The reserved ranges change only with the whole table.
    if set == "never" {
        return Err("reserved ranges change only with the whole table");
    }
    if verb == "add" {
        return fill(out, set, elements, shell);
    }
    if verb != "delete" {
        return Err("neither `add element` nor `delete element`");
    }
    for element in elements.split(", ") {
        let was = if set == "sources" {
            out.sources.remove(&sender(element, shell)?)
        } else if set == "trial" {
            out.trial.remove(&network(element, shell)?)
        } else if set == "gateways" {
            out.gateways.remove(&source(element, shell)?)
        } else {
            let set = named(set)?;
            out.set_mut(set).remove(&rule(element, set, shell)?)
        };
        if !was {
            return Err("the change deletes an element that is not in the set");
        }
    }
    Ok(())
}
