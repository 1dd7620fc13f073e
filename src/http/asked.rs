//! The inputs of a request beyond its URL. A handler declares the inputs that it accepts by its arguments:
//! [`Query`], [`Body`], [`Expected`]. Any other input that would change the meaning of a request is refused by
//! name, so no client believes that an ignored input took effect.

use std::future::{Ready, ready};
use std::ops::Deref;
use std::pin::Pin;

use actix_web::dev::Payload;
use actix_web::http::{Method, header};
use actix_web::{FromRequest, HttpMessage, HttpRequest, web};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::db::expected::{Expected, Tags};
use crate::error::Error;
use crate::fault::plain;

/// The header of a request that may be sent again.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Headers that change the meaning of a request. Each is refused unless an argument of the handler accepts it.
const MEANING: &[(&str, &str)] = &[
    ("if-match", "this operation takes no conditions"),
    ("if-none-match", "this operation takes no conditions; a PUT of an app takes If-None-Match: *"),
    ("if-modified-since", "no answer has a Last-Modified; use If-Match with the ETag"),
    ("if-unmodified-since", "no answer has a Last-Modified; use If-Match with the ETag"),
    ("if-range", "partial answers are not supported"),
    ("range", "partial answers are not supported; lists take limit and cursor"),
    ("content-range", "a body replaces the whole object"),
    ("x-http-method-override", "send the request with its real method"),
    ("x-http-method", "send the request with its real method"),
    ("x-method-override", "send the request with its real method"),
];

/// The inputs that the handler's arguments have accepted so far.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "a set of marks")]
struct AcceptedInputs {
    query: bool,
    body: bool,
    conditions: bool,
    key: bool,
}

fn take(req: &HttpRequest, mark: impl FnOnce(&mut AcceptedInputs)) {
    let mut taken = taken(req);
    mark(&mut taken);
    req.extensions_mut().insert(taken);
}

fn taken(req: &HttpRequest) -> AcceptedInputs {
    req.extensions().get::<AcceptedInputs>().copied().unwrap_or_default()
}

/// Marks that the handler stores its answer under the request's `Idempotency-Key` itself.
pub fn takes_key(req: &HttpRequest) {
    take(req, |taken| taken.key = true);
}

/// Returns whether the handler stores its answer itself.
#[must_use]
pub fn has_taken_key(req: &HttpRequest) -> bool {
    taken(req).key
}

/// The body of a request.
#[derive(Debug, Clone)]
pub struct Body(Bytes);

impl Deref for Body {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl FromRequest for Body {
    type Error = actix_web::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self, actix_web::Error>>>>;
    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        take(req, |taken| taken.body = true);
        let bytes = Bytes::from_request(req, payload);
        Box::pin(async move { bytes.await.map(Self) })
    }
}

/// The query of a request, parsed into a closed type.
#[derive(Debug, Clone)]
pub struct Query<T>(pub T);

impl<T> Deref for Query<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: DeserializeOwned> FromRequest for Query<T> {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        take(req, |taken| taken.query = true);
        let read = web::Query::<T>::from_query(req.query_string());
        ready(read.map(|query| Self(query.into_inner())).map_err(|error| wrong_query(&error.to_string())))
    }
}

/// Builds the error for a query from the parser's text, which names parameters but never their values.
fn wrong_query(text: &str) -> Error {
    let text = text.strip_prefix("Query deserialize error: ").unwrap_or(text);
    let named = |prefix: &str| text.strip_prefix(prefix).and_then(|rest| rest.split('`').next()).map(shown);
    let message = if let Some(name) = named("unknown field `") {
        let known: Vec<&str> =
            text.split(", expected").nth(1).unwrap_or_default().split('`').skip(1).step_by(2).collect();
        let near = known
            .iter()
            .map(|known| (strsim::damerau_levenshtein(&name, known), *known))
            .min()
            .filter(|(distance, known)| *distance <= 2 && *distance < known.len());
        let instead = match near {
            Some((_, near)) => format!("did you mean {near}?"),
            None => format!("there are: {}", known.join(", ")),
        };
        format!("there is no parameter {name} here; {instead}")
    } else if let Some(name) = named("duplicate field `") {
        format!("the parameter {name} is given twice; send it once")
    } else if let Some(name) = named("missing field `") {
        format!("the parameter {name} is missing")
    } else {
        format!("a parameter has the wrong form: {text}")
    };
    Error::Malformed(message)
}

