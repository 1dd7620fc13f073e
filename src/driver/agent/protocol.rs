//! The messages between `serve` and the root half: closed, neutral, length-prefixed JSON (u32 big
//! endian, at most [`MAX_FRAME`] bytes). One request a connection; the answer is one [`Reply`],
//! except for logs, which are a row of `Reply::Log` ended by `Reply::Done`.

use serde::{Deserialize, Serialize};

use super::super::{
    AppObserved, Denied, Error, Listener, LogLine, LogQuery, Observed, Probe, ProbeOutcome, Probed,
    PullSecret, Removal, TenantGrant, Used, Walls, Workload,
};
use crate::ids::{AppId, AppName, Installation, TenantId, TenantName};
use crate::policy::TenantFlows;

/// Largest frame, in bytes.
pub const MAX_FRAME: usize = 4 * 1024 * 1024;

/// Version of the messages. Another one is refused at `Hello`.
pub const PROTOCOL: u32 = 4;

/// What `serve` may ask.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who is there?
    Hello {},
    /// [`super::super::Driver::ensure_tenant`]
    EnsureTenant {
        /// What belongs to the tenant.
        grant: TenantGrant,
    },
    /// [`super::super::Driver::remove_tenant`]
    RemoveTenant {
        /// Name.
        tenant: TenantName,
        /// Identity.
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
        /// All that the tenant's apps may begin to talk to.
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
        /// Which.
        probe: Probe,
    },
    /// [`super::super::Driver::permits`]
    Permits {
        /// From where and where to.
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
        /// Identity.
        app_id: AppId,
    },
    /// [`super::super::Driver::observe`]
    Observe {
        /// Where the last answer ended.
        cursor: Option<String>,
        /// How long to wait for something new, at most 30,000 milliseconds.
        wait_ms: u32,
    },
    /// [`super::super::Driver::logs`]
    Logs {
        /// Which.
        query: LogQuery,
    },
}

/// What the root half answers.
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
    /// It is done.
    Done {},
    /// To the two removals.
    Removal {
        /// How far it is.
        removal: Removal,
    },
    /// A part of the answer to `Observe`: large answers come in several frames, `last` ends them.
    Observed {
        /// Cursor, completeness, events; `apps` holds this frame's share.
        observed: Observed,
        /// Whether this is the last frame.
        last: bool,
    },
    /// To `EnsureFlows`.
    Plan {
        /// The plan that is held.
        number: i64,
    },
    /// To `Walls`.
    Walls {
        /// What nobody reaches.
        walls: Walls,
    },
    /// To `Used`.
    Used {
        /// What was counted.
        used: Vec<Used>,
    },
    /// To `Listeners`.
    Listeners {
        /// By protocol and port.
        listeners: Vec<Listener>,
    },
    /// To `Permits`.
    Permits {
        /// Whether they do.
        permits: Option<bool>,
    },
    /// To `ProbeTenant`.
    ProbedTenant {
        /// What came of it.
        probed: Probed,
    },
    /// To `Probe`.
    Probed {
        /// What became of it.
        outcome: ProbeOutcome,
    },
    /// To `Denied`.
    Denied {
        /// The newest first.
        denied: Vec<Denied>,
    },
    /// A log line.
    Log {
        /// The line.
        line: LogLine,
    },
    /// It was not done.
    Failed {
        /// Why.
        error: Error,
    },
}

/// Splits what was observed so that no frame exceeds its bound.
#[must_use]
pub fn split(observed: Observed) -> Vec<Reply> {
    const SHARE: usize = MAX_FRAME / 2;
    let mut shares: Vec<Vec<AppObserved>> = vec![Vec::new()];
    let mut bytes = 0;
    for mut app in observed.apps {
        let mut size = serde_json::to_vec(&app).map_or(0, |json| json.len());
        // Events are the first thing that can be missed: one app never stops what is told of the others.
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
            observed: Observed {
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
