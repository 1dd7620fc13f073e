//! Uploads of blobs through the registry proxy. Nothing that was not parsed goes on: the query is rebuilt, the type of
//! the body is fixed, and the registry's answer has to name the digest that was asked for. What is committed is on
//! record before the registry is asked, and the commit runs to its end also when the client has hung up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use actix_web::http::{Method, StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::body::{Body, cut};
use super::front::{FrontDoor, OciError, PATIENCE};
use super::parts::{Claim, Lost};
use super::proxy::{Asked, relay, unreachable_registry};
use super::store::{self, Ends, Reserve};
use super::write::{full, may_push};
use super::{Distribution, collect};
use crate::db;
use crate::ids::{Digest, RepositoryPath, TenantName};

/// Bytes that are reserved of the quota at a time while an upload streams.
const STEP: u64 = 16 << 20;
/// How often an upload that goes on says so.
const SIGN: Duration = Duration::from_secs(120);
/// The only type of an upload's body. The registry reads a form as more parameters.
const OCTETS: &str = "application/octet-stream";

/// The parameters that an upload knows; each at most once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Query {
    mount: Option<Digest>,
    from: Option<String>,
    digest: Option<Digest>,
    /// The registry's own state of the upload: signed by it, so that only what it handed out opens anything.
    state: Option<String>,
}

fn unsupported(text: String) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", text)
}

fn bad_digest(text: &str) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", text)
}

impl Query {
    /// Reads a query in which nothing but these parameters may stand.
    fn parse(query: &str, allowed: &[&str]) -> Result<Self, OciError> {
        let pairs = web::Query::<Vec<(String, String)>>::from_query(query)
            .map(web::Query::into_inner)
            .map_err(|_| unsupported("the query cannot be read".into()))?;
        let mut read = Self::default();
        for (key, value) in pairs {
            let Some(key) = allowed.iter().find(|known| **known == key) else {
                return Err(unsupported(format!("a parameter is not one of {}", allowed.join(", "))));
            };
            let digest =
                || value.parse::<Digest>().map_err(|_| bad_digest(&format!("{key} is not sha256:...")));
            let twice = match *key {
                "mount" => read.mount.replace(digest()?).is_some(),
                "digest" => read.digest.replace(digest()?).is_some(),
                "from" => read.from.replace(value).is_some(),
                _ => {
                    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'=');
                    if !(1..=2_048).contains(&value.len()) || !value.bytes().all(plain) {
                        return Err(unsupported("_state is not what was handed out".into()));
                    }
                    read.state.replace(value).is_some()
                }
            };
            if twice {
                return Err(unsupported("a parameter stands twice".into()));
            }
        }
        Ok(read)
    }

    /// The query for the registry, from what was read alone.
    fn rebuild(&self) -> String {
        let state = self.state.as_ref().map(|state| format!("_state={}", state.replace('=', "%3D")));
        let digest = self.digest.as_ref().map(|digest| format!("digest={digest}"));
        let parts: Vec<String> = state.into_iter().chain(digest).collect();
        if parts.is_empty() { String::new() } else { format!("?{}", parts.join("&")) }
    }
}

pub(super) fn unknown_upload() -> OciError {
    OciError::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "there is no such upload; start a new one")
}

fn status(answer: &reqwest::Response) -> StatusCode {
    StatusCode::from_u16(answer.status().as_u16()).unwrap_or(StatusCode::BAD_GATEWAY)
}

/// What a task needs that goes on without its client.
#[derive(Clone)]
pub(super) struct Work {
    pub(super) pool: sqlx::PgPool,
    pub(super) registry: Distribution,
    pub(super) asked: Asked,
}

impl Work {
    pub(super) fn of(door: &FrontDoor, asked: &Asked) -> Self {
        Self { pool: door.pool.clone(), registry: door.registry.clone(), asked: asked.clone() }
    }

    /// Runs to its end, also when nobody waits for it any more: a client that hangs up ends its request, never the
    /// change that was begun.
    pub(super) async fn finish<T: Send + 'static>(
        work: impl Future<Output = Result<T, OciError>> + Send + 'static,
    ) -> Result<T, OciError> {
        match tokio::spawn(work).await {
            Ok(outcome) => outcome,
            Err(error) => Err(OciError::from(crate::error::Error::internal(error))),
        }
    }
}

