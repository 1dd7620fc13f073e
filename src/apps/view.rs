//! How the API shows an app.

use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

use super::sight::{Sight, clock};
use super::{App, Event, Release};
use crate::driver::{Cause, Ending, InstanceObserved, InstanceState};
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
    reserved: Reserved,
    #[serde(skip_serializing_if = "Option::is_none")]
    desired: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<ImageView>,
    conditions: Vec<Condition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    observed: Option<Observed>,
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
struct Reserved {
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
struct Condition {
    #[serde(rename = "type")]
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
    /// Where it is known.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    since: Option<OffsetDateTime>,
}

#[derive(Serialize)]
struct Observed {
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    at: Option<OffsetDateTime>,
    /// While the agent does not answer, what follows is old: nobody knows what runs now.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stale: bool,
    /// The time of the agent's last answer, while it does not answer.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    seen_at: Option<OffsetDateTime>,
    revision: i64,
    settled: bool,
    instances: Vec<InstanceObserved>,
}

/// The state of an app in one word and in one sentence. What cannot be seen is not called running.
#[must_use]
pub(super) fn state(app: &App, wanted: u32, tenant_state: &str, sight: &Sight) -> (&'static str, String) {
    let (state, summary) = last_state(app, wanted, tenant_state);
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

/// The same by the last picture.
fn last_state(app: &App, wanted: u32, tenant_state: &str) -> (&'static str, String) {
    if app.deleted_at.is_some() {
        return ("deleting", "It is being removed.".into());
    }
    if tenant_state == "suspended" {
        return ("stopped", "The tenant is suspended; nothing is lost.".into());
    }
    let Some(seen) = &app.observed else {
        let why = app.problem.clone().unwrap_or_else(|| "It was accepted and is being set up.".into());
        return (if app.problem.is_some() { "failed" } else { "changing" }, why);
    };
    if let Some(problem) = &app.problem {
        return ("failed", problem.clone());
    }
    let well = seen.instances.iter().filter(|i| i.state == InstanceState::Running).count();
    if seen.settled && seen.generation == app.generation {
        if wanted == 0 {
            return ("stopped", "It is stopped and kept: instances is 0.".into());
        }
        return match seen.instances.iter().find_map(flapping) {
            Some(why) => ("flapping", format!("{well} of {wanted} running. {why}")),
            None => ("running", format!("{well} of {wanted} running.")),
        };
    }
    match seen.instances.iter().find_map(trouble) {
        Some(trouble) if well > 0 => {
            ("attention", format!("{} {trouble}", progress(&seen.instances, app.revision, wanted)))
        }
        Some(trouble) => ("failed", trouble),
        None => {
            let progress = || {
                let why =
                    seen.instances.iter().find_map(unready).map(|why| format!(" {why}")).unwrap_or_default();
                progress(&seen.instances, app.revision, wanted) + &why
            };
            ("changing", seen.message.clone().unwrap_or_else(progress))
        }
    }
}

/// Ends in a row from which on an instance that runs is not called well.
const FLAPS: u32 = 3;

/// What is wrong with an instance that runs, but has ended again and again before.
fn flapping(instance: &InstanceObserved) -> Option<String> {
    let ending = instance.last_end.as_ref().filter(|_| instance.failures >= FLAPS)?;
    let (number, times) = (instance.number, instance.failures);
    Some(format!("Instance {number} has ended {times} times in a row and runs again. {}", ended(ending)))
}

/// Why an instance that runs is not ready.
fn unready(instance: &InstanceObserved) -> Option<String> {
    let why = instance.why.as_ref()?;
    let word = if instance.state == InstanceState::Starting { "is starting" } else { "is not ready" };
    Some(format!("Instance {} {word}: {why}.", instance.number))
}

/// How far an app is on its way to a release: what runs of an earlier one does not count.
fn progress(instances: &[InstanceObserved], revision: i64, wanted: u32) -> String {
    let well = |i: &&InstanceObserved| i.state == InstanceState::Running;
    let new = instances.iter().filter(well).filter(|i| i.revision == revision).count();
    match instances.iter().filter(well).count() - new {
        0 => format!("{new} of {wanted} running."),
        old => format!("{new} of {wanted} running of release {revision}; {old} of an earlier one."),
    }
}

/// What is wrong with an instance, with its true reason.
fn trouble(instance: &InstanceObserved) -> Option<String> {
    // An instance that starts again is in trouble until it has run: what ended it last may do so again.
    let bad = !matches!(instance.state, InstanceState::Running | InstanceState::Stopping);
    let ending = instance.last_end.as_ref()?;
    bad.then(|| ended(ending))
}

fn ended(ending: &Ending) -> String {
    let what = match ending.cause {
        Cause::Exited => match ending.exit_code {
            Some(code) => format!("Exits with code {code} after {}", duration(ending.ran_ms)),
            None => format!("Ends after {}", duration(ending.ran_ms)),
        },
        Cause::OutOfMemory => "Needs more memory than it has".to_owned(),
        Cause::Killed => format!("Was killed after {}", duration(ending.ran_ms)),
        Cause::Unhealthy => "Its health check fails".to_owned(),
        Cause::ImageError => "Its image cannot be used".to_owned(),
        Cause::StartError => "It cannot be started".to_owned(),
        Cause::Removed => "It was removed from outside".to_owned(),
    };
    let detail = ending.detail.trim_start_matches("its health check fails: ");
    let detail = detail.trim_start_matches("it cannot be started: ");
    let line = ending.last_lines.last().map(|line| format!("; last line: {line}")).unwrap_or_default();
    format!("{what} ({detail}){line}")
}

fn duration(ms: u64) -> String {
    if ms < 1_000 { format!("{ms} ms") } else { format!("{} s", ms / 1_000) }
}

impl AppView {
    /// From the rows; `release` is the desired one.
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
            Condition {
                kind: "Accepted",
                status: taken.0,
                reason: taken.1,
                message: app.problem.clone().unwrap_or_default(),
                since: Some(app.changed_at),
            },
            Condition {
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
            reserved: Reserved { amounts: app.reserved, words: app.peak.words() },
            desired: release.map(|release| release.spec.clone()),
            image: release.map(image_view),
            warnings: release.filter(|r| r.warnings != Value::Array(Vec::new())).map(|r| r.warnings.clone()),
            conditions,
            observed: app.observed.map(|seen| Observed {
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

    /// Says whether the app has what it names under `connects`; what it lacks, it is told why.
    pub(super) fn connected(mut self, missing: &[Fault]) -> Self {
        let (status, reason) = if missing.is_empty() { ("true", "AsNamed") } else { ("false", "Missing") };
        let message = missing.iter().map(|fault| fault.message.as_str()).collect::<Vec<_>>().join("; ");
        self.conditions.push(Condition { kind: "Connected", status, reason, message, since: None });
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
    use super::*;

    fn instance(number: u32, revision: i64, state: InstanceState) -> InstanceObserved {
        InstanceObserved {
            number,
            revision,
            state,
            since: OffsetDateTime::UNIX_EPOCH,
            started: None,
            restarts: 0,
            failures: 0,
            why: None,
            next_start: None,
            last_end: None,
            address: std::net::Ipv4Addr::LOCALHOST,
            uid: None,
            container: String::new(),
        }
    }

    #[test]
    fn an_instance_that_ends_again_and_again_is_no_calm_one() {
        let mut one = instance(4, 1, InstanceState::Running);
        assert_eq!(flapping(&one), None);
        one.failures = FLAPS;
        one.last_end = Some(Ending {
            cause: Cause::Exited,
            exit_code: Some(3),
            at: OffsetDateTime::UNIX_EPOCH,
            ran_ms: 2_500,
            detail: "it exited with code 3".into(),
            last_lines: vec!["no database".into()],
        });
        let why = flapping(&one).unwrap();
        assert!(
            why.contains("ended 3 times") && why.contains("code 3 after 2 s") && why.ends_with("no database"),
            "{why}"
        );
        one.failures = FLAPS - 1;
        assert_eq!(flapping(&one), None);
        one.why = Some("port 8080 takes no connection".into());
        assert!(unready(&one).unwrap().contains("not ready: port 8080"));
    }

    #[test]
    fn what_runs_of_an_earlier_release_does_not_count() {
        use InstanceState::{Preparing, Running, Stopping};
        let all = [instance(1, 1, Running), instance(2, 1, Running), instance(3, 2, Preparing)];
        assert_eq!(progress(&all, 2, 2), "0 of 2 running of release 2; 2 of an earlier one.");
        let half = [instance(1, 1, Stopping), instance(2, 1, Running), instance(3, 2, Running)];
        assert_eq!(progress(&half, 2, 2), "1 of 2 running of release 2; 1 of an earlier one.");
        assert_eq!(progress(&half[2..], 2, 2), "1 of 2 running.");
        assert_eq!(progress(&[], 2, 2), "0 of 2 running.");
    }
}
