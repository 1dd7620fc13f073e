//! A deploy: a new app, or the next release of one.

use serde_json::json;
use sqlx::{Postgres, Transaction};

use super::{Apps, WORK, image_is_gone, is_image_there, no_address};
use crate::access::{By, TenantRef};
use crate::apps::reservation::{self, Asked, Peak, Reserved};
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

/// New apps of a tenant within 24 hours.
const NEW_APPS_A_DAY: i64 = 200;

/// Whether to do it or only to say what would happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Do it.
    Apply,
    /// Only say.
    DryRun,
}

/// What a deploy led to.
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
    /// Digest that runs.
    pub digest: Digest,
    /// What is reserved.
    pub reserved: Reserved,
    /// The same in words.
    pub reserved_words: String,
    /// Warnings: accepted, but probably not as meant.
    pub warnings: Vec<Fault>,
}

/// What of a spec only the tenant's registry can tell.
struct Resolved {
    index_digest: Digest,
    digest: Digest,
    user: InsideUser,
    groups: Vec<u16>,
    warnings: Vec<Fault>,
}

impl Apps {
    /// Deploys a spec: a new app, or the next release of one.
    pub async fn deploy(
        &self,
        by: By<'_>,
        tenant: &TenantRef,
        spec: &AppSpec,
        expected: &Expected,
        mode: Mode,
    ) -> Result<Deployed, Error> {
        tenant.require_active()?;
        // Everything that can be wrong is told together: the image, the names, the quota.
        let mut faults = Vec::new();
        let mut conn = db::begin(&self.pool, tenant.id).await?;
        // Held against the app again under the lock; here it spares the registry a question.
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
        let names = images::Names::parse(&merged.passwd, &merged.group);
        let has_command =
            spec.command().is_some_and(|c| !c.is_empty()) || spec.args().is_some_and(|a| !a.is_empty());
        let command = if has_command { images::SpecCommand::Given } else { images::SpecCommand::Absent };
        let asked = images::Asked { port: spec.tcp_port(), command, health: spec.says_health() };
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

    /// The transaction's body. On a dry run it stops before anything is given out: what a sequence has
    /// given, no rollback brings back.
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
        let asked = Asked::new(existing.as_ref().map(|app| (app.peak, app.reserved)), wanted);
        let short = reservation::check(&quota, asked);
        // Looked at again under the lock: whoever deletes images holds it too.
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

    /// What a new app needs beside the quota: addresses, and its turn. Its ids are never given again, so
    /// that making and deleting apps in a loop would use up everybody's pool.
    async fn require_room(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        tenant: &TenantRef,
        peak: Peak,
    ) -> Result<(), Error> {
        if store::count_made_lately(tx, tenant.id).await? >= NEW_APPS_A_DAY {
            return Err(Error::Conflict(format!(
                "{NEW_APPS_A_DAY} new apps a day are enough: each uses up user ids for ever; change the apps that are there"
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
