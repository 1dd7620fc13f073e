//! The age of the observed state: when the agent last answered, and whether its container engine answers. A
//! state older than ten seconds is shown with its age, never as running.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;

use crate::driver::{EngineSeen, Fetching};
use crate::ids::AppId;

/// Maximum age of a fresh observation.
pub const FRESH: Duration = Duration::from_secs(10);

/// This process's view of the observations; clones share it.
#[derive(Debug, Clone)]
pub struct Sight(Arc<SharedSight>);

#[derive(Debug)]
struct SharedSight {
    state: Mutex<SightState>,
    /// Answers of the agent since the process started.
    looks: AtomicU64,
}

#[derive(Debug)]
struct SightState {
    begun: Instant,
    last: Option<(Instant, OffsetDateTime)>,
    engine: EngineSeen,
    fetches: Vec<Fetching>,
}

/// The agent has not answered for longer than [`FRESH`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unseen {
    /// Time of the last answer; none if the agent never answered this process.
    pub since: Option<OffsetDateTime>,
}

/// The components that run apps, for `/readyz`.
#[derive(Debug, Clone, Serialize)]
pub struct ComponentHealth {
    /// Whether the agent has answered within the last ten seconds.
    pub agent: bool,
    /// Whether the container engine answers the agent.
    pub engine: bool,
    /// The time of the agent's last answer.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub agent_seen_at: Option<OffsetDateTime>,
    /// The time since when the engine has not answered.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub engine_silent_since: Option<OffsetDateTime>,
    /// Apps that the agent skips because they hung the engine.
    pub apps_put_aside: u32,
}

impl Default for Sight {
    fn default() -> Self {
        let state = SightState {
            begun: Instant::now(),
            last: None,
            engine: EngineSeen::default(),
            fetches: Vec::new(),
        };
        Self(Arc::new(SharedSight { state: Mutex::new(state), looks: AtomicU64::new(0) }))
    }
}

impl Sight {
    fn state(&self) -> std::sync::MutexGuard<'_, SightState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an answer of the agent. Called after the answer is stored in the database.
    pub fn saw(&self, engine: EngineSeen, fetches: Vec<Fetching>) {
        let mut state = self.state();
        state.last = Some((Instant::now(), OffsetDateTime::now_utc()));
        state.engine = engine;
        state.fetches = fetches;
        self.0.looks.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns since when apps are unobserved; none while the observation is fresh. A new process counts from
    /// its start.
    #[must_use]
    pub fn unseen(&self) -> Option<Unseen> {
        let state = self.state();
        let at = state.last.map_or(state.begun, |(at, _)| at);
        (at.elapsed() > FRESH).then(|| Unseen { since: state.last.map(|(_, at)| at) })
    }

    /// Returns the image pull that this app waits for.
    #[must_use]
    pub fn fetching(&self, app: AppId) -> Option<Fetching> {
        self.state().fetches.iter().find(|fetching| fetching.app == app).cloned()
    }

    /// Returns since when the engine has not answered; none while it answers or nothing is known.
    #[must_use]
    pub fn engine_silent_since(&self) -> Option<OffsetDateTime> {
        self.state().engine.silent_since
    }

    /// Returns the components' state, for `/readyz`.
    #[must_use]
    pub fn parts(&self) -> ComponentHealth {
        let agent = self.unseen().is_none();
        let state = self.state();
        ComponentHealth {
            agent: agent && state.last.is_some(),
            engine: agent && state.last.is_some() && state.engine.silent_since.is_none(),
            agent_seen_at: state.last.map(|(_, at)| at),
            engine_silent_since: state.engine.silent_since,
            apps_put_aside: state.engine.put_aside,
        }
    }

    /// Renders gauges in the Prometheus text format.
    #[must_use]
    pub fn render(&self) -> String {
        let state = self.state();
        let age = state.last.map_or(state.begun, |(at, _)| at).elapsed().as_secs_f64();
        let silent = u8::from(state.engine.silent_since.is_some());
        format!(
            "# TYPE bulkhead_agent_last_seen_seconds gauge\nbulkhead_agent_last_seen_seconds {age:.1}\n\
             # TYPE bulkhead_agent_answers_total counter\nbulkhead_agent_answers_total {}\n\
             # TYPE bulkhead_engine_silent gauge\nbulkhead_engine_silent {silent}\n\
             # TYPE bulkhead_apps_put_aside gauge\nbulkhead_apps_put_aside {}\n",
            self.0.looks.load(Ordering::Relaxed),
            state.engine.put_aside
        )
    }

    /// An observation of the given age, for tests.
    #[cfg(test)]
    pub(super) fn aged(age: Duration) -> Self {
        let sight = Self::default();
        if let Some(then) = Instant::now().checked_sub(age) {
            sight.state().last = Some((then, OffsetDateTime::now_utc() - age));
        }
        sight
    }
}

/// Formats a time of day for sentences.
pub(super) fn clock(at: OffsetDateTime) -> String {
    format!("{:02}:{:02}:{:02} UTC", at.hour(), at.minute(), at.second())
}

impl Unseen {
    /// Returns the summary for an unobserved app, with its last summary.
    #[must_use]
    pub fn words(self, last: &str) -> String {
        let at = self
            .since
            .map_or_else(|| "since this service started".to_owned(), |at| format!("since {}", clock(at)));
        format!("Not seen {at}: the agent on the machine does not answer. Before that: {last}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_grows_old_and_is_fresh_again() {
        let sight = Sight::default();
        assert!(sight.unseen().is_none() && !sight.parts().agent);
        let sight = Sight::aged(Duration::from_secs(11));
        let words = sight.unseen().unwrap().words("1 of 1 running.");
        assert!(
            words.starts_with("Not seen since ") && words.ends_with("Before that: 1 of 1 running."),
            "{words}"
        );
        assert!(!sight.parts().agent && !sight.parts().engine);
        sight.saw(EngineSeen::default(), Vec::new());
        assert!(sight.unseen().is_none() && sight.parts().agent && sight.parts().engine);
    }

    #[test]
    fn an_engine_that_is_silent_is_told_apart_from_an_agent_that_is() {
        let sight = Sight::default();
        let since = OffsetDateTime::now_utc();
        sight.saw(EngineSeen { silent_since: Some(since), put_aside: 2 }, Vec::new());
        let parts = sight.parts();
        assert!(parts.agent && !parts.engine);
        assert_eq!((parts.engine_silent_since, parts.apps_put_aside), (Some(since), 2));
        let text = sight.render();
        assert!(
            text.contains("bulkhead_engine_silent 1") && text.contains("bulkhead_apps_put_aside 2"),
            "{text}"
        );
    }
}
