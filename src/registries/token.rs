//! The pure part of the token server: keys, tokens, scopes. The registry (CNCF Distribution) expects ES256 with
//! libtrust's key id, `aud` as a single string, and times as whole numbers. No other form is ever issued.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::PublicKeyData;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::ids::{RepositoryPath, TenantName};

/// `iss` of every token, and the registry's `issuer`.
pub const ISSUER: &str = "bulkhead";
/// `aud` of a registry token, and the registry's `service`.
pub const SERVICE: &str = "bulkhead-registry";
/// `aud` of a pull credential: a token that only this token server accepts.
const PULL: &str = "bulkhead-pull";
/// Lifetime of a registry token.
pub const LIFE: Duration = Duration::from_secs(300);

/// A right in a token, in the registry's format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenAccess {
    /// Always `repository`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `TENANT/REPOSITORY`, exactly.
    pub name: String,
    /// `pull`, `push`, `delete`.
    pub actions: Vec<String>,
}

impl TokenAccess {
    /// Creates a right to some actions on one repository.
    #[must_use]
    pub fn to(name: String, actions: &[&str]) -> Self {
        let actions = actions.iter().map(ToString::to_string).collect();
        Self { kind: "repository".into(), name, actions }
    }

    /// Returns whether it includes pushing.
    #[must_use]
    pub fn pushes(&self) -> bool {
        self.actions.iter().any(|action| action == "push")
    }
}

/// The claims of a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Claims {
    iss: String,
    aud: String,
    /// The holder: `robot:ID@TENANT`, `token:ID@TENANT`, `engine`, `platform`, `anonymous`.
    pub sub: String,
    iat: u64,
    nbf: u64,
    exp: u64,
    /// The granted rights.
    pub access: Vec<TokenAccess>,
}

/// The kind of credential behind a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialKind {
    /// A registry credential.
    Robot,
    /// An API token.
    Token,
}

impl Claims {
    /// Returns the holder's kind, number and tenant; none for the platform's own tokens.
    #[must_use]
    pub fn holder(&self) -> Option<(CredentialKind, i64, TenantName)> {
        let (who, tenant) = self.sub.split_once('@')?;
        let (kind, id) = who.split_once(':')?;
        let kind = match kind {
            "robot" => CredentialKind::Robot,
            "token" => CredentialKind::Token,
            _ => return None,
        };
        Some((kind, id.parse().ok()?, tenant.parse().ok()?))
    }

    /// Returns the name stored as the pusher of an image: `robot:ID`, `token:ID`.
    #[must_use]
    pub fn pusher(&self) -> &str {
        self.sub.split('@').next().unwrap_or_default()
    }

    /// Returns whether the token allows an action on a repository.
    #[must_use]
    pub fn allows(&self, name: &str, action: &str) -> bool {
        self.access.iter().any(|access| access.name == name && access.actions.iter().any(|a| a == action))
    }
}

/// The signing key.
#[derive(Clone)]
pub struct SigningKey {
    pem: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
    kid: String,
    certificate: String,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", self.kid)
    }
}

/// Returns libtrust's fingerprint: the first 30 bytes of SHA-256 over the public key (DER), in base32, twelve
/// groups of four.
fn fingerprint(spki: &[u8]) -> String {
    let text = data_encoding::BASE32.encode(&Sha256::digest(spki)[..30]);
    let groups: Vec<&str> = (0..12).map(|n| &text[n * 4..n * 4 + 4]).collect();
    groups.join(":")
}

impl SigningKey {
    /// Generates a new key.
    pub fn generate() -> Result<Self, Error> {
        let pair = rcgen::KeyPair::generate().map_err(Error::internal)?;
        Self::from_pem(&pair.serialize_pem())
    }

