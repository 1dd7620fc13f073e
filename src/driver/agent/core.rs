//! The agent's state, startup and background tasks: it keeps the firewall and the networks correct and reports what
//! it observes.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::app::{self, AgentApp};
use super::config::AgentConfig;
use super::engine::Engine;
use super::fetching::Fetches;
use super::flows::Flows;
use super::images::{self, Images};
use super::journal::Journal;
use super::kept::AppRecord;
use super::limits::LimitBook;
use super::network::{DeniedConnections, Depth, Gone, InForce, minding};
use super::pace::Paces;
use super::{names, server};
use crate::driver::podman::cgroups::{self, Groups};
use crate::driver::podman::client::{ListedContainer, Podman};
use crate::driver::podman::firewall;
use crate::driver::podman::neighbours;
use crate::driver::podman::oom::OutOfMemory;
use crate::driver::podman::ports::Port;
use crate::driver::podman::pull::Fetcher;
use crate::driver::podman::seccomp;
use crate::driver::{AppEvent, HostSocket, InstanceState, ObservedChanges};
use crate::ids::{AppId, TenantName};
use crate::permits::FairPermits;
use crate::policy::never;
use crate::readiness;

/// Interval of the engine's listings.
const LOOK: Duration = Duration::from_millis(400);
/// Interval of the firewall table's checks.
const WATCH: Duration = Duration::from_secs(1);
/// Every n-th of these checks also compares the table's sets.
const SETS: u64 = 30;
/// Interval of probes of allowed and denied connections.
const PROBE: Duration = Duration::from_secs(60);
/// Maximum number of concurrent image fetches, per tenant and in total.
const FETCHES: (usize, usize) = (1, 3);
/// How long the agent waits for the engine at startup before it starts without it.
const START: Duration = Duration::from_secs(10);
/// Interval of the networks' checks.
const NETWORKS: Duration = Duration::from_secs(5);

/// The engine's last list of containers, and a count that rises with each listing.
#[derive(Debug, Clone, Default)]
pub(super) struct Listing {
    pub(super) round: u64,
    /// Time of the listing; none before the first.
    pub(super) at: Option<tokio::time::Instant>,
    pub(super) containers: Arc<HashMap<String, ListedContainer>>,
}

