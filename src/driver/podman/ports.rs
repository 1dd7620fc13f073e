//! Ports of a tenant's bridge. An isolated port passes nothing to another port by itself. Traffic between two
//! instances of one tenant goes up to the host and through the forward hook like all other traffic, with or without
//! br_netfilter.
//!
//! An instance has a static neighbour entry for its gateway and no other neighbour. The agent sets its MAC
//! address. ARP is neither sent nor answered. An instance can therefore not answer in place of another one, or fill
//! the neighbour table that the whole machine shares.

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

/// Time limit of a program that changes or reads links.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn failed(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| Error::Transient(format!("{what}: {error}"))
}

pub(super) async fn json(args: &[&str]) -> Result<Value, Error> {
    look("ip", args).await
}

/// Runs a program to its end, within the time limit. The text is its standard input.
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
            // A program that has ended does not read on; its exit status says why.
            let _ = stdin.write_all(text.as_bytes()).await;
        }
    };
    let both = async { tokio::join!(write, child.wait_with_output()).1 };
    match tokio::time::timeout(PATIENCE, both).await {
        Ok(done) => done.map_err(failed(program)),
        Err(_) => Err(Error::Transient(format!("{program} did not finish in time"))),
    }
}

async fn look(program: &'static str, args: &[&str]) -> Result<Value, Error> {
    let done = finish(program, args, "").await?;
    if !done.status.success() {
        return Err(Error::Transient("the state of the network cannot be read".into()));
    }
    serde_json::from_slice(&done.stdout).map_err(|error| Error::Transient(error.to_string()))
}

/// Runs several commands of `ip` at once. With the argument `-force`, a failed command does not stop the others.
pub(super) async fn batch(args: &[&str], text: &str) -> Result<(), Error> {
    let done = finish("ip", &[args, &["-batch", "-"]].concat(), text).await?;
    if done.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&done.stderr).lines().next().unwrap_or_default().to_owned();
    Err(Error::Transient(format!("the network of an instance cannot be set up: {text}")))
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
    // The change is already in place, or the link disappeared with its other end in the meantime.
    if text.contains("File exists") || text.contains("Cannot find device") && args.contains(&"delete") {
        Ok(())
    } else {
        Err(Error::Transient(format!("the network of an instance cannot be set up: {text}")))
    }
}

/// Returns the machine's addresses, except loopback and those of `pool`. No tenant reaches them.
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

/// Sets the MAC address and the IP address of an instance, after its network is attached and before it starts.
pub async fn address(bridge: &str, sandbox: &str, own: Ipv4Addr, subnet: Subnet) -> Result<(), Error> {
    let namespace = namespace_of(sandbox);
    set(&["-n", namespace, "link", "set", "dev", "eth0", "address", &card(own)]).await?;
    settle(bridge, sandbox, own, subnet).await
}

/// Sets the address and the default route of an instance, and the machine's neighbour entry for it. A running
/// instance keeps its connections.
pub async fn settle(bridge: &str, sandbox: &str, own: Ipv4Addr, subnet: Subnet) -> Result<(), Error> {
    settle_within(bridge, sandbox, own, subnet).await?;
    neighbours::introduce(bridge, subnet.gateway(), own).await
}

/// Does only the part within the instance. After it, the instance sends no ARP and is reachable as before.
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
    namespace::within(sandbox, close_ipv6)
        .await
        .and_then(|closed| closed)
        .map_err(failed("IPv6 cannot be disabled"))?;
    // An earlier version assigned the address with the prefix of the whole subnet.
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

