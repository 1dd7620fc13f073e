//! Page of the permission table, rendered from the table that the code enforces.

use actix_web::HttpResponse;
use askama::Template;

use crate::access::extract::Public;
use crate::access::{Effect, PERMISSIONS};
use crate::docs;
use crate::error::Error;
use crate::http::html::{self, Frame};

struct RowView {
    words: &'static str,
    tenant: &'static str,
    platform: &'static str,
    suspended: &'static str,
}

#[derive(Template)]
#[template(path = "docs/permissions.html")]
struct PermissionsPage {
    frame: Frame,
    chapters: Vec<docs::ChapterGroup>,
    rows: Vec<RowView>,
}

/// GET /docs/permissions
pub async fn permissions_page(_: Public) -> Result<HttpResponse, Error> {
    let rows = PERMISSIONS
        .iter()
        .map(|row| RowView {
            words: row.words,
            tenant: row.tenant.map_or("none", crate::access::Role::as_str),
            platform: row.platform.as_str(),
            suspended: match (row.tenant, row.effect) {
                (None, _) => "",
                (_, Effect::Reads) => "yes",
                (_, Effect::Changes) => "platform roles only",
            },
        })
        .collect();
    html::page(&PermissionsPage {
        frame: Frame::default(),
        chapters: docs::contents("/docs/permissions"),
        rows,
    })
}
