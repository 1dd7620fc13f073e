//! How a change of a service reaches the tenants that use it: in stages, each of which stands in the database
//! before it acts, so that it goes on from there whoever dies. `advance.rs` takes the steps, `attempt.rs` tries from
//! within apps what must be open and what must be closed.

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

/// The kind of a roll-out's work; the object is the roll-out.
pub const WORK: &str = "rollout";

/// How far a roll-out is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Stage {
    /// Nothing has changed yet; what is used of what will be closed is counted.
    Window,
    /// It holds for the first tenants.
    Canary,
    /// It reaches all others.
    All,
    /// It is taken back.
    Undo,
    /// It has ended.
    Over,
}

impl Stage {
    /// Its name.
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

/// How a change is to be rolled out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staging {
    /// Hours in which what it closes is counted before it is closed; 0 for none.
    pub window_hours: i32,
    /// Seconds that the first tenants are looked at before the others follow.
    pub observe_seconds: i32,
    /// Who is first: chosen when absent, nobody when empty.
    pub canaries: Option<Vec<TenantName>>,
}

impl Default for Staging {
    fn default() -> Self {
        Self { window_hours: 0, observe_seconds: 30, canaries: None }
    }
}

/// Something that was tried from within an app.
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
    /// Where to.
    pub address: Ipv4Addr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// Whether it must be open; closed otherwise.
    pub open: bool,
    /// What came of it.
    pub outcome: ProbeOutcome,
    /// Whether that is as it must be.
    pub good: bool,
}

impl Check {
    /// What it must be, in a word.
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
