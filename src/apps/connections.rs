//! The interface between apps and the network. Apps declare it here; the noun `networks` implements it, and
//! startup wires the two.

use sqlx::PgConnection;

use super::spec::Connects;
use super::store;
use crate::access::{By, TenantRef};
use crate::driver::workload::Serves;
use crate::error::Error;
use crate::fault::Fault;
use crate::ids::{AppId, AppName, TenantId};
use crate::reconcile::Failure;

/// The kind of the work that applies a tenant's connections. The object is the tenant.
pub const WORK: &str = "network";

/// An app as the network sees it.
#[derive(Debug, Clone)]
pub struct Connecting {
    /// Identity.
    pub id: AppId,
    /// Name.
    pub name: AppName,
    /// The port that it serves on.
    pub port: Option<Serves>,
    /// The connections that it requests.
    pub connects: Connects,
}

/// Decides about an app's connections.
#[async_trait::async_trait]
pub trait Connections: Send + Sync + 'static {
    /// Returns a fault for each unresolved reference: a service, app or egress target that the tenant may not use.
    async fn absent(
        &self,
        conn: &mut PgConnection,
        tenant: &TenantRef,
        connects: &Connects,
    ) -> Result<Vec<Fault>, Error>;
    /// Returns the faults of [`Connections::absent`], and a fault for each target that the machine blocks.
    async fn missing(
        &self,
        conn: &mut PgConnection,
        tenant: &TenantRef,
        connects: &Connects,
    ) -> Result<Vec<Fault>, Error>;
    /// Records that an app was created, changed or deleted, within the same transaction. `words` describes the
    /// change.
    async fn changed(
        &self,
        conn: &mut PgConnection,
        by: By<'_>,
        tenant: TenantId,
        app: AppId,
        words: String,
    ) -> Result<(), Error>;
    /// Applies the network rules of a tenant's apps. Called before one of its apps starts.
    async fn settle(&self, tenant: TenantId) -> Result<(), Failure>;
}

/// Lists the apps of a tenant that are not being deleted, by name.
pub async fn list_connecting(conn: &mut PgConnection, tenant: TenantId) -> Result<Vec<Connecting>, Error> {
    store::list_current(conn, tenant).await?.into_iter().map(connecting).collect()
}

/// Lists those of the given apps that are not being deleted, for any tenant.
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

/// Returns the id of a tenant's app, unless the app is being deleted.
pub async fn find_id(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &AppName,
) -> Result<Option<AppId>, Error> {
    let app = store::find_app(conn, tenant, name).await?;
    Ok(app.filter(|app| app.deleted_at.is_none()).map(|app| app.id))
}

/// Returns the app with the n-th address of the tenant's subnet.
pub async fn find_at(
    conn: &mut PgConnection,
    tenant: TenantId,
    host: i64,
) -> Result<Option<(AppId, AppName)>, Error> {
    store::find_at(conn, tenant, host).await
}

/// Returns the names that belong to no app of the tenant.
pub async fn list_missing(
    conn: &mut PgConnection,
    tenant: TenantId,
    names: &[AppName],
) -> Result<Vec<String>, Error> {
    store::list_missing(conn, tenant, names).await
}
