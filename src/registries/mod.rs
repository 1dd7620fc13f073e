//! Registry projects: rights to push and pull, and their content. Bulkhead is the token server and the proxy in
//! front of the registry; it stores tags itself.

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
    /// Mints a credential for one repository, valid for five minutes.
    pub fn mint(&self, tenant: &TenantName, repository: &RepositoryPath) -> Result<PullSecret, Error> {
        Ok(PullSecret::new(self.0.mint_pull(tenant, repository)?))
    }
}

/// Looks up the apps that use an image. Declared here, implemented by the apps, wired at startup.
#[async_trait::async_trait]
pub trait Holders: Send + Sync + 'static {
    /// Returns digest and app name for each app with a release of one of these manifests or indexes.
    async fn holders(
        &self,
        conn: &mut sqlx::PgConnection,
        tenant: TenantId,
        repository: &RepositoryPath,
        digests: &[String],
    ) -> Result<Vec<(String, String)>, Error>;
}
