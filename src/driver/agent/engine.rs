//! Tracks the container engine: which calls wait for it, whether it answers, and what happens if it does not. An
//! engine that hangs is killed, and its supervisor starts a new one; containers and their monitors keep running. An
//! app whose calls hang the engine twice, the second time alone, is put aside.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::core::{Agent, lock};
use crate::driver::EngineSeen;
use crate::ids::AppId;

/// Minimum and maximum time limit of a listing.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(1_500), Duration::from_secs(15));
/// The time limit is this multiple of the slowest recent listing.
const SLACK: u32 = 8;
/// Number of recent listings.
const LATELY: usize = 32;
/// How long a new engine may take to come up before it is judged again.
const RECOVERY: Duration = Duration::from_secs(10);
/// A start that takes longer while listings are answered fails on its own; the engine is not at fault.
const SLOW: time::Duration = time::Duration::seconds(20);
/// Number of times that an app's call may hang the engine, the last of them while no other call waited.
pub(super) const STRIKES: u32 = 2;
/// Number of times after which an app is put aside even if other calls waited too. Those may be waiting all the
/// time.
pub(super) const MOST_STRIKES: u32 = 6;
/// Maximum time that the start of a suspected app blocks the starts of others.
pub(super) const ALONE: Duration = Duration::from_secs(20);

/// A call that waits for the engine.
#[derive(Debug, Clone, Copy)]
struct Call {
    /// None if the call does not start an instance: a stop, a removal, a cleanup.
    app: Option<AppId>,
    since: Instant,
}

/// State of the engine.
pub(super) struct Engine {
    state: Mutex<EngineState>,
    /// Held for reading by every start of an instance, and for writing by the start of an app that may have hung
    /// the engine before. If the engine hangs again, no other app is the cause.
    pub(super) turn: tokio::sync::RwLock<()>,
}

struct EngineState {
    calls: BTreeMap<u64, Call>,
    next: u64,
    took: Vec<Duration>,
    /// Since when the engine has not answered.
    silent: Option<OffsetDateTime>,
    answered: OffsetDateTime,
    /// The engine is not judged before this time.
    judged_from: Instant,
    /// Number of engines killed since the last answer.
    ended: u32,
    put_aside: u32,
}

/// A call under way; dropping the value ends it.
pub(super) struct CallInProgress<'a> {
    engine: &'a Engine,
    id: u64,
}

impl CallInProgress<'_> {
    /// Marks the start of the same app's next call.
    pub(super) fn next(&self) {
        if let Some(call) = lock(&self.engine.state).calls.get_mut(&self.id) {
            call.since = Instant::now();
        }
    }
}

impl Drop for CallInProgress<'_> {
    fn drop(&mut self) {
        lock(&self.engine.state).calls.remove(&self.id);
    }
}

