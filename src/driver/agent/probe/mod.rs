//! Probes: connections from within an app's own network namespace. An open connection proves nothing, since any
//! device on the way may accept it. For an instance of this machine it counts only if the target's own socket list
//! has it, under the unique source port of the probe.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use super::app::look::is_alive;
use super::core::{Agent, lock};
use crate::driver::podman::firewall::Allowed;
use crate::driver::podman::{host, namespace};
use crate::driver::{Error, HostSocket, InstanceState, Probe, ProbeOutcome, ProbeSummary, ProbeTarget};
use crate::ids::{AppId, TenantName};
use crate::policy::{Cidr, Protocol};

/// How long a probe waits. A denial by the firewall is immediate.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// How long a result about listening sockets is reused: longer than the interval of the rounds.
const LISTENED: Duration = Duration::from_secs(90);

mod rounds;
mod wanted;

/// An instance to probe from, or to probe.
#[derive(Debug, Clone)]
struct ProbeInstance {
    /// Its network namespace, recorded before its process started: that process cannot replace it.
    sandbox: String,
    /// Number of its network.
    network: u32,
    address: Ipv4Addr,
}

impl Agent {
    /// Returns the running instances of an app.
    ///
    /// A process that has just ended counts as gone, even if its instance is still recorded as running.
    fn places(&self, tenant: &TenantName, app: AppId) -> Vec<ProbeInstance> {
        let Some(app) = self.app(app).filter(|app| app.tenant == *tenant) else { return Vec::new() };
        let Some(network) = lock(&self.journal).ever(tenant).map(|own| own.network) else {
            return Vec::new();
        };
        let kept = lock(&app.kept);
        let up = |state| {
            matches!(state, InstanceState::Starting | InstanceState::Running | InstanceState::Unhealthy)
        };
        let running = kept.instances.iter().filter(|i| up(i.state) && !i.sandbox.is_empty() && is_alive(i));
        running
            .filter_map(|i| {
                let address = kept.address_of(i)?;
                Some(ProbeInstance { sandbox: i.sandbox.clone(), network, address })
            })
            .collect()
    }

    /// Probes whether an app reaches a target.
    pub(super) async fn probe(
        self: &Arc<Self>,
        tenant: &TenantName,
        app: AppId,
        target: &ProbeTarget,
        (protocol, port): (Protocol, u16),
        platform: bool,
    ) -> Result<ProbeOutcome, Error> {
        let from = self.places(tenant, app).into_iter().next();
        let from = from.ok_or_else(|| Error::Rejected("no instance of the app runs".into()))?;
        let (address, peer) = match target {
            ProbeTarget::Address(address) => (*address, self.at(*address)),
            ProbeTarget::App { tenant, app } => {
                let place = self.places(tenant, *app).into_iter().next();
                let place = place.ok_or_else(|| Error::Rejected("no instance of the target runs".into()))?;
                (place.address, Some(place))
            }
        };
        let busy = || Error::Transient("other probes are under way; try again in a moment".into());
        // The platform's own probes do not wait for those of tenants.
        let room = if platform { &self.platform_probes } else { &self.probes };
        let _room = room.try_acquire().map_err(|_| busy())?;
        let _turn = if platform { None } else { Some(Probing::enter(self, tenant).ok_or_else(busy)?) };
        self.note_tried(from.address, address, port);
        let (network, source) = (from.network, from.address);
        let outcome = within(&from, move || attempt(address, protocol, port, peer.as_ref())).await?;
        if outcome == ProbeOutcome::Silent && self.is_hurried(network).await {
            return Err(Error::Rejected(
                "the tenant's apps exceed their rate of new connections: they cannot be probed now; try again later"
                    .into(),
            ));
        }
        Ok(self.by_whom(outcome, (network, source), (address, protocol, port)).await)
    }

    /// Returns whether the applied rules allow an app's packets; none if no instance of it runs.
    pub(super) async fn lets_through(&self, probe: &Probe) -> Option<bool> {
        let from = self.places(&probe.tenant, probe.app).into_iter().next()?;
        let ProbeTarget::Address(target) = probe.target else { return None };
        // An instance's packets to itself never leave it.
        if target == from.address {
            return Some(true);
        }
        let (network, source) = (from.network, from.address);
        let to =
            Allowed { network, source, target: Cidr::of(target), protocol: probe.protocol, port: probe.port };
        Some(self.permits(&to).await)
    }

    /// Tells a denial by this firewall from one further on: a "prohibited" answer is this firewall's if its rules
    /// do not allow the packet.
    async fn by_whom(
        &self,
        outcome: ProbeOutcome,
        (network, source): (u32, Ipv4Addr),
        (target, protocol, port): (Ipv4Addr, Protocol, u16),
    ) -> ProbeOutcome {
        let to = Allowed { network, source, target: Cidr::of(target), protocol, port };
        if outcome == ProbeOutcome::Prohibited && self.permits(&to).await {
            ProbeOutcome::Unreachable
        } else {
            outcome
        }
    }

    /// Probes the required and the forbidden connections of a tenant's apps.
    pub(super) async fn try_tenant(self: &Arc<Self>, tenant: &TenantName) -> Result<ProbeSummary, Error> {
        let busy = || Error::Transient("other probes are under way; try again in a moment".into());
        let _room = self.platform_probes.try_acquire().map_err(|_| busy())?;
        Ok(self.probe_tenant(tenant).await)
    }

