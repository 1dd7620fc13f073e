//! Resolves names for tenants' apps: a process with its own user, whose only capability is to listen on port 53 of
//! the bridges. It has no data of its own: it passes each query to the agent, which answers for the app with that
//! source address. It looks up a domain outside only if the app may reach it. It answers the query only once the
//! resolved addresses are open for the app, and with a time to live within which they stay open.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{RData, RecordType};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

mod rooms;
mod wire;

use rooms::Rooms;

/// A question of the resolver to the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResolverQuestion {
    /// Asks on which addresses to listen.
    Gateways {},
    /// Asks about a name for an instance.
    Name {
        /// The instance's address.
        source: Ipv4Addr,
        /// Address of the bridge that received the query.
        gateway: Ipv4Addr,
        /// The name, in lower case, without the trailing dot.
        name: String,
    },
    /// Reports the addresses found outside for a domain that was answered with `Outside`.
    Found {
        /// The instance's address.
        source: Ipv4Addr,
        /// Address of the bridge that received the query.
        gateway: Ipv4Addr,
        /// The domain.
        domain: String,
        /// Its addresses.
        addresses: Vec<Ipv4Addr>,
        /// Time to live of the addresses, in seconds.
        ttl: u32,
    },
}

/// An answer of the agent.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResolverAnswer {
    /// Addresses of all bridges.
    Gateways {
        /// Addresses.
        gateways: Vec<Ipv4Addr>,
    },
    /// The source address belongs to no instance.
    Refused {},
    /// The app may not resolve this name, or it does not exist.
    Unknown {},
    /// The name has these addresses, which are open now.
    Known {
        /// Addresses.
        addresses: Vec<Ipv4Addr>,
        /// Time to live, in seconds.
        ttl: u32,
    },
    /// A domain that the app may reach: look it up and report the result.
    Outside {},
    /// The question cannot be answered now, or not safely.
    Failed {},
}

/// Settings; each has a default.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name servers for domains, with ports. Without any, those of /etc/resolv.conf are used.
    #[serde(default)]
    upstream: Vec<SocketAddr>,
}

impl Settings {
    /// Reads the file if it exists.
    pub fn load(path: &Path) -> Result<Self, String> {
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        if !self.upstream.is_empty() {
            return self.upstream.clone();
        }
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let address = |line: &str| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok();
        text.lines().filter_map(address).map(|address| (address, 53).into()).collect()
    }
}

/// Interval at which the agent is asked where to listen.
const LOOK: Duration = Duration::from_millis(500);
/// Time limit of an answer of the agent.
const PATIENCE: Duration = Duration::from_secs(3);
/// Maximum size of a message over TCP, in bytes.
const LARGEST: usize = 4096;
/// How long a connection may be idle, or leave an answer unread.
const SILENCE: Duration = Duration::from_secs(2);
/// Maximum duration of a connection.
const STANDS: Duration = Duration::from_secs(30);
/// Maximum number of a domain's addresses that are used.
const ADDRESSES: usize = 16;

struct Resolver {
    agent: PathBuf,
    outside: TokioResolver,
    rooms: Rooms,
}

