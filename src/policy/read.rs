//! Reads the nftables text that will be applied: the whole table, or a change of its sets. It knows one
//! shape, written down here a second time and on purpose apart from what prints it; what does not have
//! that shape to the letter cannot be proven and is refused.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use rustc_hash::FxHashSet;

use super::shape::SHAPE;
use super::{Cidr, Protocol};

/// What of the table's shape differs between installations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    /// Name of the table.
    pub table: String,
    /// What the names of the bridges begin with; a number follows.
    pub prefix: String,
    /// User id of the one process of the host that may begin to talk to instances.
    pub prober: u32,
    /// The pool of tenants' subnets.
    pub pool: Cidr,
    /// How many connections the apps of a tenant may begin in a second.
    pub pace: u32,
}

impl Shell {
    /// How many of them at once.
    #[must_use]
    pub fn burst(&self) -> u32 {
        self.pace.saturating_mul(5)
    }
}

/// Who may begin to talk to whom: one element of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Number of the network that it comes from.
    pub network: u32,
    /// Source address.
    pub source: u32,
    /// First address of the target.
    pub first: u32,
    /// Last address of the target.
    pub last: u32,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the target.
    pub port: u16,
}

/// A set of rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Between instances.
    Pairs,
    /// To single addresses of services; looked at before what nobody reaches.
    Services,
    /// To ranges; looked at after it.
    Outside,
    /// To addresses of domains, each for a while; looked at after it too.
    Resolved,
    /// What is counted. It opens nothing.
    Watched,
}

impl Set {
    /// Its name in the table.
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
    /// To addresses of domains. An element may have ended in the meantime: what is here is at most open.
    pub resolved: FxHashSet<Rule>,
    /// What is counted.
    pub watched: FxHashSet<Rule>,
    /// Networks whose packets outside are let through and written down.
    pub trial: FxHashSet<u32>,
    /// Network and address of each bridge, where names are asked for.
    pub gateways: FxHashSet<(u32, u32)>,
    /// What nobody reaches: first and last addresses.
    pub never: BTreeSet<(u32, u32)>,
}

impl Table {
    /// A set of rules.
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

/// Why a text cannot be read: the line, counted from one, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct Unreadable {
    /// Line.
    pub line: usize,
    /// What is wrong.
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

/// Reads a whole table.
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
                    return fail("elements without an end");
                };
                fill(&mut out, set, elements, shell).map_err(|why| Unreadable { line: at, why })?;
                lines.next();
            }
            continue;
        }
        match lines.next() {
            Some((_, line)) if line == filled(expected, shell) => {}
            Some(_) => return fail("this is not a line that can be proven"),
            None => return fail("the table ends too early"),
        }
    }
    match lines.next() {
        None => Ok(out),
        Some((n, _)) => Err(Unreadable { line: n + 1, why: "something follows the table" }),
    }
}

fn fill(out: &mut Table, set: &str, elements: &str, shell: &Shell) -> Result<(), &'static str> {
    const TWICE: &str = "an element stands twice";
    for element in elements.split(", ") {
        let fresh = match set {
            "sources" => out.sources.insert(sender(element, shell)?),
            "gateways" => out.gateways.insert(source(element, shell)?),
            "trial" => out.trial.insert(network(element, shell)?),
            // Put in again, an element gets a new time.
            "resolved" => {
                out.resolved.insert(rule(timed(element)?, Set::Resolved, shell)?);
                true
            }
            "never" => {
                let network: Cidr = element.parse().map_err(|_| "no network")?;
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

/// The longest that an element of a domain stays, in seconds.
const LONGEST: u32 = 8 * 3600;

/// An element without the time that it stays, which must be there.
fn timed(element: &str) -> Result<&str, &'static str> {
    let (element, time) = element.split_once(" timeout ").ok_or("an element of a domain has no end")?;
    let seconds = time.strip_suffix('s').and_then(number).ok_or("no time")?;
    if (1..=LONGEST).contains(&seconds) { Ok(element) } else { Err("a time that is too long") }
}

fn named(set: &str) -> Result<Set, &'static str> {
    [Set::Pairs, Set::Services, Set::Outside, Set::Resolved, Set::Watched]
        .into_iter()
        .find(|known| known.name() == set)
        .ok_or("no set of rules")
}

fn number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit());
    let value = text.parse().ok().filter(|_| plain)?;
    // One way to write a number: else two names would be one bridge.
    (text.len() == 1 || !text.starts_with('0')).then_some(value)
}

fn network(text: &str, shell: &Shell) -> Result<u32, &'static str> {
    text.strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .and_then(|text| text.strip_prefix(shell.prefix.as_str()))
        .and_then(number)
        .ok_or("no bridge of this installation")
}

fn address(text: &str) -> Result<u32, &'static str> {
    text.parse::<Ipv4Addr>().map(Ipv4Addr::to_bits).map_err(|_| "no address")
}

fn source(element: &str, shell: &Shell) -> Result<(u32, u32), &'static str> {
    let (bridge, own) = element.split_once(" . ").ok_or("an element has too few parts")?;
    Ok((network(bridge, shell)?, address(own)?))
}

/// Whoever sends from an address sends from the card that belongs to it: `0a:58` and the address.
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
        return Err("the card is not the one of the address");
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
        let target: Cidr = target.parse().map_err(|_| "no network")?;
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
        protocol: Protocol::parse(protocol).ok_or("no protocol that is known")?,
        port: number(port)
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port > 0)
            .ok_or("no port")?,
    })
}

/// Reads a change, a line each `add element` or `delete element`, and says what the table is after it.
pub fn change(text: &str, before: &Table, shell: &Shell) -> Result<Table, Unreadable> {
    let mut out = before.clone();
    for (n, line) in text.lines().enumerate() {
        edit(&mut out, line, shell).map_err(|why| Unreadable { line: n + 1, why })?;
    }
    Ok(out)
}

fn edit(out: &mut Table, line: &str, shell: &Shell) -> Result<(), &'static str> {
    let (verb, rest) = line.split_once(" element inet ").ok_or("no change of elements")?;
    let rest = rest
        .strip_prefix(shell.table.as_str())
        .and_then(|rest| rest.strip_prefix(' '))
        .ok_or("another table")?;
    let (set, elements) = rest.split_once(" { ").ok_or("no elements")?;
    let elements = elements.strip_suffix(" }").ok_or("elements without an end")?;
    // What nobody reaches is part of the wall and changes with the whole table alone.
    if set == "never" {
        return Err("what nobody reaches is not changed like this");
    }
    if verb == "add" {
        return fill(out, set, elements, shell);
    }
    if verb != "delete" {
        return Err("no change of elements");
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
            return Err("an element is taken away that is not there");
        }
    }
    Ok(())
}
