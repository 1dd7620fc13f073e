//! OpenID Connect: configured providers, requests to them, and checks of their responses. A provider is reached
//! only at the issuer and at the hosts that the settings name. Requests use TLS, follow no redirect, and are
//! limited to ten seconds and 256 KiB.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use openidconnect::{ClientId, ClientSecret, IssuerUrl, ProviderMetadataWithLogout};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::config::ProviderSettings;
use crate::error::Error;

mod admit;
pub mod claims;
mod vouch;
mod way;

pub use admit::Came;
pub use vouch::Back;
pub use way::Goal;

/// Lifetime of cached provider metadata. `SOONEST` is the minimum time between two fetches.
const FRESH: Duration = Duration::from_secs(3_600);
const SOONEST: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(10);
const LARGEST: usize = 256 * 1024;

/// Reason of a failure, for the log and for the user. Never contains a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OidcError(pub String);

impl OidcError {
    pub(super) fn because(what: &str, cause: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {cause}"))
    }
}

struct CachedMetadata {
    at: Instant,
    metadata: Arc<ProviderMetadataWithLogout>,
}

/// One provider.
pub struct Provider {
    /// Settings.
    pub settings: ProviderSettings,
    secret: Option<ClientSecret>,
    http: reqwest::Client,
    known: Mutex<Option<CachedMetadata>>,
    /// Time and reason of the last failed fetch. Callers within `SOONEST` get the same error without a wait.
    away: Mutex<Option<(Instant, OidcError)>>,
}

impl std::fmt::Debug for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Provider({})", self.settings.name)
    }
}

/// All providers, in the order of the settings.
#[derive(Debug, Clone, Default)]
pub struct Providers(Arc<Vec<Provider>>);

impl Providers {
    /// Loads the providers from the settings, with secrets and certificates from their files. Sends no request:
    /// an unreachable provider must not block other ways to sign in.
    pub fn load(settings: &[ProviderSettings]) -> Result<Self, Error> {
        let one = |settings: &ProviderSettings| {
            let read = |path: &std::path::Path| {
                std::fs::read_to_string(path)
                    .map_err(|error| Error::internal(format!("{}: {error}", path.display())))
            };
            let secret = settings.client_secret.as_deref().map(read).transpose()?;
            let mut http = crate::outgoing::client().timeout(PATIENCE).connect_timeout(PATIENCE);
            if let Some(ca) = &settings.ca {
                let certificates = reqwest::Certificate::from_pem_bundle(read(ca)?.as_bytes())
                    .map_err(|error| Error::internal(format!("{}: {error}", ca.display())))?;
                http = http.tls_certs_merge(certificates);
            }
            Ok(Provider {
                secret: secret.map(|text| ClientSecret::new(text.trim().to_owned())),
                http: http.build().map_err(Error::internal)?,
                known: Mutex::default(),
                away: Mutex::default(),
                settings: settings.clone(),
            })
        };
        Ok(Self(Arc::new(settings.iter().map(one).collect::<Result<_, Error>>()?)))
    }

    /// Returns name and label of each provider.
    #[must_use]
    pub fn buttons(&self) -> Vec<(String, String)> {
        self.0.iter().map(|p| (p.settings.name.clone(), p.settings.label.clone())).collect()
    }

    /// Returns the provider of this name.
    pub fn get(&self, name: &str) -> Result<&Provider, Error> {
        self.0.iter().find(|provider| provider.settings.name == name).ok_or(Error::NotFound)
    }

    /// Returns the provider of this issuer.
    #[must_use]
    pub fn of_issuer(&self, issuer: &str) -> Option<&Provider> {
        self.0.iter().find(|provider| provider.settings.issuer == issuer)
    }
}

impl Provider {
    fn client_id(&self) -> ClientId {
        ClientId::new(self.settings.client_id.clone())
    }

