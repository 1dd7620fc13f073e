//! One app on this machine: a task that looks, plans and acts, again and again. It alone touches the
//! app's containers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;

use super::core::{Agent, Listing, lock};
use super::kept::{Instance, Kept};
use super::logs::{self, Tail};
use super::plan::{Part, Step, plan};
use crate::driver::podman::ports::{Port, Seen};
use crate::driver::podman::{ports, render};
use crate::driver::workload::{HealthCheck, Workload};
use crate::driver::{AppObserved, Cause, Ending, Error, InstanceObserved, InstanceState, LogLine};
use crate::ids::{AppId, AppName, TenantName};
use crate::prober::{Answer, Question};

/// The longest that a restart waits, in seconds.
const BACKOFF: u64 = 300;
/// After so long a run, the next failure counts as the first.
const LONG_RUN: time::Duration = time::Duration::minutes(10);
/// An app without a health check is well after so long.
const SETTLE: time::Duration = time::Duration::seconds(1);
/// How often a health check is made, and how many must fail in a row.
const CHECK: Duration = Duration::from_secs(2);
const FAILURES: u32 = 3;

/// What is known of an instance while this process lives.
#[derive(Default)]
struct Live {
    tail: Option<Tail>,
    /// A listing older than this says nothing about the instance any more.
    valid_from: u64,
    checked: Option<tokio::time::Instant>,
    /// Since when it is as it should be for a moment only.
    odd: Option<tokio::time::Instant>,
    /// Whether a health check is under way: one at a time.
    checking: bool,
    ill: u32,
    well: bool,
    why: String,
    hosts: String,
}

/// An app.
pub(super) struct App {
    pub(super) id: AppId,
    pub(super) tenant: TenantName,
    pub(super) name: AppName,
    pub(super) kept: Mutex<Kept>,
    pub(super) lines: broadcast::Sender<LogLine>,
    pub(super) wake: Notify,
    live: Mutex<HashMap<u32, Live>>,
    version: AtomicU64,
    stop: CancellationToken,
}

impl App {
    /// Starts the task of an app.
    pub(super) fn spawn(agent: Arc<Agent>, kept: Kept) -> Arc<Self> {
        let app = Arc::new(Self {
            id: kept.workload.app_id,
            tenant: kept.workload.tenant.clone(),
            name: kept.workload.app.clone(),
            kept: Mutex::new(kept),
            lines: broadcast::Sender::new(1024),
            wake: Notify::new(),
            live: Mutex::new(HashMap::new()),
            version: AtomicU64::new(0),
            stop: CancellationToken::new(),
        });
        agent.touch(&app.version);
        let task = Arc::clone(&app);
        tokio::spawn(async move { task.live(agent).await });
        app
    }

    /// Ends the task; containers go on.
    pub(super) fn end(&self) {
        self.stop.cancel();
    }

