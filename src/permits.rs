//! Permits for a shared resource. Each key (a tenant, a network, an instance) has its own bound, and all keys
//! together have one. With a total bound alone, one key could use up everything. The share of a key also
//! shrinks as the resource fills up: a key that holds nothing is served before a key that holds much gets
//! more.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// Why a permit was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// The key has used its own share, or its queue is full.
    #[error("too many requests of this kind are in progress for one tenant")]
    Key,
    /// All permits are in use.
    #[error("too many requests of this kind are in progress")]
    All,
}

/// Permits with a bound per key and a bound in total. Clones share the permits.
///
/// A request is admitted if its key stays within the bound per key and the whole stays within the total. In
/// addition, the key must hold nothing yet, or its new sum must not exceed the units that are still free. `n`
/// busy keys therefore leave about `total / (n + 1)` to later keys. Freed permits go to the waiting key that
/// holds least; among equals, to the request that has waited longest.
pub struct FairPermits<K: Eq + Hash + Clone> {
    shared: Arc<Mutex<PermitsState<K>>>,
}

impl<K: Eq + Hash + Clone> Clone for FairPermits<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<K: Eq + Hash + Clone> std::fmt::Debug for FairPermits<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = lock(&self.shared);
        f.debug_struct("FairPermits").field("used", &state.used).field("total", &state.total).finish()
    }
}

struct PermitsState<K: Eq + Hash + Clone> {
    per_key: usize,
    total: usize,
    /// Maximum waiting requests of one key.
    waiting: usize,
    used: usize,
    next: u64,
    keys: HashMap<K, KeyQueue<K>>,
}

struct KeyQueue<K: Eq + Hash + Clone> {
    held: usize,
    queue: VecDeque<Waiter<K>>,
}

struct Waiter<K: Eq + Hash + Clone> {
    id: u64,
    units: usize,
    give: oneshot::Sender<Permit<K>>,
}

fn lock<K: Eq + Hash + Clone>(shared: &Mutex<PermitsState<K>>) -> MutexGuard<'_, PermitsState<K>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A share of the resource, released on drop.
#[must_use = "the share is released as soon as the permit is dropped"]
pub struct Permit<K: Eq + Hash + Clone> {
    shared: Arc<Mutex<PermitsState<K>>>,
    key: K,
    units: usize,
}

impl<K: Eq + Hash + Clone> std::fmt::Debug for Permit<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Permit").field("units", &self.units).finish_non_exhaustive()
    }
}

impl<K: Eq + Hash + Clone> PermitsState<K> {
    fn admits(&self, held: usize, units: usize) -> Result<(), Busy> {
        let free = self.total.saturating_sub(self.used);
        if held.saturating_add(units) > self.per_key {
            Err(Busy::Key)
        } else if units > free || (held > 0 && held.saturating_add(units) > free) {
            Err(Busy::All)
        } else {
            Ok(())
        }
    }

    fn held(&self, key: &K) -> usize {
        self.keys.get(key).map_or(0, |own| own.held)
    }

    fn forget_if_idle(&mut self, key: &K) {
        if self.keys.get(key).is_some_and(|own| own.held == 0 && own.queue.is_empty()) {
            self.keys.remove(key);
        }
    }

    fn take(&mut self, key: &K, units: usize) {
        self.used += units;
        let own =
            self.keys.entry(key.clone()).or_insert_with(|| KeyQueue { held: 0, queue: VecDeque::new() });
        own.held += units;
    }

    /// Returns the next waiting request to admit: of the key that holds least, then the oldest.
    fn next_served(&mut self) -> Option<(K, Waiter<K>)> {
        let key = self
            .keys
            .iter()
            .filter_map(|(key, own)| own.queue.front().map(|first| (key, own.held, first)))
            .filter(|(_, held, first)| self.admits(*held, first.units).is_ok())
            .min_by_key(|(_, held, first)| (*held, first.id))
            .map(|(key, ..)| key.clone())?;
        let waiter = self.keys.get_mut(&key)?.queue.pop_front()?;
        self.take(&key, waiter.units);
        Some((key, waiter))
    }
}

/// Gives freed permits to waiting requests.
fn serve<K: Eq + Hash + Clone>(shared: &Arc<Mutex<PermitsState<K>>>) {
    loop {
        let next = lock(shared).next_served();
        let Some((key, waiter)) = next else { return };
        let permit = Permit { shared: Arc::clone(shared), key, units: waiter.units };
        // The waiting request may be gone. The permit is then dropped, which releases its share.
        drop(waiter.give.send(permit));
    }
}

