//! Creates and updates tenants and apps. Their state is on disk before it is used.

use std::sync::Arc;

use super::super::app::AgentApp;
use super::super::check;
use super::super::core::{Agent, lock};
use super::super::kept::AppRecord;
use super::fetch::fetch;
use crate::driver::podman::render;
use crate::driver::workload::{TenantGrant, Workload};
use crate::driver::{Error, PullSecret};

/// Maximum increase of a generation or revision in one message. Otherwise one message could shut out all valid
/// later ones.
const LEAP: i64 = 100_000;
pub(super) async fn ensure_tenant(agent: &Agent, grant: &TenantGrant) -> Result<(), Error> {
    fail::fail_point!("agent::journal", |_| Err(Error::Transient("failpoint".into())));
    lock(&agent.journal).claim_tenant(&agent.config, grant).map_err(Error::Rejected)?;
    tokio::task::block_in_place(|| lock(&agent.limits).take(&grant.tenant, &grant.limits))?;
    agent.ensure_group(&grant.tenant)?;
    agent.ensure_network(&grant.tenant).await
}

pub(super) async fn ensure_app(
    agent: &Arc<Agent>,
    workload: Workload,
    pull: Option<&PullSecret>,
) -> Result<(), Error> {
    {
        let mut journal = lock(&agent.journal);
        let recorded = journal
            .tenant(&workload.tenant)
            .cloned()
            .ok_or_else(|| Error::Rejected("this tenant is not in the journal".into()))?;
        check::check(&workload, &recorded).map_err(Error::Rejected)?;
        journal
            .claim_block(&agent.config, &workload.tenant, &workload.app, workload.app_id, workload.block)
            .map_err(Error::Rejected)?;
    }
    // One at a time for each app: two requests would each create a task for it.
    let gate = agent.gate(workload.app_id);
    let _turn = gate.turn.lock().await;
    let known = agent.app(workload.app_id);
    if let Some(app) = &known {
        fence(&workload, &lock(&app.kept))?;
    }
    let image = render::image(&agent.config, &workload);
    // Held until the app is recorded: the image is not removed as unused meanwhile.
    let _held = agent.images.hold(&image).await;
    // Without instances, no image is needed.
    if workload.instances > 0 && !agent.podman.has_image(&image).await? {
        fetch(agent, &workload, &image, pull, &gate).await?;
        fail::fail_point!("agent::pulled", |_| Err(Error::Transient("failpoint".into())));
    }
    if gate.leave.is_cancelled() || lock(&agent.journal).is_removed(workload.app_id) {
        return Err(Error::Conflict("the app is being removed".into()));
    }
    put_on_record(agent, workload, known).await?;
    agent.refresh_firewall().await
}

/// Records the desired state of an app on disk before it is used. With a full disk the two must not differ.
async fn put_on_record(
    agent: &Arc<Agent>,
    workload: Workload,
    known: Option<Arc<AgentApp>>,
) -> Result<(), Error> {
    // Two apps of one tenant never have the same address or name: recorded one after another. The table of apps is
    // not locked during the disk write.
    let _turn = agent.recording.lock().await;
    let own: Vec<Arc<AgentApp>> =
        lock(&agent.apps).values().filter(|app| app.tenant == workload.tenant).cloned().collect();
    tokio::task::block_in_place(|| clash(&workload, own.iter()))?;
    let Some(app) = known else {
        let kept = AppRecord::new(workload);
        tokio::task::block_in_place(|| kept.save(&agent.apps_dir()))
            .map_err(|error| Error::Transient(error.to_string()))?;
        let id = kept.workload.app_id;
        let app = AgentApp::spawn(Arc::clone(agent), kept);
        lock(&agent.apps).insert(id, app);
        return Ok(());
    };
    let mut kept = lock(&app.kept);
    fence(&workload, &kept)?;
    if kept.workload != workload {
        let mut next = kept.clone();
        if next.workload.revision != workload.revision && next.keeps_running(&workload) {
            next.scale(&workload);
        } else if next.workload.revision != workload.revision {
            if next.proven {
                next.previous = Some(next.workload.clone());
            }
            next.proven = false;
            next.strikes = 0;
            next.put_aside = None;
            next.put_aside_at = None;
            next.message = None;
            next.event(
                "release",
                format!("release {} starts to replace the previous one", workload.revision),
            );
        }
        next.workload = workload;
        tokio::task::block_in_place(|| next.save(&agent.apps_dir()))
            .map_err(|error| Error::Transient(error.to_string()))?;
        *kept = next;
    }
    drop(kept);
    app.wake.notify_one();
    Ok(())
}

fn fence(workload: &Workload, kept: &AppRecord) -> Result<(), Error> {
    let known = &kept.workload;
    if kept.removing {
        return Err(Error::Conflict("the app is being removed".into()));
    }
    if (workload.generation, workload.epoch) < (known.generation, known.epoch)
        || workload.revision < known.revision
    {
        return Err(Error::Conflict("a newer generation, revision or epoch is already recorded".into()));
    }
    if workload.generation - known.generation > LEAP || workload.revision - known.revision > LEAP {
        return Err(Error::Rejected("a generation or revision rises by too much in one message".into()));
    }
    Ok(())
}

fn clash<'a>(workload: &Workload, mut apps: impl Iterator<Item = &'a Arc<AgentApp>>) -> Result<(), Error> {
    let clash = apps.any(|app| {
        app.id != workload.app_id
            && app.tenant == workload.tenant
            && (app.name == workload.app
                || lock(&app.kept).addresses().iter().any(|own| workload.addresses.contains(own)))
    });
    if clash {
        let why = "another app of the tenant still has this name or one of these addresses";
        return Err(Error::Transient(why.into()));
    }
    Ok(())
}