/// POST .../blobs/uploads/: a new upload, or a mount from another repository of the same tenant.
pub(super) async fn start(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    may_push(door, asked).await?;
    // A form in the body is one more way to say `mount` and `from`; nothing of the body is passed on.
    let mut body = Body::new(body);
    while let Some(chunk) = body.next().await? {
        if !chunk.is_empty() {
            return Err(unsupported("an upload starts without a body".into()));
        }
    }
    // A client may send the digest along with the first request: without a body it is an upload like any other.
    let query = Query::parse(req.query_string(), &["mount", "from", "digest"])?;
    let mut rest = "blobs/uploads/".to_owned();
    let mut mounted = None;
    if let Some(digest) = query.mount
        && let Some(from) = own_repository(asked, query.from.as_deref())
    {
        let name = format!("{}/{from}", asked.tenant);
        // Only what this tenant is known to hold there is mounted; all else is a plain upload.
        let mut conn = db::begin(&door.pool, &asked.tenant).await?;
        if store::has_blob(&mut conn, &asked.tenant, &from, &digest).await? {
            rest = format!("blobs/uploads/?mount={digest}&from={name}");
            mounted = Some((digest, name));
        }
    }
    let work = Work::of(door, asked);
    Work::finish(begin(work, rest, mounted)).await.map(relay)
}

async fn begin(
    work: Work,
    rest: String,
    mounted: Option<(Digest, String)>,
) -> Result<reqwest::Response, OciError> {
    let Work { registry, asked, .. } = &work;
    admit(&work, None).await?;
    let request = match &mounted {
        None => registry.request(reqwest::Method::POST, &asked.name, &rest, &["pull", "push"])?,
        Some((_, from)) => registry.mount_request(&asked.name, from, &rest)?,
    };
    let answer = request
        .header(header::CONTENT_LENGTH.as_str(), "0")
        .timeout(PATIENCE)
        .send()
        .await
        .map_err(unreachable_registry)?;
    if let (Some((digest, _)), StatusCode::CREATED) = (&mounted, status(&answer)) {
        commit(&work, None, digest).await?;
        return Ok(answer);
    }
    if status(&answer) != StatusCode::ACCEPTED {
        return Ok(answer);
    }
    let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
    let id = header("docker-upload-uuid").filter(|id| super::proxy::is_upload_id(id)).map(str::to_owned);
    let query = header("location").and_then(|location| location.split_once('?')).map(|(_, query)| query);
    let query = Query::parse(query.unwrap_or_default(), &["_state"])?;
    let id = id.ok_or_else(|| unreachable_answer("its answer names no upload"))?;
    if let Err(refused) = admit(&work, Some(&id)).await {
        // Another upload was begun at the same moment: this one must not stay.
        if let Err(error) = cancel_there(registry, asked, &id, &query).await {
            tracing::warn!(%error, "an upload that was refused stays until the registry purges it");
        }
        return Err(refused);
    }
    Ok(answer)
}

fn unreachable_answer(why: &str) -> OciError {
    tracing::error!(why, "the registry's answer cannot be used");
    OciError::new(StatusCode::BAD_GATEWAY, "UNAVAILABLE", "the registry's answer cannot be used")
}

async fn admit(work: &Work, id: Option<&str>) -> Result<(), OciError> {
    match store::admit_upload(&work.pool, &work.asked.tenant, &work.asked.repository, id).await? {
        Reserve::Full { used, limit } => Err(full(used, limit, store::FLOOR)),
        _ => Ok(()),
    }
}

/// The repository of this very tenant that a mount names; none for anybody else's.
fn own_repository(asked: &Asked, from: Option<&str>) -> Option<RepositoryPath> {
    from?.strip_prefix(asked.tenant.as_str())?.strip_prefix('/')?.parse().ok()
}

/// GET of an upload: how far it is.
pub(super) async fn look(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    id: &str,
) -> Result<HttpResponse, OciError> {
    let query = Query::parse(req.query_string(), &["_state"])?;
    require_open(door, asked, id).await?;
    let rest = format!("blobs/uploads/{id}{}", query.rebuild());
    let request = door.registry.request(reqwest::Method::GET, &asked.name, &rest, &["pull", "push"])?;
    request.timeout(PATIENCE).send().await.map(relay).map_err(unreachable_registry)
}

async fn require_open(door: &FrontDoor, asked: &Asked, id: &str) -> Result<(), OciError> {
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    if store::is_upload_open(&mut conn, &asked.tenant, &asked.repository, id).await? {
        return Ok(());
    }
    Err(unknown_upload())
}

