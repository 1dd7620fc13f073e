//! Authentication at a provider: the authorization code flow with PKCE, and every check of the resulting ID
//! token.

use openidconnect::core::{
    CoreAuthPrompt, CoreAuthenticationFlow, CoreClient, CoreGenderClaim, CoreJsonWebKey,
    CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm,
};
use openidconnect::{
    AccessTokenHash, AdditionalClaims, AuthorizationCode, CsrfToken, IdToken, IdTokenVerifier,
    OAuth2TokenResponse, PkceCodeChallenge, RedirectUrl, Scope, TokenResponse,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::claims::{self, ClaimedRoles};
use super::way::{Goal, LIFE, Way};
use super::{Extra, OidcError, Provider, flat};
use crate::keys::Keys;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct AllClaims {
    #[serde(flatten)]
    all: Extra,
}
impl AdditionalClaims for AllClaims {}

type Token = IdToken<AllClaims, CoreGenderClaim, CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm>;

/// Accepted signature algorithms, all with a public key. `none` and shared-secret algorithms are rejected.
const ALGORITHMS: [CoreJwsSigningAlgorithm; 3] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
];

/// A user that a provider has authenticated.
#[derive(Debug)]
pub(super) struct Vouched {
    pub(super) issuer: String,
    pub(super) subject: String,
    pub(super) preferred: Option<String>,
    pub(super) email: Option<String>,
    pub(super) display: Option<String>,
    pub(super) given: ClaimedRoles,
    pub(super) authenticated: Option<i64>,
}

/// Query parameters of the callback.
#[derive(Debug, Default, Deserialize)]
pub struct Back {
    /// The code.
    #[serde(default)]
    pub code: String,
    /// The state.
    #[serde(default)]
    pub state: String,
    /// The issuer (RFC 9207).
    pub iss: Option<String>,
    /// Error code of the provider.
    pub error: Option<String>,
}

impl Provider {
    /// Returns the address to send the browser to, and the value of its cookie for this attempt.
    pub async fn way_there(
        &self,
        keys: &Keys,
        callback: &str,
        goal: Goal,
    ) -> Result<(String, String), OidcError> {
        let metadata = self.metadata(false).await?;
        let name = &self.settings.name;
        let way = Way::new(keys, name, goal);
        let client = CoreClient::new(self.client_id(), metadata.issuer().clone(), metadata.jwks().clone())
            .set_auth_uri(metadata.authorization_endpoint().clone())
            .set_redirect_uri(redirect(callback)?);
        let (state, nonce) = (way.state(), way.nonce(keys, name));
        let challenge = PkceCodeChallenge::from_code_verifier_sha256(&way.verifier(keys, name));
        let mut request = client
            .authorize_url(CoreAuthenticationFlow::AuthorizationCode, || CsrfToken::new(state), || nonce)
            .set_pkce_challenge(challenge);
        for scope in self.settings.scopes.iter().filter(|scope| *scope != "openid") {
            request = request.add_scope(Scope::new(scope.clone()));
        }
        if goal != Goal::SignIn {
            // Forces the provider to authenticate the user again, despite an existing session there.
            request = request.add_prompt(CoreAuthPrompt::Login).set_max_age(std::time::Duration::ZERO);
        }
        let (address, _, _) = request.url();
        Ok((address.to_string(), way.text))
    }

