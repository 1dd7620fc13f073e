//! Root's own copy of what shall run: one file an app, replaced in one step. From it everything is
//! started again after a crash or a reboot, with `serve` down. Credentials are never in it.

use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::driver::podman::ports::Port;
use crate::driver::workload::Workload;
use crate::driver::{AppEvent, Ending, InstanceState};

/// Most events that are kept.
const EVENTS: usize = 50;

/// How long an app is put aside whose calls hung the engine.
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
    /// Failures in a row, for the backoff.
    pub(super) failures: u32,
    pub(super) last_end: Option<Ending>,
    /// Why it is not ready, while it runs.
    #[serde(default)]
    pub(super) why: Option<String>,
    /// Process, when it started (from /proc), its monitor: an id alone may be another's by now.
    pub(super) pid: i32,
    pub(super) born: u64,
    pub(super) conmon: i32,
    pub(super) uid: Option<u32>,
    /// Path of its network namespace, to be taken down when it has ended.
    #[serde(default)]
    pub(super) sandbox: String,
    /// Its port on the bridge.
    #[serde(default)]
    pub(super) port: Option<Port>,
    /// Where the engine keeps its hosts file.
    pub(super) hosts: String,
    /// The container's identity in the engine, and the file in which its monitor writes the exit code: how a run has
    /// ended is known without the engine.
    #[serde(default)]
    pub(super) identity: String,
    #[serde(default)]
    pub(super) exit_file: String,
    /// The boot of the machine in which its process was started: after another one, no process is left.
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
pub(super) struct Kept {
    pub(super) workload: Workload,
    /// What ran well before: instances of it are kept alive while the new one proves itself.
    pub(super) previous: Option<Workload>,
    pub(super) removing: bool,
    pub(super) next_number: u32,
    pub(super) instances: Vec<Instance>,
    pub(super) seq: u64,
    pub(super) events: VecDeque<AppEvent>,
    /// Whether the desired revision has been well once.
    pub(super) proven: bool,
    pub(super) message: Option<String>,
    /// Times that a call for the desired revision hung the engine.
    #[serde(default)]
    pub(super) strikes: u32,
    /// Why the desired revision is not started any more.
    #[serde(default)]
    pub(super) put_aside: Option<String>,
    /// Since when.
    #[serde(default)]
    pub(super) put_aside_at: Option<OffsetDateTime>,
}

impl Kept {
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

    /// Whether a release changes nothing but the number of instances: each that runs is kept, at its address.
    pub(super) fn keeps_running(&self, workload: &Workload) -> bool {
        self.workload.runs_the_same(workload)
            && self
                .instances
                .iter()
                .all(|i| i.revision != self.workload.revision || i.slot < workload.addresses.len())
    }

    /// Lets what runs of the desired release be instances of the next one.
    pub(super) fn scale(&mut self, workload: &Workload) {
        let (before, now) = (self.workload.instances, workload.instances);
        let own = self.instances.iter_mut().filter(|i| i.revision == self.workload.revision);
        own.for_each(|i| i.revision = workload.revision);
        let text = format!(
            "release {}: {now} instance(s) instead of {before}; what runs is kept",
            workload.revision
        );
        self.event("scaled", text);
    }

    /// Whether instances of the desired revision are started no more.
    pub(super) fn is_put_aside(&self) -> bool {
        self.put_aside.is_some()
    }

    /// Ends the time for which it is put aside; whether it has come to its end.
    pub(super) fn take_up_again(&mut self, now: OffsetDateTime) -> bool {
        if self.put_aside.is_none() || *self.put_aside_at.get_or_insert(now) + ASIDE > now {
            return false;
        }
        (self.put_aside, self.put_aside_at, self.message) = (None, None, None);
        // The next time that it hangs the engine is the last one.
        self.strikes = self.strikes.min(1);
        self.event("taken_up", "it is tried again after an hour");
        true
    }

    /// Every address that belongs to it: of what it is and of what it was before.
    pub(super) fn addresses(&self) -> Vec<std::net::Ipv4Addr> {
        let both = std::iter::once(&self.workload).chain(&self.previous);
        both.flat_map(|workload| workload.addresses.iter().copied()).collect()
    }

    /// Addresses of the instances that there are: rules are made for these alone.
    pub(super) fn in_use(&self) -> Vec<std::net::Ipv4Addr> {
        self.instances.iter().filter_map(|instance| self.address_of(instance)).collect()
    }

    /// Addresses of the instances that run on their bridge.
    pub(super) fn attached(&self) -> Vec<std::net::Ipv4Addr> {
        use InstanceState::{Running, Starting, Unhealthy};
        let attached = self.instances.iter().filter(|i| matches!(i.state, Starting | Running | Unhealthy));
        attached.filter_map(|instance| self.address_of(instance)).collect()
    }

    /// The address of an instance.
    pub(super) fn address_of(&self, instance: &Instance) -> Option<std::net::Ipv4Addr> {
        self.workload_of(instance.revision)?.addresses.get(instance.slot).copied()
    }

    /// The workload that an instance was made from.
    pub(super) fn workload_of(&self, revision: i64) -> Option<&Workload> {
        if self.workload.revision == revision {
            return Some(&self.workload);
        }
        self.previous.as_ref().filter(|previous| previous.revision == revision)
    }

    /// Replaces the file in one step, on the disk.
    pub(super) fn save(&self, dir: &Path) -> std::io::Result<()> {
        fail::fail_point!("agent::save", |_| Err(std::io::Error::other("failpoint")));
        let path = dir.join(format!("{}.json", self.workload.app_id));
        let fresh = dir.join(format!("{}.new", self.workload.app_id));
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()?;
        std::fs::rename(fresh, path)
    }

    /// Every app that is on record. One that cannot be read is left and said: its containers go on.
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
                        tracing::error!(path = %path.display(), error, "this record cannot be read");
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
        let mut kept = Kept::new(example(2, 1, Update::Rolling));
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
