//! Deletions by a tenant: tags, manifests and blobs, over the API and through the registry proxy. An image that
//! a release uses stays, with the reason. Unreferenced content frees its bytes.

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde_json::json;
use sqlx::{PgConnection, PgPool};

use super::front::{FrontDoor, OciError};
use super::proxy::ProxyRequest;
use super::store::{self, Unplaced};
use super::uploads::Work;
use super::{Distribution, Holders, Reference, reconcile};
use crate::audit;
use crate::db;
use crate::error::Error;
use crate::ids::{ActorId, Digest, RepositoryPath, Tag, TenantId, TenantName};

/// Returns the reason to keep these manifests: the apps with releases that use any of them.
async fn deployed_by(
    conn: &mut PgConnection,
    holders: &dyn Holders,
    tenant: TenantId,
    repository: &RepositoryPath,
    family: &[String],
) -> Result<Option<String>, Error> {
    let mut apps: Vec<String> =
        holders.holders(conn, tenant, repository, family).await?.into_iter().map(|(_, app)| app).collect();
    apps.sort();
    apps.dedup();
    Ok((!apps.is_empty()).then(|| {
        format!(
            "this image is deployed by: {}. The releases of an app keep their images; delete the app first",
            apps.join(", ")
        )
    }))
}

/// Removes a tag. Returns its digest and the manifests that may be deleted with it.
pub(super) async fn untag(
    conn: &mut PgConnection,
    holders: &dyn Holders,
    tenant: TenantId,
    repository: &RepositoryPath,
    tag: &Tag,
) -> Result<(Digest, Vec<String>), Error> {
    let digest = store::delete_tag(conn, tenant, repository, tag).await?.ok_or(Error::NotFound)?;
    let family = store::list_family(conn, tenant, repository, &digest).await?;
    match deployed_by(conn, holders, tenant, repository, &family).await? {
        Some(why) => Err(Error::Conflict(why)),
        None => Ok((digest, family)),
    }
}

/// Deletes the given manifests that no tag, manifest or release references. First marks them for deletion,
/// under the lock that every push and deploy of the tenant takes: a manifest that is deployed at the same time
/// stays.
pub(super) async fn clear(
    pool: &PgPool,
    registry: &Distribution,
    holders: &dyn Holders,
    tenant: (TenantId, &TenantName),
    repository: &RepositoryPath,
    among: &[String],
) -> Result<(), Error> {
    let mut tx = db::begin(pool, tenant.0).await?;
    store::lock_project_of(&mut tx, tenant.0).await?;
    let held = holders.holders(&mut tx, tenant.0, repository, among).await?;
    let held: Vec<String> = held.into_iter().map(|(digest, _)| digest).collect();
    let loose = store::list_loose(&mut tx, tenant.0, repository, among, &held).await?;
    store::doom_manifests(&mut tx, tenant.0, repository, &loose).await?;
    tx.commit().await?;
    for digest in loose.iter().filter_map(|digest| digest.parse().ok()) {
        reconcile::remove_doomed(pool, registry, tenant, repository, &digest).await?;
    }
    Ok(())
}