    /// Checks that an address is allowed: the issuer's own host, or a host of the settings. It must use the
    /// same scheme as the issuer.
    fn check_address(&self, what: &str, address: &openidconnect::url::Url) -> Result<(), OidcError> {
        let issuer = openidconnect::url::Url::parse(&self.settings.issuer)
            .map_err(|error| OidcError::because("the issuer", error))?;
        let own = (issuer.host_str(), issuer.port_or_known_default());
        let host = address.host_str().unwrap_or_default();
        let named = self.settings.hosts.iter().any(|known| known == host)
            && address.port_or_known_default() == Some(443);
        let same = (address.host_str(), address.port_or_known_default()) == own;
        if address.scheme() == issuer.scheme() && (same || named) {
            Ok(())
        } else {
            Err(OidcError(format!(
                "the {what} of the provider is at {host}, which is neither the issuer's host nor one of the provider's hosts in the settings"
            )))
        }
    }

    /// Sends one request. Returns an error if the response is a redirect or too large.
    async fn send(
        &self,
        request: openidconnect::HttpRequest,
    ) -> Result<openidconnect::HttpResponse, OidcError> {
        let address = openidconnect::url::Url::parse(&request.uri().to_string())
            .map_err(|error| OidcError::because("an address", error))?;
        self.check_address("endpoint", &address)?;
        let request = reqwest::Request::try_from(request)
            .map_err(|error| OidcError::because("a request", error.without_url()))?;
        let away =
            |error: reqwest::Error| OidcError::because("the provider does not respond", error.without_url());
        let mut answer = self.http.execute(request).await.map_err(away)?;
        if answer.status().is_redirection() {
            return Err(OidcError("the provider responds with a redirect, which is not followed".into()));
        }
        let mut response = http::Response::builder().status(answer.status());
        for (name, value) in answer.headers() {
            response = response.header(name, value);
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > LARGEST {
                return Err(OidcError("the provider's response is too large".into()));
            }
            body.extend_from_slice(&chunk);
        }
        response.body(body).map_err(|error| OidcError::because("a response", error))
    }

    /// Returns the provider's metadata and keys. Fetches them again after an hour or if `anew`, at most once
    /// every ten seconds.
    async fn metadata(&self, anew: bool) -> Result<Arc<ProviderMetadataWithLogout>, OidcError> {
        let mut known = self.known.lock().await;
        if let Some(known) = &*known {
            let age = known.at.elapsed();
            if age < SOONEST || (!anew && age < FRESH) {
                return Ok(Arc::clone(&known.metadata));
            }
        }
        if let Some((at, reason)) = &*self.away.lock().await
            && at.elapsed() < SOONEST
        {
            return Err(reason.clone());
        }
        let outcome = self.discover().await.map(Arc::new);
        *self.away.lock().await = outcome.as_ref().err().map(|reason| (Instant::now(), reason.clone()));
        let metadata = outcome?;
        *known = Some(CachedMetadata { at: Instant::now(), metadata: Arc::clone(&metadata) });
        Ok(metadata)
    }

    /// Returns the cached metadata, for callers that must not wait.
    fn known(&self) -> Option<Arc<ProviderMetadataWithLogout>> {
        self.known.try_lock().ok()?.as_ref().map(|known| Arc::clone(&known.metadata))
    }

    async fn discover(&self) -> Result<ProviderMetadataWithLogout, OidcError> {
        let issuer = IssuerUrl::new(self.settings.issuer.clone())
            .map_err(|error| OidcError::because("the issuer", error))?;
        let ask = |request| self.send(request);
        let metadata = ProviderMetadataWithLogout::discover_async(issuer, &ask)
            .await
            .map_err(|error| OidcError::because("discovery", flat(&error)))?;
        self.check_address("authorization endpoint", metadata.authorization_endpoint().url())?;
        if let Some(token) = metadata.token_endpoint() {
            self.check_address("token endpoint", token.url())?;
        }
        Ok(metadata)
    }
}

/// Formats an error and its causes on one line.
fn flat(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// Claims beyond the standard ones.
pub(super) type Extra = HashMap<String, serde_json::Value>;
