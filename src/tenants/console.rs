//! Page of tenants: the list for platform roles.

use actix_web::{HttpRequest, HttpResponse, web};
use askama::Template;
use sqlx::PgPool;

use super::{Tenant, store};
use crate::access::console::platform_frame;
use crate::access::{PlatformScope, ReadPlatform};
use crate::db::{self, Page, PageQuery, Within};
use crate::error::Error;
use crate::http::html::Frame;
use crate::http::{OwnAddress, html};
use crate::keys::Keys;
use crate::quotas::{Amount, Resource};

struct TenantItem {
    name: String,
    display_name: String,
    state: String,
    mark: &'static str,
    apps: String,
    cpu: String,
    memory: String,
    registry: String,
}

#[derive(Template)]
#[template(path = "tenants/list.html")]
struct ListPage {
    frame: Frame,
    rows: Vec<TenantItem>,
    next: String,
    address: String,
}

/// Returns the style class of a tenant's state.
#[must_use]
pub fn mark(state: &str) -> &'static str {
    match state {
        "active" => "running",
        "suspended" => "attention",
        "offboarding" => "changing",
        _ => "stopped",
    }
}

/// Formats bytes for display.
#[must_use]
pub fn bytes(n: i64) -> String {
    let units = [("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    for (unit, shift) in units {
        let size = 1_i64 << shift;
        if n >= size {
            let tenths = (i128::from(n) * 10 / i128::from(size)).to_string();
            let (whole, tenth) = tenths.split_at(tenths.len() - 1);
            return if tenth == "0" {
                format!("{whole} {unit}B")
            } else {
                format!("{whole}.{tenth} {unit}B")
            };
        }
    }
    format!("{n} B")
}

/// Formats thousandths of a core for display.
#[must_use]
pub fn cores(millis: i64) -> String {
    let text = format!("{}.{:03}", millis / 1_000, millis % 1_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn of(amount: Amount, show: fn(i64) -> String) -> String {
    format!("{} of {}", show(amount.used), show(amount.limit))
}

impl From<Tenant> for TenantItem {
    fn from(tenant: Tenant) -> Self {
        let quota = &tenant.quota;
        Self {
            name: tenant.name.to_string(),
            mark: mark(&tenant.state),
            apps: of(quota.of(Resource::Apps), |n| n.to_string()),
            cpu: of(quota.of(Resource::Cpu), cores),
            memory: of(quota.of(Resource::Memory), bytes),
            registry: of(quota.of(Resource::RegistryBytes), bytes),
            display_name: if tenant.display_name == tenant.name.as_str() {
                String::new()
            } else {
                tenant.display_name
            },
            state: tenant.state,
        }
    }
}

/// GET /tenants
pub async fn list_page(
    scope: PlatformScope<ReadPlatform>,
    req: HttpRequest,
    own: web::Data<OwnAddress>,
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, Error> {
    let limit = query.limit()?;
    let mut conn = db::begin(&pool, Within::Platform).await?;
    let rows = store::list_tenants(&mut conn, &query.after_text()?, limit + 1).await?;
    let page = Page::new(rows.into_iter().map(TenantItem::from).collect(), limit, |row: &TenantItem| {
        row.name.clone()
    });
    html::page(&ListPage {
        frame: platform_frame(&keys, &scope.actor, "Tenants"),
        rows: page.items,
        next: page.next.unwrap_or_default(),
        address: own.of(&req).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_well() {
        assert_eq!(bytes(8 << 30), "8 GiB");
        assert_eq!(bytes((1 << 30) + (1 << 29)), "1.5 GiB");
        assert_eq!(bytes(17), "17 B");
        assert_eq!(cores(4_000), "4");
        assert_eq!(cores(250), "0.25");
    }
}
