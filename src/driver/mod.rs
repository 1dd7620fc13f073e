//! The [`Driver`] trait: one neutral interface to the system that runs workloads (`ensure`, `remove`, `observe`). A
//! driver knows no tables, no HTTP and no roles.

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

pub use podman::host::HostSocket;
pub use workload::{TenantGrant, TenantLimits, Workload};

/// Why a driver call failed. The reconcile loop chooses its reaction by the variant.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Error {
    /// The call may succeed later: the engine or its agent is not available.
    #[error("{0}")]
    Transient(String),
    /// The engine or its agent does not answer. The result of the call is unknown.
    #[error("{0}")]
    Away(String),
    /// The call can never succeed. The message is shown to the tenant.
    #[error("{0}")]
    Rejected(String),
    /// A writer with a newer generation or epoch has already acted: stop.
    #[error("{0}")]
    Conflict(String),
}

/// A short-lived credential for exactly one repository. Never stored, never printed.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullSecret {
    secret: String,
    /// Bytes that the image takes on disk; 0 if unknown.
    bytes: u64,
}

impl PullSecret {
    /// Wraps the secret.
    #[must_use]
    pub fn new(secret: String) -> Self {
        Self { secret, bytes: 0 }
    }
    /// Sets the number of bytes that the image takes on disk.
    #[must_use]
    pub fn for_bytes(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }
    /// Returns the bytes that the image takes on disk; 0 if unknown.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// Returns the secret, for the one credential header that carries it.
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

/// Progress of a removal. A database row may be deleted only after the driver returned `Gone`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Removal {
    /// Nothing is left.
    Gone,
    /// The removal is in progress; ask again.
    Underway,
}

/// Observed state of one instance. The engine's own claim alone does not decide it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// The image is being fetched or the container is being created.
    Preparing,
    /// Started, but not yet healthy.
    Starting,
    /// Runs, and its health check passes if it has one.
    Running,
    /// Runs, but its health check fails.
    Unhealthy,
    /// Ended by itself and waits for its next start.
    Waiting,
    /// Is being stopped.
    Stopping,
    /// Could not be created or started; the reason is given.
    Failed,
}

/// Why an instance ended or cannot run. The words are stable; `detail` of [`Ending`] is the text for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The process ended by itself.
    Exited,
    /// The kernel killed it for its memory.
    OutOfMemory,
    /// Killed by a signal; the sender is unknown.
    Killed,
    /// Its health check failed too often.
    Unhealthy,
    /// The image could not be fetched or used.
    ImageError,
    /// The engine refused to create or start it.
    StartError,
    /// It disappeared or was stopped from outside the platform.
    Removed,
}

/// How the last run of an instance ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Cause.
    pub cause: Cause,
    /// Exit code, if any (128 + signal number after a signal).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exit_code: Option<i32>,
    /// When it ended.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// How long it ran, in milliseconds.
    pub ran_ms: u64,
    /// Explanation for people.
    pub detail: String,
    /// Its last log lines, cleaned for display.
    pub last_lines: Vec<String>,
}

/// One observed instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceObserved {
    /// Number, unique over the lifetime of the app.
    pub number: u32,
    /// Release that the instance runs.
    pub revision: i64,
    /// State.
    pub state: InstanceState,
    /// When it entered this state.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// When its process last started.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none", default)]
    pub started: Option<OffsetDateTime>,
    /// Number of restarts.
    pub restarts: u32,
    /// Consecutive failures; a long run resets the count.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failures: u32,
    /// Why it is not ready, while it runs.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub why: Option<String>,
    /// When it starts again, while it waits.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none", default)]
    pub next_start: Option<OffsetDateTime>,
    /// How its last run ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_end: Option<Ending>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Host user id of its main process, as observed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub uid: Option<u32>,
    /// The container's name in the engine.
    pub container: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde requires this signature")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// An event: something that the agent found or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppEvent {
    /// Increases by one within the lifetime of an app on this agent; the pair (app, `seq`) is unique.
    pub seq: u64,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// A stable word: `started`, `ended`, `restarted`, `unhealthy`, `repaired`, `rolled`, `pull_failed`, ...
    pub kind: String,
    /// Explanation for people.
    pub text: String,
}

/// Target of a probe.
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

