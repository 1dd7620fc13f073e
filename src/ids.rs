//! Identities and names that all other modules use. They are parsed once, at the edge, and never checked
//! again. A value always obeys the rule of its type, so it is safe in a file name, a label or a rule.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not a valid name or digest. The message never contains the text itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub String);

impl NameError {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// Checks a DNS label (RFC 1123, lower case) that starts with a letter and has a bounded length.
fn check_label(what: &str, text: &str, min: usize, max: usize) -> Result<(), NameError> {
    let bytes = text.as_bytes();
    if bytes.len() < min || bytes.len() > max {
        return Err(NameError::new(format!("{what} must have {min} to {max} characters")));
    }
    if !bytes[0].is_ascii_lowercase() {
        return Err(NameError::new(format!("{what} must start with a letter a to z")));
    }
    if !bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-') {
        return Err(NameError::new(format!("{what} may contain only a to z, 0 to 9 and -")));
    }
    if bytes[bytes.len() - 1] == b'-' {
        return Err(NameError::new(format!("{what} must not end with -")));
    }
    Ok(())
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
        #[serde(try_from = "String", into = "String")]
        #[sqlx(transparent)]
        pub struct $name(String);

        impl $name {
            /// Returns the text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> Result<(), NameError> = $check;
                check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// Names that a tenant may not have, because addresses, roles or groups of the platform use them.
pub const RESERVED_TENANTS: &[&str] = &[
    "admin",
    "administrator",
    "api",
    "app",
    "apps",
    "auditor",
    "auth",
    "billing",
    "bulkhead",
    "catalog",
    "console",
    "default",
    "docs",
    "engine",
    "health",
    "healthz",
    "host",
    "internal",
    "kube-system",
    "library",
    "localhost",
    "login",
    "logout",
    "metrics",
    "platform",
    "public",
    "readyz",
    "registry",
    "root",
    "schemas",
    "static",
    "support",
    "system",
    "tenant",
    "tenants",
    "token",
    "v1",
    "v2",
    "www",
];

text_id!(
    /// A tenant's name: a DNS label of 3 to 32 characters, not a reserved word, never reused.
    TenantName,
    |text| {
        check_label("a tenant name", text, 3, 32)?;
        if RESERVED_TENANTS.contains(&text) {
            return Err(NameError::new("this name is reserved for the platform"));
        }
        Ok(())
    }
);

text_id!(
    /// An app's name within its tenant: a DNS label of 1 to 45 characters.
    AppName,
    |text| check_label("an app name", text, 1, 45)
);

text_id!(
    /// The name of a platform service in the catalogue: a DNS label of 1 to 45 characters.
    ServiceName,
    |text| check_label("the name of a service", text, 1, 45)
);

text_id!(
    /// A tenant's name of an egress target: a DNS label of 1 to 45 characters.
    EgressName,
    |text| check_label("the name of an egress target", text, 1, 45)
);

text_id!(
    /// A domain name (RFC 1123) in lower case, of two or more labels, without a final dot and without a
    /// wildcard: exactly one name.
    DomainName,
    |text| {
        let label = |label: &str| {
            let bytes = label.as_bytes();
            let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            bytes.len() <= 63
                && edge(bytes.first())
                && edge(bytes.last())
                && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        };
        let last = text.rsplit('.').next().unwrap_or_default();
        if text.len() > 253 || !text.contains('.') || !text.split('.').all(label) || !last.starts_with(|c: char| c.is_ascii_lowercase()) {
            return Err(NameError::new(
                "a domain must be one full name in lower case, such as api.example.org, without a wildcard",
            ));
        }
        Ok(())
    }
);

/// A reference to an app: `api` in the same tenant, `acme/api` in another one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AppRef {
    /// The other tenant; none for the same one.
    pub tenant: Option<TenantName>,
    /// App.
    pub app: AppName,
}

impl FromStr for AppRef {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once('/') {
            Some((tenant, app)) => Ok(Self { tenant: Some(tenant.parse()?), app: app.parse()? }),
            None => Ok(Self { tenant: None, app: text.parse()? }),
        }
    }
}

impl TryFrom<String> for AppRef {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<AppRef> for String {
    fn from(app: AppRef) -> String {
        app.to_string()
    }
}

impl fmt::Display for AppRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tenant {
            Some(tenant) => write!(f, "{tenant}/{}", self.app),
            None => self.app.fmt(f),
        }
    }
}

text_id!(
    /// The id of an installation: four letters. Every name that it creates on a machine contains them, so
    /// installations do not conflict.
    Installation,
    |text| {
        if text.len() == 4 && text.bytes().all(|b| b.is_ascii_lowercase()) {
            Ok(())
        } else {
            Err(NameError::new("an installation id must be four letters a to z"))
        }
    }
);

text_id!(
    /// A repository within a tenant's registry project, without host and without tenant:
    /// components `[a-z0-9]+` joined by one of `.`, `_`, `__`, `-`..., separated by `/`
    /// (OCI distribution specification 1.1), at most 128 characters.
    RepositoryPath,
    |text| {
        if text.is_empty() || text.len() > 128 {
            return Err(NameError::new("a repository must have 1 to 128 characters"));
        }
        for part in text.split('/') {
            let bytes = part.as_bytes();
            let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            if !edge(bytes.first()) || !edge(bytes.last()) {
                return Err(NameError::new(
                    "each part of a repository must start and end with a to z or 0 to 9",
                ));
            }
            if !bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(b)) {
                return Err(NameError::new(
                    "a repository may contain only a to z, 0 to 9 and . _ - with / between its parts",
                ));
            }
            if part.contains("..") || part.contains("._") || part.contains("_.") || part.contains("___")
                || part.contains(".-") || part.contains("-.") || part.contains("_-") || part.contains("-_")
            {
                return Err(NameError::new(
                    "in a repository, the separator between letters and digits must be one of . _ __ or dashes",
                ));
            }
        }
        Ok(())
    }
);

