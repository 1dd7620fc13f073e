//! Members of a tenant and their roles. An actor cannot give a role above its own, and a tenant keeps an owner.

use serde_json::json;
use sqlx::PgPool;

use super::extract::TenantScope;
use super::{Actor, Role, store};
use crate::db;
use crate::error::Error;

/// Rejects a role that is higher than the actor's own.
pub(super) fn require_within<P>(scope: &TenantScope<P>, role: Role) -> Result<(), Error> {
    if scope.highest().is_some_and(|own| role <= own) {
        Ok(())
    } else {
        Err(Error::Forbidden("you cannot give or change a role that is higher than your own".into()))
    }
}

fn require_an_owner_left(actor: &Actor, owners: usize, left: usize) -> Result<(), Error> {
    if owners > 0 && left == 0 && actor.platform.is_none() {
        return Err(Error::Conflict("this is the tenant's last owner; add another owner first".into()));
    }
    Ok(())
}

/// Changes a member's role.
pub async fn change_role<P>(
    pool: &PgPool,
    scope: &TenantScope<P>,
    name: &str,
    role: Role,
) -> Result<(), Error> {
    scope.actor.require_recent()?;
    require_within(scope, role)?;
    let tenant = scope.tenant.id;
    let mut tx = db::begin(pool, tenant).await?;
    let owners = store::count_owners(&mut tx, tenant).await?;
    let (account, before, _) = store::find_member(&mut tx, tenant, name).await?.ok_or(Error::NotFound)?;
    if let Some(before) = Role::parse(&before) {
        require_within(scope, before)?;
    }
    store::set_member(&mut tx, tenant, account, role, "local", &scope.actor.id).await?;
    store::end_links_within(&mut tx, tenant, &format!("account:{account} {name}"), name).await?;
    let left = store::count_owners(&mut tx, tenant).await?;
    require_an_owner_left(&scope.actor, owners, left)?;
    let detail = json!({"from": before, "to": role.as_str()});
    scope.by().record(&mut tx, tenant, "member.role", name, detail).await?;
    tx.commit().await?;
    Ok(())
}

/// Removes a member, with the member's own tokens in this tenant. A member may remove itself.
pub async fn remove<P>(pool: &PgPool, scope: &TenantScope<P>, name: &str) -> Result<(), Error> {
    let tenant = scope.tenant.id;
    let mut tx = db::begin(pool, tenant).await?;
    let owners = store::count_owners(&mut tx, tenant).await?;
    let (account, role, _) = store::find_member(&mut tx, tenant, name).await?.ok_or(Error::NotFound)?;
    if scope.actor.account != Some(account) {
        scope.actor.require_recent()?;
        if let Some(role) = Role::parse(&role) {
            require_within(scope, role)?;
        }
    }
    store::delete_member(&mut tx, tenant, account).await?;
    // Revoke the links that the member created or received: none may restore the membership.
    store::end_links_within(&mut tx, tenant, &format!("account:{account} {name}"), name).await?;
    let left = store::count_owners(&mut tx, tenant).await?;
    require_an_owner_left(&scope.actor, owners, left)?;
    scope.by().record(&mut tx, tenant, "member.remove", name, json!({"role": role})).await?;
    tx.commit().await?;
    Ok(())
}
