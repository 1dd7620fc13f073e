//! The table in the kernel: applies the verified text, reads the current state and the denied packets, and ends
//! connections whose rule is gone.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::{Allowed, Rules};
use crate::driver::Error;
use crate::policy::proof::Proven;
use crate::policy::read::Set;
use crate::policy::{Cidr, Protocol};

/// Time limit of a program; other work on the table waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// Applies a verified text: entirely, or not at all.
pub async fn apply(proven: &Proven) -> Result<(), Error> {
    let failed = |why: String| Error::Transient(why);
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(pid) = child.id() {
        super::watch::note_own(pid);
    }
    let input = child.stdin.take();
    let load = async {
        if let Some(mut input) = input {
            input.write_all(proven.text().as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let done = tokio::time::timeout(PATIENCE, load)
        .await
        .map_err(|_| failed("nft did not finish in time".into()))?
        .map_err(|error| failed(error.to_string()))?;
    if done.status.success() {
        return Ok(());
    }
    let words: String = String::from_utf8_lossy(&done.stderr).chars().take(2000).collect();
    tracing::error!(words, "nft refused the firewall table");
    Err(failed("the firewall table cannot be loaded".into()))
}

async fn nft(args: &[&str]) -> Option<String> {
    said("nft", args).await.filter(|done| done.status.success()).map(text)
}

/// Returns the output of a program within the time limit; none when it does not finish.
async fn said(program: &str, args: &[&str]) -> Option<Output> {
    let run = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    if let Ok(done) = tokio::time::timeout(PATIENCE, run).await {
        return done.ok();
    }
    tracing::warn!(program, "a program did not finish in time");
    None
}

fn text(done: Output) -> String {
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Returns the table's chains and the heads of its sets, as the kernel has them; none when the table does not
/// exist.
pub async fn shape(table: &str) -> Option<String> {
    nft(&["-st", "list", "table", "inet", table]).await
}

/// Whether the table's sets hold exactly the elements of these rules.
pub async fn holds(rules: &Rules) -> bool {
    let Some(text) = nft(&["-s", "list", "table", "inet", &rules.shell.table]).await else { return false };
    let never: BTreeSet<String> = rules.never.iter().map(ToString::to_string).collect();
    let elements = rules.elements();
    elements
        .iter()
        .map(|(set, wanted)| (*set, wanted))
        .chain([("never", &never)])
        .all(|(set, wanted)| listed(&text, set) == *wanted)
}

/// Returns the elements of a set in a listing.
fn listed(text: &str, set: &str) -> BTreeSet<String> {
    let body = text
        .split_once(&format!("\tset {set} {{\n"))
        .and_then(|(_, rest)| rest.split_once("\n\t}"))
        .map_or("", |(body, _)| body);
    let elements = body.split_once("elements = {").map_or("", |(_, elements)| elements);
    elements
        .trim_end()
        .trim_end_matches('}')
        .split(',')
        // Only the presence of a counter is compared here, not its value.
        .map(|element| element.trim().trim_end_matches(" counter").to_owned())
        .filter(|element| !element.is_empty())
        .collect()
}

/// Deletes the table, when the installation is removed.
pub async fn remove(table: &str) {
    let _ = nft(&["delete", "table", "inet", table]).await;
}

/// Packets of the last minute that were denied or rate limited, or allowed only in audit mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeniedPackets {
    /// Name of the source bridge.
    pub bridge: String,
    /// Source address in the packet.
    pub source: Ipv4Addr,
    /// Target.
    pub target: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the target.
    pub port: u16,
    /// Seconds since the last packet.
    pub ago: u64,
    /// Whether they were allowed in audit mode.
    pub let_through: bool,
    /// Whether the flow is allowed but they were rate limited.
    pub hasty: bool,
}

/// How long the kernel keeps a denied packet, in seconds.
const KEPT: u64 = 60;

/// Returns the recently denied packets, and those that audit mode allowed.
pub async fn denied(table: &str) -> Vec<DeniedPackets> {
    let mut all = list(table, "denied").await;
    let seen = list(table, "seen").await.into_iter();
    all.extend(seen.map(|refusal| DeniedPackets { let_through: true, ..refusal }));
    let hasty = list(table, "hasty").await.into_iter();
    all.extend(hasty.map(|refusal| DeniedPackets { hasty: true, ..refusal }));
    all
}

/// Whether apps on a bridge were rate limited within the last ten seconds.
pub async fn is_hurried(table: &str, bridge: &str) -> bool {
    let own = |element: &Value| element.get("elem").unwrap_or(element)["val"].as_str() == Some(bridge);
    elements(table, "hurried").await.iter().any(own)
}

async fn list(table: &str, set: &str) -> Vec<DeniedPackets> {
    elements(table, set).await.iter().filter_map(refusal).collect()
}

/// Returns the elements of a set, as the kernel has them.
async fn elements(table: &str, set: &str) -> Vec<Value> {
    let Some(text) = nft(&["-j", "list", "set", "inet", table, set]).await else { return Vec::new() };
    let mut value: Value = serde_json::from_str(&text).unwrap_or_default();
    let sets = value["nftables"].as_array_mut();
    let found = sets.and_then(|sets| sets.iter_mut().find_map(|part| part["set"].get_mut("elem")));
    match found.map(Value::take) {
        Some(Value::Array(elements)) => elements,
        _ => Vec::new(),
    }
}

/// Returns the counters of watched connections: bridge, source, target, protocol, port, packets.
pub async fn counted(table: &str) -> Vec<(String, Ipv4Addr, Cidr, Protocol, u16, u64)> {
    elements(table, Set::Watched.name()).await.iter().filter_map(count).collect()
}

fn count(element: &Value) -> Option<(String, Ipv4Addr, Cidr, Protocol, u16, u64)> {
    let inner = element.get("elem").unwrap_or(element);
    let key = inner["val"]["concat"].as_array()?;
    let text = |n: usize| key.get(n)?.as_str();
    let target = match key.get(2)? {
        Value::String(address) => address.parse().ok()?,
        range => {
            let prefix = &range["prefix"];
            let (address, length) = (prefix["addr"].as_str()?.parse().ok()?, prefix["len"].as_u64()?);
            Cidr::new(address, u8::try_from(length).ok()?)?
        }
    };
    Some((
        text(0)?.to_owned(),
        text(1)?.parse().ok()?,
        target,
        Protocol::parse(text(3)?)?,
        u16::try_from(key.get(4)?.as_u64()?).ok()?,
        inner["counter"]["packets"].as_u64()?,
    ))
}

fn refusal(element: &Value) -> Option<DeniedPackets> {
    let inner = element.get("elem").unwrap_or(element);
    let key = inner["val"]["concat"].as_array()?;
    let text = |n: usize| key.get(n)?.as_str();
    let port = key.get(4)?;
    let port = port.as_u64().or_else(|| port.as_str()?.parse().ok())?;
    Some(DeniedPackets {
        bridge: text(0)?.to_owned(),
        source: text(1)?.parse().ok()?,
        target: text(2)?.parse().ok()?,
        protocol: Protocol::parse(text(3)?)?,
        port: u16::try_from(port).ok()?,
        let_through: false,
        hasty: false,
        ago: KEPT.saturating_sub(inner["expires"].as_u64().unwrap_or(KEPT)),
    })
}

/// Returns source and target of every established TCP connection, in the direction in which it was opened.
pub async fn connected() -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let done = said("conntrack", &["-L", "-p", "tcp", "--state", "ESTABLISHED"]).await;
    let text = done.map(text).unwrap_or_default();
    let field = |line: &str, key: &str| {
        line.split_whitespace().find_map(|word| word.strip_prefix(key))?.parse::<Ipv4Addr>().ok()
    };
    text.lines().filter_map(|line| Some((field(line, "src=")?, field(line, "dst=")?))).collect()
}

/// Returns how many connections the kernel tracks, and how many it can track; none when it tracks none. The whole
/// machine shares this table. Once it is full, no program can open another connection.
#[must_use]
pub fn tracked_of() -> Option<(u64, u64)> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
        text.ok()?.trim().parse().ok()
    };
    Some((read("count")?, read("max")?))
}

