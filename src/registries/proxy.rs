//! `/v2/`: the accepted requests, their authorization, and their forwarding. Other requests do not reach the
//! registry.

use actix_web::http::{Method, StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::StreamExt;
use serde_json::json;

use super::front::{Door, FrontDoor, OciError};
use super::ranges::{self, Asking};
use super::token::Claims;
use super::{distribution, names, referrers, remove, store, uploads, write};
use crate::access::Public;
use crate::db;
use crate::ids::{Digest, RepositoryPath, Tag, TenantName};
use crate::images::manifest::{self, shown};

/// The object that a path below `/v2/` names.
#[derive(Debug, PartialEq, Eq)]
enum RegistryObject {
    Version,
    Catalog,
    Blob(Digest),
    StartUpload,
    Upload(String),
    Manifest(String),
    /// An invalid digest or tag, as it was sent.
    Nonsense(String),
    Tags,
    Referrers(Digest),
}

/// A parsed and authorized request.
#[derive(Clone)]
pub(super) struct ProxyRequest {
    pub(super) tenant: TenantName,
    pub(super) repository: RepositoryPath,
    /// `TENANT/REPOSITORY`.
    pub(super) name: String,
    pub(super) claims: Claims,
}

/// Splits a path. The name may contain slashes, so the end of the path decides.
fn place(path: &str) -> Option<(&str, RegistryObject)> {
    if path.is_empty() {
        return Some(("", RegistryObject::Version));
    }
    if path == "_catalog" {
        return Some(("", RegistryObject::Catalog));
    }
    if let Some(name) = path.strip_suffix("/tags/list") {
        return Some((name, RegistryObject::Tags));
    }
    if let Some(name) = path.strip_suffix("/blobs/uploads/").or_else(|| path.strip_suffix("/blobs/uploads")) {
        return Some((name, RegistryObject::StartUpload));
    }
    let (rest, last) = path.rsplit_once('/')?;
    if let Some(name) = rest.strip_suffix("/blobs/uploads") {
        return is_upload_id(last).then(|| (name, RegistryObject::Upload(last.to_owned())));
    }
    if let Some(name) = rest.strip_suffix("/blobs") {
        return Some((
            name,
            last.parse().map_or_else(|_| RegistryObject::Nonsense(last.to_owned()), RegistryObject::Blob),
        ));
    }
    if let Some(name) = rest.strip_suffix("/manifests") {
        let good = last.parse::<Digest>().is_ok() || last.parse::<Tag>().is_ok();
        let place = if good { RegistryObject::Manifest } else { RegistryObject::Nonsense };
        return Some((name, place(last.to_owned())));
    }
    if let Some(name) = rest.strip_suffix("/referrers") {
        return Some((
            name,
            last.parse()
                .map_or_else(|_| RegistryObject::Nonsense(last.to_owned()), RegistryObject::Referrers),
        ));
    }
    None
}

/// Returns whether a text has the form of an upload's id.
pub(super) fn is_upload_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Handles every request below `/v2/`.
pub async fn handle(
    _: Public,
    req: HttpRequest,
    door: web::Data<FrontDoor>,
    body: web::Payload,
) -> Result<HttpResponse, OciError> {
    let path = req.path().strip_prefix("/v2/").unwrap_or("").to_owned();
    let (name, place) = place(&path).ok_or_else(OciError::unknown_name)?;
    let claims = door.claims(&req).await?;
    if place == RegistryObject::Version {
        return match claims {
            Some(_) => Ok(version()),
            None => Err(door.challenge(&req, None)),
        };
    }
    if place == RegistryObject::Catalog {
        return Err(OciError::denied("the catalogue is not available; list tags of one repository"));
    }
    let read = matches!(*req.method(), Method::GET | Method::HEAD);
    let wanted = if read { "pull" } else { "push" };
    let challenge = || door.challenge(&req, Some((name, if read { "pull" } else { "pull,push" })));
    let Some(claims) = claims else { return Err(challenge()) };
    // A HEAD answer has no text. A pushing client sends HEAD for each blob first, then reads the reason of a
    // refusal from the next answer.
    let mute = *req.method() == Method::HEAD && matches!(place, RegistryObject::Blob(_));
    let split = names::split(&door, &req, &claims, name);
    let (tenant, repository) = split.map_err(|why| if mute { OciError::unknown_blob() } else { why })?;
    if !(claims.allows(name, "pull") && claims.allows(name, wanted)) {
        return Err(match names::beyond(&door, &req, &claims, (&tenant, &repository), wanted).await? {
            Some(_) if mute => OciError::unknown_blob(),
            Some(why) => why,
            None => challenge(),
        });
    }
    if !read && door.door != Door::Tenants {
        return Err(OciError::unsupported());
    }
    let asked = ProxyRequest { tenant, repository, name: name.to_owned(), claims };
    match (req.method().as_str(), place) {
        (_, RegistryObject::Nonsense(text)) => Err(OciError::new(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            format!("{} is neither a digest (sha256: and 64 hex digits) nor a tag", shown(&text)),
        )),
        ("GET" | "HEAD", RegistryObject::Blob(digest)) => get_blob(&door, &req, &asked, &digest).await,
        ("DELETE", RegistryObject::Blob(digest)) => remove::delete_blob(&door, &asked, &digest).await,
        ("GET" | "HEAD", RegistryObject::Manifest(reference)) => {
            get_manifest(&door, &req, &asked, &reference).await
        }
        ("DELETE", RegistryObject::Manifest(reference)) => {
            remove::delete_manifest(&door, &asked, &reference).await
        }
        ("GET", RegistryObject::Tags) => {
            let _room = door.room(&asked.tenant).await?;
            referrers::list_tags(&door, &req, &asked).await
        }
        ("GET", RegistryObject::Referrers(subject)) => {
            let _room = door.room(&asked.tenant).await?;
            referrers::list(&door, &req, &asked, &subject).await
        }
        ("POST", RegistryObject::StartUpload) => uploads::start(&door, &req, &asked, body).await,
        ("GET" | "HEAD", RegistryObject::Upload(id)) => uploads::look(&door, &req, &asked, &id).await,
        ("DELETE", RegistryObject::Upload(id)) => uploads::cancel(&door, &req, &asked, &id).await,
        ("PATCH" | "PUT", RegistryObject::Upload(id)) => {
            uploads::append(&door, &req, &asked, &id, body).await
        }
        ("PUT", RegistryObject::Manifest(reference)) => {
            write::put_manifest(&door, &req, &asked, &reference, body).await
        }
        _ => Err(OciError::unsupported()),
    }
}

fn version() -> HttpResponse {
    HttpResponse::Ok().insert_header(("Docker-Distribution-Api-Version", "registry/2.0")).json(json!({}))
}

/// Serves only recorded blobs: a blob that a crash left uncounted must be pushed again.
async fn get_blob(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    digest: &Digest,
) -> Result<HttpResponse, OciError> {
    referrers::no_parameters(req)?;
    let room = door.room(&asked.tenant).await?;
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    let size = store::find_blob_size(&mut conn, &asked.tenant, &asked.repository, digest).await?;
    drop((conn, room));
    let size = size.ok_or_else(OciError::unknown_blob)?;
    let range = match ranges::of(req, digest, size) {
        Asking::Whole => None,
        Asking::Part(first, last) => Some(format!("bytes={first}-{last}")),
        // The registry's own refusal would announce the length of the whole blob.
        Asking::Nothing => {
            return Ok(HttpResponse::RangeNotSatisfiable()
                .insert_header((header::CONTENT_RANGE, format!("bytes */{size}")))
                .insert_header(("Docker-Distribution-Api-Version", "registry/2.0"))
                .finish());
        }
    };
    pass(door, req, asked, &format!("blobs/{digest}"), range).await
}

/// Tags exist only in the platform's database: resolve the tag here and ask the registry by digest.
async fn get_manifest(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    reference: &str,
) -> Result<HttpResponse, OciError> {
    referrers::no_parameters(req)?;
    let room = door.room(&asked.tenant).await?;
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    let digest = if let Ok(digest) = reference.parse::<Digest>() {
        store::find_manifest(&mut conn, &asked.tenant, &asked.repository, &digest).await?
    } else {
        let tag: Tag = reference.parse().map_err(|_| OciError::unknown_manifest())?;
        store::find_tag(&mut conn, &asked.tenant, &asked.repository, &tag).await?
    };
    drop((conn, room));
    let digest = digest.ok_or_else(OciError::unknown_manifest)?;
    pass(door, req, asked, &format!("manifests/{digest}"), None).await
}

/// Forwards a read and streams the answer back.
async fn pass(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    rest: &str,
    range: Option<String>,
) -> Result<HttpResponse, OciError> {
    let method = if *req.method() == Method::HEAD { reqwest::Method::HEAD } else { reqwest::Method::GET };
    let mut upstream = door.registry.request(method, &asked.name, rest, &["pull"])?;
    upstream = upstream.header(reqwest::header::ACCEPT, manifest::ACCEPT);
    if let Some(range) = range {
        upstream = upstream.header(reqwest::header::RANGE, range);
    }
    if let Some(value) = req.headers().get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()) {
        upstream = upstream.header(reqwest::header::IF_NONE_MATCH, value);
    }
    Ok(relay(distribution::read(upstream).await.map_err(unreachable_registry)?))
}