impl Engine {
    pub(super) fn new() -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            state: Mutex::new(EngineState {
                calls: BTreeMap::new(),
                next: 0,
                took: Vec::new(),
                silent: None,
                answered: now,
                judged_from: Instant::now(),
                ended: 0,
                put_aside: 0,
            }),
            turn: tokio::sync::RwLock::new(()),
        }
    }

    /// Registers a call for an app.
    pub(super) fn begin(&self, app: AppId) -> CallInProgress<'_> {
        self.enter(Some(app))
    }

    /// Registers a call that no app is blamed for. While it waits, no app is the only suspect.
    pub(super) fn beside(&self) -> CallInProgress<'_> {
        self.enter(None)
    }

    /// Returns whether a start that began then took too long on its own: it waited as long as a call may, and the
    /// engine answered listings meanwhile.
    pub(super) fn is_slow_with(&self, begun: OffsetDateTime) -> bool {
        OffsetDateTime::now_utc() - begun > SLOW && lock(&self.state).answered - begun > SLOW
    }

    fn enter(&self, app: Option<AppId>) -> CallInProgress<'_> {
        let mut state = lock(&self.state);
        let id = state.next;
        state.next += 1;
        state.calls.insert(id, Call { app, since: Instant::now() });
        CallInProgress { engine: self, id }
    }

    /// Returns the time limit of a listing, derived from recent listings. A slow listing on a busy machine, or on
    /// one with many containers, is not mistaken for a hang.
    pub(super) fn patience(&self) -> Duration {
        let state = lock(&self.state);
        let slowest = state.took.iter().max().copied().unwrap_or_default();
        // If a new engine does not answer either, the machine may be slow: the limit grows.
        let least = PATIENCE.0 * 2_u32.pow(state.ended.min(4));
        (slowest * SLACK).max(least).clamp(PATIENCE.0, PATIENCE.1)
    }

    /// Records an answer. Returns whether the engine had been silent.
    pub(super) fn answered(&self, took: Duration) -> bool {
        let mut state = lock(&self.state);
        if state.took.len() >= LATELY {
            state.took.remove(0);
        }
        state.took.push(took);
        state.ended = 0;
        state.answered = OffsetDateTime::now_utc();
        state.judged_from = Instant::now();
        state.silent.take().is_some()
    }

    /// Records a missing answer. Returns whether the silence is new.
    pub(super) fn silent(&self) -> bool {
        let mut state = lock(&self.state);
        let news = state.silent.is_none();
        if news {
            state.silent = Some(state.answered);
        }
        news
    }

    /// Returns the engine's state as reported to `serve`.
    pub(super) fn seen(&self) -> EngineSeen {
        let state = lock(&self.state);
        EngineSeen { silent_since: state.silent, put_aside: state.put_aside }
    }

    fn count(&self, put_aside: u32) {
        lock(&self.state).put_aside = put_aside;
    }

    /// Returns the apps whose calls have waited since before `asked`, and whether exactly one app and no other call
    /// waits.
    fn suspects(&self, asked: Instant) -> (Vec<AppId>, bool) {
        let state = lock(&self.state);
        let waiting: Vec<Option<AppId>> =
            state.calls.values().filter(|call| call.since <= asked).map(|call| call.app).collect();
        let mut apps: Vec<AppId> = waiting.iter().copied().flatten().collect();
        apps.sort_unstable();
        apps.dedup();
        let alone = apps.len() == 1 && !waiting.contains(&None);
        (apps, alone)
    }

    /// Returns whether the engine may be judged now. A new engine gets time to come up.
    fn is_due(&self) -> bool {
        let mut state = lock(&self.state);
        let due = Instant::now() >= state.judged_from;
        if due {
            state.judged_from = Instant::now() + RECOVERY;
            state.ended = state.ended.saturating_add(1);
        }
        due
    }
}

impl Agent {
    /// Kills the engine because it has not answered a listing requested at `asked`. Records a strike for the apps
    /// whose calls were waiting.
    pub(super) async fn end_hung_engine(self: &Arc<Self>, asked: Instant) {
        if !self.engine.is_due() {
            return;
        }
        let (suspects, alone) = self.engine.suspects(asked);
        let socket = self.config.engine_socket.clone();
        let ended = tokio::task::spawn_blocking(move || end(&socket)).await;
        let what = match ended {
            Ok(Ok(pid)) => format!("the agent killed its process {pid}; its supervisor starts a new one"),
            Ok(Err(why)) => format!("its process cannot be killed: {why}"),
            Err(error) => error.to_string(),
        };
        self.machine_event(
            "engine_hung",
            format!(
                "the container engine did not answer: {what}. Containers keep running. Calls for {} app(s) were waiting",
                suspects.len()
            ),
        );
        for id in &suspects {
            if let Some(app) = self.app(*id) {
                app.struck(self, alone);
            }
        }
    }

    /// Counts the apps that are put aside and reports the number with the engine's state.
    pub(super) fn count_put_aside(&self) {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        let count = apps.iter().filter(|app| lock(&app.kept).is_put_aside()).count();
        self.engine.count(u32::try_from(count).unwrap_or(u32::MAX));
    }
}

/// In test builds: stops the engine, as a container that hangs it would.
#[cfg(feature = "failpoints")]
pub(super) fn hang(socket: &Path) {
    let _ = signal(socket, Signal::STOP);
}

