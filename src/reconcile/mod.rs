//! Bringing the world to what is desired. Requests only write intent; a reconciler takes a key and
//! no hint, is idempotent, and may die at any point.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

pub mod runner;
mod store;

pub use runner::run;
pub use store::{bring_forward, enqueue};

/// How a reconcile ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do until something changes.
    Settled,
    /// Look again after this time.
    Again(Duration),
    /// The object is gone; its work row may go.
    Gone,
}

/// How a reconcile failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It may work later: tried again with backoff.
    Transient(String),
    /// It will not work until something changes: parked and shown.
    Permanent(String),
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        // Shown to tenants: what is ours alone goes to the log.
        if let crate::error::Error::Internal(cause) = &error {
            tracing::error!(%cause, "a reconcile failed");
            return Self::Transient("a mistake of the platform's own (BH-500); it is tried again".into());
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

/// The right to act on one object for a while.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    /// Object.
    pub object_id: i64,
    /// Rises with each claim: whoever holds a lower one has been overtaken.
    pub epoch: i64,
    /// How often it was tried since it last settled.
    pub attempt: i32,
}

/// One sort of object.
#[async_trait::async_trait]
pub trait Reconciler: Send + Sync + 'static {
    /// The sort's name in the work table.
    fn kind(&self) -> &'static str;
    /// Brings one object to what is desired.
    async fn reconcile(&self, lease: Lease) -> Result<Outcome, Failure>;
    /// Writes down, for people, why it does not go on.
    async fn report(&self, object_id: i64, problem: Option<&str>) -> Result<(), sqlx::Error>;
}

/// Wakes the runner of this process. Others find the work within a quarter of a second.
#[derive(Debug, Clone, Default)]
pub struct Waker(Arc<Notify>);

impl Waker {
    /// There is work.
    pub fn wake(&self) {
        self.0.notify_one();
    }
    pub(crate) async fn woken(&self) {
        self.0.notified().await;
    }
}
