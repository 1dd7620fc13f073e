//! The socket of the root half. Only `serve`'s user is answered; frames are bounded in size, time
//! and number; every message is parsed into closed types and then held against the journal.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::app::{App, discard};
use super::check;
use super::core::{Agent, Gate, lock};
use super::kept::Kept;
use super::logs;
use super::protocol::{MAX_FRAME, PROTOCOL, Reply, Request, split};
use crate::driver::disk::{self, Part};
use crate::driver::podman::{ports, render};
use crate::driver::workload::{TenantGrant, Workload};
use crate::driver::{Error, LogQuery, Probe, PullSecret, Removal, listener};
use crate::ids::{AppId, AppName, TenantId, TenantName};
use crate::permits::FairPermits;

/// Most connections at once; more have to wait. What waits long (logs, probes, `Observe`) has room of its own.
const CONNECTIONS: usize = 256;
/// Most requests that are worked on at once, of one tenant and in all. Requests of no tenant count as one more tenant.
const WORKED_ON: (usize, usize) = (16, 128);
/// How long a request waits for its turn.
const ROOM: Duration = Duration::from_secs(20);
/// Most readers of logs at once, in all and of one tenant.
const READERS: usize = 128;
const READERS_OF_TENANT: usize = 16;
/// Readers whose stored lines are held at once, of one tenant and in all, and how long they are.
pub(super) const STORED: (usize, usize) = (2, 32);
const STORED_WITHIN: Duration = Duration::from_secs(300);
/// How long the one request of a connection may take to arrive.
const ARRIVE: Duration = Duration::from_secs(5);

type Frames = Framed<UnixStream, LengthDelimitedCodec>;

pub(super) fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(MAX_FRAME).new_codec()
}

/// Starts to answer.
pub(super) fn serve(agent: Arc<Agent>) -> Result<JoinHandle<()>, String> {
    let path = agent.config.socket.clone();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    // The folder decides who reaches the socket, the peer's id who is answered.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .map_err(|error| error.to_string())?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    Ok(tokio::spawn(async move {
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let peer = stream.peer_cred().map(|cred| cred.uid());
            if peer.ok() != Some(agent.config.peer_uid) {
                tracing::warn!("somebody who is not serve knocked and was not answered");
                continue;
            }
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                answer(&agent, Framed::new(stream, codec()), permit).await;
            });
        }
    }))
}

async fn send(frames: &mut Frames, reply: &Reply) -> Result<(), ()> {
    let text = serde_json::to_vec(reply).map_err(|_| ())?;
    let sending = frames.send(bytes::Bytes::from(text));
    tokio::time::timeout(Duration::from_secs(10), sending).await.map_err(|_| ())?.map_err(|_| ())
}

