//! Rate limits of guesses: buckets in Postgres, shared by all replicas, which survive every restart. They delay
//! and never lock out: after the wait that the response states, a client may try again. Users of a known
//! network or browser do not wait because of guesses that others make.

use std::net::IpAddr;
use std::time::Duration;

use sqlx::PgPool;
use subtle::ConstantTimeEq;

use super::store;
use crate::error::Error;
pub use crate::http::network;
use crate::ids::AccountId;
use crate::keys::{KeyPurpose, Keys, mac};

/// A bucket: a burst, then one per interval.
#[derive(Debug, Clone, Copy)]
pub struct ThrottleLimit {
    /// Burst.
    pub burst: u32,
    /// Seconds per guess after the burst.
    pub every: u32,
}

/// Guesses from one network against one name.
pub const PAIR: ThrottleLimit = ThrottleLimit { burst: 10, every: 30 };
/// Guesses from one network against all names.
pub const PLACE: ThrottleLimit = ThrottleLimit { burst: 60, every: 2 };
/// Guesses against one name, from networks and browsers that it was never used from.
pub const NAME: ThrottleLimit = ThrottleLimit { burst: 100, every: 30 };

/// Guesses of one second factor, from all networks. The guesser already has the password.
pub const FACTOR: ThrottleLimit = ThrottleLimit { burst: 20, every: 900 };

/// Limits the rate of guesses.
#[derive(Debug, Clone)]
pub struct Throttle {
    pool: PgPool,
    key: [u8; 32],
}

impl Throttle {
    /// Creates it over a database. Bucket names are keyed hashes, so the database holds no address.
    #[must_use]
    pub fn new(pool: PgPool, keys: &Keys) -> Self {
        Self { pool, key: keys.of(KeyPurpose::Places) }
    }

    fn name(&self, parts: &[&str]) -> [u8; 32] {
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        mac(&self.key, &parts)
    }

    /// Returns the name of a network, for the list of an account's known places.
    #[must_use]
    pub fn place(&self, address: IpAddr) -> [u8; 32] {
        self.name(&["place", &network(address).to_string()])
    }

    async fn take(&self, key: [u8; 32], limit: ThrottleLimit) -> Result<(), Error> {
        // Not part of the request's transaction: the guess counts, whatever the outcome of the request.
        let mut conn = self.pool.acquire().await?;
        match store::take(&mut conn, &key, f64::from(limit.every), f64::from(limit.burst)).await? {
            None => Ok(()),
            Some(wait) => Err(Error::Throttled(Duration::from_secs_f64(wait.ceil()))),
        }
    }

    /// Returns the cookie value that a browser gets after a correct password for this name. The browser is then
    /// known on every network.
    #[must_use]
    pub fn browser(&self, name: &str) -> String {
        data_encoding::BASE64URL_NOPAD.encode(&self.name(&["browser", name]))
    }

    /// Counts one guess at a name from an address. `account` is the account of that name, if it exists. An
    /// unknown name causes the same queries.
    pub async fn guess(&self, name: &str, address: IpAddr, account: Option<AccountId>) -> Result<(), Error> {
        self.guess_from(name, address, account, None).await
    }

    /// Counts one guess, from a browser with this cookie value.
    pub async fn guess_from(
        &self,
        name: &str,
        address: IpAddr,
        account: Option<AccountId>,
        browser: Option<&str>,
    ) -> Result<(), Error> {
        let place = network(address).to_string();
        self.take(self.name(&["guesses from", &place]), PLACE).await?;
        self.take(self.name(&["guesses", name, &place]), PAIR).await?;
        let mut conn = self.pool.acquire().await?;
        let known =
            store::is_place_known(&mut conn, account.unwrap_or(AccountId(0)), &self.place(address)).await?;
        drop(conn);
        let same = |browser: &str| bool::from(browser.as_bytes().ct_eq(self.browser(name).as_bytes()));
        if known || browser.is_some_and(same) {
            Ok(())
        } else {
            self.take(self.name(&["guesses at", name]), NAME).await
        }
    }

    /// Counts one guess at an account's second factor. A correct code empties the bucket.
    pub async fn guess_factor(&self, account: AccountId, address: IpAddr) -> Result<(), Error> {
        self.take(self.name(&["guesses from", &network(address).to_string()]), PLACE).await?;
        self.take(self.factor(account), FACTOR).await
    }

    /// Returns the bucket of a second factor.
    #[must_use]
    pub fn factor(&self, account: AccountId) -> [u8; 32] {
        self.name(&["second factor", &account.to_string()])
    }

    /// Counts another limited attempt from one address, such as opening a link.
    pub async fn knock(&self, what: &str, address: IpAddr) -> Result<(), Error> {
        self.take(self.name(&["knocks", what, &network(address).to_string()]), PLACE).await
    }

    /// Returns the bucket of a name and a network. A successful sign-in empties it.
    #[must_use]
    pub fn pair(&self, name: &str, address: IpAddr) -> [u8; 32] {
        self.name(&["guesses", name, &network(address).to_string()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_customer_is_one_place() {
        let net = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(net("10.1.2.3"), "10.1.2.3");
        assert_eq!(net("::ffff:10.1.2.3"), "10.1.2.3");
        assert_eq!(net("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
