//! Concurrency and rate limits of requests, for each tenant and for each account and token within it. One
//! tenant's flood delays only that tenant. Anonymous clients have a small share of the database. Requests
//! beyond the limits get 429 with the time to wait.
//!
//! All state is in the memory of one replica: with several replicas, a tenant's rate multiplies by their
//! number.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;

use super::{Actor, TenantRef};
use crate::config::Limits;
use crate::db;
use crate::error::Error;
use crate::ids::{TenantId, TenantName};
use crate::permits::{Busy, FairPermits, Permit};
use crate::quotas::{self, Resource};

/// Maximum time that a request waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);
/// Maximum number of requests of one tenant that wait for their turn.
const QUEUE: usize = 256;
/// Maximum number of tenants, accounts, tokens and credentials in memory.
const REMEMBERED: usize = 20_000;
/// Maximum age of a tenant's cached limits.
const FRESH: Duration = Duration::from_secs(30);
/// Maximum number of streams (followed logs, exports) per tenant and in total.
const STREAMS: (usize, usize) = (16, 256);

/// The key that a request is charged to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Payer {
    /// A tenant.
    Tenant(TenantId),
    /// A tenant, by the name in a registry token.
    Named(TenantName),
    /// An account, with all its sessions.
    Account(i64),
    /// An API token.
    Token(i64),
    /// The network of an anonymous client.
    Network(IpAddr),
}

/// State of a rate limit, for the `RateLimit-*` headers of the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Burst size.
    pub limit: u64,
    /// Remaining requests of the burst.
    pub remaining: u64,
    /// Seconds until the burst is full again.
    pub reset: u64,
}

/// The permits of a request, released when the request ends.
#[derive(Debug)]
pub struct RequestPermit {
    _own: Option<Permit<Payer>>,
    _of_tenant: Permit<Payer>,
}

/// Cache of the most recent entries. It has two generations and drops the older one as a whole.
#[derive(Debug)]
struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K: Eq + Hash, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new() }
    }
}

impl<K: Eq + Hash + Clone, V> Recent<K, V> {
    fn get(&mut self, key: &K) -> Option<&mut V> {
        if let Some(value) = self.old.remove(key) {
            self.put(key.clone(), value);
        }
        self.young.get_mut(key)
    }
    fn put(&mut self, key: K, value: V) {
        if self.young.len() >= REMEMBERED / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
}

/// A rate: requests per second, and a burst.
#[derive(Debug, Clone, Copy, PartialEq)]
struct RequestRate {
    per_second: f64,
    burst: f64,
}

impl RequestRate {
    #[expect(clippy::cast_precision_loss, reason = "limits lie far below 2^52")]
    fn new(per_second: i64, burst: i64) -> Self {
        Self { per_second: (per_second as f64).max(0.1), burst: (burst as f64).max(1.0) }
    }
}

#[derive(Debug)]
struct Bucket {
    rate: RequestRate,
    left: f64,
    at: Instant,
    /// Time at which the rate was read from the database.
    read: Option<Instant>,
}

impl Bucket {
    fn full(rate: RequestRate, now: Instant) -> Self {
        Self { rate, left: rate.burst, at: now, read: None }
    }

    /// Takes one request, or returns the time until one is available.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "both numbers are positive and far below 2^52"
    )]
    fn take(&mut self, now: Instant) -> Result<Allowance, (Allowance, Duration)> {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second;
        (self.left, self.at) = ((self.left + earned).min(self.rate.burst), now);
        let good = self.left >= 1.0;
        if good {
            self.left -= 1.0;
        }
        let allowance = Allowance {
            limit: self.rate.burst as u64,
            remaining: self.left as u64,
            reset: ((self.rate.burst - self.left) / self.rate.per_second).ceil() as u64,
        };
        if good {
            return Ok(allowance);
        }
        Err((allowance, Duration::from_secs_f64((1.0 - self.left) / self.rate.per_second)))
    }
}

#[derive(Debug)]
struct Inner {
    rate: RequestRate,
    buckets: Mutex<Recent<Payer, Bucket>>,
    known: Mutex<Recent<Vec<u8>, Payer>>,
    lookups: FairPermits<Payer>,
    strangers: FairPermits<Payer>,
    visitors: FairPermits<Payer>,
    tenants: FairPermits<Payer>,
    own: FairPermits<Payer>,
    streams: FairPermits<Payer>,
}

