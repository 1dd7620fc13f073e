//! Removes tenants and apps: recorded first, gone once the engine has nothing of them left.

use std::sync::Arc;

use super::super::app::discard;
use super::super::core::{Agent, lock};
use crate::driver::podman::ports;
use crate::driver::{Error, Removal};
use crate::ids::{AppId, AppName, TenantId, TenantName};

pub(super) async fn remove_tenant(
    agent: &Agent,
    tenant: &TenantName,
    id: TenantId,
) -> Result<Removal, Error> {
    let recorded = lock(&agent.journal).ever(tenant).cloned();
    let Some(recorded) = recorded else { return Ok(Removal::Gone) };
    if recorded.tenant_id != id {
        return Err(Error::Rejected("the journal has another id for this tenant".into()));
    }
    if lock(&agent.apps).values().any(|app| app.tenant == *tenant) {
        return Err(Error::Transient("the tenant still has apps on this machine".into()));
    }
    let bridge = agent.config.bridge(recorded.network);
    agent.podman.remove_network(&bridge).await?;
    if agent.podman.networks().await?.contains(&bridge) || !ports::remove_bridge(&bridge).await? {
        return Ok(Removal::Underway);
    }
    lock(&agent.journal).retire(tenant).map_err(Error::Transient)?;
    lock(&agent.flows).forget(tenant);
    agent.forget_group(tenant);
    lock(&agent.denials).remove(tenant);
    Ok(Removal::Gone)
}

pub(super) async fn remove_app(
    agent: &Arc<Agent>,
    tenant: &TenantName,
    name: &AppName,
    id: AppId,
) -> Result<Removal, Error> {
    let recorded = lock(&agent.journal).app(id).map(|(tenant, app)| (tenant.clone(), app.clone()));
    match recorded {
        None => return Ok(Removal::Gone),
        Some(own) if own != (tenant.clone(), name.clone()) => {
            return Err(Error::Rejected("the journal has another tenant or name for this app".into()));
        }
        Some(_) => {}
    }
    // A fetch for the app is cancelled; the app is not gone before that fetch has ended.
    let gate = agent.gate(id);
    gate.leave.cancel();
    let Ok(_turn) = gate.turn.try_lock() else { return Ok(Removal::Underway) };
    // From here on the app cannot come back: its id is never reused. Recorded before the first request to the
    // engine: an engine that hangs does not keep an app.
    lock(&agent.journal).remove_app(id).map_err(Error::Transient)?;
    let app = agent.app(id);
    if let Some(app) = &app {
        let mut kept = lock(&app.kept);
        if !kept.removing {
            kept.removing = true;
            tokio::task::block_in_place(|| kept.save(&agent.apps_dir()))
                .map_err(|error| Error::Transient(error.to_string()))?;
        }
        drop(kept);
        app.wake.notify_one();
    }
    let installation = agent.config.installation.as_str();
    let containers = agent.podman.list(installation, agent.engine.patience()).await?;
    let own: Vec<String> = containers
        .iter()
        .filter(|c| c.app() == Some(id.to_string().as_str()))
        .map(|c| c.name().to_owned())
        .collect();
    let _waiting = agent.engine.beside();
    let Some(app) = app else {
        for name in &own {
            discard(agent, name).await?;
        }
        if !own.is_empty() {
            return Ok(Removal::Underway);
        }
        lock(&agent.gates).remove(&id);
        return Ok(Removal::Gone);
    };
    let empty = lock(&app.kept).instances.is_empty();
    if !empty || !own.is_empty() {
        return Ok(Removal::Underway);
    }
    app.end();
    lock(&app.kept).delete(&agent.apps_dir());
    let _ = std::fs::remove_dir_all(agent.logs_dir(id));
    lock(&agent.apps).remove(&id);
    lock(&agent.gates).remove(&id);
    agent.tidy.notify_one();
    agent.refresh_firewall().await?;
    Ok(Removal::Gone)
}
