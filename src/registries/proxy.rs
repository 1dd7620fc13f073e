//! `/v2/`: which requests there are, who may make them, and how they are passed on. What is not
//! listed here does not reach the registry.

use actix_web::http::{Method, StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::StreamExt;
use serde_json::json;

use super::front::{Door, FrontDoor, OciError};
use super::token::Claims;
use super::{distribution, store, uploads, write};
use crate::access::Public;
use crate::db;
use crate::ids::{Digest, RepositoryPath, Tag, TenantName};
use crate::images::manifest;

/// What a path below `/v2/` names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Version,
    Catalog,
    Blob(Digest),
    StartUpload,
    Upload(String),
    Manifest(String),
    Tags,
    Referrers,
}

/// A request that was understood and authorised.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) tenant: TenantName,
    pub(super) repository: RepositoryPath,
    /// `TENANT/REPOSITORY`.
    pub(super) name: String,
    pub(super) claims: Claims,
}

/// Splits a path: the name may hold slashes, so the end decides.
fn place(path: &str) -> Option<(&str, Place)> {
    if path.is_empty() {
        return Some(("", Place::Version));
    }
    if path == "_catalog" {
        return Some(("", Place::Catalog));
    }
    if let Some(name) = path.strip_suffix("/tags/list") {
        return Some((name, Place::Tags));
    }
    if let Some(name) = path.strip_suffix("/blobs/uploads/").or_else(|| path.strip_suffix("/blobs/uploads")) {
        return Some((name, Place::StartUpload));
    }
    let (rest, last) = path.rsplit_once('/')?;
    if let Some(name) = rest.strip_suffix("/blobs/uploads") {
        return is_upload_id(last).then(|| (name, Place::Upload(last.to_owned())));
    }
    if let Some(name) = rest.strip_suffix("/blobs") {
        return Some((name, Place::Blob(last.parse().ok()?)));
    }
    if let Some(name) = rest.strip_suffix("/manifests") {
        let good = last.parse::<Digest>().is_ok() || last.parse::<Tag>().is_ok();
        return good.then(|| (name, Place::Manifest(last.to_owned())));
    }
    if let Some(name) = rest.strip_suffix("/referrers") {
        return Some((name, Place::Referrers));
    }
    None
}

/// Whether this can be the id of an upload.
pub(super) fn is_upload_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Every request below `/v2/`.
pub async fn handle(
    _: Public,
    req: HttpRequest,
    door: web::Data<FrontDoor>,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    let path = req.path().strip_prefix("/v2/").unwrap_or("").to_owned();
    let (name, place) = place(&path).ok_or_else(OciError::unknown_name)?;
    let claims = door.claims(&req).await?;
    if place == Place::Version {
        return match claims {
            Some(_) => Ok(version()),
            None => Err(door.challenge(&req, None)),
        };
    }
    if place == Place::Catalog {
        return Err(OciError::denied("the catalogue is not available; list tags of one repository"));
    }
    let read = matches!(*req.method(), Method::GET | Method::HEAD);
    let (tenant, repository) = name.split_once('/').ok_or_else(OciError::unknown_name)?;
    let tenant: TenantName = tenant.parse().map_err(|_| OciError::unknown_name())?;
    let repository: RepositoryPath = repository.parse().map_err(|_| OciError::unknown_name())?;
    let wanted = if read { "pull" } else { "push" };
    let claims = claims.filter(|claims| claims.allows(name, "pull") && claims.allows(name, wanted));
    let Some(claims) = claims else {
        return Err(door.challenge(&req, Some((name, if read { "pull" } else { "pull,push" }))));
    };
    if !read && door.door != Door::Tenants {
        return Err(OciError::unsupported());
    }
    let asked = Asked { tenant, repository, name: name.to_owned(), claims };
    match (req.method().as_str(), place) {
        ("GET" | "HEAD", Place::Blob(digest)) => get_blob(&door, &req, &asked, &digest).await,
        ("GET" | "HEAD", Place::Manifest(reference)) => get_manifest(&door, &req, &asked, &reference).await,
        ("GET", Place::Tags) => list_tags(&door, &asked).await,
        ("GET", Place::Referrers) => {
            Ok(HttpResponse::Ok().content_type("application/vnd.oci.image.index.v1+json").body(
                r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#,
            ))
        }
        ("POST", Place::StartUpload) => uploads::start(&door, &req, &asked, body).await,
        ("GET" | "HEAD", Place::Upload(id)) => uploads::look(&door, &req, &asked, &id).await,
        ("DELETE", Place::Upload(id)) => uploads::cancel(&door, &req, &asked, &id).await,
        ("PATCH" | "PUT", Place::Upload(id)) => uploads::append(&door, &req, &asked, &id, body).await,
        ("PUT", Place::Manifest(reference)) => {
            write::put_manifest(&door, &req, &asked, &reference, body).await
        }
        _ => Err(OciError::unsupported()),
    }
}

fn version() -> HttpResponse {
    HttpResponse::Ok().insert_header(("Docker-Distribution-Api-Version", "registry/2.0")).json(json!({}))
}

