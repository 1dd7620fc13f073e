//! Starts and stops instances. Each step is recorded before it is taken.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;

use super::super::core::{Agent, lock};
use super::super::engine::ALONE;
use super::super::kept::Instance;
use super::{AgentApp, born, image, raw_log, short, walls};
use crate::driver::podman::ports::Port;
use crate::driver::podman::{inside, ports, render};
use crate::driver::workload::Workload;
use crate::driver::{Cause, Error, InstanceState};
use crate::policy::Target;

/// Delay before the next attempt of a start that the engine did not answer.
const AGAIN: Duration = Duration::from_millis(300);

impl AgentApp {
    pub(super) async fn create(self: &Arc<Self>, agent: &Arc<Agent>, slot: usize) {
        let number = {
            let mut kept = lock(&self.kept);
            let number = kept.next_number;
            kept.next_number += 1;
            let name = render::name(&agent.config, &kept.workload, number);
            let revision = kept.workload.revision;
            kept.instances.push(Instance::new(number, revision, slot, name));
            // Recorded before the container exists: a crash in between leaves no unknown container.
            if let Err(error) = tokio::task::block_in_place(|| kept.save(&agent.apps_dir())) {
                tracing::error!(%error, "the state of an app cannot be written");
                kept.instances.pop();
                return;
            }
            number
        };
        self.start(agent, number).await;
    }

    /// Starts the instances that are due, and those that a crash left incomplete.
    pub(super) async fn start_waiting(self: &Arc<Self>, agent: &Arc<Agent>) {
        let now = OffsetDateTime::now_utc();
        let aside = {
            let kept = lock(&self.kept);
            kept.is_put_aside().then_some(kept.workload.revision)
        };
        let due: Vec<u32> = lock(&self.kept)
            .instances
            .iter()
            .filter(|i| aside != Some(i.revision))
            .filter(|i| match i.state {
                InstanceState::Waiting | InstanceState::Failed => i.next_start.is_none_or(|at| at <= now),
                InstanceState::Preparing => true,
                _ => false,
            })
            .map(|i| i.number)
            .collect();
        for number in due {
            self.start(agent, number).await;
        }
    }

    /// Creates and starts an instance's container: create, attach the network, close its port, start.
    async fn start(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
        let (instance, workload) = {
            let kept = lock(&self.kept);
            let Some(instance) = kept.instances.iter().find(|i| i.number == number).cloned() else { return };
            let Some(workload) = kept.workload_of(instance.revision).cloned() else {
                drop(kept);
                // The release of this instance is no longer known; the plan replaces the instance.
                lock(&self.kept).instances.retain(|i| i.number != number);
                return;
            };
            (instance, workload)
        };
        let again = instance.last_end.is_some();
        let struck = lock(&self.kept).strikes > 0;
        let begun = OffsetDateTime::now_utc();
        let result = if struck {
            let _alone = agent.engine.turn.write().await;
            let up = tokio::time::timeout(ALONE, self.bring_up(agent, &instance, &workload)).await;
            up.unwrap_or_else(|_| Err(Error::Transient("the engine took too long to start it".into())))
        } else {
            let _beside = agent.engine.turn.read().await;
            self.bring_up(agent, &instance, &workload).await
        };
        let valid_from = agent.listing.borrow().round + 2;
        agent.look.notify_one();
        {
            let mut live = lock(&self.live);
            let entry = live.entry(number).or_default();
            entry.valid_from = valid_from;
            (entry.well, entry.been_well, entry.ill) = (false, false, 0);
            entry.why.clear();
            entry.hosts = String::new();
        }
        match result {
            Ok(up) => {
                let mut kept = lock(&self.kept);
                if let Some(i) = kept.instances.iter_mut().find(|i| i.number == number) {
                    (i.pid, i.born, i.conmon, i.uid, i.hosts) =
                        (up.pid, up.born, up.conmon, up.uid, up.hosts);
                    (i.identity, i.exit_file) = (up.identity, up.exit_file);
                    i.boot = super::look::boot_id();
                    i.port = Some(up.port);
                    i.started = Some(OffsetDateTime::now_utc());
                    i.next_start = None;
                    i.restarts += u32::from(again);
                    i.enter(InstanceState::Starting);
                }
                if instance.revision == kept.workload.revision {
                    kept.strikes = 0;
                }
                let word = if again { "restarted" } else { "started" };
                kept.event(word, format!("instance {number} of release {} {word}", instance.revision));
            }
            // A failure of the engine does not count against the app: the start is repeated as soon as the engine
            // can.
            Err(Error::Away(why)) if !agent.engine.is_slow_with(begun) => {
                tracing::warn!(error = why, app = %self.name, "an instance waits for the engine");
                self.with(number, |i| {
                    i.next_start = Some(OffsetDateTime::now_utc() + AGAIN);
                    i.enter(InstanceState::Waiting);
                });
            }
            Err(error) => {
                tracing::warn!(%error, app = %self.name, "an instance cannot be started");
                let (cause, why) = why_not_started(&error);
                self.ended(agent, number, cause, None, format!("it cannot be started: {why}"));
                self.with(number, |i| i.enter(InstanceState::Failed));
            }
        }
    }