/// Kills the process that listens on the engine's socket.
fn end(socket: &Path) -> Result<i32, String> {
    signal(socket, Signal::KILL)
}

/// Sends a signal to the process that listens on the engine's socket. The kernel reports the process. A process of
/// another program is left alone.
fn signal(socket: &Path, what: Signal) -> Result<i32, String> {
    let stream = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|error| error.to_string())?;
    let address = rustix::net::SocketAddrUnix::new(socket).map_err(|error| error.to_string())?;
    // A full backlog of connections is no answer either: the kernel then cannot report the listener.
    rustix::net::connect(&stream, &address).map_err(|error| format!("its socket: {error}"))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|error| error.to_string())?;
    let pid: Pid = peer.pid;
    let number = pid.as_raw_nonzero().get();
    let handle = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| error.to_string())?;
    // Read while the pidfd is held: the process id cannot have been reused.
    let program = std::fs::read_link(format!("/proc/{number}/exe")).map_err(|error| error.to_string())?;
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if number == 1 || !name.starts_with("podman") {
        return Err(format!("{} (process {number}) listens on its socket", program.display()));
    }
    pidfd_send_signal(handle, what).map_err(|error| error.to_string())?;
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_that_wait_since_before_are_suspects() {
        let engine = Engine::new();
        let first = engine.begin(AppId(1));
        let gone = engine.begin(AppId(2));
        let renewed = engine.begin(AppId(3));
        drop(gone);
        std::thread::sleep(Duration::from_millis(2));
        let asked = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        renewed.next();
        let late = engine.begin(AppId(4));
        assert_eq!(engine.suspects(asked), (vec![AppId(1)], true));
        let stopping = engine.beside();
        assert_eq!(engine.suspects(asked), (vec![AppId(1)], true), "it began after");
        std::thread::sleep(Duration::from_millis(2));
        assert!(!engine.suspects(Instant::now()).1);
        drop((late, renewed));
        assert_eq!(engine.suspects(Instant::now()), (vec![AppId(1)], false), "another call may be to blame");
        drop(stopping);
        assert_eq!(engine.suspects(Instant::now()), (vec![AppId(1)], true));
        drop(first);
        assert_eq!(engine.suspects(Instant::now()), (vec![], false));
    }

    #[test]
    fn patience_follows_what_listings_take_and_a_fresh_engine_has_its_time() {
        let engine = Engine::new();
        assert_eq!(engine.patience(), PATIENCE.0);
        engine.answered(Duration::from_millis(500));
        assert_eq!(engine.patience(), Duration::from_secs(4));
        engine.answered(Duration::from_secs(60));
        assert_eq!(engine.patience(), PATIENCE.1);
        for _ in 0..LATELY {
            engine.answered(Duration::from_millis(10));
        }
        assert_eq!(engine.patience(), PATIENCE.0);
        lock(&engine.state).judged_from = Instant::now() + RECOVERY;
        assert!(!engine.is_due());
        lock(&engine.state).judged_from = Instant::now();
        assert!(engine.is_due() && !engine.is_due());
        assert_eq!(engine.patience(), PATIENCE.0 * 2, "the next one has more time");
        lock(&engine.state).ended = 9;
        assert_eq!(engine.patience(), PATIENCE.1);
        engine.answered(Duration::ZERO);
        assert!(engine.is_due(), "one that has answered is judged at once");
    }

    #[test]
    fn silence_is_told_once_and_ends_with_an_answer() {
        let engine = Engine::new();
        assert!(engine.seen().silent_since.is_none());
        assert!(engine.silent() && !engine.silent());
        assert!(engine.seen().silent_since.is_some());
        assert!(engine.answered(Duration::ZERO) && !engine.answered(Duration::ZERO));
        assert!(engine.seen().silent_since.is_none());
    }

    #[test]
    fn another_program_on_the_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("engine.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(end(&path).unwrap_err().contains("listens on its socket"));
        assert!(end(&dir.path().join("none")).is_err());
    }
}
