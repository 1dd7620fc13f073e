//! Tenants: their names, quotas and states.

use time::OffsetDateTime;

use crate::ids::{TenantId, TenantName};
use crate::quotas::Quota;

pub mod actions;
pub mod api;
pub mod console;
pub mod reconcile;
mod store;

pub use store::{find_for_console, id_of, list_conditions, name_of, tenant_network, tenant_state};

/// A tenant's row.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Identity.
    pub id: TenantId,
    /// Name of the tenant and of its registry project.
    pub name: TenantName,
    /// Display name.
    pub display_name: String,
    /// `active`, `suspended`, `offboarding`, `offboarded`.
    pub state: String,
    /// Increased by each change.
    pub generation: i64,
    /// The last generation that was reconciled.
    pub observed_generation: i64,
    /// Time of onboarding.
    pub created_at: OffsetDateTime,
    /// Limits and use. Counted resources show 0.
    pub quota: Quota,
}

/// Tenant resources of another noun, which offboarding removes before the tenant. Declared here, implemented by
/// that noun, wired at startup.
#[async_trait::async_trait]
pub trait Belongings: Send + Sync + 'static {
    /// Returns the name of the step, for display.
    fn step(&self) -> &'static str;
    /// Continues the removal, then returns the remaining resources.
    async fn remove(&self, tenant: TenantId, name: &TenantName) -> Result<Left, crate::reconcile::Failure>;
}

/// What an offboarding step still has to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// Remaining resources, described in words.
    Some(String),
}
