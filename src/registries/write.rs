//! Writes through the front door: uploads are counted while they stream, manifests are read
//! strictly and held against what is really there, and everything is written down.

use std::sync::Arc;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::front::{FrontDoor, OciError};
use super::proxy::{Asked, relay, state, unreachable_registry};
use super::store::{self, NewManifest, Noted};
use crate::db;
use crate::ids::{Digest, RepositoryPath, Tag, TenantName};
use crate::images::manifest::{self, Descriptor, Manifest};

/// Bytes that are reserved of the quota at a time while an upload streams.
const STEP: u64 = 16 << 20;

/// Parameters of an upload that we look at ourselves.
struct Params {
    mount: Option<String>,
    from: Option<String>,
    digest: Option<String>,
}

fn params(req: &HttpRequest) -> Result<Params, OciError> {
    let pairs = web::Query::<Vec<(String, String)>>::from_query(req.query_string())
        .map(web::Query::into_inner)
        .map_err(|_| OciError::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", "the query cannot be read"))?;
    let one = |name: &str| {
        let mut values = pairs.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone());
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(OciError::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", "a parameter stands twice")),
        }
    };
    Ok(Params { mount: one("mount")?, from: one("from")?, digest: one("digest")? })
}

async fn may_push(door: &FrontDoor, asked: &Asked) -> Result<(), OciError> {
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    match store::tenant_state(&mut conn, &asked.tenant).await?.as_deref() {
        Some("active") => Ok(()),
        Some(state) => Err(OciError::denied(format!("the tenant is {state}: nothing can be pushed"))),
        None => Err(OciError::unknown_name()),
    }
}

/// POST .../blobs/uploads/: a new upload, or a mount from another repository of the same tenant.
pub(super) async fn start(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    mut body: web::Payload,
) -> Result<HttpResponse, OciError> {
    may_push(door, asked).await?;
    // A form in the body is one more way to say `mount` and `from`; nothing of the body is passed on.
    while let Some(chunk) = body.next().await {
        if !chunk.map_err(|_| cut())?.is_empty() {
            return Err(OciError::new(
                StatusCode::BAD_REQUEST,
                "UNSUPPORTED",
                "an upload starts without a body",
            ));
        }
    }
    let params = params(req)?;
    let mut rest = "blobs/uploads/".to_owned();
    let mut mounted = None;
    if let Some(mount) = params.mount {
        let digest: Digest = mount
            .parse()
            .map_err(|_| OciError::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "mount is not a digest"))?;
        if let Some(from) = own_repository(asked, params.from.as_deref()) {
            let name = format!("{}/{from}", asked.tenant);
            // Only what this tenant is known to hold there is mounted; all else is a plain upload.
            let mut conn = db::begin(&door.pool, &asked.tenant).await?;
            if store::has_blob(&mut conn, &asked.tenant, &from, &digest).await? {
                rest = format!("blobs/uploads/?mount={digest}&from={name}");
                mounted = Some((digest, name));
            }
        }
    }
    let answer = match &mounted {
        None => door.registry.request(reqwest::Method::POST, &asked.name, &rest, &["pull", "push"])?,
        Some((_, from)) => door.registry.mount_request(&asked.name, from, &rest)?,
    }
    .header(header::CONTENT_LENGTH.as_str(), "0")
    .send()
    .await
    .map_err(unreachable_registry)?;
    if let (Some((digest, _)), StatusCode::CREATED) = (mounted, status(&answer)) {
        commit_blob(door, asked, None, &digest).await?;
    }
    Ok(relay(answer))
}

/// The repository of this very tenant that a mount names; none for anybody else's.
fn own_repository(asked: &Asked, from: Option<&str>) -> Option<RepositoryPath> {
    from?.strip_prefix(asked.tenant.as_str())?.strip_prefix('/')?.parse().ok()
}

fn status(answer: &reqwest::Response) -> StatusCode {
    StatusCode::from_u16(answer.status().as_u16()).unwrap_or(StatusCode::BAD_GATEWAY)
}

fn cut() -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", "the upload was cut off")
}

fn never_pushed() -> OciError {
    OciError::new(
        StatusCode::BAD_REQUEST,
        "MANIFEST_BLOB_UNKNOWN",
        "the manifest names something that was not pushed, or is gone again: push the image once more",
    )
}

