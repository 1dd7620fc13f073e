//! Trying it: a connection from within an app's own network namespace. That it opens proves nothing, since
//! anything on the way may accept it; for an instance of ours it counts only when the other side's own list
//! of sockets has it, under the port that this probe alone has.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::core::{Agent, lock};
use crate::driver::podman::host;
use crate::driver::{Error, InstanceState, Listener, ProbeOutcome, ProbeTarget};
use crate::ids::{AppId, TenantName};
use crate::policy::{Protocol, Target};

/// How long a probe waits. A refusal by the firewall comes at once.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// Most probes of one round of those that are made by themselves.
const ROUND: usize = 200;
/// What nothing of a tenant ever reaches, whatever its plan says.
const CLOSED: [(Ipv4Addr, u16); 3] = [
    (Ipv4Addr::new(169, 254, 169, 254), 80),
    (Ipv4Addr::new(168, 63, 129, 16), 80),
    (Ipv4Addr::new(100, 100, 100, 200), 80),
];

/// An instance to try from, or to try.
#[derive(Debug, Clone)]
struct Place {
    pid: i32,
    address: Ipv4Addr,
}

impl Agent {
    fn places(&self, tenant: &TenantName, app: AppId) -> Vec<Place> {
        let Some(app) = self.app(app).filter(|app| app.tenant == *tenant) else { return Vec::new() };
        let kept = lock(&app.kept);
        let up = |state| {
            matches!(state, InstanceState::Starting | InstanceState::Running | InstanceState::Unhealthy)
        };
        let running = kept.instances.iter().filter(|i| up(i.state) && i.pid > 0);
        running
            .filter_map(|i| {
                let address = *kept.workload_of(i.revision)?.addresses.get(i.slot)?;
                Some(Place { pid: i.pid, address })
            })
            .collect()
    }

    /// Tries whether an app gets somewhere.
    pub(super) async fn probe(
        self: &Arc<Self>,
        tenant: &TenantName,
        app: AppId,
        target: &ProbeTarget,
        (protocol, port): (Protocol, u16),
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
        let _turn = self.probes.acquire().await.map_err(|_| Error::Transient("the agent ends".into()))?;
        within(from, move || attempt(address, protocol, port, peer.as_ref())).await
    }

    /// What listens on the machine, tried from within some instance, if one runs.
    pub(super) async fn listeners(&self) -> Vec<Listener> {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        let from = apps.into_iter().find_map(|app| self.places(&app.tenant, app.id).into_iter().next());
        let looked = tokio::task::spawn_blocking(move || {
            let mut listeners = host::listeners();
            if let Some(from) = from {
                host::try_from_within(from.pid, &mut listeners);
            }
            listeners
        });
        looked.await.unwrap_or_default()
    }

    /// The instance that has an address.
    fn at(&self, address: Ipv4Addr) -> Option<Place> {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.into_iter().find_map(|app| {
            self.places(&app.tenant, app.id).into_iter().find(|place| place.address == address)
        })
    }

