//! Audit of refused requests: collected for a second, counted by actor and reason, written in one batch. The
//! number of rows per second is bounded, however many requests a client sends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::audit::{self, Refusal, Refusals};
use crate::error::Error;

/// Maximum number of distinct refusals in one batch. Further ones share one count.
const KINDS: usize = 100;
/// Maximum number of distinct refusals of one network. Further ones share one count for that network.
const KINDS_OF_PLACE: usize = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Refusals that are not written yet.
#[derive(Debug, Clone, Default)]
pub struct Denials(Arc<Mutex<Refusals>>);

impl Denials {
    /// Counts a refusal.
    pub fn note(&self, refusal: Refusal) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_place = open.keys().filter(|known| known.place == refusal.place).count();
        let refusal = if open.contains_key(&refusal) {
            refusal
        } else if of_place >= KINDS_OF_PLACE {
            refusal.folded()
        } else if open.len() < KINDS {
            refusal
        } else {
            Refusal::rest()
        };
        *open.entry(refusal).or_default() += 1;
    }

    /// Writes the batch. A batch that cannot be written is kept for the next attempt.
    pub async fn write(&self, pool: &PgPool) -> Result<(), Error> {
        let batch = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if batch.is_empty() {
            return Ok(());
        }
        let outcome = audit::record_refusals(pool, &batch).await;
        if outcome.is_err() {
            let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for (refusal, count) in batch {
                *open.entry(refusal).or_default() += count;
            }
        }
        outcome
    }

    /// Writes once a second until `stop`, then a last time.
    pub async fn run(self, pool: PgPool, stop: CancellationToken) {
        loop {
            let last = tokio::select! {
                () = stop.cancelled() => true,
                () = tokio::time::sleep(PAUSE) => false,
            };
            if let Err(error) = self.write(&pool).await {
                tracing::warn!(error = error.for_log(), "cannot write refusals to the audit log; retrying");
            }
            if last {
                return;
            }
        }
    }
}
