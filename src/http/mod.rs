//! Layers for every request: request id, headers, body limits, panics, errors.

use std::future::{Ready, ready};
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{FromRequest, HttpMessage, HttpRequest, web};
use futures_util::FutureExt;
use serde::de::DeserializeOwned;

use crate::error::Error as PlatformError;
use crate::fault::{Code, Fault, Kind};
use crate::telemetry::Metrics;

pub mod asked;
pub mod error;
pub mod front;
pub mod html;
mod source;

pub use source::{Proxies, network};

/// Maximum body of a JSON or YAML request, in bytes.
pub const BODY_LIMIT: usize = 64 * 1024;

/// The id of a request: in the response's `X-Request-Id`, in every log line and in the audit log.
#[derive(Debug, Clone)]
pub struct RequestId(pub Rc<str>);

impl FromRequest for RequestId {
    type Error = PlatformError;
    type Future = Ready<Result<Self, PlatformError>>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Ok(request_id(req)))
    }
}

/// Returns the id that the outermost layer gave this request.
#[must_use]
pub fn request_id(req: &HttpRequest) -> RequestId {
    req.extensions().get::<RequestId>().cloned().unwrap_or_else(|| RequestId(Rc::from("none")))
}

/// The remaining rate of the request's account. The extractor sets it, and the response reports it
/// (draft-ietf-httpapi-ratelimit-headers-03).
#[derive(Debug, Clone, Copy)]
pub struct RateLimit {
    /// Maximum burst of requests.
    pub limit: u64,
    /// Requests that remain in the burst.
    pub remaining: u64,
    /// Seconds until the burst is full again.
    pub reset: u64,
}

impl RateLimit {
    fn tell(self, headers: &mut header::HeaderMap) {
        for (name, value) in [
            ("ratelimit-limit", self.limit),
            ("ratelimit-remaining", self.remaining),
            ("ratelimit-reset", self.reset),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
        }
    }
}

/// Returns a random text of 16 lower-case letters and digits.
fn fresh_id() -> String {
    data_encoding::BASE32_NOPAD.encode(&rand::random::<[u8; 10]>()).to_ascii_lowercase()
}

/// The outermost layer. It assigns the request id, turns a panic into a 500 while the service continues,
/// renders errors, and sets the headers of every response.
pub async fn outermost<B: MessageBody + 'static>(
    req: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let id = fresh_id();
    req.extensions_mut().insert(RequestId(Rc::from(id.as_str())));
    // Log the pattern, never the path: a path can contain single-use links.
    let registry = req.path().starts_with("/v2/") || req.path() == "/auth/token";
    let method = req.method().clone();
    let secure = req.app_data::<web::Data<OwnAddress>>().is_some_and(|own| own.is_secure(req.request()));
    let metrics = req.app_data::<web::Data<Metrics>>().cloned();
    let outcome = AssertUnwindSafe(next.call(req)).catch_unwind().await;
    let mut response = if let Ok(response) = outcome {
        response?.map_into_boxed_body()
    } else {
        tracing::error!(request_id = id, %method, "a handler panicked");
        return Err(panicked(&id, secure));
    };
    if !registry {
        response = error::render(response, &id);
    }
    if let Some(metrics) = metrics {
        let class = usize::from(response.status().as_u16() / 100).min(5);
        Metrics::count(&metrics.requests[class]);
    }
    headers(response.headers_mut(), &id, secure);
    let rate = response.request().extensions().get::<RateLimit>().copied();
    if let Some(rate) = rate {
        rate.tell(response.headers_mut());
    }
    let pattern = response.request().match_pattern().unwrap_or_default();
    tracing::debug!(request_id = id, %method, pattern, status = response.status().as_u16(), "answered");
    Ok(response)
}

/// Builds the response for a panicked handler: an internal error without details.
fn panicked(id: &str, secure: bool) -> actix_web::Error {
    let error = PlatformError::internal("panic");
    let body = serde_json::json!({
        "type": error.code().docs(), "title": "A mistake of ours", "status": 500, "code": error.code(),
        "detail": "internal error", "request_id": id,
    });
    let mut response = actix_web::HttpResponse::InternalServerError()
        .content_type("application/problem+json")
        .body(body.to_string());
    headers(response.headers_mut(), id, secure);
    actix_web::error::InternalError::from_response(error, response).into()
}

