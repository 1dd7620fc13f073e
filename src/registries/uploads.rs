//! Uploads of blobs through the registry proxy: start, status, continue, cancel. The platform stores the
//! registry's state and the progress of each upload, so an interrupted client can query them and continue.
//! Unparsed input never reaches the registry. `transfer.rs` transfers the bytes.

use actix_web::http::{Method, StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};

use super::Distribution;
use super::body::{TimedBody, cut};
use super::claims::UploadClaim;
use super::front::{FrontDoor, OciError, PATIENCE};
use super::proxy::{ProxyRequest, relay, unreachable_registry};
use super::store::{self, Ends, OpenUpload, Reserve};
use super::transfer::Transfer;
use super::write::{full, may_push};
use crate::db;
use crate::ids::{Digest, RepositoryPath};
use crate::images::manifest::shown;

/// The parameters of an upload; each at most once.
#[derive(Debug, Default, PartialEq, Eq)]
struct UploadQuery {
    mount: Option<Digest>,
    from: Option<String>,
    digest: Option<Digest>,
}

/// Extracts the registry's state of an upload from the `Location` of its answer.
pub(super) fn state_of(answer: &reqwest::Response) -> Option<String> {
    let location = answer.headers().get("location")?.to_str().ok()?;
    let (_, query) = location.split_once('?')?;
    let pairs = web::Query::<Vec<(String, String)>>::from_query(query).ok()?.into_inner();
    let state = pairs.into_iter().find(|(key, _)| key == "_state")?.1;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'=');
    ((1..=2_048).contains(&state.len()) && state.bytes().all(plain)).then_some(state)
}

/// Returns the path of an upload in the registry.
pub(super) fn path_there(upload: &OpenUpload) -> String {
    format!("blobs/uploads/{}?_state={}", upload.id, upload.state.replace('=', "%3D"))
}

fn unsupported(text: String) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", text)
}

pub(super) fn bad_digest(text: &str) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", text)
}

impl UploadQuery {
    /// Parses a query that may contain only these parameters.
    fn parse(query: &str, allowed: &[&str]) -> Result<Self, OciError> {
        let pairs = web::Query::<Vec<(String, String)>>::from_query(query)
            .map(web::Query::into_inner)
            .map_err(|_| unsupported("the query cannot be read".into()))?;
        let mut read = Self::default();
        for (key, value) in pairs {
            let Some(key) = allowed.iter().find(|known| **known == key) else {
                return Err(unsupported(format!(
                    "unknown parameter {}; valid parameters: {}",
                    shown(&key),
                    allowed.join(", ")
                )));
            };
            let digest =
                || value.parse::<Digest>().map_err(|_| bad_digest(&format!("{key} is not sha256:...")));
            let twice = match *key {
                "mount" => read.mount.replace(digest()?).is_some(),
                "digest" => read.digest.replace(digest()?).is_some(),
                _ => read.from.replace(value).is_some(),
            };
            if twice {
                return Err(unsupported("a parameter is given twice".into()));
            }
        }
        Ok(read)
    }
}

pub(super) fn unknown_upload() -> OciError {
    OciError::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "there is no such upload; start a new one")
}

pub(super) fn status(answer: &reqwest::Response) -> StatusCode {
    StatusCode::from_u16(answer.status().as_u16()).unwrap_or(StatusCode::BAD_GATEWAY)
}

/// The dependencies of a task that continues without its client.
#[derive(Clone)]
pub(super) struct Work {
    pub(super) pool: sqlx::PgPool,
    pub(super) registry: Distribution,
    pub(super) asked: ProxyRequest,
}

impl Work {
    pub(super) fn of(door: &FrontDoor, asked: &ProxyRequest) -> Self {
        Self { pool: door.pool.clone(), registry: door.registry.clone(), asked: asked.clone() }
    }

