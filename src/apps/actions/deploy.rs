//! Deploys an app: creates it, or makes its next release.

use serde_json::json;
use sqlx::{Postgres, Transaction};

use super::{Apps, WORK, image_is_gone, is_image_there, no_address};
use crate::access::{By, TenantRef};
use crate::apps::reservation::{self, Peak, ReservationChange, Reserved};
use crate::apps::spec::{AppSpec, ImageReference};
use crate::apps::{Release, store};
use crate::db;
use crate::db::expected::Expected;
use crate::driver::workload::InsideUser;
use crate::error::Error;
use crate::fault::Fault;
use crate::ids::{AppName, Digest};
use crate::images;
use crate::reconcile::enqueue;
use crate::registries;
use crate::uid_ranges;

/// Maximum new apps of a tenant within 24 hours.
const NEW_APPS_A_DAY: i64 = 200;

/// Selects between a deploy and a preview of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Applies the deploy.
    Apply,
    /// Only reports what the deploy would change.
    DryRun,
}

/// The result of a deploy.
#[derive(Debug)]
pub struct Deployed {
    /// Generation.
    pub generation: i64,
    /// Revision.
    pub revision: i64,
    /// Whether anything changed.
    pub changed: bool,
    /// Whether the app is new.
    pub created: bool,
    /// Digest of the manifest that runs.
    pub digest: Digest,
    /// Quota that the app reserves.
    pub reserved: Reserved,
    /// The reservation as text.
    pub reserved_words: String,
    /// Warnings: the spec is accepted but may not behave as intended.
    pub warnings: Vec<Fault>,
}

/// Facts about a spec that only the tenant's registry knows.
struct Resolved {
    index_digest: Digest,
    digest: Digest,
    user: InsideUser,
    groups: Vec<u16>,
    warnings: Vec<Fault>,
}

impl Apps {
    /// Deploys a spec: creates the app, or makes its next release.
    pub async fn deploy(
        &self,
        by: By<'_>,
        tenant: &TenantRef,
        spec: &AppSpec,
        expected: &Expected,
        mode: Mode,
    ) -> Result<Deployed, Error> {
        tenant.require_active()?;
        // Report all faults together: image, names and quota.
        let mut faults = Vec::new();
        let mut conn = db::begin(&self.pool, tenant.id).await?;
        // This early check saves a request to the registry. `write` repeats it under the lock.
        let known = store::find_app(&mut conn, tenant.id, spec.name()).await?;
        expected.check(known.map(|app| app.generation))?;
        faults.extend(self.connections.missing(&mut conn, tenant, spec.connects()).await?);
        drop(conn);
        let resolved = match self.resolve(tenant, spec).await {
            Ok(resolved) => Some(resolved),
            Err(Error::Invalid(more)) => {
                faults.extend(more);
                None
            }
            Err(other) => return Err(other),
        };
        fail::fail_point!("apps::deploy_resolved", |_| Err(Error::internal("failpoint")));
        let mut tx = db::begin(&self.pool, tenant.id).await?;
        let outcome = self.write(&mut tx, by, tenant, spec, resolved, faults, (expected, mode)).await?;
        if mode == Mode::DryRun || !outcome.changed {
            tx.rollback().await?;
            return Ok(outcome);
        }
        fail::fail_point!("apps::deploy_commit", |_| Err(Error::internal("failpoint")));
        tx.commit().await?;
        fail::fail_point!("apps::deploy_committed");
        self.waker.wake();
        Ok(outcome)
    }

    async fn resolve(&self, tenant: &TenantRef, spec: &AppSpec) -> Result<Resolved, Error> {
        let image = spec.image();
        let found =
            self.registry.resolve(&tenant.name, image.repository(), &reference(image.reference())).await?;
        let merged = self.registry.merged(&tenant.name, image.repository(), &found).await?;
        let names = images::ImageAccounts::parse(&merged.passwd, &merged.group);
        let has_command =
            spec.command().is_some_and(|c| !c.is_empty()) || spec.args().is_some_and(|a| !a.is_empty());
        let command = if has_command { images::SpecCommand::Given } else { images::SpecCommand::Absent };
        let asked = images::ImageRequirements { port: spec.tcp_port(), command, health: spec.says_health() };
        let flight = images::preflight(&found.config, &names, asked);
        let refused = merged.refused.map(|why| images::refused(&why));
        let flight = match (flight, refused) {
            (Ok(flight), None) => flight,
            (flight, refused) => {
                return Err(Error::Invalid(flight.err().into_iter().flatten().chain(refused).collect()));
            }
        };
        Ok(Resolved {
            index_digest: found.index_digest.clone(),
            digest: found.manifest_digest.clone(),
            user: flight.user,
            groups: flight.groups,
            warnings: flight.warnings,
        })
    }

