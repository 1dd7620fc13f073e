//! The body of a push from a client, read at a minimum rate, and for a manifest within a time limit. A stalled
//! client gets 408, and its resources are freed.

use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::web::{Bytes, Payload};
use futures_util::{Stream, StreamExt};
use tokio::time::Instant;

use super::front::OciError;

/// Minimum bytes that a client has to send in each window of waiting.
const LEAST: u64 = 30 << 10;
/// Length of the window. Only waiting for the client counts, never for the registry.
const WINDOW: Duration = Duration::from_secs(30);

/// A body that is read at a minimum rate.
pub(super) struct TimedBody<S = Payload> {
    stream: S,
    window: Duration,
    waited: Duration,
    came: u64,
    deadline: Option<Instant>,
}

fn slow() -> OciError {
    OciError::new(
        StatusCode::REQUEST_TIMEOUT,
        "BLOB_UPLOAD_INVALID",
        "the body came slower than 1 KiB a second; send it again",
    )
}

impl<S, E> TimedBody<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    pub(super) fn new(stream: S) -> Self {
        Self { stream, window: WINDOW, waited: Duration::ZERO, came: 0, deadline: None }
    }

    /// Adds a time limit for the complete body.
    pub(super) fn within(mut self, time: Duration) -> Self {
        self.deadline = Some(Instant::now() + time);
        self
    }

    /// Returns the next bytes; none at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        loop {
            let begun = Instant::now();
            let window = begun + self.window.saturating_sub(self.waited);
            let until = self.deadline.map_or(window, |deadline| deadline.min(window));
            let came = tokio::time::timeout_at(until, self.stream.next()).await;
            self.waited += begun.elapsed();
            let over = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            match came {
                Ok(Some(Ok(bytes))) => {
                    self.came += bytes.len() as u64;
                    if self.waited >= self.window {
                        self.roll()?;
                    }
                    return if over { Err(slow()) } else { Ok(Some(bytes)) };
                }
                Ok(Some(Err(_))) => return Err(cut()),
                Ok(None) => return Ok(None),
                Err(_) if over => return Err(slow()),
                Err(_) => self.roll()?,
            }
        }
    }

    /// Ends a window: fails if too few bytes arrived in it.
    fn roll(&mut self) -> Result<(), OciError> {
        if self.came < LEAST {
            return Err(slow());
        }
        (self.came, self.waited) = (0, Duration::ZERO);
        Ok(())
    }
}

/// The client disconnected in the middle.
pub(super) fn cut() -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", "the upload was cut off")
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::ResponseError;

    /// Pieces of the given sizes, each after a pause in milliseconds.
    fn pieces(list: Vec<(u64, usize)>) -> impl Stream<Item = Result<Bytes, ()>> + Unpin {
        Box::pin(futures_util::stream::unfold(list.into_iter(), |mut list| async move {
            let (pause, size) = list.next()?;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            Some((Ok(Bytes::from(vec![0; size])), list))
        }))
    }

    /// A body with a window of 150 ms instead of 30 s.
    fn body(list: Vec<(u64, usize)>) -> TimedBody<impl Stream<Item = Result<Bytes, ()>> + Unpin> {
        TimedBody { window: Duration::from_millis(150), ..TimedBody::new(pieces(list)) }
    }

    async fn outcome(
        mut body: TimedBody<impl Stream<Item = Result<Bytes, ()>> + Unpin>,
    ) -> Result<usize, u16> {
        let mut sum = 0;
        loop {
            match body.next().await {
                Ok(Some(bytes)) => sum += bytes.len(),
                Ok(None) => return Ok(sum),
                Err(error) => return Err(error.status_code().as_u16()),
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_stalls_ends_and_a_slow_one_does_not() {
        assert_eq!(outcome(body(vec![(0, 10), (60_000, 10)])).await, Err(408));
        // Single bytes now and then count as a stall, at any frequency.
        assert_eq!(outcome(body(vec![(10, 1); 6_000])).await, Err(408));
        assert_eq!(outcome(body(vec![(20, 10_240); 40])).await, Ok(409_600));
        assert_eq!(outcome(body(vec![])).await, Ok(0));
    }

    #[tokio::test]
    async fn a_body_with_a_time_ends_within_it() {
        let slow = body(vec![(20, 10_240); 1_000]).within(Duration::from_millis(400));
        assert_eq!(outcome(slow).await, Err(408));
        let good = body(vec![(1, 10_240); 20]).within(Duration::from_secs(60));
        assert_eq!(outcome(good).await, Ok(204_800));
    }

    #[tokio::test]
    async fn waiting_for_the_registry_is_not_the_clients() {
        let mut body = body(vec![(1, 100); 5]);
        while let Some(bytes) = body.next().await.unwrap() {
            assert_eq!(bytes.len(), 100);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