    /// Runs work to its end, even if its client disconnects: a disconnect ends the request, never a change in
    /// progress.
    pub(super) async fn finish<T: Send + 'static>(
        work: impl Future<Output = Result<T, OciError>> + Send + 'static,
    ) -> Result<T, OciError> {
        match tokio::spawn(work).await {
            Ok(outcome) => outcome,
            Err(error) => Err(OciError::from(crate::error::Error::internal(error))),
        }
    }
}

/// POST .../blobs/uploads/: starts an upload, mounts a blob of another repository of the same tenant, or sends
/// a whole blob.
pub(super) async fn start(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    may_push(door, asked).await?;
    let query = UploadQuery::parse(req.query_string(), &["mount", "from", "digest"])?;
    // A client may send the digest with the first request. Without a body it is an upload like any other.
    let whole = query.digest.clone().filter(|digest| sends_body(req) || *digest == Digest::of(b""));
    if let (Some(digest), None) = (whole, &query.mount) {
        let UploadStart::Open(upload) = Work::finish(begin(Work::of(door, asked), None)).await? else {
            return Err(unreachable_answer("it mounted a blob without a mount request"));
        };
        let id = upload.id;
        let done = receive(door, req, asked, &id, Some(digest), body).await;
        if done.is_err() {
            // The client never learns the upload's address, so give up its bytes.
            let work = Work::of(door, asked);
            let gone = Work::finish(async move { drop_upload(&work, &id).await }).await;
            if let Err(error) = gone {
                tracing::debug!(%error, "a refused upload could not be cancelled yet; the sweep retries");
            }
        }
        return done;
    }
    // A form in the body could also set `mount` and `from`, so the body is never passed on.
    let mut body = TimedBody::new(body);
    while let Some(chunk) = body.next().await? {
        if !chunk.is_empty() {
            return Err(unsupported("an upload with a body needs its digest: ?digest=sha256:...".into()));
        }
    }
    let mut mounted = None;
    if let Some(digest) = query.mount {
        let mut conn = db::begin(&door.pool, &asked.tenant).await?;
        // Mount only blobs that this tenant has according to the database; otherwise start a plain upload.
        let from = match query.from.as_deref() {
            None => store::find_place(&mut conn, &asked.tenant, &digest).await?,
            Some(from) => match own_repository(asked, from) {
                Some(from) if store::has_blob(&mut conn, &asked.tenant, &from, &digest).await? => Some(from),
                _ => None,
            },
        };
        mounted = from.map(|from| (digest, from));
    }
    match Work::finish(begin(Work::of(door, asked), mounted)).await? {
        UploadStart::Mounted(digest) => Ok(committed(asked, &digest)),
        UploadStart::Open(upload) => Ok(progress(StatusCode::ACCEPTED, asked, &upload)),
        UploadStart::Refused(answer) => Ok(relay(answer)),
    }
}

/// Returns whether a request has a body.
fn sends_body(req: &HttpRequest) -> bool {
    req.headers().contains_key(header::TRANSFER_ENCODING) || length(req).is_some_and(|length| length > 0)
}