pub(super) fn unreachable_registry(error: reqwest::Error) -> OciError {
    tracing::warn!(%error, "the registry does not answer");
    OciError::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "the registry does not answer; try again")
}

/// The headers of a registry answer that clients need.
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

/// Converts the registry's answer: streamed, with the registry's address removed from `Location`.
pub(super) fn relay(answer: reqwest::Response) -> HttpResponse {
    let status = StatusCode::from_u16(answer.status().as_u16()).unwrap_or(StatusCode::BAD_GATEWAY);
    // The registry refused the platform's own token: an internal error, never a challenge for the client.
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
        assert_eq!(place(""), Some(("", RegistryObject::Version)));
        assert_eq!(place("a/b/c/tags/list"), Some(("a/b/c", RegistryObject::Tags)));
        assert_eq!(
            place(&format!("a/b/blobs/{digest}")),
            Some(("a/b", RegistryObject::Blob(digest.clone())))
        );
        assert_eq!(place("a/b/blobs/uploads/"), Some(("a/b", RegistryObject::StartUpload)));
        assert_eq!(place("a/b/blobs/uploads/1-f"), Some(("a/b", RegistryObject::Upload("1-f".into()))));
        assert_eq!(place("a/b/manifests/1.0"), Some(("a/b", RegistryObject::Manifest("1.0".into()))));
        for path in ["a/b", "a/b/blobs/uploads/a%2f", "x"] {
            assert_eq!(place(path), None, "{path}");
        }
        for last in ["blobs/sha256:zz", "manifests/..", "manifests/a b", "referrers/1.0", "blobs/sha512:00"] {
            let path = format!("a/b/{last}");
            let text = last.split_once('/').unwrap().1.to_owned();
            assert_eq!(place(&path), Some(("a/b", RegistryObject::Nonsense(text))), "{last}");
        }
    }
}
