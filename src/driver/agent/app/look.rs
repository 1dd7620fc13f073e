//! Checks instances against the engine, /proc and the bridge, and handles those that have ended.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;

use super::super::core::{Agent, Listing, lock};
use super::super::kept::Instance;
use super::super::logs::{self, Tail};
use super::{AgentApp, BACKOFF, InstanceCheck, LONG_RUN, SETTLE, born, discard, raw_log, reading, short};
use crate::driver::podman::ports::PortState;
use crate::driver::podman::render;
use crate::driver::{Cause, Ending, InstanceState};

/// Number of log lines stored with the end of an instance: enough to hold the message above a stack trace.
const LAST_LINES: usize = 20;
/// A listing older than this is ignored.
const FRESH: Duration = Duration::from_secs(3);

impl AgentApp {
    /// Reads the remaining output of an instance that has ended, without a rate limit.
    pub(super) fn read_last_words(&self, agent: &Agent, number: u32) {
        if let Some(reader) = lock(&self.live).get(&number).and_then(|live| live.reader.as_ref()) {
            reader.drain(&self.lines);
            return;
        }
        self.read_file(agent, number);
    }

    /// Reads new lines from the log file of an instance that an earlier version started. All other instances have a
    /// reader of their own.
    pub(super) fn read_file(&self, agent: &Agent, number: u32) {
        let mut live = lock(&self.live);
        let entry = live.entry(number).or_default();
        if entry.reader.is_some() {
            return;
        }
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

    /// Compares one instance with /proc, its monitor's exit file and a recent listing. Sends no request to the
    /// engine.
    pub(super) async fn look(&self, agent: &Arc<Agent>, listing: &Listing, number: u32) -> InstanceCheck {
        let Some(instance) = self.instance(number) else { return InstanceCheck::Clear };
        let running = matches!(
            instance.state,
            InstanceState::Starting | InstanceState::Running | InstanceState::Unhealthy
        );
        if !running {
            return InstanceCheck::Clear;
        }
        let says_something = lock(&self.live).entry(number).or_default().valid_from <= listing.round
            && listing.at.is_some_and(|at| at.elapsed() < FRESH);
        if is_alive(&instance) {
            let listed = listing.containers.get(&instance.container);
            if says_something && listed.is_none_or(|c| c.state != "running") {
                return InstanceCheck::Unclear;
            }
            lock(&self.live).entry(number).or_default().odd = None;
            if self.look_at_port(agent, &instance).await == InstanceCheck::Unclear {
                return InstanceCheck::Unclear;
            }
            self.note_running(number);
            return InstanceCheck::Clear;
        }
        if let Some(code) = exit_code(&instance) {
            let hungry = code != 0 && agent.oom.killed(&instance.identity);
            self.ended(agent, number, cause_of(code, hungry), Some(code), String::new());
            return InstanceCheck::Clear;
        }
        // The process may have just ended, and its monitor may be about to report it. This state must not last.
        if monitor_lives(&instance) && !self.is_odd_for_long(number) {
            return InstanceCheck::Clear;
        }
        InstanceCheck::Unclear
    }

    /// Asks the engine about an instance in an unexpected state. Only the engine's current answer decides: a
    /// listing may be older than the latest change.
    pub(super) async fn ask_engine(&self, agent: &Arc<Agent>, number: u32) {
        let Some(instance) = self.instance(number) else { return };
        let found = {
            let _waiting = agent.engine.begin(self.id);
            agent.podman.find(&instance.container).await
        };
        let now = match found {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, app = %self.name, "an instance cannot be looked at");
                return;
            }
        };
        // The instance may have been restarted or stopped meanwhile.
        if self.instance(number).is_none_or(|i| i.pid != instance.pid || i.state == InstanceState::Stopping) {
            return;
        }
        match now {
            None => self.vanished(agent, number, "its container had been removed; the instance is replaced"),
            Some(now) if matches!(now.state.as_str(), "exited" | "stopped") => {
                let hungry = now.exit_code != 0 && agent.oom.killed(&now.id);
                let cause = cause_of(now.exit_code, hungry);
                self.ended(agent, number, cause, Some(now.exit_code), String::new());
            }
            Some(now) if now.state == "running" && is_alive(&instance) => {
                let gone = instance.port.as_ref().is_some_and(|port| port.look() == PortState::Gone);
                if gone {
                    self.discard(agent, &instance.container).await;
                    self.vanished(agent, number, "its network had been removed; the instance is replaced");
                } else {
                    self.note_running(number);
                }
            }
            Some(_) if monitor_lives(&instance) && !self.is_odd_for_long(number) => {}
            // The engine says "running", but the container's monitor is gone: the engine's state of this container
            // cannot be trusted.
            Some(_) => {
                self.discard(agent, &instance.container).await;
                self.vanished(agent, number, why_gone(&instance, &boot_id()));
            }
        }
    }

    async fn discard(&self, agent: &Agent, container: &str) {
        let _waiting = agent.engine.begin(self.id);
        let _ = discard(agent, container).await;
    }

    /// Returns whether an instance has stayed too long in a state that should last only a moment.
    fn is_odd_for_long(&self, number: u32) -> bool {
        let mut live = lock(&self.live);
        let since = live.entry(number).or_default().odd.get_or_insert_with(tokio::time::Instant::now);
        since.elapsed() > Duration::from_secs(10)
    }

    /// Checks the bridge port of an instance. Without a port the instance has no network and is replaced. A port
    /// that was opened is closed again.
    async fn look_at_port(&self, agent: &Arc<Agent>, instance: &Instance) -> InstanceCheck {
        let Some(port) = &instance.port else { return InstanceCheck::Clear };
        if lock(&agent.unsettled).contains(port) {
            let kept = lock(&self.kept).clone();
            if let Some(text) = agent.settle_again(&kept, instance).await {
                lock(&self.kept).event("repaired", text);
            }
        }
        let noted = lock(&agent.unlocked).remove(port);
        let seen = match port.look() {
            // The port may have been read while it was being closed for the first time.
            PortState::Closed if noted && port.is_unlocked().await => PortState::Open,
            seen => seen,
        };
        match seen {
            PortState::Closed => {}
            PortState::Open => {
                let text = match port.close().await {
                    Ok(()) => "was open to its neighbours and was closed again".to_owned(),
                    Err(error) => format!("is open to its neighbours and cannot be closed: {error}"),
                };
                lock(&self.kept).event("repaired", format!("instance {}: its port {text}", instance.number));
            }
            PortState::Gone => return InstanceCheck::Unclear,
        }
        InstanceCheck::Clear
    }

    fn note_running(&self, number: u32) {
        let (well, ill, why) = lock(&self.live)
            .get(&number)
            .map_or((false, 0, String::new()), |live| (live.well, live.ill, live.why.clone()));
        let mut kept = lock(&self.kept);
        let revision = kept.instances.iter().find(|i| i.number == number).map_or(0, |i| i.revision);
        let checked = kept.workload_of(revision).is_some_and(|w| w.health.is_some());
        if let Some(instance) = kept.instances.iter_mut().find(|i| i.number == number) {
            let up = instance.started.map_or(time::Duration::ZERO, |at| OffsetDateTime::now_utc() - at);
            let why = (checked && !well && !why.is_empty()).then_some(why);
            if instance.why != why {
                instance.why = why;
            }
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

    /// Records that an instance has ended by itself: the reason, and the time of its next start.
    pub(super) fn ended(&self, agent: &Agent, number: u32, cause: Cause, code: Option<i32>, detail: String) {
        tokio::task::block_in_place(|| self.read_last_words(agent, number));
        let last_lines: Vec<String> = logs::last(&agent.logs_dir(self.id), Some(number), LAST_LINES)
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
        instance.why = None;
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

    /// Replaces an instance at once after its container was removed from outside.
    pub(super) fn vanished(&self, agent: &Agent, number: u32, why: &str) {
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
            // A removal from outside does not count as a failure of the app.
            instance.failures = instance.failures.saturating_sub(1);
        }
        kept.event("repaired", format!("instance {number}: {why} by instance {fresh}"));
    }

    /// Drops the state of an instance number that is no longer used, and the oldest logs.
    pub(super) fn forget(&self, agent: &Agent, number: u32) {
        lock(&self.live).remove(&number);
        let dir = agent.logs_dir(self.id);
        let _ = std::fs::remove_file(raw_log(&dir, number));
        let _ = std::fs::remove_file(reading::pipe_path(&dir, number));
        for file in super::image::files(&dir, number) {
            let _ = std::fs::remove_file(file);
        }
        let mut numbers: Vec<u32> = lock(&self.kept).instances.iter().map(|i| i.number).collect();
        numbers.retain(|own| *own != number);
        tokio::task::block_in_place(|| logs::prune(&dir, &numbers));
    }

    /// Removes containers of this app that belong to no instance. A crash between two steps leaves them.
    pub(super) async fn sweep(&self, agent: &Agent, listing: &Listing) {
        let known: Vec<String> = lock(&self.kept).instances.iter().map(|i| i.container.clone()).collect();
        let id = self.id.to_string();
        for (name, container) in listing.containers.iter() {
            if container.app() == Some(id.as_str()) && !known.contains(name) {
                let fresh = lock(&self.live).values().any(|live| live.valid_from > listing.round);
                let _waiting = agent.engine.beside();
                if !fresh && discard(agent, name).await.is_ok() {
                    tracing::info!(name, "a container that belongs to no instance was removed");
                }
            }
        }
    }
}

/// Returns the kernel's id of the current boot; empty if it cannot be read.
pub(super) fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// Returns why the process of an instance is gone although it was not stopped.
fn why_gone(instance: &Instance, boot: &str) -> &'static str {
    if !instance.boot.is_empty() && !boot.is_empty() && instance.boot != boot {
        "the machine was restarted; the instance is replaced"
    } else {
        "its process or the monitor of its process had ended; the instance is replaced"
    }
}

