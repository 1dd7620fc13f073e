//! Who did what, when, to which object: written in the change's own transaction, insert-only, and sealed a
//! second behind by a chain whose key is not in the database.

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
pub struct Event<'a> {
    /// Tenant that it concerns; none for the platform's own.
    pub tenant: Option<TenantId>,
    /// Who.
    pub actor: &'a ActorId,
    /// What, as `noun.verb`.
    pub action: &'static str,
    /// To which object, by name.
    pub object: &'a str,
    /// Within which request; the reconciler's name where there is none.
    pub request_id: &'a str,
    /// What else is worth knowing. Never a secret.
    pub detail: Value,
}

/// Something that was refused. Equal ones are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// Tenant whose record it is on; none for the platform's.
    pub tenant: Option<TenantId>,
    /// Who.
    pub actor: String,
    /// By which token.
    pub via: Option<String>,
    /// What was asked for.
    pub object: String,
    /// Why it was refused.
    pub reason: &'static str,
    /// Address.
    pub place: String,
}

impl Refusal {
    /// One more of a place from which there were many different ones.
    #[must_use]
    pub fn folded(self) -> Self {
        Self { object: "many addresses".into(), reason: "various", place: self.place, ..Self::rest() }
    }

    /// All that are too many to tell apart.
    #[must_use]
    pub fn rest() -> Self {
        Self {
            tenant: None,
            actor: "many".into(),
            via: None,
            object: "more than could be told apart within a second".into(),
            reason: "various",
            place: "many".into(),
        }
    }
}

/// Refusals, each with how often it was.
pub type Refusals = HashMap<Refusal, u64>;

/// A row as shown.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Number: rises with time, with gaps.
    pub id: i64,
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Tenant, where a list has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Who.
    pub actor: String,
    /// By which token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// What.
    pub action: String,
    /// To what.
    pub object: String,
    /// `done` or `denied`.
    pub result: String,
    /// Within which request.
    pub request_id: String,
    /// What else.
    pub detail: Value,
}

/// Records a change within the transaction that makes it.
pub async fn record(conn: &mut PgConnection, event: Event<'_>) -> Result<(), Error> {
    store::insert_event(conn, &event).await
}

/// Records refusals, each with how often it was.
pub async fn record_refusals(pool: &PgPool, batch: &Refusals) -> Result<(), Error> {
    let mut conn = pool.acquire().await?;
    store::insert_refusals(&mut conn, batch).await
}