    /// Writes the deploy within the transaction. A dry run stops before it allocates anything, because a
    /// rollback does not return values to a sequence.
    #[expect(clippy::too_many_arguments, reason = "one call, from `deploy`, whose parts these are")]
    async fn write(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        by: By<'_>,
        tenant: &TenantRef,
        spec: &AppSpec,
        resolved: Option<Resolved>,
        mut faults: Vec<Fault>,
        (expected, mode): (&Expected, Mode),
    ) -> Result<Deployed, Error> {
        let (quota, state) = store::lock_quota(tx, tenant.id).await?;
        TenantRef { state, ..tenant.clone() }.require_active()?;
        let existing = store::find_app(tx, tenant.id, spec.name()).await?;
        if let Some(app) = &existing {
            expected.check(Some(app.generation))?;
            if app.deleted_at.is_some() {
                return Err(Error::Conflict(
                    "the app is being deleted; deploy it again when it is gone".into(),
                ));
            }
        } else {
            expected.check(None)?;
        }
        let wanted = Peak::of(spec);
        let peak = existing.as_ref().map_or(wanted, |app| app.peak.max(wanted));
        let asked = ReservationChange::new(existing.as_ref().map(|app| (app.peak, app.reserved)), wanted);
        let short = reservation::check(&quota, asked);
        // Check again under the lock: image deletion holds the same lock.
        if let Some(resolved) = &resolved
            && !is_image_there(
                tx,
                tenant,
                spec.image().repository(),
                &resolved.index_digest,
                &resolved.digest,
            )
            .await?
        {
            faults.push(image_is_gone());
        }
        let (true, true, Some(resolved)) = (faults.is_empty(), short.is_empty(), resolved) else {
            let only_quota = faults.is_empty();
            faults.extend(short);
            return Err(if only_quota { Error::QuotaExceeded(faults) } else { Error::Invalid(faults) });
        };
        let mut release = Release {
            revision: 1,
            spec: spec.to_json(),
            repository: spec.image().repository().clone(),
            tag: match spec.image().reference() {
                ImageReference::Tag(tag) => Some(tag.clone()),
                ImageReference::Digest(_) => None,
            },
            index_digest: resolved.index_digest,
            digest: resolved.digest,
            user: resolved.user,
            groups: resolved.groups,
            warnings: json!(resolved.warnings),
            rolled_back_to: None,
            actor: by.actor.id.as_str().to_owned(),
            created_at: time::OffsetDateTime::now_utc(),
        };
        let mut outcome = Deployed {
            generation: 1,
            revision: 1,
            changed: true,
            created: existing.is_none(),
            digest: release.digest.clone(),
            reserved: asked.after(),
            reserved_words: wanted.words(),
            warnings: resolved.warnings,
        };
        let Some(app) = existing else {
            self.require_room(tx, tenant, peak).await?;
            if mode == Mode::Apply {
                self.create(tx, by, tenant, spec.name(), peak, &release).await?;
            }
            return Ok(outcome);
        };
        outcome.generation = app.generation;
        outcome.revision = app.revision;
        let current = store::find_release(tx, tenant.id, app.id, app.revision).await?;
        if current.is_some_and(|current| current.spec == release.spec && current.digest == release.digest) {
            outcome.changed = false;
            return Ok(outcome);
        }
        (outcome.generation, outcome.revision) =
            self.advance(tx, by, tenant, &app, (peak, asked.after()), &mut release, "app.release").await?;
        Ok(outcome)
    }

    /// Checks the limits of a new app besides the quota: free addresses, and new apps per day. User ids are
    /// never reused, so creating and deleting apps in a loop would exhaust the pool that all tenants share.
    async fn require_room(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        tenant: &TenantRef,
        peak: Peak,
    ) -> Result<(), Error> {
        if store::count_made_lately(tx, tenant.id).await? >= NEW_APPS_A_DAY {
            return Err(Error::Conflict(format!(
                "the tenant has created {NEW_APPS_A_DAY} apps within 24 hours, which is the maximum: each new app uses user ids that are never reused; deploy a new release of an existing app instead"
            )));
        }
        let subnet = self.subnet_of(tx, tenant).await?;
        if store::count_free_addresses(tx, tenant.id, subnet).await? < peak.reserved().instances {
            return Err(no_address(subnet));
        }
        Ok(())
    }

    async fn create(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        by: By<'_>,
        tenant: &TenantRef,
        name: &AppName,
        peak: Peak,
        release: &Release,
    ) -> Result<(), Error> {
        let block = uid_ranges::allocate_block(tx, tenant.id, &self.pools).await?;
        let id = store::insert_app(tx, tenant.id, name, peak, block).await?;
        self.take_addresses(tx, tenant, id, peak).await?;
        store::insert_release(tx, tenant.id, id, release).await?;
        store::add_used(tx, tenant.id, Reserved::default(), peak.reserved(), 1).await?;
        let detail =
            json!({"revision": 1, "digest": release.digest, "uids": [block.ids.start, block.ids.size]});
        by.record(tx, tenant.id, "app.create", name.as_str(), detail).await?;
        self.connections.changed(tx, by, tenant.id, id, format!("{name} is deployed")).await?;
        enqueue(tx, WORK, id.0, tenant.id).await?;
        Ok(())
    }
}

fn reference(of: &ImageReference) -> registries::Reference {
    match of {
        ImageReference::Tag(tag) => registries::Reference::Tag(tag.clone()),
        ImageReference::Digest(digest) => registries::Reference::Digest(digest.clone()),
    }
}