/// DELETE of an upload: the registry lets go of it, then its bytes count no more.
pub(super) async fn cancel(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    id: &str,
) -> Result<HttpResponse, OciError> {
    let query = Query::parse(req.query_string(), &["_state"])?;
    let (work, id) = (Work::of(door, asked), id.to_owned());
    Work::finish(async move {
        let claim = Claim::take(&work.pool, &work.asked, &id, None).await?;
        match cancel_there(&work.registry, &work.asked, &id, &query).await {
            Ok(()) => claim.delete().await,
            Err(refused) => {
                claim.release(Ends::Cut).await?;
                Err(refused)
            }
        }
    })
    .await?;
    Ok(HttpResponse::NoContent().insert_header(("Docker-Distribution-Api-Version", "registry/2.0")).finish())
}

/// Cancels an upload in the registry. The registry (Distribution 2.8) writes a part of an upload's folder again after it
/// has removed it, and does not take up again, not even to cancel it, an upload that was cut off in the middle of a part:
/// what is left in both cases the collector removes.
async fn cancel_there(
    registry: &Distribution,
    asked: &Asked,
    id: &str,
    query: &Query,
) -> Result<(), OciError> {
    let rest = format!("blobs/uploads/{id}{}", query.rebuild());
    // The registry wants the right to delete for this; clients never have it.
    let request =
        registry.request(reqwest::Method::DELETE, &asked.name, &rest, &["pull", "push", "delete"])?;
    let answer = request.timeout(PATIENCE).send().await.map_err(unreachable_registry)?;
    if let Some(collector) = registry.collector() {
        return Ok(collector.remove_upload(&asked.tenant, &asked.repository, id).await?);
    }
    match status(&answer) {
        StatusCode::NO_CONTENT | StatusCode::ACCEPTED | StatusCode::OK | StatusCode::NOT_FOUND => Ok(()),
        other => Err(OciError::new(
            other,
            "BLOB_UPLOAD_INVALID",
            "the registry does not take this upload up again; its bytes count until it purges them",
        )),
    }
}

/// PATCH and PUT .../blobs/uploads/ID: streams on, counting. Memory holds a few chunks at most.
pub(super) async fn append(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    id: &str,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    may_push(door, asked).await?;
    let last = *req.method() == Method::PUT;
    let query = Query::parse(req.query_string(), if last { &["_state", "digest"] } else { &["_state"] })?;
    if last && query.digest.is_none() {
        return Err(bad_digest("PUT takes a digest"));
    }
    let number = |name: header::HeaderName| {
        let text = req.headers().get(name)?.to_str().ok()?;
        text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok())?
    };
    // With a transfer encoding the length is another one, or none at all.
    let chunked = req.headers().contains_key(header::TRANSFER_ENCODING);
    let length = number(header::CONTENT_LENGTH).filter(|_| !chunked);
    if let Some(length) = length.filter(|length| *length > 0) {
        let mut conn = db::begin(&door.pool, &asked.tenant).await?;
        let (used, limit) = store::registry_use(&mut conn, &asked.tenant).await?;
        if used.saturating_add(length) > limit {
            return Err(full(used, limit, length));
        }
    }
    let range = match req.headers().get(header::CONTENT_RANGE) {
        None => None,
        Some(value) => Some(value.to_str().ok().and_then(range).ok_or_else(|| {
            OciError::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "BLOB_UPLOAD_INVALID",
                "Content-Range is not START-END",
            )
        })?),
    };
    let place = door.registry.room().streams.take(&asked.tenant).await?;
    let method = if last { reqwest::Method::PUT } else { reqwest::Method::PATCH };
    let rest = format!("blobs/uploads/{id}{}", query.rebuild());
    let mut upstream = door
        .registry
        .request(method, &asked.name, &rest, &["pull", "push"])?
        .header(reqwest::header::CONTENT_TYPE, OCTETS);
    if let Some((start, end)) = range {
        upstream = upstream.header(reqwest::header::CONTENT_RANGE, format!("{start}-{end}"));
    }
    if let Some(length) = length {
        upstream = upstream.header(reqwest::header::CONTENT_LENGTH, length);
    }
    // Payload is bound to its thread; a channel of two chunks carries the bytes over.
    let (sender, receiver) = mpsc::channel::<Part>(2);
    let part = Upload { work: Work::of(door, asked), id: id.to_owned(), digest: query.digest, length };
    let (claimed, ready) = oneshot::channel();
    let sending = tokio::spawn(part.send(upstream, receiver, claimed));
    // Nothing is read or reserved before the upload is this request's.
    if ready.await.is_ok() {
        pump(door, asked, id, body, sender).await?;
    }
    drop(place);
    let answer = sending.await.map_err(|error| OciError::from(crate::error::Error::internal(error)))??;
    Ok(relay(answer))
}

