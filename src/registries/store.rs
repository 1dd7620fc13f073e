//! Robots, manifests, tags, blobs and what they weigh.

use serde::Serialize;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use super::proxy::Asked;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, Tag, TenantId, TenantName};

pub(super) struct Robot {
    pub(super) id: i64,
    pub(super) tenant: TenantName,
    pub(super) push: bool,
}

/// A robot whose secret fits, which is neither expired nor revoked.
pub(super) async fn find_robot(
    conn: &mut PgConnection,
    tenant: &str,
    name: &str,
    hash: &[u8],
) -> Result<Option<Robot>, Error> {
    let robot = sqlx::query_as!(
        Robot,
        r#"SELECT r.id, t.name AS "tenant: TenantName", r.push FROM robot r JOIN tenant t ON t.id = r.tenant_id
           WHERE t.name = $1 AND r.name = $2 AND r.hash = $3 AND r.revoked_at IS NULL AND r.expires_at > now()
           AND t.state IN ('active', 'suspended')"#,
        tenant,
        name,
        hash
    )
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(robot) = &robot {
        sqlx::query!(
            "UPDATE robot SET last_used_at = now() WHERE id = $1 \
             AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')",
            robot.id
        )
        .execute(conn)
        .await?;
    }
    Ok(robot)
}

pub(super) async fn is_robot_good(conn: &mut PgConnection, id: i64) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM robot WHERE id = $1 AND revoked_at IS NULL AND expires_at > now()) AS "yes!""#,
        id
    )
    .fetch_one(conn)
    .await?)
}

/// A robot as shown.
#[derive(Debug, Serialize)]
pub(super) struct RobotRow {
    pub(super) name: String,
    pub(super) push: bool,
    pub(super) created_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) expires_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub(super) last_used_at: Option<OffsetDateTime>,
}