/// The limits of this replica. Clones share them.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Inner>);

fn busy(why: Busy) -> Error {
    match why {
        Busy::Key => Error::Throttled(Duration::from_secs(1)),
        Busy::All => Error::Unavailable(
            "the server is at its limit of concurrent requests".into(),
            Duration::from_secs(1),
        ),
    }
}

/// Takes a slot. An anonymous client gets 429, even if the whole server is full.
async fn strangers(room: &FairPermits<Payer>, network: IpAddr) -> Result<Permit<Payer>, Error> {
    let place = room.take(&Payer::Network(network), PATIENCE).await;
    place.map_err(|_| Error::Throttled(Duration::from_secs(1)))
}

impl Turns {
    /// Creates the limits for a pool with this number of database connections.
    #[must_use]
    pub fn new(limits: &Limits, connections: u32) -> Self {
        let pool = usize::try_from(connections).unwrap_or(16).max(4);
        let queued = |per_key, total| FairPermits::new(per_key, total).waiting(QUEUE);
        Self(Arc::new(Inner {
            rate: RequestRate::new(limits.requests_per_second, limits.request_burst),
            buckets: Mutex::default(),
            known: Mutex::default(),
            // One key gets at most a quarter, all lookups together three quarters, so running requests can
            // finish.
            lookups: queued((pool / 4).max(1), (pool * 3 / 4).max(2)),
            strangers: queued(2, (pool / 4).max(4)),
            // A visitor's request may hash a password for a while, with database queries in between.
            visitors: queued(4, (pool / 2).max(8)),
            tenants: queued((pool / 2).max(2), pool * 4),
            own: queued((pool * 3 / 8).max(2), pool * 4),
            streams: FairPermits::new(STREAMS.0, STREAMS.1),
        }))
    }

