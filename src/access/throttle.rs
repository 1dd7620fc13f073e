//! How fast anybody may guess: buckets in Postgres, shared by all replicas, which outlive every restart. They
//! delay and never lock out: whoever waits as long as the answer says may try again, and an account's own
//! people, where or with the browser that they have signed in before, do not wait for what others guess.

use std::net::IpAddr;
use std::time::Duration;

use sqlx::PgPool;
use subtle::ConstantTimeEq;

use super::store;
use crate::error::Error;
pub use crate::http::network;
use crate::ids::AccountId;
use crate::keys::{Keys, Purpose, mac};

/// A bucket: so many at once, and then one each so many seconds.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// At once.
    pub burst: u32,
    /// Seconds for each after that.
    pub every: u32,
}

/// Guesses from one place against one name.
pub const PAIR: Limit = Limit { burst: 10, every: 30 };
/// Guesses from one place, whoever is meant.
pub const PLACE: Limit = Limit { burst: 60, every: 2 };
/// Guesses against one name, from wherever it was never used.
pub const NAME: Limit = Limit { burst: 100, every: 30 };

/// Guesses at one second factor, from wherever: whoever makes them has the password already.
pub const FACTOR: Limit = Limit { burst: 20, every: 900 };

/// Keeps watch over guesses.
#[derive(Debug, Clone)]
pub struct Throttle {
    pool: PgPool,
    key: [u8; 32],
}

impl Throttle {
    /// Over this database; buckets are named by a keyed hash, so that it holds no address.
    #[must_use]
    pub fn new(pool: PgPool, keys: &Keys) -> Self {
        Self { pool, key: keys.of(Purpose::Places) }
    }

    fn name(&self, parts: &[&str]) -> [u8; 32] {
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        mac(&self.key, &parts)
    }

    /// The name of a place, for what an account knows of its own.
    #[must_use]
    pub fn place(&self, address: IpAddr) -> [u8; 32] {
        self.name(&["place", &network(address).to_string()])
    }

    async fn take(&self, key: [u8; 32], limit: Limit) -> Result<(), Error> {
        // A statement of its own: what was taken stays taken, whatever becomes of the request.
        let mut conn = self.pool.acquire().await?;
        match store::take(&mut conn, &key, f64::from(limit.every), f64::from(limit.burst)).await? {
            None => Ok(()),
            Some(wait) => Err(Error::Throttled(Duration::from_secs_f64(wait.ceil()))),
        }
    }

    /// What a browser bears after the right password for this name: it is known from then on, wherever it is.
    #[must_use]
    pub fn browser(&self, name: &str) -> String {
        data_encoding::BASE64URL_NOPAD.encode(&self.name(&["browser", name]))
    }

    /// One guess at a name from an address; `account` is whose it is, if there is one. The same questions
    /// are asked of the database for a name that nobody has.
    pub async fn guess(&self, name: &str, address: IpAddr, account: Option<AccountId>) -> Result<(), Error> {
        self.guess_from(name, address, account, None).await
    }

    /// The same, from a browser that bears this.
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

    /// One guess at an account's second factor; the bucket is emptied by a right one.
    pub async fn guess_factor(&self, account: AccountId, address: IpAddr) -> Result<(), Error> {
        self.take(self.name(&["guesses from", &network(address).to_string()]), PLACE).await?;
        self.take(self.factor(account), FACTOR).await
    }

    /// The bucket of a second factor.
    #[must_use]
    pub fn factor(&self, account: AccountId) -> [u8; 32] {
        self.name(&["second factor", &account.to_string()])
    }

    /// Something else that must not be tried without end, such as links, from one address.
    pub async fn knock(&self, what: &str, address: IpAddr) -> Result<(), Error> {
        self.take(self.name(&["knocks", what, &network(address).to_string()]), PLACE).await
    }

    /// The bucket of a name and a place, to be emptied with the sign-in that succeeds.
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
