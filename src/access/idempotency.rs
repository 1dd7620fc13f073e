//! `Idempotency-Key`: a repeated change returns the stored response and is not executed again. Most handlers
//! need no code for it: [`Repeatable`] stores their responses, sealed, because some hold a secret that is shown
//! once. A handler that takes [`IdempotencyKey`] stores its response itself, within its own transaction, through [`Once`].

use std::future::{Ready, ready};

use actix_web::body::to_bytes_limited;
use actix_web::dev::Payload;
use actix_web::http::{StatusCode, header};
use actix_web::{FromRequest, HttpRequest, HttpResponse, ResponseError, web};
use data_encoding::BASE64;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};

use super::{Actor, credentials, store};
use crate::db;
use crate::error::Error;
use crate::http::asked::{self, IDEMPOTENCY_KEY};
use crate::keys::{KeyPurpose, Keys, mac};

/// Maximum size of a stored response, in bytes.
const ANSWER: usize = 256 << 10;

/// Paths whose response cannot be replayed, with the reason.
const NOT_KEPT: &[(&str, &str)] =
    &[("/api/v1/me/confirmation", "the response sets a new session cookie; confirm again if it was lost")];

/// The key of a request, for a handler that stores its response itself.
#[derive(Debug, Default)]
pub struct IdempotencyKey(Option<String>);

impl FromRequest for IdempotencyKey {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;
    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        asked::takes_key(req);
        ready(key_of(req).map(Self))
    }
}

fn key_of(req: &HttpRequest) -> Result<Option<String>, Error> {
    let mut values = req.headers().get_all(IDEMPOTENCY_KEY);
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().ok().filter(|key| (1..=200).contains(&key.len()));
    match (text, values.next()) {
        (Some(key), None) => Ok(Some(key.to_owned())),
        _ => Err(Error::Malformed(
            "Idempotency-Key must be sent once, with 1 to 200 visible characters".into(),
        )),
    }
}

/// The key and the hash of a request, for a handler that takes [`IdempotencyKey`].
#[derive(Debug)]
pub struct Once {
    key: Option<String>,
    hash: Vec<u8>,
}

/// A response that was stored before.
#[derive(Debug)]
pub struct StoredResponse {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub body: Value,
}

/// Returns the holder of a key: the actor's id with its token, because two tenants may have accounts of the
/// same name.
fn holder(actor: &Actor) -> String {
    format!("{} {}", actor.id.as_str(), actor.id.via().unwrap_or_default())
}

fn another() -> Error {
    Error::Conflict(
        "this Idempotency-Key was used with another request; use a new key for each request".into(),
    )
}

fn unfinished() -> Error {
    Error::Conflict(
        "a request with this Idempotency-Key was started, and its response is not known yet: retry in a few seconds. If \
         this error persists, the request was interrupted: list the existing objects, delete or revoke those that it may \
         have created (a secret that was not shown cannot be shown again), and repeat the request with a new key"
            .into(),
    )
}

impl Once {
    /// Builds it from the key and the request.
    #[must_use]
    pub fn of(key: IdempotencyKey, req: &HttpRequest, body: &[u8]) -> Self {
        let header = |name: &str| req.headers().get(name).map_or(&[][..], |value| value.as_bytes());
        let part = |bytes: &[u8]| {
            data_encoding::HEXLOWER.encode(&credentials::hash(&String::from_utf8_lossy(bytes)))
        };
        let hash = credentials::hash(&format!(
            "{} {} {} {} {} {} {}",
            req.method(),
            req.path(),
            part(req.query_string().as_bytes()),
            part(header("content-type")),
            part(header("if-match")),
            part(header("if-none-match")),
            part(body)
        ));
        Self { key: key.0, hash }
    }

    /// Returns the stored response of this request. Returns a conflict if the key was used with another
    /// request.
    pub async fn kept(
        &self,
        conn: &mut PgConnection,
        actor: &Actor,
    ) -> Result<Option<StoredResponse>, Error> {
        let Some(key) = &self.key else { return Ok(None) };
        let Some((hash, status, body)) = store::find_answer(conn, &holder(actor), key).await? else {
            return Ok(None);
        };
        if hash != self.hash {
            return Err(another());
        }
        let status = u16::try_from(status).ok().and_then(|s| StatusCode::from_u16(s).ok());
        Ok(Some(StoredResponse { status: status.unwrap_or(StatusCode::OK), body }))
    }

    /// Stores the response in the same transaction. If another request with this key came first, it returns a
    /// conflict: the transaction must not commit, and a retry returns the stored response.
    pub async fn keep(
        &self,
        conn: &mut PgConnection,
        actor: &Actor,
        status: StatusCode,
        body: &Value,
    ) -> Result<(), Error> {
        let Some(key) = &self.key else { return Ok(()) };
        let answer = (i32::from(status.as_u16()), body);
        if store::insert_answer(conn, &holder(actor), key, &self.hash, answer).await? {
            Ok(())
        } else {
            Err(Error::Conflict("the same request is being processed; retry in a few seconds".into()))
        }
    }
}

/// The sealed part of a response.
#[derive(Serialize, Deserialize)]
struct Sealed {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    /// `None` for a response without a body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<Value>,
}

/// A request with a key. The hash covers the whole request.
#[derive(Debug)]
pub struct KeyedRequest {
    key: String,
    hash: Vec<u8>,
}