    /// Tries, for one instance of each app, what must be open between instances and what must be closed. What
    /// must be closed and is open is an alarm.
    pub(super) async fn probe_all(self: &Arc<Self>) {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        let mut left = ROUND;
        for app in apps {
            let Some(from) = self.places(&app.tenant, app.id).into_iter().next() else { continue };
            let flows = lock(&self.flows).of(&app.tenant, app.id).to_vec();
            let Some(home) = lock(&self.journal).ever(&app.tenant).map(|recorded| recorded.subnet) else {
                continue;
            };
            let mut closed: Vec<(Ipv4Addr, u16)> = CLOSED.to_vec();
            closed.push((home.gateway(), 22));
            closed.extend(self.stranger(&app.tenant, &flows));
            for (address, port) in closed {
                let seen = within(from.clone(), move || attempt(address, Protocol::Tcp, port, None)).await;
                if let Ok(outcome @ (ProbeOutcome::Opened | ProbeOutcome::Refused)) = seen {
                    self.machine_event(
                        "probe_alarm",
                        format!(
                            "ALARM: {}/{} gets to {address} port {port}, which must be closed ({outcome})",
                            app.tenant, app.name
                        ),
                    );
                }
            }
            for flow in flows.iter().filter(|flow| flow.protocol == Protocol::Tcp) {
                let Target::App { tenant, app: to } = &flow.target else { continue };
                let Some(peer) = self.places(tenant, *to).into_iter().next() else { continue };
                let (address, port) = (peer.address, flow.port);
                let seen =
                    within(from.clone(), move || attempt(address, Protocol::Tcp, port, Some(&peer))).await;
                if let Ok(outcome @ (ProbeOutcome::Prohibited | ProbeOutcome::Silent)) = seen {
                    self.machine_event(
                        "probe_failed",
                        format!(
                            "{}/{} does not get to {} port {port}, which is open by plan ({outcome})",
                            app.tenant, app.name, flow.name
                        ),
                    );
                }
            }
            left = left.saturating_sub(1);
            if left == 0 {
                return;
            }
        }
    }

    /// An instance of another tenant that this app may not reach, and the port that it serves on.
    fn stranger(&self, tenant: &TenantName, flows: &[crate::policy::Flow]) -> Option<(Ipv4Addr, u16)> {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.into_iter().filter(|app| app.tenant != *tenant).find_map(|app| {
            let named =
                flows.iter().any(|flow| matches!(&flow.target, Target::App { app: id, .. } if *id == app.id));
            let port = lock(&app.kept).workload.port.filter(|_| !named)?;
            Some((self.places(&app.tenant, app.id).first()?.address, port))
        })
    }
}

/// Does something within an instance's network namespace, on a thread of its own that ends with it.
async fn within<T: Send + 'static>(
    place: Place,
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let failed = |error: std::io::Error| Error::Transient(format!("the instance's network: {error}"));
    let (done, wait) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || {
            let entered = std::fs::File::open(format!("/proc/{}/ns/net", place.pid)).and_then(|file| {
                let network = Some(rustix::thread::LinkNameSpaceType::Network);
                Ok(rustix::thread::move_into_link_name_space(file.as_fd(), network)?)
            });
            let _ = done.send(entered.map(|()| what()));
        })
        .map_err(failed)?;
    wait.await.map_err(|_| Error::Transient("the probe ended".into()))?.map_err(failed)
}

fn outcome(error: &std::io::Error) -> ProbeOutcome {
    match error.kind() {
        ErrorKind::ConnectionRefused => ProbeOutcome::Refused,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => ProbeOutcome::Prohibited,
        _ => ProbeOutcome::Silent,
    }
}

fn attempt(address: Ipv4Addr, protocol: Protocol, port: u16, peer: Option<&Place>) -> ProbeOutcome {
    match protocol {
        Protocol::Tcp => match TcpStream::connect_timeout(&(address, port).into(), PATIENCE) {
            Ok(stream) => match (peer, stream.local_addr()) {
                (Some(peer), Ok(SocketAddr::V4(own))) if has_socket(peer.pid, *own.ip(), own.port()) => {
                    ProbeOutcome::Reached
                }
                _ => ProbeOutcome::Opened,
            },
            Err(error) => outcome(&error),
        },
        // Whether a datagram arrives, only its receiver knows; that it was refused is told at once.
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

/// Whether a process's network has a connection from this address and port: in the kernel's own list.
fn has_socket(pid: i32, from: Ipv4Addr, port: u16) -> bool {
    let wanted = format!("{:08X}:{port:04X}", u32::from_ne_bytes(from.octets()));
    ["tcp", "tcp6"].iter().any(|list| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{list}")).unwrap_or_default();
        text.lines()
            .any(|line| line.split_whitespace().nth(2).is_some_and(|remote| remote.ends_with(&wanted)))
    })
}
