//! How fresh the picture of the running apps is: when the agent last answered, and whether its container engine does.
//! A picture that is older than ten seconds is shown with its age, never as running.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;

use crate::driver::{EngineSeen, Fetching};
use crate::ids::AppId;

/// A picture older than this is old.
pub const FRESH: Duration = Duration::from_secs(10);

/// The picture of this process; clones share it.
#[derive(Debug, Clone)]
pub struct Sight(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Requests for the picture's age, so that metrics need no clock of their own.
    looks: AtomicU64,
}

#[derive(Debug)]
struct State {
    begun: Instant,
    last: Option<(Instant, OffsetDateTime)>,
    engine: EngineSeen,
    fetches: Vec<Fetching>,
}

/// Since when the agent has not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unseen {
    /// The time of the last answer; none when there was none since this process started.
    pub since: Option<OffsetDateTime>,
}

/// The parts of the platform that run apps, for `/readyz`.
#[derive(Debug, Clone, Serialize)]
pub struct Parts {
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
    /// Apps that hung the engine and were put aside.
    pub apps_put_aside: u32,
}

impl Default for Sight {
    fn default() -> Self {
        let state =
            State { begun: Instant::now(), last: None, engine: EngineSeen::default(), fetches: Vec::new() };
        Self(Arc::new(Shared { state: Mutex::new(state), looks: AtomicU64::new(0) }))
    }
}

impl Sight {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent has answered, and the answer is in the database.
    pub fn saw(&self, engine: EngineSeen, fetches: Vec<Fetching>) {
        let mut state = self.state();
        state.last = Some((Instant::now(), OffsetDateTime::now_utc()));
        state.engine = engine;
        state.fetches = fetches;
        self.0.looks.fetch_add(1, Ordering::Relaxed);
    }

    /// Since when apps are not seen; none while the picture is fresh. A process that has just started has its time too.
    #[must_use]
    pub fn unseen(&self) -> Option<Unseen> {
        let state = self.state();
        let at = state.last.map_or(state.begun, |(at, _)| at);
        (at.elapsed() > FRESH).then(|| Unseen { since: state.last.map(|(_, at)| at) })
    }

    /// The fetch that this app waits for.
    #[must_use]
    pub fn fetching(&self, app: AppId) -> Option<Fetching> {
        self.state().fetches.iter().find(|fetching| fetching.app == app).cloned()
    }

    /// Since when the engine has not answered; none while it does, or while nothing is known.
    #[must_use]
    pub fn engine_silent_since(&self) -> Option<OffsetDateTime> {
        self.state().engine.silent_since
    }

    /// The parts, for `/readyz`.
    #[must_use]
    pub fn parts(&self) -> Parts {
        let agent = self.unseen().is_none();
        let state = self.state();
        Parts {
            agent: agent && state.last.is_some(),
            engine: agent && state.last.is_some() && state.engine.silent_since.is_none(),
            agent_seen_at: state.last.map(|(_, at)| at),
            engine_silent_since: state.engine.silent_since,
            apps_put_aside: state.engine.put_aside,
        }
    }

    /// Gauges in Prometheus' text form.
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

    /// A picture of another age, for tests of what it looks like.
    #[cfg(test)]
    pub(super) fn aged(age: Duration) -> Self {
        let sight = Self::default();
        if let Some(then) = Instant::now().checked_sub(age) {
            sight.state().last = Some((then, OffsetDateTime::now_utc() - age));
        }
        sight
    }
}

/// A time of the day as sentences have it.
pub(super) fn clock(at: OffsetDateTime) -> String {
    format!("{:02}:{:02}:{:02} UTC", at.hour(), at.minute(), at.second())
}

impl Unseen {
    /// The sentence of a summary, with the summary of the last picture.
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
