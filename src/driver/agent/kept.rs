//! The agent's own copy of each app's desired state: one file per app, replaced atomically. After a crash or a
//! reboot the agent starts everything from it, even if `serve` is down. It never contains credentials.

use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::driver::podman::ports::Port;
use crate::driver::workload::Workload;
use crate::driver::{AppEvent, Ending, InstanceState};

/// Maximum number of stored events.
const EVENTS: usize = 50;

/// How long an app whose calls hung the engine is put aside.
const ASIDE: time::Duration = time::Duration::hours(1);

/// An instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Instance {
    pub(super) number: u32,
    pub(super) revision: i64,
    pub(super) slot: usize,
    pub(super) container: String,
    pub(super) state: InstanceState,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) since: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option", default)]
    pub(super) started: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option", default)]
    pub(super) next_start: Option<OffsetDateTime>,
    pub(super) restarts: u32,
    /// Consecutive failures, for the backoff.
    pub(super) failures: u32,
    pub(super) last_end: Option<Ending>,
    /// Why the running instance is not ready.
    #[serde(default)]
    pub(super) why: Option<String>,
    /// Process id, its start time from /proc, and the process id of its monitor. A process id alone may have been
    /// reused.
    pub(super) pid: i32,
    pub(super) born: u64,
    pub(super) conmon: i32,
    pub(super) uid: Option<u32>,
    /// Path of its network namespace, which is removed after the instance has ended.
    #[serde(default)]
    pub(super) sandbox: String,
    /// The instance's port on the bridge.
    #[serde(default)]
    pub(super) port: Option<Port>,
    /// Path of its hosts file in the engine's storage.
    pub(super) hosts: String,
    /// Id of the container in the engine, and the file into which its monitor writes the exit code. With both the
    /// agent learns how a run ended without the engine.
    #[serde(default)]
    pub(super) identity: String,
    #[serde(default)]
    pub(super) exit_file: String,
    /// Boot id of the machine when the process was started. After another boot the process no longer exists.
    #[serde(default)]
    pub(super) boot: String,
}

impl Instance {
    pub(super) fn new(number: u32, revision: i64, slot: usize, container: String) -> Self {
        Self {
            number,
            revision,
            slot,
            container,
            state: InstanceState::Preparing,
            since: OffsetDateTime::now_utc(),
            started: None,
            next_start: None,
            restarts: 0,
            failures: 0,
            last_end: None,
            why: None,
            pid: 0,
            born: 0,
            conmon: 0,
            uid: None,
            sandbox: String::new(),
            port: None,
            hosts: String::new(),
            identity: String::new(),
            exit_file: String::new(),
            boot: String::new(),
        }
    }

    pub(super) fn enter(&mut self, state: InstanceState) {
        if self.state != state {
            self.state = state;
            self.since = OffsetDateTime::now_utc();
        }
    }
}

/// An app.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct AppRecord {
    pub(super) workload: Workload,
    /// The last healthy release. Its instances keep running until the new release is healthy.
    pub(super) previous: Option<Workload>,
    pub(super) removing: bool,
    pub(super) next_number: u32,
    pub(super) instances: Vec<Instance>,
    pub(super) seq: u64,
    pub(super) events: VecDeque<AppEvent>,
    /// Whether the desired revision has been healthy once.
    pub(super) proven: bool,
    pub(super) message: Option<String>,
    /// Number of calls for the desired revision that hung the engine.
    #[serde(default)]
    pub(super) strikes: u32,
    /// Why the desired revision is no longer started.
    #[serde(default)]
    pub(super) put_aside: Option<String>,
    /// When the desired revision was put aside.
    #[serde(default)]
    pub(super) put_aside_at: Option<OffsetDateTime>,
}

impl AppRecord {
    pub(super) fn new(workload: Workload) -> Self {
        Self {
            workload,
            previous: None,
            removing: false,
            next_number: 1,
            instances: Vec::new(),
            seq: 0,
            events: VecDeque::new(),
            proven: false,
            message: None,
            strikes: 0,
            put_aside: None,
            put_aside_at: None,
        }
    }

    pub(super) fn event(&mut self, kind: &str, text: impl Into<String>) {
        self.seq += 1;
        let text: String = text.into().chars().take(500).collect();
        let event = AppEvent { seq: self.seq, at: OffsetDateTime::now_utc(), kind: kind.into(), text };
        tracing::info!(tenant = %self.workload.tenant, app = %self.workload.app, kind, text = event.text, "app");
        self.events.push_back(event);
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }

    /// Returns whether a release changes only the number of instances. Each running instance then keeps its
    /// address.
    pub(super) fn keeps_running(&self, workload: &Workload) -> bool {
        self.workload.runs_the_same(workload)
            && self
                .instances
                .iter()
                .all(|i| i.revision != self.workload.revision || i.slot < workload.addresses.len())
    }