    async fn bring_up(
        self: &Arc<Self>,
        agent: &Arc<Agent>,
        instance: &Instance,
        workload: &Workload,
    ) -> Result<Up, Error> {
        let podman = &agent.podman;
        let waiting = agent.engine.begin(self.id);
        if !agent.table_is_there().await {
            return Err(Error::Transient("the firewall table is missing; nothing starts without it".into()));
        }
        agent.ensure_network(&self.tenant).await?;
        let recorded = lock(&agent.journal).tenant(&self.tenant).cloned();
        let recorded = recorded.ok_or_else(|| Error::Rejected("the tenant was offboarded".into()))?;
        let bridge = agent.config.bridge(recorded.network);
        let address = *workload
            .addresses
            .get(instance.slot)
            .ok_or_else(|| Error::Rejected("there is no address for this instance".into()))?;
        agent.ensure_group(&self.tenant)?;
        discard(agent, &instance.container).await?;
        ports::release(&instance.sandbox).await;
        ports::clear(&bridge, address).await?;
        let dir = agent.logs_dir(self.id);
        std::fs::create_dir_all(&dir).map_err(|error| Error::Transient(error.to_string()))?;
        // Reads the rest of the previous run's output. A log file of an earlier version is removed.
        tokio::task::block_in_place(|| self.read_last_words(agent, instance.number));
        let _ = std::fs::remove_file(raw_log(&dir, instance.number));
        let pipe =
            self.read_along(agent, instance.number).map_err(|error| Error::Transient(error.to_string()))?;
        let prepared = image::prepare(agent, &dir, instance.number, workload).await?;
        let [passwd, group] = &prepared.names;
        let spec = render::create(
            &agent.config,
            workload,
            &render::NewInstance {
                container: &instance.container,
                number: instance.number,
                gateway: recorded.subnet.gateway(),
                network: &bridge,
                log: &pipe.to_string_lossy(),
                filter: &agent.filter.to_string_lossy(),
                names: [&passwd.to_string_lossy(), &group.to_string_lossy()],
                scratch: &prepared.scratch,
            },
        );
        waiting.next();
        fail::fail_point!("agent::create", |_| Err(Error::Transient("failpoint".into())));
        #[cfg(feature = "failpoints")]
        if fail::eval("agent::hang", |app| app.as_deref() == Some(self.name.as_str())) == Some(true) {
            super::super::engine::hang(&agent.config.engine_socket);
        }
        podman.create(&spec).await?;
        let made = podman.inspect(&instance.container).await?;
        render::check_made(&made.annotations, &made.healthcheck).map_err(Error::Rejected)?;
        // The instance's rules are applied before it sends its first packet.
        agent.refresh_firewall().await?;
        waiting.next();
        fail::fail_point!("agent::init", |_| Err(Error::Transient("failpoint".into())));
        podman.init(&instance.container).await?;
        let ready = podman.inspect(&instance.container).await?;
        // Recorded at once: after a crash from here on, the namespace is still known.
        self.with(instance.number, |i| i.sandbox.clone_from(&ready.sandbox));
        let port = ports::isolate(&bridge, &ready.sandbox, address).await?;
        ports::address(&bridge, &ready.sandbox, address, recorded.subnet).await?;
        write_in_place(Path::new(&ready.hosts), &self.hosts_text(agent, address));
        waiting.next();
        fail::fail_point!("agent::start", |_| Err(Error::Transient("failpoint".into())));
        walls::close_user_namespaces(ready.pid).await?;
        tokio::task::block_in_place(|| inside::settle(ready.pid, workload, &prepared.scratch))?;
        podman.start(&instance.container).await?;
        let up = podman.inspect(&instance.container).await?;
        if let Err(error) = walls::require_filter(up.pid).await {
            discard(agent, &instance.container).await?;
            return Err(error);
        }
        drop(waiting);
        let born = born(up.pid).unwrap_or(0);
        let uid = owner(up.pid);
        let exit_file = exit_file(up.conmon, &up.id).unwrap_or_default();
        let (identity, hosts) = (up.id, ready.hosts);
        Ok(Up { pid: up.pid, born, conmon: up.conmon, uid, hosts, port, identity, exit_file })
    }