fn headers(headers: &mut header::HeaderMap, id: &str, secure: bool) {
    let fixed = [
        ("x-content-type-options", "nosniff"),
        // Not no-referrer: browsers would then send the console's own forms with "Origin: null", like a foreign
        // site's.
        ("referrer-policy", "same-origin"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
        (
            "content-security-policy",
            "default-src 'none'; style-src 'self'; img-src 'self'; script-src 'self'; form-action 'self'; \
             frame-ancestors 'none'; base-uri 'none'",
        ),
    ];
    for (name, value) in fixed {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    if secure {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if let Ok(value) = HeaderValue::from_str(id) {
        headers.insert(HeaderName::from_static("x-request-id"), value);
    }
}

/// The address by which clients know this server: the configured one, or the Host header on loopback.
#[derive(Debug, Clone)]
pub struct OwnAddress {
    /// Configured address without a trailing slash.
    pub external: Option<String>,
    /// Proxies whose forwarded client address is trusted.
    pub proxies: Proxies,
}

impl OwnAddress {
    /// Returns scheme and authority, such as `http://127.0.0.1:8080`. None if the Host header is not
    /// this server's address; do not build links from it then.
    #[must_use]
    pub fn of(&self, req: &HttpRequest) -> Option<String> {
        if let Some(external) = &self.external {
            return Some(external.clone());
        }
        let host = req.headers().get(header::HOST)?.to_str().ok()?;
        let scheme = if self.is_secure(req) { "https" } else { "http" };
        crate::config::is_loopback(host).then(|| format!("{scheme}://{host}"))
    }

    /// Returns whether browsers reach this server over TLS. A client's own claim is ignored.
    #[must_use]
    pub fn is_secure(&self, req: &HttpRequest) -> bool {
        match &self.external {
            Some(external) => external.starts_with("https://"),
            None => front::is_secure(req),
        }
    }

    /// Returns the client's address: the peer, or the client that a trusted proxy reports.
    #[must_use]
    pub fn client(&self, req: &HttpRequest) -> IpAddr {
        let Some(peer) = req.peer_addr() else { return IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED) };
        let lines: Vec<&[u8]> =
            req.headers().get_all("x-forwarded-for").map(header::HeaderValue::as_bytes).collect();
        self.proxies.client(peer.ip(), lines.into_iter())
    }

    /// Returns whether a change comes from the console's own pages. Browsers send `Origin` with each POST, and
    /// it must be this server's address.
    #[must_use]
    pub fn same_origin(&self, req: &HttpRequest) -> bool {
        let Some(own) = self.of(req) else { return false };
        let site = req.headers().get("sec-fetch-site").and_then(|v| v.to_str().ok());
        if site.is_some_and(|site| site != "same-origin" && site != "none") {
            return false;
        }
        match req.headers().get(header::ORIGIN) {
            Some(origin) => origin.to_str().is_ok_and(|origin| origin == own),
            None => site.is_some(),
        }
    }
}

/// Reads a JSON body into a closed type. Unknown fields, wrong types and missing fields are faults with their
/// position.
pub fn parse_json<T: DeserializeOwned>(req: &HttpRequest, body: &[u8]) -> Result<T, PlatformError> {
    let kind = req.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    if !kind.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case("application/json") {
        return Err(PlatformError::Malformed("send the body with Content-Type: application/json".into()));
    }
    serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        // serde's text names fields and types; cut off a value that it would echo.
        let text = error.to_string();
        let text = text.split(" at line ").next().unwrap_or_default();
        let message = if text.starts_with("invalid type") || text.starts_with("invalid value") {
            format!("a value has the wrong type{}", text.rfind(", expected").map_or("", |at| &text[at..]))
        } else {
            text.to_owned()
        };
        let place = |n: usize| u32::try_from(n).unwrap_or(0);
        PlatformError::fault(Fault::new(Code(426), Kind::Invalid, "", message).at(place(line), place(column)))
    })
}
