//! Renders askama templates into responses.

use actix_web::HttpResponse;
use askama::Template;

use crate::error::Error;

/// An entry of the navigation.
#[derive(Debug, Clone)]
pub struct NavLink {
    /// Text of the link.
    pub label: &'static str,
    /// URL path.
    pub href: String,
    /// Whether it is the current page.
    pub here: bool,
}

/// The frame of every page: the signed-in account and the navigation.
#[derive(Debug, Clone, Default)]
pub struct Frame {
    /// Name of the account; empty on a page without sign-in.
    pub who: String,
    /// CSRF token of the account's forms.
    pub form: String,
    /// Navigation entries; empty where there is only one page.
    pub rail: Vec<NavLink>,
    /// Heading of the navigation, such as the tenant's name.
    pub rail_name: String,
}

/// Renders a page.
pub fn page(template: &impl Template) -> Result<HttpResponse, Error> {
    let text = template.render().map_err(Error::internal)?;
    Ok(HttpResponse::Ok().content_type("text/html; charset=utf-8").body(text))
}

#[derive(Template)]
#[template(path = "errors/error.html")]
struct ErrorPage<'a> {
    frame: Frame,
    confirm: bool,
    faults: Vec<&'a str>,
    status: &'a str,
    title: &'a str,
    detail: &'a str,
    code: &'a str,
    docs: &'a str,
    request_id: &'a str,
    sign_in: bool,
}

/// Renders the page for an error, from its problem+json.
#[must_use]
pub fn error_page(problem: &serde_json::Value) -> String {
    let text = |key: &str| problem[key].as_str().unwrap_or_default();
    ErrorPage {
        frame: Frame::default(),
        confirm: text("code") == "BH-407",
        faults: problem["faults"]
            .as_array()
            .map(|faults| faults.iter().filter_map(|fault| fault["message"].as_str()).collect())
            .unwrap_or_default(),
        status: &problem["status"].to_string(),
        title: text("title"),
        detail: text("detail"),
        code: text("code"),
        docs: text("type"),
        request_id: text("request_id"),
        sign_in: problem["status"] == 401,
    }
    .render()
    .unwrap_or_else(|_| text("title").to_owned())
}