    /// Returns the hosts file of an instance: its own name and the names it may reach. The app `api` of another
    /// tenant `acme` is named `api.acme`.
    fn hosts_text(&self, agent: &Agent, own: std::net::Ipv4Addr) -> String {
        use std::fmt::Write as _;
        let mut out = format!("127.0.0.1 localhost\n{own} {}\n", self.name);
        let flows = lock(&agent.flows).of(&self.tenant, self.id).to_vec();
        let mut told = std::collections::BTreeSet::new();
        for flow in flows {
            let name = match flow.name.split_once('/') {
                Some((tenant, app)) => format!("{app}.{tenant}"),
                None => flow.name,
            };
            let addresses = match flow.target {
                Target::App { app, tenant } => agent.running(&tenant, app),
                Target::Service { network } => network.single().into_iter().collect(),
                Target::Outside { .. } | Target::Domain { .. } => Vec::new(),
            };
            for address in addresses {
                if told.insert((address, name.clone())) {
                    let _ = writeln!(out, "{address} {name}");
                }
            }
        }
        out
    }

    /// Writes changed names into the hosts files of running instances.
    pub(super) fn write_hosts(&self, agent: &Agent) {
        let running: Vec<Instance> =
            lock(&self.kept).instances.iter().filter(|i| i.pid > 0 && !i.hosts.is_empty()).cloned().collect();
        for instance in running {
            let workload = lock(&self.kept).workload_of(instance.revision).cloned();
            let Some(address) = workload.and_then(|w| w.addresses.get(instance.slot).copied()) else {
                continue;
            };
            let text = self.hosts_text(agent, address);
            let mut live = lock(&self.live);
            let entry = live.entry(instance.number).or_default();
            if entry.hosts != text {
                write_in_place(Path::new(&instance.hosts), &text);
                entry.hosts = text;
            }
        }
    }

