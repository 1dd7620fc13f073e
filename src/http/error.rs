//! Turns the platform's error into a response: RFC 9457 problem+json, or a page for a browser. No other code
//! knows status codes.

use std::rc::Rc;

use actix_web::body::BoxBody;
use actix_web::dev::ServiceResponse;
use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use serde_json::json;

use crate::error::Error;
use crate::fault::catalogue::explanation;

fn status(error: &Error) -> StatusCode {
    match error {
        Error::Malformed(_) => StatusCode::BAD_REQUEST,
        Error::Unauthenticated => StatusCode::UNAUTHORIZED,
        Error::Forbidden(_) | Error::Unconfirmed => StatusCode::FORBIDDEN,
        Error::Throttled(_) => StatusCode::TOO_MANY_REQUESTS,
        Error::NotFound => StatusCode::NOT_FOUND,
        Error::AlreadyExists(_) | Error::Conflict(_) => StatusCode::CONFLICT,
        Error::PreconditionFailed(..) => StatusCode::PRECONDITION_FAILED,
        Error::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        Error::Invalid(_) | Error::QuotaExceeded(_) => StatusCode::UNPROCESSABLE_ENTITY,
        Error::Unavailable(..) => StatusCode::SERVICE_UNAVAILABLE,
        Error::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Carried in the response until the outermost layer renders it with the request id.
struct Problem(serde_json::Value);

impl ResponseError for Error {
    fn status_code(&self) -> StatusCode {
        status(self)
    }

    fn error_response(&self) -> HttpResponse<BoxBody> {
        if let Self::Internal(cause) = self {
            tracing::error!(%cause, "internal error");
        }
        let code = self.code();
        let title = explanation(&code.to_string()).map_or("Error", |entry| entry.title);
        let status = status(self);
        let mut body = json!({
            "type": code.docs(), "title": title, "status": status.as_u16(),
            "code": code, "detail": self.to_string(),
        });
        if let Self::Invalid(faults) | Self::QuotaExceeded(faults) = self {
            body["faults"] = json!(faults);
        }
        let mut response = HttpResponse::build(status);
        match self {
            Self::Unavailable(_, after) | Self::Throttled(after) => {
                response.insert_header((header::RETRY_AFTER, after.as_secs().max(1)));
            }
            Self::Unauthenticated => {
                response.insert_header((header::WWW_AUTHENTICATE, "Bearer realm=\"bulkhead\""));
            }
            Self::PreconditionFailed(generation, _) if *generation > 0 => {
                response.insert_header((header::ETAG, format!("\"{generation}\"")));
            }
            _ => {}
        }
        let mut response = response.finish();
        response.extensions_mut().insert(Rc::new(Problem(body)));
        response
    }
}

fn wants_page(response: &ServiceResponse<BoxBody>) -> bool {
    let accept = response.request().headers().get(header::ACCEPT).and_then(|v| v.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/html"))
        && !response.request().path().starts_with("/api/")
}

/// Renders the body of an error. Errors of the web framework (an unknown path, a body over its limit) get the
/// same form.
#[must_use]
pub fn render(response: ServiceResponse<BoxBody>, request_id: &str) -> ServiceResponse<BoxBody> {
    if response.status().as_u16() < 400 {
        return response;
    }
    let known = response.response().extensions().get::<Rc<Problem>>().cloned();
    // Keep a page that a handler rendered, such as a failed sign-in: it explains the error better.
    let kind = response.response().headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    if known.is_none() && kind.is_some_and(|kind| kind.starts_with("text/html")) {
        return response;
    }
    let (request, response) = {
        if known.is_some() {
            response.into_parts()
        } else {
            let error = match response.status() {
                StatusCode::NOT_FOUND => Error::NotFound,
                StatusCode::PAYLOAD_TOO_LARGE => Error::TooLarge(super::BODY_LIMIT),
                StatusCode::METHOD_NOT_ALLOWED => {
                    Error::Malformed("this URL does not support the method".into())
                }
                status if status.is_client_error() => Error::Malformed("the request cannot be read".into()),
                _ => Error::internal("an answer without an error"),
            };
            let (request, _) = response.into_parts();
            (request, error.error_response())
        }
    };
    let problem = response.extensions().get::<Rc<Problem>>().cloned();
    let Some(problem) = problem else { return ServiceResponse::new(request, response) };
    let mut body = problem.0.clone();
    body["request_id"] = json!(request_id);
    let served = ServiceResponse::new(request, response);
    let page = wants_page(&served);
    let (request, mut response) = served.into_parts();
    let (kind, text) = if page {
        ("text/html; charset=utf-8", super::html::error_page(&body))
    } else {
        ("application/problem+json", body.to_string())
    };
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    let response = response.set_body(BoxBody::new(text));
    ServiceResponse::new(request, response)
}
