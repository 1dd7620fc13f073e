//! Limits of the resources that pushes hold: open streams, bodies in memory, manifests being parsed. Each
//! tenant has its own share, and all tenants together have a limit.

use std::time::Duration;

use actix_web::http::StatusCode;

use super::front::OciError;
use crate::error::Error;
use crate::ids::TenantName;
use crate::permits::{FairPermits, Permit};

/// How long a request waits for a permit before it is told to retry.
const WAIT: Duration = Duration::from_secs(10);

/// All limits of the registry proxy.
#[derive(Debug, Clone)]
pub(super) struct ProxyLimits {
    /// Streaming parts of uploads; each holds a few chunks.
    pub(super) streams: Places,
    /// Manifests in memory; each at most 4 MiB.
    pub(super) manifests: Places,
    /// Manifests being parsed; each takes a processor.
    pub(super) parsers: Places,
    /// Referrer lists being sent; each at most about 1 MiB.
    pub(super) lists: Places,
}

/// Permits of one kind.
#[derive(Debug, Clone)]
pub(super) struct Places(FairPermits<TenantName>);

impl ProxyLimits {
    pub(super) fn new() -> Self {
        // A tenant's share, and the total.
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
    /// Takes a permit for a caller outside the OCI API.
    pub(super) async fn turn(&self, tenant: &TenantName) -> Result<Permit<TenantName>, Error> {
        self.0.take(tenant, WAIT).await.map_err(|busy| {
            Error::Unavailable(format!("{busy}: try again in a moment"), Duration::from_secs(3))
        })
    }

    /// Takes a permit; fails if none is free in time.
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
