//! Apps: the safe spec, releases, and their observed state.

use serde::Serialize;
use time::OffsetDateTime;

use crate::driver::AppObserved;
use crate::ids::{AppId, AppName, TenantId};

pub mod actions;
pub mod api;
pub mod connections;
pub mod console;
pub mod follow;
pub mod logs;
mod reasons;
pub mod reconcile;
pub mod release;
pub mod reservation;
pub mod sight;
pub mod spec;
mod store;
mod view;

pub use release::{Release, render_example};
pub use reservation::Peak;

/// Removes expired machine events, refused field names and releases.
pub async fn prune(pool: &sqlx::PgPool) -> Result<(), crate::error::Error> {
    let mut conn = pool.acquire().await?;
    store::prune(&mut conn).await?;
    // Work in batches; the next hourly run removes the rest.
    for _ in 0..10_000 {
        if store::prune_releases(&mut conn, 500).await? == 0 {
            break;
        }
    }
    Ok(())
}

/// Something that the agent found or did on the machine.
#[derive(Debug, Clone, Serialize)]
pub struct MachineEvent {
    /// Number.
    pub id: i64,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Stable machine-readable kind: `firewall_repaired`, `probe_alarm`, `flow_left_out`, ...
    pub kind: String,
    /// A sentence for the user.
    pub text: String,
}

/// Lists the machine's events by number, newest first. For platform roles only.
pub async fn list_machine_events(
    conn: &mut sqlx::PgConnection,
    before: i64,
    limit: i64,
) -> Result<Vec<MachineEvent>, crate::error::Error> {
    store::list_machine_events(conn, before, limit).await
}

/// An app's row.
#[derive(Debug, Clone)]
pub struct App {
    /// Identity.
    pub id: AppId,
    /// Tenant.
    pub tenant_id: TenantId,
    /// Name.
    pub name: AppName,
    /// Raised by every change.
    pub generation: i64,
    /// The last generation that the driver has accepted.
    pub observed_generation: i64,
    /// The desired release.
    pub revision: i64,
    /// The largest demand among the releases that still run and the desired one.
    pub peak: Peak,
    /// The quota reserved for the app.
    pub reserved: reservation::Reserved,
    /// First of its host ids.
    pub uid_start: i64,
    /// Number of its host ids.
    pub uid_size: i64,
    /// The last observed state.
    pub observed: Option<AppObserved>,
    /// When it was observed.
    pub observed_at: Option<OffsetDateTime>,
    /// The problem that blocks reconciliation.
    pub problem: Option<String>,
    /// When it was first deployed.
    pub created_at: OffsetDateTime,
    /// When it was last changed.
    pub changed_at: OffsetDateTime,
    /// When its deletion was requested.
    pub deleted_at: Option<OffsetDateTime>,
}

/// Something that the platform found or did for an app.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Stable machine-readable kind.
    pub kind: String,
    /// A sentence for the user.
    pub text: String,
}
