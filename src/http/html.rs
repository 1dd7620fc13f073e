//! Pages: askama templates into answers.

use actix_web::HttpResponse;
use askama::Template;

use crate::error::Error;

/// Renders a page.
pub fn page(template: &impl Template) -> Result<HttpResponse, Error> {
    let text = template.render().map_err(Error::internal)?;
    Ok(HttpResponse::Ok().content_type("text/html; charset=utf-8").body(text))
}

#[derive(Template)]
#[template(path = "errors/error.html")]
struct ErrorPage<'a> {
    status: &'a str,
    title: &'a str,
    detail: &'a str,
    code: &'a str,
    docs: &'a str,
    request_id: &'a str,
    sign_in: bool,
}

/// The page for an error, from its problem+json.
#[must_use]
pub fn error_page(problem: &serde_json::Value) -> String {
    let text = |key: &str| problem[key].as_str().unwrap_or_default();
    ErrorPage {
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