    /// Takes a slot to look up a credential. A credential that was valid before has a share of its own. All
    /// others use the share of anonymous clients, split by network.
    ///
    /// `hash` is the hash of the credential.
    pub async fn lookup(&self, hash: &[u8], network: IpAddr) -> Result<Permit<Payer>, Error> {
        let known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner).get(&hash.to_vec()).cloned();
        match known {
            Some(payer) => self.0.lookups.take(&payer, PATIENCE).await.map_err(busy),
            None => strangers(&self.0.strangers, network).await,
        }
    }

    /// Takes a database slot for a request whose signed token names a tenant.
    pub async fn signed(&self, tenant: &TenantName) -> Result<Permit<Payer>, Error> {
        self.0.lookups.take(&Payer::Named(tenant.clone()), PATIENCE).await.map_err(busy)
    }

    /// Takes a slot for an anonymous request, such as a sign-in.
    pub async fn visitor(&self, network: IpAddr) -> Result<Permit<Payer>, Error> {
        strangers(&self.0.visitors, network).await
    }

    /// Remembers that a credential is valid and belongs to this payer.
    pub fn remember(&self, hash: &[u8], payer: Payer) {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner).put(hash.to_vec(), payer);
    }

    /// Takes the turn of an authenticated request. Charges the token or account, and the tenant if a member
    /// makes the request. Requests by a platform role charge only that account.
    pub async fn enter(
        &self,
        actor: &Actor,
        tenant: Option<&TenantRef>,
        pool: &PgPool,
    ) -> Result<RequestPermit, Error> {
        let own = actor.payer();
        let member = tenant.map(|tenant| Payer::Tenant(tenant.id));
        let own_permit = match member {
            Some(_) => Some(self.0.own.take(&own, PATIENCE).await.map_err(busy)?),
            None => None,
        };
        let payer = member.unwrap_or(own);
        let of_tenant = self.0.tenants.take(&payer, PATIENCE).await.map_err(busy)?;
        if let Some(tenant) = tenant {
            self.read_limits(tenant.id, pool).await?;
        }
        Ok(RequestPermit { _own: own_permit, _of_tenant: of_tenant })
    }

    /// Counts a request against the rates of its token or account, and of its tenant. Returns the scarcer
    /// allowance, also with the refusal.
    pub fn pay(&self, actor: &Actor, tenant: Option<&TenantRef>) -> Result<Allowance, (Allowance, Duration)> {
        let now = Instant::now();
        let mut buckets = self.0.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spend = |payer: Payer| {
            if buckets.get(&payer).is_none() {
                buckets.put(payer.clone(), Bucket::full(self.0.rate, now));
            }
            buckets.get(&payer).map(|bucket| bucket.take(now))
        };
        let own = spend(actor.payer());
        let of_tenant = match (&own, tenant) {
            // A request that exceeds its token's own rate does not count against the tenant.
            (Some(Ok(_)), Some(tenant)) => spend(Payer::Tenant(tenant.id)),
            _ => None,
        };
        match (own, of_tenant) {
            (Some(Err(spent)), _) | (_, Some(Err(spent))) => Err(spent),
            (Some(Ok(own)), Some(Ok(other))) => Ok(if other.remaining < own.remaining { other } else { own }),
            (Some(Ok(own)), None) => Ok(own),
            (None, _) => Ok(Allowance { limit: 1, remaining: 1, reset: 0 }),
        }
    }

    /// Takes a slot for a stream, which outlasts its request.
    pub fn stream(&self, actor: &Actor, tenant: Option<&TenantRef>) -> Result<Permit<Payer>, Error> {
        let payer = tenant.map_or_else(|| actor.payer(), |tenant| Payer::Tenant(tenant.id));
        self.0.streams.try_take(&payer).map_err(|_| Error::Throttled(Duration::from_secs(10)))
    }

    /// Reads a tenant's limits. A change by an admin takes effect within half a minute.
    async fn read_limits(&self, tenant: TenantId, pool: &PgPool) -> Result<(), Error> {
        let payer = Payer::Tenant(tenant);
        let now = Instant::now();
        let fresh = |read: Option<Instant>| read.is_some_and(|read| now.duration_since(read) < FRESH);
        {
            let mut buckets = self.0.buckets.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(bucket) = buckets.get(&payer) {
                if fresh(bucket.read) {
                    return Ok(());
                }
                // Only one of many concurrent requests reads stale limits again.
                bucket.read = Some(now);
            }
        }
        let mut conn = db::begin(pool, tenant).await?;
        let per_second = quotas::limit(&mut conn, tenant, Resource::RequestsPerSecond).await?;
        let burst = quotas::limit(&mut conn, tenant, Resource::RequestBurst).await?;
        conn.commit().await?;
        let rate = RequestRate::new(per_second, burst);
        let mut buckets = self.0.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        match buckets.get(&payer) {
            Some(bucket) if bucket.rate == rate => {}
            Some(bucket) => {
                bucket.rate = rate;
                bucket.left = bucket.left.min(rate.burst);
            }
            None => buckets.put(payer, Bucket { read: Some(now), ..Bucket::full(rate, now) }),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_refills_and_says_when() {
        let now = Instant::now();
        let mut bucket = Bucket::full(RequestRate::new(2, 3), now);
        for remaining in [2, 1, 0] {
            assert_eq!(bucket.take(now).unwrap().remaining, remaining);
        }
        let (allowance, after) = bucket.take(now).unwrap_err();
        assert_eq!(allowance, Allowance { limit: 3, remaining: 0, reset: 2 });
        assert_eq!(after, Duration::from_millis(500));
        assert!(bucket.take(now + Duration::from_millis(500)).is_ok());
        assert_eq!(bucket.take(now + Duration::from_secs(100)).unwrap().remaining, 2);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_used_ones_stay() {
        let mut recent = Recent::default();
        for n in 0..REMEMBERED * 3 {
            recent.put(n, n);
            assert!(recent.get(&0).is_some());
        }
        assert!(recent.young.len() + recent.old.len() <= REMEMBERED);
    }

    #[tokio::test]
    async fn strangers_have_a_small_share_and_known_credentials_their_own() {
        let turns = Turns::new(&Limits::default(), 16);
        let mut held = Vec::new();
        for n in 0..100_u32 {
            let network = IpAddr::from(n.to_be_bytes());
            let asked = tokio::time::timeout(Duration::from_millis(5), turns.lookup(b"wrong", network));
            if let Ok(Ok(permit)) = asked.await {
                held.push(permit);
            }
        }
        assert_eq!(held.len(), 4);
        turns.remember(b"good", Payer::Token(1));
        let network = IpAddr::from([0, 0, 0, 1]);
        let good = tokio::time::timeout(Duration::from_millis(50), turns.lookup(b"good", network));
        assert!(good.await.unwrap().is_ok());
    }
}