/// Disables IPv6 on the link of this thread's namespace, where it leads nowhere. With IPv6 an app could ask for
/// neighbours and fill the machine's neighbour table.
fn close_ipv6() -> std::io::Result<()> {
    match std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1") {
        // A kernel without IPv6 has nothing to disable.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes the namespace of an instance that has ended, and its port with it. The engine leaves both behind when an
/// instance ends by itself.
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

/// Returns the mark of a port: the address of the instance behind it.
fn mark(own: Ipv4Addr) -> String {
    format!("bulkhead:{own}")
}

/// Removes the ports that an address has on a bridge. A namespace outlives its last process by minutes, as long as
/// one of its connections waits for an answer. It would keep answering for the address and block the next instance
/// there.
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

/// Removes a bridge that the engine left behind, with its ports. Returns whether it is gone.
pub async fn remove_bridge(bridge: &str) -> Result<bool, Error> {
    remove_ports(bridge, |_| true).await?;
    if is_there(bridge) {
        set(&["link", "delete", "dev", bridge]).await?;
    }
    Ok(!is_there(bridge))
}

/// A port of a bridge. The name alone may belong to another port by now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Port {
    /// Name.
    name: String,
    /// Interface index in the kernel.
    index: i64,
}

/// Observed state of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// On its bridge, and isolated from its neighbours.
    Closed,
    /// On its bridge, but another program has opened it.
    Open,
    /// No longer on a bridge.
    Gone,
}

impl Port {
    /// Reads the state of the port.
    #[must_use]
    pub fn look(&self) -> PortState {
        let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{}/{file}", self.name));
        let same = read("ifindex").is_ok_and(|text| text.trim().parse() == Ok(self.index));
        let [Ok(isolated), Ok(learning), Ok(flood)] =
            ["brport/isolated", "brport/learning", "brport/unicast_flood"].map(read)
        else {
            return PortState::Gone;
        };
        match [isolated.trim(), learning.trim(), flood.trim()] {
            _ if !same => PortState::Gone,
            ["1", "0", "0"] => PortState::Closed,
            _ => PortState::Open,
        }
    }

    /// Reads again whether another program has removed the port's lock to its MAC address.
    pub async fn is_unlocked(&self) -> bool {
        unlocked().await.is_ok_and(|unlocked| unlocked.contains(self))
    }

    /// Closes the port to its neighbours. The bridge learns no addresses from the port and sends it only frames
    /// for its own MAC address. It accepts no frames from another MAC address there.
    pub async fn close(&self) -> Result<(), Error> {
        let closed = ["isolated", "on", "learning", "off", "flood", "off"];
        let port = ["link", "set", "dev", &self.name, "type", "bridge_slave"];
        if set(&[&port[..], &closed, &["locked", "on"]].concat()).await.is_ok() {
            return Ok(());
        }
        // Kernels before 5.18 have no such lock. No app has the right to send from another MAC address.
        set(&[&port[..], &closed].concat()).await?;
        tracing::warn!(port = self.name, "this kernel cannot lock a bridge port to its MAC address");
        Ok(())
    }

    /// Adds the forwarding entry of the MAC address behind the port to the bridge.
    async fn bind(&self, own: Ipv4Addr) -> Result<(), Error> {
        let card = card(own);
        let args = ["fdb", "replace", &card, "dev", &self.name, "master", "static"];
        let done = finish("bridge", &args, "").await?;
        if done.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        Err(Error::Transient(format!("the bridge port of an instance cannot be set up: {text}")))
    }
}

/// Returns the ports whose lock to their MAC address another program has removed. The files that [`Port::look`]
/// reads do not show the lock. A kernel without such locks reports no port.
pub async fn unlocked() -> Result<HashSet<Port>, Error> {
    let links = look("bridge", &["-j", "-d", "link", "show"]).await?;
    let open = links.as_array().into_iter().flatten().filter(|link| link["locked"] == false);
    let port =
        |link: &Value| Some(Port { name: link["ifname"].as_str()?.into(), index: link["ifindex"].as_i64()? });
    Ok(open.filter_map(port).collect())
}

/// Closes and marks the port of an instance whose network is attached and whose process has not started.
pub async fn isolate(bridge: &str, sandbox: &str, own: Ipv4Addr) -> Result<Port, Error> {
    let namespace = namespace_of(sandbox);
    let inside = json(&["-n", namespace, "-j", "link", "show", "dev", "eth0"]).await?;
    let index = inside[0]["link_index"]
        .as_i64()
        .ok_or_else(|| Error::Transient("eth0 of the instance has no peer".into()))?;
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
            // A kernel without IPv6 has nothing to disable.
            Err(error) if family == "ipv6" && error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(key)(error)),
        }
    }
    Ok(port)
}