    /// Returns the machine's listening sockets, probed from within an instance if one runs. The result is renewed
    /// with each round of probes; requests in between reuse it.
    pub(super) async fn listeners(&self) -> Vec<HostSocket> {
        let known = self.listening.lock().await.clone();
        match known {
            Some((at, listeners)) if at.elapsed() < LISTENED => listeners,
            _ => self.look_for_listeners().await,
        }
    }

    /// Reads the machine's listening sockets and probes them.
    async fn look_for_listeners(&self) -> Vec<HostSocket> {
        let mut known = self.listening.lock().await;
        // Concurrent callers reuse the result of the first one.
        if let Some((at, listeners)) = known.as_ref()
            && at.elapsed() < Duration::from_secs(10)
        {
            return listeners.clone();
        }
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        let from = apps.into_iter().find_map(|app| self.places(&app.tenant, app.id).into_iter().next());
        let mut listeners = tokio::task::spawn_blocking(host::listeners).await.unwrap_or_default();
        if let Some(from) = from {
            let targets = host::targets(&from.sandbox, &mut listeners);
            for (_, target, port) in &targets {
                self.note_tried(from.address, *target, *port);
            }
            let looked = tokio::task::spawn_blocking(move || {
                host::try_from_within(&from.sandbox, &targets, &mut listeners);
                listeners
            });
            listeners = looked.await.unwrap_or_default();
        }
        *known = Some((std::time::Instant::now(), listeners.clone()));
        listeners
    }

    /// Records that the platform itself probes from an instance: a denial of the probe is not the app's.
    fn note_tried(&self, source: Ipv4Addr, target: Ipv4Addr, port: u16) {
        let mut tried = lock(&self.tried);
        let now = std::time::Instant::now();
        tried.retain(|_, at| now.duration_since(*at) < Duration::from_secs(120));
        tried.insert((source, target, port), now);
    }

    /// Returns the instance with this address.
    fn at(&self, address: Ipv4Addr) -> Option<ProbeInstance> {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.into_iter().find_map(|app| {
            self.places(&app.tenant, app.id).into_iter().find(|place| place.address == address)
        })
    }
}

/// Runs a function within an instance's network namespace.
async fn within<T: Send + 'static>(
    place: &ProbeInstance,
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let failed = |error: std::io::Error| Error::Transient(format!("the network namespace: {error}"));
    namespace::within(&place.sandbox, what).await.map_err(failed)
}

fn outcome(error: &std::io::Error) -> ProbeOutcome {
    match error.kind() {
        ErrorKind::ConnectionRefused => ProbeOutcome::Refused,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => ProbeOutcome::Prohibited,
        _ => ProbeOutcome::Silent,
    }
}

fn attempt(address: Ipv4Addr, protocol: Protocol, port: u16, peer: Option<&ProbeInstance>) -> ProbeOutcome {
    match protocol {
        Protocol::Tcp => match TcpStream::connect_timeout(&(address, port).into(), PATIENCE) {
            Ok(stream) => match (peer, stream.local_addr()) {
                (Some(peer), Ok(SocketAddr::V4(own))) if has_socket(&peer.sandbox, *own.ip(), own.port()) => {
                    ProbeOutcome::Reached
                }
                _ => ProbeOutcome::Opened,
            },
            Err(error) => outcome(&error),
        },
        // Only the receiver knows whether a datagram arrives; a denial is reported at once.
        Protocol::Udp => {
            let sent = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
                socket.set_read_timeout(Some(Duration::from_millis(300)))?;
                socket.connect((address, port))?;
                socket.send(&[])?;
                socket.recv(&mut [0; 1])
            });
            match sent {
                Ok(_) => ProbeOutcome::Opened,
                Err(error) => outcome(&error),
            }
        }
    }
}

/// Returns whether a namespace has a connection from this address and port, according to the kernel's own list.
fn has_socket(sandbox: &str, from: Ipv4Addr, port: u16) -> bool {
    let wanted = format!("{:08X}:{port:04X}", u32::from_ne_bytes(from.octets()));
    let look = move || {
        ["tcp", "tcp6"].iter().any(|list| {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{list}")).unwrap_or_default();
            text.lines()
                .any(|line| line.split_whitespace().nth(2).is_some_and(|remote| remote.ends_with(&wanted)))
        })
    };
    namespace::begin(sandbox, look).wait().unwrap_or(false)
}

/// A tenant's probe; counted until it is dropped.
struct Probing<'a> {
    agent: &'a Agent,
    tenant: TenantName,
}

impl<'a> Probing<'a> {
    /// Registers a probe. At most two of a tenant run at a time.
    fn enter(agent: &'a Agent, tenant: &TenantName) -> Option<Self> {
        let mut probing = lock(&agent.probing);
        let count = probing.entry(tenant.clone()).or_default();
        if *count >= 2 {
            return None;
        }
        *count += 1;
        Some(Self { agent, tenant: tenant.clone() })
    }
}

impl Drop for Probing<'_> {
    fn drop(&mut self) {
        let mut probing = lock(&self.agent.probing);
        match probing.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(probing.remove(&self.tenant)),
        }
    }
}
