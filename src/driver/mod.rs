//! What runs workloads, behind one neutral trait: `ensure`, `remove`, `observe`. A driver knows
//! no tables, no HTTP and no roles.

use std::net::Ipv4Addr;
use std::pin::Pin;

use futures_util::Stream;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::ids::{AppId, AppName, TenantId, TenantName};
use crate::policy::never::{self, Range};
use crate::policy::{Cidr, Protocol, TenantFlows};

pub mod agent;
pub mod disk;
pub mod listener;
pub mod podman;
pub mod scratch;
pub mod workload;

pub use podman::host::Listener;
pub use workload::{TenantGrant, TenantLimits, Workload};

/// Why a driver did not do what it was asked. The loop chooses by the variant.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Error {
    /// It may work later: the engine or its agent is not there.
    #[error("{0}")]
    Transient(String),
    /// The engine or its agent does not answer. Nothing is known of what was asked.
    #[error("{0}")]
    Away(String),
    /// It will never work as asked: shown to the tenant.
    #[error("{0}")]
    Rejected(String),
    /// Somebody with a newer generation or epoch was here: stop.
    #[error("{0}")]
    Conflict(String),
}

/// A short-lived credential for exactly one repository. Never stored, never printed.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullSecret {
    secret: String,
    /// Bytes that the image takes on the disk; 0 when that is not known.
    bytes: u64,
}

impl PullSecret {
    /// Wraps the secret.
    #[must_use]
    pub fn new(secret: String) -> Self {
        Self { secret, bytes: 0 }
    }
    /// The same, for an image that takes so many bytes on the disk.
    #[must_use]
    pub fn for_bytes(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }
    /// Bytes that the image takes on the disk; 0 when that is not known.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// The secret, for the one header that it goes into.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.secret
    }
}

impl std::fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PullSecret(..)")
    }
}

/// Whether something is gone already. A row may go only after `Gone` was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Removal {
    /// Nothing of it is left.
    Gone,
    /// It is being stopped and removed; ask again.
    Underway,
}

/// State of one instance as seen, not as the engine claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// The image is being fetched or the container made.
    Preparing,
    /// Started; not yet well.
    Starting,
    /// Runs, and is well as far as a health check says.
    Running,
    /// Runs, but its health check fails.
    Unhealthy,
    /// It ended by itself and waits for its next start.
    Waiting,
    /// It is being stopped.
    Stopping,
    /// It could not be made or started; the reason says why.
    Failed,
}

/// Why an instance ended or cannot run. Stable words; `detail` of [`Ending`] is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The process ended by itself.
    Exited,
    /// The kernel killed it for its memory, as seen in the cgroup's own counters.
    OutOfMemory,
    /// Killed by a signal; who sent it is not known.
    Killed,
    /// Its health check failed too often.
    Unhealthy,
    /// The image could not be fetched or used.
    ImageError,
    /// The engine refused to make or start it.
    StartError,
    /// It vanished or was stopped from outside.
    Removed,
}

/// How the last run of an instance ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Cause.
    pub cause: Cause,
    /// Exit code, where there is one (128 + signal for a signal).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exit_code: Option<i32>,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// How long it had run, in milliseconds.
    pub ran_ms: u64,
    /// A sentence for people.
    pub detail: String,
    /// Its last log lines, cleaned for display.
    pub last_lines: Vec<String>,
}

/// One instance as seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceObserved {
    /// Number, unique within the app for life.
    pub number: u32,
    /// Release that it runs.
    pub revision: i64,
    /// State.
    pub state: InstanceState,
    /// Since when it is in this state.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// When its process was last started.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none", default)]
    pub started: Option<OffsetDateTime>,
    /// How often it was started again.
    pub restarts: u32,
    /// Failures in a row; a long run forgets them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failures: u32,
    /// Why it is not ready, while it runs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub why: Option<String>,
    /// When it will be started again, while it waits.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none", default)]
    pub next_start: Option<OffsetDateTime>,
    /// How its last run ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_end: Option<Ending>,
    /// Its address.
    pub address: Ipv4Addr,
    /// The host user id that its main process was seen to have.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub uid: Option<u32>,
    /// The container's name in the engine.
    pub container: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Something that was found and done, for the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppEvent {
    /// Rises by one within an app's life on this agent; the pair (app, `seq`) is unique.
    pub seq: u64,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// A stable word: `started`, `ended`, `restarted`, `unhealthy`, `repaired`, `rolled`, `pull_failed`, ...
    pub kind: String,
    /// A sentence for people.
    pub text: String,
}

