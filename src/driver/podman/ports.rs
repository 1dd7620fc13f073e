//! The bridge's ports. A port that is isolated passes nothing to another one by itself: traffic
//! between two instances of one tenant goes up to the host and through the forward hook like all
//! other traffic, with or without br_netfilter. An instance knows its gateway and nobody else, and is told its card:
//! nothing is asked or answered by ARP, so nobody can answer in another one's place, and nobody fills the table of
//! neighbours that the whole machine shares.

use std::collections::{BTreeSet, HashSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::driver::Error;
use crate::driver::podman::firewall::card;
use crate::driver::podman::{namespace, neighbours};
use crate::driver::workload::Subnet;
use crate::policy::Cidr;
use crate::policy::never::{self, Range};

/// How long a program that changes or reads links may take.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn failed(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| Error::Transient(format!("{what}: {error}"))
}

pub(super) async fn json(args: &[&str]) -> Result<Value, Error> {
    look("ip", args).await
}

/// Runs a program to its end, for as long as it may take, with a text to read.
async fn finish(program: &'static str, args: &[&str], text: &str) -> Result<Output, Error> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed(program))?;
    let stdin = child.stdin.take();
    let write = async {
        if let Some(mut stdin) = stdin {
            // Whoever has ended does not read on; its end says why.
            let _ = stdin.write_all(text.as_bytes()).await;
        }
    };
    let both = async { tokio::join!(write, child.wait_with_output()).1 };
    match tokio::time::timeout(PATIENCE, both).await {
        Ok(done) => done.map_err(failed(program)),
        Err(_) => Err(Error::Transient(format!("{program} does not end"))),
    }
}

async fn look(program: &'static str, args: &[&str]) -> Result<Value, Error> {
    let done = finish(program, args, "").await?;
    if !done.status.success() {
        return Err(Error::Transient("a network namespace cannot be read".into()));
    }
    serde_json::from_slice(&done.stdout).map_err(|error| Error::Transient(error.to_string()))
}

/// Gives `ip` several commands at once; with the argument `-force` one that fails does not keep it from the others.
pub(super) async fn batch(args: &[&str], text: &str) -> Result<(), Error> {
    let done = finish("ip", &[args, &["-batch", "-"]].concat(), text).await?;
    if done.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&done.stderr).lines().next().unwrap_or_default().to_owned();
    Err(Error::Transient(format!("the network of an instance: {text}")))
}

fn namespace_of(sandbox: &str) -> &str {
    Path::new(sandbox).file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

pub(super) async fn set(args: &[&str]) -> Result<(), Error> {
    let done = finish("ip", args, "").await?;
    if done.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    // It is so already, or gone with its other end in the meantime.
    if text.contains("File exists") || text.contains("Cannot find device") && args.contains(&"delete") {
        Ok(())
    } else {
        Err(Error::Transient(format!("the network of an instance: {text}")))
    }
}

/// The addresses that this machine has, but for those of `pool` and loopback: nobody reaches them.
pub async fn own_addresses(pool: impl Fn(&Ipv4Addr) -> bool) -> Result<Vec<Range>, Error> {
    let value = json(&["-j", "-4", "addr", "show"]).await?;
    let addresses: BTreeSet<Ipv4Addr> = value
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|link| link["addr_info"].as_array().into_iter().flatten())
        .filter_map(|info| info["local"].as_str()?.parse().ok())
        .filter(|address| !pool(address) && !address.is_loopback())
        .collect();
    Ok(addresses.into_iter().map(|address| never::own(Cidr::of(address))).collect())
}

/// Gives an instance its card and its address, between the attachment of its network and its start.
pub async fn address(bridge: &str, sandbox: &str, own: Ipv4Addr, subnet: Subnet) -> Result<(), Error> {
    let namespace = namespace_of(sandbox);
    set(&["-n", namespace, "link", "set", "dev", "eth0", "address", &card(own)]).await?;
    settle(bridge, sandbox, own, subnet).await
}