impl<K: Eq + Hash + Clone> Drop for Permit<K> {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.shared);
            state.used = state.used.saturating_sub(self.units);
            if let Some(own) = state.keys.get_mut(&self.key) {
                own.held = own.held.saturating_sub(self.units);
            }
            state.forget_if_idle(&self.key);
        }
        serve(&self.shared);
    }
}

/// A waiting request. It leaves the queue when its future is dropped.
struct QueuedRequest<'a, K: Eq + Hash + Clone> {
    shared: &'a Arc<Mutex<PermitsState<K>>>,
    key: &'a K,
    id: u64,
}

impl<K: Eq + Hash + Clone> Drop for QueuedRequest<'_, K> {
    fn drop(&mut self) {
        {
            let mut state = lock(self.shared);
            if let Some(own) = state.keys.get_mut(self.key) {
                own.queue.retain(|waiter| waiter.id != self.id);
            }
            state.forget_if_idle(self.key);
        }
        // A large request at the head of the queue may have blocked a small one.
        serve(self.shared);
    }
}

impl<K: Eq + Hash + Clone> FairPermits<K> {
    /// Returns permits of at most `per_key` units for one key and `total` for all keys. At most `4 * per_key`
    /// requests of one key wait, and at least 16; see [`Self::waiting`].
    #[must_use]
    pub fn new(per_key: usize, total: usize) -> Self {
        let state = PermitsState {
            per_key,
            total,
            waiting: per_key.saturating_mul(4).max(16),
            used: 0,
            next: 0,
            keys: HashMap::new(),
        };
        Self { shared: Arc::new(Mutex::new(state)) }
    }

    /// Sets another bound for waiting requests of one key. For permits that are bytes, the default would be
    /// far too high.
    #[must_use]
    pub fn waiting(self, requests: usize) -> Self {
        lock(&self.shared).waiting = requests;
        self
    }

    /// Takes a permit of one unit without waiting.
    pub fn try_take(&self, key: &K) -> Result<Permit<K>, Busy> {
        self.try_take_many(key, 1)
    }

    /// Takes a permit of several units, such as bytes, without waiting.
    pub fn try_take_many(&self, key: &K, units: usize) -> Result<Permit<K>, Busy> {
        let mut state = lock(&self.shared);
        state.admits(state.held(key), units)?;
        state.take(key, units);
        drop(state);
        Ok(Permit { shared: Arc::clone(&self.shared), key: key.clone(), units })
    }

    /// Takes a permit of one unit; waits at most `patience`.
    pub async fn take(&self, key: &K, patience: Duration) -> Result<Permit<K>, Busy> {
        self.take_many(key, 1, patience).await
    }

    /// Takes a permit of several units; waits at most `patience`. Requests of one key are served in order.
    pub async fn take_many(&self, key: &K, units: usize, patience: Duration) -> Result<Permit<K>, Busy> {
        let (id, given) = {
            let mut state = lock(&self.shared);
            if units > state.per_key.min(state.total) {
                return Err(Busy::Key);
            }
            let queued = state.keys.get(key).map_or(0, |own| own.queue.len());
            if queued == 0 && state.admits(state.held(key), units).is_ok() {
                state.take(key, units);
                drop(state);
                return Ok(Permit { shared: Arc::clone(&self.shared), key: key.clone(), units });
            }
            if queued >= state.waiting {
                return Err(Busy::Key);
            }
            let (give, given) = oneshot::channel();
            let id = state.next;
            state.next += 1;
            let own =
                state.keys.entry(key.clone()).or_insert_with(|| KeyQueue { held: 0, queue: VecDeque::new() });
            own.queue.push_back(Waiter { id, units, give });
            (id, given)
        };
        let waiting = QueuedRequest { shared: &self.shared, key, id };
        let outcome = tokio::time::timeout(patience, given).await;
        let why = {
            let state = lock(&self.shared);
            // If there is room by now, the key's own queue took the time.
            state.admits(state.held(key), units).err().unwrap_or(Busy::Key)
        };
        drop(waiting);
        match outcome {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(why),
        }
    }

