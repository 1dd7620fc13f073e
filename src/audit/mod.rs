//! Audit log: actor, action, object and time of each change. Rows are written in the transaction of the change
//! and are insert-only. A chain seals them a second later, with a key that is not in the database.

use std::collections::HashMap;

use serde::Serialize;
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use crate::error::Error;
use crate::ids::{ActorId, TenantId};

pub mod heads;
pub mod seal;
mod store;
pub mod verify;

pub use store::{Filter, list, prepare_months, retire_months};

/// One change.
#[derive(Debug)]
pub struct AuditEvent<'a> {
    /// The tenant. `None` for events of the platform itself.
    pub tenant: Option<TenantId>,
    /// The actor.
    pub actor: &'a ActorId,
    /// The action, as `noun.verb`.
    pub action: &'static str,
    /// The name of the object.
    pub object: &'a str,
    /// The request id, or the name of the reconciler.
    pub request_id: &'a str,
    /// Further details. Never a secret.
    pub detail: Value,
}

/// A refused request. Equal refusals share one count.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// The tenant whose log has the refusal. `None` for the platform's log.
    pub tenant: Option<TenantId>,
    /// The actor.
    pub actor: String,
    /// The token of the actor.
    pub via: Option<String>,
    /// The requested object.
    pub object: String,
    /// Reason of the refusal.
    pub reason: &'static str,
    /// Network address.
    pub place: String,
}

impl Refusal {
    /// Merges this refusal into the common count of its network, which has too many different ones.
    #[must_use]
    pub fn folded(self) -> Self {
        Self { object: "many addresses".into(), reason: "various", place: self.place, ..Self::rest() }
    }

    /// The common count of all refusals beyond the limit of a batch.
    #[must_use]
    pub fn rest() -> Self {
        Self {
            tenant: None,
            actor: "many".into(),
            via: None,
            object: "too many different requests within a second".into(),
            reason: "various",
            place: "many".into(),
        }
    }
}

/// Refusals with their counts.
pub type Refusals = HashMap<Refusal, u64>;

/// A row as shown.
#[derive(Debug, Clone, Serialize)]
pub struct AuditEntry {
    /// Number. Increases with time, with gaps.
    pub id: i64,
    /// Time of the event.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// The tenant, in lists that span several tenants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The actor.
    pub actor: String,
    /// The token of the actor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// The action.
    pub action: String,
    /// The object.
    pub object: String,
    /// `done` or `denied`.
    pub result: String,
    /// The request id.
    pub request_id: String,
    /// Further details.
    pub detail: Value,
}

/// Records a change within its transaction.
pub async fn record(conn: &mut PgConnection, event: AuditEvent<'_>) -> Result<(), Error> {
    store::insert_event(conn, &event).await
}

/// Records refusals with their counts.
pub async fn record_refusals(pool: &PgPool, batch: &Refusals) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    store::insert_refusals(&mut conn, batch).await
}
