//! Brings the observed state to the desired state. Requests only write intent. A reconciler takes a key and no
//! hint, is idempotent, and may be stopped at any point.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

pub mod runner;
mod store;

pub use runner::run;
pub use store::{bring_forward, enqueue};

/// Result of a successful reconcile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do until a change.
    Settled,
    /// Reconcile again after this time.
    Again(Duration),
    /// The object no longer exists; its work row is deleted.
    Gone,
}

/// Result of a failed reconcile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// May succeed later: retried with backoff.
    Transient(String),
    /// Cannot succeed before a change: parked and shown.
    Permanent(String),
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        // Tenants see this text: details of the platform go to the log.
        if let crate::error::Error::Internal(cause) = &error {
            tracing::error!(%cause, "a reconcile failed");
            return Self::Transient("an internal error of the platform (BH-500); it is tried again".into());
        }
        Self::Transient(error.to_string())
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        crate::error::Error::from(error).into()
    }
}

impl From<crate::driver::Error> for Failure {
    fn from(error: crate::driver::Error) -> Self {
        match error {
            crate::driver::Error::Transient(text)
            | crate::driver::Error::Away(text)
            | crate::driver::Error::Conflict(text) => Self::Transient(text),
            crate::driver::Error::Rejected(text) => Self::Permanent(text),
        }
    }
}

/// The right to act on one object for a limited time.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    /// Object.
    pub object_id: i64,
    /// Rises with each claim: the holder of a lower epoch has lost its lease.
    pub epoch: i64,
    /// Number of tries since the object last settled.
    pub attempt: i32,
}

/// Reconciles one kind of object.
#[async_trait::async_trait]
pub trait Reconciler: Send + Sync + 'static {
    /// Returns the name of the kind in the work table.
    fn kind(&self) -> &'static str;
    /// Brings one object to its desired state.
    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure>;
    /// Stores the problem that is shown to users, or clears it.
    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error>;
}

/// Wakes the runner of this process. Other processes find the work within a quarter of a second.
#[derive(Debug, Clone, Default)]
pub struct Waker(Arc<Notify>);

impl Waker {
    /// Wakes the runner because there is work.
    pub fn wake(&self) {
        self.0.notify_one();
    }
    pub(crate) async fn woken(&self) {
        self.0.notified().await;
    }
}