/// Only what is on record is there: what a crash left uncounted is pushed again.
async fn get_blob(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    digest: &Digest,
) -> Result<HttpResponse, OciError> {
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    if !store::has_blob(&mut conn, &asked.tenant, &asked.repository, digest).await? {
        return Err(OciError::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "there is no such blob"));
    }
    drop(conn);
    pass(door, req, asked, &format!("blobs/{digest}")).await
}

/// Tags are our own: a tag becomes its digest here, the registry is asked by digest.
async fn get_manifest(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    reference: &str,
) -> Result<HttpResponse, OciError> {
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    let digest = if let Ok(digest) = reference.parse::<Digest>() {
        store::find_manifest(&mut conn, &asked.tenant, &asked.repository, &digest).await?
    } else {
        let tag: Tag = reference.parse().map_err(|_| OciError::unknown_manifest())?;
        store::find_tag(&mut conn, &asked.tenant, &asked.repository, &tag).await?
    };
    drop(conn);
    let digest = digest.ok_or_else(OciError::unknown_manifest)?;
    pass(door, req, asked, &format!("manifests/{digest}")).await
}

async fn list_tags(door: &FrontDoor, asked: &Asked) -> Result<HttpResponse, OciError> {
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    let tags = store::list_tag_names(&mut conn, &asked.tenant, &asked.repository).await?;
    if tags.is_empty() {
        return Err(OciError::unknown_name());
    }
    Ok(HttpResponse::Ok().json(json!({"name": asked.name, "tags": tags})))
}

/// Passes a read on and streams the answer back.
async fn pass(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &Asked,
    rest: &str,
) -> Result<HttpResponse, OciError> {
    let method = if *req.method() == Method::HEAD { reqwest::Method::HEAD } else { reqwest::Method::GET };
    let mut upstream = door.registry.request(method, &asked.name, rest, &["pull"])?;
    upstream = upstream.header(reqwest::header::ACCEPT, manifest::ACCEPT);
    for name in ["range", "if-none-match"] {
        if let Some(value) = req.headers().get(name).and_then(|v| v.to_str().ok()) {
            upstream = upstream.header(name, value);
        }
    }
    Ok(relay(distribution::read(upstream).await.map_err(unreachable_registry)?))
}

pub(super) fn unreachable_registry(error: reqwest::Error) -> OciError {
    tracing::warn!(%error, "the registry does not answer");
    OciError::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "the registry does not answer; try again")
}

/// The headers of the registry's answers that a client needs.
const HEADERS: [&str; 10] = [
    "content-type",
    "content-length",
    "content-range",
    "docker-content-digest",
    "docker-upload-uuid",
    "location",
    "range",
    "etag",
    "docker-distribution-api-version",
    "accept-ranges",
];

/// The registry's answer as ours: streamed, its address taken out of `Location`.
pub(super) fn relay(answer: reqwest::Response) -> HttpResponse {
    let status = StatusCode::from_u16(answer.status().as_u16()).unwrap_or(StatusCode::BAD_GATEWAY);
    // The platform's own token was refused: that is our mistake, never a challenge for the client.
    let status = if status == StatusCode::UNAUTHORIZED { StatusCode::BAD_GATEWAY } else { status };
    let mut response = HttpResponse::build(status);
    let mut length = None;
    for name in HEADERS {
        let Some(value) = answer.headers().get(name).and_then(|v| v.to_str().ok()) else { continue };
        match name {
            "content-length" => length = value.parse::<u64>().ok(),
            "location" => {
                let path = value.find("/v2/").map_or(value, |at| &value[at..]);
                response.insert_header((header::LOCATION, path.to_owned()));
            }
            _ => {
                response.insert_header((name, value.to_owned()));
            }
        }
    }
    let body = answer.bytes_stream().map(|chunk| chunk.map_err(std::io::Error::other));
    match length {
        Some(length) => response.no_chunking(length).streaming(body),
        None => response.streaming(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_places_are_found() {
        let digest = Digest::of(b"x");
        assert_eq!(place(""), Some(("", Place::Version)));
        assert_eq!(place("a/b/c/tags/list"), Some(("a/b/c", Place::Tags)));
        assert_eq!(place(&format!("a/b/blobs/{digest}")), Some(("a/b", Place::Blob(digest.clone()))));
        assert_eq!(place("a/b/blobs/uploads/"), Some(("a/b", Place::StartUpload)));
        assert_eq!(place("a/b/blobs/uploads/1-f"), Some(("a/b", Place::Upload("1-f".into()))));
        assert_eq!(place("a/b/manifests/1.0"), Some(("a/b", Place::Manifest("1.0".into()))));
        for path in [
            "a/b",
            "a/b/blobs/sha256:zz",
            "a/b/manifests/..",
            "a/b/blobs/uploads/a%2f",
            "a/b/manifests/a b",
            "x",
        ] {
            assert_eq!(place(path), None, "{path}");
        }
    }
}
