//! Rollouts: how a change of a service reaches the tenants that use it. Each stage is stored in the database
//! before it acts, so a rollout continues after a crash of any process. `advance.rs` runs the steps.
//! `attempt.rs` probes from inside apps the flows that must be open and those that must be closed.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::driver::ProbeOutcome;
use crate::ids::{AppId, AppName, TenantId, TenantName};
use crate::policy::Protocol;

pub mod advance;
mod attempt;
mod spread;
mod verify;
mod window;

/// The kind of a rollout's work; the object is the rollout.
pub const WORK: &str = "rollout";

/// The stage of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Stage {
    /// Observation window: nothing changes, and use of the endpoints that will be removed is counted.
    Window,
    /// The change reaches the canary tenants.
    Canary,
    /// The change reaches all other tenants.
    All,
    /// The rollout is rolling back.
    Undo,
    /// The rollout has ended.
    Over,
}

impl Stage {
    /// Returns the stage's name in the API and the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Canary => "canary",
            Self::All => "all",
            Self::Undo => "undo",
            Self::Over => "over",
        }
    }
}

/// The stages of a rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staging {
    /// Length of the observation window, in hours; 0 for none.
    pub window_hours: i32,
    /// How long the canary tenants are observed before the others follow, in seconds.
    pub observe_seconds: i32,
    /// Canary tenants: chosen if `None`, no canary stage if empty.
    pub canaries: Option<Vec<TenantName>>,
}

impl Default for Staging {
    fn default() -> Self {
        Self { window_hours: 0, observe_seconds: 30, canaries: None }
    }
}

/// A probe from inside an app, and its result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Tenant.
    pub tenant: TenantId,
    /// Its name.
    pub tenant_name: TenantName,
    /// App.
    pub app: AppId,
    /// Its name.
    pub app_name: AppName,
    /// Destination.
    pub address: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Whether it must be open; if not, it must be closed.
    pub open: bool,
    /// Outcome of the probe.
    pub outcome: ProbeOutcome,
    /// Whether the outcome is as expected.
    pub good: bool,
}

impl Check {
    /// Returns the expected state as a word.
    #[must_use]
    pub fn must_be(&self) -> &'static str {
        if self.open { "open" } else { "closed" }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tenant_name, app_name, address, protocol, port, outcome, .. } = self;
        let must_be = self.must_be();
        write!(
            f,
            "{tenant_name}/{app_name} to {address} {protocol} {port}, which must be {must_be}: {outcome}"
        )
    }
}
