//! Room for what pushes hold: streams that are open, bodies in memory, manifests that are read. Each tenant has room of
//! its own first, then there is a bound in all.

use std::time::Duration;

use actix_web::http::StatusCode;

use super::front::OciError;
use crate::error::Error;
use crate::ids::TenantName;
use crate::permits::{FairPermits, Permit};

/// How long a request waits for a place before it is told to come again.
const WAIT: Duration = Duration::from_secs(10);

/// All room of the registry proxy.
#[derive(Debug, Clone)]
pub(super) struct Room {
    /// Parts of uploads that stream: each holds a few chunks.
    pub(super) streams: Places,
    /// Manifests in memory: each at most 4 MiB.
    pub(super) manifests: Places,
    /// Manifests that are read: each takes a processor.
    pub(super) parsers: Places,
    /// Lists of referrers that are being sent: each at most about 1 MiB.
    pub(super) lists: Places,
}

/// Places of one kind.
#[derive(Debug, Clone)]
pub(super) struct Places(FairPermits<TenantName>);

impl Room {
    pub(super) fn new() -> Self {
        // A tenant's part of the room, and the whole.
        let places = |each, all| Places(FairPermits::new(each, all).waiting(64));
        Self {
            streams: places(64, 1_024),
            manifests: places(4, 16),
            parsers: places(1, 2),
            lists: places(4, 64),
        }
    }
}

impl Places {
    /// The same for a part of the platform that speaks no OCI.
    pub(super) async fn turn(&self, tenant: &TenantName) -> Result<Permit<TenantName>, Error> {
        self.0.take(tenant, WAIT).await.map_err(|busy| {
            Error::Unavailable(format!("{busy}: try again in a moment"), Duration::from_secs(3))
        })
    }

    /// Takes a place, or says that there is none in time.
    pub(super) async fn take(&self, tenant: &TenantName) -> Result<Permit<TenantName>, OciError> {
        self.0.take(tenant, WAIT).await.map_err(|busy| {
            OciError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "TOOMANYREQUESTS",
                format!("{busy}: finish those, or try again in a moment"),
            )
        })
    }
}