/// `START-END`, as the registry reads it.
fn range(text: &str) -> Option<(u64, u64)> {
    let (start, end) = text.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (start, end) = (digits(start) && digits(end)).then(|| (start.parse().ok(), end.parse().ok()))?;
    Some((start?, end?)).filter(|(start, end)| start <= end)
}

/// A part of a body on its way.
enum Part {
    Bytes(Bytes),
    /// All of it has come. A body that ends without this was cut off.
    End,
}

/// One PATCH or PUT, and what it ends in.
struct Upload {
    work: Work,
    id: String,
    digest: Option<Digest>,
    /// Bytes of the body, where the client has said so.
    length: Option<u64>,
}

impl Upload {
    /// Sends the body on and settles what came of it, whether or not the client is still there.
    async fn send(
        self,
        upstream: reqwest::RequestBuilder,
        receiver: mpsc::Receiver<Part>,
        claimed: oneshot::Sender<()>,
    ) -> Result<reqwest::Response, OciError> {
        // Within the task: what it writes down it also settles.
        let claim = Claim::take(&self.work.pool, &self.work.asked, &self.id, self.digest.as_ref()).await?;
        let _ = claimed.send(());
        let whole = Arc::new(AtomicBool::new(false));
        let (seen, length) = (Arc::clone(&whole), self.length);
        let stream = futures_util::stream::unfold(Some((receiver, 0)), move |state| {
            let seen = Arc::clone(&seen);
            async move {
                let (mut receiver, sent) = state?;
                match receiver.recv().await {
                    Some(Part::Bytes(bytes)) => {
                        let sent = sent + bytes.len() as u64;
                        seen.fetch_or(length == Some(sent), Ordering::SeqCst);
                        Some((Ok(bytes), Some((receiver, sent))))
                    }
                    Some(Part::End) => {
                        seen.store(true, Ordering::SeqCst);
                        None
                    }
                    // The client has hung up: after the last byte nothing is missing.
                    None if length == Some(sent) => None,
                    None => Some((Err(std::io::Error::other("cut off")), None)),
                }
            }
        });
        let sending = upstream.body(reqwest::Body::wrap_stream(stream)).send();
        let answer = match claim.hold(sending).await {
            Ok(answer) => answer.map_err(unreachable_registry),
            Err(Lost) => Err(cut()),
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // Nothing is committed of a body that did not come whole. What else is not known, the sweep settles.
                if self.digest.is_none() || !whole.load(Ordering::SeqCst) {
                    claim.release(Ends::Cut).await?;
                }
                return Err(error);
            }
        };
        match &self.digest {
            Some(digest) if status(&answer) == StatusCode::CREATED => {
                if let Err(error) = self.check(&answer, digest).await {
                    claim.release(Ends::Answered).await?;
                    return Err(error);
                }
                commit(&self.work, Some(&self.id), digest).await?;
            }
            _ => claim.release(Ends::Answered).await?,
        }
        Ok(answer)
    }

    /// The registry has committed what it was asked to, or that goes again.
    async fn check(&self, answer: &reqwest::Response, digest: &Digest) -> Result<(), OciError> {
        let named = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        if named == Some(digest.as_str()) {
            return Ok(());
        }
        let Work { pool, registry, asked } = &self.work;
        tracing::error!(tenant = %asked.tenant, "ALARM: the registry has committed other bytes than it was asked to");
        if let Some(other) = named.and_then(|text| text.parse::<Digest>().ok()) {
            let mut conn = db::begin(pool, &asked.tenant).await?;
            let known = store::has_blob(&mut conn, &asked.tenant, &asked.repository, &other).await?;
            drop(conn);
            if !known {
                registry.delete_blob(&asked.name, &other).await?;
                collect::collect(registry, &other).await?;
            }
        }
        Err(unreachable_answer("it has committed other bytes than it was asked to"))
    }
}

