//! One app on this machine: a task that repeatedly observes, plans and acts. Only this task touches the app's
//! containers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;

use super::core::{Agent, Listing, lock};
use super::engine::{MOST_STRIKES, STRIKES};
use super::kept::{AppRecord, Instance};
use super::logs::Tail;
use super::plan::{InstanceStep, PlannedInstance, plan, waits_for};
use crate::driver::{AppObserved, InstanceObserved, InstanceState, LogLine};
use crate::ids::{AppId, AppName, TenantName};
use reading::OutputReader;

mod health;
mod image;
pub(super) mod look;
mod reading;
mod start;
mod walls;

pub(super) use image::{ImageInspection, LOOKS};
pub(super) use reading::{Pipes, open_all, paces};
pub(super) use start::discard;

/// Maximum delay of a restart, in seconds.
const BACKOFF: u64 = 300;
/// After a run of this length, the next failure counts as the first.
const LONG_RUN: time::Duration = time::Duration::minutes(10);
/// An app without a health check counts as healthy after this time.
const SETTLE: time::Duration = time::Duration::seconds(1);
/// Interval of health checks, and the number of consecutive failures after which an instance restarts.
const CHECK: Duration = Duration::from_secs(2);
const FAILURES: u32 = 3;

/// State of an instance that lives as long as this process.
#[derive(Default)]
struct Live {
    /// Reads the output of the instance.
    reader: Option<OutputReader>,
    /// Reads the log file of an instance that an earlier version started.
    tail: Option<Tail>,
    /// Listings with a lower round are too old to say anything about the instance.
    valid_from: u64,
    checked: Option<tokio::time::Instant>,
    /// Since when the instance is in a state that should last only a moment.
    odd: Option<tokio::time::Instant>,
    /// Whether a health check is under way; only one runs at a time.
    checking: bool,
    ill: u32,
    well: bool,
    /// Whether the instance has been healthy in this run.
    been_well: bool,
    why: String,
    hosts: String,
}

/// An app.
pub(super) struct AgentApp {
    pub(super) id: AppId,
    pub(super) tenant: TenantName,
    pub(super) name: AppName,
    pub(super) kept: Mutex<AppRecord>,
    pub(super) lines: broadcast::Sender<LogLine>,
    pub(super) wake: Notify,
    live: Mutex<HashMap<u32, Live>>,
    /// Whether actions are under way. Actions wait for the engine; observation never does.
    acting: AtomicBool,
    version: AtomicU64,
    stop: CancellationToken,
}

impl AgentApp {
    /// Starts the task of an app.
    pub(super) fn spawn(agent: Arc<Agent>, kept: AppRecord) -> Arc<Self> {
        let app = Arc::new(Self {
            id: kept.workload.app_id,
            tenant: kept.workload.tenant.clone(),
            name: kept.workload.app.clone(),
            kept: Mutex::new(kept),
            lines: broadcast::Sender::new(1024),
            wake: Notify::new(),
            live: Mutex::new(HashMap::new()),
            acting: AtomicBool::new(false),
            version: AtomicU64::new(0),
            stop: CancellationToken::new(),
        });
        agent.touch(&app.version);
        let task = Arc::clone(&app);
        tokio::spawn(async move { task.live(agent).await });
        app
    }

    /// Ends the task. Containers keep running.
    pub(super) fn end(&self) {
        self.stop.cancel();
    }

