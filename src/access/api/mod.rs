//! API of access: the caller's own account, a tenant's members and credentials, the platform's accounts.

pub mod credentials;
pub mod me;
pub mod members;
pub mod people;

use serde::Deserialize;

/// Path parameter: a number.
#[derive(Deserialize)]
pub struct NumberPath {
    /// Number.
    pub id: i64,
}
