//! What apps ask of the network, and what the network says to it. The question is declared here; the noun
//! that answers stands to the right and is wired at start.

use sqlx::PgConnection;

use super::spec::Connects;
use super::store;
use crate::access::{By, TenantRef};
use crate::driver::workload::Serves;
use crate::error::Error;
use crate::fault::Fault;
use crate::ids::{AppId, AppName, TenantId};
use crate::reconcile::Failure;

/// The kind of the work that brings a tenant's connections into force; the object is the tenant.
pub const WORK: &str = "network";

/// An app, as far as the network is concerned.
#[derive(Debug, Clone)]
pub struct Connecting {
    /// Identity.
    pub id: AppId,
    /// Name.
    pub name: AppName,
    /// Where it serves.
    pub port: Option<Serves>,
    /// What it asks to reach.
    pub connects: Connects,
}

/// What decides about an app's connections.
#[async_trait::async_trait]
pub trait Connections: Send + Sync + 'static {
    /// What of it the tenant does not have, by what was decided: a fault each.
    async fn absent(
        &self,
        conn: &mut PgConnection,
        tenant: &TenantRef,
        connects: &Connects,
    ) -> Result<Vec<Fault>, Error>;
    /// What of it the tenant cannot have, also by what the machine closes: a fault each.
    async fn missing(
        &self,
        conn: &mut PgConnection,
        tenant: &TenantRef,
        connects: &Connects,
    ) -> Result<Vec<Fault>, Error>;
    /// An app has come, changed or gone: within the transaction in which it does. `words` says what.
    async fn changed(
        &self,
        conn: &mut PgConnection,
        by: By<'_>,
        tenant: TenantId,
        app: AppId,
        words: String,
    ) -> Result<(), Error>;
    /// Puts in force what a tenant's apps may talk to: before one of them starts.
    async fn settle(&self, tenant: TenantId) -> Result<(), Failure>;
}

/// The apps of a tenant that are not being deleted, by name.
pub async fn list_connecting(conn: &mut PgConnection, tenant: TenantId) -> Result<Vec<Connecting>, Error> {
    store::list_current(conn, tenant).await?.into_iter().map(connecting).collect()
}

/// Those of these apps that are not being deleted, whosever they are.
pub async fn list_connecting_of(
    conn: &mut PgConnection,
    apps: &[(TenantId, AppId)],
) -> Result<Vec<Connecting>, Error> {
    let (tenants, ids): (Vec<i64>, Vec<i64>) = apps.iter().map(|(tenant, app)| (tenant.0, app.0)).unzip();
    store::list_current_of(conn, &tenants, &ids).await?.into_iter().map(connecting).collect()
}

fn connecting((id, name, spec): (AppId, AppName, serde_json::Value)) -> Result<Connecting, Error> {
    let spec =
        super::spec::AppSpec::from_stored(&spec).map_err(|_| Error::internal("a stored spec has faults"))?;
    Ok(Connecting { id, name, port: spec.serves(), connects: spec.connects().clone() })
}

/// The identity of a tenant's app that is not being deleted.
pub async fn find_id(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &AppName,
) -> Result<Option<AppId>, Error> {
    let app = store::find_app(conn, tenant, name).await?;
    Ok(app.filter(|app| app.deleted_at.is_none()).map(|app| app.id))
}

/// The app that has the n-th address of the tenant's subnet.
pub async fn find_at(
    conn: &mut PgConnection,
    tenant: TenantId,
    host: i64,
) -> Result<Option<(AppId, AppName)>, Error> {
    store::find_at(conn, tenant, host).await
}

/// Which of these names the tenant has no app for.
pub async fn list_missing(
    conn: &mut PgConnection,
    tenant: TenantId,
    names: &[AppName],
) -> Result<Vec<String>, Error> {
    store::list_missing(conn, tenant, names).await
}
