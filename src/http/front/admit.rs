//! Admission of connections: one limit in total, one per source. When the total is reached, a newcomer replaces
//! a connection that waits for its client. The replaced connection is the one that waited longest, of the
//! source with the most connections. Sources with at most [`FEW`] connections rank equally: a client with
//! several connections is not evicted before strangers with one each. Silent connections from any number of
//! addresses therefore never lock out an active client.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

/// Limits of the number of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// In total.
    pub all: usize,
    /// Per source.
    pub per_source: usize,
}

/// Number of connections up to which sources rank equally: as many as one client opens.
const FEW: usize = 16;

/// The reason for refusing a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// The source has reached its limit.
    Source,
    /// The total is reached, and every connection is being answered.
    All,
}

/// The table of connections. Clones share it.
#[derive(Clone)]
pub(super) struct Admissions(Arc<AdmissionTable>);

struct AdmissionTable {
    bounds: ConnectionLimits,
    state: Mutex<AdmissionState>,
}

#[derive(Default)]
struct AdmissionState {
    seats: HashMap<u64, AdmittedConnection>,
    sources: HashMap<IpAddr, SourceConnections>,
    /// Sources with a waiting connection, ordered by their connections beyond [`FEW`], then by the time of
    /// waiting.
    order: BTreeSet<(usize, Reverse<u64>, IpAddr)>,
    next: u64,
    closed: bool,
}

struct AdmittedConnection {
    source: IpAddr,
    line: Arc<Line>,
    /// Number of the event at which it began to wait for its client.
    since: Option<u64>,
}

#[derive(Default)]
struct SourceConnections {
    held: usize,
    waiting: BTreeMap<u64, u64>,
}

/// Tells a connection's task to end.
#[derive(Default)]
struct Line {
    cut: AtomicBool,
    waker: AtomicWaker,
}

impl Line {
    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A connection's place in the table, freed on drop.
pub(super) struct Seat {
    table: Arc<AdmissionTable>,
    id: u64,
    line: Arc<Line>,
}

impl Admissions {
    /// An empty table.
    #[must_use]
    pub(super) fn new(bounds: ConnectionLimits) -> Self {
        Self(Arc::new(AdmissionTable { bounds, state: Mutex::default() }))
    }

    /// Admits a connection of this source, which waits for its client from now on. A source that is not
    /// `counted` (a trusted proxy) is subject to the total only.
    pub(super) fn admit(&self, source: IpAddr, counted: bool) -> Result<Seat, Full> {
        let bounds = self.0.bounds;
        let mut state = self.0.lock();
        if state.closed {
            return Err(Full::All);
        }
        let own = state.sources.get(&source).map_or(0, |own| own.held);
        if counted && own >= bounds.per_source && !state.evict(source) {
            return Err(Full::Source);
        }
        if state.seats.len() >= bounds.all {
            let own = state.sources.get(&source).map_or(0, |own| own.held);
            let largest = state.order.last().map(|(held, _, source)| (*held, *source));
            match largest {
                // Never evict from a source with fewer connections, unless the newcomer's source has few
                // itself.
                Some((held, largest)) if largest == source || held > own.max(FEW) || own < FEW => {
                    state.evict(largest)
                }
                _ => return Err(Full::All),
            };
        }
        let line = Arc::new(Line::default());
        let id = state.number();
        state.unlist(source);
        state.sources.entry(source).or_default().held += 1;
        state.list(source);
        state.seats.insert(id, AdmittedConnection { source, line: Arc::clone(&line), since: None });
        state.wait(id, true);
        drop(state);
        Ok(Seat { table: Arc::clone(&self.0), id, line })
    }

    /// Stops admitting. Ends connections that wait for their client, now and later.
    pub(super) fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        while let Some(source) = state.order.last().map(|(.., source)| *source) {
            state.evict(source);
        }
    }
}

impl AdmissionTable {
    fn lock(&self) -> MutexGuard<'_, AdmissionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AdmissionState {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn place(&self, source: IpAddr) -> Option<(usize, Reverse<u64>, IpAddr)> {
        let own = self.sources.get(&source)?;
        own.waiting.first_key_value().map(|(since, _)| (own.held.max(FEW), Reverse(*since), source))
    }

    /// Call `unlist` before and `list` after each change of a source.
    fn unlist(&mut self, source: IpAddr) {
        if let Some(place) = self.place(source) {
            self.order.remove(&place);
        }
    }
    fn list(&mut self, source: IpAddr) {
        if let Some(place) = self.place(source) {
            self.order.insert(place);
        }
    }

    /// Ends the source's connection that has waited longest for its client.
    fn evict(&mut self, source: IpAddr) -> bool {
        let first = self.sources.get(&source).and_then(|own| own.waiting.values().next().copied());
        let Some(id) = first else { return false };
        if let Some(line) = self.seats.get(&id).map(|held| Arc::clone(&held.line)) {
            line.cut();
        }
        self.remove(id);
        true
    }

    fn remove(&mut self, id: u64) {
        let Some(held) = self.seats.remove(&id) else { return };
        self.unlist(held.source);
        if let Some(own) = self.sources.get_mut(&held.source) {
            own.held -= 1;
            if let Some(since) = held.since {
                own.waiting.remove(&since);
            }
            if own.held == 0 {
                self.sources.remove(&held.source);
            }
        }
        self.list(held.source);
    }

    fn wait(&mut self, id: u64, waits: bool) {
        let since = self.number();
        let Some(held) = self.seats.get_mut(&id) else { return };
        if held.since.is_some() == waits {
            return;
        }
        let (source, before) = (held.source, held.since);
        held.since = waits.then_some(since);
        self.unlist(source);
        if let Some(own) = self.sources.get_mut(&source) {
            if waits {
                own.waiting.insert(since, id);
            } else if let Some(before) = before {
                own.waiting.remove(&before);
            }
        }
        self.list(source);
        if waits && self.closed {
            self.evict(source);
        }
    }
}

