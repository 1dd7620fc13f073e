//! Who belongs to a tenant, and as what. Nobody gives more than they have, and a tenant keeps an owner.

use serde_json::json;
use sqlx::PgPool;

use super::extract::TenantScope;
use super::{Actor, Role, store};
use crate::db;
use crate::error::Error;

/// Refuses to give a role that is higher than one's own.
pub(super) fn require_within<P>(scope: &TenantScope<P>, role: Role) -> Result<(), Error> {
    if scope.highest().is_some_and(|own| role <= own) {
        Ok(())
    } else {
        Err(Error::Forbidden("nobody gives a role that is higher than their own".into()))
    }
}

fn require_an_owner_left(actor: &Actor, owners: usize, left: usize) -> Result<(), Error> {
    if owners > 0 && left == 0 && actor.platform.is_none() {
        return Err(Error::Conflict("this is the tenant's last owner: make another one first".into()));
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

/// Takes a member out, with the tokens that they made for themselves here. `who` may be oneself.
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
    // Neither what they made nor what was made for them brings anybody back.
    store::end_links_within(&mut tx, tenant, &format!("account:{account} {name}"), name).await?;
    let left = store::count_owners(&mut tx, tenant).await?;
    require_an_owner_left(&scope.actor, owners, left)?;
    scope.by().record(&mut tx, tenant, "member.remove", name, json!({"role": role})).await?;
    tx.commit().await?;
    Ok(())
}
