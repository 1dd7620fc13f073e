//! The API representation of an app.

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

use super::sight::{Sight, clock};
use super::{App, Event, Release, reasons};
use crate::driver::{InstanceObserved, InstanceState};
use crate::fault::Fault;
use crate::ids::{AppName, Digest, TenantName};

/// One app.
#[derive(Serialize)]
pub(super) struct AppView {
    name: AppName,
    tenant: TenantName,
    generation: i64,
    observed_generation: i64,
    revision: i64,
    state: &'static str,
    summary: String,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    changed_at: OffsetDateTime,
    uids: Uids,
    reserved: ReservedView,
    #[serde(skip_serializing_if = "Option::is_none")]
    desired: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<ImageView>,
    conditions: Vec<AppCondition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    observed: Option<ObservedView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warnings: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    events: Vec<Event>,
}

#[derive(Serialize)]
struct Uids {
    start: i64,
    end: i64,
}

#[derive(Serialize)]
struct ReservedView {
    #[serde(flatten)]
    amounts: super::reservation::Reserved,
    words: String,
}

#[derive(Serialize)]
pub(super) struct ImageView {
    asked: String,
    index_digest: Digest,
    digest: Digest,
    user: String,
}

#[derive(Serialize)]
struct AppCondition {
    #[serde(rename = "type")]
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
    /// Time of the last change, where it is known.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    since: Option<OffsetDateTime>,
}

#[derive(Serialize)]
struct ObservedView {
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    at: Option<OffsetDateTime>,
    /// Set while the agent does not answer: the following fields are then outdated.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stale: bool,
    /// Time of the agent's last answer, set while it does not answer.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    seen_at: Option<OffsetDateTime>,
    revision: i64,
    settled: bool,
    instances: Vec<InstanceObserved>,
}

/// Returns the state of an app as one word and one sentence. An app that cannot be observed is never called
/// running.
#[must_use]
pub(super) fn state(app: &App, wanted: u32, tenant_state: &str, sight: &Sight) -> (&'static str, String) {
    let (state, summary) = last_state(app, wanted, tenant_state, sight);
    if matches!(state, "deleting" | "stopped") || app.observed.is_none() {
        return (state, summary);
    }
    if let Some(unseen) = sight.unseen() {
        return ("unseen", unseen.words(&summary));
    }
    match sight.engine_silent_since() {
        Some(since) if state != "running" => {
            let at = clock(since);
            let summary =
                format!("{summary} The container engine has not answered since {at}; the app waits for it.");
            (state, summary)
        }
        _ => (state, summary),
    }
}

/// Returns the state according to the last observation.
fn last_state(app: &App, wanted: u32, tenant_state: &str, sight: &Sight) -> (&'static str, String) {
    if app.deleted_at.is_some() {
        return ("deleting", "The app is being deleted.".into());
    }
    if tenant_state == "suspended" {
        return ("stopped", "The tenant is suspended; its data is kept.".into());
    }
    let fetching = sight.fetching(app.id);
    let release = (app.revision, wanted);
    if let (Some(problem), None) = (&app.problem, &fetching) {
        return ("failed", problem.clone());
    }
    let Some(seen) = &app.observed else {
        let why = match &fetching {
            Some(_) => reasons::waiting(&[], release, false, fetching.as_ref()),
            None => "The app was accepted and is being set up.".into(),
        };
        return ("changing", format!("0 of {wanted} running. {why}"));
    };
    let well = seen.instances.iter().filter(|i| i.state == InstanceState::Running).count();
    let taken = seen.generation == app.generation;
    if seen.settled && taken {
        if wanted == 0 {
            return ("stopped", "The app is stopped: instances is 0.".into());
        }
        return match seen.instances.iter().find_map(reasons::flapping) {
            Some(why) => ("flapping", format!("{well} of {wanted} running. {why}")),
            None => ("running", format!("{well} of {wanted} running.")),
        };
    }
    let progress = reasons::progress(&seen.instances, app.revision, wanted);
    // Report the problem of the desired release first: earlier releases are ending.
    let trouble = || {
        let of = |desired: bool| {
            seen.instances
                .iter()
                .filter(move |i| (i.revision == app.revision) == desired)
                .find_map(reasons::trouble)
        };
        of(true).or_else(|| of(false))
    };
    match trouble().filter(|_| fetching.is_none()) {
        Some(trouble) if well > 0 => ("attention", format!("{progress} {trouble}")),
        Some(trouble) => ("failed", trouble),
        None => {
            let message = seen.message.clone().filter(|_| fetching.is_none() && taken);
            let why = message
                .unwrap_or_else(|| reasons::waiting(&seen.instances, release, taken, fetching.as_ref()));
            ("changing", format!("{progress} {why}"))
        }
    }
}