impl Seat {
    /// Sets whether the connection waits for its client; if so, a newcomer may replace it.
    pub(super) fn waits(&self, waits: bool) {
        self.table.lock().wait(self.id, waits);
    }

    /// Ready once the connection has to end.
    pub(super) fn poll_cut(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.line.waker.register(cx.waker());
        if self.line.cut.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.table.lock().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from(n).into()
    }

    impl Admissions {
        fn held(&self) -> usize {
            self.0.lock().seats.len()
        }
    }

    fn is_cut(seat: &Seat) -> bool {
        seat.line.cut.load(Ordering::Acquire)
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_silent_one_of_the_largest_source() {
        let table = Admissions::new(ConnectionLimits { all: 10, per_source: 6 });
        let crowd: Vec<Seat> = (0..6).map(|_| table.admit(ip(1), true).unwrap()).collect();
        let few: Vec<Seat> = (0..4).map(|_| table.admit(ip(2), true).unwrap()).collect();
        let newcomer = table.admit(ip(3), true).unwrap();
        assert_eq!(table.held(), 10);
        assert!(is_cut(&crowd[0]) && !is_cut(&crowd[1]));
        assert!(few.iter().chain([&newcomer]).all(|seat| !is_cut(seat)));
    }

    #[test]
    fn thirty_thousand_silent_sources_lock_no_one_out() {
        let table = Admissions::new(ConnectionLimits { all: 1000, per_source: 10 });
        let silent: Vec<Seat> = (0..30_000).map(|n| table.admit(ip(n), true).unwrap()).collect();
        assert_eq!(table.held(), 1000);
        let newcomer = table.admit(ip(99_999), true).unwrap();
        newcomer.waits(false);
        // While it is being answered, no later connection replaces it.
        let more: Vec<Seat> = (50_000..60_000).map(|n| table.admit(ip(n), true).unwrap()).collect();
        assert!(!is_cut(&newcomer));
        drop((silent, more, newcomer));
        assert_eq!(table.held(), 0);
        let state = table.0.lock();
        assert!(state.sources.is_empty() && state.order.is_empty());
    }

    #[test]
    fn a_client_with_several_connections_is_equal_to_strangers_with_one() {
        let table = Admissions::new(ConnectionLimits { all: 100, per_source: 50 });
        let _silent: Vec<Seat> = (0..100).map(|n| table.admit(ip(n), true).unwrap()).collect();
        let own: Vec<Seat> = (0..FEW).map(|_| table.admit(ip(999), true).unwrap()).collect();
        for seat in &own[..FEW - 1] {
            seat.waits(false);
        }
        // Its newest connection waits for a head: connections that have waited longer are replaced first.
        let _more: Vec<Seat> = (200..250).map(|n| table.admit(ip(n), true).unwrap()).collect();
        assert!(own.iter().all(|seat| !is_cut(seat)));
        // Above `FEW`, it replaces no connection of sources with fewer.
        own[FEW - 1].waits(false);
        assert_eq!(table.admit(ip(999), true).err(), Some(Full::All));
    }

    #[test]
    fn a_source_at_its_bound_ends_its_own_silent_ones_or_is_refused() {
        let table = Admissions::new(ConnectionLimits { all: 100, per_source: 3 });
        let seats: Vec<Seat> = (0..3).map(|_| table.admit(ip(1), true).unwrap()).collect();
        for seat in &seats[1..] {
            seat.waits(false);
        }
        let fourth = table.admit(ip(1), true).unwrap();
        assert!(is_cut(&seats[0]));
        fourth.waits(false);
        assert_eq!(table.admit(ip(1), true).err(), Some(Full::Source));
        assert!(table.admit(ip(2), true).is_ok());
        // A trusted proxy is not limited as a source.
        assert!(table.admit(ip(1), false).is_ok());
    }

    #[test]
    fn what_is_being_answered_is_never_ended() {
        let table = Admissions::new(ConnectionLimits { all: 3, per_source: 3 });
        let seats: Vec<Seat> = (0..3).map(|n| table.admit(ip(n), true).unwrap()).collect();
        for seat in &seats {
            seat.waits(false);
        }
        assert_eq!(table.admit(ip(9), true).err(), Some(Full::All));
        seats[1].waits(true);
        assert!(table.admit(ip(9), true).is_ok());
        assert!(is_cut(&seats[1]));
        table.close();
        assert!(!is_cut(&seats[0]));
        seats[0].waits(true);
        assert!(is_cut(&seats[0]));
        assert!(table.admit(ip(1), true).is_err());
    }
}
