//! Manifests through the registry proxy: parsed strictly, checked against the stored content, and recorded
//! before they are sent to the registry.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::StreamExt;

use super::body::TimedBody;
use super::front::{FrontDoor, OciError, PATIENCE};
use super::measure;
use super::proxy::{ProxyRequest, relay, unreachable_registry};
use super::referrers::no_parameters;
use super::store::{self, Attached, NewManifest, Noted};
use super::uploads::{Work, status};
use crate::db;
use crate::ids::{Digest, Tag};
use crate::images::manifest::{self, Descriptor, Manifest, ManifestContent};

pub(super) async fn may_push(door: &FrontDoor, asked: &ProxyRequest) -> Result<(), OciError> {
    if !door.registry.has_room() {
        return Err(OciError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "UNAVAILABLE",
            "the registry's disk is nearly full; nothing can be pushed until an admin makes room",
        ));
    }
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    match store::tenant_state(&mut conn, &asked.tenant).await?.as_deref() {
        Some("active") => Ok(()),
        Some(state) => Err(OciError::denied(format!("the tenant is {state}: nothing can be pushed"))),
        None => Err(OciError::unknown_name()),
    }
}

fn never_pushed() -> OciError {
    OciError::new(
        StatusCode::BAD_REQUEST,
        "MANIFEST_BLOB_UNKNOWN",
        "the manifest references content that was not pushed or was deleted: push the image again",
    )
}

pub(super) fn full(asked: &ProxyRequest, used: u64, limit: u64, needed: u64) -> OciError {
    let tenant = &asked.tenant;
    OciError::denied(format!(
        "the registry quota of {tenant} is used up: limit {limit} bytes, used {used}, needed at least {needed}. \
         Delete images that no app runs (skopeo delete docker://HOST/{tenant}/REPOSITORY:TAG), or ask an admin for more: \
         PATCH /api/v1/tenants/{tenant} {{\"quota\": {{\"registry_bytes\": N}}}}"
    ))
}

/// PUT .../manifests/REFERENCE
pub(super) async fn put_manifest(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    reference: &str,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    no_parameters(req)?;
    may_push(door, asked).await?;
    let kind =
        req.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    // Refuse a declared size above the limit before taking a permit.
    let length = req.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > manifest::LIMIT as u64) {
        return Err(too_large());
    }
    let place = door.registry.room().manifests.take(&asked.tenant).await?;
    let bytes = collect(body).await?;
    let (bytes, parsed) = parse(door, asked, bytes, &kind).await?;
    let digest = Digest::of(&bytes);
    let tag = match reference.parse::<Digest>() {
        Ok(own) if own == digest => None,
        Ok(_) => {
            return Err(OciError::new(
                StatusCode::BAD_REQUEST,
                "DIGEST_INVALID",
                "the digest in the URL does not match the manifest",
            ));
        }
        Err(_) => Some(reference.parse::<Tag>().map_err(|_| OciError::unknown_manifest())?),
    };
    if tag.as_ref().is_some_and(|tag| tag.as_str().starts_with("bulkhead-")) {
        return Err(OciError::denied("tags that start with bulkhead- are reserved for the platform"));
    }
    let (parts, total) = check_parts(door, asked, &parsed).await?;
    measure::at_push(door, asked, &parsed).await?;
    let new = NewManifest {
        digest: digest.clone(),
        media_type: kind.clone(),
        size: bytes.len() as u64,
        total,
        parts,
        pushed_by: asked.claims.pusher().to_owned(),
        attached: attached(&parsed)?,
    };
    let subject = parsed.subject.map(|subject| subject.digest);
    let stored = Work::finish(store_manifest(Work::of(door, asked), new, bytes, tag)).await?;
    drop(place);
    if let Some(refused) = stored {
        return Ok(relay(refused));
    }
    let mut answer = HttpResponse::Created();
    answer
        .insert_header((header::LOCATION, format!("/v2/{}/manifests/{digest}", asked.name)))
        .insert_header(("Docker-Content-Digest", digest.as_str()))
        .insert_header(("Docker-Distribution-Api-Version", "registry/2.0"));
    if let Some(subject) = subject {
        // Tells the client that the subject's referrer list contains the manifest, so the client keeps no list
        // under a tag.
        answer.insert_header(("OCI-Subject", subject.as_str()));
    }
    Ok(answer.finish())
}

