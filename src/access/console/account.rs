//! Account page: the user's own password, second factor, sessions and tokens.

use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use qrcodegen::{QrCode, QrCodeEcc};
use serde::Deserialize;

use super::login::{CodeForm, Nothing};
use super::{SecretPage, browser, frame, see_other, when};
use crate::access::extract::{Posted, SignedIn};
use crate::access::sessions::{Client, DeskData};
use crate::access::tokens::NewToken;
use crate::access::{Actor, Means, PlatformRole, Role, accounts, store};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};

struct SessionView {
    id: i64,
    here: bool,
    agent: String,
    place: String,
    method: String,
    since: String,
    seen: String,
}

struct UserTokenView {
    id: i64,
    name: String,
    opens: String,
    expires: String,
    used: String,
}

#[derive(Template)]
#[template(path = "access/account.html")]
struct AccountPage {
    frame: Frame,
    error: String,
    name: String,
    role: String,
    password: bool,
    second_factor: bool,
    codes_left: i64,
    sessions: Vec<SessionView>,
    tokens: Vec<UserTokenView>,
    places: Vec<store::BelongsTo>,
    /// Scopes that the user can choose for a token: form value and label.
    openings: Vec<(String, String)>,
    /// Provider name and label. The name is empty if the provider is no longer configured.
    linked: Vec<(String, String)>,
    others: Vec<(String, String)>,
}

/// Lists the user's roles and all lower ones, lowest first. The form offers no role that would be refused.
fn openings(actor: &Actor, places: &[store::BelongsTo]) -> Vec<(String, String)> {
    let mut list = Vec::new();
    for place in places {
        for role in Role::NAMES {
            list.push((format!("{}/{role}", place.tenant), format!("{}, as {role}", place.tenant)));
            if *role == place.role {
                break;
            }
        }
    }
    let own = actor.platform.map(PlatformRole::as_str);
    for role in PlatformRole::NAMES.iter().filter(|_| own.is_some()) {
        list.push((format!("/{role}"), format!("the platform, as {role}")));
        if Some(*role) == own {
            break;
        }
    }
    list
}

async fn view(scope: &SignedIn, desk: &DeskData, error: String) -> Result<AccountPage, Error> {
    let account = accounts::own(&scope.actor)?;
    let mut conn = desk.pool.acquire().await?;
    let found = store::find_for_sign_in(&mut conn, &scope.actor.name).await?.ok_or(Error::NotFound)?;
    let here = match scope.actor.means {
        Means::Session { id, .. } => id,
        Means::Token { .. } => 0,
    };
    let places = store::tenants_of(&mut conn, account).await?;
    let sessions = store::list_sessions(&mut conn, account).await?;
    let tokens = store::list_own_tokens(&mut conn, account).await?;
    let issuers = store::list_issuers(&mut conn, account).await?;
    let known = |issuer: &String| match desk.providers.of_issuer(issuer) {
        Some(provider) => (provider.settings.name.clone(), provider.settings.label.clone()),
        None => (String::new(), issuer.clone()),
    };
    let linked: Vec<(String, String)> = issuers.iter().map(known).collect();
    let mut others = desk.providers.buttons();
    others.retain(|(name, _)| {
        desk.providers.get(name).is_ok_and(|provider| !issuers.contains(&provider.settings.issuer))
    });
    Ok(AccountPage {
        linked,
        others,
        frame: frame(&desk.keys, &scope.actor),
        error,
        name: scope.actor.name.clone(),
        role: scope.actor.platform.map(|role| role.as_str().to_owned()).unwrap_or_default(),
        openings: openings(&scope.actor, &places),
        password: found.password.is_some(),
        second_factor: found.second_factor,
        codes_left: store::count_recovery_codes(&mut conn, account).await?,
        places,
        sessions: sessions
            .into_iter()
            .map(|row| SessionView {
                here: row.id == here,
                id: row.id,
                agent: browser(&row.agent),
                place: row.place,
                method: row.method,
                since: when(row.created_at),
                seen: when(row.last_seen_at),
            })
            .collect(),
        tokens: tokens
            .into_iter()
            .map(|row| UserTokenView {
                id: row.id,
                opens: match row.tenant {
                    Some(tenant) => format!("{} of {tenant}", row.role),
                    None => format!("{} of the platform", row.role),
                },
                name: row.name,
                expires: when(row.expires_at),
                used: row.last_used_at.map_or_else(|| "never".to_owned(), when),
            })
            .collect(),
    })
}

/// GET /account
pub async fn account_page(scope: SignedIn, desk: DeskData) -> Result<HttpResponse, Error> {
    html::page(&view(&scope, &desk, String::new()).await?)
}

async fn after(scope: &SignedIn, desk: &DeskData, outcome: Result<(), Error>) -> Result<HttpResponse, Error> {
    super::after("/account", outcome, async |error| view(scope, desk, error).await).await
}

/// The current password and the new one.
#[derive(Deserialize)]
pub struct PasswordForm {
    #[serde(default)]
    current: String,
    new: String,
}

/// POST /account/password
pub async fn set_password(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<PasswordForm>,
) -> Result<HttpResponse, Error> {
    let client = Client::of(&req, &own);
    let outcome = desk.change_password(&client, &scope.actor, &form.0.current, &form.0.new).await;
    after(&scope, &desk, outcome).await
}

