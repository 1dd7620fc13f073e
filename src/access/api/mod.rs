//! Access over the API: one's own account, a tenant's people and credentials, the platform's people.

pub mod credentials;
pub mod me;
pub mod members;
pub mod people;

use serde::Deserialize;

/// The number that an address ends with.
#[derive(Deserialize)]
pub struct NumberPath {
    /// Number.
    pub id: i64,
}