fn shown(name: &str) -> String {
    name.chars().take(40).map(plain).collect()
}

impl FromRequest for Expected {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        take(req, |taken| taken.conditions = true);
        let read = |name: header::HeaderName| -> Result<Option<Tags>, Error> {
            let mut lines = Vec::new();
            for value in req.headers().get_all(&name) {
                let text = value.to_str();
                lines.push(
                    text.map_err(|_| Error::Malformed(format!("the header {name} is not plain ASCII")))?,
                );
            }
            if lines.is_empty() { Ok(None) } else { Tags::parse(name.as_str(), &lines.join(",")).map(Some) }
        };
        ready(
            read(header::IF_MATCH).and_then(|matches| {
                Ok(Self { if_match: matches, if_none_match: read(header::IF_NONE_MATCH)? })
            }),
        )
    }
}

/// Checks the headers before the body is read.
pub fn check_head(req: &HttpRequest) -> Result<(), Error> {
    let text = |name: &str| req.headers().get(name).map(|value| value.to_str().unwrap_or_default().trim());
    if text("expect").is_some_and(|value| !value.eq_ignore_ascii_case("100-continue")) {
        return Err(Error::Malformed("the header Expect takes only 100-continue".into()));
    }
    if text("content-encoding").is_some_and(|value| !value.eq_ignore_ascii_case("identity")) {
        return Err(Error::Malformed("Content-Encoding is not supported: send the body as it is".into()));
    }
    if *req.method() == Method::GET && req.headers().contains_key(IDEMPOTENCY_KEY) {
        return Err(Error::Malformed("Idempotency-Key is for changes; a GET changes nothing".into()));
    }
    Ok(())
}

/// Refuses inputs that the handler does not accept: parameters, headers, a body. `payload` is the unread body.
pub async fn check_rest(req: &HttpRequest, payload: &mut Payload) -> Result<(), Error> {
    let taken = taken(req);
    if !taken.query && !req.query_string().is_empty() {
        let name = req.query_string().split(['&', '=']).find(|part| !part.is_empty()).unwrap_or("?");
        return Err(Error::Malformed(format!(
            "there is no parameter {} here; this address takes none",
            shown(name)
        )));
    }
    for (name, why) in MEANING {
        let honoured = taken.conditions && matches!(*name, "if-match" | "if-none-match");
        if !honoured && req.headers().contains_key(*name) {
            return Err(Error::Malformed(format!("the header {name} is not supported here: {why}")));
        }
    }
    if !taken.body {
        let bytes =
            Bytes::from_request(req, payload).await.map_err(|_| Error::TooLarge(super::BODY_LIMIT))?;
        let text = bytes.trim_ascii();
        // Accept an empty object: some clients send one with every request.
        if !text.is_empty() && text != b"{}" {
            return Err(Error::Malformed(
                "this request takes no body, and a body would have no effect: leave it out".into(),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_refused_by_the_name_that_is_wrong() {
        let told = |text: &str| wrong_query(&format!("Query deserialize error: {text}")).to_string();
        let near = told("unknown field `limt`, expected `limit` or `cursor`");
        assert_eq!(near, "there is no parameter limt here; did you mean limit?");
        let far = told("unknown field `all\u{202e}`, expected one of `to`, `port`, `protocol`");
        assert_eq!(far, "there is no parameter all\u{fffd} here; there are: to, port, protocol");
        assert!(told("duplicate field `limit`").contains("limit is given twice"));
        assert!(told("missing field `to`").contains("to is missing"));
        assert!(told("invalid digit found in string").contains("invalid digit"));
    }
}
