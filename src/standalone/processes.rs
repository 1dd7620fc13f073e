//! The table of processes: user, command, environment, limits. `up` runs this table and restarts processes
//! that exit. In production the same table becomes the systemd units in `deploy/systemd` (`units.rs`).

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process};
use tokio_util::sync::CancellationToken;

use super::Failed;
use super::bounds::{self, CGROUPS, ProcessLimits};
use crate::driver::podman::engine::{self, EngineSettings};

/// The longest pause before a restart. Shorter in tests, which kill processes on purpose.
const LONGEST_PAUSE: Duration =
    if cfg!(feature = "failpoints") { Duration::from_millis(400) } else { Duration::from_secs(15) };

/// Default limit of processes and threads.
pub(super) const TASKS: u32 = 256;

/// A process of the platform.
#[derive(Debug, Clone)]
pub struct Process {
    /// Name.
    pub name: &'static str,
    /// Purpose, in a few words.
    pub purpose: &'static str,
    /// User; root if none. A process that does not run as root has no capabilities.
    pub user: Option<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment. Only PATH is inherited.
    pub environment: Vec<(String, String)>,
    /// The signal that asks it to stop.
    pub stop: Signal,
    /// Processes that must be ready first.
    pub after: &'static [&'static str],
    /// Limit of open files; none for the engine, whose limits containers inherit.
    pub files: Option<u64>,
    /// Memory limit in MiB. systemd enforces it for units.
    pub memory: Option<u32>,
    /// Limit of processes and threads; 256 if none.
    pub tasks: Option<u32>,
    /// The cgroup in which `up` enforces both limits, if any.
    pub cgroup: Option<String>,
    /// The only capability of the process, by the name that `setpriv` uses, if any.
    pub capability: Option<&'static str>,
}

/// Paths and users of the parts.
#[derive(Debug, Clone)]
pub struct Layout {
    /// User of `serve`.
    pub serve: String,
    /// User of the prober.
    pub prober: String,
    /// User of the resolver.
    pub resolver: String,
    /// Folder of the platform's programs.
    pub binaries: PathBuf,
    /// Settings of `serve`.
    pub serve_settings: PathBuf,
    /// Settings of the agent.
    pub agent_settings: PathBuf,
    /// The prober's socket.
    pub prober_socket: PathBuf,
    /// The socket on which the agent answers the resolver.
    pub resolver_socket: PathBuf,
    /// Settings of the resolver; the file is optional.
    pub resolver_settings: PathBuf,
    /// The engine.
    pub engine: EngineSettings,
    /// Name of the engine's own cgroup; none under systemd, which creates one.
    pub engine_cgroup: Option<String>,
    /// The private database and registry, if the installation has them.
    pub own: Option<OwnParts>,
}

