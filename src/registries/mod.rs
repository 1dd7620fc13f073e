//! Registry projects: who may push and pull what, and what is there. Bulkhead is the token server
//! and stands before the registry; tags are its own.

use crate::driver::PullSecret;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, Tag, TenantId, TenantName};

pub mod api;
mod body;
mod claims;
pub mod collect;
pub mod collector;
pub mod distribution;
pub mod front;
mod known;
mod measure;
mod missing;
mod names;
pub mod proxy;
mod ranges;
pub mod reconcile;
mod referrers;
mod remove;
pub mod robots;
mod room;
mod store;
pub mod token;
mod transfer;
mod uploads;
mod write;

pub use distribution::{Distribution, reach};
pub use store::{are_manifests_there, image_bytes};
pub use token::SigningKey;

/// A tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A tag.
    Tag(Tag),
    /// A digest.
    Digest(Digest),
}

/// Makes credentials for pulls.
#[derive(Debug, Clone)]
pub struct PullSecrets(pub SigningKey);

impl PullSecrets {
    /// A credential for one repository, good for five minutes.
    pub fn mint(&self, tenant: &TenantName, repository: &RepositoryPath) -> Result<PullSecret, Error> {
        Ok(PullSecret::new(self.0.mint_pull(tenant, repository)?))
    }
}

/// Which apps hold on to an image. Declared here, implemented by the apps, wired at start.
#[async_trait::async_trait]
pub trait Holders: Send + Sync + 'static {
    /// Names of the apps of which any release runs this manifest or index.
    async fn holders(
        &self,
        conn: &mut sqlx::PgConnection,
        tenant: TenantId,
        repository: &RepositoryPath,
        digests: &[String],
    ) -> Result<Vec<(String, String)>, Error>;
}