/// Whether the table is nearly full, from its count and its maximum (0: no limit).
#[must_use]
pub fn is_crowded((count, most): (u64, u64)) -> bool {
    most > 0 && count > most / 4 * 3
}

/// Returns the tracked connections that these addresses opened: protocol, source, target, port at the target.
pub async fn tracked(from: Cidr) -> Vec<(Protocol, Ipv4Addr, Ipv4Addr, u16)> {
    let done = said("conntrack", &["-L", "-s", &from.to_string()]).await;
    let text = done.map(text).unwrap_or_default();
    text.lines().filter_map(connection).collect()
}

/// Stops tracking the connections that these addresses opened. A live connection is tracked again if its client
/// sends next. Packets that its server sends before that are denied as unsolicited, and may end the connection.
pub async fn forget(from: Cidr) {
    said("conntrack", &["-D", "-s", &from.to_string()]).await;
}

fn connection(line: &str) -> Option<(Protocol, Ipv4Addr, Ipv4Addr, u16)> {
    let mut words = line.split_whitespace();
    let protocol = Protocol::parse(words.next()?)?;
    // The first value of each key describes the request, the second one the reply.
    let mut field = |key: &str| words.find_map(|word| word.strip_prefix(key));
    Some((
        protocol,
        field("src=")?.parse().ok()?,
        field("dst=")?.parse().ok()?,
        field("dport=")?.parse().ok()?,
    ))
}