    /// Loads a key from PKCS 8 in PEM.
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        let pair = rcgen::KeyPair::from_pem(pem).map_err(Error::internal)?;
        let certificate = rcgen::CertificateParams::new(Vec::new())
            .and_then(|params| params.self_signed(&pair))
            .map_err(Error::internal)?
            .pem();
        Ok(Self {
            encoding: EncodingKey::from_ec_pem(pem.as_bytes()).map_err(Error::internal)?,
            decoding: DecodingKey::from_ec_pem(pair.public_key_pem().as_bytes()).map_err(Error::internal)?,
            kid: fingerprint(&pair.subject_public_key_info()),
            certificate,
            pem: pem.to_owned(),
        })
    }

    /// Returns the key as PKCS 8 in PEM, for its file.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns the certificate for the registry's `rootcertbundle`.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    fn sign(
        &self,
        aud: &str,
        subject: &str,
        access: Vec<TokenAccess>,
        life: Duration,
    ) -> Result<String, Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(Error::internal)?.as_secs();
        let claims = Claims {
            iss: ISSUER.into(),
            aud: aud.into(),
            sub: subject.into(),
            iat: now,
            nbf: now.saturating_sub(5),
            exp: now + life.as_secs(),
            access,
        };
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.kid.clone());
        jsonwebtoken::encode(&header, &claims, &self.encoding).map_err(Error::internal)
    }

    fn check(&self, aud: &str, token: &str) -> Option<Claims> {
        let mut rules = Validation::new(Algorithm::ES256);
        rules.set_audience(&[aud]);
        rules.set_issuer(&[ISSUER]);
        rules.set_required_spec_claims(&["exp", "aud", "iss", "sub", "nbf"]);
        rules.validate_nbf = true;
        rules.leeway = 5;
        let data = jsonwebtoken::decode::<Claims>(token.as_bytes(), &self.decoding, &rules).ok()?;
        (data.header.kid.as_deref() == Some(self.kid.as_str())).then_some(data.claims)
    }

    /// Mints a token for the registry.
    pub fn mint(&self, subject: &str, access: Vec<TokenAccess>) -> Result<String, Error> {
        self.sign(SERVICE, subject, access, LIFE)
    }

    /// Returns the claims of a valid registry token that this key signed.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<Claims> {
        self.check(SERVICE, token)
    }

    /// Mints a credential with which the engine may pull from exactly one repository.
    pub fn mint_pull(&self, tenant: &TenantName, repository: &RepositoryPath) -> Result<String, Error> {
        let access = vec![TokenAccess::to(format!("{tenant}/{repository}"), &["pull"])];
        self.sign(PULL, "engine", access, LIFE)
    }

    /// Returns the right of a valid pull credential.
    #[must_use]
    pub fn verify_pull(&self, secret: &str) -> Option<TokenAccess> {
        self.check(PULL, secret)?.access.into_iter().next()
    }
}

/// The rights that a credential can request at the token server.
#[derive(Debug, Clone)]
pub enum Right {
    /// The repositories of one tenant: pull, and push if allowed.
    Tenant(TenantName, Push),
    /// Exactly this right.
    One(TokenAccess),
}

/// Whether a registry credential may push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Push {
    /// It may.
    Yes,
    /// It may only pull.
    No,
}

/// Returns the requested scopes as far as the right includes them. A scope beyond the right is reduced, never
/// answered with an error: clients request more than they need, and scopes of other tenants' repositories from
/// their caches.
#[must_use]
pub fn grant(right: &Right, scopes: &[String]) -> Vec<TokenAccess> {
    let mut granted: Vec<TokenAccess> = Vec::new();
    for scope in scopes.iter().flat_map(|scope| scope.split(' ')).take(16) {
        let Some((name, asked)) = parse_scope(scope) else { continue };
        let allowed: &[&str] = match right {
            Right::Tenant(tenant, push) => {
                let own = name.strip_prefix(tenant.as_str()).and_then(|rest| rest.strip_prefix('/'));
                if own.is_none_or(|path| path.parse::<RepositoryPath>().is_err()) {
                    continue;
                }
                if *push == Push::Yes { &["pull", "push"] } else { &["pull"] }
            }
            Right::One(access) if access.name == name => &["pull"],
            Right::One(_) => continue,
        };
        // Deleting is part of the right to push, but no action of a token: the platform deletes with its own
        // tokens.
        let all = asked.split(',').any(|action| matches!(action, "*" | "delete"));
        let actions: Vec<&str> = allowed
            .iter()
            .copied()
            .filter(|allowed| all || asked.split(',').any(|action| action == *allowed))
            .collect();
        if !actions.is_empty() && !granted.iter().any(|access| access.name == name) {
            granted.push(TokenAccess::to(name.to_owned(), &actions));
        }
    }
    granted
}

