//! Health checks through the prober. They run in tasks of their own, beside the app's loop.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;

use super::super::core::{Agent, lock};
use super::{AgentApp, CHECK, FAILURES};
use crate::driver::podman::listens;
use crate::driver::workload::{HealthCheck, HealthPurpose};
use crate::driver::{Cause, InstanceState};
use crate::prober::{ProbeAnswer, ProbeQuestion};

impl AgentApp {
    /// Starts a health check in its own task when one is due.
    pub(super) fn check_health(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
        let (question, asked, restart) = {
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
            let asked = CheckParameters { in_grace, port, pid: instance.pid };
            let restart = health.purpose == HealthPurpose::Restart && ill >= FAILURES && !in_grace;
            (
                ProbeQuestion { address: *address, port, path, timeout_ms: 2_000 },
                asked,
                restart.then_some(health.grace),
            )
        };
        if let Some(grace) = restart {
            self.restart_ill(agent, number, grace);
            return;
        }
        let soon = if asked.in_grace { Duration::from_millis(250) } else { CHECK };
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
            let Some(was) = app.note_check(number, answer, asked) else { return };
            let now = lock(&app.live).get(&number).is_some_and(|live| live.well);
            if !was && !now {
                // A new instance is checked again soon: its release continues once the instance is healthy.
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            if was != now || !now {
                app.wake.notify_one();
            }
        });
    }

    /// Records an answer of the prober and returns whether the instance was healthy before. An unreachable prober
    /// gives no verdict: an app is not restarted for a failure that is not its own.
    fn note_check(
        &self,
        number: u32,
        answer: std::io::Result<ProbeAnswer>,
        asked: CheckParameters,
    ) -> Option<bool> {
        let closed = |answer| match answer {
            ProbeAnswer::Closed => ProbeAnswer::Ill(listens::explain(asked.port, &listens::of(asked.pid))),
            answer => answer,
        };
        let answer = answer.map(closed);
        let mut live = lock(&self.live);
        let entry = live.get_mut(&number)?;
        entry.checking = false;
        let was = entry.well;
        match answer.ok()? {
            ProbeAnswer::Well => (entry.well, entry.ill, entry.been_well) = (true, 0, true),
            ProbeAnswer::Closed => {}
            ProbeAnswer::Ill(why) => {
                entry.well = false;
                entry.ill = entry.ill.saturating_add(u32::from(!asked.in_grace));
                entry.why = why;
            }
        }
        Some(was)
    }

    fn restart_ill(self: &Arc<Self>, agent: &Arc<Agent>, number: u32, grace: u16) {
        let (why, been_well) =
            lock(&self.live).get(&number).map(|live| (live.why.clone(), live.been_well)).unwrap_or_default();
        let Some(container) = self.with(number, |i| i.container.clone()) else { return };
        let detail = verdict(&why, been_well, grace);
        lock(&self.kept).event("unhealthy", format!("instance {number}: {detail}"));
        self.ended(agent, number, Cause::Unhealthy, None, detail);
        let stop_grace = lock(&self.kept).workload.stop_grace;
        let agent = Arc::clone(agent);
        tokio::spawn(async move {
            let _waiting = agent.engine.beside();
            let _ = agent.podman.stop(&container, stop_grace).await;
        });
    }
}

/// The parameters of one health check.
#[derive(Clone, Copy)]
struct CheckParameters {
    in_grace: bool,
    port: u16,
    pid: i32,
}

/// Returns why an instance restarts. A start that took too long is told apart from a later failure.
fn verdict(why: &str, been_well: bool, grace: u16) -> String {
    if been_well {
        format!("its health check fails: {why} ({FAILURES} times in a row)")
    } else {
        format!(
            "its health check fails: {why}; it was never healthy within its grace of {grace} s. If its start takes longer, \
             give health a larger grace"
        )
    }
}
