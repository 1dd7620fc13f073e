//! Tenants: who they are, what they may use, and in which state they are.

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
    /// Name; also its registry project.
    pub name: TenantName,
    /// For people.
    pub display_name: String,
    /// `active`, `suspended`, `offboarding`, `offboarded`.
    pub state: String,
    /// Raised by each change.
    pub generation: i64,
    /// The last one that was carried out.
    pub observed_generation: i64,
    /// When it was onboarded.
    pub created_at: OffsetDateTime,
    /// Limits and what is used; counted resources stand at 0.
    pub quota: Quota,
}

/// What stands below a tenant in other nouns and has to be gone before the tenant is. Declared
/// here, implemented there, wired at start.
#[async_trait::async_trait]
pub trait Belongings: Send + Sync + 'static {
    /// The name of the step, for people.
    fn step(&self) -> &'static str;
    /// Goes on with the removal and says what is still left, by looking again.
    async fn remove(&self, tenant: TenantId, name: &TenantName) -> Result<Left, crate::reconcile::Failure>;
}

/// What is left of a tenant's belongings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// Something, in words.
    Some(String),
}