pub(super) async fn list_robots(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<RobotRow>, Error> {
    Ok(sqlx::query_as!(
        RobotRow,
        "SELECT name, push, created_by, created_at, expires_at, last_used_at FROM robot \
         WHERE tenant_id = $1 AND revoked_at IS NULL AND name > $2 ORDER BY name LIMIT $3",
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

pub(super) async fn insert_robot(
    conn: &mut PgConnection,
    tenant: TenantId,
    robot: &super::robots::NewRobot,
    hash: &[u8],
    created_by: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO robot (tenant_id, name, push, hash, created_by, expires_at) \
         VALUES ($1, $2, $3, $4, $5, now() + make_interval(days => $6))",
        tenant.0,
        robot.name,
        robot.push,
        hash,
        created_by,
        robot.days
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn revoke_robot(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &str,
) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE robot SET revoked_at = now() WHERE tenant_id = $1 AND name = $2 AND revoked_at IS NULL",
        tenant.0,
        name
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Revokes all of a tenant's robots; how many are still good afterwards.
pub(super) async fn revoke_robots(conn: &mut PgConnection, tenant: TenantId) -> Result<i64, Error> {
    sqlx::query!("UPDATE robot SET revoked_at = now() WHERE tenant_id = $1 AND revoked_at IS NULL", tenant.0)
        .execute(&mut *conn)
        .await?;
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM robot WHERE tenant_id = $1 AND revoked_at IS NULL"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn tenant_state(
    conn: &mut PgConnection,
    tenant: &TenantName,
) -> Result<Option<String>, Error> {
    Ok(sqlx::query_scalar!("SELECT state FROM tenant WHERE name = $1", tenant.as_str())
        .fetch_optional(conn)
        .await?)
}

/// The digest that a tag stands for.
pub(super) async fn find_tag(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    tag: &Tag,
) -> Result<Option<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT g.digest AS "digest: Digest" FROM tag g JOIN tenant t ON t.id = g.tenant_id
           WHERE t.name = $1 AND g.repository = $2 AND g.name = $3"#,
        tenant.as_str(),
        repository.as_str(),
        tag.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// The digest, if this tenant has such a manifest.
pub(super) async fn find_manifest(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Option<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT m.digest AS "digest: Digest" FROM manifest m JOIN tenant t ON t.id = m.tenant_id
           WHERE t.name = $1 AND m.repository = $2 AND m.digest = $3 AND m.confirmed AND m.doomed_at IS NULL"#,
        tenant.as_str(),
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// Whether a repository of this tenant has a blob, as far as the platform knows: what it does not know
/// is not counted, and what is doomed is gone.
pub(super) async fn has_blob(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM tenant t JOIN blob b ON b.tenant_id = t.id
           JOIN blob_place p ON p.tenant_id = t.id AND p.digest = b.digest
           WHERE t.name = $1 AND p.repository = $2 AND b.digest = $3 AND b.doomed_at IS NULL) AS "yes!""#,
        tenant.as_str(),
        repository.as_str(),
        digest.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// Whether all these manifests are there and stay, within a transaction that holds the tenant's
/// quota: whoever removes manifests holds it too.
pub async fn are_manifests_there(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digests: &[&Digest],
) -> Result<bool, Error> {
    let texts: Vec<String> = digests.iter().map(ToString::to_string).collect();
    Ok(sqlx::query_scalar!(
        r#"SELECT NOT EXISTS (SELECT 1 FROM unnest($3::text[]) d WHERE NOT EXISTS
           (SELECT 1 FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2 AND m.digest = d
            AND m.confirmed AND m.doomed_at IS NULL)) AS "yes!""#,
        tenant.0,
        repository.as_str(),
        &texts
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn list_tag_names(
    conn: &mut PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT g.name FROM tag g JOIN tenant t ON t.id = g.tenant_id \
         WHERE t.name = $1 AND g.repository = $2 ORDER BY g.name LIMIT 10000",
        tenant.as_str(),
        repository.as_str()
    )
    .fetch_all(conn)
    .await?)
}

fn positive(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Bytes used, uploads under way included, and the limit.
pub(super) async fn registry_use(conn: &mut PgConnection, tenant: &TenantName) -> Result<(u64, u64), Error> {
    let row = sqlx::query!(
        r#"SELECT (q.used_registry_bytes + coalesce((SELECT sum(u.bytes) FROM upload u WHERE u.tenant_id = t.id
                   AND u.changed_at > now() - interval '2 hours'), 0))::bigint AS "used!",
                  q.registry_bytes AS "limit!"
           FROM tenant t JOIN quota q ON q.tenant_id = t.id WHERE t.name = $1"#,
        tenant.as_str()
    )
    .fetch_one(conn)
    .await?;
    Ok((positive(row.used), positive(row.limit)))
}

/// Locks the quota of a tenant: whoever adds to its project or takes from it comes one after another.
async fn lock_project(conn: &mut PgConnection, tenant: &TenantName) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "SELECT q.tenant_id FROM quota q JOIN tenant t ON t.id = q.tenant_id WHERE t.name = $1 FOR UPDATE OF q",
        tenant.as_str()
    )
    .fetch_one(conn)
    .await?)
}

/// What is doomed cannot be pushed again before it is gone.
fn going() -> Error {
    Error::Unavailable(
        "this very content is being removed; push again".into(),
        std::time::Duration::from_secs(5),
    )
}

/// What came of a reservation.
pub(super) enum Reserve {
    /// So many bytes were taken.
    Taken(u64),
    /// Not even what is needed now is left.
    Full { used: u64, limit: u64 },
}

/// Takes bytes of the quota for an upload: a whole step where it fits, else what is needed now. The
/// lock on the quota's row keeps two uploads from taking the same bytes.
pub(super) async fn reserve_upload(
    pool: &PgPool,
    tenant: &TenantName,
    id: &str,
    step: u64,
    needed: u64,
) -> Result<Reserve, Error> {
    let mut tx = pool.begin().await?;
    let tenant_id = lock_project(&mut tx, tenant).await?;
    let (used, limit) = registry_use(&mut tx, tenant).await?;
    let left = limit.saturating_sub(used);
    if needed > left {
        return Ok(Reserve::Full { used, limit });
    }
    let taken = if step <= left { step } else { needed };
    sqlx::query!(
        "DELETE FROM upload WHERE tenant_id = $1 AND changed_at < now() - interval '2 hours'",
        tenant_id
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "INSERT INTO upload (tenant_id, id, bytes) VALUES ($1, $2, $3) \
         ON CONFLICT (tenant_id, id) DO UPDATE SET bytes = upload.bytes + $3, changed_at = now()",
        tenant_id,
        id,
        signed(taken)
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Reserve::Taken(taken))
}

/// Gives back what was reserved for an upload and not needed.
pub(super) async fn give_back(pool: &PgPool, tenant: &TenantName, id: &str, bytes: u64) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE upload u SET bytes = greatest(0, u.bytes - $3) FROM tenant t \
         WHERE t.name = $1 AND u.tenant_id = t.id AND u.id = $2",
        tenant.as_str(),
        id,
        signed(bytes)
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// A blob is there: it counts once, its upload no more.
pub(super) async fn commit_blob(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
    size: u64,
    upload: Option<&str>,
) -> Result<(), Error> {
    let mut tx = pool.begin().await?;
    let tenant_id = lock_project(&mut tx, tenant).await?;
    let doomed = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM blob WHERE tenant_id = $1 AND digest = $2 AND doomed_at IS NOT NULL) AS "yes!""#,
        tenant_id,
        digest.as_str()
    )
    .fetch_one(&mut *tx)
    .await?;
    if doomed {
        return Err(going());
    }
    let new = sqlx::query!(
        "INSERT INTO blob (tenant_id, digest, size) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        tenant_id,
        digest.as_str(),
        signed(size)
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    if new == 1 {
        add_used(&mut tx, TenantId(tenant_id), signed(size)).await?;
    }
    sqlx::query!(
        "INSERT INTO blob_place (tenant_id, digest, repository) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        tenant_id,
        digest.as_str(),
        repository.as_str()
    )
    .execute(&mut *tx)
    .await?;
    if let Some(id) = upload {
        sqlx::query!("DELETE FROM upload WHERE tenant_id = $1 AND id = $2", tenant_id, id)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(())
}

async fn add_used(conn: &mut PgConnection, tenant: TenantId, bytes: i64) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE quota SET used_registry_bytes = greatest(0, used_registry_bytes + $2) WHERE tenant_id = $1",
        tenant.0,
        bytes
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A manifest as it was pushed.
pub(super) struct NewManifest {
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) size: u64,
    /// Bytes of its parts.
    pub(super) total: u64,
    /// Digest, and whether it is a blob.
    pub(super) parts: Vec<(Digest, bool)>,
    pub(super) pushed_by: String,
}