impl AppView {
    /// Builds the view from rows; `release` is the desired one.
    pub(super) fn new(
        tenant: (&TenantName, &str),
        app: App,
        release: Option<&Release>,
        events: Vec<Event>,
        sight: &Sight,
    ) -> Self {
        let wanted = release
            .and_then(|release| release.spec["instances"].as_u64())
            .and_then(|n| u32::try_from(n).ok());
        let (state, summary) = state(&app, wanted.unwrap_or(1), tenant.1, sight);
        let unseen = sight.unseen();
        let ready = match state {
            "running" | "stopped" => ("true", "Settled"),
            "changing" | "deleting" => ("unknown", "Changing"),
            "unseen" => ("unknown", "NotSeen"),
            "flapping" => ("false", "Flapping"),
            _ => ("false", "NotRunning"),
        };
        let taken = if app.observed_generation >= app.generation {
            ("true", "Taken")
        } else {
            ("unknown", "Pending")
        };
        let conditions = vec![
            AppCondition {
                kind: "Accepted",
                status: taken.0,
                reason: taken.1,
                message: app.problem.clone().unwrap_or_default(),
                since: Some(app.changed_at),
            },
            AppCondition {
                kind: "Ready",
                status: ready.0,
                reason: ready.1,
                message: summary.clone(),
                since: Some(app.observed_at.unwrap_or(app.changed_at)),
            },
        ];
        Self {
            tenant: tenant.0.clone(),
            generation: app.generation,
            observed_generation: app.observed_generation,
            revision: app.revision,
            state,
            summary,
            created_at: app.created_at,
            changed_at: app.changed_at,
            uids: Uids { start: app.uid_start, end: app.uid_start + app.uid_size },
            reserved: ReservedView { amounts: app.reserved, words: app.peak.words() },
            desired: release.map(|release| release.spec.clone()),
            image: release.map(image_view),
            warnings: release.filter(|r| r.warnings != Value::Array(Vec::new())).map(|r| r.warnings.clone()),
            conditions,
            observed: app.observed.map(|seen| ObservedView {
                at: app.observed_at,
                stale: unseen.is_some(),
                seen_at: unseen.and_then(|unseen| unseen.since),
                revision: seen.revision,
                settled: seen.settled,
                instances: seen.instances,
            }),
            name: app.name,
            events,
        }
    }

    /// Adds the condition `Connected`: whether the app has every connection in `connects`, with the reasons for
    /// missing ones.
    pub(super) fn connected(mut self, missing: &[Fault]) -> Self {
        let (status, reason) = if missing.is_empty() { ("true", "AsNamed") } else { ("false", "Missing") };
        let message = missing.iter().map(|fault| fault.message.as_str()).collect::<Vec<_>>().join("; ");
        self.conditions.push(AppCondition { kind: "Connected", status, reason, message, since: None });
        self
    }

    pub(super) fn name(&self) -> &AppName {
        &self.name
    }

    pub(super) fn generation(&self) -> i64 {
        self.generation
    }
}

fn image_view(release: &Release) -> ImageView {
    ImageView {
        asked: release.image(),
        index_digest: release.index_digest.clone(),
        digest: release.digest.clone(),
        user: format!("{}:{}", release.user.uid, release.user.gid),
    }
}

/// One release.
#[derive(Serialize)]
pub(super) struct ReleaseView {
    pub(super) revision: i64,
    image: ImageView,
    spec: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    rolled_back_to: Option<i64>,
    by: String,
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
}

