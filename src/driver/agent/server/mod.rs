//! The agent's socket. Only the user of `serve` is answered. Frames are limited in size, time and number. Every
//! message is parsed into closed types and then checked against the journal.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::core::Agent;
use super::protocol::{MAX_FRAME, PROTOCOL, Reply, Request, split};
use crate::driver::{Error, Probe};
use crate::ids::TenantName;
use crate::permits::FairPermits;
use ensure::{ensure_app, ensure_tenant};
use remove::{remove_app, remove_tenant};
use stream::{LogReader, stream_logs};

mod ensure;
mod fetch;
mod remove;
mod stream;

pub(super) use stream::STORED;

/// Maximum number of connections; more have to wait. Long requests (logs, probes, `Observe`) have limits of their
/// own.
const CONNECTIONS: usize = 256;
/// Maximum number of concurrent requests, per tenant and in total. Requests without a tenant count as one more
/// tenant.
const WORKED_ON: (usize, usize) = (16, 128);
/// How long a request waits for its turn.
const ROOM: Duration = Duration::from_secs(20);
/// Time limit for the request of a connection to arrive.
const ARRIVE: Duration = Duration::from_secs(5);

type ClientFrames = Framed<UnixStream, LengthDelimitedCodec>;

pub(super) fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(MAX_FRAME).new_codec()
}

/// Starts answering requests.
pub(super) fn serve(agent: Arc<Agent>) -> Result<JoinHandle<()>, String> {
    let path = agent.config.socket.clone();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    // The folder's permissions limit access to the socket; the peer's user id decides whether it is answered.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .map_err(|error| error.to_string())?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    Ok(tokio::spawn(async move {
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let peer = stream.peer_cred().map(|cred| cred.uid());
            if peer.ok() != Some(agent.config.peer_uid) {
                tracing::warn!(
                    "a process of another user than serve connected to the socket and was refused"
                );
                continue;
            }
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                answer(&agent, Framed::new(stream, codec()), permit).await;
            });
        }
    }))
}

async fn send(frames: &mut ClientFrames, reply: &Reply) -> Result<(), ()> {
    let text = serde_json::to_vec(reply).map_err(|_| ())?;
    let sending = frames.send(bytes::Bytes::from(text));
    tokio::time::timeout(Duration::from_secs(10), sending).await.map_err(|_| ())?.map_err(|_| ())
}

async fn answer(agent: &Arc<Agent>, mut frames: ClientFrames, permit: OwnedSemaphorePermit) {
    let Ok(Some(Ok(frame))) = tokio::time::timeout(ARRIVE, frames.next()).await else { return };
    let reply = match serde_json::from_slice::<Request>(&frame) {
        Err(_) => Reply::Failed { error: Error::Rejected("the request cannot be parsed".into()) },
        Ok(Request::Logs { query }) => {
            drop(permit);
            if let Some(_reader) = LogReader::enter(agent, &query.tenant) {
                stream_logs(agent, &mut frames, &query).await;
            } else {
                let error = Error::Transient("too many logs are open; close some and try again".into());
                let _ = send(&mut frames, &Reply::Failed { error }).await;
            }
            return;
        }
        Ok(Request::Probe { probe: Probe { tenant, app, target, protocol, port, platform } }) => {
            // Probes have a limit of their own and block no other request.
            drop(permit);
            match agent.probe(&tenant, app, &target, (protocol, port), platform).await {
                Ok(outcome) => Reply::Probed { outcome },
                Err(error) => Reply::Failed { error },
            }
        }
        Ok(Request::ProbeTenant { tenant }) => {
            drop(permit);
            match agent.try_tenant(&tenant).await {
                Ok(probed) => Reply::ProbedTenant { probed },
                Err(error) => Reply::Failed { error },
            }
        }
        Ok(Request::Observe { cursor, wait_ms }) => {
            let wait = Duration::from_millis(u64::from(wait_ms));
            // A client that closes the connection while it waits is noticed here.
            let observed = agent.observe(cursor.as_deref(), wait).await;
            for reply in split(observed) {
                if send(&mut frames, &reply).await.is_err() {
                    return;
                }
            }
            return;
        }
        Ok(request) => match handle_in_turn(agent, request).await {
            Ok(reply) => reply,
            Err(error) => Reply::Failed { error },
        },
    };
    let _ = send(&mut frames, &reply).await;
}

/// Handles a request once its tenant has a free slot: requests of one tenant that wait for the engine block no
/// other tenant's.
async fn handle_in_turn(agent: &Arc<Agent>, request: Request) -> Result<Reply, Error> {
    let tenant = tenant_of(&request).cloned();
    let _turn = agent.turns.take(&tenant, ROOM).await.map_err(|busy| Error::Transient(busy.to_string()))?;
    handle(agent, request).await
}

fn tenant_of(request: &Request) -> Option<&TenantName> {
    match request {
        Request::EnsureTenant { grant } => Some(&grant.tenant),
        Request::EnsureApp { workload, .. } => Some(&workload.tenant),
        Request::EnsureFlows { flows } => Some(&flows.tenant),
        Request::RemoveTenant { tenant, .. }
        | Request::RemoveApp { tenant, .. }
        | Request::Denied { tenant, .. }
        | Request::ProbeTenant { tenant } => Some(tenant),
        Request::Permits { probe } | Request::Probe { probe } => Some(&probe.tenant),
        Request::Logs { query } => Some(&query.tenant),
        Request::Hello {}
        | Request::Walls {}
        | Request::Used {}
        | Request::Listeners {}
        | Request::Observe { .. } => None,
    }
}

/// Returns the permits for requests.
pub(super) fn turns() -> FairPermits<Option<TenantName>> {
    FairPermits::new(WORKED_ON.0, WORKED_ON.1)
}

async fn handle(agent: &Arc<Agent>, request: Request) -> Result<Reply, Error> {
    match request {
        Request::Hello {} => {
            Ok(Reply::Hello { installation: agent.config.installation.clone(), protocol: PROTOCOL })
        }
        Request::EnsureTenant { grant } => ensure_tenant(agent, &grant).await.map(|()| Reply::Done {}),
        Request::RemoveTenant { tenant, tenant_id } => {
            remove_tenant(agent, &tenant, tenant_id).await.map(|removal| Reply::Removal { removal })
        }
        Request::EnsureApp { workload, pull } => {
            ensure_app(agent, *workload, pull.as_ref()).await.map(|()| Reply::Done {})
        }
        Request::EnsureFlows { flows } => {
            agent.ensure_flows(flows).await.map(|number| Reply::Plan { number })
        }
        Request::Walls {} => Ok(Reply::Walls { walls: agent.walls() }),
        Request::Denied { tenant, app_id } => Ok(Reply::Denied { denied: agent.denied(&tenant, app_id) }),
        Request::Permits { probe } => Ok(Reply::Permits { permits: agent.lets_through(&probe).await }),
        Request::Used {} => Ok(Reply::Used { used: agent.used().await }),
        Request::Listeners {} => Ok(Reply::Listeners { listeners: agent.listeners().await }),
        Request::RemoveApp { tenant, app, app_id } => {
            remove_app(agent, &tenant, &app, app_id).await.map(|removal| Reply::Removal { removal })
        }
        Request::Observe { .. }
        | Request::Logs { .. }
        | Request::Probe { .. }
        | Request::ProbeTenant { .. } => {
            Err(Error::Rejected("this request is handled before this point".into()))
        }
    }
}