    /// Tells when the app has left, or the agent ends.
    pub(super) fn leaving(&self) -> CancellationToken {
        self.stop.clone()
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    async fn live(self: Arc<Self>, agent: Arc<Agent>) {
        let mut listing = agent.listing.subscribe();
        // What was being stopped when the agent ended is stopped on.
        let stopping: Vec<u32> = lock(&self.kept)
            .instances
            .iter()
            .filter(|i| i.state == InstanceState::Stopping)
            .map(|i| i.number)
            .collect();
        for number in stopping {
            self.begin_stop(&agent, number);
        }
        loop {
            let now = listing.borrow_and_update().clone();
            if now.round > 0 {
                let before = serde_json::to_vec(&*lock(&self.kept)).unwrap_or_default();
                self.step(&agent, &now).await;
                self.record(&agent, &before);
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.wake.notified() => {}
                changed = listing.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Writes the state down and tells, if anything changed.
    fn record(&self, agent: &Agent, before: &[u8]) {
        let kept = lock(&self.kept);
        let after = serde_json::to_vec(&*kept).unwrap_or_default();
        if after != before {
            if let Err(error) = kept.save(&agent.apps_dir()) {
                tracing::error!(%error, app = %self.name, "the record cannot be written");
            }
            drop(kept);
            agent.touch(&self.version);
        }
    }

    /// One round: look at each instance, then plan, then act.
    async fn step(self: &Arc<Self>, agent: &Arc<Agent>, listing: &Listing) {
        let numbers: Vec<u32> = lock(&self.kept).instances.iter().map(|i| i.number).collect();
        for number in numbers {
            tokio::task::block_in_place(|| self.read_log(agent, number));
            self.look(agent, listing, number).await;
            self.check_health(agent, number);
        }
        self.sweep(agent, listing).await;
        let steps = {
            let mut kept = lock(&self.kept);
            if kept.removing {
                kept.instances
                    .iter()
                    .filter(|i| i.state != InstanceState::Stopping)
                    .map(|i| Step::Stop(i.number))
                    .collect()
            } else {
                let parts: Vec<Part> = kept.instances.iter().map(part).collect();
                let steps = plan(&kept.workload, &parts);
                if steps.is_empty() && !kept.proven && settled(&kept) {
                    kept.proven = true;
                    kept.previous = None;
                    let text = format!(
                        "release {} runs: {} instance(s)",
                        kept.workload.revision, kept.workload.instances
                    );
                    kept.event("rolled", text);
                    agent.tidy.notify_one();
                }
                steps
            }
        };
        for step in steps {
            match step {
                Step::Create(slot) => self.create(agent, slot).await,
                Step::Stop(number) => self.begin_stop(agent, number),
            }
        }
        self.start_waiting(agent).await;
        self.write_hosts(agent);
    }

    fn read_log(&self, agent: &Agent, number: u32) {
        let mut live = lock(&self.live);
        let entry = live.entry(number).or_default();
        let dir = agent.logs_dir(self.id);
        let tail = entry.tail.get_or_insert_with(|| Tail::new(raw_log(&dir, number), dir.clone(), number));
        match tail.advance() {
            Ok(lines) => {
                for line in lines {
                    let _ = self.lines.send(line);
                }
            }
            Err(error) => tracing::warn!(%error, app = %self.name, "a log cannot be read"),
        }
    }

    /// Holds one instance against what the engine lists and against /proc.
    async fn look(&self, agent: &Arc<Agent>, listing: &Listing, number: u32) {
        if lock(&self.live).entry(number).or_default().valid_from > listing.round {
            return;
        }
        let Some(instance) = self.instance(number) else { return };
        let running = matches!(
            instance.state,
            InstanceState::Starting | InstanceState::Running | InstanceState::Unhealthy
        );
        if !running {
            return;
        }
        let seen = listing.containers.get(&instance.container);
        if seen.is_some_and(|c| c.state == "running") && is_alive(&instance) {
            lock(&self.live).entry(number).or_default().odd = None;
            self.look_at_port(agent, &instance).await;
            self.note_running(number);
            return;
        }
        // The listing may be older than what has just happened: only what is asked for now decides.
        let now = match agent.podman.find(&instance.container).await {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, app = %self.name, "an instance cannot be looked at");
                return;
            }
        };
        match now {
            None => self.vanished(agent, number, "its container had been removed; it is made anew"),
            Some(now) if matches!(now.state.as_str(), "exited" | "stopped") => {
                let hungry = now.exit_code != 0 && agent.oom.killed(&now.id);
                let cause = cause_of(now.exit_code, hungry);
                self.ended(agent, number, cause, Some(now.exit_code), String::new());
            }
            Some(now) if now.state == "running" && is_alive(&instance) => self.note_running(number),
            // A process that has just ended, and a monitor that is about to say so; not for ever.
            Some(_) if monitor_lives(&instance) && !self.is_odd_for_long(number) => {}
            // The engine says "running" and nobody watches any more: nothing that it says about this
            // container can be relied on.
            Some(_) => {
                let _ = discard(agent, &instance.container).await;
                let why = "its process or the process that watches it had ended; it is made anew";
                self.vanished(agent, number, why);
            }
        }
    }

    /// Whether an instance has been in a state that should last a moment only, for longer.
    fn is_odd_for_long(&self, number: u32) -> bool {
        let mut live = lock(&self.live);
        let since = live.entry(number).or_default().odd.get_or_insert_with(tokio::time::Instant::now);
        since.elapsed() > Duration::from_secs(10)
    }

    /// An instance whose port is gone reaches nobody and is reached by nobody: it is made anew. A port
    /// that somebody has opened is closed again.
    async fn look_at_port(&self, agent: &Arc<Agent>, instance: &Instance) {
        let Some(port) = &instance.port else { return };
        match port.look() {
            Seen::Closed => {}
            Seen::Open => {
                let text = match port.close().await {
                    Ok(()) => "was open to its neighbours and was closed again".to_owned(),
                    Err(error) => format!("is open to its neighbours and cannot be closed: {error}"),
                };
                lock(&self.kept).event("repaired", format!("instance {}: its port {text}", instance.number));
            }
            Seen::Gone => {
                let _ = discard(agent, &instance.container).await;
                self.vanished(agent, instance.number, "its network had been removed; it is made anew");
            }
        }
    }

    fn instance(&self, number: u32) -> Option<Instance> {
        lock(&self.kept).instances.iter().find(|i| i.number == number).cloned()
    }

    fn with<T>(&self, number: u32, change: impl FnOnce(&mut Instance) -> T) -> Option<T> {
        lock(&self.kept).instances.iter_mut().find(|i| i.number == number).map(change)
    }

    fn note_running(&self, number: u32) {
        let (well, ill) = lock(&self.live).get(&number).map_or((false, 0), |live| (live.well, live.ill));
        let mut kept = lock(&self.kept);
        let revision = kept.instances.iter().find(|i| i.number == number).map_or(0, |i| i.revision);
        let checked = kept.workload_of(revision).is_some_and(|w| w.health.is_some());
        if let Some(instance) = kept.instances.iter_mut().find(|i| i.number == number) {
            let up = instance.started.map_or(time::Duration::ZERO, |at| OffsetDateTime::now_utc() - at);
            if checked {
                match (well, ill) {
                    (true, _) => instance.enter(InstanceState::Running),
                    (false, 1..) if instance.state != InstanceState::Starting => {
                        instance.enter(InstanceState::Unhealthy);
                    }
                    _ => {}
                }
            } else if up >= SETTLE {
                instance.enter(InstanceState::Running);
            }
            if instance.failures > 0 && up >= LONG_RUN {
                instance.failures = 0;
            }
        }
    }

    /// An instance has ended by itself: why is written down, and when it starts again.
    fn ended(&self, agent: &Agent, number: u32, cause: Cause, code: Option<i32>, detail: String) {
        tokio::task::block_in_place(|| self.read_log(agent, number));
        let last_lines: Vec<String> = logs::last(&agent.logs_dir(self.id), Some(number), 5)
            .iter()
            .filter(|line| line.stream != crate::driver::LogStreamName::Platform)
            .map(|line| line.text.chars().filter(|c| !c.is_control()).take(300).collect())
            .collect();
        let now = OffsetDateTime::now_utc();
        let mut kept = lock(&self.kept);
        let Some(instance) = kept.instances.iter_mut().find(|i| i.number == number) else { return };
        let ran = instance.started.map_or(time::Duration::ZERO, |at| now - at);
        if ran >= LONG_RUN {
            instance.failures = 0;
        }
        instance.failures += 1;
        let wait = (1_u64 << (instance.failures - 1).min(9)).min(BACKOFF);
        instance.next_start = Some(now + Duration::from_secs(wait));
        instance.pid = 0;
        instance.uid = None;
        let detail = if detail.is_empty() { describe(cause, code) } else { short(&detail) };
        let text = format!("instance {number}: {detail}; it starts again in {wait} s");
        instance.last_end = Some(Ending {
            cause,
            exit_code: code,
            at: now,
            ran_ms: u64::try_from(ran.whole_milliseconds()).unwrap_or(0),
            detail,
            last_lines,
        });
        instance.enter(InstanceState::Waiting);
        kept.event("ended", text);
    }

    /// A container went away from outside: a new instance takes its place at once.
    fn vanished(&self, agent: &Agent, number: u32, why: &str) {
        self.ended(agent, number, Cause::Removed, None, why.to_owned());
        self.forget(agent, number);
        let mut kept = lock(&self.kept);
        let fresh = kept.next_number;
        kept.next_number += 1;
        let revision = kept.instances.iter().find(|i| i.number == number).map_or(0, |i| i.revision);
        let container = kept.workload_of(revision).map(|w| render::name(&agent.config, w, fresh));
        if let Some(instance) = kept.instances.iter_mut().find(|i| i.number == number) {
            instance.number = fresh;
            instance.container = container.unwrap_or_default();
            instance.next_start = Some(OffsetDateTime::now_utc());
            // What others do to it is not held against the app.
            instance.failures = instance.failures.saturating_sub(1);
        }
        kept.event("repaired", format!("instance {number}: {why} (as instance {fresh})"));
    }

    /// Drops what is held of a number that is not used any more, and the oldest logs.
    fn forget(&self, agent: &Agent, number: u32) {
        lock(&self.live).remove(&number);
        let dir = agent.logs_dir(self.id);
        let _ = std::fs::remove_file(raw_log(&dir, number));
        let mut numbers: Vec<u32> = lock(&self.kept).instances.iter().map(|i| i.number).collect();
        numbers.retain(|own| *own != number);
        tokio::task::block_in_place(|| logs::prune(&dir, &numbers));
    }

    /// Containers of this app that no instance stands for: left over by a crash between two steps.
    async fn sweep(&self, agent: &Agent, listing: &Listing) {
        let known: Vec<String> = lock(&self.kept).instances.iter().map(|i| i.container.clone()).collect();
        let id = self.id.to_string();
        for (name, container) in listing.containers.iter() {
            if container.app() == Some(id.as_str()) && !known.contains(name) {
                let fresh = lock(&self.live).values().any(|live| live.valid_from > listing.round);
                if !fresh && discard(agent, name).await.is_ok() {
                    tracing::info!(name, "a container that belongs to no instance was removed");
                }
            }
        }
    }

    async fn create(&self, agent: &Arc<Agent>, slot: usize) {
        let number = {
            let mut kept = lock(&self.kept);
            let number = kept.next_number;
            kept.next_number += 1;
            let name = render::name(&agent.config, &kept.workload, number);
            let revision = kept.workload.revision;
            kept.instances.push(Instance::new(number, revision, slot, name));
            // On record before the container exists: a crash in between leaves nothing unknown.
            if let Err(error) = kept.save(&agent.apps_dir()) {
                tracing::error!(%error, "the record cannot be written");
                kept.instances.pop();
                return;
            }
            number
        };
        self.start(agent, number).await;
    }

    /// Starts those whose time has come, and those that a crash left half-made.
    async fn start_waiting(&self, agent: &Arc<Agent>) {
        let now = OffsetDateTime::now_utc();
        let due: Vec<u32> = lock(&self.kept)
            .instances
            .iter()
            .filter(|i| match i.state {
                InstanceState::Waiting | InstanceState::Failed => i.next_start.is_none_or(|at| at <= now),
                InstanceState::Preparing => true,
                _ => false,
            })
            .map(|i| i.number)
            .collect();
        for number in due {
            self.start(agent, number).await;
        }
    }

    /// Makes and starts an instance's container: create, attach the network, close its port, start.
    async fn start(&self, agent: &Arc<Agent>, number: u32) {
        let (instance, workload) = {
            let kept = lock(&self.kept);
            let Some(instance) = kept.instances.iter().find(|i| i.number == number).cloned() else { return };
            let Some(workload) = kept.workload_of(instance.revision).cloned() else {
                drop(kept);
                // Its release is not known any more; the plan replaces it.
                lock(&self.kept).instances.retain(|i| i.number != number);
                return;
            };
            (instance, workload)
        };
        let again = instance.last_end.is_some();
        let result = self.bring_up(agent, &instance, &workload).await;
        let valid_from = agent.listing.borrow().round + 2;
        agent.look.notify_one();
        {
            let mut live = lock(&self.live);
            let entry = live.entry(number).or_default();
            entry.valid_from = valid_from;
            entry.well = false;
            entry.ill = 0;
            entry.hosts = String::new();
        }
        match result {
            Ok(up) => {
                let mut kept = lock(&self.kept);
                if let Some(i) = kept.instances.iter_mut().find(|i| i.number == number) {
                    (i.pid, i.born, i.conmon, i.uid, i.hosts) =
                        (up.pid, up.born, up.conmon, up.uid, up.hosts);
                    i.port = Some(up.port);
                    i.started = Some(OffsetDateTime::now_utc());
                    i.next_start = None;
                    i.restarts += u32::from(again);
                    i.enter(InstanceState::Starting);
                }
                let word = if again { "restarted" } else { "started" };
                kept.event(word, format!("instance {number} of release {} {word}", instance.revision));
            }
            Err(error) => {
                tracing::warn!(%error, app = %self.name, "an instance cannot be started");
                let (cause, why) = why_not_started(&error);
                self.ended(agent, number, cause, None, format!("it cannot be started: {why}"));
                self.with(number, |i| i.enter(InstanceState::Failed));
            }
        }
    }

    async fn bring_up(
        &self,
        agent: &Arc<Agent>,
        instance: &Instance,
        workload: &Workload,
    ) -> Result<Up, Error> {
        let podman = &agent.podman;
        if !agent.table_is_there().await {
            return Err(Error::Transient(
                "the firewall table is not there; nothing starts without it".into(),
            ));
        }
        agent.ensure_network(&self.tenant).await?;
        let recorded = lock(&agent.journal).tenant(&self.tenant).cloned();
        let recorded = recorded.ok_or_else(|| Error::Rejected("the tenant has left".into()))?;
        let bridge = agent.config.bridge(recorded.network);
        let address = *workload
            .addresses
            .get(instance.slot)
            .ok_or_else(|| Error::Rejected("there is no address for this instance".into()))?;
        discard(agent, &instance.container).await?;
        ports::release(&instance.sandbox).await;
        ports::clear(&bridge, address).await?;
        let dir = agent.logs_dir(self.id);
        std::fs::create_dir_all(&dir).map_err(|error| Error::Transient(error.to_string()))?;
        if let Some(tail) = lock(&self.live).entry(instance.number).or_default().tail.as_mut() {
            tail.restart();
        }
        let raw = raw_log(&dir, instance.number);
        let spec = render::create(
            &agent.config,
            workload,
            &render::Instance {
                number: instance.number,
                gateway: recorded.subnet.gateway(),
                network: &bridge,
                log: &raw.to_string_lossy(),
            },
        );
        fail::fail_point!("agent::create", |_| Err(Error::Transient("failpoint".into())));
        podman.create(&spec).await?;
        let made = podman.inspect(&instance.container).await?;
        render::check_made(&made.annotations, &made.healthcheck).map_err(Error::Rejected)?;
        // Its rules are in force before its first packet.
        agent.refresh_firewall().await?;
        fail::fail_point!("agent::init", |_| Err(Error::Transient("failpoint".into())));
        podman.init(&instance.container).await?;
        let ready = podman.inspect(&instance.container).await?;
        // On record at once: a crash from here on leaves a namespace that is known.
        self.with(instance.number, |i| i.sandbox.clone_from(&ready.sandbox));
        let port = ports::isolate(&bridge, &ready.sandbox, address).await?;
        ports::address(&bridge, &ready.sandbox, address, recorded.subnet).await?;
        write_in_place(Path::new(&ready.hosts), &self.hosts_text(agent, workload, address));
        fail::fail_point!("agent::start", |_| Err(Error::Transient("failpoint".into())));
        podman.start(&instance.container).await?;
        let up = podman.inspect(&instance.container).await?;
        let born = born(up.pid).unwrap_or(0);
        let uid = owner(up.pid);
        Ok(Up { pid: up.pid, born, conmon: up.conmon, uid, hosts: ready.hosts, port })
    }

    /// The names that an instance knows: itself and the apps that it asked for.
    fn hosts_text(&self, agent: &Agent, workload: &Workload, own: std::net::Ipv4Addr) -> String {
        use std::fmt::Write as _;
        let mut out = format!("127.0.0.1 localhost\n{own} {}\n", self.name);
        for name in &workload.connects {
            let Some(peer) = agent.named(&self.tenant, name) else { continue };
            let kept = lock(&peer.kept);
            for instance in kept.instances.iter().filter(|i| i.state == InstanceState::Running) {
                if let Some(address) = kept.workload.addresses.get(instance.slot) {
                    let _ = writeln!(out, "{address} {name}");
                }
            }
        }
        out
    }

    /// Writes changed names into running instances.
    fn write_hosts(&self, agent: &Agent) {
        let running: Vec<Instance> =
            lock(&self.kept).instances.iter().filter(|i| i.pid > 0 && !i.hosts.is_empty()).cloned().collect();
        for instance in running {
            let workload = lock(&self.kept).workload_of(instance.revision).cloned();
            let Some((workload, address)) =
                workload.and_then(|w| w.addresses.get(instance.slot).copied().map(|address| (w, address)))
            else {
                continue;
            };
            let text = self.hosts_text(agent, &workload, address);
            let mut live = lock(&self.live);
            let entry = live.entry(instance.number).or_default();
            if entry.hosts != text {
                write_in_place(Path::new(&instance.hosts), &text);
                entry.hosts = text;
            }
        }
    }

    /// Stops an instance beside the loop: its grace may be long.
    fn begin_stop(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
        let Some((container, sandbox)) = self.with(number, |i| {
            i.enter(InstanceState::Stopping);
            (i.container.clone(), i.sandbox.clone())
        }) else {
            return;
        };
        let grace = lock(&self.kept).workload.stop_grace;
        let port = self.port_of(agent, number);
        let (app, agent) = (Arc::clone(self), Arc::clone(agent));
        tokio::spawn(async move {
            loop {
                fail::fail_point!("agent::stop");
                let _ = agent.podman.stop(&container, grace).await;
                if discard(&agent, &container).await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            ports::release(&sandbox).await;
            if let Some((bridge, address)) = port
                && let Err(error) = ports::clear(&bridge, address).await
            {
                tracing::warn!(%error, container, "a port was left");
            }
            tokio::task::block_in_place(|| app.read_log(&agent, number));
            let before = serde_json::to_vec(&*lock(&app.kept)).unwrap_or_default();
            {
                let mut kept = lock(&app.kept);
                kept.instances.retain(|i| i.number != number);
                kept.event("stopped", format!("instance {number} was stopped"));
            }
            app.forget(&agent, number);
            app.record(&agent, &before);
            if let Err(error) = agent.refresh_firewall().await {
                tracing::warn!(%error, "the rules of an instance that is gone are taken away later");
            }
            app.wake.notify_one();
        });
    }

    /// The bridge and the address of an instance.
    fn port_of(&self, agent: &Agent, number: u32) -> Option<(String, std::net::Ipv4Addr)> {
        let bridge = agent.bridge_of(&self.tenant)?;
        let kept = lock(&self.kept);
        let instance = kept.instances.iter().find(|i| i.number == number)?;
        Some((bridge, *kept.workload_of(instance.revision)?.addresses.get(instance.slot)?))
    }

    /// Asks the prober, beside the loop, when it is time.
    fn check_health(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
        let (question, in_grace, restart) = {
            let kept = lock(&self.kept);
            let Some(instance) = kept.instances.iter().find(|i| i.number == number) else { return };
            let is_up = matches!(
                instance.state,
                InstanceState::Starting | InstanceState::Running | InstanceState::Unhealthy
            );
            let Some(workload) = kept.workload_of(instance.revision) else { return };
            let (Some(health), Some(address), true) =
                (&workload.health, workload.addresses.get(instance.slot), is_up)
            else {
                return;
            };
            let (path, port) = match &health.check {
                HealthCheck::Http { path, port } => (Some(path.clone()), *port),
                HealthCheck::Tcp { port } => (None, *port),
            };
            let up = instance.started.map_or(time::Duration::ZERO, |at| OffsetDateTime::now_utc() - at);
            let in_grace = up < time::Duration::seconds(health.grace.into());
            let ill = lock(&self.live).get(&number).map_or(0, |live| live.ill);
            (
                Question { address: *address, port, path, timeout_ms: 2_000 },
                in_grace,
                ill >= FAILURES && !in_grace,
            )
        };
        if restart {
            self.restart_ill(agent, number);
            return;
        }
        let soon = if in_grace { Duration::from_millis(250) } else { CHECK };
        {
            let mut live = lock(&self.live);
            let entry = live.entry(number).or_default();
            let pace = if entry.well { CHECK } else { soon };
            if entry.checking || entry.checked.is_some_and(|at| at.elapsed() < pace) {
                return;
            }
            entry.checking = true;
            entry.checked = Some(tokio::time::Instant::now());
        }
        let (app, agent) = (Arc::clone(self), Arc::clone(agent));
        tokio::spawn(async move {
            let answer = crate::prober::ask_at(&agent.config.prober_socket, &question).await;
            let Some(was) = app.note_check(number, answer, in_grace) else { return };
            let now = lock(&app.live).get(&number).is_some_and(|live| live.well);
            if !was && !now {
                // A fresh instance is looked at again soon, so that a release goes on when it is well.
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            if was != now || !now {
                app.wake.notify_one();
            }
        });
    }

    /// Takes an answer of the prober; whether the instance was well before. No prober, no verdict:
    /// an app is not restarted for what it did not do.
    fn note_check(&self, number: u32, answer: std::io::Result<Answer>, in_grace: bool) -> Option<bool> {
        let mut live = lock(&self.live);
        let entry = live.get_mut(&number)?;
        entry.checking = false;
        let was = entry.well;
        match answer.ok()? {
            Answer::Well => (entry.well, entry.ill) = (true, 0),
            Answer::Ill(why) => {
                entry.well = false;
                entry.ill += u32::from(!in_grace);
                entry.why = why;
            }
        }
        Some(was)
    }

    fn restart_ill(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
        let why = lock(&self.live).get(&number).map(|live| live.why.clone()).unwrap_or_default();
        let Some(container) = self.with(number, |i| i.container.clone()) else { return };
        lock(&self.kept).event("unhealthy", format!("instance {number}: its health check fails: {why}"));
        self.ended(agent, number, Cause::Unhealthy, None, format!("its health check fails: {why}"));
        let grace = lock(&self.kept).workload.stop_grace;
        let agent = Arc::clone(agent);
        tokio::spawn(async move {
            let _ = agent.podman.stop(&container, grace).await;
        });
    }

    /// What is told about the app.
    pub(super) fn observed(&self, _: &Agent) -> AppObserved {
        let kept = lock(&self.kept);
        AppObserved {
            tenant: self.tenant.clone(),
            app: self.name.clone(),
            app_id: self.id,
            generation: kept.workload.generation,
            revision: kept.workload.revision,
            settled: settled(&kept),
            message: kept.message.clone(),
            instances: kept
                .instances
                .iter()
                .map(|i| InstanceObserved {
                    number: i.number,
                    revision: i.revision,
                    state: i.state,
                    since: i.since,
                    started: i.started,
                    restarts: i.restarts,
                    next_start: i.next_start,
                    last_end: i.last_end.clone(),
                    address: kept
                        .workload
                        .addresses
                        .get(i.slot)
                        .copied()
                        .unwrap_or(std::net::Ipv4Addr::UNSPECIFIED),
                    uid: i.uid,
                    container: i.container.clone(),
                })
                .collect(),
            events: kept.events.iter().cloned().collect(),
        }
    }
}

/// Removes a container, and its namespace with it: of one that never started, or that ended by itself,
/// the engine leaves the namespace lying.
pub(super) async fn discard(agent: &Agent, container: &str) -> Result<(), Error> {
    let sandbox = agent.podman.inspect(container).await.map(|seen| seen.sandbox).unwrap_or_default();
    agent.podman.remove(container).await?;
    ports::release(&sandbox).await;
    Ok(())
}

struct Up {
    pid: i32,
    born: u64,
    conmon: i32,
    uid: Option<u32>,
    hosts: String,
    port: Port,
}

fn raw_log(dir: &Path, number: u32) -> std::path::PathBuf {
    dir.join(format!("{number}.raw"))
}

fn part(instance: &Instance) -> Part {
    Part {
        number: instance.number,
        revision: instance.revision,
        well: instance.state == InstanceState::Running,
        stopping: instance.state == InstanceState::Stopping,
        slot: instance.slot,
    }
}

/// Whether what runs is what is desired.
fn settled(kept: &Kept) -> bool {
    !kept.removing
        && kept.instances.len() == kept.workload.instances as usize
        && kept
            .instances
            .iter()
            .all(|i| i.revision == kept.workload.revision && i.state == InstanceState::Running)
}

/// When a process started, in ticks since boot (proc(5), stat, field 22): an id is given again, the
/// pair of both is not.
fn born(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

fn owner(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

fn is_alive(instance: &Instance) -> bool {
    instance.pid > 0
        && born(instance.pid) == Some(instance.born)
        && (instance.conmon <= 0 || Path::new(&format!("/proc/{}", instance.conmon)).exists())
}

fn monitor_lives(instance: &Instance) -> bool {
    instance.conmon > 0 && Path::new(&format!("/proc/{}", instance.conmon)).exists()
}

/// A text of others, for events and states: bounded, so that no app's own words crowd out the rest.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}

/// Why the engine did not start an instance, in words that name nothing of the host; its own words are
/// in the platform's log.
fn why_not_started(error: &Error) -> (Cause, String) {
    if let Error::Rejected(why) = error {
        return (Cause::ImageError, short(why));
    }
    let text = error.to_string();
    let known = [
        ("executable file", "its command is not in the image"),
        ("no such file or directory", "its command, or what runs it, is not in the image"),
        ("permission denied", "its user may not execute its command"),
        ("exec format error", "its command is no program for this machine"),
        ("firewall table", "the firewall table is not there; nothing starts without it"),
        ("no such image", "its image is not in the engine's store"),
        ("image not known", "its image is not in the engine's store"),
    ];
    let lower = text.to_lowercase();
    match known.iter().find(|(sign, _)| lower.contains(sign)) {
        Some((sign, why)) if sign.contains("image") => (Cause::ImageError, (*why).to_owned()),
        Some((_, why)) => (Cause::StartError, (*why).to_owned()),
        None => {
            (Cause::StartError, "the container engine refused it; the platform's log has its words".into())
        }
    }
}

/// `hungry`: the kernel's log says that it killed a process of the instance for memory.
fn cause_of(code: i32, hungry: bool) -> Cause {
    match (hungry, code) {
        (true, _) => Cause::OutOfMemory,
        (false, 137) => Cause::Killed,
        _ => Cause::Exited,
    }
}

fn describe(cause: Cause, code: Option<i32>) -> String {
    match (cause, code) {
        (Cause::OutOfMemory, _) => {
            "out of memory: the kernel ended it at its limit; give it more memory, or less scratch".into()
        }
        (Cause::Killed, _) => "killed (137) by a signal; who sent it is not known".into(),
        (_, Some(code)) => format!("it exited with code {code}"),
        _ => "it ended".into(),
    }
}

/// Writes into the very file that an instance has mounted; a new file would not be seen inside.
fn write_in_place(path: &Path, text: &str) {
    if let Err(error) = std::fs::write(path, text) {
        tracing::debug!(%error, path = %path.display(), "names were not written");
    }
}