/// What came of writing a manifest down.
pub(super) enum Noted {
    /// It is on record.
    Yes,
    /// It does not fit.
    Full { used: u64, limit: u64 },
    /// It names something that is not there (any more).
    Unknown,
}

/// Writes a manifest down before it is handed on.
pub(super) async fn insert_manifest(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    new: &NewManifest,
) -> Result<Noted, Error> {
    let parts: Vec<String> = new.parts.iter().map(|(digest, _)| digest.to_string()).collect();
    let blobs: Vec<bool> = new.parts.iter().map(|(_, blob)| *blob).collect();
    let mut tx = pool.begin().await?;
    let tenant_id = lock_project(&mut tx, tenant).await?;
    let state = sqlx::query!(
        r#"SELECT EXISTS (SELECT 1 FROM manifest WHERE tenant_id = $1 AND repository = $2 AND digest = $3
                          AND doomed_at IS NOT NULL) AS "doomed!",
           EXISTS (SELECT 1 FROM unnest($4::text[], $5::boolean[]) AS x (part, is_blob) WHERE CASE WHEN is_blob
             THEN NOT EXISTS (SELECT 1 FROM blob b JOIN blob_place p USING (tenant_id, digest) WHERE b.tenant_id = $1
                              AND b.digest = part AND p.repository = $2 AND b.doomed_at IS NULL)
             ELSE NOT EXISTS (SELECT 1 FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2
                              AND m.digest = part AND m.confirmed AND m.doomed_at IS NULL) END) AS "lacks!""#,
        tenant_id,
        repository.as_str(),
        new.digest.as_str(),
        &parts,
        &blobs
    )
    .fetch_one(&mut *tx)
    .await?;
    if state.doomed {
        return Err(going());
    }
    if state.lacks {
        return Ok(Noted::Unknown);
    }
    let inserted = sqlx::query!(
        "INSERT INTO manifest (tenant_id, repository, digest, media_type, size, total, pushed_by) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
        tenant_id,
        repository.as_str(),
        new.digest.as_str(),
        new.media_type,
        signed(new.size),
        signed(new.total),
        new.pushed_by
    )
    .execute(&mut *tx)
    .await?
    .rows_affected();
    if inserted == 1 {
        let (used, limit) = registry_use(&mut tx, tenant).await?;
        if used.saturating_add(new.size) > limit {
            return Ok(Noted::Full { used, limit });
        }
        add_used(&mut tx, TenantId(tenant_id), signed(new.size)).await?;
        sqlx::query!(
            "INSERT INTO manifest_part (tenant_id, repository, digest, part, is_blob) \
             SELECT $1, $2, $3, p, b FROM unnest($4::text[], $5::boolean[]) AS x (p, b) ON CONFLICT DO NOTHING",
            tenant_id,
            repository.as_str(),
            new.digest.as_str(),
            &parts,
            &blobs
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    Ok(Noted::Yes)
}

/// The registry does not have a blob that is on record: the record is mended, so that the next push
/// sends it.
pub(super) async fn forget_blob(
    pool: &PgPool,
    tenant: &TenantName,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM blob_place p USING tenant t WHERE t.name = $1 AND p.tenant_id = t.id AND p.repository = $2 \
         AND p.digest = $3",
        tenant.as_str(),
        repository.as_str(),
        digest.as_str()
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Most tags of a repository.
const TAGS: i64 = 2_000;

/// The registry has it: the tag moves, and it is on record who pushed.
pub(super) async fn confirm_manifest(
    pool: &PgPool,
    asked: &Asked,
    new: &NewManifest,
    tag: Option<&Tag>,
) -> Result<(), Error> {
    let mut tx = pool.begin().await?;
    lock_project(&mut tx, &asked.tenant).await?;
    let tenant_id = sqlx::query_scalar!(
        "UPDATE manifest m SET confirmed = true FROM tenant t WHERE t.name = $1 AND m.tenant_id = t.id \
         AND m.repository = $2 AND m.digest = $3 AND m.doomed_at IS NULL RETURNING m.tenant_id",
        asked.tenant.as_str(),
        asked.repository.as_str(),
        new.digest.as_str()
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(going)?;
    if let Some(tag) = tag {
        let count = sqlx::query_scalar!(
            r#"SELECT count(*) AS "n!" FROM tag WHERE tenant_id = $1 AND repository = $2 AND name <> $3"#,
            tenant_id,
            asked.repository.as_str(),
            tag.as_str()
        )
        .fetch_one(&mut *tx)
        .await?;
        if count >= TAGS {
            return Err(Error::Conflict(format!("a repository has at most {TAGS} tags; delete some")));
        }
        sqlx::query!(
            "INSERT INTO tag (tenant_id, repository, name, digest, pushed_by) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (tenant_id, repository, name) DO UPDATE SET digest = $4, pushed_by = $5, pushed_at = now()",
            tenant_id,
            asked.repository.as_str(),
            tag.as_str(),
            new.digest.as_str(),
            new.pushed_by
        )
        .execute(&mut *tx)
        .await?;
    }
    let actor = crate::ids::ActorId::new(&new.pushed_by);
    let event = crate::audit::Event {
        tenant: Some(TenantId(tenant_id)),
        actor: &actor,
        action: "image.push",
        object: asked.repository.as_str(),
        request_id: "registry",
        detail: serde_json::json!({"digest": new.digest, "tag": tag}),
    };
    crate::audit::record(&mut tx, event).await?;
    tx.commit().await?;
    Ok(())
}

/// Manifests that were written down and never confirmed.
pub(super) async fn list_unconfirmed(
    conn: &mut PgConnection,
) -> Result<Vec<(TenantId, TenantName, RepositoryPath, Digest)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT m.tenant_id, t.name AS "name: TenantName", m.repository AS "repository: RepositoryPath",
           m.digest AS "digest: Digest" FROM manifest m JOIN tenant t ON t.id = m.tenant_id
           WHERE NOT m.confirmed AND m.pushed_at < now() - interval '1 minute' ORDER BY m.pushed_at LIMIT 100"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (TenantId(r.tenant_id), r.name, r.repository, r.digest)).collect())
}

pub(super) async fn set_confirmed(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE manifest SET confirmed = true WHERE tenant_id = $1 AND repository = $2 AND digest = $3",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// A repository as listed.
#[derive(Debug, Serialize)]
pub(super) struct RepositoryRow {
    pub(super) name: String,
    pub(super) tags: i64,
    pub(super) manifests: i64,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) pushed_at: OffsetDateTime,
}

pub(super) async fn list_repositories(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<RepositoryRow>, Error> {
    Ok(sqlx::query_as!(
        RepositoryRow,
        r#"SELECT m.repository AS name, count(*) AS "manifests!", max(m.pushed_at) AS "pushed_at!",
           (SELECT count(*) FROM tag g WHERE g.tenant_id = $1 AND g.repository = m.repository) AS "tags!"
           FROM manifest m WHERE m.tenant_id = $1 AND m.confirmed AND m.doomed_at IS NULL AND m.repository > $2
           GROUP BY m.repository ORDER BY m.repository LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// A tag as listed.
#[derive(Debug, Serialize)]
pub(super) struct TagRow {
    pub(super) name: String,
    pub(super) digest: String,
    pub(super) size: i64,
    pub(super) pushed_by: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) pushed_at: OffsetDateTime,
}

pub(super) async fn list_tags(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    after: &str,
    limit: i64,
) -> Result<Vec<TagRow>, Error> {
    Ok(sqlx::query_as!(
        TagRow,
        r#"SELECT g.name, g.digest, m.size + m.total AS "size!",
           coalesce((SELECT 'robot ' || r.name FROM robot r WHERE 'robot:' || r.id = g.pushed_by), g.pushed_by) AS "pushed_by!",
           g.pushed_at
           FROM tag g JOIN manifest m USING (tenant_id, repository, digest)
           WHERE g.tenant_id = $1 AND g.repository = $2 AND g.name > $3 ORDER BY g.name LIMIT $4"#,
        tenant.0,
        repository.as_str(),
        after,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Takes a tag away; the digest that it stood for.
pub(super) async fn delete_tag(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    tag: &Tag,
) -> Result<Option<Digest>, Error> {
    Ok(sqlx::query_scalar!(
        r#"DELETE FROM tag WHERE tenant_id = $1 AND repository = $2 AND name = $3 RETURNING digest AS "digest: Digest""#,
        tenant.0,
        repository.as_str(),
        tag.as_str()
    )
    .fetch_optional(conn)
    .await?)
}

/// The manifests that stand for a tag's: itself and, of an index, its children.
pub(super) async fn list_family(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<Vec<String>, Error> {
    let mut family = sqlx::query_scalar!(
        "SELECT part FROM manifest_part WHERE tenant_id = $1 AND repository = $2 AND digest = $3 AND NOT is_blob",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_all(conn)
    .await?;
    family.push(digest.to_string());
    Ok(family)
}

/// Those of the manifests that no tag and no tagged index holds.
pub(super) async fn list_loose(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    among: &[String],
) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT m.digest FROM manifest m WHERE m.tenant_id = $1 AND m.repository = $2
           AND m.digest = ANY($3)
           AND NOT EXISTS (SELECT 1 FROM tag g WHERE g.tenant_id = m.tenant_id AND g.repository = m.repository
                           AND g.digest = m.digest)
           AND NOT EXISTS (SELECT 1 FROM manifest_part p JOIN tag g ON g.tenant_id = p.tenant_id
                           AND g.repository = p.repository AND g.digest = p.digest
                           WHERE p.tenant_id = m.tenant_id AND p.repository = m.repository AND p.part = m.digest)"#,
        tenant.0,
        repository.as_str(),
        among
    )
    .fetch_all(conn)
    .await?)
}

/// Dooms manifests, within a transaction that holds the project's lock.
pub(super) async fn doom_manifests(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digests: &[String],
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE manifest SET doomed_at = now() WHERE tenant_id = $1 AND repository = $2 AND digest = ANY($3) \
         AND doomed_at IS NULL",
        tenant.0,
        repository.as_str(),
        digests
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Manifests that are doomed and still there.
pub(super) async fn list_doomed(
    conn: &mut PgConnection,
) -> Result<Vec<(TenantId, TenantName, RepositoryPath, Digest)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT m.tenant_id, t.name AS "name: TenantName", m.repository AS "repository: RepositoryPath",
           m.digest AS "digest: Digest" FROM manifest m JOIN tenant t ON t.id = m.tenant_id
           WHERE m.doomed_at IS NOT NULL ORDER BY m.doomed_at LIMIT 100"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|r| (TenantId(r.tenant_id), r.name, r.repository, r.digest)).collect())
}

/// Forgets a manifest and gives back what it weighed.
pub(super) async fn delete_manifest(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    let size = sqlx::query_scalar!(
        "DELETE FROM manifest WHERE tenant_id = $1 AND repository = $2 AND digest = $3 RETURNING size",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(size) = size {
        add_used(conn, tenant, -size).await?;
    }
    Ok(())
}

/// Dooms the blobs of a tenant that no manifest holds any more; they, with the repositories that have
/// them. Fresh ones are left: their manifest may be on its way.
pub(super) async fn doom_loose_blobs(
    pool: &PgPool,
    name: &TenantName,
) -> Result<Vec<(Digest, Vec<String>)>, Error> {
    let mut tx = pool.begin().await?;
    let tenant_id = lock_project(&mut tx, name).await?;
    let rows = sqlx::query!(
        r#"WITH loose AS (
               SELECT b.digest FROM blob b WHERE b.tenant_id = $1 AND (b.doomed_at IS NOT NULL
                 OR b.at < now() - interval '2 hours' AND NOT EXISTS
                   (SELECT 1 FROM manifest_part m WHERE m.tenant_id = b.tenant_id AND m.part = b.digest))
               LIMIT 200
           ), doomed AS (
               UPDATE blob b SET doomed_at = coalesce(b.doomed_at, now()) FROM loose l
               WHERE b.tenant_id = $1 AND b.digest = l.digest RETURNING b.digest
           )
           SELECT d.digest AS "digest!: Digest",
                  coalesce(array_agg(p.repository) FILTER (WHERE p.repository IS NOT NULL), '{}') AS "places!: Vec<String>"
           FROM doomed d LEFT JOIN blob_place p ON p.tenant_id = $1 AND p.digest = d.digest GROUP BY d.digest"#,
        tenant_id
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(rows.into_iter().map(|row| (row.digest, row.places)).collect())
}

pub(super) async fn delete_blob(
    conn: &mut PgConnection,
    tenant: TenantId,
    digest: &Digest,
) -> Result<(), Error> {
    let size = sqlx::query_scalar!(
        "DELETE FROM blob b WHERE tenant_id = $1 AND digest = $2 AND NOT EXISTS \
         (SELECT 1 FROM manifest_part m WHERE m.tenant_id = b.tenant_id AND m.part = b.digest) RETURNING size",
        tenant.0,
        digest.as_str()
    )
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(size) = size {
        add_used(conn, tenant, -size).await?;
    }
    Ok(())
}

/// Tenants with loose blobs, in pages.
pub(super) async fn list_tenants_with_loose_blobs(
    conn: &mut PgConnection,
    after: i64,
) -> Result<Vec<(TenantId, TenantName)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT id, name AS "name: TenantName" FROM tenant t WHERE id > $1 AND state <> 'offboarded'
           AND EXISTS (SELECT 1 FROM blob b WHERE b.tenant_id = t.id AND (b.doomed_at IS NOT NULL
             OR b.at < now() - interval '2 hours' AND NOT EXISTS
               (SELECT 1 FROM manifest_part m WHERE m.tenant_id = b.tenant_id AND m.part = b.digest)))
           ORDER BY id LIMIT 200"#,
        after
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (TenantId(row.id), row.name)).collect())
}

/// Locks a tenant's project for whoever takes manifests away.
pub(super) async fn lock_project_of(conn: &mut PgConnection, tenant: TenantId) -> Result<(), Error> {
    sqlx::query!("SELECT tenant_id FROM quota WHERE tenant_id = $1 FOR UPDATE", tenant.0)
        .fetch_one(conn)
        .await?;
    Ok(())
}

/// Everything of a tenant's project, a page at a time: manifests, then blobs.
pub(super) async fn list_all_manifests(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<(RepositoryPath, Digest)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT repository AS "repository: RepositoryPath", digest AS "digest: Digest" FROM manifest
           WHERE tenant_id = $1 LIMIT 200"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.repository, row.digest)).collect())
}

pub(super) async fn delete_tags_of(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digest: &Digest,
) -> Result<(), Error> {
    sqlx::query!(
        "DELETE FROM tag WHERE tenant_id = $1 AND repository = $2 AND digest = $3",
        tenant.0,
        repository.as_str(),
        digest.as_str()
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn list_all_blobs(
    conn: &mut PgConnection,
    tenant: TenantId,
) -> Result<Vec<(Digest, Vec<String>)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT b.digest AS "digest: Digest", array_agg(p.repository) AS "places!: Vec<String>" FROM blob b
           JOIN blob_place p USING (tenant_id, digest) WHERE b.tenant_id = $1 GROUP BY b.digest LIMIT 200"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.digest, row.places)).collect())
}
