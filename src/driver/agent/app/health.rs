//! Health checks, through the prober, beside the app's own loop.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;

use super::super::core::{Agent, lock};
use super::{App, CHECK, FAILURES};
use crate::driver::workload::HealthCheck;
use crate::driver::{Cause, InstanceState};
use crate::prober::{Answer, Question};

impl App {
    /// Asks the prober, beside the loop, when it is time.
    pub(super) fn check_health(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
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
            let _waiting = agent.engine.beside();
            let _ = agent.podman.stop(&container, grace).await;
        });
    }
}