/// A private database and registry.
#[derive(Debug, Clone)]
pub struct OwnParts {
    /// Folder of Postgres' programs.
    pub postgres: PathBuf,
    /// Folder of the cluster.
    pub cluster: PathBuf,
    /// Folder of its socket.
    pub database_socket: PathBuf,
    /// Its user.
    pub database: String,
    /// Settings of the registry.
    pub registry_settings: PathBuf,
    /// Its user.
    pub registry: String,
    /// Folder of its blobs and manifests.
    pub registry_data: PathBuf,
    /// The collector's socket.
    pub collector_socket: PathBuf,
    /// User id of `serve`, the only user that the collector answers.
    pub serve_uid: u32,
    /// Whether the database is private to the installation.
    pub has_database: bool,
    /// Whether the registry is private to the installation.
    pub has_registry: bool,
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

/// Returns the table, in start order.
#[must_use]
pub fn table(layout: &Layout) -> Vec<Process> {
    let binary = |name: &str| show(&layout.binaries.join(name));
    let base = Process {
        name: "",
        purpose: "",
        user: None,
        command: Vec::new(),
        environment: Vec::new(),
        stop: Signal::TERM,
        after: &[],
        files: Some(4_096),
        memory: None,
        tasks: None,
        cgroup: None,
        capability: None,
    };
    let (podman, args, environment) = engine::command(&layout.engine);
    let mut table =
        layout.own.as_ref().map_or_else(Vec::new, |own| own_parts(own, &binary("bulkhead"), &base));
    table.extend([
        Process {
            name: "engine",
            purpose: "container engine",
            command: std::iter::once(podman.to_owned()).chain(args).collect(),
            environment,
            files: None,
            // Includes pulls and starts of all tenants; excludes instances and their monitors.
            memory: Some(1_024),
            tasks: Some(1_024),
            cgroup: layout.engine_cgroup.clone(),
            ..base.clone()
        },
        Process {
            name: "prober",
            purpose: "health checks",
            user: Some(layout.prober.clone()),
            command: texts(&[&binary("bulkhead"), "prober", "--socket", &show(&layout.prober_socket)]),
            memory: Some(128),
            ..base.clone()
        },
        Process {
            name: "agent",
            purpose: "agent",
            command: texts(&[&binary("bulkhead-agent"), "--config", &show(&layout.agent_settings)]),
            after: &["engine", "prober"],
            memory: Some(1_024),
            ..base.clone()
        },
        Process {
            name: "resolver",
            purpose: "names for apps",
            user: Some(layout.resolver.clone()),
            command: texts(&[
                &binary("bulkhead"),
                "resolver",
                "--agent",
                &show(&layout.resolver_socket),
                "--settings",
                &show(&layout.resolver_settings),
            ]),
            after: &["agent"],
            memory: Some(256),
            capability: Some("net_bind_service"),
            ..base.clone()
        },
        Process {
            name: "serve",
            purpose: "API, console and registry proxy",
            user: Some(layout.serve.clone()),
            command: texts(&[&binary("bulkhead"), "serve", "--config", &show(&layout.serve_settings)]),
            // Return the memory block of a password hash to the system at once. Without a fixed threshold,
            // the allocator learns to keep such blocks, and ends up with several for each thread.
            environment: vec![("MALLOC_MMAP_THRESHOLD_".into(), "4194304".into())],
            after: &["agent"],
            files: Some(65_536),
            memory: Some(1_024),
            ..base
        },
    ]);
    table
}

fn own_parts(own: &OwnParts, bulkhead: &str, base: &Process) -> Vec<Process> {
    let all = [
        Process {
            name: "postgres",
            purpose: "private database",
            user: Some(own.database.clone()),
            command: texts(&[
                &show(&own.postgres.join("postgres")),
                "-D",
                &show(&own.cluster),
                "-k",
                &show(&own.database_socket),
                "-c",
                "listen_addresses=",
            ]),
            // SIGINT is Postgres' fast shutdown: sessions end, nothing is lost.
            stop: Signal::INT,
            ..base.clone()
        },
        Process {
            name: "registry",
            purpose: "private registry",
            user: Some(own.registry.clone()),
            // The umask lets the group of the socket's folder (the group of `serve`) use the socket.
            command: texts(&[
                "sh",
                "-c",
                "umask 0007 && exec docker-registry serve \"$0\"",
                &show(&own.registry_settings),
            ]),
            files: Some(65_536),
            ..base.clone()
        },
        Process {
            name: "collector",
            purpose: "removes registry blobs that no tenant holds",
            user: Some(own.registry.clone()),
            command: texts(&[
                bulkhead,
                "collector",
                "--socket",
                &show(&own.collector_socket),
                "--registry",
                &show(&own.registry_data),
                "--peer-uid",
                &own.serve_uid.to_string(),
            ]),
            memory: Some(256),
            ..base.clone()
        },
    ];
    let is_own = |process: &Process| {
        if process.name == "postgres" { own.has_database } else { own.has_registry }
    };
    all.into_iter().filter(is_own).collect()
}

impl Process {
    fn spawn(&self, folder: &Path) -> Result<std::process::Child, Failed> {
        let log = folder.join(format!("log/{}.log", self.name));
        if fs::metadata(&log).is_ok_and(|m| m.len() > 16 << 20) {
            let _ = fs::rename(&log, folder.join(format!("log/{}.log.1", self.name)));
        }
        let failed = |error: std::io::Error| Failed::doing(format!("{} cannot be started", self.name), error);
        let out = File::options().create(true).append(true).open(&log).map_err(failed)?;
        let mut line = self.enclosed();
        if let Some(files) = self.files {
            // Without CAP_SYS_RESOURCE, a limit cannot exceed this process' own. Core dumps are off: they
            // would contain secrets.
            let most = getrlimit(Resource::Nofile).maximum.map_or(files, |most| most.min(files));
            line.extend(texts(&["prlimit", &format!("--nofile={most}:{most}"), "--core=0:0", "--"]));
        }
        if let Some(user) = &self.user {
            line.extend(texts(&[
                "setpriv",
                "--reuid",
                user,
                "--regid",
                user,
                "--clear-groups",
                "--no-new-privs",
            ]));
            for set in ["inh-caps", "ambient-caps", "bounding-set"] {
                let one = self.capability.map(|one| format!(",+{one}")).unwrap_or_default();
                line.push(format!("--{set}=-all{one}"));
            }
            line.push("--".into());
        }
        line.extend(self.command.iter().cloned());
        Command::new(&line[0])
            .args(&line[1..])
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LANG", "C.UTF-8")
            .env("HOME", folder.join("run"))
            .envs(self.environment.iter().cloned())
            .envs(self.failpoints(folder))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(out.try_clone().map_err(failed)?)
            .stderr(out)
            // A separate process group: Ctrl-C reaches only `up`, which then stops all processes in order.
            .process_group(0)
            .spawn()
            .map_err(failed)
    }

