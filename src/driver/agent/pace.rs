//! Rate limits bytes and lines together. Use beyond the rate becomes a debt, and the debtor waits until it is paid.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Rates per second, and burst sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogRate {
    pub(super) bytes: u32,
    pub(super) lines: u32,
    pub(super) burst_bytes: u32,
    pub(super) burst_lines: u32,
}

/// The remaining budget of a rate.
#[derive(Debug)]
pub(super) struct RateBudget {
    rate: LogRate,
    bytes: f64,
    lines: f64,
    at: Instant,
}

impl RateBudget {
    pub(super) fn new(rate: LogRate) -> Self {
        Self { rate, bytes: rate.burst_bytes.into(), lines: rate.burst_lines.into(), at: Instant::now() }
    }

    fn advance(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        let fill = |left: f64, rate: u32, burst: u32| (left + seconds * f64::from(rate)).min(burst.into());
        self.bytes = fill(self.bytes, self.rate.bytes, self.rate.burst_bytes);
        self.lines = fill(self.lines, self.rate.lines, self.rate.burst_lines);
    }

    /// Returns how long to wait until the debt is paid.
    pub(super) fn wait(&mut self) -> Duration {
        self.wait_at(Instant::now())
    }

    fn wait_at(&mut self, now: Instant) -> Duration {
        self.advance(now);
        let owed = |left: f64, rate: u32| (-left / f64::from(rate)).max(0.0);
        Duration::from_secs_f64(owed(self.bytes, self.rate.bytes).max(owed(self.lines, self.rate.lines)))
    }

    /// Counts used bytes and lines.
    pub(super) fn spend(&mut self, bytes: usize, lines: usize) {
        let number = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        self.bytes -= number(bytes);
        self.lines -= number(lines);
    }

    /// Returns whether the budget is full: nothing was used lately.
    pub(super) fn is_full(&mut self) -> bool {
        self.advance(Instant::now());
        self.bytes >= self.rate.burst_bytes.into() && self.lines >= self.rate.burst_lines.into()
    }
}

/// The rate limits of all tenants: one per tenant, and one in common. A tenant within its fair share of the common
/// rate waits only for its own limit, whatever the others use.
#[derive(Debug)]
pub(super) struct Paces<T> {
    each: LogRate,
    common: LogRate,
    all: RateBudget,
    tenants: HashMap<T, Share>,
    pruned: Instant,
}

#[derive(Debug)]
struct Share {
    own: RateBudget,
    fair: RateBudget,
}

impl<T: Clone + Eq + Hash> Paces<T> {
    pub(super) fn new(each: LogRate, common: LogRate) -> Self {
        let now = Instant::now();
        Self { each, common, all: RateBudget::new(common), tenants: HashMap::new(), pruned: now }
    }

    /// Counts used bytes and lines, and returns how long the tenant has to wait. Use without waiting (`in_turn` is
    /// false) does not count against the common rate.
    pub(super) fn wait(&mut self, tenant: &T, taken: (usize, usize), in_turn: bool) -> Duration {
        let now = Instant::now();
        if now.duration_since(self.pruned) > Duration::from_secs(1) {
            self.pruned = now;
            // A full budget equals a new one.
            self.tenants.retain(|_, share| !share.own.is_full());
        }
        let active = u32::try_from(self.tenants.len()).unwrap_or(u32::MAX).max(1);
        let common = self.common;
        let fair = LogRate {
            bytes: (common.bytes / active).max(1),
            lines: (common.lines / active).max(1),
            burst_bytes: (common.bytes / active).max(1),
            burst_lines: (common.lines / active).max(1),
        };
        let each = self.each;
        let share = self
            .tenants
            .entry(tenant.clone())
            .or_insert_with(|| Share { own: RateBudget::new(each), fair: RateBudget::new(fair) });
        share.fair.rate = fair;
        let (bytes, lines) = taken;
        share.own.spend(bytes, lines);
        share.fair.spend(bytes, lines);
        if in_turn {
            self.all.spend(bytes, lines);
        }
        let own = share.own.wait_at(now);
        if share.fair.wait_at(now).is_zero() { own } else { own.max(self.all.wait_at(now)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_within_its_share_does_not_wait_for_the_others() {
        let each = LogRate { bytes: 4000, lines: 4000, burst_bytes: 8000, burst_lines: 8000 };
        let common = LogRate { bytes: 8000, lines: 8000, burst_bytes: 16_000, burst_lines: 16_000 };
        let mut paces = Paces::new(each, common);
        for loud in ["a", "b", "c", "d"] {
            assert!(!paces.wait(&loud, (10_000, 1), true).is_zero(), "beyond its own");
        }
        assert!(paces.wait(&"quiet", (1000, 1), true).is_zero());
        assert!(!paces.wait(&"quiet", (1500, 1), true).is_zero(), "beyond its share, and all are in debt");
        // Instances that end at once use nothing of the common rate.
        let mut paces = Paces::new(each, common);
        assert!(!paces.wait(&"crashing", (1_000_000, 1), false).is_zero());
        assert!(paces.wait(&"other", (7900, 1), true).is_zero());
    }

    #[test]
    fn bytes_and_lines_are_both_held_to_the_pace() {
        let mut pace =
            RateBudget::new(LogRate { bytes: 1000, lines: 10, burst_bytes: 2000, burst_lines: 50 });
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