/// Gives an instance its address and its way out, and the machine its way to it. One that runs already loses nothing
/// by it: its connections go on.
pub async fn settle(bridge: &str, sandbox: &str, own: Ipv4Addr, subnet: Subnet) -> Result<(), Error> {
    settle_within(bridge, sandbox, own, subnet).await?;
    neighbours::introduce(bridge, subnet.gateway(), own).await
}

/// The half of it within the instance, by which it still asks nobody and is reached as before.
pub async fn settle_within(bridge: &str, sandbox: &str, own: Ipv4Addr, subnet: Subnet) -> Result<(), Error> {
    let name = namespace_of(sandbox);
    let (gateway, prefix) = (subnet.gateway(), subnet.prefix());
    set(&["addr", "replace", &format!("{gateway}/{prefix}"), "dev", bridge]).await?;
    let inside = format!(
        "addr replace {own}/32 dev eth0\n\
         route replace {gateway} dev eth0 scope link\n\
         route replace default via {gateway} dev eth0\n\
         neigh replace {gateway} lladdr {} dev eth0 nud permanent\n",
        card(gateway)
    );
    batch(&["-n", name], &inside).await?;
    namespace::within(sandbox, close_ipv6).await.and_then(|closed| closed).map_err(failed("IPv6"))?;
    // An earlier version gave the address with all of its neighbours.
    let wide = format!("{own}/{prefix}");
    let there = json(&["-n", name, "-j", "-4", "addr", "show", "dev", "eth0"]).await?;
    let has_wide = there[0]["addr_info"]
        .as_array()
        .is_some_and(|all| all.iter().any(|one| one["prefixlen"] == u64::from(prefix)));
    if has_wide {
        set(&["-n", name, "addr", "del", &wide, "dev", "eth0"]).await?;
    }
    Ok(())
}

/// Closes IPv6 on the link of the namespace that this thread is in, where it leads nowhere: else an app could ask for
/// neighbours there, and fill the machine's table of them.
fn close_ipv6() -> std::io::Result<()> {
    match std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1") {
        // A kernel without IPv6 has nothing to close.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Takes down the namespace of an instance that has ended, and its port with it: the engine leaves
/// both lying when an instance ends by itself.
pub async fn release(sandbox: &str) {
    let namespace = namespace_of(sandbox);
    if namespace.starts_with("netns-") {
        let _ = Command::new("ip")
            .args(["netns", "delete", namespace])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .await;
    }
}

pub(super) fn is_there(bridge: &str) -> bool {
    Path::new(&format!("/sys/class/net/{bridge}")).exists()
}

/// What a port is marked with: the address of the instance behind it.
fn mark(own: Ipv4Addr) -> String {
    format!("bulkhead:{own}")
}

/// Takes down the ports that an address has on a bridge. A namespace lives on for minutes after its
/// last process, as long as a connection of it waits for an answer; it would go on answering for the
/// address, and so stand in the way of the next instance there.
pub async fn clear(bridge: &str, own: Ipv4Addr) -> Result<(), Error> {
    let mark = mark(own);
    remove_ports(bridge, |port| port["ifalias"].as_str() == Some(mark.as_str())).await
}

async fn remove_ports(bridge: &str, which: impl Fn(&Value) -> bool) -> Result<(), Error> {
    if !is_there(bridge) {
        return Ok(());
    }
    let ports = json(&["-j", "link", "show", "master", bridge]).await?;
    for port in ports.as_array().into_iter().flatten().filter(|port| which(port)) {
        if let Some(name) = port["ifname"].as_str() {
            set(&["link", "delete", "dev", name]).await?;
        }
    }
    Ok(())
}

/// Takes down a bridge that the engine has left, with its ports, and looks again: whether it is gone.
pub async fn remove_bridge(bridge: &str) -> Result<bool, Error> {
    remove_ports(bridge, |_| true).await?;
    if is_there(bridge) {
        set(&["link", "delete", "dev", bridge]).await?;
    }
    Ok(!is_there(bridge))
}

/// A port of a bridge. A name alone may be another's by now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Port {
    /// Name.
    name: String,
    /// The kernel's number for it.
    index: i64,
}

/// How a port is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// On its bridge, closed to its neighbours.
    Closed,
    /// On its bridge, and somebody has opened it.
    Open,
    /// Not on a bridge any more.
    Gone,
}