    /// Stops an instance in its own task: its grace period may be long.
    pub(super) fn begin_stop(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) {
        let Some((container, sandbox)) = self.with(number, |i| {
            i.enter(InstanceState::Stopping);
            (i.container.clone(), i.sandbox.clone())
        }) else {
            return;
        };
        let grace = lock(&self.kept).workload.stop_grace;
        let port = self.port_of(agent, number);
        let (app, agent) = (Arc::clone(self), Arc::clone(agent));
        tokio::spawn(async move {
            loop {
                fail::fail_point!("agent::stop");
                let _waiting = agent.engine.beside();
                if agent.podman.stop(&container, grace).await.is_err() {
                    app.end_process(number);
                }
                if discard(&agent, &container).await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            ports::release(&sandbox).await;
            if let Some((bridge, address)) = port
                && let Err(error) = ports::clear(&bridge, address).await
            {
                tracing::warn!(%error, container, "the bridge port of a stopped instance cannot be removed");
            }
            tokio::task::block_in_place(|| app.read_last_words(&agent, number));
            let before = serde_json::to_vec(&*lock(&app.kept)).unwrap_or_default();
            {
                let mut kept = lock(&app.kept);
                kept.instances.retain(|i| i.number != number);
                kept.event("stopped", format!("instance {number} was stopped"));
            }
            app.forget(&agent, number);
            app.record(&agent, &before);
            if let Err(error) = agent.refresh_firewall().await {
                tracing::warn!(%error, "the rules of a stopped instance are removed later");
            }
            app.wake.notify_one();
        });
    }

    /// Kills the process of an instance that the engine did not stop; its grace period is over by then. The process
    /// id may have been reused, so the start time is compared while a pidfd holds the process.
    fn end_process(&self, number: u32) {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let Some(instance) = self.instance(number).filter(|i| i.pid > 1) else { return };
        let Some(pid) = Pid::from_raw(instance.pid) else { return };
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        if born(instance.pid) == Some(instance.born) {
            tracing::warn!(app = %self.name, number, "the engine did not stop an instance; its process is killed");
            let _ = pidfd_send_signal(handle, Signal::KILL);
        }
    }

    /// Returns the bridge and the address of an instance.
    fn port_of(&self, agent: &Agent, number: u32) -> Option<(String, std::net::Ipv4Addr)> {
        let bridge = agent.bridge_of(&self.tenant)?;
        let kept = lock(&self.kept);
        let instance = kept.instances.iter().find(|i| i.number == number)?;
        Some((bridge, kept.address_of(instance)?))
    }
}

/// Removes a container and its network namespace. The engine leaves the namespace behind if the container never
/// started or ended by itself.
pub(in crate::driver::agent) async fn discard(agent: &Agent, container: &str) -> Result<(), Error> {
    let sandbox = agent.podman.inspect(container).await.map(|seen| seen.sandbox).unwrap_or_default();
    agent.podman.remove(container).await?;
    ports::release(&sandbox).await;
    Ok(())
}

struct Up {
    pid: i32,
    born: u64,
    conmon: i32,
    uid: Option<u32>,
    hosts: String,
    port: Port,
    identity: String,
    exit_file: String,
}

/// Returns the file into which a monitor writes the exit code of its container. The folder is read from the
/// monitor's command line; it belongs to the engine, not to a tenant.
fn exit_file(monitor: i32, identity: &str) -> Option<String> {
    let line = std::fs::read(format!("/proc/{monitor}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    words.find(|word| word == "--exit-dir")?;
    let folder = words.next()?;
    (folder.starts_with('/') && !identity.is_empty()).then(|| format!("{folder}/{identity}"))
}

fn owner(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

/// Returns why the engine did not start an instance, without details of the host. The engine's own message is in
/// the platform's log.
fn why_not_started(error: &Error) -> (Cause, String) {
    if let Error::Rejected(why) = error {
        return (Cause::ImageError, short(why));
    }
    let text = error.to_string();
    let known = [
        ("executable file", "its command is not in the image"),
        (
            "no such file or directory",
            "its command, or the interpreter or loader of its command, is not in the image",
        ),
        ("permission denied", "its user may not execute its command"),
        ("exec format error", "its command is not an executable for this machine's architecture"),
        ("firewall table", "the firewall table is missing; nothing starts without it"),
        ("no such image", "its image is not in the engine's store"),
        ("image not known", "its image is not in the engine's store"),
    ];
    let lower = text.to_lowercase();
    match known.iter().find(|(sign, _)| lower.contains(sign)) {
        Some((sign, why)) if sign.contains("image") => (Cause::ImageError, (*why).to_owned()),
        Some((_, why)) => (Cause::StartError, (*why).to_owned()),
        None => {
            (Cause::StartError, "the container engine refused it; the reason is in the platform's log".into())
        }
    }
}

/// Writes into the existing file, which the instance has mounted. A new file would not be visible inside.
fn write_in_place(path: &Path, text: &str) {
    if let Err(error) = std::fs::write(path, text) {
        tracing::debug!(%error, path = %path.display(), "a hosts file cannot be written");
    }
}