    fn bounds(&self) -> Option<ProcessLimits<'_>> {
        Some(ProcessLimits {
            name: self.cgroup.as_deref()?,
            memory: self.memory?,
            tasks: self.tasks.unwrap_or(TASKS),
        })
    }

    /// Returns the arguments that put the process into its cgroup. Without cgroups it runs without limits,
    /// and the doctor says so.
    fn enclosed(&self) -> Vec<String> {
        let Some(bounds) = self.bounds() else { return Vec::new() };
        bounds.prepare(Path::new(CGROUPS)).unwrap_or_else(|error| {
            tracing::warn!(process = self.name, %error, "the process runs without limits on memory and tasks");
            Vec::new()
        })
    }

    /// In test builds: returns the failpoints for the next start of this process only.
    fn failpoints(&self, folder: &Path) -> Option<(&'static str, String)> {
        if !cfg!(feature = "failpoints") {
            return None;
        }
        let file = folder.join(format!("run/{}.failpoints", self.name));
        let text = fs::read_to_string(&file).ok()?;
        let _ = fs::remove_file(file);
        Some(("FAILPOINTS", text))
    }

    fn pid_file(&self, folder: &Path) -> PathBuf {
        folder.join(format!("run/{}.pid", self.name))
    }

    /// Stops a process that a killed `up` left running. Another process may have the same id by now, so the
    /// start time is compared.
    pub(super) fn end_leftover(&self, folder: &Path) {
        let file = self.pid_file(folder);
        let Ok(text) = fs::read_to_string(&file) else { return };
        let mut parts = text.split_whitespace().map(str::parse::<u64>);
        if let (Some(Ok(pid)), Some(Ok(own))) = (parts.next(), parts.next())
            && born(pid) == Some(own)
        {
            stop_pid(pid, self.stop, own);
        }
        let _ = fs::remove_file(file);
        if let Some(name) = &self.cgroup {
            bounds::release(Path::new(CGROUPS), name);
        }
    }
}

pub(super) fn born(pid: u64) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    if rest.starts_with('Z') {
        return None;
    }
    rest.split(' ').nth(19)?.parse().ok()
}

/// Sends the stop signal, and kills the process after fifteen seconds.
fn stop_pid(pid: u64, signal: Signal, own: u64) {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let _ = kill_process(id, signal);
    for _ in 0..150 {
        if born(pid) != Some(own) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = kill_process(id, Signal::KILL);
}

/// A process that is restarted until it is stopped.
pub(super) struct SupervisedProcess {
    process: Process,
    folder: PathBuf,
    halt: CancellationToken,
    task: std::thread::JoinHandle<()>,
}

impl SupervisedProcess {
    /// Starts a process, and restarts it with backoff whenever it exits.
    pub(super) fn start(process: Process, folder: &Path) -> Result<Self, Failed> {
        let halt = CancellationToken::new();
        let first = process.spawn(folder)?;
        note(&process, folder, first.id());
        let (own, dir, stop) = (process.clone(), folder.to_owned(), halt.clone());
        // A plain thread: if `up` itself fails, it does not wait for this thread.
        let task = std::thread::spawn(move || keep(&own, &dir, first, &stop));
        Ok(Self { process, folder: folder.to_owned(), halt, task })
    }

    /// Stops the process without a restart.
    pub(super) async fn stop(self) {
        self.halt.cancel();
        let (process, folder, task) = (self.process, self.folder, self.task);
        let ended = tokio::task::spawn_blocking(move || {
            process.end_leftover(&folder);
            let _ = task.join();
        });
        let _ = ended.await;
    }
}

fn note(process: &Process, folder: &Path, pid: u32) {
    let text = format!("{pid} {}", born(pid.into()).unwrap_or(0));
    let _ = fs::write(process.pid_file(folder), text);
}

fn keep(process: &Process, folder: &Path, first: std::process::Child, halt: &CancellationToken) {
    let mut child = first;
    let mut pause = Duration::from_millis(200);
    loop {
        let begun = std::time::Instant::now();
        let status = child.wait();
        if halt.is_cancelled() {
            return;
        }
        if begun.elapsed() > Duration::from_secs(60) {
            pause = Duration::from_millis(200);
        }
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        let log = format!("log/{}.log", process.name);
        tracing::warn!(
            process = process.name,
            status,
            log,
            "the process exited, see its log; it will be restarted"
        );
        loop {
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
            if halt.is_cancelled() {
                return;
            }
            match process.spawn(folder) {
                Ok(fresh) => {
                    note(process, folder, fresh.id());
                    child = fresh;
                    break;
                }
                Err(error) => tracing::error!(%error, "the process cannot be started; retrying"),
            }
        }
    }
}