impl KeyedRequest {
    /// Reads a request. Returns `None` if it has no `Idempotency-Key`.
    pub fn of(req: &HttpRequest, body: &[u8]) -> Result<Option<Self>, Error> {
        let Some(key) = key_of(req)? else { return Ok(None) };
        let pattern = req.match_pattern().unwrap_or_default();
        if let Some((_, why)) = NOT_KEPT.iter().find(|(path, _)| *path == pattern) {
            return Err(Error::Malformed(format!("Idempotency-Key is not supported here: {why}")));
        }
        let header = |name: &str| req.headers().get(name).map_or(&[][..], |value| value.as_bytes());
        // Keyed hash: a body may hold a password, which must not be guessable from a stolen database.
        let keys = part::<Keys>(req)?.of(KeyPurpose::Answers);
        let parts = [
            req.method().as_str().as_bytes(),
            req.path().as_bytes(),
            req.query_string().as_bytes(),
            header("content-type"),
            header("if-match"),
            header("if-none-match"),
            body,
        ];
        Ok(Some(Self { key, hash: mac(&keys, &parts).to_vec() }))
    }

    /// Starts the request, or returns its stored response.
    pub async fn begin(self, req: &HttpRequest, actor: &Actor) -> Result<KeyedOutcome, Error> {
        let (pool, keys) = (part::<PgPool>(req)?.clone(), part::<Keys>(req)?.clone());
        let holder = holder(actor);
        let place = format!("{holder} {}", self.key);
        let mut tx = db::begin_for_all(&pool).await?;
        if let Some((hash, status, response)) = store::find_answer(&mut tx, &holder, &self.key).await? {
            if hash != self.hash {
                return Err(another());
            }
            let status = u16::try_from(status).ok().and_then(|s| StatusCode::from_u16(s).ok());
            let (Some(status), Value::String(sealed)) = (status, response) else { return Err(unfinished()) };
            let sealed = BASE64.decode(sealed.as_bytes()).map_err(Error::internal)?;
            let opened = keys.open(KeyPurpose::Answers, &place, &sealed)?;
            return Ok(KeyedOutcome::Answered(again(status, &opened)?));
        }
        // Status 0 means started. It remains after a crash, and a repeated request gets a conflict.
        if !store::insert_answer(&mut tx, &holder, &self.key, &self.hash, (0, &Value::Null)).await? {
            return Err(unfinished());
        }
        tx.commit().await?;
        Ok(KeyedOutcome::First(Repeatable { pool, keys, holder, place, wish: self }))
    }
}

fn again(status: StatusCode, opened: &[u8]) -> Result<HttpResponse, Error> {
    let Sealed { etag, body } = serde_json::from_slice(opened).map_err(Error::internal)?;
    let mut answer = HttpResponse::build(status);
    answer.insert_header(("idempotency-replayed", "true"));
    if let Some(etag) = etag {
        answer.insert_header((header::ETAG, etag));
    }
    Ok(match body {
        Some(body) => answer.json(body),
        None => answer.finish(),
    })
}

/// Result of starting a request with a key.
pub enum KeyedOutcome {
    /// The request was answered before.
    Answered(HttpResponse),
    /// This is the first request with the key.
    First(Repeatable),
}

/// A started request whose response must be stored.
pub struct Repeatable {
    pool: web::Data<PgPool>,
    keys: web::Data<Keys>,
    holder: String,
    place: String,
    wish: KeyedRequest,
}

impl Repeatable {
    /// Runs the request and stores the response. Continues after the client disconnects, because a client
    /// repeats the request when it lost the response.
    pub async fn run(self, answer: impl Future<Output = HttpResponse> + 'static) -> HttpResponse {
        let task = actix_web::rt::spawn(async move {
            let response = answer.await;
            self.keep(response).await
        });
        task.await.unwrap_or_else(|_| Error::internal("a handler panicked").error_response())
    }

    async fn keep(self, response: HttpResponse) -> HttpResponse {
        let status = response.status();
        let (head, body) = response.into_parts();
        let etag = head.headers().get(header::ETAG).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let Ok(Ok(bytes)) = to_bytes_limited(body, ANSWER).await else {
            return Error::internal("the response cannot be stored for its Idempotency-Key").error_response();
        };
        // After a 500 the outcome is unknown: the key stays started.
        let written = if status.is_success() {
            let body = (!bytes.is_empty()).then(|| serde_json::from_slice(&bytes).unwrap_or(Value::Null));
            self.finish(status, &Sealed { etag, body }).await
        } else if status == StatusCode::INTERNAL_SERVER_ERROR {
            Ok(())
        } else {
            self.forget().await
        };
        if let Err(error) = written {
            tracing::warn!(error = error.for_log(), "cannot store the response for its Idempotency-Key");
        }
        head.set_body(bytes).map_into_boxed_body()
    }

    async fn finish(&self, status: StatusCode, answer: &Sealed) -> Result<(), Error> {
        let text = serde_json::to_vec(answer).map_err(Error::internal)?;
        let sealed = self.keys.seal(KeyPurpose::Answers, &self.place, &text)?;
        let response = Value::String(BASE64.encode(&sealed));
        let mut conn = self.pool.acquire().await?;
        let answer = (i32::from(status.as_u16()), &response);
        store::finish_answer(&mut conn, &self.holder, &self.wish.key, &self.wish.hash, answer).await
    }

    async fn forget(&self) -> Result<(), Error> {
        let mut conn = self.pool.acquire().await?;
        store::forget_answer(&mut conn, &self.holder, &self.wish.key, &self.wish.hash).await
    }
}

fn part<T: 'static>(req: &HttpRequest) -> Result<&web::Data<T>, Error> {
    req.app_data::<web::Data<T>>().ok_or_else(|| Error::internal("a part of the platform is not wired"))
}