async fn answer(agent: &Arc<Agent>, mut frames: Frames, permit: OwnedSemaphorePermit) {
    let Ok(Some(Ok(frame))) = tokio::time::timeout(ARRIVE, frames.next()).await else { return };
    let reply = match serde_json::from_slice::<Request>(&frame) {
        Err(_) => Reply::Failed { error: Error::Rejected("the message cannot be read".into()) },
        Ok(Request::Logs { query }) => {
            drop(permit);
            if let Some(_reader) = Reader::enter(agent, &query.tenant) {
                stream_logs(agent, &mut frames, &query).await;
            } else {
                let error = Error::Transient("too many logs are being read; close some".into());
                let _ = send(&mut frames, &Reply::Failed { error }).await;
            }
            return;
        }
        Ok(Request::Probe { probe: Probe { tenant, app, target, protocol, port, platform } }) => {
            // It has room of its own: whoever probes holds up nothing else.
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
            // Whoever hangs up while it waits is let go.
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

/// Works on a request once its tenant has room: one tenant's requests that wait for the engine hold up no other's.
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

/// Room for requests.
pub(super) fn turns() -> FairPermits<Option<TenantName>> {
    FairPermits::new(WORKED_ON.0, WORKED_ON.1)
}

/// Somebody who reads a log; counted while it lives.
struct Reader {
    agent: Arc<Agent>,
    tenant: TenantName,
}

impl Reader {
    fn enter(agent: &Arc<Agent>, tenant: &TenantName) -> Option<Self> {
        let mut readers = lock(&agent.readers);
        let own = readers.get(tenant).copied().unwrap_or(0);
        if own >= READERS_OF_TENANT || readers.values().sum::<usize>() >= READERS {
            return None;
        }
        readers.insert(tenant.clone(), own + 1);
        drop(readers);
        Some(Self { agent: Arc::clone(agent), tenant: tenant.clone() })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut readers = lock(&self.agent.readers);
        match readers.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(readers.remove(&self.tenant)),
        }
    }
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
        | Request::ProbeTenant { .. } => Err(Error::Rejected("this is answered elsewhere".into())),
    }
}

async fn ensure_tenant(agent: &Agent, grant: &TenantGrant) -> Result<(), Error> {
    fail::fail_point!("agent::journal", |_| Err(Error::Transient("failpoint".into())));
    lock(&agent.journal).claim_tenant(&agent.config, grant).map_err(Error::Rejected)?;
    lock(&agent.limits).take(&grant.tenant, &grant.limits)?;
    agent.ensure_group(&grant.tenant)?;
    agent.ensure_network(&grant.tenant).await
}

async fn remove_tenant(agent: &Agent, tenant: &TenantName, id: TenantId) -> Result<Removal, Error> {
    let recorded = lock(&agent.journal).ever(tenant).cloned();
    let Some(recorded) = recorded else { return Ok(Removal::Gone) };
    if recorded.tenant_id != id {
        return Err(Error::Rejected("the journal has another identity for this tenant".into()));
    }
    if lock(&agent.apps).values().any(|app| app.tenant == *tenant) {
        return Err(Error::Transient("the tenant still has apps here".into()));
    }
    let bridge = agent.config.bridge(recorded.network);
    agent.podman.remove_network(&bridge).await?;
    if agent.podman.networks().await?.contains(&bridge) || !ports::remove_bridge(&bridge).await? {
        return Ok(Removal::Underway);
    }
    lock(&agent.journal).retire(tenant).map_err(Error::Transient)?;
    lock(&agent.flows).forget(tenant);
    agent.forget_group(tenant);
    lock(&agent.denials).remove(tenant);
    Ok(Removal::Gone)
}

async fn ensure_app(agent: &Arc<Agent>, workload: Workload, pull: Option<&PullSecret>) -> Result<(), Error> {
    {
        let mut journal = lock(&agent.journal);
        let recorded = journal
            .tenant(&workload.tenant)
            .cloned()
            .ok_or_else(|| Error::Rejected("this tenant is not in the journal".into()))?;
        check::check(&workload, &recorded).map_err(Error::Rejected)?;
        journal
            .claim_block(&agent.config, &workload.tenant, &workload.app, workload.app_id, workload.block)
            .map_err(Error::Rejected)?;
    }
    // One at a time for an app: two of them would each make a task of its own for it.
    let gate = agent.gate(workload.app_id);
    let _turn = gate.turn.lock().await;
    let known = agent.app(workload.app_id);
    if let Some(app) = &known {
        fence(&workload, &lock(&app.kept))?;
    }
    let image = render::image(&agent.config, &workload);
    // Held until the app is on record: what is fetched now is not taken for left over.
    let _held = agent.images.hold(&image).await;
    // Where nothing is to run, nothing is fetched.
    if workload.instances > 0 && !agent.podman.has_image(&image).await? {
        fetch(agent, &workload, &image, pull, &gate).await?;
        fail::fail_point!("agent::pulled", |_| Err(Error::Transient("failpoint".into())));
    }
    if gate.leave.is_cancelled() || lock(&agent.journal).is_removed(workload.app_id) {
        return Err(Error::Conflict("the app is being removed".into()));
    }
    put_on_record(agent, workload, known).await?;
    agent.refresh_firewall().await
}

/// The engine gets a credential only for a port that `serve` itself listens on: while `serve` is down, any user of the
/// machine can take the port.
fn require_own_door(host: &str, uid: u32) -> Result<(), Error> {
    let door = host.parse().map_err(|_| Error::Rejected(format!("pull_host {host} is not an address")))?;
    listener::require(door, uid).map_err(|foreign| {
        tracing::error!(host, %foreign, "ALARM: the port for pulls is not serve's; nothing is sent to it");
        Error::Transient(format!(
            "the image is not fetched: the port for pulls ({host}) is not serve's: {foreign}; trying again"
        ))
    })
}

/// Writes down what shall run, on the disk before it is believed: a full disk must not leave the two
/// apart.
async fn put_on_record(agent: &Arc<Agent>, workload: Workload, known: Option<Arc<App>>) -> Result<(), Error> {
    // Two apps of one tenant never have one address, and no second app has this one's name: one after another. The
    // table of apps itself is not locked while the disk is waited for.
    let _turn = agent.recording.lock().await;
    clash(&workload, lock(&agent.apps).values())?;
    let Some(app) = known else {
        let kept = Kept::new(workload);
        tokio::task::block_in_place(|| kept.save(&agent.apps_dir()))
            .map_err(|error| Error::Transient(error.to_string()))?;
        let id = kept.workload.app_id;
        let app = App::spawn(Arc::clone(agent), kept);
        lock(&agent.apps).insert(id, app);
        return Ok(());
    };
    let mut kept = lock(&app.kept);
    fence(&workload, &kept)?;
    if kept.workload != workload {
        let mut next = kept.clone();
        if next.workload.revision != workload.revision && next.keeps_running(&workload) {
            next.scale(&workload);
        } else if next.workload.revision != workload.revision {
            if next.proven {
                next.previous = Some(next.workload.clone());
            }
            next.proven = false;
            next.strikes = 0;
            next.put_aside = None;
            next.put_aside_at = None;
            next.message = None;
            next.event("release", format!("release {} takes over", workload.revision));
        }
        next.workload = workload;
        tokio::task::block_in_place(|| next.save(&agent.apps_dir()))
            .map_err(|error| Error::Transient(error.to_string()))?;
        *kept = next;
    }
    drop(kept);
    app.wake.notify_one();
    Ok(())
}

/// The most that a generation or revision may rise at once: else one message could shut out every
/// honest one for ever.
const LEAP: i64 = 100_000;

fn fence(workload: &Workload, kept: &Kept) -> Result<(), Error> {
    let known = &kept.workload;
    if kept.removing {
        return Err(Error::Conflict("the app is being removed".into()));
    }
    if (workload.generation, workload.epoch) < (known.generation, known.epoch)
        || workload.revision < known.revision
    {
        return Err(Error::Conflict("a newer generation or epoch was here".into()));
    }
    if workload.generation - known.generation > LEAP || workload.revision - known.revision > LEAP {
        return Err(Error::Rejected("a generation or revision rises by too much".into()));
    }
    Ok(())
}

fn clash<'a>(workload: &Workload, mut apps: impl Iterator<Item = &'a Arc<App>>) -> Result<(), Error> {
    let clash = apps.any(|app| {
        app.id != workload.app_id
            && app.tenant == workload.tenant
            && (app.name == workload.app
                || lock(&app.kept).addresses().iter().any(|own| workload.addresses.contains(own)))
    });
    if clash {
        let why = "another app of the tenant still has this name or one of these addresses";
        return Err(Error::Transient(why.into()));
    }
    Ok(())
}

