//! Lists for registry clients: the tags of a repository, and the manifests attached to a manifest (distribution
//! specification 1.1, "Listing referrers"). Both come from the platform's own tables, in pages.

use actix_web::body::{MessageBody, SizedStream};
use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use serde_json::{Value, json};

use super::front::{FrontDoor, OciError};
use super::proxy::ProxyRequest;
use super::store;
use crate::db;
use crate::ids::{Digest, TenantName};
use crate::images::manifest::{OCI_INDEX, shown};
use crate::permits::Permit;

/// Maximum tags in an answer.
const TAGS: i64 = 2_000;
/// Maximum referrers in an answer; each has at most 64 KiB of annotations.
const REFERRERS: i64 = 16;
/// Bytes sent at once.
const CHUNK: usize = 16 << 10;

/// The parameters of a list; each at most once.
#[derive(Debug, Default, PartialEq, Eq)]
struct ReferrersQuery {
    n: Option<i64>,
    last: Option<String>,
    artifact_type: Option<String>,
}

fn bad(text: String) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", text)
}

/// Parses a query; refuses unknown and repeated keys.
fn pairs(query: &str, known: &[&str]) -> Result<Vec<(String, String)>, OciError> {
    let pairs = web::Query::<Vec<(String, String)>>::from_query(query)
        .map(web::Query::into_inner)
        .map_err(|_| bad("the query cannot be read".into()))?;
    for (n, (key, _)) in pairs.iter().enumerate() {
        if !known.contains(&key.as_str()) {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(bad(format!("unknown parameter {}; valid parameters: {known}", shown(key))));
        }
        if pairs[..n].iter().any(|(before, _)| before == key) {
            return Err(bad(format!("the parameter {key} is given twice")));
        }
    }
    Ok(pairs)
}

/// Refuses all parameters except `ns`, with which mirrors name their upstream registry.
pub(super) fn no_parameters(req: &HttpRequest) -> Result<(), OciError> {
    pairs(req.query_string(), &["ns"]).map(drop)
}

impl ReferrersQuery {
    fn parse(query: &str, known: &[&str]) -> Result<Self, OciError> {
        let mut read = Self::default();
        for (key, value) in pairs(query, known)? {
            match key.as_str() {
                "n" => {
                    let n = value.parse().ok().filter(|n| *n >= 0 && !value.starts_with('+'));
                    read.n = Some(n.ok_or_else(|| {
                        OciError::new(
                            StatusCode::BAD_REQUEST,
                            "PAGINATION_NUMBER_INVALID",
                            format!("n is {}; it must be a number from 0", shown(&value)),
                        )
                    })?);
                }
                "last" if value.len() > 255 || value.contains('\0') => {
                    return Err(bad("last is not the last entry of a page".into()));
                }
                "last" => read.last = Some(value),
                "artifactType" if value.len() > 255 || value.contains('\0') => {
                    return Err(bad("artifactType is not a media type".into()));
                }
                "artifactType" => read.artifact_type = Some(value).filter(|value| !value.is_empty()),
                _ => {}
            }
        }
        Ok(read)
    }
}

fn link(path: &str, pairs: &[(&str, &str)]) -> (header::HeaderName, String) {
    let query: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={}", escaped(value))).collect();
    (header::LINK, format!("<{path}?{}>; rel=\"next\"", query.join("&")))
}

