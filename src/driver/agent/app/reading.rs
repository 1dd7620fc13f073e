//! Moves an instance's output into its log through a pipe: the engine's monitor writes, the agent reads. The reader
//! sets the rate. If an app writes faster, the pipe fills, the monitor blocks, and the app blocks in its own write.
//! Nothing is lost, nothing goes to the disk, and no CPU time is spent on data that would be dropped.
//!
//! The agent holds the pipe open for reading and writing. It opens every pipe before anything else when it starts:
//! a monitor that waits for a reader would block the engine. While the agent is down, monitors drop the apps'
//! output; the apps keep running.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::net::unix::pipe::{OpenOptions, Receiver};
use tokio::sync::broadcast;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::super::core::{Agent, lock};
use super::super::logs::Tail;
use super::super::pace::{LogRate, Paces, RateBudget};
use super::{AgentApp, raw_log};
use crate::driver::LogLine;
use crate::ids::TenantName;

/// Rate limit of one instance's log: 1 MiB and 5,000 lines a second, bursts of 16 MiB and 20,000 lines.
const INSTANCE: LogRate =
    LogRate { bytes: 1 << 20, lines: 5_000, burst_bytes: 16 << 20, burst_lines: 20_000 };
/// Rate limit of all logs of a tenant.
const TENANT: LogRate = LogRate { bytes: 4 << 20, lines: 20_000, burst_bytes: 32 << 20, burst_lines: 80_000 };
/// Rate limit of all logs.
const ALL: LogRate = LogRate { bytes: 16 << 20, lines: 60_000, burst_bytes: 64 << 20, burst_lines: 240_000 };
/// Maximum sleep of a reader. After each sleep it checks whether the instance has ended.
const SLICE: Duration = Duration::from_millis(100);
/// How often an instance's log says that the app waits for the reader.
const TOLD: Duration = Duration::from_secs(60);
/// Maximum bytes read at once after an instance has ended. Pipes and monitor hold less than this.
const REST: usize = 8 << 20;

/// The reader of one instance.
pub(super) struct OutputReader {
    pipe: Arc<Receiver>,
    tail: Arc<Mutex<Tail>>,
    _end: DropGuard,
}

impl OutputReader {
    /// Reads everything that is available now. Used for the last lines of an instance that has ended.
    pub(super) fn drain(&self, lines: &broadcast::Sender<LogLine>) {
        let mut left = REST;
        while left > 0 {
            match take(&self.pipe, &self.tail, lines) {
                Ok((bytes @ 1.., _)) => left = left.saturating_sub(bytes),
                _ => return,
            }
        }
    }

    pub(super) fn note(&self, text: &str, lines: &broadcast::Sender<LogLine>) {
        let mut tail = lock(&self.tail);
        let line = tail.note(text);
        if tail.write(std::slice::from_ref(&line)).is_ok() {
            let _ = lines.send(line);
        }
    }
}

/// Reads at most one buffer. Returns the number of bytes and lines.
fn take(
    pipe: &Receiver,
    tail: &Mutex<Tail>,
    lines: &broadcast::Sender<LogLine>,
) -> io::Result<(usize, usize)> {
    let mut buffer = vec![0; 64 << 10];
    // The lock spans the read and the write: two readers never change the order of lines.
    let mut tail = lock(tail);
    let bytes = pipe.try_read(&mut buffer)?;
    let fresh = tail.take(&buffer[..bytes])?;
    let count = fresh.len();
    for line in fresh {
        let _ = lines.send(line);
    }
    Ok((bytes, count))
}

/// Opens a pipe, and creates it if it does not exist.
fn open(path: &Path) -> io::Result<Receiver> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_fifo() => {}
        Ok(_) => std::fs::remove_file(path).and_then(|()| make(path))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
        Err(error) => return Err(error),
    }
    OpenOptions::new().read_write(true).open_receiver(path)
}

fn make(path: &Path) -> io::Result<()> {
    Ok(mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?)
}

/// Pipes that a previous process of the agent left.
pub(in crate::driver::agent) type Pipes = HashMap<PathBuf, Receiver>;