/// Returns the manifest's entry in its subject's list of referrers.
fn attached(parsed: &Manifest) -> Result<Option<Attached>, OciError> {
    let Some(subject) = &parsed.subject else { return Ok(None) };
    let annotations = serde_json::to_string(&parsed.annotations).map_err(crate::error::Error::internal)?;
    let artifact_type = parsed.kind().to_owned();
    Ok(Some(Attached { subject: subject.digest.clone(), artifact_type, annotations }))
}

/// Records a manifest, sends it to the registry and confirms it; runs to its end without its client. Returns
/// the registry's answer if it refuses the manifest.
async fn store_manifest(
    work: Work,
    new: NewManifest,
    bytes: Vec<u8>,
    tag: Option<Tag>,
) -> Result<Option<reqwest::Response>, OciError> {
    let Work { pool, registry, asked } = &work;
    let digest = &new.digest;
    // Record it first: after a crash, the sweep finds the row.
    match store::insert_manifest(pool, &asked.tenant, &asked.repository, &new, tag.as_ref()).await? {
        Noted::Yes => {}
        Noted::Full { used, limit } => return Err(full(asked, used, limit, new.size)),
        Noted::Unknown => return Err(never_pushed()),
    }
    fail::fail_point!("registries::manifest_noted", |_| Err(OciError::denied("failpoint")));
    let answer = registry
        .request(reqwest::Method::PUT, &asked.name, &format!("manifests/{digest}"), &["pull", "push"])?
        .header(reqwest::header::CONTENT_TYPE, &new.media_type)
        .body(bytes)
        .timeout(PATIENCE)
        .send()
        .await
        .map_err(unreachable_registry)?;
    if status(&answer) != StatusCode::CREATED {
        return Ok(Some(answer));
    }
    fail::fail_point!("registries::manifest_stored", |_| Err(OciError::denied("failpoint")));
    store::confirm_manifest(pool, asked, &new, tag.as_ref()).await?;
    Ok(None)
}

/// Maximum time for the complete body of a manifest.
const ARRIVE: Duration = Duration::from_secs(60);

fn too_large() -> OciError {
    OciError::new(StatusCode::PAYLOAD_TOO_LARGE, "MANIFEST_INVALID", "the manifest is larger than 4 MiB")
}

async fn collect(body: web::Payload) -> Result<Vec<u8>, OciError> {
    let mut body = TimedBody::new(body).within(ARRIVE);
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await? {
        if bytes.len() + chunk.len() > manifest::LIMIT {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Parses a manifest outside the request threads, one at a time for each tenant.
async fn parse(
    door: &FrontDoor,
    asked: &ProxyRequest,
    bytes: Vec<u8>,
    kind: &str,
) -> Result<(Vec<u8>, Manifest), OciError> {
    let turn = door.registry.room().parsers.take(&asked.tenant).await?;
    let kind = kind.to_owned();
    let reading = tokio::task::spawn_blocking(move || {
        let parsed = Manifest::parse(&bytes, &kind);
        drop(turn);
        (bytes, parsed)
    });
    let (bytes, parsed) =
        reading.await.map_err(|error| OciError::from(crate::error::Error::internal(error)))?;
    parsed.map(|parsed| (bytes, parsed)).map_err(|error| OciError::invalid(error.to_string()))
}

/// Checks every part against the stored content: declared sizes are only claims.
async fn check_parts(
    door: &FrontDoor,
    asked: &ProxyRequest,
    parsed: &Manifest,
) -> Result<(Vec<(Digest, bool)>, u64), OciError> {
    let (list, is_blob): (Vec<&Descriptor>, bool) = match &parsed.parts {
        ManifestContent::Image { config, layers } => (std::iter::once(config).chain(layers).collect(), true),
        ManifestContent::Index { children } => {
            (children.iter().map(|child| &child.descriptor).collect(), false)
        }
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
                Some(_) => Err(OciError::invalid("a declared size differs from the real size")),
                None => {
                    if is_blob {
                        store::forget_blob(&pool, &tenant, &repository, &part.digest).await?;
                    }
                    let what = if is_blob { "blob" } else { "manifest" };
                    Err(OciError::new(
                        StatusCode::BAD_REQUEST,
                        "MANIFEST_BLOB_UNKNOWN",
                        format!(
                            "the {what} {} was not pushed to this repository: push the image again",
                            part.digest
                        ),
                    ))
                }
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
