//! Apps: the safe spec, releases, and what is seen of them.

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

/// Removes what has had its time.
pub async fn prune(pool: &sqlx::PgPool) -> Result<(), crate::error::Error> {
    let mut conn = pool.acquire().await?;
    store::prune(&mut conn).await?;
    // A batch at a time: what is left after so many has another hour.
    for _ in 0..10_000 {
        if store::prune_releases(&mut conn, 500).await? == 0 {
            break;
        }
    }
    Ok(())
}

/// Something that was found and done on the machine.
#[derive(Debug, Clone, Serialize)]
pub struct MachineEvent {
    /// Number.
    pub id: i64,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// A stable word: `firewall_repaired`, `probe_alarm`, `flow_left_out`, ...
    pub kind: String,
    /// A sentence for people.
    pub text: String,
}

/// Events of the machine by number, the newest first: for the platform.
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
    /// Raised by each change.
    pub generation: i64,
    /// The last one that the engine's side has taken over.
    pub observed_generation: i64,
    /// The release that is desired.
    pub revision: i64,
    /// The largest of what still runs and what shall run.
    pub peak: Peak,
    /// What is reserved for it.
    pub reserved: reservation::Reserved,
    /// First of its host ids.
    pub uid_start: i64,
    /// Number of its host ids.
    pub uid_size: i64,
    /// What was last seen.
    pub observed: Option<AppObserved>,
    /// When that was.
    pub observed_at: Option<OffsetDateTime>,
    /// What keeps the platform from going on.
    pub problem: Option<String>,
    /// When it was first deployed.
    pub created_at: OffsetDateTime,
    /// When it was last changed.
    pub changed_at: OffsetDateTime,
    /// When its removal was asked for.
    pub deleted_at: Option<OffsetDateTime>,
}

/// Something that was found or done.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// A stable word.
    pub kind: String,
    /// A sentence.
    pub text: String,
}
