//! A pace for bytes and lines together: what was taken beyond it is owed, and who owes waits.

use std::time::{Duration, Instant};

/// How much a second, and how much at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub(super) bytes: u32,
    pub(super) lines: u32,
    pub(super) burst_bytes: u32,
    pub(super) burst_lines: u32,
}

/// What is left of a rate.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Rate,
    bytes: f64,
    lines: f64,
    at: Instant,
}

impl Pace {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, bytes: rate.burst_bytes.into(), lines: rate.burst_lines.into(), at: Instant::now() }
    }

    fn advance(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        let fill = |left: f64, rate: u32, burst: u32| (left + seconds * f64::from(rate)).min(burst.into());
        self.bytes = fill(self.bytes, self.rate.bytes, self.rate.burst_bytes);
        self.lines = fill(self.lines, self.rate.lines, self.rate.burst_lines);
    }

    /// How long until something may be taken again.
    pub(super) fn wait(&mut self) -> Duration {
        self.wait_at(Instant::now())
    }

    fn wait_at(&mut self, now: Instant) -> Duration {
        self.advance(now);
        let owed = |left: f64, rate: u32| (-left / f64::from(rate)).max(0.0);
        Duration::from_secs_f64(owed(self.bytes, self.rate.bytes).max(owed(self.lines, self.rate.lines)))
    }

    /// Counts what was taken.
    pub(super) fn spend(&mut self, bytes: usize, lines: usize) {
        let number = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        self.bytes -= number(bytes);
        self.lines -= number(lines);
    }

    /// Whether nothing was taken lately.
    pub(super) fn is_full(&mut self) -> bool {
        self.advance(Instant::now());
        self.bytes >= self.rate.burst_bytes.into() && self.lines >= self.rate.burst_lines.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_lines_are_both_held_to_the_pace() {
        let mut pace = Pace::new(Rate { bytes: 1000, lines: 10, burst_bytes: 2000, burst_lines: 50 });
        let begun = pace.at;
        assert!(pace.is_full() && pace.wait_at(begun).is_zero());
        pace.at = begun;
        pace.spend(4000, 1);
        assert_eq!(pace.wait_at(begun), Duration::from_secs(2), "2,000 bytes are owed");
        assert!(pace.wait_at(begun + Duration::from_secs(2)).is_zero() && !pace.is_full());
        pace.at = begun;
        pace.spend(0, 100);
        assert!(pace.wait_at(begun) >= Duration::from_secs(2), "many small lines are owed too");
        pace.wait_at(begun + Duration::from_secs(3600));
        assert!(pace.is_full(), "no more than a burst is saved up");
    }
}
