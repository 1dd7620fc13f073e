//! The one nftables table of an installation, as pure text and one apply. Everything from, to and
//! between tenants' bridges is closed but for what is listed: an app reaches the apps of its own
//! tenant that it names, on their port; the prober reaches everything for health checks. Replies
//! pass only through the mirrored key of the rule that allowed the question, so that taking a rule
//! away cuts what runs.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::driver::Error;

/// One allowed connection within a tenant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pair {
    /// Bridge of the tenant.
    pub bridge: String,
    /// From.
    pub source: Ipv4Addr,
    /// To.
    pub target: Ipv4Addr,
    /// TCP port.
    pub port: u16,
}

/// What the table is made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Name of the table.
    pub table: String,
    /// Prefix of the bridges' names.
    pub prefix: String,
    /// User id of the prober.
    pub prober: u32,
    /// Addresses that a bridge's instances may have.
    pub sources: BTreeSet<(String, Ipv4Addr)>,
    /// Allowed connections.
    pub pairs: BTreeSet<Pair>,
}

/// How much of the table is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The chains and the names of the sets.
    Rules,
    /// The sets' elements too.
    Whole,
}

/// What a look of this depth shows of a table that was seen whole.
#[must_use]
pub fn at_depth(whole: &str, depth: Depth) -> String {
    if depth == Depth::Whole {
        return whole.to_owned();
    }
    let mut out = String::with_capacity(whole.len().min(4096));
    let mut inside = false;
    for line in whole.lines() {
        inside |= line.trim_start().starts_with("elements = {");
        if !inside {
            out.push_str(line);
            out.push('\n');
        }
        inside &= !line.ends_with('}');
    }
    out
}

fn set<T>(elements: impl Iterator<Item = T>, show: impl Fn(T) -> String) -> String {
    let list: Vec<String> = elements.map(show).collect();
    if list.is_empty() { String::new() } else { format!("    elements = {{ {} }}\n", list.join(", ")) }
}

impl Rules {
    /// The text of the table: it replaces the one in force in one step.
    #[must_use]
    pub fn text(&self) -> String {
        let table = &self.table;
        let bridges = format!("\"{}*\"", self.prefix);
        let sources = set(self.sources.iter(), |(bridge, address)| format!("\"{bridge}\" . {address}"));
        let pairs = set(self.pairs.iter(), |pair| {
            format!("\"{}\" . {} . {} . {}", pair.bridge, pair.source, pair.target, pair.port)
        });
        let mut out = String::new();
        let _ = write!(
            out,
            "add table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n\
  set sources {{\n    type ifname . ipv4_addr\n{sources}  }}\n\
  set pairs {{\n    type ifname . ipv4_addr . ipv4_addr . inet_service\n{pairs}  }}\n\
  set denied {{\n    type ifname . ipv4_addr . ipv4_addr . inet_proto . inet_service\n    size 16384\n    \
flags dynamic,timeout\n    timeout 1h\n  }}\n\
  chain arrive {{\n    type filter hook prerouting priority raw; policy accept;\n\
    iifname {bridges} meta nfproto ipv6 drop\n\
    iifname {bridges} iifname . ip saddr != @sources drop\n  }}\n\
  chain through {{\n    type filter hook forward priority filter - 10; policy accept;\n\
    iifname {bridges} goto from_tenant\n    oifname {bridges} goto to_tenant\n  }}\n\
  chain from_tenant {{\n    ct state invalid drop\n\
    meta l4proto tcp iifname . ip saddr . ip daddr . tcp dport @pairs oifname {bridges} accept\n\
    meta l4proto tcp ct direction reply ct state established iifname . ip daddr . ip saddr . tcp sport @pairs accept\n\
    meta l4proto {{ tcp, udp }} update @denied {{ iifname . ip saddr . ip daddr . meta l4proto . th dport }}\n\
    reject with icmpx admin-prohibited\n  }}\n\
  chain to_tenant {{\n    drop\n  }}\n\
  chain into_host {{\n    type filter hook input priority filter - 10; policy accept;\n\
    iifname {bridges} goto from_tenant_to_host\n  }}\n\
  chain from_tenant_to_host {{\n\
    meta l4proto tcp ct direction reply ct state established accept\n\
    meta l4proto {{ tcp, udp }} update @denied {{ iifname . ip saddr . ip daddr . meta l4proto . th dport }}\n    drop\n  }}\n\
  chain out_of_host {{\n    type filter hook output priority filter - 10; policy accept;\n\
    oifname {bridges} goto host_to_tenant\n  }}\n\
  chain host_to_tenant {{\n    meta l4proto tcp meta skuid {prober} accept\n    \
meta l4proto icmp icmp type destination-unreachable accept\n    reject with icmpx admin-prohibited\n  }}\n}}\n",
            prober = self.prober,
        );
        out
    }

    /// Puts the table in force: wholly, or not at all.
    pub async fn apply(&self) -> Result<(), Error> {
        let failed = |why: String| Error::Transient(why);
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(self.text().as_bytes()).await.map_err(|error| failed(error.to_string()))?;
        }
        let done = child.wait_with_output().await.map_err(|error| failed(error.to_string()))?;
        if done.status.success() {
            Ok(())
        } else {
            tracing::error!(words = %String::from_utf8_lossy(&done.stderr), "the table cannot be loaded");
            Err(failed("the firewall table cannot be loaded".into()))
        }
    }

    /// The table as it is in force, without what packets leave in it; none when there is none.
    pub async fn in_force(&self, depth: Depth) -> Option<String> {
        let flags = if depth == Depth::Whole { "-s" } else { "-st" };
        let done = Command::new("nft")
            .args([flags, "list", "table", "inet", &self.table])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .await
            .ok()?;
        if !done.status.success() {
            return None;
        }
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        // What was denied is written by packets; the rest is ours alone.
        let (before, after) = text.split_once("\tset denied {")?;
        let after = after.split_once("\n\t}").map_or("", |(_, after)| after);
        Some(at_depth(&format!("{before}{after}"), depth))
    }

    /// Takes the table away, when the installation goes.
    pub async fn remove(table: &str) {
        let _ =
            Command::new("nft").args(["delete", "table", "inet", table]).stderr(Stdio::null()).status().await;
    }
}

/// Ends the tracked connections of a pair that is no longer allowed.
pub async fn cut(pair: &Pair) {
    let _ = Command::new("conntrack")
        .args(["-D", "-p", "tcp", "-s", &pair.source.to_string(), "-d", &pair.target.to_string()])
        .args(["--dport", &pair.port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await;
}