/// How long a fetch waits for its turn.
const TURN: Duration = Duration::from_secs(60);

/// Fetches an image: few at a time, one of each tenant, and only what the disk has room for.
async fn fetch(
    agent: &Agent,
    workload: &Workload,
    image: &str,
    pull: Option<&PullSecret>,
    gate: &Gate,
) -> Result<(), Error> {
    let secret =
        pull.ok_or_else(|| Error::Transient("the image is not here and there is no credential".into()))?;
    let recorded = agent.fetching.record(workload, secret.bytes());
    let waiting = agent.fetches.take(&workload.tenant, TURN);
    let turn = tokio::select! {
        turn = waiting => turn,
        () = gate.leave.cancelled() => return Err(Error::Conflict("the app is being removed".into())),
    };
    let _turn = turn.map_err(|_| {
        Error::Transient("other images are being fetched; this one has its turn after them".into())
    })?;
    // Another app of the tenant may have had the same image.
    if agent.podman.has_image(image).await? {
        return Ok(());
    }
    require_own_door(&agent.config.pull_host, agent.config.peer_uid)?;
    // Packed and unpacked, it lies there twice for a moment.
    let (storage, needed) = (&agent.config.engine_storage, secret.bytes().saturating_mul(2));
    let full = || Error::Transient("the machine has no room to unpack this image".into());
    if disk::room(Part::Engine, storage).is_some_and(|room| !room.has(needed)) {
        tracing::error!(storage = %storage.display(), needed, "no image is fetched: the rest of the disk is kept free");
        return Err(full());
    }
    tokio::select! {
        done = agent.fetcher.fetch(image, secret, |folder| recorded.begin(folder.to_owned())) => done,
        () = gate.leave.cancelled() => Err(Error::Conflict("the app is being removed".into())),
        () = no_room(storage) => Err(full()),
    }
}

