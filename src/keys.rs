//! The platform's own key: a file of 32 random bytes, outside the database. Data that it seals or signs is
//! worth nothing to a thief of the database. Each purpose has its own derived key.

use std::path::Path;

use chacha20poly1305::aead::{Aead, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use data_encoding::BASE64;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

use crate::error::Error;

/// The purpose of a derived key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPurpose {
    /// Sealing second factors.
    SecondFactor,
    /// Stored answers for an `Idempotency-Key`.
    Answers,
    /// The chain of the audit log.
    Audit,
    /// Tokens of forms.
    Forms,
    /// Nonce and verifier of a sign-in through a provider.
    Provider,
    /// Names of rate limit buckets and of places, so that the database contains no addresses.
    Places,
}

/// The platform's key.
#[derive(Clone)]
pub struct Keys([u8; 32]);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

/// Returns the HMAC-SHA256 of parts, each prefixed with its length: two different lists never give the same
/// input.
#[must_use]
pub fn mac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = begin(key);
    for part in parts {
        mac.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn begin(key: &[u8; 32]) -> Hmac<Sha256> {
    // HMAC pads a key shorter than the hash's block with zeros anyway (RFC 2104).
    let mut block = [0; 64];
    block[..32].copy_from_slice(key);
    Hmac::<Sha256>::new(&block.into())
}

impl Keys {
    /// Generates a new key, in the form of its file.
    #[must_use]
    pub fn generate() -> String {
        format!("{}\n", BASE64.encode(&rand::random::<[u8; 32]>()))
    }

    /// Parses a key from the text of its file.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bytes = BASE64.decode(text.trim().as_bytes()).ok();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| Error::internal("the platform's key is not 32 bytes in base64"))
    }

    /// Loads a key from its file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::internal(format!("{}: {error}", path.display())))?;
        Self::parse(&text)
    }

    /// Returns the key of a purpose.
    #[must_use]
    pub fn of(&self, purpose: KeyPurpose) -> [u8; 32] {
        mac(&self.0, &[format!("bulkhead v1 {purpose:?}").as_bytes()])
    }

    /// Seals a secret for one place. Moved to another row, it cannot be opened.
    pub fn seal(&self, purpose: KeyPurpose, place: &str, secret: &[u8]) -> Result<Vec<u8>, Error> {
        let nonce: [u8; 24] = rand::random();
        let cipher = XChaCha20Poly1305::new(&self.of(purpose).into());
        let sealed = cipher
            .encrypt(&XNonce::from(nonce), Payload { msg: secret, aad: place.as_bytes() })
            .map_err(|_| Error::internal("sealing failed"))?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// Opens a secret that was sealed for this place.
    pub fn open(&self, purpose: KeyPurpose, place: &str, sealed: &[u8]) -> Result<Vec<u8>, Error> {
        let bad = || {
            Error::internal(
                "a sealed secret cannot be opened: it was sealed with another key or for another place",
            )
        };
        let (nonce, text) = sealed.split_at_checked(24).ok_or_else(bad)?;
        let nonce: [u8; 24] = nonce.try_into().map_err(|_| bad())?;
        XChaCha20Poly1305::new(&self.of(purpose).into())
            .decrypt(&XNonce::from(nonce), Payload { msg: text, aad: place.as_bytes() })
            .map_err(|_| bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_in_its_place_and_with_its_key() {
        let keys = Keys::parse(&Keys::generate()).unwrap();
        let sealed = keys.seal(KeyPurpose::SecondFactor, "account 1", b"secret").unwrap();
        assert_eq!(keys.open(KeyPurpose::SecondFactor, "account 1", &sealed).unwrap(), b"secret");
        assert!(keys.open(KeyPurpose::SecondFactor, "account 2", &sealed).is_err());
        assert!(keys.open(KeyPurpose::Audit, "account 1", &sealed).is_err());
        let other = Keys::parse(&Keys::generate()).unwrap();
        assert!(other.open(KeyPurpose::SecondFactor, "account 1", &sealed).is_err());
        assert!(keys.open(KeyPurpose::SecondFactor, "account 1", b"short").is_err());
        assert!(Keys::parse("AAAA").is_err());
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        let key = [7; 32];
        assert_ne!(mac(&key, &[b"ab", b"c"]), mac(&key, &[b"a", b"bc"]));
        assert_ne!(mac(&key, &[b"ab"]), mac(&key, &[b"ab", b""]));
    }
}