    /// Exchanges the code for the ID token and returns its claims. Fails if any single check fails.
    pub(super) async fn vouch(
        &self,
        keys: &Keys,
        callback: &str,
        way: &Way,
        back: &Back,
    ) -> Result<Vouched, OidcError> {
        let name = &self.settings.name;
        let metadata = self.metadata(false).await?;
        let token_endpoint = metadata
            .token_endpoint()
            .cloned()
            .ok_or_else(|| OidcError("the provider has no token endpoint".into()))?;
        let mut client =
            CoreClient::new(self.client_id(), metadata.issuer().clone(), metadata.jwks().clone())
                .set_token_uri(token_endpoint)
                .set_redirect_uri(redirect(callback)?);
        if let Some(secret) = &self.secret {
            client = client.set_client_secret(secret.clone());
        }
        let ask = |request| self.send(request);
        let answer = client
            .exchange_code(AuthorizationCode::new(back.code.clone()))
            .set_pkce_verifier(way.verifier(keys, name))
            .request_async(&ask)
            .await
            .map_err(|error| OidcError::because("the code", told(&error)))?;
        let text =
            answer.id_token().ok_or_else(|| OidcError("the provider sends no ID token".into()))?.to_string();
        let token: Token = text.parse().map_err(|_| OidcError("the ID token cannot be read".into()))?;
        let nonce = way.nonce(keys, name);
        let mut verifier = self.verifier(&metadata);
        if token.claims(&verifier, &nonce).is_err() {
            // The provider's keys may have changed since they were fetched.
            verifier = self.verifier(&*self.metadata(true).await?);
        }
        let found = token
            .claims(&verifier, &nonce)
            .map_err(|error| OidcError::because("the ID token", flat(&error)))?;
        if let Some(wanted) = found.access_token_hash() {
            let refused =
                |error: &dyn std::error::Error| OidcError::because("the access token's hash", flat(error));
            let algorithm = token.signing_alg().map_err(|error| refused(&error))?;
            let key = token.signing_key(&verifier).map_err(|error| refused(&error))?;
            let real = AccessTokenHash::from_token(answer.access_token(), algorithm, key)
                .map_err(|error| refused(&error))?;
            if real != *wanted {
                return Err(OidcError("the access token is not the one that belongs to the ID token".into()));
            }
        }
        if found.authorized_party().is_some_and(|party| **party != self.settings.client_id) {
            return Err(OidcError("the ID token was made for another party".into()));
        }
        let extra = &found.additional_claims().all;
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if extra.get("nbf").and_then(serde_json::Value::as_i64).is_some_and(|nbf| nbf > now + 60) {
            return Err(OidcError("the ID token is not valid yet".into()));
        }
        if (found.issue_time().timestamp() - now).abs() > LIFE {
            return Err(OidcError("the ID token was not issued just now".into()));
        }
        let subject = found.subject().as_str();
        if subject.is_empty() || subject.len() > 255 || !subject.is_ascii() {
            return Err(OidcError("the subject is not 1 to 255 ASCII characters".into()));
        }
        let local = |text: Option<&openidconnect::LocalizedClaim<openidconnect::EndUserName>>| {
            text.and_then(|text| text.get(None)).map(|name| name.as_str().to_owned())
        };
        Ok(Vouched {
            issuer: self.settings.issuer.clone(),
            subject: subject.to_owned(),
            preferred: found.preferred_username().map(|name| name.as_str().to_owned()),
            email: found.email().map(|email| email.as_str().to_owned()),
            display: local(found.name()),
            given: claims::roles(&self.settings, extra),
            authenticated: found.auth_time().map(|at| at.timestamp()),
        })
    }

    fn verifier(
        &self,
        metadata: &openidconnect::ProviderMetadataWithLogout,
    ) -> IdTokenVerifier<'static, CoreJsonWebKey> {
        let (id, issuer, keys) = (self.client_id(), metadata.issuer().clone(), metadata.jwks().clone());
        let verifier = match &self.secret {
            Some(secret) => IdTokenVerifier::new_confidential_client(id, secret.clone(), issuer, keys),
            None => IdTokenVerifier::new_public_client(id, issuer, keys),
        };
        verifier.set_allowed_algs(ALGORITHMS).set_other_audience_verifier_fn(|_| false)
    }

    /// Returns the address that signs the user out at the provider, if the provider supports it.
    pub fn way_out(&self, home: &str) -> Option<String> {
        let metadata = self.known()?;
        let mut address = metadata.additional_metadata().end_session_endpoint.as_ref()?.url().clone();
        self.check_address("end-session endpoint", &address).ok()?;
        address
            .query_pairs_mut()
            .append_pair("client_id", &self.settings.client_id)
            .append_pair("post_logout_redirect_uri", home);
        Some(address.to_string())
    }
}

fn redirect(callback: &str) -> Result<RedirectUrl, OidcError> {
    RedirectUrl::new(callback.to_owned()).map_err(|error| OidcError::because("our own address", error))
}

/// Describes why a code was rejected, without the provider's free text, which may contain anything.
fn told<RE, T>(error: &openidconnect::RequestTokenError<RE, T>) -> String
where
    RE: std::error::Error + 'static,
    T: openidconnect::ErrorResponse + 'static,
{
    match error {
        openidconnect::RequestTokenError::ServerResponse(_) => "the provider rejects the code".into(),
        openidconnect::RequestTokenError::Request(inner) => flat(inner),
        openidconnect::RequestTokenError::Parse(..) => "the provider's response cannot be read".into(),
        openidconnect::RequestTokenError::Other(text) => text.clone(),
    }
}