/// A blob is there: it counts with its real size, once a tenant, and its upload counts no more.
pub(super) async fn commit(work: &Work, upload: Option<&str>, digest: &Digest) -> Result<(), OciError> {
    let Work { pool, registry, asked } = work;
    let size = registry.blob_size(&asked.name, digest).await?.ok_or_else(cut)?;
    fail::fail_point!("registries::blob_commit", |_| Err(OciError::denied("failpoint")));
    store::commit_blob(pool, &asked.tenant, &asked.repository, digest, size, upload).await?;
    Ok(())
}

/// Carries the body over, reserving the quota in steps before the bytes go on. What went over counts until the blob is
/// there, also when it was cut off: the registry keeps its bytes until it is cancelled or purged.
async fn pump(
    door: &FrontDoor,
    asked: &Asked,
    id: &str,
    body: web::Payload,
    sender: mpsc::Sender<Part>,
) -> Result<(), OciError> {
    let mut taken = Taken {
        pool: door.pool.clone(),
        tenant: asked.tenant.clone(),
        id: id.to_owned(),
        reserved: 0,
        passed: 0,
    };
    let mut body = Body::new(body);
    let mut sign = Instant::now();
    while let Some(chunk) = body.next().await? {
        let next = taken.passed + chunk.len() as u64;
        let needed = next.saturating_sub(taken.reserved);
        if needed > 0 || sign.elapsed() > SIGN {
            sign = Instant::now();
            let step = if needed > 0 { needed.max(STEP) } else { 0 };
            match store::reserve_upload(&taken.pool, &taken.tenant, &taken.id, step, needed).await? {
                Reserve::Taken(bytes) => taken.reserved += bytes,
                Reserve::Full { used, limit } => return Err(full(used, limit, needed)),
                Reserve::Gone => return Err(unknown_upload()),
            }
        }
        taken.passed = next;
        if sender.send(Part::Bytes(chunk)).await.is_err() {
            // The registry has answered already.
            return Ok(());
        }
    }
    let _ = sender.send(Part::End).await;
    Ok(())
}

/// What an upload has taken of the quota. When it ends, also because the client has hung up and nobody
/// waits for the answer any more, what was not needed is given back.
struct Taken {
    pool: sqlx::PgPool,
    tenant: TenantName,
    id: String,
    reserved: u64,
    passed: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let left = self.reserved.saturating_sub(self.passed);
        if left == 0 {
            return;
        }
        let (pool, tenant, id) = (self.pool.clone(), self.tenant.clone(), self.id.clone());
        actix_web::rt::spawn(async move {
            if let Err(error) = store::give_back(&pool, &tenant, &id, left).await {
                tracing::warn!(%error, "bytes that an upload did not need count for two hours more");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_parameters_pass_each_once_and_rebuilt() {
        let digest = Digest::of(b"x");
        let both = ["_state", "digest"];
        let encoded = digest.as_str().replace(':', "%3A");
        let read = Query::parse(&format!("_state=aB-_9%3D&digest={encoded}"), &both).unwrap();
        assert_eq!(read.rebuild(), format!("?_state=aB-_9%3D&digest={digest}"));
        assert_eq!(Query::parse("", &both).unwrap().rebuild(), "");
        let other = Digest::of(b"y");
        for query in [
            format!("digest={digest}&digest={other}"),
            format!("digest={digest}&%64igest={other}"),
            format!("digest={digest}&mount={other}&from=a/b"),
            format!("digest={digest}&Digest={other}"),
            format!("digest={digest};digest={other}"),
            format!("digest={digest}%26digest={other}"),
            format!("digest={}", digest.as_str().to_uppercase()),
            format!("digest=sha512:{}", "0".repeat(128)),
            "digest=".into(),
            "_state=a%26digest%3Dx".into(),
            "_state=a%00b".into(),
            format!("_state={}", "a".repeat(3_000)),
            "_state=a&_state=b".into(),
            format!("_state=a&digest={digest}&x=y"),
        ] {
            assert!(Query::parse(&query, &both).is_err(), "{query}");
        }
        assert!(Query::parse(&format!("digest={digest}"), &["_state"]).is_err(), "PATCH takes no digest");
    }

    #[test]
    fn a_range_is_two_numbers() {
        assert_eq!(range("0-99"), Some((0, 99)));
        for bad in ["", "-", "1-", "-1", "9-1", "0-99/100", "bytes 0-99", "+1-2", "0-99999999999999999999"] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }
}