    /// Returns the units in use, in total.
    #[must_use]
    pub fn used(&self) -> usize {
        lock(&self.shared).used
    }

    /// Returns the units that a key holds.
    #[must_use]
    pub fn used_by(&self, key: &K) -> usize {
        lock(&self.shared).held(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn one_key_never_takes_the_room_of_the_others() {
        let permits = FairPermits::new(32, 512);
        let mut held = Vec::new();
        for instance in 0..16 {
            while let Ok(permit) = permits.try_take(&instance) {
                held.push(permit);
            }
        }
        assert!(permits.used() < 512);
        // A new key is served although sixteen keys took all that they could.
        held.push(permits.try_take(&99).unwrap());
        assert_eq!(permits.used_by(&0), 32);
        drop(held);
        assert_eq!(permits.used(), 0);
        assert!(lock(&permits.shared).keys.is_empty());
    }

    #[test]
    fn many_keys_together_stay_within_the_total() {
        let permits = FairPermits::new(4, 10);
        let held: Vec<_> = (0..1000).filter_map(|key| permits.try_take(&key).ok()).collect();
        assert_eq!(held.len(), 10);
        assert_eq!(permits.try_take(&5000).unwrap_err(), Busy::All);
    }

    #[test]
    fn units_count() {
        let permits = FairPermits::new(100, 1000);
        let one = permits.try_take_many(&"a", 90).unwrap();
        assert_eq!(permits.try_take_many(&"a", 20).unwrap_err(), Busy::Key);
        assert_eq!(permits.used(), 90);
        drop(one);
        assert!(permits.try_take_many(&"a", 100).is_ok());
    }

    #[tokio::test]
    async fn freed_room_goes_to_the_key_that_holds_least() {
        let permits = FairPermits::new(2, 3);
        let first = permits.try_take(&"greedy").unwrap();
        let second = permits.try_take(&"greedy").unwrap();
        let other = permits.try_take(&"other").unwrap();
        let (all, one) = (permits.clone(), permits.clone());
        let greedy = tokio::spawn(async move { all.take(&"greedy", SHORT * 10).await.is_ok() });
        tokio::task::yield_now().await;
        let modest = tokio::spawn(async move { one.take(&"modest", SHORT * 10).await });
        tokio::task::yield_now().await;
        drop(first);
        let got = modest.await.unwrap();
        assert!(got.is_ok());
        assert_eq!(permits.used_by(&"greedy"), 1);
        drop((second, other, got));
        assert!(greedy.await.unwrap());
        assert_eq!(permits.used(), 0);
    }

    #[tokio::test]
    async fn waits_have_an_end_and_leave_nothing() {
        let permits = FairPermits::new(1, 4).waiting(2);
        let held = permits.try_take(&1).unwrap();
        assert_eq!(permits.take(&1, SHORT).await.unwrap_err(), Busy::Key);
        // The caller gave up.
        assert!(tokio::time::timeout(SHORT, permits.take(&1, SHORT * 100)).await.is_err());
        let crowd: Vec<_> = (0..20)
            .map(|_| {
                let permits = permits.clone();
                tokio::spawn(async move { permits.take(&1, SHORT * 4).await.is_ok() })
            })
            .collect();
        tokio::task::yield_now().await;
        let (asked, queued) = (tokio::time::Instant::now(), lock(&permits.shared).keys[&1].queue.len());
        assert_eq!(queued, 2, "no more wait than may");
        assert!(asked.elapsed() < SHORT);
        for task in crowd {
            assert!(!task.await.unwrap());
        }
        drop(held);
        assert!(lock(&permits.shared).keys.is_empty());
        assert!(permits.take(&1, SHORT).await.is_ok());
    }

    #[tokio::test]
    async fn a_dropped_waiter_lets_the_next_one_in() {
        let permits = FairPermits::new(10, 20);
        let held = permits.try_take_many(&1, 5).unwrap();
        let (large, small) = (permits.clone(), permits.clone());
        let large = tokio::spawn(async move { large.take_many(&1, 8, SHORT * 100).await.is_ok() });
        tokio::task::yield_now().await;
        let small = tokio::spawn(async move { small.take_many(&1, 2, SHORT * 100).await.is_ok() });
        tokio::task::yield_now().await;
        large.abort();
        assert!(tokio::time::timeout(SHORT * 20, small).await.unwrap().unwrap());
        drop(held);
    }
}
