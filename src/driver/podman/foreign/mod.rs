//! Other firewalls on the machine: whether their rules allow an app's packets. The rules are followed as the kernel
//! follows them, for a few packets that every app sends. A default zone of firewalld ends in a reject under a
//! policy of accept, so the policies alone are not enough.

use serde_json::Value;

/// Maximum depth of jumps; the kernel itself stops at 16.
const DEPTH: usize = 32;

/// A packet of an app, with the properties that other firewalls may match.
#[derive(Debug, Clone, Copy)]
struct AppPacket {
    words: &'static str,
    hook: &'static str,
    incoming: &'static str,
    outgoing: &'static str,
    protocol: &'static str,
    port: u64,
    state: &'static str,
}

/// The bridges of tenants are named `bk`, the installation's letters, and a number.
const BRIDGE: &str = "bkaaaa1";
const OTHER_BRIDGE: &str = "bkaaaa2";
/// No rule names this interface: it stands for the outside.
const OUTSIDE: &str = "outside0";

const fn forwarded(
    words: &'static str,
    incoming: &'static str,
    outgoing: &'static str,
    state: &'static str,
) -> AppPacket {
    AppPacket { words, hook: "forward", incoming, outgoing, protocol: "tcp", port: 8080, state }
}

const fn names(words: &'static str, protocol: &'static str) -> AppPacket {
    AppPacket { words, hook: "input", incoming: BRIDGE, outgoing: "", protocol, port: 53, state: "new" }
}

const PACKETS: [AppPacket; 5] = [
    forwarded("traffic between apps", BRIDGE, OTHER_BRIDGE, "new"),
    forwarded("traffic of apps to services and egress targets", BRIDGE, OUTSIDE, "new"),
    forwarded("answers to apps from services and egress targets", OUTSIDE, BRIDGE, "established"),
    names("DNS queries over UDP", "udp"),
    names("DNS queries over TCP", "tcp"),
];

/// Author of the rules. The suggested remedy depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Author {
    /// firewalld.
    Firewalld,
    /// ufw.
    Ufw,
    /// Docker.
    Docker,
    /// Rules written by hand or by an unknown program.
    Other,
}

/// A chain that stops packets of apps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockingChain {
    /// Family, table and chain.
    pub chain: String,
    /// Traffic that it stops.
    pub stops: Vec<&'static str>,
    /// Author of its rules.
    pub author: Author,
}

/// Effect of a rule or a chain on a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PacketVerdict {
    Accept,
    Drop,
    /// Return to the calling chain.
    Return,
    /// No verdict: continue with the next rule.
    Continue,
}

/// Whether a rule matches a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fits {
    Yes,
    No,
    /// Depends on data that is unknown here, such as an address.
    Perhaps,
}

struct ForeignRules {
    chains: Vec<Value>,
    rules: Vec<Value>,
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Returns the chains that stop packets of apps, from the output of `nft -j list ruleset` (or of several tables,
/// one after another).
#[must_use]
pub fn walls<'a>(listings: impl IntoIterator<Item = &'a [u8]>) -> Vec<BlockingChain> {
    let mut all = ForeignRules { chains: Vec::new(), rules: Vec::new() };
    for json in listings {
        let value: Value = serde_json::from_slice(json).unwrap_or_default();
        for part in value["nftables"].as_array().into_iter().flatten() {
            let own = |part: &Value| text(part, "table").starts_with("bulkhead_");
            if part["chain"].is_object() && !own(&part["chain"]) {
                all.chains.push(part["chain"].clone());
            } else if part["rule"].is_object() && !own(&part["rule"]) {
                all.rules.push(part["rule"].clone());
            }
        }
    }
    let based = all.chains.iter().filter(|chain| ["ip", "inet", "bridge"].contains(&text(chain, "family")));
    based.filter_map(|chain| all.wall(chain)).collect()
}

impl ForeignRules {
    fn wall(&self, chain: &Value) -> Option<BlockingChain> {
        let hook = chain["hook"].as_str()?;
        // Packets between two bridges are not bridged: a table of family `bridge` applies to one tenant's
        // apps only.
        let bridged = text(chain, "family") == "bridge";
        let stops: Vec<&str> = PACKETS
            .iter()
            .filter(|packet| packet.hook == hook && !(bridged && packet.outgoing != OTHER_BRIDGE))
            .filter(|packet| match self.follow(chain, packet, 0) {
                PacketVerdict::Accept => false,
                PacketVerdict::Drop => true,
                PacketVerdict::Return | PacketVerdict::Continue => chain["policy"] == "drop",
            })
            .map(|packet| packet.words)
            .collect();
        if stops.is_empty() {
            return None;
        }
        let (family, table) = (text(chain, "family"), text(chain, "table"));
        let chain = format!("{family} {table} {}", text(chain, "name"));
        Some(BlockingChain { chain, stops, author: self.author(family, table) })
    }