/// Percent-encodes a value for a query.
fn escaped(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// GET .../tags/list: tags in byte order, `n` of them after `last`.
pub(super) async fn list_tags(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
) -> Result<HttpResponse, OciError> {
    let query = ReferrersQuery::parse(req.query_string(), &["n", "last", "ns"])?;
    let limit = query.n.unwrap_or(TAGS).min(TAGS);
    let after = query.last.unwrap_or_default();
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    let found =
        store::list_tag_names(&mut conn, &asked.tenant, &asked.repository, &after, limit.saturating_add(1))
            .await?;
    drop(conn);
    let mut tags = found.ok_or_else(OciError::unknown_name)?;
    let size = usize::try_from(limit).unwrap_or_default();
    let more = tags.len() > size;
    tags.truncate(size);
    let mut answer = HttpResponse::Ok();
    if let (true, Some(last)) = (more, tags.last()) {
        let path = format!("/v2/{}/tags/list", asked.name);
        answer.insert_header(link(&path, &[("n", &limit.to_string()), ("last", last)]));
    }
    Ok(answer.json(json!({"name": asked.name, "tags": tags})))
}

/// GET .../referrers/DIGEST: an index of the manifests attached to a manifest, which itself may be missing.
pub(super) async fn list(
    door: &FrontDoor,
    req: &HttpRequest,
    asked: &ProxyRequest,
    subject: &Digest,
) -> Result<HttpResponse, OciError> {
    let query = ReferrersQuery::parse(req.query_string(), &["artifactType", "last", "ns"])?;
    let after = query.last.unwrap_or_default();
    let kind = query.artifact_type.as_deref();
    let place_in_room = door.registry.room().lists.take(&asked.tenant).await?;
    let mut conn = db::begin(&door.pool, &asked.tenant).await?;
    let place = (&asked.tenant, &asked.repository);
    let mut rows = store::list_referrers(&mut conn, place, subject, kind, (&after, REFERRERS + 1)).await?;
    drop(conn);
    let size = usize::try_from(REFERRERS).unwrap_or_default();
    let more = rows.len() > size;
    rows.truncate(size);
    let mut answer = HttpResponse::Ok();
    answer.content_type(OCI_INDEX);
    if kind.is_some() {
        answer.insert_header(("OCI-Filters-Applied", "artifactType"));
    }
    if let (true, Some(last)) = (more, rows.last()) {
        let path = format!("/v2/{}/referrers/{subject}", asked.name);
        let mut pairs = vec![("last", last.digest.as_str())];
        pairs.extend(kind.map(|kind| ("artifactType", kind)));
        answer.insert_header(link(&path, &pairs));
    }
    let manifests: Vec<Value> = rows.into_iter().map(entry).collect();
    let text = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).to_string();
    Ok(answer.body(held(text, place_in_room)))
}

/// A body that holds its permit until the last piece is sent: a client may read slowly.
fn held(text: String, place: Permit<TenantName>) -> impl MessageBody {
    let size = text.len() as u64;
    let mut left = Bytes::from(text);
    let pieces = std::iter::from_fn(move || {
        let _held = &place;
        let piece = left.split_to(left.len().min(CHUNK));
        (!piece.is_empty()).then_some(Ok::<_, actix_web::Error>(piece))
    });
    SizedStream::new(size, futures_util::stream::iter(pieces))
}

fn entry(row: store::Referrer) -> Value {
    let mut entry = json!({"mediaType": row.media_type, "digest": row.digest, "size": row.size});
    if !row.artifact_type.is_empty() {
        entry["artifactType"] = row.artifact_type.into();
    }
    let annotations: Value = serde_json::from_str(&row.annotations).unwrap_or_default();
    if annotations.as_object().is_some_and(|map| !map.is_empty()) {
        entry["annotations"] = annotations;
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_whole_or_refused_by_name() {
        let known = ["n", "last", "ns"];
        let read = ReferrersQuery::parse("n=5&last=v1.0&ns=docker.io", &known).unwrap();
        assert_eq!((read.n, read.last.as_deref()), (Some(5), Some("v1.0")));
        for bad in ["n=-1", "n=x", "n=+1", "n=99999999999999999999", "n=1&n=2", "last=%00", "page=2", "N=1"] {
            assert!(ReferrersQuery::parse(bad, &known).is_err(), "{bad}");
        }
        let text = ReferrersQuery::parse("artifactType=a%2Fb", &known).unwrap_err().to_string();
        assert!(text.contains("artifactType") && text.contains("n, last"), "{text}");
    }

    #[test]
    fn a_link_holds_nothing_raw() {
        let (_, text) = link("/v2/a/b/tags/list", &[("last", "a b>\"&=")]);
        assert_eq!(text, "</v2/a/b/tags/list?last=a%20b%3E%22%26%3D>; rel=\"next\"");
    }
}
