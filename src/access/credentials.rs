//! Random credentials: made here, shown once, kept only as a hash. They carry 256 random bits, so
//! a plain SHA-256 is enough: there is nothing to guess.

use sha2::{Digest as _, Sha256};

/// What makes an API token recognisable, to people and to secret scanners.
pub const TOKEN_PREFIX: &str = "bhk_";

/// A credential in clear. Not printable; [`Secret::expose`] is for the one answer that shows it.
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// A new credential with this prefix.
    #[must_use]
    pub fn generate(prefix: &str) -> Self {
        let random = data_encoding::BASE32_NOPAD.encode(&rand::random::<[u8; 32]>()).to_ascii_lowercase();
        Self(format!("{prefix}{random}"))
    }

    /// The text, to be shown once.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is stored of it.
    #[must_use]
    pub fn hash(&self) -> Vec<u8> {
        hash(&self.0)
    }
}

/// The stored form of a credential that was handed in. Looked up by equality of the hash in an
/// index, which tells a guesser nothing: a guess that shares a prefix has another hash altogether.
#[must_use]
pub fn hash(text: &str) -> Vec<u8> {
    Sha256::digest(text.as_bytes()).to_vec()
}