impl From<Release> for ReleaseView {
    fn from(release: Release) -> Self {
        Self {
            revision: release.revision,
            image: image_view(&release),
            spec: release.spec,
            rolled_back_to: release.rolled_back_to,
            by: release.actor,
            at: release.created_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reasons::tests::instance;
    use super::*;
    use crate::apps::Peak;
    use crate::driver::{AppObserved, Cause, Ending, EngineSeen, Fetching};
    use crate::ids::{AppId, TenantId};

    fn app(generation: i64, seen: i64, instances: Vec<InstanceObserved>) -> App {
        let name: AppName = "web".parse().unwrap();
        let peak = Peak { instances: 2, surge: 1, cpu_millis: 10, memory: 10 };
        let observed = AppObserved {
            tenant: "acme".parse().unwrap(),
            app: name.clone(),
            app_id: AppId(1),
            generation: seen,
            revision: seen,
            settled: instances.iter().all(|i| i.revision == seen && i.state == InstanceState::Running),
            message: None,
            instances,
            events: Vec::new(),
        };
        App {
            id: AppId(1),
            tenant_id: TenantId(1),
            name,
            generation,
            observed_generation: seen,
            revision: generation,
            peak,
            reserved: peak.reserved(),
            uid_start: 0,
            uid_size: 0,
            observed: Some(observed),
            observed_at: None,
            problem: None,
            created_at: OffsetDateTime::UNIX_EPOCH,
            changed_at: OffsetDateTime::UNIX_EPOCH,
            deleted_at: None,
        }
    }

    #[test]
    fn an_update_that_waits_is_never_called_done() {
        use InstanceState::{Failed, Running, Stopping};
        let sight = Sight::default();
        sight.saw(EngineSeen::default(), Vec::new());
        let running = |revision| vec![instance(1, revision, Running), instance(2, revision, Running)];
        assert_eq!(
            state(&app(1, 1, running(1)), 2, "active", &sight),
            ("running", "2 of 2 running.".to_owned())
        );
        // The machine does not know the accepted generation yet.
        let (word, text) = state(&app(2, 1, running(1)), 2, "active", &sight);
        assert_eq!(word, "changing");
        assert!(
            text.starts_with("0 of 2 running of release 2; 2 of an earlier one. Release 2 is being"),
            "{text}"
        );
        // All new instances run, and an old one is still stopping.
        let mut late = running(2);
        late.push(instance(3, 1, Stopping));
        let (word, text) = state(&app(2, 2, late), 2, "active", &sight);
        assert_eq!(word, "changing");
        assert!(text.starts_with("2 of 2 running. Waiting for instance 3 of release 1 to stop"), "{text}");
        // The image is being pulled: for an update, and for a new app.
        let since = OffsetDateTime::UNIX_EPOCH;
        let fetching =
            Fetching { app: AppId(1), revision: 2, since, waits: false, bytes: 5 << 20, unpacked: 0 };
        sight.saw(EngineSeen::default(), vec![fetching]);
        let (_, text) = state(&app(2, 1, running(1)), 2, "active", &sight);
        assert!(text.ends_with("5 MiB so far."), "{text}");
        let mut new = app(1, 1, Vec::new());
        new.observed = None;
        let (word, text) = state(&new, 2, "active", &sight);
        assert_eq!(word, "changing");
        assert!(text.starts_with("0 of 2 running. Pulling the image"), "{text}");
        // A crash is reported with the line that names the error.
        sight.saw(EngineSeen::default(), Vec::new());
        let mut bad = instance(3, 2, Failed);
        bad.last_end = Some(Ending {
            cause: Cause::Exited,
            exit_code: Some(1),
            at: since,
            ran_ms: 20,
            detail: "exited with code 1".into(),
            last_lines: vec!["Error: no database".into(), "}".into(), "Node.js v18".into()],
        });
        let mut all = running(1);
        all.push(bad);
        let (word, text) = state(&app(2, 2, all), 2, "active", &sight);
        assert_eq!(word, "attention");
        assert!(text.contains("its log says: Error: no database") && !text.contains("Node.js"), "{text}");
    }
}