text_id!(
    /// A tag of an image: 1 to 128 of `A-Za-z0-9_.-`, not starting with `.` or `-`.
    Tag,
    |text| {
        let bytes = text.as_bytes();
        if bytes.is_empty() || bytes.len() > 128 {
            return Err(NameError::new("a tag must have 1 to 128 characters"));
        }
        if b".-".contains(&bytes[0])
            || !bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(b))
        {
            return Err(NameError::new(
                "a tag may contain only letters, digits and _ . - and must start with a letter, a digit or _",
            ));
        }
        Ok(())
    }
);

text_id!(
    /// The digest of a blob or manifest: `sha256:` and 64 lower-case hexadecimal digits.
    Digest,
    |text| {
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(())
        } else {
            Err(NameError::new("a digest must be sha256: and 64 lower-case hexadecimal digits"))
        }
    }
);

impl Digest {
    /// Returns the digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(format!("sha256:{}", data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(bytes))))
    }

    /// Builds a digest from a finished SHA-256 computation.
    #[must_use]
    pub fn from_sha256(hash: &[u8; 32]) -> Self {
        Self(format!("sha256:{}", data_encoding::HEXLOWER.encode(hash)))
    }

    /// Returns the first twelve hexadecimal digits, for display.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[7..19]
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// A tenant's identity in the database. Never shown in an address, never reused.
    TenantId
);
number_id!(
    /// An app's identity: an app that is deleted and created again gets another id.
    AppId
);

number_id!(
    /// An account's identity.
    AccountId
);

text_id!(
    /// The name with which a user signs in: lower-case letters, digits and `. _ @ + -`, at most 64
    /// characters. An e-mail address is valid.
    AccountName,
    |text| {
        let bytes = text.as_bytes();
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if bytes.len() > 64 || !edge(bytes.first()) || !edge(bytes.last()) {
            return Err(NameError::new(
                "an account name must have 1 to 64 characters, the first and the last of a to z and 0 to 9",
            ));
        }
        if ["root", "platform", "anonymous", "many", "bulkhead"].contains(&text) {
            return Err(NameError::new("this name is reserved: it stands for the platform itself in the audit log"));
        }
        if !bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._@+-".contains(b)) {
            return Err(NameError::new("an account name may contain only a to z, 0 to 9 and . _ @ + -"));
        }
        Ok(())
    }
);

/// An actor, as the audit log shows it: `account:12 olga`, `service:ci`, `root`, `platform`; with the token
/// that it used, if any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActorId {
    #[serde(rename = "id")]
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<String>,
}

fn one_line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(120).collect()
}

impl ActorId {
    /// Builds an actor from its kind and name. Drops control characters, so a log line stays one line.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self { text: one_line(text), via: None }
    }
    /// Adds the token by number and name.
    #[must_use]
    pub fn by_token(self, id: i64, name: &str) -> Self {
        Self { via: Some(one_line(&format!("token:{id} {name}"))), ..self }
    }
    /// Returns the token, if one was used.
    #[must_use]
    pub fn via(&self) -> Option<&str> {
        self.via.as_deref()
    }
    /// Returns the platform itself, as a reconciler acts.
    #[must_use]
    pub fn platform() -> Self {
        Self::new("platform")
    }
    /// Returns the actor without the token.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenant_names_are_dns_labels_and_not_reserved() {
        for good in ["acme", "a-1", "shop2", &"a".repeat(32)] {
            assert!(good.parse::<TenantName>().is_ok(), "{good}");
        }
        for bad in ["", "ab", "1ab", "Acme", "a_b", "ab-", "-ab", "admin", "a.b", "käse", &"a".repeat(33)] {
            assert!(bad.parse::<TenantName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_domain_is_one_full_name() {
        for good in ["example.org", "a.b-c.example", "xn--bcher-kva.example", "1.example.org"] {
            assert!(good.parse::<DomainName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "org",
            "*.example.org",
            "example.org.",
            ".org",
            "a..b",
            "-a.org",
            "a-.org",
            "A.org",
            "1.2.3.4",
            "a_b.org",
            "käse.example",
            &format!("{}.org", "a".repeat(64)),
            &"a.".repeat(130),
        ] {
            assert!(bad.parse::<DomainName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn repositories_follow_the_distribution_grammar() {
        for good in ["web", "team/web", "a__b", "a--b", "a.b/c-d/e_f", "0"] {
            assert!(good.parse::<RepositoryPath>().is_ok(), "{good}");
        }
        for bad in
            ["", "/web", "web/", "a//b", "..", "a/../b", "Web", "a___b", "a..b", "-a", "a%2fb", "host:1/web"]
        {
            assert!(bad.parse::<RepositoryPath>().is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_are_sha256_in_lower_case() {
        assert_eq!(
            Digest::of(b"").as_str(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert!("sha256:E3B0".parse::<Digest>().is_err());
        assert!("sha512:e3b0".parse::<Digest>().is_err());
    }
}