    fn author(&self, family: &str, table: &str) -> Author {
        let within = |chain: &&Value| text(chain, "family") == family && text(chain, "table") == table;
        let has =
            |prefix: &str| self.chains.iter().filter(within).any(|c| text(c, "name").starts_with(prefix));
        match table {
            "firewalld" => Author::Firewalld,
            _ if has("ufw-") => Author::Ufw,
            _ if has("DOCKER") => Author::Docker,
            _ => Author::Other,
        }
    }

    fn follow(&self, chain: &Value, packet: &AppPacket, depth: usize) -> PacketVerdict {
        if depth > DEPTH {
            return PacketVerdict::Continue;
        }
        let own = self.rules.iter().filter(|rule| {
            ["family", "table"].iter().all(|key| rule[key] == chain[key]) && rule["chain"] == chain["name"]
        });
        for rule in own {
            match self.decide(rule, packet, depth) {
                PacketVerdict::Continue => {}
                verdict => return verdict,
            }
        }
        PacketVerdict::Continue
    }

    fn decide(&self, rule: &Value, packet: &AppPacket, depth: usize) -> PacketVerdict {
        let mut fits = Fits::Yes;
        for part in rule["expr"].as_array().into_iter().flatten() {
            match fits_one(part, packet) {
                Fits::No => return PacketVerdict::Continue,
                Fits::Perhaps => fits = Fits::Perhaps,
                Fits::Yes => {}
            }
            let Some(word) = verdict_of(part, packet) else { continue };
            let verdict = self.carry_out(rule, &word, packet, depth);
            // A rule that may not match this packet decides nothing for certain. `nft` cannot print the
            // conditions of iptables on a connection or an address. Two kinds of rules are therefore assumed
            // to match: those that accept replies, and those that return for packets to the machine itself
            // (ufw).
            let sure = match verdict {
                _ if fits == Fits::Yes => true,
                PacketVerdict::Accept => packet.state == "established",
                PacketVerdict::Return => packet.hook == "input" && asks_of_address(rule),
                PacketVerdict::Drop | PacketVerdict::Continue => false,
            };
            return if sure { verdict } else { PacketVerdict::Continue };
        }
        PacketVerdict::Continue
    }