    /// Moves the instances of the desired release to the next one.
    pub(super) fn scale(&mut self, workload: &Workload) {
        let (before, now) = (self.workload.instances, workload.instances);
        let own = self.instances.iter_mut().filter(|i| i.revision == self.workload.revision);
        own.for_each(|i| i.revision = workload.revision);
        let text = format!(
            "release {}: {now} instance(s) instead of {before}; running instances are kept",
            workload.revision
        );
        self.event("scaled", text);
    }

    /// Returns whether instances of the desired revision are no longer started.
    pub(super) fn is_put_aside(&self) -> bool {
        self.put_aside.is_some()
    }

    /// Resumes an app that was put aside for long enough. Returns whether it did.
    pub(super) fn take_up_again(&mut self, now: OffsetDateTime) -> bool {
        if self.put_aside.is_none() || *self.put_aside_at.get_or_insert(now) + ASIDE > now {
            return false;
        }
        (self.put_aside, self.put_aside_at, self.message) = (None, None, None);
        // The next hang puts it aside again.
        self.strikes = self.strikes.min(1);
        self.event("taken_up", "the app is tried again after an hour");
        true
    }

    /// Returns every address that belongs to the app: those of the desired and of the previous release.
    pub(super) fn addresses(&self) -> Vec<std::net::Ipv4Addr> {
        let both = std::iter::once(&self.workload).chain(&self.previous);
        both.flat_map(|workload| workload.addresses.iter().copied()).collect()
    }

    /// Returns the addresses of existing instances. Only these get rules.
    pub(super) fn in_use(&self) -> Vec<std::net::Ipv4Addr> {
        self.instances.iter().filter_map(|instance| self.address_of(instance)).collect()
    }

    /// Returns the addresses of instances that run on their bridge.
    pub(super) fn attached(&self) -> Vec<std::net::Ipv4Addr> {
        use InstanceState::{Running, Starting, Unhealthy};
        let attached = self.instances.iter().filter(|i| matches!(i.state, Starting | Running | Unhealthy));
        attached.filter_map(|instance| self.address_of(instance)).collect()
    }

    /// Returns the address of an instance.
    pub(super) fn address_of(&self, instance: &Instance) -> Option<std::net::Ipv4Addr> {
        self.workload_of(instance.revision)?.addresses.get(instance.slot).copied()
    }

    /// Returns the workload from which an instance was created.
    pub(super) fn workload_of(&self, revision: i64) -> Option<&Workload> {
        if self.workload.revision == revision {
            return Some(&self.workload);
        }
        self.previous.as_ref().filter(|previous| previous.revision == revision)
    }

    /// Replaces the file atomically and syncs it to disk.
    pub(super) fn save(&self, dir: &Path) -> std::io::Result<()> {
        fail::fail_point!("agent::save", |_| Err(std::io::Error::other("failpoint")));
        let path = dir.join(format!("{}.json", self.workload.app_id));
        let fresh = dir.join(format!("{}.new", self.workload.app_id));
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()?;
        std::fs::rename(fresh, path)
    }

    /// Reads every recorded app. A file that cannot be read is logged and kept: its containers keep running.
    pub(super) fn load_all(dir: &Path) -> std::io::Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                match std::fs::read(&path)
                    .map_err(|e| e.to_string())
                    .and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()))
                {
                    Ok(kept) => all.push(kept),
                    Err(error) => {
                        tracing::error!(path = %path.display(), error, "an app cannot be read; its containers keep running");
                    }
                }
            }
        }
        Ok(all)
    }

    pub(super) fn delete(&self, dir: &Path) {
        let _ = std::fs::remove_file(dir.join(format!("{}.json", self.workload.app_id)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::agent::plan::example;
    use crate::driver::workload::{Scratch, Update};

    #[test]
    fn a_release_that_only_scales_keeps_what_runs() {
        let mut kept = AppRecord::new(example(2, 1, Update::Rolling));
        kept.instances = vec![Instance::new(1, 1, 0, "a".into()), Instance::new(2, 1, 3, "b".into())];
        let more = example(3, 2, Update::Rolling);
        assert!(kept.keeps_running(&more));
        kept.scale(&more);
        kept.workload = more;
        assert!(kept.instances.iter().all(|i| i.revision == 2));
        assert_eq!(kept.instances[1].container, "b", "its container is the same");
        // Anything else replaces them.
        let mut other = example(4, 3, Update::Rolling);
        assert!(kept.keeps_running(&other));
        other.addresses.truncate(3);
        assert!(!kept.keeps_running(&other), "its address is gone");
        let changes: [fn(&mut Workload); 4] = [
            |w| w.memory += 1,
            |w| w.env = [("A".to_owned(), "b".to_owned())].into(),
            |w| w.scratch = [("/a".to_owned(), Scratch::of(4096))].into(),
            |w| w.addresses.reverse(),
        ];
        for change in changes {
            let mut other = example(4, 3, Update::Rolling);
            change(&mut other);
            assert!(!kept.keeps_running(&other));
        }
    }
}
