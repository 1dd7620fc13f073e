//! User ids: a fixed range per tenant, a block within it per app. Ranges and blocks never overlap and are never
//! reused.

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::config::Pools;
use crate::driver::workload::IdRange;
use crate::error::Error;
use crate::ids::TenantId;

pub mod api;
pub mod machine;
mod store;

pub use store::{list_ranges_of, release_ranges};

/// A range of a tenant.
#[derive(Debug, Clone, Serialize)]
pub struct UidRange {
    /// Slot in the pool.
    pub slot: i64,
    /// First id.
    pub start: i64,
    /// One past the last id.
    pub end: i64,
    /// Number of blocks allocated to apps.
    pub given_blocks: i64,
    /// Total number of blocks.
    pub blocks: i64,
    /// Time of allocation.
    #[serde(with = "time::serde::rfc3339")]
    pub given_at: OffsetDateTime,
    /// Time at which the tenant left. The range is retired since then.
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub released_at: Option<OffsetDateTime>,
}

impl UidRange {
    /// Returns the range as a driver uses it.
    #[must_use]
    pub fn ids(&self) -> IdRange {
        let start = u32::try_from(self.start).unwrap_or(u32::MAX);
        IdRange { start, size: u32::try_from(self.end - self.start).unwrap_or(0) }
    }
}

/// A block of an app: slot of its range and host ids.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Slot of the range it lies in.
    pub slot: i64,
    /// Host ids.
    pub ids: IdRange,
}

/// Allocates a range to a tenant, within the caller's transaction. Fails when the pool is exhausted.
pub async fn allocate_range(
    conn: &mut PgConnection,
    tenant: TenantId,
    pools: &Pools,
) -> Result<UidRange, Error> {
    store::insert_range(conn, tenant, pools).await.map_err(|error| match crate::db::constraint(&error) {
        Some("uid_pool_is_used_up" | "uid_range_within_runtime_limit") => {
            Error::Conflict("the pool of user ids is exhausted: ranges are never reused (BH-424)".into())
        }
        _ => error.into(),
    })
}

/// Allocates a block to an app, from the tenant's newest range or, if that is full, from a new one.
pub async fn allocate_block(
    conn: &mut PgConnection,
    tenant: TenantId,
    pools: &Pools,
) -> Result<Block, Error> {
    if let Some(block) = store::take_block(conn, tenant).await? {
        return Ok(block);
    }
    allocate_range(conn, tenant, pools).await?;
    store::take_block(conn, tenant).await?.ok_or_else(|| Error::internal("a new range without a block"))
}
