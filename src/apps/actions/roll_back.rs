//! Rolls an app back to an earlier release.

use sqlx::{Postgres, Transaction};

use super::{Apps, image_is_gone, is_image_there};
use crate::access::{By, TenantRef};
use crate::apps::reservation::{self, Peak, ReservationChange};
use crate::apps::store;
use crate::db::expected::Expected;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::AppName;

impl Apps {
    /// Rolls back: makes a new release with the spec and the digest of an earlier one.
    pub async fn roll_back(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        by: By<'_>,
        tenant: &TenantRef,
        name: &AppName,
        (revision, expected): (i64, &Expected),
    ) -> Result<(i64, i64), Error> {
        tenant.require_active()?;
        let (quota, state) = store::lock_quota(tx, tenant.id).await?;
        TenantRef { state, ..tenant.clone() }.require_active()?;
        let app = store::find_app(tx, tenant.id, name).await?.ok_or(Error::NotFound)?;
        expected.check(Some(app.generation))?;
        if app.deleted_at.is_some() {
            return Err(Error::Conflict("the app is being deleted".into()));
        }
        let mut release = store::find_release(tx, tenant.id, app.id, revision).await?.ok_or_else(|| {
            let was = (1..=app.revision).contains(&revision);
            let message = if was {
                format!("release {revision} is no longer kept: an app keeps its newest releases and those that run")
            } else {
                "there is no such revision".to_owned()
            };
            Error::fault(
                Fault::new(Code(426), Kind::Invalid, "revision", message)
                    .instead("GET .../releases lists the releases that you can roll back to; otherwise deploy the spec again"),
            )
        })?;
        let spec = release.parse_spec()?;
        let wanted = Peak::of(&spec);
        let peak = app.peak.max(wanted);
        let asked = ReservationChange::new(Some((app.peak, app.reserved)), wanted);
        let mut faults = reservation::check(&quota, asked);
        if !faults.is_empty() {
            return Err(Error::QuotaExceeded(faults));
        }
        faults.extend(self.connections.missing(tx, tenant, spec.connects()).await?);
        if !is_image_there(tx, tenant, &release.repository, &release.index_digest, &release.digest).await? {
            faults.push(image_is_gone());
        }
        if !faults.is_empty() {
            return Err(Error::Invalid(faults));
        }
        release.rolled_back_to = Some(revision);
        by.actor.id.as_str().clone_into(&mut release.actor);
        self.advance(tx, by, tenant, &app, (peak, asked.after()), &mut release, "app.roll_back").await
    }
}