/// Ends the tracked connections of a flow that is no longer allowed.
pub async fn cut(gone: &Allowed) {
    let (source, target, port) = (gone.source.to_string(), gone.target.to_string(), gone.port.to_string());
    let args = ["-D", "-p", gone.protocol.as_str(), "-s", &source, "-d", &target, "--dport", &port];
    said("conntrack", &args).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read_set_by_set() {
        let text = "table inet x {\n\tset pairs {\n\t\ttype a\n\t\telements = { \"bk0\" . 10.0.0.2,\n\t\t\t     \"bk1\" . 10.0.0.3 }\n\t}\n\n\tset never {\n\t\telements = { 10.0.0.0/8 }\n\t}\n\n\tset outside {\n\t\ttype a\n\t}\n}\n";
        assert_eq!(
            listed(text, "pairs"),
            ["\"bk0\" . 10.0.0.2", "\"bk1\" . 10.0.0.3"].map(str::to_owned).into()
        );
        assert_eq!(listed(text, "never"), ["10.0.0.0/8".to_owned()].into());
        assert_eq!(listed(text, "outside"), BTreeSet::new());
    }

    #[test]
    fn a_connection_is_read_as_it_began() {
        let line = "tcp      6 431999 ESTABLISHED src=10.64.0.2 dst=45.67.8.9 sport=40000 dport=443 src=45.67.8.9 \
                    dst=198.18.0.1 sport=443 dport=40000 [ASSURED] mark=0 use=1";
        let (source, target) = ("10.64.0.2".parse().unwrap(), "45.67.8.9".parse().unwrap());
        assert_eq!(connection(line), Some((Protocol::Tcp, source, target, 443)));
        assert_eq!(connection("icmp 1 29 src=10.64.0.2 dst=45.67.8.9 type=8 code=0 id=7"), None);
    }

    #[test]
    fn a_counter_is_read_from_the_kernels_own_form() {
        let range = serde_json::json!({"elem": {"val": {"concat": ["bkabcd0", "10.64.0.2",
            {"prefix": {"addr": "10.5.0.0", "len": 24}}, "udp", 9]}, "counter": {"packets": 3, "bytes": 90}}});
        let target = "10.5.0.0/24".parse().unwrap();
        let source = "10.64.0.2".parse().unwrap();
        assert_eq!(count(&range), Some(("bkabcd0".into(), source, target, Protocol::Udp, 9, 3)));
        let single = serde_json::json!({"elem": {"val": {"concat": ["bkabcd0", "10.64.0.2", "10.5.0.2", "tcp", 9092]},
            "counter": {"packets": 0, "bytes": 0}}});
        assert_eq!(count(&single).map(|(.., port, packets)| (port, packets)), Some((9092, 0)));
    }

    #[test]
    fn a_refusal_is_read_from_the_kernels_own_form() {
        let element = serde_json::json!({"elem": {"val": {"concat": ["bkabcd0", "10.64.0.2", "169.254.169.254", "tcp", 80]},
            "timeout": 60, "expires": 57}});
        let read = refusal(&element).unwrap();
        assert_eq!((read.port, read.ago, read.bridge.as_str()), (80, 3, "bkabcd0"));
    }
}
