//! Random credentials: generated here, shown once, stored as a hash. They carry 256 random bits, so a plain
//! SHA-256 is enough: guessing is not feasible.

use sha2::{Digest as _, Sha256};

/// Prefix that makes an API token recognisable, for users and secret scanners.
pub const TOKEN_PREFIX: &str = "bhk_";

/// A credential in clear text. It has no `Display`; [`Secret::expose`] serves the one response that shows it.
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Generates a credential with this prefix.
    #[must_use]
    pub fn generate(prefix: &str) -> Self {
        let random = data_encoding::BASE32_NOPAD.encode(&rand::random::<[u8; 32]>()).to_ascii_lowercase();
        Self(format!("{prefix}{random}"))
    }

    /// Returns the text, to be shown once.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns the stored form.
    #[must_use]
    pub fn hash(&self) -> Vec<u8> {
        hash(&self.0)
    }
}

/// Returns the stored form of a presented credential. The lookup compares hashes for equality in an index,
/// which tells a guesser nothing: a guess with the right prefix has an unrelated hash.
#[must_use]
pub fn hash(text: &str) -> Vec<u8> {
    Sha256::digest(text.as_bytes()).to_vec()
}