    /// Returns a token that is cancelled when the app is removed or the agent ends.
    pub(super) fn leaving(&self) -> CancellationToken {
        self.stop.clone()
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    async fn live(self: Arc<Self>, agent: Arc<Agent>) {
        let mut listing = agent.listing.subscribe();
        // Continues the stops that were under way when the agent ended.
        let stopping: Vec<u32> = lock(&self.kept)
            .instances
            .iter()
            .filter(|i| i.state == InstanceState::Stopping)
            .map(|i| i.number)
            .collect();
        for number in self.numbers() {
            // An instance that an earlier version started writes into a file until its next start.
            if reading::pipe_path(&agent.logs_dir(self.id), number).exists()
                && let Err(error) = self.read_along(&agent, number)
            {
                tracing::warn!(%error, app = %self.name, "the log of an instance cannot be opened");
            }
        }
        for number in stopping {
            self.begin_stop(&agent, number);
        }
        loop {
            let now = listing.borrow_and_update().clone();
            let before = serde_json::to_vec(&*lock(&self.kept)).unwrap_or_default();
            let unclear = self.look_at_all(&agent, &now).await;
            self.record(&agent, &before);
            self.act_beside(&agent, now, unclear);
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.wake.notified() => {}
                changed = listing.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Writes the state to disk and announces the change. Returns whether anything changed.
    fn record(&self, agent: &Agent, before: &[u8]) -> bool {
        let kept = lock(&self.kept);
        let after = serde_json::to_vec(&*kept).unwrap_or_default();
        if after != before {
            if let Err(error) = tokio::task::block_in_place(|| kept.save(&agent.apps_dir())) {
                tracing::error!(%error, app = %self.name, "the state of an app cannot be written");
            }
            drop(kept);
            agent.touch(&self.version);
            return true;
        }
        false
    }

    /// Checks each instance without the engine. Returns the numbers of those that only the engine can explain.
    async fn look_at_all(self: &Arc<Self>, agent: &Arc<Agent>, listing: &Listing) -> Vec<u32> {
        let numbers: Vec<u32> = lock(&self.kept).instances.iter().map(|i| i.number).collect();
        let mut unclear = Vec::new();
        for number in numbers {
            tokio::task::block_in_place(|| self.read_file(agent, number));
            if self.look(agent, listing, number).await == InstanceCheck::Unclear {
                unclear.push(number);
            }
            self.check_health(agent, number);
        }
        unclear
    }

    /// Acts in a task of its own, one at a time. While the engine hangs on one instance, the app's other instances
    /// are still observed.
    fn act_beside(self: &Arc<Self>, agent: &Arc<Agent>, listing: Listing, unclear: Vec<u32>) {
        if self.acting.swap(true, Ordering::AcqRel) {
            return;
        }
        let (app, agent) = (Acting(Arc::clone(self)), Arc::clone(agent));
        tokio::spawn(async move {
            let before = serde_json::to_vec(&*lock(&app.0.kept)).unwrap_or_default();
            for number in unclear {
                app.0.ask_engine(&agent, number).await;
            }
            app.0.act(&agent, &listing).await;
            let changed = app.0.record(&agent, &before);
            let own = Arc::clone(&app.0);
            drop(app);
            if changed {
                own.wake.notify_one();
            }
        });
    }

    /// Plans and executes the next steps.
    async fn act(self: &Arc<Self>, agent: &Arc<Agent>, listing: &Listing) {
        if listing.round > 0 {
            self.sweep(agent, listing).await;
        }
        let steps = {
            let mut kept = lock(&self.kept);
            kept.take_up_again(OffsetDateTime::now_utc());
            if kept.removing {
                kept.instances
                    .iter()
                    .filter(|i| i.state != InstanceState::Stopping)
                    .map(|i| InstanceStep::Stop(i.number))
                    .collect()
            } else {
                let parts: Vec<PlannedInstance> = kept.instances.iter().map(part).collect();
                let mut steps = plan(&kept.workload, &parts);
                if kept.is_put_aside() {
                    steps.retain(|step| !matches!(step, InstanceStep::Create(_)));
                }
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
                InstanceStep::Create(slot) => self.create(agent, slot).await,
                InstanceStep::Stop(number) => self.begin_stop(agent, number),
            }
        }
        self.start_waiting(agent).await;
        self.write_hosts(agent);
    }

    /// Records that a call for this app got no answer because the engine hung. The second strike, with no other
    /// app's call at the same time, puts the app's desired revision aside.
    pub(super) fn struck(&self, agent: &Agent, alone: bool) {
        let mut kept = lock(&self.kept);
        if kept.is_put_aside() || kept.removing {
            return;
        }
        kept.strikes += 1;
        if kept.strikes >= MOST_STRIKES || kept.strikes >= STRIKES && alone {
            let why = "the container engine hangs when it starts this release; it is tried again in an hour. Deploy \
                       another image or another description";
            kept.put_aside = Some(why.to_owned());
            kept.put_aside_at = Some(OffsetDateTime::now_utc());
            kept.message = Some(why.to_owned());
            let text = format!("release {}: {why}", kept.workload.revision);
            kept.event("put_aside", text);
        } else {
            let text =
                "the container engine hung while it worked for this app; the agent tries again by itself";
            kept.event("engine_hung", text);
        }
        if let Err(error) = tokio::task::block_in_place(|| kept.save(&agent.apps_dir())) {
            tracing::error!(%error, app = %self.name, "the state of an app cannot be written");
        }
        drop(kept);
        agent.touch(&self.version);
    }

    fn numbers(&self) -> Vec<u32> {
        lock(&self.kept).instances.iter().map(|i| i.number).collect()
    }

    fn instance(&self, number: u32) -> Option<Instance> {
        lock(&self.kept).instances.iter().find(|i| i.number == number).cloned()
    }

    fn with<T>(&self, number: u32, change: impl FnOnce(&mut Instance) -> T) -> Option<T> {
        lock(&self.kept).instances.iter_mut().find(|i| i.number == number).map(change)
    }

    /// Returns the observed state of the app, as reported to `serve`.
    pub(super) fn observed(&self, _: &Agent) -> AppObserved {
        let kept = lock(&self.kept);
        AppObserved {
            tenant: self.tenant.clone(),
            app: self.name.clone(),
            app_id: self.id,
            generation: kept.workload.generation,
            revision: kept.workload.revision,
            settled: settled(&kept),
            message: kept.message.clone().or_else(|| waiting(&kept)),
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
                    failures: i.failures,
                    why: i.why.clone(),
                    next_start: i.next_start,
                    last_end: i.last_end.clone(),
                    address: kept.address_of(i).unwrap_or(std::net::Ipv4Addr::UNSPECIFIED),
                    uid: i.uid,
                    container: i.container.clone(),
                })
                .collect(),
            events: kept.events.iter().cloned().collect(),
        }
    }
}

/// Marks the actions of an app as under way. Dropping it clears the mark, also after a panic.
struct Acting(Arc<AgentApp>);

impl Drop for Acting {
    fn drop(&mut self) {
        self.0.acting.store(false, Ordering::Release);
    }
}

/// The result of checking an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InstanceCheck {
    /// The state is known.
    Clear,
    /// Only the engine can explain the state.
    Unclear,
}