/// A connection attempt from one of an app's instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Tenant.
    pub tenant: TenantName,
    /// App from whose instance the probe starts.
    pub app: AppId,
    /// Target.
    pub target: ProbeTarget,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Whether the platform itself sends the probe. Such a probe does not wait for tenants' probes.
    #[serde(default)]
    pub platform: bool,
}

/// Result of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeOutcome {
    /// The other side has the connection, as observed there.
    Reached,
    /// A connection opened; the process that accepted it is unknown.
    Opened,
    /// A host answered that nothing listens there.
    Refused,
    /// The firewall refused it.
    Prohibited,
    /// A machine on the way, not this firewall, answered that the target is unreachable.
    Unreachable,
    /// No answer.
    Silent,
}

/// Maximum number of apps of a tenant that are probed after its plan is applied.
pub const PROBED_APPS: u32 = 8;

/// Results of the probes from a tenant's apps after its plan is applied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeSummary {
    /// Number of apps that were probed.
    pub apps: u32,
    /// Number of probes of flows that must be open.
    pub open: u32,
    /// Number of probes of flows that must be closed.
    pub closed: u32,
    /// Results that contradict the plan.
    pub faults: Vec<String>,
    /// Flows that did not answer, although no rule of the platform blocks them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<String>,
}

impl ProbeOutcome {
    /// Returns whether packets got through.
    #[must_use]
    pub fn is_through(self) -> bool {
        matches!(self, Self::Reached | Self::Opened | Self::Refused)
    }
}

impl std::fmt::Display for ProbeOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reached => "reached: the other side has the connection",
            Self::Opened => "a connection opened; the process that accepted it is unknown",
            Self::Refused => "a host answered that nothing listens there",
            Self::Prohibited => "the firewall refused it",
            Self::Unreachable => "a machine on the way refused it, not the firewall",
            Self::Silent => "no answer",
        })
    }
}

/// Packets of one kind that were denied, or allowed only in audit mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// Address of the instance.
    pub source: Ipv4Addr,
    /// Address of the target.
    pub target: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the target.
    pub port: u16,
    /// Whether they were allowed in audit mode.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub let_through: bool,
    /// Whether the flow is allowed but the packets were rate limited: the tenant's apps opened too many connections
    /// at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hasty: bool,
    /// When the first packet was seen.
    #[serde(with = "time::serde::rfc3339")]
    pub first: OffsetDateTime,
    /// When the last packet was seen.
    #[serde(with = "time::serde::rfc3339")]
    pub last: OffsetDateTime,
}

/// Packets counted on a flow that is about to close.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// Tenant.
    pub tenant: TenantName,
    /// App.
    pub app: AppId,
    /// Target.
    pub network: Cidr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Number of packets since the counter was created.
    pub packets: u64,
}

/// One observed app.
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
    /// Revision of that desired state.
    pub revision: i64,
    /// Whether the observed state matches the desired state: as many instances of this revision as desired, all
    /// healthy, and none of another revision.
    pub settled: bool,
    /// Why the app is not settled, for people.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
    /// Instances, by number.
    pub instances: Vec<InstanceObserved>,
    /// The newest events, oldest first, at most 50.
    pub events: Vec<AppEvent>,
}

/// Whether the container engine answers the agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSeen {
    /// Since when it does not answer; none while it answers.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none", default)]
    pub silent_since: Option<OffsetDateTime>,
    /// Number of apps that are set aside because they hung the engine.
    pub put_aside: u32,
}

/// An image that is being fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetching {
    /// The app that waits for it.
    pub app: AppId,
    /// Release that uses the image.
    pub revision: i64,
    /// When the fetch began, or the wait for it.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// Whether it waits for other fetches.
    pub waits: bool,
    /// Bytes fetched so far.
    pub bytes: u64,
    /// Bytes of the unpacked image; 0 if unknown.
    pub unpacked: u64,
}

/// Changes since a cursor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ObservedChanges {
    /// Pass this cursor to the next call. Another run of the agent does not know it and answers with everything.
    pub cursor: String,
    /// Whether `apps` is the complete list: an app that is not in it does not exist.
    pub complete: bool,
    /// Apps that changed.
    pub apps: Vec<AppObserved>,
    /// Events of the machine itself: the table was flushed and loaded again, or a bridge was created again.
    pub machine: Vec<AppEvent>,
    /// The container engine, as the agent observes it now.
    #[serde(default)]
    pub engine: EngineSeen,
    /// All images that are being fetched now.
    #[serde(default)]
    pub fetches: Vec<Fetching>,
}