/// Where a probe goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeTarget {
    /// An instance of an app.
    App {
        /// Its tenant.
        tenant: TenantName,
        /// Its identity.
        app: AppId,
    },
    /// An address.
    Address(Ipv4Addr),
}

/// A probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Tenant.
    pub tenant: TenantName,
    /// The app from whose instance it is made.
    pub app: AppId,
    /// Where to.
    pub target: ProbeTarget,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Whether the platform itself asks: it waits for no tenant's probes.
    #[serde(default)]
    pub platform: bool,
}

/// What became of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeOutcome {
    /// The other side was seen to have the connection.
    Reached,
    /// A connection opened; who accepted it is not known.
    Opened,
    /// Somebody answered that nothing listens there.
    Refused,
    /// The firewall refused it.
    Prohibited,
    /// Somebody else on the way said that there is no way.
    Unreachable,
    /// No answer.
    Silent,
}

/// Most apps of a tenant that are tried after its plan.
pub const PROBED_APPS: u32 = 8;

/// What was tried from within a tenant's apps after its plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// From how many apps.
    pub apps: u32,
    /// How many times something that must be open.
    pub open: u32,
    /// How many times something that must be closed.
    pub closed: u32,
    /// What was not as it must be.
    pub faults: Vec<String>,
    /// What did not answer though nothing of the platform's keeps it closed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<String>,
}

impl ProbeOutcome {
    /// Whether packets got through.
    #[must_use]
    pub fn is_through(self) -> bool {
        matches!(self, Self::Reached | Self::Opened | Self::Refused)
    }
}

impl std::fmt::Display for ProbeOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reached => "reached: the other side has the connection",
            Self::Opened => "a connection opened; who accepted it is not known",
            Self::Refused => "somebody answered that nothing listens there",
            Self::Prohibited => "the firewall refused it",
            Self::Unreachable => "somebody on the way there refused it, not the firewall",
            Self::Silent => "no answer",
        })
    }
}

/// Packets of one kind that were not let through, or only on trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// The instance's address.
    pub source: Ipv4Addr,
    /// Where they were to go.
    pub target: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port there.
    pub port: u16,
    /// Whether they were let through all the same, on trial.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub let_through: bool,
    /// Whether they were allowed, but its tenant's apps had begun too many connections at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hasty: bool,
    /// When the first was seen.
    #[serde(with = "time::serde::rfc3339")]
    pub first: OffsetDateTime,
    /// When the last was seen.
    #[serde(with = "time::serde::rfc3339")]
    pub last: OffsetDateTime,
}

/// Packets that were counted of a flow that is about to close.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// Tenant.
    pub tenant: TenantName,
    /// App.
    pub app: AppId,
    /// Where to.
    pub network: Cidr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// How many since the counter was made.
    pub packets: u64,
}

/// One app as seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppObserved {
    /// Tenant.
    pub tenant: TenantName,
    /// App.
    pub app: AppName,
    /// Identity.
    pub app_id: AppId,
    /// Generation of the desired state that the agent holds.
    pub generation: i64,
    /// Revision of it.
    pub revision: i64,
    /// Whether what runs is what is desired: as many instances of this revision as asked for,
    /// all well, none of another revision.
    pub settled: bool,
    /// What is in the way, for people.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
    /// Instances, by number.
    pub instances: Vec<InstanceObserved>,
    /// The newest events, oldest first, at most 50.
    pub events: Vec<AppEvent>,
}

/// Whether the container engine answers its agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSeen {
    /// Since when it does not answer; none while it does.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none", default)]
    pub silent_since: Option<OffsetDateTime>,
    /// Apps that hung it and were put aside.
    pub put_aside: u32,
}

/// An image that is being fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetching {
    /// The app that waits for it.
    pub app: AppId,
    /// The release that it is of.
    pub revision: i64,
    /// Since when it is fetched, or waits.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// Whether it waits for other fetches.
    pub waits: bool,
    /// Bytes that are here so far.
    pub bytes: u64,
    /// Bytes that the image takes unpacked; 0 when that is not known.
    pub unpacked: u64,
}