fn raw_log(dir: &Path, number: u32) -> std::path::PathBuf {
    dir.join(format!("{number}.raw"))
}

fn part(instance: &Instance) -> PlannedInstance {
    PlannedInstance {
        number: instance.number,
        revision: instance.revision,
        well: instance.state == InstanceState::Running,
        stopping: instance.state == InstanceState::Stopping,
        slot: instance.slot,
    }
}

/// Returns which instance the next one waits for, and until when.
fn waiting(kept: &AppRecord) -> Option<String> {
    let parts: Vec<PlannedInstance> = kept.instances.iter().map(part).collect();
    let number = waits_for(&kept.workload, &parts)?;
    let instance = kept.instances.iter().find(|i| i.number == number)?;
    let until = instance.since + Duration::from_secs(kept.workload.stop_grace.into());
    Some(format!(
        "Waits for instance {number} to stop, until {:02}:{:02}:{:02} UTC at the latest (stop_grace).",
        until.hour(),
        until.minute(),
        until.second()
    ))
}

/// Whether the running instances match the desired state.
fn settled(kept: &AppRecord) -> bool {
    !kept.removing
        && kept.instances.len() == kept.workload.instances as usize
        && kept
            .instances
            .iter()
            .all(|i| i.revision == kept.workload.revision && i.state == InstanceState::Running)
}

/// Shortens text from outside for events and states, so that one app cannot crowd out the rest.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}

/// Returns when a process started, in ticks since boot (proc(5), stat, field 22). A process id is reused; the pair
/// of both is not.
fn born(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}