fn full(used: u64, limit: u64, asked: u64) -> OciError {
    OciError::denied(format!(
        "the registry quota is used up: limit {limit} bytes, used {used}, asked at least {asked}; delete tags or ask for more"
    ))
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
    let last = *req.method() == actix_web::http::Method::PUT;
    let digest = match (params(req)?.digest, last) {
        (Some(text), true) => Some(text.parse::<Digest>().map_err(|_| {
            OciError::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "digest is not sha256:...")
        })?),
        (None, false) => None,
        _ => {
            return Err(OciError::new(
                StatusCode::BAD_REQUEST,
                "DIGEST_INVALID",
                "PUT takes a digest, PATCH none",
            ));
        }
    };
    let length = req.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if let Some(length) = length.filter(|length| *length > 0) {
        let mut conn = db::begin(&door.pool, &asked.tenant).await?;
        let (used, limit) = store::registry_use(&mut conn, &asked.tenant).await?;
        if used.saturating_add(length) > limit {
            return Err(full(used, limit, length));
        }
    }
    let method = if last { reqwest::Method::PUT } else { reqwest::Method::PATCH };
    let rest = format!("blobs/uploads/{id}{}", state(req));
    let mut upstream = door.registry.request(method, &asked.name, &rest, &["pull", "push"])?;
    for name in ["content-range", "content-type"] {
        if let Some(value) = req.headers().get(name).and_then(|v| v.to_str().ok()) {
            upstream = upstream.header(name, value);
        }
    }
    if let Some(length) = length {
        upstream = upstream.header(reqwest::header::CONTENT_LENGTH, length);
    }
    // Payload is bound to its thread; a channel of two chunks carries the bytes over.
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(2);
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|chunk| (chunk, receiver))
    });
    let sending = upstream.body(reqwest::Body::wrap_stream(stream)).send();
    let pumping = pump(door, asked, id, body, sender);
    let (answer, pumped) = futures_util::future::join(sending, pumping).await;
    pumped?;
    let answer = answer.map_err(unreachable_registry)?;
    if let (Some(digest), StatusCode::CREATED) = (digest, status(&answer)) {
        commit_blob(door, asked, Some(id), &digest).await?;
    }
    Ok(relay(answer))
}

