//! Who did what, when, to which object: written in the change's own transaction.

use serde_json::Value;
use sqlx::PgConnection;

use crate::error::Error;
use crate::ids::{ActorId, TenantId};

mod store;

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

/// Records a change within the transaction that makes it.
pub async fn record(conn: &mut PgConnection, event: Event<'_>) -> Result<(), Error> {
    store::insert_event(conn, &event).await
}