    fn carry_out(&self, rule: &Value, word: &Value, packet: &AppPacket, depth: usize) -> PacketVerdict {
        let target = |part: &Value| {
            self.chains.iter().find(|chain| {
                ["family", "table"].iter().all(|key| rule[key] == chain[key])
                    && chain["name"] == part["target"]
            })
        };
        let Some((kind, part)) = word.as_object().and_then(|object| object.iter().next()) else {
            return PacketVerdict::Continue;
        };
        match kind.as_str() {
            "accept" => PacketVerdict::Accept,
            "drop" | "reject" => PacketVerdict::Drop,
            "return" => PacketVerdict::Return,
            "jump" => match target(part).map(|chain| self.follow(chain, packet, depth + 1)) {
                Some(PacketVerdict::Return) | None => PacketVerdict::Continue,
                Some(verdict) => verdict,
            },
            // A chain that was entered by goto does not return: its end is the end of the calling chain.
            "goto" => match target(part).map(|chain| self.follow(chain, packet, depth + 1)) {
                Some(PacketVerdict::Continue) => PacketVerdict::Return,
                Some(verdict) => verdict,
                None => PacketVerdict::Continue,
            },
            _ => PacketVerdict::Continue,
        }
    }
}

fn asks_of_address(rule: &Value) -> bool {
    rule["expr"].as_array().into_iter().flatten().any(|part| part["xt"]["name"] == "addrtype")
}

/// Returns the verdict that an expression is, or selects for a packet.
fn verdict_of(part: &Value, packet: &AppPacket) -> Option<Value> {
    let object = part.as_object()?;
    if let Some(map) = object.get("vmap") {
        let pairs = map["data"]["set"].as_array()?;
        let chosen = pairs.iter().find(|pair| compare(&map["key"], &pair[0], packet) == Fits::Yes);
        return chosen.map(|pair| pair[1].clone());
    }
    if let Some(extension) = object.get("xt") {
        let refuses = extension["type"] == "target" && extension["name"] == "REJECT";
        return refuses.then(|| serde_json::json!({"reject": null}));
    }
    ["accept", "drop", "reject", "return", "jump", "goto"]
        .iter()
        .find(|kind| object.contains_key(**kind))
        .map(|_| part.clone())
}

fn fits_one(part: &Value, packet: &AppPacket) -> Fits {
    if let Some(matched) = part.get("match") {
        let fits = compare(&matched["left"], &matched["right"], packet);
        return match (text(matched, "op"), fits) {
            ("!=", Fits::Yes) => Fits::No,
            ("!=", Fits::No) => Fits::Yes,
            ("<" | ">" | "<=" | ">=", _) => Fits::Perhaps,
            (_, fits) => fits,
        };
    }
    let extension = part.get("xt").is_some_and(|xt| xt["type"] == "match");
    if extension || part.get("limit").is_some() || part.get("quota").is_some() {
        return Fits::Perhaps;
    }
    Fits::Yes
}

/// Returns the packet's value for the left side of a match; none when it is unknown.
fn seen(left: &Value, packet: &AppPacket) -> Option<Value> {
    if let Some(key) = left["meta"]["key"].as_str() {
        return match key {
            "iifname" | "iif" => Some(packet.incoming.into()),
            "oifname" | "oif" => Some(packet.outgoing.into()),
            "ibrname" | "obrname" => Some(BRIDGE.into()),
            "l4proto" => Some(packet.protocol.into()),
            "nfproto" => Some("ipv4".into()),
            "protocol" => Some("ip".into()),
            _ => None,
        };
    }
    if let Some(key) = left["ct"]["key"].as_str() {
        return match key {
            "state" => Some(packet.state.into()),
            // No port is forwarded to an app.
            "status" => Some("confirmed".into()),
            _ => None,
        };
    }
    if left["fib"]["result"] == "type" && left["fib"]["flags"] == "daddr" {
        return Some(if packet.hook == "input" { "local" } else { "unicast" }.into());
    }
    let field = &left["payload"];
    match (text(field, "protocol"), text(field, "field")) {
        ("ip", "protocol") => Some(packet.protocol.into()),
        ("ip6" | "icmp" | "icmpv6" | "igmp" | "esp" | "ah" | "sctp", _) => Some(Value::Null),
        (protocol @ ("tcp" | "udp" | "th"), field) => {
            if protocol != "th" && protocol != packet.protocol {
                return Some(Value::Null);
            }
            (field == "dport").then(|| packet.port.into())
        }
        _ => None,
    }
}

fn compare(left: &Value, right: &Value, packet: &AppPacket) -> Fits {
    let Some(seen) = seen(left, packet) else { return Fits::Perhaps };
    // The packet is not of that protocol at all.
    if seen.is_null() {
        return Fits::No;
    }
    holds(&seen, right)
}

fn holds(seen: &Value, right: &Value) -> Fits {
    let among = |list: &Vec<Value>| {
        let each: Vec<Fits> = list.iter().map(|one| holds(seen, one)).collect();
        if each.contains(&Fits::Yes) {
            Fits::Yes
        } else if each.contains(&Fits::Perhaps) {
            Fits::Perhaps
        } else {
            Fits::No
        }
    };
    match right {
        Value::Array(list) => among(list),
        Value::Object(object) => match (object.get("set"), object.get("range")) {
            (Some(Value::Array(list)), _) => among(list),
            (_, Some(range)) => match (seen.as_u64(), range[0].as_u64(), range[1].as_u64()) {
                (Some(seen), Some(from), Some(to)) => yes((from..=to).contains(&seen)),
                _ => Fits::Perhaps,
            },
            _ => Fits::Perhaps,
        },
        // A named set.
        Value::String(name) if name.starts_with('@') => Fits::Perhaps,
        Value::String(name) => match (name.strip_suffix('*'), seen.as_str()) {
            // Bridges of one installation by name: this packet stands for them too.
            (_, Some(BRIDGE | OTHER_BRIDGE)) if name.starts_with("bk") => Fits::Yes,
            (Some(start), Some(seen)) => yes(seen.starts_with(start)),
            (None, Some(seen)) => yes(seen == name),
            // A service name, where the packet has a number.
            _ => yes(name == "domain" && seen.as_u64() == Some(53)),
        },
        _ => yes(seen == right),
    }
}

const fn yes(holds: bool) -> Fits {
    if holds { Fits::Yes } else { Fits::No }
}

#[cfg(test)]
mod tests;