/// Answers queries until the process ends.
pub async fn serve(agent: &Path, settings: &Settings) -> Result<(), String> {
    let servers = settings.servers();
    tracing::info!(?servers, "domains are looked up at these name servers");
    let mut config = ResolverConfig::default();
    for server in servers {
        let mut own = NameServerConfig::udp_and_tcp(server.ip());
        own.connections
            .iter_mut()
            .for_each(|connection: &mut ConnectionConfig| connection.port = server.port());
        config.add_name_server(own);
    }
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    options.use_hosts_file = ResolveHosts::Never;
    options.ndots = 0;
    options.timeout = Duration::from_secs(2);
    options.attempts = 2;
    // An address is used only within its time to live, then resolved again.
    options.positive_max_ttl = Some(Duration::from_secs(3600));
    options.negative_max_ttl = Some(Duration::from_secs(30));
    let outside = builder.build().map_err(|error| error.to_string())?;
    let resolver = Arc::new(Resolver { agent: agent.to_owned(), outside, rooms: Rooms::new() });
    let mut listening: BTreeMap<Ipv4Addr, [JoinHandle<()>; 2]> = BTreeMap::new();
    loop {
        if let Some(ResolverAnswer::Gateways { gateways }) =
            resolver.ask(&ResolverQuestion::Gateways {}).await
        {
            keep_listening(&resolver, &mut listening, &gateways).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn keep_listening(
    resolver: &Arc<Resolver>,
    listening: &mut BTreeMap<Ipv4Addr, [JoinHandle<()>; 2]>,
    gateways: &[Ipv4Addr],
) {
    listening.retain(|gateway, tasks| {
        let stays = gateways.contains(gateway) && tasks.iter().all(|task| !task.is_finished());
        if !stays {
            tasks.iter().for_each(JoinHandle::abort);
        }
        stays
    });
    for gateway in gateways {
        if listening.contains_key(gateway) {
            continue;
        }
        let bound = async {
            let udp = UdpSocket::bind((*gateway, 53)).await?;
            let tcp = TcpListener::bind((*gateway, 53)).await?;
            Ok::<_, std::io::Error>((udp, tcp))
        };
        match bound.await {
            Ok((udp, tcp)) => {
                let (one, other) = (Arc::clone(resolver), Arc::clone(resolver));
                let own = *gateway;
                let tasks =
                    [tokio::spawn(async move { one.udp(udp, own).await }), tokio::spawn(other.tcp(tcp, own))];
                listening.insert(own, tasks);
            }
            // A bridge has no address before its first instance.
            Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => {}
            Err(error) => tracing::warn!(%gateway, %error, "the resolver cannot listen on a bridge"),
        }
    }
}

impl Resolver {
    /// Asks the agent; none if it does not answer.
    async fn ask(&self, question: &ResolverQuestion) -> Option<ResolverAnswer> {
        let asked = async {
            let stream = UnixStream::connect(&self.agent).await.ok()?;
            let mut frames = Framed::new(stream, LengthDelimitedCodec::new());
            frames.send(bytes::Bytes::from(serde_json::to_vec(question).ok()?)).await.ok()?;
            serde_json::from_slice(&frames.next().await?.ok()?).ok()
        };
        tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
    }

    /// Asks the agent on behalf of a tenant.
    async fn ask_for(&self, gateway: Ipv4Addr, question: &ResolverQuestion) -> Option<ResolverAnswer> {
        let _room = self.rooms.agent(gateway).await?;
        self.ask(question).await
    }

    async fn udp(self: Arc<Self>, socket: UdpSocket, gateway: Ipv4Addr) {
        let socket = Arc::new(socket);
        let mut buffer = [0; 1500];
        loop {
            let (length, from) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    // An undeliverable answer is reported as an error on the socket; the socket itself still works.
                    tracing::debug!(%error, "a datagram cannot be received");
                    continue;
                }
            };
            let IpAddr::V4(source) = from.ip() else { continue };
            let Some(place) = self.rooms.question((gateway, source)) else { continue };
            let (own, socket, message) = (Arc::clone(&self), Arc::clone(&socket), buffer[..length].to_vec());
            tokio::spawn(async move {
                if let Some(answer) = own.answer(&message, source, gateway, wire::Over::Udp).await {
                    let _ = socket.send_to(&answer, from).await;
                }
                drop(place);
            });
        }
    }

    async fn tcp(self: Arc<Self>, listener: TcpListener, gateway: Ipv4Addr) {
        loop {
            let Ok((stream, from)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let IpAddr::V4(source) = from.ip() else { continue };
            let Some(place) = self.rooms.connection((gateway, source)) else { continue };
            let own = Arc::clone(&self);
            tokio::spawn(async move {
                let _ = tokio::time::timeout(STANDS, own.stream(stream, source, gateway)).await;
                drop(place);
            });
        }
    }

    async fn stream(&self, stream: TcpStream, source: Ipv4Addr, gateway: Ipv4Addr) {
        let codec =
            LengthDelimitedCodec::builder().length_field_length(2).max_frame_length(LARGEST).new_codec();
        let mut frames = Framed::new(stream, codec);
        while let Ok(Some(Ok(message))) = tokio::time::timeout(SILENCE, frames.next()).await {
            // The permit is held only during the query.
            let Some(place) = self.rooms.question((gateway, source)) else { return };
            let Some(answer) = self.answer(&message, source, gateway, wire::Over::Tcp).await else { return };
            drop(place);
            let sent = frames.send(bytes::Bytes::from(answer));
            if !matches!(tokio::time::timeout(SILENCE, sent).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// Returns the answer to a message; none if the message is not a query.
    async fn answer(
        &self,
        message: &[u8],
        source: Ipv4Addr,
        gateway: Ipv4Addr,
        over: wire::Over,
    ) -> Option<Vec<u8>> {
        let question = match wire::read(message) {
            Ok(question) => question,
            Err(refusal) => return refusal,
        };
        let name = question.name.clone();
        let first =
            self.ask_for(gateway, &ResolverQuestion::Name { source, gateway, name: name.clone() }).await;
        let outcome = match first {
            Some(ResolverAnswer::Outside {}) if question.wants_addresses() => {
                self.look_outside(&name, source, gateway).await
            }
            // The name exists but has no record of this type.
            Some(ResolverAnswer::Outside {}) => ResolverAnswer::Known { addresses: Vec::new(), ttl: 30 },
            Some(answer) => answer,
            None => ResolverAnswer::Failed {},
        };
        wire::write(&question, &outcome, over)
    }

    async fn look_outside(&self, domain: &str, source: Ipv4Addr, gateway: Ipv4Addr) -> ResolverAnswer {
        let Some(_room) = self.rooms.outside(gateway).await else { return ResolverAnswer::Failed {} };
        let found = match self.outside.lookup(format!("{domain}."), RecordType::A).await {
            Ok(found) => found,
            Err(error) if error.is_no_records_found() => {
                return if error.is_nx_domain() {
                    ResolverAnswer::Unknown {}
                } else {
                    ResolverAnswer::Known { addresses: Vec::new(), ttl: 30 }
                };
            }
            Err(error) => {
                tracing::info!(domain, %error, "a domain cannot be looked up");
                return ResolverAnswer::Failed {};
            }
        };
        let mut ttl = 3600;
        let mut addresses = Vec::new();
        for record in found.answers() {
            ttl = ttl.min(record.ttl);
            if let RData::A(address) = record.data {
                addresses.push(address.0);
            }
        }
        addresses.truncate(ADDRESSES);
        let found = ResolverQuestion::Found { source, gateway, domain: domain.to_owned(), addresses, ttl };
        self.ask_for(gateway, &found).await.unwrap_or(ResolverAnswer::Failed {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;

    /// A query for `web.`, type A, with its length prefix.
    fn question() -> Vec<u8> {
        let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3];
        message.extend_from_slice(b"web");
        message.extend_from_slice(&[0, 0, 1, 0, 1]);
        let mut framed = u16::try_from(message.len()).unwrap().to_be_bytes().to_vec();
        framed.extend(message);
        framed
    }

    async fn from(source: [u8; 4], to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((source, 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    async fn is_answered(stream: &mut TcpStream) -> bool {
        let mut answer = [0; 64];
        let asked = async {
            stream.write_all(&question()).await?;
            stream.read(&mut answer).await
        };
        tokio::time::timeout(Duration::from_secs(3), asked).await.is_ok_and(|n| n.is_ok_and(|n| n > 12))
    }

    /// A resolver with a bridge for each of two tenants, and an agent that knows every name.
    async fn two_bridges(folder: &Path) -> [SocketAddr; 2] {
        let agent = folder.join("agent.sock");
        let listener = tokio::net::UnixListener::bind(&agent).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut frames = Framed::new(stream, LengthDelimitedCodec::new());
                    let _ = frames.next().await;
                    let known = ResolverAnswer::Known { addresses: vec![Ipv4Addr::LOCALHOST], ttl: 5 };
                    let _ = frames.send(bytes::Bytes::from(serde_json::to_vec(&known).unwrap())).await;
                });
            }
        });
        let outside =
            TokioResolver::builder_with_config(ResolverConfig::default(), TokioRuntimeProvider::default());
        let outside = outside.build().unwrap();
        let resolver = Arc::new(Resolver { agent, outside, rooms: Rooms::new() });
        let mut bridges = Vec::new();
        for gateway in [[127, 31, 0, 1], [127, 32, 0, 1]] {
            let listener = TcpListener::bind((Ipv4Addr::from(gateway), 0)).await.unwrap();
            bridges.push(listener.local_addr().unwrap());
            tokio::spawn(Arc::clone(&resolver).tcp(listener, gateway.into()));
        }
        [bridges[0], bridges[1]]
    }

    #[tokio::test]
    async fn idle_connections_of_one_tenant_cost_another_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let [attacker, victim] = two_bridges(folder.path()).await;
        // Sixteen instances with 32 idle connections each, some of them with half a query.
        let mut idle = Vec::new();
        for instance in 2..18 {
            for n in 0..32 {
                let mut stream = from([127, 31, 0, instance], attacker).await;
                if n % 2 == 0 {
                    let _ = stream.write_all(&question()[..5]).await;
                }
                idle.push(stream);
            }
        }
        for _ in 0..12 {
            assert!(is_answered(&mut from([127, 32, 0, 2], victim).await).await);
        }
        // A neighbour of the same tenant is answered too, once the idle connections have timed out.
        tokio::time::sleep(SILENCE + Duration::from_millis(500)).await;
        assert!(is_answered(&mut from([127, 31, 0, 30], attacker).await).await);
        drop(idle);
    }

    #[tokio::test]
    async fn one_instance_does_not_take_its_tenants_room() {
        let rooms = Rooms::new();
        let (gateway, other) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 4, 1));
        let greedy: Vec<_> =
            (0..100).filter_map(|_| rooms.question((gateway, Ipv4Addr::new(10, 0, 0, 2)))).collect();
        assert_eq!(greedy.len(), 32);
        assert!(rooms.question((gateway, Ipv4Addr::new(10, 0, 0, 3))).is_some());
        // Many tenants at their limits leave room for one more.
        let many: Vec<_> = (0..2000_u32)
            .filter_map(|n| rooms.question((Ipv4Addr::from((11 << 24) | (n % 20)), Ipv4Addr::from(n))))
            .collect();
        assert!(rooms.question((other, Ipv4Addr::new(10, 0, 4, 2))).is_some());
        // Outside look-ups have permits of their own.
        let mut outside = Vec::new();
        while let Ok(Some(room)) =
            tokio::time::timeout(Duration::from_millis(20), rooms.outside(gateway)).await
        {
            outside.push(room);
        }
        assert_eq!(outside.len(), 16);
        assert!(rooms.outside(other).await.is_some());
        drop((greedy, many));
    }
}
