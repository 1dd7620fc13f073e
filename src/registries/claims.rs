//! Allows one request of an upload at a time. The registry opens the upload's file separately for each request:
//! of two concurrent requests, the slower one would keep writing to the content that the faster one committed.

use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use sqlx::PgPool;

use super::front::OciError;
use super::proxy::ProxyRequest;
use super::store::{self, Ends, UploadClaimOutcome};
use super::uploads::unknown_upload;
use crate::ids::TenantName;

/// Interval of renewing a claim. A claim lasts 60 seconds.
const RENEW: Duration = Duration::from_secs(15);
/// After this time without renewal the request is cancelled, before another one may claim the upload.
const LOST: Duration = Duration::from_secs(45);

/// A claim on an upload.
pub(super) struct UploadClaim {
    pool: PgPool,
    tenant: TenantName,
    pub(super) part: String,
}

/// The claim was lost, and the request was cancelled.
pub(super) struct Lost;

impl UploadClaim {
    /// Claims an upload; fails if another request holds it.
    pub(super) async fn take(pool: &PgPool, asked: &ProxyRequest, id: &str) -> Result<Self, OciError> {
        match store::claim_part(pool, &asked.tenant, &asked.repository, id).await? {
            UploadClaimOutcome::Taken(part) => {
                Ok(Self { pool: pool.clone(), tenant: asked.tenant.clone(), part })
            }
            UploadClaimOutcome::Unknown => Err(unknown_upload()),
            UploadClaimOutcome::Busy => Err(OciError::new(
                StatusCode::CONFLICT,
                "BLOB_UPLOAD_INVALID",
                "another request for this upload is in progress, or was cut off seconds ago: wait for its answer and \
                 continue at its end, or start a new upload",
            )),
        }
    }

    /// Runs a request while the claim holds.
    pub(super) async fn hold<T>(&self, request: impl Future<Output = T>) -> Result<T, Lost> {
        tokio::select! {
            answer = request => Ok(answer),
            () = self.renew() => Err(Lost),
        }
    }

    /// Renews the claim; returns when it is lost.
    async fn renew(&self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            let renewing = store::renew_part(&self.pool, &self.tenant, &self.part);
            match tokio::time::timeout(RENEW, renewing).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                _ if renewed.elapsed() + RENEW > LOST => return,
                _ => {}
            }
        }
    }

    /// Releases the upload for the next request; nothing was committed.
    pub(super) async fn release(self, ends: Ends) -> Result<(), OciError> {
        Ok(store::release_part(&self.pool, &self.tenant, &self.part, ends).await?)
    }

    /// Deletes the record of an upload that no longer exists.
    pub(super) async fn delete(self) -> Result<(), OciError> {
        Ok(store::delete_upload(&self.pool, &self.tenant, &self.part).await?)
    }
}