/// DELETE .../manifests/REFERENCE
pub(super) async fn delete_manifest(
    door: &FrontDoor,
    asked: &ProxyRequest,
    reference: &str,
) -> Result<HttpResponse, OciError> {
    let reference = match reference.parse() {
        Ok(digest) => Reference::Digest(digest),
        Err(_) => Reference::Tag(reference.parse().map_err(|_| OciError::unknown_manifest())?),
    };
    let (work, holders) = (Work::of(door, asked), door.holders.clone());
    Work::finish(async move {
        let Work { pool, registry, asked } = &work;
        let tenant = &asked.tenant;
        let mut tx = db::begin(pool, tenant).await?;
        let id = TenantId(store::lock_project(&mut tx, tenant).await?);
        let (digest, family, detail) = match &reference {
            Reference::Tag(tag) => {
                let untagged = untag(&mut tx, &*holders.0, id, &asked.repository, tag).await;
                let (digest, family) = untagged.map_err(kept)?;
                let detail = json!({"digest": digest, "tag": tag});
                (digest, family, detail)
            }
            Reference::Digest(digest) => {
                let family = untag_all(&mut tx, &*holders.0, id, asked, digest).await?;
                (digest.clone(), family, json!({"digest": digest}))
            }
        };
        let actor = ActorId::new(asked.claims.pusher());
        let event = audit::AuditEvent {
            tenant: Some(id),
            actor: &actor,
            action: "image.delete",
            object: asked.repository.as_str(),
            request_id: "registry",
            detail,
        };
        audit::record(&mut tx, event).await?;
        tx.commit().await?;
        if matches!(reference, Reference::Digest(_)) {
            let this = (id, tenant);
            if let Err(error) =
                reconcile::remove_doomed(pool, registry, this, &asked.repository, &digest).await
            {
                tracing::warn!(%error, "a deleted manifest could not be removed from the registry yet; the sweep retries");
            }
        }
        if let Err(error) = clear(pool, registry, &*holders.0, (id, tenant), &asked.repository, &family).await
        {
            tracing::warn!(%error, "a deleted image could not be removed yet; the sweep retries");
        }
        Ok(())
    })
    .await?;
    Ok(gone())
}

fn gone() -> HttpResponse {
    HttpResponse::Accepted().insert_header(("Docker-Distribution-Api-Version", "registry/2.0")).finish()
}

/// Content in use is a conflict, regardless of the client's rights.
fn kept(error: Error) -> OciError {
    match error {
        Error::Conflict(why) => OciError::new(StatusCode::CONFLICT, "DENIED", why),
        Error::NotFound => OciError::unknown_manifest(),
        other => other.into(),
    }
}

/// Marks a manifest with all its tags for deletion, within a transaction that holds the project's lock. Returns
/// its family.
async fn untag_all(
    conn: &mut PgConnection,
    holders: &dyn Holders,
    tenant: TenantId,
    asked: &ProxyRequest,
    digest: &Digest,
) -> Result<Vec<String>, OciError> {
    let repository = &asked.repository;
    if store::find_manifest(conn, &asked.tenant, repository, digest).await?.is_none() {
        return Err(OciError::unknown_manifest());
    }
    let family = store::list_family(conn, tenant, repository, digest).await?;
    if let Some(why) = deployed_by(conn, holders, tenant, repository, &family).await? {
        return Err(OciError::new(StatusCode::CONFLICT, "DENIED", why));
    }
    if let Some(index) = store::find_index_of(conn, tenant, repository, digest).await? {
        let why = format!("the index {index} of this repository holds this manifest: delete the index first");
        return Err(OciError::new(StatusCode::CONFLICT, "DENIED", why));
    }
    store::delete_tags_of(conn, tenant, repository, digest).await?;
    store::doom_manifests(conn, tenant, repository, &[digest.to_string()]).await?;
    Ok(family)
}

/// DELETE .../blobs/DIGEST
pub(super) async fn delete_blob(
    door: &FrontDoor,
    asked: &ProxyRequest,
    digest: &Digest,
) -> Result<HttpResponse, OciError> {
    let (work, digest) = (Work::of(door, asked), digest.clone());
    Work::finish(async move {
        let Work { pool, registry, asked } = &work;
        let unplaced = store::unplace_blob(pool, &asked.tenant, &asked.repository, &digest).await?;
        let tenant = match unplaced {
            Unplaced::Unknown => return Err(OciError::unknown_blob()),
            Unplaced::Needed(manifest) => {
                let why =
                    format!("the manifest {manifest} of this repository needs this blob: delete it first");
                return Err(OciError::new(StatusCode::CONFLICT, "DENIED", why));
            }
            Unplaced::Yes(tenant) => tenant,
        };
        // Clients no longer see the blob from here on. The sweep repeats a failed removal.
        let this = (tenant, &asked.tenant);
        if let Err(error) = reconcile::remove_place(pool, registry, this, &asked.repository, &digest).await {
            tracing::warn!(%error, "a deleted blob could not be removed from the registry yet; the sweep retries");
        }
        Ok(())
    })
    .await?;
    Ok(gone())
}