/// Opens every pipe below a folder of logs, before the first request to the engine.
pub(in crate::driver::agent) fn open_all(logs: &Path) -> Pipes {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries(logs)
        .flat_map(|app| entries(&app.path()).map(|entry| entry.path()).collect::<Vec<_>>())
        .filter(|path| path.extension().is_some_and(|e| e == "pipe"))
        .filter_map(|path| match open(&path) {
            Ok(pipe) => Some((path, pipe)),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the pipe of a log cannot be opened");
                None
            }
        })
        .collect()
}

/// Returns the pipe into which the engine's monitor writes the output of an instance.
pub(super) fn pipe_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number}.pipe"))
}

impl AgentApp {
    /// Starts reading an instance's output before its monitor writes any. Returns the pipe's path.
    pub(super) fn read_along(self: &Arc<Self>, agent: &Arc<Agent>, number: u32) -> io::Result<PathBuf> {
        let dir = agent.logs_dir(self.id);
        let path = pipe_path(&dir, number);
        let known = lock(&self.live).get(&number).is_some_and(|live| live.reader.is_some());
        if known && std::fs::symlink_metadata(&path).is_ok_and(|there| there.file_type().is_fifo()) {
            return Ok(path);
        }
        let left = lock(&agent.pipes).remove(&path);
        let resumed = left.is_some();
        let pipe = Arc::new(left.map_or_else(|| open(&path), Ok)?);
        let tail = Arc::new(Mutex::new(Tail::new(raw_log(&dir, number), dir, number)));
        let end = CancellationToken::new();
        let reader =
            OutputReader { pipe: Arc::clone(&pipe), tail: Arc::clone(&tail), _end: end.clone().drop_guard() };
        if resumed {
            let text = "the platform's agent was restarted: lines written while it was down are missing";
            reader.note(text, &self.lines);
        }
        lock(&self.live).entry(number).or_default().reader = Some(reader);
        let (app, agent) = (Arc::clone(self), Arc::clone(agent));
        tokio::spawn(async move {
            tokio::select! {
                () = end.cancelled() => {}
                () = app.leaving().cancelled_owned() => {}
                () = app.read(&agent, number, &pipe, &tail) => {}
            }
        });
        Ok(path)
    }

    async fn read(&self, agent: &Agent, number: u32, pipe: &Receiver, tail: &Mutex<Tail>) {
        let mut own = RateBudget::new(INSTANCE);
        let mut told: Option<Instant> = None;
        loop {
            if pipe.readable().await.is_err() {
                return;
            }
            let wait = own.wait().max(agent.log_pace(&self.tenant, (0, 0), true));
            // The pipes of an ended instance still hold output, and its monitor waits until that is read.
            let in_turn = wait.is_zero();
            if !in_turn && self.is_alive(number) {
                if told.is_none_or(|at| at.elapsed() > TOLD) {
                    told = Some(Instant::now());
                    self.tell_slow(number);
                }
                tokio::time::sleep(wait.min(SLICE)).await;
                continue;
            }
            match tokio::task::block_in_place(|| take(pipe, tail, &self.lines)) {
                Ok((bytes, lines)) => {
                    own.spend(bytes, lines);
                    agent.log_pace(&self.tenant, (bytes, lines), in_turn);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, app = %self.name, "a log cannot be written");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    fn tell_slow(&self, number: u32) {
        let text = "output exceeds 1 MiB or 5,000 lines a second (or the limit of all apps' logs): \
                    the app's writes block until the output is read";
        if let Some(reader) = lock(&self.live).get(&number).and_then(|live| live.reader.as_ref()) {
            reader.note(text, &self.lines);
        }
    }

    fn is_alive(&self, number: u32) -> bool {
        let Some(instance) = self.instance(number) else { return false };
        instance.pid > 0 && super::born(instance.pid) == Some(instance.born)
    }
}

impl Agent {
    /// Returns how long the logs of a tenant have to wait, and counts the bytes and lines just read.
    fn log_pace(&self, tenant: &TenantName, read: (usize, usize), in_turn: bool) -> Duration {
        lock(&self.log_paces).wait(tenant, read, in_turn)
    }
}

/// The rate limits of all logs.
pub(in crate::driver::agent) fn paces() -> Paces<TenantName> {
    Paces::new(TENANT, ALL)
}
