//! What was refused, on record: gathered for a second, counted by who and what, written in one batch. However
//! many requests somebody sends, a second of them costs a bounded number of rows.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::audit::{self, Refusal, Refusals};
use crate::error::Error;

/// Most different refusals that are kept in one batch; what is beyond is counted together.
const KINDS: usize = 100;
/// Most of them from one place; what is beyond is counted together for that place.
const KINDS_OF_PLACE: usize = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Refusals that are not written down yet.
#[derive(Debug, Clone, Default)]
pub struct Denials(Arc<Mutex<Refusals>>);

impl Denials {
    /// Notes one.
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

    /// Writes down what there is. What cannot be written is kept for the next time.
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

    /// Writes once a second, until `stop`, and once more then.
    pub async fn run(self, pool: PgPool, stop: CancellationToken) {
        loop {
            let last = tokio::select! {
                () = stop.cancelled() => true,
                () = tokio::time::sleep(PAUSE) => false,
            };
            if let Err(error) = self.write(&pool).await {
                tracing::warn!(error = error.for_log(), "refusals are written down later");
            }
            if last {
                return;
            }
        }
    }
}
