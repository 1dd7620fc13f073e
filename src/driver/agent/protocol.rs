//! The messages between `serve` and the agent: a closed set of types that names no engine, as length-prefixed JSON
//! (u32 big endian, at most [`MAX_FRAME`] bytes). One request per connection. The answer is one [`Reply`]; for logs
//! it is a sequence of `Reply::Log` that ends with `Reply::Done`.

use serde::{Deserialize, Serialize};

use super::super::{
    AppObserved, BlockedRanges, Denied, Error, HostSocket, LogLine, LogQuery, ObservedChanges, Probe,
    ProbeOutcome, ProbeSummary, PullSecret, Removal, TenantGrant, Used, Workload,
};
use crate::ids::{AppId, AppName, Installation, TenantId, TenantName};
use crate::policy::TenantFlows;

/// Largest frame, in bytes.
pub const MAX_FRAME: usize = 4 * 1024 * 1024;

/// Version of the messages. `Hello` refuses any other.
pub const PROTOCOL: u32 = 4;

/// A request of `serve`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Asks for the installation and the version.
    Hello {},
    /// [`super::super::Driver::ensure_tenant`]
    EnsureTenant {
        /// The tenant's allocations and limits.
        grant: TenantGrant,
    },
    /// [`super::super::Driver::remove_tenant`]
    RemoveTenant {
        /// Name.
        tenant: TenantName,
        /// Id.
        tenant_id: TenantId,
    },
    /// [`super::super::Driver::ensure_app`]
    EnsureApp {
        /// Desired state.
        workload: Box<Workload>,
        /// Credential for the pull, if the image may have to be fetched.
        pull: Option<PullSecret>,
    },
    /// [`super::super::Driver::ensure_flows`]
    EnsureFlows {
        /// The allowed flows of the tenant's apps.
        flows: TenantFlows,
    },
    /// [`super::super::Driver::denied`]
    Denied {
        /// Tenant.
        tenant: TenantName,
        /// App.
        app_id: AppId,
    },
    /// [`super::super::Driver::walls`]
    Walls {},
    /// [`super::super::Driver::used`]
    Used {},
    /// [`super::super::Driver::listeners`]
    Listeners {},
    /// [`super::super::Driver::probe`]
    Probe {
        /// The probe.
        probe: Probe,
    },
    /// [`super::super::Driver::permits`]
    Permits {
        /// Source and target.
        probe: Probe,
    },
    /// [`super::super::Driver::probe_tenant`]
    ProbeTenant {
        /// Tenant.
        tenant: TenantName,
    },
    /// [`super::super::Driver::remove_app`]
    RemoveApp {
        /// Tenant.
        tenant: TenantName,
        /// App.
        app: AppName,
        /// Id.
        app_id: AppId,
    },
    /// [`super::super::Driver::observe`]
    Observe {
        /// Cursor of the last answer.
        cursor: Option<String>,
        /// How long to wait for a change, at most 30,000 milliseconds.
        wait_ms: u32,
    },
    /// [`super::super::Driver::logs`]
    Logs {
        /// The query.
        query: LogQuery,
    },
}

/// An answer of the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// To `Hello`.
    Hello {
        /// The agent's installation.
        installation: Installation,
        /// The agent's [`PROTOCOL`].
        protocol: u32,
    },
    /// The request succeeded.
    Done {},
    /// To both removals.
    Removal {
        /// Progress of the removal.
        removal: Removal,
    },
    /// A part of the answer to `Observe`. Large answers come in several frames; `last` marks the final one.
    Observed {
        /// Cursor, completeness, events; `apps` holds this frame's share.
        observed: ObservedChanges,
        /// Whether this is the last frame.
        last: bool,
    },
    /// To `EnsureFlows`.
    Plan {
        /// Number of the stored plan.
        number: i64,
    },
    /// To `Walls`.
    Walls {
        /// The machine's own addresses and the blocked ranges.
        walls: BlockedRanges,
    },
    /// To `Used`.
    Used {
        /// The counts.
        used: Vec<Used>,
    },
    /// To `Listeners`.
    Listeners {
        /// Listening sockets by protocol and port.
        listeners: Vec<HostSocket>,
    },
    /// To `Permits`.
    Permits {
        /// Whether the rules allow the connection.
        permits: Option<bool>,
    },
    /// To `ProbeTenant`.
    ProbedTenant {
        /// The results.
        probed: ProbeSummary,
    },
    /// To `Probe`.
    Probed {
        /// The outcome.
        outcome: ProbeOutcome,
    },
    /// To `Denied`.
    Denied {
        /// Denied connections, the newest first.
        denied: Vec<Denied>,
    },
    /// A log line.
    Log {
        /// The line.
        line: LogLine,
    },
    /// The request failed.
    Failed {
        /// The reason.
        error: Error,
    },
}

/// Splits observed state so that no frame exceeds [`MAX_FRAME`].
#[must_use]
pub fn split(observed: ObservedChanges) -> Vec<Reply> {
    const SHARE: usize = MAX_FRAME / 2;
    let mut shares: Vec<Vec<AppObserved>> = vec![Vec::new()];
    let mut bytes = 0;
    for mut app in observed.apps {
        let mut size = serde_json::to_vec(&app).map_or(0, |json| json.len());
        // Events are dropped first: one app must not prevent the report of the others.
        while size > SHARE && !app.events.is_empty() {
            let half = app.events.len().div_ceil(2);
            app.events.drain(..half);
            size = serde_json::to_vec(&app).map_or(0, |json| json.len());
        }
        if bytes + size > SHARE && bytes > 0 {
            shares.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(share) = shares.last_mut() {
            share.push(app);
        }
    }
    let count = shares.len();
    shares
        .into_iter()
        .enumerate()
        .map(|(n, apps)| Reply::Observed {
            observed: ObservedChanges {
                cursor: observed.cursor.clone(),
                complete: observed.complete,
                apps,
                machine: if n + 1 == count { observed.machine.clone() } else { Vec::new() },
                engine: observed.engine,
                fetches: if n + 1 == count { observed.fetches.clone() } else { Vec::new() },
            },
            last: n + 1 == count,
        })
        .collect()
}