/// Selects the log lines to read.
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
    /// Maximum number of last lines (1 to 10,000).
    pub tail: u32,
    /// Continue with new lines as they arrive.
    pub follow: bool,
}

/// One line of a log. The text is as written, at most 16 KiB a line, with invalid UTF-8 replaced. The component
/// that displays it must clean it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Instance.
    pub instance: u32,
    /// Time of the engine, never a time in the line.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// `stdout`, `stderr`, or `platform` for a line of the platform itself (a gap, a start, an end).
    pub stream: LogStreamName,
    /// Text without the newline.
    pub text: String,
}

/// Source of a line.
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

/// Ranges that no tenant reaches on a machine, in addition to the reserved ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedRanges {
    /// Addresses of the machine, except those on tenants' bridges.
    pub own: Vec<Ipv4Addr>,
    /// Ranges that its configuration blocks.
    pub closed: Vec<Cidr>,
}

impl BlockedRanges {
    /// Returns both as ranges.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range> {
        let own = self.own.iter().map(|address| never::own(Cidr::of(*address)));
        own.chain(self.closed.iter().map(|network| never::configured(*network))).collect()
    }
}

/// A system that runs workloads.
#[async_trait::async_trait]
pub trait Driver: Send + Sync + 'static {
    /// Creates the tenant's resources on the machine: journal, bridge. Idempotent.
    async fn ensure_tenant(&self, grant: &TenantGrant) -> Result<(), Error>;
    /// Removes the tenant's resources once it has no app. Its ids and network number stay retired.
    async fn remove_tenant(&self, tenant: &TenantName, id: TenantId) -> Result<Removal, Error>;
    /// Stores the desired state and starts to converge. Returns once the state is stored and the image is present.
    /// `pull` is required when the engine's store does not have the image yet.
    async fn ensure_app(&self, workload: &Workload, pull: Option<&PullSecret>) -> Result<(), Error>;
    /// Stores all flows that a tenant's apps may open, verifies the plan and applies it. An app that does not exist
    /// yet gets its flows when it is created.
    /// Returns the number of the plan that the driver holds afterwards. A higher number than that of `flows` means
    /// that a newer plan was already there and nothing changed.
    async fn ensure_flows(&self, flows: &TenantFlows) -> Result<i64, Error>;
    /// Returns the ranges that no tenant reaches in addition to the reserved ranges: the machine's own addresses,
    /// and the ranges that its configuration blocks.
    async fn walls(&self) -> Result<BlockedRanges, Error>;
    /// Returns the recently denied packets of an app, newest first.
    async fn denied(&self, tenant: &TenantName, app: AppId) -> Result<Vec<Denied>, Error>;
    /// Returns the packet counts of the flows that are about to close.
    async fn used(&self) -> Result<Vec<Used>, Error>;
    /// Returns the listeners on the machine beyond loopback, and whether each answers from within an instance.
    async fn listeners(&self) -> Result<Vec<HostSocket>, Error>;
    /// Tries a connection from within one of the app's instances.
    async fn probe(&self, probe: &Probe) -> Result<ProbeOutcome, Error>;
    /// Returns whether the applied rules allow an app's packets to an address; none if no instance of the app runs.
    async fn permits(&self, probe: &Probe) -> Result<Option<bool>, Error>;
    /// Probes, from within a tenant's apps, the flows that must be open and those that must be closed.
    async fn probe_tenant(&self, tenant: &TenantName) -> Result<ProbeSummary, Error>;
    /// Starts or continues the removal of an app.
    async fn remove_app(&self, tenant: &TenantName, app: &AppName, id: AppId) -> Result<Removal, Error>;
    /// Returns the changes since `cursor` (everything for `None`). Waits up to `wait` for a change.
    async fn observe(
        &self,
        cursor: Option<&str>,
        wait: std::time::Duration,
    ) -> Result<ObservedChanges, Error>;
    /// Streams log lines.
    async fn logs(&self, query: &LogQuery) -> Result<LogStream, Error>;
}