/// The agent.
pub(super) struct Agent {
    pub(super) config: AgentConfig,
    pub(super) podman: Podman,
    pub(super) engine: Engine,
    pub(super) oom: OutOfMemory,
    /// The system call filter of every instance.
    pub(super) filter: PathBuf,
    pub(super) journal: Mutex<Journal>,
    /// Resource limits of each tenant.
    pub(super) limits: Mutex<LimitBook>,
    /// The control groups that enforce these limits.
    pub(super) groups: Groups,
    pub(super) apps: Mutex<HashMap<AppId, Arc<AgentApp>>>,
    pub(super) listing: watch::Sender<Listing>,
    /// Notified to request a listing at once.
    pub(super) look: Notify,
    pub(super) firewall: tokio::sync::Mutex<Option<InForce>>,
    /// The allowed flows of each tenant's apps.
    pub(super) flows: Mutex<Flows>,
    /// Addresses resolved for domains.
    pub(super) found: Mutex<names::ResolvedNames>,
    /// The machine's own addresses.
    pub(super) own: Mutex<Vec<crate::policy::never::Range>>,
    /// Permits for requested probes.
    pub(super) probes: tokio::sync::Semaphore,
    /// Permits for the platform's own probes.
    pub(super) platform_probes: tokio::sync::Semaphore,
    /// Probe results that were reported as an event, and the time of the last report.
    pub(super) told: Mutex<HashMap<String, std::time::Instant>>,
    /// Counts of connections that are about to be closed.
    pub(super) counts: Mutex<super::network::Counts>,
    /// Number of probes under way for a tenant.
    pub(super) probing: Mutex<HashMap<TenantName, usize>>,
    /// Recent probes of the platform from an instance: source, target, port.
    pub(super) tried: Mutex<HashMap<(std::net::Ipv4Addr, std::net::Ipv4Addr, u16), std::time::Instant>>,
    /// Ports of instances that an earlier version configured differently and that could not be reconfigured yet.
    pub(super) unsettled: Mutex<HashSet<Port>>,
    /// Ports found without a lock to their MAC address. Their app closes them.
    pub(super) unlocked: Mutex<HashSet<Port>>,
    /// Time of the last report that the connection tracking table is nearly full.
    pub(super) crowded: Mutex<Option<std::time::Instant>>,
    /// The machine's listening sockets, and when they were read.
    pub(super) listening: tokio::sync::Mutex<Option<(std::time::Instant, Vec<HostSocket>)>>,
    /// Connections to close because their rule is gone.
    pub(super) gone: Mutex<BTreeSet<Gone>>,
    /// Notified when `gone` is not empty.
    pub(super) cut: Notify,
    /// Recently denied connections.
    pub(super) denials: Mutex<DeniedConnections>,
    version: Mutex<u64>,
    changed: Notify,
    /// Held for reading while an image is fetched and not yet recorded; held for writing while images are removed.
    pub(super) images: Images,
    /// Held while an app is recorded.
    pub(super) recording: tokio::sync::Mutex<()>,
    /// Permits to inspect an image.
    pub(super) looks: FairPermits<TenantName>,
    /// Permits to read stored log lines.
    pub(super) stored: FairPermits<TenantName>,
    /// Fetches images.
    pub(super) fetcher: Fetcher,
    /// Images that are being fetched, and their progress.
    pub(super) fetching: Fetches,
    /// Permits to fetch, per tenant and in total.
    pub(super) fetches: FairPermits<TenantName>,
    /// Permits for requests of `serve`, by tenant.
    pub(super) turns: FairPermits<Option<TenantName>>,
    /// Results of inspecting images, by image id.
    pub(super) looked: Mutex<HashMap<String, super::app::ImageInspection>>,
    /// Notified after a release has taken over or an app was removed: images may be unused.
    pub(super) tidy: Notify,
    /// Log pipes that existed when the agent started, until the reader of their instance takes them.
    pub(super) pipes: Mutex<app::Pipes>,
    /// Rate limits of reading logs, per tenant and in total.
    pub(super) log_paces: Mutex<Paces<TenantName>>,
    /// Number of log readers of a tenant.
    pub(super) readers: Mutex<HashMap<TenantName, usize>>,
    /// Serialises changes of an app's record.
    pub(super) gates: Mutex<HashMap<AppId, Arc<Gate>>>,
    boot: String,
    machine: Mutex<VecDeque<AppEvent>>,
}

/// Serialises changes of an app's record: one at a time, and none once the app is being removed.
#[derive(Default)]
pub(super) struct Gate {
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) leave: CancellationToken,
}

/// Locks a mutex. A panic in one task does not make the shared state unusable for all others.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs the agent until it is asked to stop. Containers keep running.
pub async fn run(config: AgentConfig, stop: impl Future<Output = ()>) -> Result<(), String> {
    let agent = Agent::open(config).await?;
    agent.note_own_addresses().await;
    agent.refresh_firewall().await.map_err(|error| error.to_string())?;
    // Subscribed before the bridges are checked: no change in between is missed.
    let ear = neighbours::forgetting().inspect_err(
        |error| tracing::warn!(%error, "no netlink events; bridges are checked every few seconds"),
    );
    agent.adopt().await?;
    let looking = tokio::spawn(looking(Arc::clone(&agent)));
    let watching = tokio::spawn(watching(Arc::clone(&agent)));
    let keeping = tokio::spawn(keeping(Arc::clone(&agent)));
    let tidying = tokio::spawn(images::tidying(Arc::clone(&agent)));
    let hearing = tokio::spawn(hearing(Arc::clone(&agent)));
    let minding = match ear {
        Ok(ear) => tokio::spawn(minding(Arc::clone(&agent), ear)),
        Err(_) => tokio::spawn(async {}),
    };
    let probing = tokio::spawn(probing(Arc::clone(&agent)));
    let cutting = tokio::spawn(cutting(Arc::clone(&agent)));
    let serving = server::serve(Arc::clone(&agent))?;
    let naming = names::serve(Arc::clone(&agent))?;
    tracing::info!(installation = %agent.config.installation, "the agent is ready");
    readiness::ready();
    stop.await;
    for task in [looking, watching, keeping, tidying, hearing, minding, probing, cutting, naming, serving] {
        task.abort();
    }
    let apps: Vec<_> = lock(&agent.apps).values().cloned().collect();
    for app in apps {
        app.end();
    }
    Ok(())
}