/// Returns when the disk runs full: an image of an earlier version was never measured.
async fn no_room(storage: &std::path::Path) {
    loop {
        if disk::room(Part::Engine, storage).is_some_and(|room| !room.has(0)) {
            tracing::error!(storage = %storage.display(), "the disk runs full: no image is unpacked");
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn remove_app(
    agent: &Arc<Agent>,
    tenant: &TenantName,
    name: &AppName,
    id: AppId,
) -> Result<Removal, Error> {
    let recorded = lock(&agent.journal).app(id).map(|(tenant, app)| (tenant.clone(), app.clone()));
    match recorded {
        None => return Ok(Removal::Gone),
        Some(own) if own != (tenant.clone(), name.clone()) => {
            return Err(Error::Rejected("the journal has another tenant or name for this app".into()));
        }
        Some(_) => {}
    }
    // What is being fetched for it is given up; until that has ended, it is not gone.
    let gate = agent.gate(id);
    gate.leave.cancel();
    let Ok(_turn) = gate.turn.try_lock() else { return Ok(Removal::Underway) };
    // From here on nobody can bring it back: its identity is never given again. On record before the engine is asked
    // anything: an engine that hangs keeps no app.
    lock(&agent.journal).remove_app(id).map_err(Error::Transient)?;
    let app = agent.app(id);
    if let Some(app) = &app {
        let mut kept = lock(&app.kept);
        if !kept.removing {
            kept.removing = true;
            tokio::task::block_in_place(|| kept.save(&agent.apps_dir()))
                .map_err(|error| Error::Transient(error.to_string()))?;
        }
        drop(kept);
        app.wake.notify_one();
    }
    let installation = agent.config.installation.as_str();
    let containers = agent.podman.list(installation, agent.engine.patience()).await?;
    let own: Vec<String> = containers
        .iter()
        .filter(|c| c.app() == Some(id.to_string().as_str()))
        .map(|c| c.name().to_owned())
        .collect();
    let _waiting = agent.engine.beside();
    let Some(app) = app else {
        for name in &own {
            discard(agent, name).await?;
        }
        if !own.is_empty() {
            return Ok(Removal::Underway);
        }
        lock(&agent.gates).remove(&id);
        return Ok(Removal::Gone);
    };
    let empty = lock(&app.kept).instances.is_empty();
    if !empty || !own.is_empty() {
        return Ok(Removal::Underway);
    }
    app.end();
    lock(&app.kept).delete(&agent.apps_dir());
    let _ = std::fs::remove_dir_all(agent.logs_dir(id));
    lock(&agent.apps).remove(&id);
    lock(&agent.gates).remove(&id);
    agent.tidy.notify_one();
    agent.refresh_firewall().await?;
    Ok(Removal::Gone)
}

async fn stream_logs(agent: &Arc<Agent>, frames: &mut Frames, query: &LogQuery) {
    let Some(app) = agent.app(query.app_id).filter(|app| app.tenant == query.tenant && app.name == query.app)
    else {
        let _ = send(frames, &Reply::Done {}).await;
        return;
    };
    // Subscribed first, so that no line falls between the stored and the live ones.
    let mut live = app.lines.subscribe();
    let dir = agent.logs_dir(app.id);
    let (instance, count) = (query.instance, query.tail.clamp(1, 10_000) as usize);
    // What is stored is held in memory until it is sent: few at a time, and not for long.
    let Ok(room) = agent.stored.take(&query.tenant, ROOM).await else {
        let error = Error::Transient("many logs are being read; ask again in a moment".into());
        let _ = send(frames, &Reply::Failed { error }).await;
        return;
    };
    let stored =
        tokio::task::spawn_blocking(move || logs::last(&dir, instance, count)).await.unwrap_or_default();
    let newest = stored.last().map(|line| line.at);
    let sending = async {
        for line in stored {
            send(frames, &Reply::Log { line }).await?;
        }
        Ok::<_, ()>(())
    };
    if !matches!(tokio::time::timeout(STORED_WITHIN, sending).await, Ok(Ok(()))) {
        return;
    }
    drop(room);
    if !query.follow {
        let _ = send(frames, &Reply::Done {}).await;
        return;
    }
    let leaving = app.leaving();
    drop(app);
    loop {
        tokio::select! {
            line = live.recv() => {
                let line = match line {
                    Ok(line) => line,
                    // Whoever reads too slowly loses lines, not the app its speed; and is told.
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(n)) => crate::driver::LogLine {
                        instance: query.instance.unwrap_or(0),
                        at: time::OffsetDateTime::now_utc(),
                        stream: crate::driver::LogStreamName::Platform,
                        text: format!("{n} lines are not shown: they came faster than they were read"),
                    },
                    Err(_) => break,
                };
                let wanted = query.instance.is_none_or(|n| n == line.instance) && newest.is_none_or(|at| line.at > at);
                if wanted && send(frames, &Reply::Log { line }).await.is_err() {
                    return;
                }
            }
            // Anything from the other side, its end included, ends the stream.
            _ = frames.next() => return,
            () = leaving.cancelled() => break,
        }
    }
    let _ = send(frames, &Reply::Done {}).await;
}
