//! One app on this machine: a task that looks, plans and acts, again and again. It alone touches the
//! app's containers.

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
use super::kept::{Instance, Kept};
use super::logs::Tail;
use super::plan::{Part, Step, plan, waits_for};
use crate::driver::{AppObserved, InstanceObserved, InstanceState, LogLine};
use crate::ids::{AppId, AppName, TenantName};
use reading::Reader;

mod health;
mod image;
pub(super) mod look;
mod reading;
mod start;
mod walls;

pub(super) use image::{LOOKS, Looked};
pub(super) use reading::{Pipes, open_all, paces};
pub(super) use start::discard;

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
    /// Reads what it says.
    reader: Option<Reader>,
    /// Reads the file that an instance of an earlier version writes.
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
    /// Whether this run has been well once.
    been_well: bool,
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
    /// Whether its acts are under way: they wait for the engine, its looks never do.
    acting: AtomicBool,
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
            acting: AtomicBool::new(false),
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
        for number in self.numbers() {
            // What an earlier version has started writes into a file until its next start.
            if reading::pipe_path(&agent.logs_dir(self.id), number).exists()
                && let Err(error) = self.read_along(&agent, number)
            {
                tracing::warn!(%error, app = %self.name, "a log is not read");
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

    /// Writes the state down and tells, if anything changed; whether it did.
    fn record(&self, agent: &Agent, before: &[u8]) -> bool {
        let kept = lock(&self.kept);
        let after = serde_json::to_vec(&*kept).unwrap_or_default();
        if after != before {
            if let Err(error) = tokio::task::block_in_place(|| kept.save(&agent.apps_dir())) {
                tracing::error!(%error, app = %self.name, "the record cannot be written");
            }
            drop(kept);
            agent.touch(&self.version);
            return true;
        }
        false
    }

    /// Looks at each instance without the engine; those about which only the engine can say more.
    async fn look_at_all(self: &Arc<Self>, agent: &Arc<Agent>, listing: &Listing) -> Vec<u32> {
        let numbers: Vec<u32> = lock(&self.kept).instances.iter().map(|i| i.number).collect();
        let mut unclear = Vec::new();
        for number in numbers {
            tokio::task::block_in_place(|| self.read_file(agent, number));
            if self.look(agent, listing, number).await == Look::Unclear {
                unclear.push(number);
            }
            self.check_health(agent, number);
        }
        unclear
    }

    /// Acts in a task of its own, one at a time: an engine that does not come back from one instance of an app keeps
    /// the others in sight.
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

    /// Plans and acts.
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
                    .map(|i| Step::Stop(i.number))
                    .collect()
            } else {
                let parts: Vec<Part> = kept.instances.iter().map(part).collect();
                let mut steps = plan(&kept.workload, &parts);
                if kept.is_put_aside() {
                    steps.retain(|step| !matches!(step, Step::Create(_)));
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
                Step::Create(slot) => self.create(agent, slot).await,
                Step::Stop(number) => self.begin_stop(agent, number),
            }
        }
        self.start_waiting(agent).await;
        self.write_hosts(agent);
    }

    /// A call for this app did not come back from an engine that hung. The second time, with no other app's call beside
    /// it, the app's desired revision is put aside.
    pub(super) fn struck(&self, agent: &Agent, alone: bool) {
        let mut kept = lock(&self.kept);
        if kept.is_put_aside() || kept.removing {
            return;
        }
        kept.strikes += 1;
        if kept.strikes >= MOST_STRIKES || kept.strikes >= STRIKES && alone {
            let why = "the container engine does not come back from starting it; it is tried again in an hour. Deploy \
                       another image or another description";
            kept.put_aside = Some(why.to_owned());
            kept.put_aside_at = Some(OffsetDateTime::now_utc());
            kept.message = Some(why.to_owned());
            let text = format!("release {}: {why}", kept.workload.revision);
            kept.event("put_aside", text);
        } else {
            let text = "the container engine hung while it worked for this app; it is tried again by itself";
            kept.event("engine_hung", text);
        }
        if let Err(error) = tokio::task::block_in_place(|| kept.save(&agent.apps_dir())) {
            tracing::error!(%error, app = %self.name, "the record cannot be written");
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

/// The acts of an app under way; they are over when this goes, also by a panic.
struct Acting(Arc<App>);

impl Drop for Acting {
    fn drop(&mut self) {
        self.0.acting.store(false, Ordering::Release);
    }
}

/// What a look at an instance has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// All that matters.
    Clear,
    /// Something that only the engine can explain.
    Unclear,
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

/// What the next instance waits for, and until when.
fn waiting(kept: &Kept) -> Option<String> {
    let parts: Vec<Part> = kept.instances.iter().map(part).collect();
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

/// Whether what runs is what is desired.
fn settled(kept: &Kept) -> bool {
    !kept.removing
        && kept.instances.len() == kept.workload.instances as usize
        && kept
            .instances
            .iter()
            .all(|i| i.revision == kept.workload.revision && i.state == InstanceState::Running)
}

/// A text of others, for events and states: bounded, so that no app's own words crowd out the rest.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}

/// When a process started, in ticks since boot (proc(5), stat, field 22): an id is given again, the
/// pair of both is not.
fn born(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}