#[derive(Template)]
#[template(path = "access/second_factor_setup.html")]
struct SetupPage {
    frame: Frame,
    error: String,
    secret: String,
    picture: String,
    side: i32,
}

/// Draws a QR code as one SVG path: one square per dark module, with a quiet zone of four modules.
fn picture(text: &str) -> Result<(String, i32), Error> {
    use std::fmt::Write as _;
    let code = QrCode::encode_text(text, QrCodeEcc::Medium).map_err(Error::internal)?;
    let mut path = String::new();
    for y in 0..code.size() {
        for x in 0..code.size() {
            if code.get_module(x, y) {
                let _ = write!(path, "M{} {}h1v1h-1z", x + 4, y + 4);
            }
        }
    }
    Ok((path, code.size() + 8))
}

/// POST /account/second-factor: starts the setup.
pub async fn begin_second_factor(
    scope: SignedIn,
    desk: DeskData,
    _: Posted<Nothing>,
) -> Result<HttpResponse, Error> {
    match desk.begin_second_factor(scope.by()).await {
        Ok(setup) => {
            let (picture, side) = picture(&setup.address)?;
            let groups: Vec<&str> =
                setup.secret.as_bytes().chunks(4).filter_map(|part| std::str::from_utf8(part).ok()).collect();
            html::page(&SetupPage {
                frame: frame(&desk.keys, &scope.actor),
                error: String::new(),
                secret: groups.join(" "),
                picture,
                side,
            })
        }
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

/// POST /account/second-factor/confirmation: takes the first code.
pub async fn confirm_second_factor(
    scope: SignedIn,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    desk: DeskData,
    form: Posted<CodeForm>,
) -> Result<HttpResponse, Error> {
    match desk.confirm_second_factor(&Client::of(&req, &own), &scope.actor, &form.0.code).await {
        Ok(codes) => html::page(&SecretPage {
            frame: frame(&desk.keys, &scope.actor),
            title: "Recovery codes".into(),
            text: "The second factor is active. If you lose the device, each of these codes works once in place of a device code. Store them apart from the device. They are not shown again.",
            lines: codes,
            back: "/account".into(),
        }),
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

/// POST /account/second-factor/removal
pub async fn remove_second_factor(
    scope: SignedIn,
    desk: DeskData,
    _: Posted<Nothing>,
) -> Result<HttpResponse, Error> {
    let outcome = desk.remove_second_factor(scope.by()).await;
    after(&scope, &desk, outcome).await
}

/// Form: the provider.
#[derive(Deserialize)]
pub struct ProviderForm {
    name: String,
}

/// POST /account/providers/removal
pub async fn unlink(
    scope: SignedIn,
    desk: DeskData,
    form: Posted<ProviderForm>,
) -> Result<HttpResponse, Error> {
    let outcome = desk.unlink(scope.by(), &form.0.name).await;
    after(&scope, &desk, outcome).await
}

/// Form: the id of one item. Empty selects all others.
#[derive(Deserialize)]
pub struct WhichForm {
    #[serde(default)]
    pub(super) id: String,
}

impl WhichForm {
    pub(super) fn number(&self) -> Result<i64, Error> {
        self.id.parse().map_err(|_| Error::NotFound)
    }
}

/// POST /account/sessions/end
pub async fn end_session(
    scope: SignedIn,
    desk: DeskData,
    form: Posted<WhichForm>,
) -> Result<HttpResponse, Error> {
    if form.0.id.is_empty() {
        desk.end_other_sessions(scope.by()).await?;
    } else {
        desk.end_session(scope.by(), form.0.number()?).await?;
    }
    Ok(see_other("/account"))
}

/// Form: a new token of the user.
#[derive(Deserialize)]
pub struct UserTokenForm {
    name: String,
    /// `TENANT/ROLE`, or `/ROLE` for the platform.
    opens: String,
    days: String,
}

/// POST /account/tokens
pub async fn create_token(
    scope: SignedIn,
    desk: DeskData,
    form: Posted<UserTokenForm>,
) -> Result<HttpResponse, Error> {
    let form = form.0;
    let make = async {
        let new = NewToken::check(&scope.actor, &form.name, Some(form.days.parse().unwrap_or(0)))?;
        let (tenant, role) = form.opens.split_once('/').unwrap_or(("", ""));
        let tenant = Some(tenant).filter(|tenant| !tenant.is_empty());
        let authority = desk.own_authority(&scope.actor, tenant, role).await?;
        desk.create_own_token(scope.by(), authority, new).await
    };
    match make.await {
        Ok(made) => html::page(&SecretPage {
            frame: frame(&desk.keys, &scope.actor),
            title: format!("Token {}", form.name),
            text: "Store it in a password manager now. It is not shown again: Bulkhead keeps only its hash. Send it as Authorization: Bearer …",
            lines: vec![made.secret.expose().to_owned()],
            back: "/account".into(),
        }),
        Err(error) => after(&scope, &desk, Err(error)).await,
    }
}

/// POST /account/tokens/revocation
pub async fn revoke_token(
    scope: SignedIn,
    desk: DeskData,
    form: Posted<WhichForm>,
) -> Result<HttpResponse, Error> {
    desk.revoke_own_token(scope.by(), form.0.number()?).await?;
    Ok(see_other("/account"))
}