impl Port {
    /// Looks at the port.
    #[must_use]
    pub fn look(&self) -> Seen {
        let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{}/{file}", self.name));
        let same = read("ifindex").is_ok_and(|text| text.trim().parse() == Ok(self.index));
        let [Ok(isolated), Ok(learning), Ok(flood)] =
            ["brport/isolated", "brport/learning", "brport/unicast_flood"].map(read)
        else {
            return Seen::Gone;
        };
        match [isolated.trim(), learning.trim(), flood.trim()] {
            _ if !same => Seen::Gone,
            ["1", "0", "0"] => Seen::Closed,
            _ => Seen::Open,
        }
    }

    /// Whether somebody has taken away its lock to its card, looked at anew.
    pub async fn is_unlocked(&self) -> bool {
        unlocked().await.is_ok_and(|unlocked| unlocked.contains(self))
    }

    /// Closes the port to its neighbours. The bridge learns nothing from what comes in there, sends nothing there that
    /// it does not know to belong there, and takes nothing from there that comes from another card.
    pub async fn close(&self) -> Result<(), Error> {
        let closed = ["isolated", "on", "learning", "off", "flood", "off"];
        let port = ["link", "set", "dev", &self.name, "type", "bridge_slave"];
        if set(&[&port[..], &closed, &["locked", "on"]].concat()).await.is_ok() {
            return Ok(());
        }
        // Kernels before 5.18 know no lock. No app has the right to send from another card.
        set(&[&port[..], &closed].concat()).await?;
        tracing::warn!(port = self.name, "this kernel does not hold a port to its card");
        Ok(())
    }

    /// Tells the bridge whose card is behind the port.
    async fn bind(&self, own: Ipv4Addr) -> Result<(), Error> {
        let card = card(own);
        let args = ["fdb", "replace", &card, "dev", &self.name, "master", "static"];
        let done = finish("bridge", &args, "").await?;
        if done.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        Err(Error::Transient(format!("the port of an instance: {text}")))
    }
}

/// Ports whose lock to their card somebody has taken away. The files that [`Port::look`] reads do not tell it, nor
/// does a kernel that has none.
pub async fn unlocked() -> Result<HashSet<Port>, Error> {
    let links = look("bridge", &["-j", "-d", "link", "show"]).await?;
    let open = links.as_array().into_iter().flatten().filter(|link| link["locked"] == false);
    let port =
        |link: &Value| Some(Port { name: link["ifname"].as_str()?.into(), index: link["ifindex"].as_i64()? });
    Ok(open.filter_map(port).collect())
}

/// Closes and marks the port of an instance whose network is attached and whose process has not
/// started.
pub async fn isolate(bridge: &str, sandbox: &str, own: Ipv4Addr) -> Result<Port, Error> {
    let namespace = namespace_of(sandbox);
    let inside = json(&["-n", namespace, "-j", "link", "show", "dev", "eth0"]).await?;
    let index = inside[0]["link_index"].as_i64().ok_or_else(|| Error::Transient("no peer of eth0".into()))?;
    let links = json(&["-j", "link", "show", "master", bridge]).await?;
    let port = links
        .as_array()
        .and_then(|links| links.iter().find(|link| link["ifindex"].as_i64() == Some(index)))
        .and_then(|link| link["ifname"].as_str())
        .ok_or_else(|| Error::Transient("the port of the instance is not on its bridge".into()))?;
    let port = Port { name: port.to_owned(), index };
    port.close().await?;
    port.bind(own).await?;
    set(&["link", "set", "dev", &port.name, "alias", &mark(own)]).await?;
    for (family, key, value) in
        [("ipv4", "send_redirects", "0"), ("ipv4", "rp_filter", "1"), ("ipv6", "disable_ipv6", "1")]
    {
        let path = format!("/proc/sys/net/{family}/conf/{bridge}/{key}");
        match tokio::fs::write(&path, value).await {
            Ok(()) => {}
            // A kernel without IPv6 has nothing to close there.
            Err(error) if family == "ipv6" && error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(key)(error)),
        }
    }
    Ok(port)
}