/// Parses `repository:NAME:ACTIONS`; the name may contain a colon.
fn parse_scope(scope: &str) -> Option<(&str, &str)> {
    let rest = scope.strip_prefix("repository:")?;
    rest.rsplit_once(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(push: Push) -> Right {
        Right::Tenant("acme".parse().unwrap(), push)
    }

    fn granted(right: &Right, scope: &str) -> Vec<(String, String)> {
        grant(right, &[scope.to_owned()]).into_iter().map(|a| (a.name, a.actions.join(","))).collect()
    }

    #[test]
    fn only_ones_own_repositories_and_rights_are_granted() {
        let all = right(Push::Yes);
        assert_eq!(granted(&all, "repository:acme/web:pull,push"), [("acme/web".into(), "pull,push".into())]);
        assert_eq!(
            granted(&right(Push::No), "repository:acme/web:push,pull"),
            [("acme/web".into(), "pull".into())]
        );
        for deleting in
            ["repository:acme/web:*", "repository:acme/web:delete", "repository:acme/web:pull,delete"]
        {
            assert_eq!(
                granted(&all, deleting),
                [("acme/web".into(), "pull,push".into())],
                "never delete itself"
            );
            assert_eq!(granted(&right(Push::No), deleting), [("acme/web".into(), "pull".into())]);
        }
        for scope in [
            "repository:acme2/web:pull",
            "repository:acme2/web:*",
            "repository:acme/../other/web:delete",
            "repository:acme:pull",
            "repository:acme/:pull",
            "repository:other/web:pull",
            "repository:acme/../other/web:pull",
            "repository:acme/Web:pull",
            "registry:catalog:*",
            "repository(plugin):acme/web:pull",
            "",
            ":",
            "repository:host:5000/acme/web:pull",
        ] {
            assert!(granted(&all, scope).is_empty(), "{scope}");
        }
        assert_eq!(granted(&all, "repository:acme/a:pull repository:evil/b:pull").len(), 1);
    }

    #[test]
    fn tokens_are_ours_or_nothing() {
        let key = SigningKey::generate().unwrap();
        let token = key.mint("robot:1", vec![TokenAccess::to("acme/web".into(), &["pull"])]).unwrap();
        assert!(key.verify(&token).unwrap().allows("acme/web", "pull"));
        assert!(!key.verify(&token).unwrap().allows("acme/web", "push"));
        assert!(SigningKey::generate().unwrap().verify(&token).is_none(), "another key");
        assert!(key.verify_pull(&token).is_none(), "another audience");
        let pull = key.mint_pull(&"acme".parse().unwrap(), &"web".parse().unwrap()).unwrap();
        assert!(key.verify(&pull).is_none());
        assert_eq!(key.verify_pull(&pull).unwrap().name, "acme/web");
        let expired = key.sign(SERVICE, "x", vec![], Duration::ZERO).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        let _ = expired;
        let parts: Vec<&str> = token.split('.').collect();
        let none = data_encoding::BASE64URL_NOPAD.encode(br#"{"alg":"none","typ":"JWT"}"#);
        assert!(key.verify(&format!("{none}.{}.", parts[1])).is_none());
        let again = SigningKey::from_pem(key.pem()).unwrap();
        assert!(again.verify(&token).is_some(), "the key survives its file");
    }
}