impl Agent {
    async fn open(config: AgentConfig) -> Result<Arc<Self>, String> {
        for folder in ["", "apps", "logs"] {
            let path = config.state_dir.join(folder);
            std::fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        // First of all: a monitor that waits for its log's reader blocks the engine.
        let pipes = app::open_all(&config.state_dir.join("logs"));
        let journal = Journal::open(&config.state_dir.join("journal"))?;
        let flows = Flows::open(&config.state_dir.join("flows")).map_err(|error| error.to_string())?;
        let limits = LimitBook::open(&config.state_dir.join("limits")).map_err(|error| error.to_string())?;
        let filter = seccomp::install(&config.state_dir)
            .map_err(|error| format!("the system call filter cannot be written: {error}"))?;
        let podman = Podman::new(&config.engine_socket).map_err(|error| error.to_string())?;
        let fetcher = Fetcher::new(config.engine(), config.installation.as_str());
        fetcher.sweep();
        await_engine(&podman).await;
        Ok(Arc::new(Self {
            podman,
            engine: Engine::new(),
            oom: OutOfMemory::open(),
            filter,
            journal: Mutex::new(journal),
            limits: Mutex::new(limits),
            groups: Groups::below(Path::new(cgroups::ROOT)),
            apps: Mutex::new(HashMap::new()),
            listing: watch::Sender::new(Listing::default()),
            look: Notify::new(),
            firewall: tokio::sync::Mutex::new(None),
            flows: Mutex::new(flows),
            found: Mutex::default(),
            own: Mutex::new(config.closed.iter().map(|network| never::configured(*network)).collect()),
            probes: tokio::sync::Semaphore::new(8),
            platform_probes: tokio::sync::Semaphore::new(4),
            told: Mutex::default(),
            counts: Mutex::default(),
            probing: Mutex::default(),
            tried: Mutex::default(),
            unsettled: Mutex::default(),
            unlocked: Mutex::default(),
            crowded: Mutex::default(),
            listening: tokio::sync::Mutex::default(),
            gone: Mutex::default(),
            cut: Notify::new(),
            denials: Mutex::default(),
            version: Mutex::new(1),
            changed: Notify::new(),
            images: Images::default(),
            recording: tokio::sync::Mutex::new(()),
            looks: FairPermits::new(app::LOOKS.0, app::LOOKS.1),
            stored: FairPermits::new(server::STORED.0, server::STORED.1),
            fetcher,
            fetching: Fetches::default(),
            fetches: FairPermits::new(FETCHES.0, FETCHES.1),
            turns: server::turns(),
            looked: Mutex::default(),
            tidy: Notify::new(),
            pipes: Mutex::new(pipes),
            log_paces: Mutex::new(app::paces()),
            readers: Mutex::new(HashMap::new()),
            gates: Mutex::new(HashMap::new()),
            boot: data_encoding::HEXLOWER.encode(&rand::random::<[u8; 8]>()),
            machine: Mutex::new(VecDeque::new()),
            config,
        }))
    }

    pub(super) fn apps_dir(&self) -> PathBuf {
        self.config.state_dir.join("apps")
    }

    pub(super) fn logs_dir(&self, app: AppId) -> PathBuf {
        self.config.state_dir.join("logs").join(app.to_string())
    }

    /// Resumes from the recorded state: finds everything that runs, and starts everything that should run and does
    /// not.
    async fn adopt(self: &Arc<Self>) -> Result<(), String> {
        let all = AppRecord::load_all(&self.apps_dir()).map_err(|error| error.to_string())?;
        self.settle(&all).await;
        for mut kept in all {
            // A power failure may restore the file of a removed app. The id of a removed app is never used again.
            kept.removing |= lock(&self.journal).is_removed(kept.workload.app_id);
            let app = AgentApp::spawn(Arc::clone(self), kept);
            lock(&self.apps).insert(app.id, app);
        }
        self.keep_neighbours().await;
        self.refresh_firewall().await.map_err(|error| error.to_string())
    }

    pub(super) fn app(&self, id: AppId) -> Option<Arc<AgentApp>> {
        lock(&self.apps).get(&id).cloned()
    }

    pub(super) fn gate(&self, id: AppId) -> Arc<Gate> {
        Arc::clone(lock(&self.gates).entry(id).or_default())
    }

    /// Returns the addresses of an app's running instances.
    pub(super) fn running(&self, tenant: &TenantName, app: AppId) -> Vec<std::net::Ipv4Addr> {
        let Some(app) = self.app(app).filter(|app| app.tenant == *tenant) else { return Vec::new() };
        let kept = lock(&app.kept);
        let running = kept.instances.iter().filter(|i| i.state == InstanceState::Running);
        running.filter_map(|i| kept.address_of(i)).collect()
    }

    pub(super) fn bridge_of(&self, tenant: &TenantName) -> Option<String> {
        lock(&self.journal).ever(tenant).map(|recorded| self.config.bridge(recorded.network))
    }

    pub(super) fn machine_event(&self, kind: &str, text: String) {
        tracing::warn!(kind, text, "machine");
        let mut version = lock(&self.version);
        *version += 1;
        let seq = *version;
        let mut machine = lock(&self.machine);
        machine.push_back(AppEvent { seq, at: OffsetDateTime::now_utc(), kind: kind.into(), text });
        while machine.len() > 200 {
            // Alarms are dropped last.
            let plain = machine.iter().position(|event| event.kind != "probe_alarm").unwrap_or(0);
            machine.remove(plain);
        }
        drop(machine);
        drop(version);
        self.changed.notify_waiters();
    }

    /// Announces a change of an app. The app stores the new version before a reader can see it. Otherwise a reader
    /// in between would never get this change.
    pub(super) fn touch(&self, own: &AtomicU64) {
        let mut version = lock(&self.version);
        *version += 1;
        own.store(*version, Ordering::Relaxed);
        drop(version);
        self.changed.notify_waiters();
    }

    /// Returns the changes since a cursor. Waits for a change if there is none.
    pub(super) async fn observe(&self, cursor: Option<&str>, wait: Duration) -> ObservedChanges {
        let since = cursor
            .and_then(|cursor| cursor.split_once(':'))
            .filter(|(boot, _)| *boot == self.boot)
            .and_then(|(_, version)| version.parse::<u64>().ok());
        let deadline = tokio::time::Instant::now() + wait.min(Duration::from_secs(30));
        let rounds = self.fetching.rounds();
        loop {
            let notified = self.changed.notified();
            let version = *lock(&self.version);
            let after = since.unwrap_or(0);
            let list: Vec<Arc<AgentApp>> = lock(&self.apps).values().cloned().collect();
            let apps: Vec<_> =
                list.iter().filter(|app| app.version() > after).map(|app| app.observed(self)).collect();
            let machine: Vec<_> =
                lock(&self.machine).iter().filter(|event| event.seq > after).cloned().collect();
            let fetched = self.fetching.rounds() != rounds;
            if since.is_none() || fetched || !apps.is_empty() || !machine.is_empty() {
                let cursor = format!("{}:{version}", self.boot);
                let engine = self.engine.seen();
                let fetches = self.fetching.seen();
                return ObservedChanges { cursor, complete: since.is_none(), apps, machine, engine, fetches };
            }
            let something = async {
                tokio::select! {
                    () = notified => {}
                    () = self.fetching.changed() => {}
                }
            };
            if tokio::time::timeout_at(deadline, something).await.is_err() {
                let cursor = format!("{}:{version}", self.boot);
                let engine = self.engine.seen();
                let fetches = self.fetching.seen();
                return ObservedChanges { cursor, complete: false, apps, machine, engine, fetches };
            }
        }
    }
}

/// Waits for an engine that is just starting. It does not wait for an engine that hangs: instances are watched
/// without it, and the engine is killed.
async fn await_engine(podman: &Podman) {
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < START {
        let asked = tokio::time::Instant::now();
        match podman.ping().await {
            Ok(()) => return,
            Err(error) if asked.elapsed() > Duration::from_secs(1) => {
                tracing::warn!(%error, "the engine does not answer in time; the agent starts without it");
                return;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    tracing::warn!("the engine is not up; the agent starts without it");
}

/// Lists the engine's containers in a loop and wakes all apps. Apps are woken even if the engine does not answer:
/// their processes are checked without it.
async fn looking(agent: Arc<Agent>) {
    let mut round = 0;
    loop {
        tokio::task::block_in_place(|| agent.oom.advance());
        let asked = tokio::time::Instant::now();
        let installation = agent.config.installation.clone();
        let mut listing = std::pin::pin!(agent.podman.list(installation.as_str(), agent.engine.patience()));
        let answer = loop {
            tokio::select! {
                answer = &mut listing => break answer,
                () = tokio::time::sleep(LOOK) => {
                    tokio::task::block_in_place(|| agent.oom.advance());
                    agent.listing.send_modify(|_| {});
                }
            }
        };
        match answer {
            Ok(list) => {
                if agent.engine.answered(asked.elapsed()) {
                    agent.machine_event("engine_answers", "the container engine answers again".to_owned());
                }
                round += 1;
                let containers = list.into_iter().map(|c| (c.name().to_owned(), c)).collect();
                let at = Some(tokio::time::Instant::now());
                agent.listing.send_replace(Listing { round, at, containers: Arc::new(containers) });
            }
            Err(error) => {
                if agent.engine.silent() {
                    tracing::warn!(%error, "the engine does not list its containers");
                }
                // If nothing listens on the socket, the supervisor starts the engine. Only an engine that hangs is
                // killed.
                if asked.elapsed() >= agent.engine.patience() {
                    agent.end_hung_engine(asked).await;
                }
                agent.listing.send_modify(|_| {});
            }
        }
        agent.count_put_aside();
        let _ = tokio::time::timeout(LOOK, agent.look.notified()).await;
    }
}

/// Repairs the table as soon as the kernel reports a change that the agent did not make.
async fn hearing(agent: Arc<Agent>) {
    let ear = match firewall::watch::open() {
        Ok(ear) => ear,
        Err(error) => {
            tracing::warn!(%error, "the kernel's netfilter events are not available; the table is checked every second");
            return;
        }
    };
    loop {
        ear.heard().await;
        agent.repair_firewall(Depth::Shape).await;
        agent.repair_firewall(Depth::Whole).await;
        // A program that changes tables all the time must not keep the agent busy.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Closes the tracked connections of removed rules, one after another. Their packets are already dropped.
async fn cutting(agent: Arc<Agent>) {
    loop {
        agent.cut.notified().await;
        agent.cut_gone().await;
    }
}

/// Probes allowed and denied connections at regular intervals.
async fn probing(agent: Arc<Agent>) {
    let mut round = 0;
    loop {
        tokio::time::sleep(PROBE).await;
        agent.probe_all(&mut round).await;
    }
}

/// Keeps the tenants' networks correct. It runs in its own task because the engine may block it.
async fn keeping(agent: Arc<Agent>) {
    loop {
        tokio::time::sleep(NETWORKS).await;
        agent.keep_networks().await;
    }
}

/// Keeps the firewall table correct.
async fn watching(agent: Arc<Agent>) {
    let mut networks_at = tokio::time::Instant::now();
    let mut round = 0_u64;
    loop {
        tokio::time::sleep(WATCH).await;
        round += 1;
        let depth = if round.is_multiple_of(SETS) { Depth::Whole } else { Depth::Shape };
        agent.repair_firewall(depth).await;
        if networks_at.elapsed() < NETWORKS {
            continue;
        }
        networks_at = tokio::time::Instant::now();
        agent.note_denials().await;
        agent.relieve().await;
        agent.keep_found_open().await;
        agent.note_own_addresses().await;
        if let Err(error) = agent.refresh_firewall().await {
            tracing::warn!(%error, "the firewall cannot be refreshed; it is tried again");
        }
        tokio::task::block_in_place(|| agent.keep_groups());
    }
}
