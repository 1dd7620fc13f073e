//! State of one login attempt at a provider. State, nonce and PKCE verifier all derive from one random value in
//! the browser's cookie. The server stores nothing before the callback, and a callback matches exactly one
//! attempt.

use openidconnect::{Nonce, PkceCodeVerifier};
use subtle::ConstantTimeEq as _;
use time::OffsetDateTime;

use crate::access::credentials::{self, Secret};
use crate::keys::{KeyPurpose, Keys, mac};

/// Lifetime of a login attempt, in seconds.
pub(super) const LIFE: i64 = 600;

/// Purpose of a login attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// To sign in.
    SignIn,
    /// Confirm the session of this id.
    Confirm(i64),
    /// Link the provider to the account of this session.
    Link(i64),
}

impl Goal {
    fn word(self) -> (char, i64) {
        match self {
            Self::SignIn => ('s', 0),
            Self::Confirm(session) => ('c', session),
            Self::Link(session) => ('l', session),
        }
    }
}

/// A login attempt: the value of the cookie and its parsed parts.
pub(super) struct Way {
    pub(super) text: String,
    pub(super) goal: Goal,
    pub(super) begun: i64,
}

impl Way {
    /// Creates an attempt for one provider. Format: `GOAL.SESSION.TIME.RANDOM.MAC`.
    pub(super) fn new(keys: &Keys, provider: &str, goal: Goal) -> Self {
        let (word, session) = goal.word();
        let random = Secret::generate("");
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let body = format!("{word}.{session}.{now}.{}", random.expose());
        Self { text: format!("{body}.{}", Self::seal(keys, provider, &body)), goal, begun: now }
    }

    fn seal(keys: &Keys, provider: &str, body: &str) -> String {
        Self::derive(keys, provider, "state", body)
    }

    fn derive(keys: &Keys, provider: &str, what: &str, body: &str) -> String {
        let mac =
            mac(&keys.of(KeyPurpose::Provider), &[provider.as_bytes(), what.as_bytes(), body.as_bytes()]);
        data_encoding::BASE64URL_NOPAD.encode(&mac)
    }

    /// Parses a cookie. Returns `None` unless this server issued it, for this provider, within the last ten
    /// minutes.
    pub(super) fn parse(keys: &Keys, provider: &str, text: &str) -> Option<Self> {
        let (body, seal) = text.rsplit_once('.')?;
        if !bool::from(Self::seal(keys, provider, body).as_bytes().ct_eq(seal.as_bytes())) {
            return None;
        }
        let mut parts = body.split('.');
        let (word, session, at) =
            (parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse::<i64>().ok()?);
        let age = OffsetDateTime::now_utc().unix_timestamp() - at;
        let goal = match word {
            "s" => Goal::SignIn,
            "c" => Goal::Confirm(session),
            "l" => Goal::Link(session),
            _ => return None,
        };
        (0..=LIFE).contains(&age).then(|| Self { text: text.to_owned(), goal, begun: at })
    }

    pub(super) fn state(&self) -> String {
        data_encoding::BASE64URL_NOPAD.encode(&credentials::hash(&self.text))
    }
    pub(super) fn nonce(&self, keys: &Keys, provider: &str) -> Nonce {
        Nonce::new(Self::derive(keys, provider, "nonce", &self.text))
    }
    pub(super) fn verifier(&self, keys: &Keys, provider: &str) -> PkceCodeVerifier {
        PkceCodeVerifier::new(Self::derive(keys, provider, "pkce", &self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_one_providers_one_browsers_and_has_its_time() {
        let keys = Keys::parse(&Keys::generate()).unwrap();
        let way = Way::new(&keys, "one", Goal::Confirm(7));
        assert_eq!(Way::parse(&keys, "one", &way.text).unwrap().goal, Goal::Confirm(7));
        assert!(Way::parse(&keys, "two", &way.text).is_none());
        let other = Keys::parse(&Keys::generate()).unwrap();
        assert!(Way::parse(&other, "one", &way.text).is_none());
        let forged = way.text.replacen("c.7.", "s.0.", 1);
        assert!(Way::parse(&keys, "one", &forged).is_none());
        let old = format!("s.0.{}.x", OffsetDateTime::now_utc().unix_timestamp() - LIFE - 1);
        let old = format!("{old}.{}", Way::seal(&keys, "one", &old));
        assert!(Way::parse(&keys, "one", &old).is_none());
        assert!(way.verifier(&keys, "one").secret().len() >= 43, "RFC 7636");
        for odd in ["", ".", "s.0.x.y.z", &"a".repeat(9_000)] {
            assert!(Way::parse(&keys, "one", odd).is_none());
        }
    }
}