pub(in crate::driver::agent) fn is_alive(instance: &Instance) -> bool {
    instance.pid > 0
        && born(instance.pid) == Some(instance.born)
        && (instance.conmon <= 0 || Path::new(&format!("/proc/{}", instance.conmon)).exists())
}

/// Returns the exit code that the monitor writes once the process has ended; none before.
fn exit_code(instance: &Instance) -> Option<i32> {
    if instance.exit_file.is_empty() {
        return None;
    }
    std::fs::read_to_string(&instance.exit_file).ok()?.trim().parse().ok()
}

fn monitor_lives(instance: &Instance) -> bool {
    instance.conmon > 0 && Path::new(&format!("/proc/{}", instance.conmon)).exists()
}

/// Returns the cause of an end. `hungry`: the kernel's log says that it killed a process of the instance for
/// memory.
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
            "out of memory: the kernel killed it at its memory limit; give it more memory, or less scratch"
                .into()
        }
        (Cause::Killed, _) => "killed (137) by a signal; the sender is unknown".into(),
        (_, Some(code)) => format!("it exited with code {code}"),
        _ => "it ended".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reboot_is_named_and_nothing_else_is_taken_for_one() {
        let mut instance = Instance::new(1, 1, 0, "bk-x".into());
        // As recorded by an earlier version.
        assert!(why_gone(&instance, "b").starts_with("its process"));
        instance.boot = "a".into();
        assert!(why_gone(&instance, "a").starts_with("its process"));
        assert!(why_gone(&instance, "").starts_with("its process"), "it cannot be told");
        assert_eq!(why_gone(&instance, "b"), "the machine was restarted; the instance is replaced");
        assert_eq!(boot_id().len(), 36);
    }

    #[test]
    fn a_process_that_has_ended_is_not_alive_nor_is_another_with_its_id() {
        let mut instance = Instance::new(1, 1, 0, "bk-x".into());
        assert!(!is_alive(&instance), "it was never started");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        instance.pid = i32::try_from(child.id()).unwrap();
        instance.born = born(instance.pid).unwrap();
        assert!(is_alive(&instance));
        instance.born += 1;
        assert!(!is_alive(&instance));
        instance.born -= 1;
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(&instance));
    }
}