/// Carries the body over, reserving the quota in steps before the bytes go on. What went over counts
/// until the blob is there, also when it was cut off: the registry (Distribution 2.8) does not take such
/// an upload up again, and keeps its bytes until it is purged.
async fn pump(
    door: &FrontDoor,
    asked: &Asked,
    id: &str,
    body: web::Payload,
    sender: mpsc::Sender<Result<Bytes, std::io::Error>>,
) -> Result<(), OciError> {
    let mut taken = Taken {
        pool: door.pool.clone(),
        tenant: asked.tenant.clone(),
        id: id.to_owned(),
        reserved: 0,
        passed: 0,
    };
    let outcome = carry(&mut taken, body, &sender).await;
    if outcome.is_err() {
        let _ = sender.send(Err(std::io::Error::other("stopped"))).await;
    }
    outcome
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

async fn carry(
    taken: &mut Taken,
    mut body: web::Payload,
    sender: &mpsc::Sender<Result<Bytes, std::io::Error>>,
) -> Result<(), OciError> {
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|_| cut())?;
        let next = taken.passed + chunk.len() as u64;
        if next > taken.reserved {
            let step = next - taken.reserved;
            match store::reserve_upload(&taken.pool, &taken.tenant, &taken.id, step.max(STEP), step).await? {
                store::Reserve::Taken(bytes) => taken.reserved += bytes,
                store::Reserve::Full { used, limit } => return Err(full(used, limit, step)),
            }
        }
        taken.passed = next;
        if sender.send(Ok(chunk)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// A blob is there: it counts with its real size, once a tenant, and its upload counts no more.
async fn commit_blob(
    door: &FrontDoor,
    asked: &Asked,
    upload: Option<&str>,
    digest: &Digest,
) -> Result<(), OciError> {
    let size = door.registry.blob_size(&asked.name, digest).await?.ok_or_else(cut)?;
    fail::fail_point!("registries::blob_commit", |_| Err(OciError::denied("failpoint")));
    store::commit_blob(&door.pool, &asked.tenant, &asked.repository, digest, size, upload).await?;
    Ok(())
}

/// PUT .../manifests/REFERENCE
pub(super) async fn put_manifest(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    reference: &str,
    mut body: web::Payload,
) -> Result<HttpResponse, OciError> {
    may_push(door, asked).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await {
        bytes.extend_from_slice(&chunk.map_err(|_| cut())?);
        if bytes.len() > manifest::LIMIT {
            return Err(OciError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "MANIFEST_INVALID",
                "larger than 4 MiB",
            ));
        }
    }
    let kind =
        req.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let parsed = Manifest::parse(&bytes, &kind).map_err(|error| OciError::invalid(error.to_string()))?;
    let digest = Digest::of(&bytes);
    let tag = match reference.parse::<Digest>() {
        Ok(own) if own == digest => None,
        Ok(_) => {
            return Err(OciError::new(
                StatusCode::BAD_REQUEST,
                "DIGEST_INVALID",
                "the manifest has another digest",
            ));
        }
        Err(_) => Some(reference.parse::<Tag>().map_err(|_| OciError::unknown_manifest())?),
    };
    if tag.as_ref().is_some_and(|tag| tag.as_str().starts_with("bulkhead-")) {
        return Err(OciError::denied("tags that start with bulkhead- are the platform's"));
    }
    let (parts, total) = check_parts(door, asked, &parsed).await?;
    let new = NewManifest {
        digest: digest.clone(),
        media_type: kind.clone(),
        size: bytes.len() as u64,
        total,
        parts,
        pushed_by: asked.claims.pusher().to_owned(),
    };
    // Written down first: a crash in between leaves a trace that is looked after.
    match store::insert_manifest(&door.pool, &asked.tenant, &asked.repository, &new).await? {
        Noted::Yes => {}
        Noted::Full { used, limit } => return Err(full(used, limit, new.size)),
        Noted::Unknown => return Err(never_pushed()),
    }
    fail::fail_point!("registries::manifest_noted", |_| Err(OciError::denied("failpoint")));
    let answer = door
        .registry
        .request(reqwest::Method::PUT, &asked.name, &format!("manifests/{digest}"), &["pull", "push"])?
        .header(reqwest::header::CONTENT_TYPE, kind)
        .body(bytes)
        .send()
        .await
        .map_err(unreachable_registry)?;
    if status(&answer) != StatusCode::CREATED {
        return Ok(relay(answer));
    }
    fail::fail_point!("registries::manifest_stored", |_| Err(OciError::denied("failpoint")));
    store::confirm_manifest(&door.pool, asked, &new, tag.as_ref()).await?;
    Ok(HttpResponse::Created()
        .insert_header((header::LOCATION, format!("/v2/{}/manifests/{digest}", asked.name)))
        .insert_header(("Docker-Content-Digest", digest.as_str()))
        .insert_header(("Docker-Distribution-Api-Version", "registry/2.0"))
        .finish())
}

/// Holds every part against what is really there: declared sizes are only claims.
async fn check_parts(
    door: &FrontDoor,
    asked: &Asked,
    parsed: &Manifest,
) -> Result<(Vec<(Digest, bool)>, u64), OciError> {
    let (list, is_blob): (Vec<&Descriptor>, bool) = match parsed {
        Manifest::Image { config, layers } => (std::iter::once(config).chain(layers).collect(), true),
        Manifest::Index { children } => (children.iter().map(|child| &child.descriptor).collect(), false),
    };
    let registry = Arc::new(door.registry.clone());
    let mut checks = futures_util::stream::iter(list.clone().into_iter().cloned().map(|part| {
        let (registry, name, pool) = (Arc::clone(&registry), asked.name.clone(), door.pool.clone());
        let (tenant, repository) = (asked.tenant.clone(), asked.repository.clone());
        async move {
            let real = if is_blob {
                registry.blob_size(&name, &part.digest).await?
            } else {
                registry.manifest_size(&name, &part.digest).await?
            };
            match real {
                Some(real) if real == part.size => Ok(()),
                Some(_) => Err(OciError::invalid("a declared size is not the real one")),
                None if is_blob => {
                    store::forget_blob(&pool, &tenant, &repository, &part.digest).await?;
                    Err(never_pushed())
                }
                None => Err(never_pushed()),
            }
        }
    }))
    .buffer_unordered(8);
    while let Some(check) = checks.next().await {
        check?;
    }
    let total = list.iter().map(|part| part.size).sum();
    Ok((list.into_iter().map(|part| (part.digest.clone(), is_blob)).collect(), total))
}
