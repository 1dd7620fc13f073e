//! The forms of a tenant's network page: grants and egress targets.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;
use sqlx::PgPool;

use super::tenant::{NetworkPageQuery, PageSources, view};
use crate::access::ManageConnections;
use crate::access::console::after;
use crate::access::extract::{Posted, TenantScope};
use crate::access::idempotency::{IdempotencyKey, Once};
use crate::config::Config;
use crate::driver::Driver;
use crate::error::Error;
use crate::ids::EgressName;
use crate::keys::Keys;
use crate::networks::actions;
use crate::networks::api::egress::{WishBody, check_wish};
use crate::networks::api::grants::check_offer;
use crate::reconcile::Waker;

async fn done<P>(
    scope: &TenantScope<P>,
    req: &HttpRequest,
    outcome: Result<(), Error>,
) -> Result<HttpResponse, Error> {
    let data = || Error::internal("a part is missing");
    let parts = PageSources {
        pool: req.app_data::<web::Data<PgPool>>().ok_or_else(data)?.clone(),
        keys: req.app_data::<web::Data<Keys>>().ok_or_else(data)?.clone(),
        config: req.app_data::<web::Data<Config>>().ok_or_else(data)?.clone(),
        driver: req.app_data::<web::Data<dyn Driver>>().ok_or_else(data)?.clone(),
    };
    let again = async |error| view(scope, &parts, &NetworkPageQuery::default(), error).await;
    after(&format!("/tenants/{}/network", scope.tenant.name), outcome, again).await
}

/// The form that offers a grant.
#[derive(Deserialize)]
pub struct OfferForm {
    app: String,
    tenant: String,
    #[serde(default)]
    to_app: String,
    #[serde(default)]
    days: String,
}

/// Parses an optional number of days.
pub(super) fn days(text: &str) -> Result<Option<i32>, Error> {
    match text.trim() {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| Error::Conflict("days must be a whole number, or empty for no expiry".into())),
    }
}

/// POST /tenants/{tenant}/network/grants
pub async fn offer(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    form: Posted<OfferForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        let OfferForm { app, tenant, to_app, days: wanted } = &form.0;
        let to_app = Some(to_app.as_str()).filter(|name| !name.is_empty());
        let offer = check_offer(app, tenant, to_app, days(wanted)?)?;
        let once = Once::of(IdempotencyKey::default(), &req, &[]);
        actions::offer(&pool, scope.by(), &once, &scope.tenant, &offer).await.map(drop)
    };
    let outcome = make.await;
    done(&scope, &req, outcome).await
}

/// The form that names a grant.
#[derive(Deserialize)]
pub struct GrantForm {
    id: i64,
}

/// POST /tenants/{tenant}/network/grants/acceptance
pub async fn accept(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    form: Posted<GrantForm>,
) -> Result<HttpResponse, Error> {
    let outcome = actions::accept(&pool, &waker, scope.by(), &scope.tenant, form.0.id).await;
    done(&scope, &req, outcome).await
}

/// POST /tenants/{tenant}/network/grants/end
pub async fn end(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    form: Posted<GrantForm>,
) -> Result<HttpResponse, Error> {
    let outcome = actions::end(&pool, &waker, scope.by(), &scope.tenant, form.0.id).await;
    done(&scope, &req, outcome).await
}

/// The form that requests an egress target.
#[derive(Deserialize)]
pub struct EgressForm {
    name: String,
    #[serde(default)]
    network: String,
    #[serde(default)]
    protocol: String,
    #[serde(default)]
    ports: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    days: String,
}

impl EgressForm {
    fn name(&self) -> Result<EgressName, Error> {
        self.name.trim().parse().map_err(|error: crate::ids::NameError| Error::Conflict(error.to_string()))
    }
}

/// POST /tenants/{tenant}/network/egress
pub async fn ask(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    config: web::Data<Config>,
    driver: web::Data<dyn Driver>,
    form: Posted<EgressForm>,
) -> Result<HttpResponse, Error> {
    let make = async {
        let ports = form.0.ports.split([',', ' ']).filter(|port| !port.is_empty()).map(str::parse);
        let ports = ports
            .collect::<Result<_, _>>()
            .map_err(|_| Error::Conflict("ports must be numbers, such as 443".into()))?;
        // A domain has a letter; an address or a network has only digits, dots and a slash.
        let place = form.0.network.trim().to_owned();
        let is_name = place.contains(|c: char| c.is_ascii_alphabetic());
        let (network, domain) = if is_name { (String::new(), place) } else { (place, String::new()) };
        let input = WishBody {
            network,
            domain,
            protocol: form.0.protocol.clone(),
            ports,
            reason: form.0.reason.clone(),
            days: days(&form.0.days)?,
        };
        let wish = check_wish(form.0.name()?, input, (&config, &**driver)).await?;
        actions::ask(&pool, scope.by(), &scope.tenant, &wish).await.map(drop)
    };
    let outcome = make.await;
    done(&scope, &req, outcome).await
}

/// POST /tenants/{tenant}/network/egress/withdrawal
pub async fn withdraw(
    scope: TenantScope<ManageConnections>,
    req: HttpRequest,
    pool: web::Data<PgPool>,
    waker: web::Data<Waker>,
    form: Posted<EgressForm>,
) -> Result<HttpResponse, Error> {
    let outcome = match form.0.name() {
        Ok(name) => actions::withdraw_target(&pool, &waker, scope.by(), &scope.tenant, &name).await,
        Err(error) => Err(error),
    };
    done(&scope, &req, outcome).await
}