/// Returns the length of a request's body; none with a transfer encoding.
fn length(req: &HttpRequest) -> Option<u64> {
    if req.headers().contains_key(header::TRANSFER_ENCODING) {
        return None;
    }
    let text = req.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?;
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Answers with the progress of an upload in the protocol's form: the last byte, or 0 for none.
pub(super) fn progress(status: StatusCode, asked: &ProxyRequest, upload: &OpenUpload) -> HttpResponse {
    HttpResponse::build(status)
        .insert_header((header::LOCATION, format!("/v2/{}/blobs/uploads/{}", asked.name, upload.id)))
        .insert_header((header::RANGE, format!("0-{}", upload.received.saturating_sub(1))))
        .insert_header(("Docker-Upload-UUID", upload.id.as_str()))
        .insert_header(("Docker-Distribution-Api-Version", "registry/2.0"))
        .finish()
}

/// Answers that a blob is committed.
pub(super) fn committed(asked: &ProxyRequest, digest: &Digest) -> HttpResponse {
    HttpResponse::Created()
        .insert_header((header::LOCATION, format!("/v2/{}/blobs/{digest}", asked.name)))
        .insert_header(("Docker-Content-Digest", digest.as_str()))
        .insert_header(("Docker-Distribution-Api-Version", "registry/2.0"))
        .finish()
}

/// The result of starting an upload.
enum UploadStart {
    Mounted(Digest),
    Open(OpenUpload),
    Refused(reqwest::Response),
}

/// Records a mount. Returns its digest, source and id.
async fn begin_mount(
    work: &Work,
    (digest, from): (Digest, RepositoryPath),
) -> Result<Option<(Digest, String, String)>, OciError> {
    let Work { pool, asked, .. } = work;
    let places = (&from, &asked.repository);
    let id = store::begin_mount(pool, &asked.tenant, places, &digest).await?;
    Ok(id.map(|id| (digest, format!("{}/{from}", asked.tenant), id)))
}

async fn begin(work: Work, mounted: Option<(Digest, RepositoryPath)>) -> Result<UploadStart, OciError> {
    let Work { pool, registry, asked } = &work;
    admit(&work, None).await?;
    let start = "blobs/uploads/";
    let mounted = match mounted {
        Some(mounted) => begin_mount(&work, mounted).await?,
        None => None,
    };
    let request = match &mounted {
        None => registry.request(reqwest::Method::POST, &asked.name, start, &["pull", "push"])?,
        Some((digest, from, _)) => {
            registry.mount_request(&asked.name, from, &format!("{start}?mount={digest}&from={from}"))?
        }
    };
    let answer = request
        .header(header::CONTENT_LENGTH.as_str(), "0")
        .timeout(PATIENCE)
        .send()
        .await
        .map_err(unreachable_registry)?;
    if let Some((digest, _, id)) = &mounted {
        if status(&answer) == StatusCode::CREATED {
            commit(&work, Some(id), digest).await?;
            return Ok(UploadStart::Mounted(digest.clone()));
        }
        store::end_mount(pool, &asked.tenant, id).await?;
    }
    if status(&answer) != StatusCode::ACCEPTED {
        return Ok(UploadStart::Refused(answer));
    }
    let id = answer.headers().get("docker-upload-uuid").and_then(|value| value.to_str().ok());
    let id = id.filter(|id| super::proxy::is_upload_id(id)).map(str::to_owned);
    let (Some(id), Some(state)) = (id, state_of(&answer)) else {
        return Err(unreachable_answer("its answer has no upload id"));
    };
    let upload = OpenUpload { id, state, received: 0 };
    if let Err(refused) = admit(&work, Some(&upload)).await {
        // Another upload started at the same time, and this one exceeds the limit: cancel it.
        if let Err(error) = cancel_there(registry, asked, &upload).await {
            tracing::warn!(%error, "a refused upload could not be cancelled; it stays until the registry purges it");
        }
        return Err(refused);
    }
    Ok(UploadStart::Open(upload))
}

pub(super) fn unreachable_answer(why: &str) -> OciError {
    tracing::error!(why, "unexpected answer of the registry");
    OciError::new(StatusCode::BAD_GATEWAY, "UNAVAILABLE", "the registry sent an unexpected answer; try again")
}

async fn admit(work: &Work, new: Option<&OpenUpload>) -> Result<(), OciError> {
    match store::admit_upload(&work.pool, &work.asked.tenant, &work.asked.repository, new).await? {
        Reserve::Full { used, limit } => Err(full(&work.asked, used, limit, store::FLOOR)),
        _ => Ok(()),
    }
}

/// Returns the source repository of a mount if it belongs to the same tenant.
fn own_repository(asked: &ProxyRequest, from: &str) -> Option<RepositoryPath> {
    from.strip_prefix(asked.tenant.as_str())?.strip_prefix('/')?.parse().ok()
}

/// GET of an upload: returns its progress.
pub(super) async fn look(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    id: &str,
) -> Result<HttpResponse, OciError> {
    // A client that queries a refused part uses that part's URL, with its digest.
    UploadQuery::parse(req.query_string(), &["digest"])?;
    Ok(progress(StatusCode::NO_CONTENT, asked, &find_open(&door.pool, asked, id).await?))
}

pub(super) async fn find_open(
    pool: &sqlx::PgPool,
    asked: &ProxyRequest,
    id: &str,
) -> Result<OpenUpload, OciError> {
    let mut conn = db::begin(pool, &asked.tenant).await?;
    let found = store::find_upload(&mut conn, &asked.tenant, &asked.repository, id).await?;
    found.ok_or_else(unknown_upload)
}

/// DELETE of an upload: cancels it in the registry, then its bytes no longer count.
pub(super) async fn cancel(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    id: &str,
) -> Result<HttpResponse, OciError> {
    UploadQuery::parse(req.query_string(), &[])?;
    let (work, id) = (Work::of(door, asked), id.to_owned());
    Work::finish(async move { drop_upload(&work, &id).await }).await?;
    Ok(HttpResponse::NoContent().insert_header(("Docker-Distribution-Api-Version", "registry/2.0")).finish())
}

/// Cancels an upload that no other request holds.
async fn drop_upload(work: &Work, id: &str) -> Result<(), OciError> {
    let Work { pool, registry, asked } = work;
    let claim = UploadClaim::take(pool, asked, id).await?;
    let dropped = match find_open(pool, asked, id).await {
        Ok(upload) => cancel_there(registry, asked, &upload).await,
        Err(error) => Err(error),
    };
    match dropped {
        Ok(()) => claim.delete().await,
        Err(refused) => {
            claim.release(Ends::Cut).await?;
            Err(refused)
        }
    }
}

/// Cancels an upload in the registry. The registry (Distribution 2.8) rewrites a part of the upload's folder
/// after removing it. It also cannot resume an upload that was cut off inside a part, not even to cancel it.
/// The collector removes the remains in both cases.
async fn cancel_there(
    registry: &Distribution,
    asked: &ProxyRequest,
    upload: &OpenUpload,
) -> Result<(), OciError> {
    // The registry requires the delete right for this; clients never have it.
    let request = registry.request(
        reqwest::Method::DELETE,
        &asked.name,
        &path_there(upload),
        &["pull", "push", "delete"],
    )?;
    let answer = request.timeout(PATIENCE).send().await.map_err(unreachable_registry)?;
    if let Some(collector) = registry.collector() {
        return Ok(collector.remove_upload(&asked.tenant, &asked.repository, &upload.id).await?);
    }
    match status(&answer) {
        StatusCode::NO_CONTENT | StatusCode::ACCEPTED | StatusCode::OK | StatusCode::NOT_FOUND => Ok(()),
        other => Err(OciError::new(
            other,
            "BLOB_UPLOAD_INVALID",
            "the registry cannot cancel this upload; its bytes count until the registry purges them",
        )),
    }
}

/// PATCH and PUT .../blobs/uploads/ID: streams the body and counts its bytes. Memory holds a few chunks at
/// most.
pub(super) async fn append(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    id: &str,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    may_push(door, asked).await?;
    let last = *req.method() == Method::PUT;
    let query = UploadQuery::parse(req.query_string(), if last { &["digest"] } else { &[] })?;
    if last && query.digest.is_none() {
        return Err(bad_digest("PUT takes a digest: ?digest=sha256:..."));
    }
    receive(door, req, asked, id, query.digest, body).await
}

/// Appends the bytes of a request to an upload, and commits it if there is a digest.
async fn receive(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    id: &str,
    digest: Option<Digest>,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    let length = length(req);
    let mut start = None;
    if let Some(value) = req.headers().get(header::CONTENT_RANGE) {
        let Some((first, last)) = value.to_str().ok().and_then(range) else {
            return Err(unsupported("Content-Range must be START-END".into()));
        };
        start = Some(first);
        if length != Some(last - first + 1) {
            return Err(OciError::new(
                StatusCode::BAD_REQUEST,
                "SIZE_INVALID",
                "Content-Length differs from the length of Content-Range",
            ));
        }
    }
    if let Some(length) = length.filter(|length| *length > 0) {
        let mut conn = db::begin(&door.pool, &asked.tenant).await?;
        let (used, limit) = store::registry_use(&mut conn, &asked.tenant).await?;
        if used.saturating_add(length) > limit {
            return Err(full(asked, used, limit, length));
        }
    }
    let place = door.registry.room().streams.take(&asked.tenant).await?;
    let transfer = Transfer { work: Work::of(door, asked), id: id.to_owned(), digest, length, start };
    let outcome = transfer.carry(door, body).await;
    drop(place);
    outcome
}

/// Parses `START-END`, in the registry's form.
fn range(text: &str) -> Option<(u64, u64)> {
    let (start, end) = text.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (start, end) = (digits(start) && digits(end)).then(|| (start.parse().ok(), end.parse().ok()))?;
    Some((start?, end?)).filter(|(start, end)| start <= end && *end < u64::MAX)
}

/// Records a committed blob: it counts with its real size, once for each tenant, and its upload no longer
/// counts.
pub(super) async fn commit(work: &Work, upload: Option<&str>, digest: &Digest) -> Result<(), OciError> {
    let Work { pool, registry, asked } = work;
    let size = registry.blob_size(&asked.name, digest).await?.ok_or_else(cut)?;
    fail::fail_point!("registries::blob_commit", |_| Err(OciError::denied("failpoint")));
    store::commit_blob(pool, &asked.tenant, &asked.repository, digest, size, upload).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_parameters_pass_each_once() {
        let digest = Digest::of(b"x");
        let both = ["digest", "from"];
        let encoded = digest.as_str().replace(':', "%3A");
        let read = UploadQuery::parse(&format!("from=acme%2Fweb&digest={encoded}"), &both).unwrap();
        assert_eq!((read.digest.as_ref(), read.from.as_deref()), (Some(&digest), Some("acme/web")));
        assert_eq!(UploadQuery::parse("", &both).unwrap(), UploadQuery::default());
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
            "_state=a".into(),
            "from=a&from=b".into(),
            format!("digest={digest}&x=y"),
        ] {
            assert!(UploadQuery::parse(&query, &both).is_err(), "{query}");
        }
        assert!(UploadQuery::parse(&format!("digest={digest}"), &[]).is_err(), "PATCH takes no digest");
    }

    #[test]
    fn the_state_of_an_upload_is_the_registrys_and_plain() {
        let answer = |location: &str| {
            let answer = actix_web::http::StatusCode::ACCEPTED.as_u16();
            let answer =
                http::Response::builder().status(answer).header("location", location).body("").unwrap();
            state_of(&reqwest::Response::from(answer))
        };
        assert_eq!(answer("/v2/a/b/blobs/uploads/1?_state=aB-_9%3D").as_deref(), Some("aB-_9="));
        for bad in [
            "/v2/a/b/blobs/uploads/1",
            "/x?_state=",
            "/x?_state=a%26digest%3Dx",
            "/x?_state=a%00b",
            &format!("/x?_state={}", "a".repeat(3_000)),
        ] {
            assert_eq!(answer(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_range_is_two_numbers() {
        assert_eq!(range("0-99"), Some((0, 99)));
        for bad in ["", "-", "1-", "-1", "9-1", "0-99/100", "bytes 0-99", "+1-2", "0-99999999999999999999"] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }
}
