//! Answers that no handler makes: for a head that is too large, too slow or invalid, and for a full server.

use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::body::{BoxBody, MessageBody};
use actix_web::http::{StatusCode, header};
use serde_json::json;

use crate::error::Error;
use crate::fault::catalogue::explanation;

fn detail(status: StatusCode) -> &'static str {
    match status {
        StatusCode::REQUEST_TIMEOUT => {
            "the request did not arrive within its time; send the head within 10 seconds and the body without pauses"
        }
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            "the headers of the request are larger than 16 KiB, or too many; send fewer"
        }
        StatusCode::TOO_MANY_REQUESTS => {
            "too many connections or requests come from this address; close some and try again"
        }
        StatusCode::SERVICE_UNAVAILABLE => "the server has no room for another connection; try again",
        _ => {
            "the request is not valid HTTP/1.1; send a request line, headers, and at most one length of the body"
        }
    }
}

/// Builds the answer with this status, as problem+json with the headers of every answer. It closes the
/// connection.
#[must_use]
pub(super) fn response(status: StatusCode, secure: bool) -> HttpResponse<BoxBody> {
    let id = crate::http::fresh_id();
    let again = Duration::from_secs(1);
    let code = match status {
        StatusCode::TOO_MANY_REQUESTS => Error::Throttled(again).code(),
        StatusCode::SERVICE_UNAVAILABLE => Error::Unavailable(String::new(), again).code(),
        _ => Error::Malformed(String::new()).code(),
    };
    let title = explanation(&code.to_string()).map_or("Error", |entry| entry.title);
    let body = json!({
        "type": code.docs(), "title": title, "status": status.as_u16(), "code": code,
        "detail": detail(status), "request_id": id,
    });
    let mut response = HttpResponse::build(status);
    response.content_type("application/problem+json");
    response.force_close();
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.insert_header((header::RETRY_AFTER, "1"));
    }
    let mut response = response.body(body.to_string());
    crate::http::headers(response.headers_mut(), &id, secure);
    tracing::debug!(request_id = id, status = status.as_u16(), "refused before any handler");
    response
}

/// Builds the same answer as bytes, for a connection without a dispatcher.
#[must_use]
pub(super) fn bytes(status: StatusCode, secure: bool) -> Vec<u8> {
    let response = response(status, secure);
    let mut out = format!("HTTP/1.1 {status}\r\nconnection: close\r\n").into_bytes();
    for (name, value) in response.headers() {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    let body = response.into_body().try_into_bytes().unwrap_or_default();
    out.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    out.extend_from_slice(&body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_bears_the_headers_of_every_answer() {
        for status in [400, 408, 429, 431, 503] {
            let text = String::from_utf8(bytes(StatusCode::from_u16(status).unwrap(), true)).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
            let names: Vec<&str> = head.lines().skip(1).map(|line| line.split(':').next().unwrap()).collect();
            for name in [
                "x-request-id",
                "x-content-type-options",
                "content-security-policy",
                "referrer-policy",
                "strict-transport-security",
                "cache-control",
                "content-length",
            ] {
                assert_eq!(names.iter().filter(|own| **own == name).count(), 1, "{status}: {name}");
            }
            assert_eq!(names.contains(&"retry-after"), status == 429 || status == 503);
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(body["status"], status);
            assert!(body["request_id"].as_str().unwrap().len() == 16);
        }
    }
}