/// What has changed since a cursor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Observed {
    /// Hand this in the next time. It is worth nothing to another run of the agent, which then
    /// answers with everything.
    pub cursor: String,
    /// Whether `apps` is everything that there is (then what is not in it does not exist).
    pub complete: bool,
    /// Apps that changed.
    pub apps: Vec<AppObserved>,
    /// Events of the machine itself: the table was flushed and loaded again, a bridge made anew.
    pub machine: Vec<AppEvent>,
    /// The container engine, as the agent sees it now.
    #[serde(default)]
    pub engine: EngineSeen,
    /// Images that are being fetched now, all of them.
    #[serde(default)]
    pub fetches: Vec<Fetching>,
}

/// Which log to read.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogQuery {
    /// Tenant.
    pub tenant: TenantName,
    /// App.
    pub app: AppName,
    /// Identity.
    pub app_id: AppId,
    /// Only this instance.
    pub instance: Option<u32>,
    /// At most so many of the last lines (1 to 10,000).
    pub tail: u32,
    /// Go on as new lines come.
    pub follow: bool,
}

/// One line of a log. The text is as written, at most 16 KiB a line, not valid UTF-8 replaced;
/// whoever shows it cleans it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Instance.
    pub instance: u32,
    /// The engine's time, never the line's.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// `stdout`, `stderr`, or `platform` for a line of the platform itself (a gap, a start, an end).
    pub stream: LogStreamName,
    /// Text without the newline.
    pub text: String,
}

/// Where a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStreamName {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The platform itself.
    Platform,
}

/// A stream of log lines.
pub type LogStream = Pin<Box<dyn Stream<Item = Result<LogLine, Error>> + Send>>;

/// What nobody reaches on a machine, beside the built-in ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walls {
    /// The addresses that it has, beside those of tenants' bridges.
    pub own: Vec<Ipv4Addr>,
    /// What its configuration closes.
    pub closed: Vec<Cidr>,
}

impl Walls {
    /// As ranges.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range> {
        let own = self.own.iter().map(|address| never::own(Cidr::of(*address)));
        own.chain(self.closed.iter().map(|network| never::configured(*network))).collect()
    }
}

/// What runs workloads.
#[async_trait::async_trait]
pub trait Driver: Send + Sync + 'static {
    /// Makes the tenant's place: journal, bridge. Idempotent.
    async fn ensure_tenant(&self, grant: &TenantGrant) -> Result<(), Error>;
    /// Removes the tenant's place once it has no app. Its ids and number stay burnt.
    async fn remove_tenant(&self, tenant: &TenantName, id: TenantId) -> Result<Removal, Error>;
    /// Takes over the desired state and starts to converge; returns once it is stored and the
    /// image is there. `pull` is needed when the image is not in the engine's store yet.
    async fn ensure_app(&self, workload: &Workload, pull: Option<&PullSecret>) -> Result<(), Error>;
    /// Takes over all that a tenant's apps may begin to talk to, proves it, and puts it in force. Apps that are
    /// not here yet find their flows when they come.
    /// Returns the number of the plan that is held then: a higher one means that a newer plan was here and nothing
    /// was taken.
    async fn ensure_flows(&self, flows: &TenantFlows) -> Result<i64, Error>;
    /// What nobody reaches beside the built-in ranges: the machine's own addresses, and what its configuration closes.
    async fn walls(&self) -> Result<Walls, Error>;
    /// What was refused of an app's packets lately, the newest first.
    async fn denied(&self, tenant: &TenantName, app: AppId) -> Result<Vec<Denied>, Error>;
    /// What was counted of the flows that are about to close.
    async fn used(&self) -> Result<Vec<Used>, Error>;
    /// What listens on the machine beyond loopback, and whether it answers from within an instance.
    async fn listeners(&self) -> Result<Vec<Listener>, Error>;
    /// Tries from within one of the app's instances whether it gets somewhere.
    async fn probe(&self, probe: &Probe) -> Result<ProbeOutcome, Error>;
    /// Whether the rules that are in force let an app's packets through to an address; none if no instance of it runs.
    async fn permits(&self, probe: &Probe) -> Result<Option<bool>, Error>;
    /// Tries from within a tenant's apps what must be open and what must be closed.
    async fn probe_tenant(&self, tenant: &TenantName) -> Result<Probed, Error>;
    /// Starts or continues to remove an app.
    async fn remove_app(&self, tenant: &TenantName, app: &AppName, id: AppId) -> Result<Removal, Error>;
    /// What changed since `cursor` (everything for `None`), waiting up to `wait` for something.
    async fn observe(&self, cursor: Option<&str>, wait: std::time::Duration) -> Result<Observed, Error>;
    /// Log lines.
    async fn logs(&self, query: &LogQuery) -> Result<LogStream, Error>;
}
