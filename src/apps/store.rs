//! Apps, releases, addresses and what was seen.

use std::net::Ipv4Addr;

use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;

use super::{App, Event, Peak, Release};
use crate::driver::workload::{InsideUser, Subnet};
use crate::driver::{AppEvent, AppObserved};
use crate::error::Error;
use crate::ids::{AppId, AppName, Digest, RepositoryPath, Tag, TenantId};
use crate::tenants::{Amount, Quota};
use crate::uid_ranges::Block;

struct AppRow {
    id: i64,
    tenant_id: i64,
    name: AppName,
    generation: i64,
    observed_generation: i64,
    revision: i64,
    peak_instances: i64,
    peak_surge: i64,
    peak_cpu_millis: i64,
    peak_memory: i64,
    uid_start: i64,
    uid_size: i64,
    observed: Option<Json<AppObserved>>,
    observed_at: Option<OffsetDateTime>,
    problem: Option<String>,
    created_at: OffsetDateTime,
    changed_at: OffsetDateTime,
    deleted_at: Option<OffsetDateTime>,
}

impl From<AppRow> for App {
    fn from(row: AppRow) -> Self {
        Self {
            id: AppId(row.id),
            tenant_id: TenantId(row.tenant_id),
            name: row.name,
            generation: row.generation,
            observed_generation: row.observed_generation,
            revision: row.revision,
            peak: Peak {
                instances: row.peak_instances,
                surge: row.peak_surge,
                cpu_millis: row.peak_cpu_millis,
                memory: row.peak_memory,
            },
            uid_start: row.uid_start,
            uid_size: row.uid_size,
            observed: row.observed.map(|Json(observed)| observed),
            observed_at: row.observed_at,
            problem: row.problem,
            created_at: row.created_at,
            changed_at: row.changed_at,
            deleted_at: row.deleted_at,
        }
    }
}

/// An app by name, unless it was removed.
pub(super) async fn find_app(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &AppName,
) -> Result<Option<App>, Error> {
    let row = sqlx::query_as!(
        AppRow,
        r#"SELECT id, tenant_id, name AS "name: AppName", generation, observed_generation, revision,
           peak_instances, peak_surge, peak_cpu_millis, peak_memory, uid_start, uid_size,
           observed AS "observed: Json<AppObserved>", observed_at, problem, created_at, changed_at, deleted_at
           FROM app WHERE tenant_id = $1 AND name = $2 AND removed_at IS NULL"#,
        tenant.0,
        name.as_str()
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// An app by identity, removed or not.
pub(super) async fn find_app_by_id(conn: &mut PgConnection, id: AppId) -> Result<Option<App>, Error> {
    let row = sqlx::query_as!(
        AppRow,
        r#"SELECT id, tenant_id, name AS "name: AppName", generation, observed_generation, revision,
           peak_instances, peak_surge, peak_cpu_millis, peak_memory, uid_start, uid_size,
           observed AS "observed: Json<AppObserved>", observed_at, problem, created_at, changed_at, deleted_at
           FROM app WHERE id = $1 AND removed_at IS NULL"#,
        id.0
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// Apps of a tenant by name.
pub(super) async fn list_apps(
    conn: &mut PgConnection,
    tenant: TenantId,
    after: &str,
    limit: i64,
) -> Result<Vec<App>, Error> {
    let rows = sqlx::query_as!(
        AppRow,
        r#"SELECT id, tenant_id, name AS "name: AppName", generation, observed_generation, revision,
           peak_instances, peak_surge, peak_cpu_millis, peak_memory, uid_start, uid_size,
           observed AS "observed: Json<AppObserved>", observed_at, problem, created_at, changed_at, deleted_at
           FROM app WHERE tenant_id = $1 AND removed_at IS NULL AND name > $2 ORDER BY name LIMIT $3"#,
        tenant.0,
        after,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Which of these names the tenant has no app for.
pub(super) async fn list_missing(
    conn: &mut PgConnection,
    tenant: TenantId,
    names: &[AppName],
) -> Result<Vec<String>, Error> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    Ok(sqlx::query_scalar!(
        r#"SELECT n AS "name!" FROM unnest($2::text[]) n WHERE NOT EXISTS
           (SELECT 1 FROM app WHERE tenant_id = $1 AND name = n AND removed_at IS NULL AND deleted_at IS NULL)"#,
        tenant.0,
        &names
    )
    .fetch_all(conn)
    .await?)
}

/// Locks the tenant's quota and state: from here on no other deploy of this tenant can take any, and
/// no suspension or offboarding comes in between.
pub(super) async fn lock_quota(conn: &mut PgConnection, tenant: TenantId) -> Result<(Quota, String), Error> {
    let row = sqlx::query!(
        "SELECT q.cpu_millis, q.memory, q.apps, q.instances, q.registry_bytes, q.used_cpu_millis, q.used_memory, \
         q.used_apps, q.used_instances, q.used_registry_bytes, t.state \
         FROM quota q JOIN tenant t ON t.id = q.tenant_id WHERE q.tenant_id = $1 FOR SHARE OF t FOR UPDATE OF q",
        tenant.0
    )
    .fetch_one(conn)
    .await?;
    let amount = |limit, used| Amount { limit, used };
    let quota = Quota {
        cpu: amount(row.cpu_millis, row.used_cpu_millis),
        memory: amount(row.memory, row.used_memory),
        apps: amount(row.apps, row.used_apps),
        instances: amount(row.instances, row.used_instances),
        registry_bytes: amount(row.registry_bytes, row.used_registry_bytes),
    };
    Ok((quota, row.state))
}

/// Adds to what is used; the rows' own checks keep it from going below zero.
pub(super) async fn add_used(
    conn: &mut PgConnection,
    tenant: TenantId,
    before: super::reservation::Reserved,
    after: super::reservation::Reserved,
    apps: i64,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE quota SET used_cpu_millis = used_cpu_millis + $2, used_memory = used_memory + $3, \
         used_instances = used_instances + $4, used_apps = used_apps + $5 WHERE tenant_id = $1",
        tenant.0,
        after.cpu - before.cpu,
        after.memory - before.memory,
        after.instances - before.instances,
        apps
    )
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn insert_app(
    conn: &mut PgConnection,
    tenant: TenantId,
    name: &AppName,
    peak: Peak,
    block: Block,
) -> Result<AppId, Error> {
    let id = sqlx::query_scalar!(
        "INSERT INTO app (tenant_id, name, peak_instances, peak_surge, peak_cpu_millis, peak_memory, \
         uid_slot, uid_start, uid_size) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING id",
        tenant.0,
        name.as_str(),
        peak.instances,
        peak.surge,
        peak.cpu_millis,
        peak.memory,
        block.slot,
        i64::from(block.ids.start),
        i64::from(block.ids.size)
    )
    .fetch_one(conn)
    .await?;
    Ok(AppId(id))
}

/// Takes the next release as desired: its revision and the raised generation.
pub(super) async fn advance_app(
    conn: &mut PgConnection,
    tenant: TenantId,
    id: AppId,
    peak: Peak,
) -> Result<(i64, i64), Error> {
    let row = sqlx::query!(
        "UPDATE app SET generation = generation + 1, revision = last_revision + 1, \
         last_revision = last_revision + 1, peak_instances = $3, peak_surge = $4, peak_cpu_millis = $5, \
         peak_memory = $6, changed_at = now(), problem = NULL WHERE tenant_id = $1 AND id = $2 \
         RETURNING generation, revision",
        tenant.0,
        id.0,
        peak.instances,
        peak.surge,
        peak.cpu_millis,
        peak.memory
    )
    .fetch_one(conn)
    .await?;
    Ok((row.generation, row.revision))
}

pub(super) async fn set_peak(
    conn: &mut PgConnection,
    tenant: TenantId,
    id: AppId,
    peak: Peak,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE app SET peak_instances = $3, peak_surge = $4, peak_cpu_millis = $5, peak_memory = $6 \
         WHERE tenant_id = $1 AND id = $2",
        tenant.0,
        id.0,
        peak.instances,
        peak.surge,
        peak.cpu_millis,
        peak.memory
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What is reserved for an app, removed or not.
pub(super) async fn find_peak(conn: &mut PgConnection, tenant: TenantId, id: AppId) -> Result<Peak, Error> {
    Ok(sqlx::query_as!(
        Peak,
        "SELECT peak_instances AS instances, peak_surge AS surge, peak_cpu_millis AS cpu_millis, \
         peak_memory AS memory FROM app WHERE tenant_id = $1 AND id = $2",
        tenant.0,
        id.0
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn insert_release(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    release: &Release,
) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO release (tenant_id, app_id, revision, spec, repository, tag, index_digest, digest, \
         inside_uid, inside_gid, warnings, rolled_back_to, actor) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        tenant.0,
        app.0,
        release.revision,
        release.spec,
        release.repository.as_str(),
        release.tag.as_ref().map(Tag::as_str),
        release.index_digest.as_str(),
        release.digest.as_str(),
        i32::from(release.user.uid),
        i32::from(release.user.gid),
        release.warnings,
        release.rolled_back_to,
        release.actor
    )
    .execute(conn)
    .await?;
    Ok(())
}

struct ReleaseRow {
    revision: i64,
    spec: Value,
    repository: RepositoryPath,
    tag: Option<Tag>,
    index_digest: Digest,
    digest: Digest,
    inside_uid: i32,
    inside_gid: i32,
    warnings: Value,
    rolled_back_to: Option<i64>,
    actor: String,
    created_at: OffsetDateTime,
}

impl From<ReleaseRow> for Release {
    fn from(row: ReleaseRow) -> Self {
        Self {
            revision: row.revision,
            spec: row.spec,
            repository: row.repository,
            tag: row.tag,
            index_digest: row.index_digest,
            digest: row.digest,
            user: InsideUser {
                uid: u16::try_from(row.inside_uid).unwrap_or(1000),
                gid: u16::try_from(row.inside_gid).unwrap_or(1000),
            },
            warnings: row.warnings,
            rolled_back_to: row.rolled_back_to,
            actor: row.actor,
            created_at: row.created_at,
        }
    }
}

pub(super) async fn find_release(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    revision: i64,
) -> Result<Option<Release>, Error> {
    let row = sqlx::query_as!(
        ReleaseRow,
        r#"SELECT revision, spec, repository AS "repository: RepositoryPath", tag AS "tag: Tag",
           index_digest AS "index_digest: Digest", digest AS "digest: Digest", inside_uid, inside_gid, warnings,
           rolled_back_to, actor, created_at
           FROM release WHERE tenant_id = $1 AND app_id = $2 AND revision = $3"#,
        tenant.0,
        app.0,
        revision
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(Into::into))
}

/// The desired releases of a page of apps, in one query.
pub(super) async fn list_wanted(
    conn: &mut PgConnection,
    tenant: TenantId,
    apps: &[App],
) -> Result<std::collections::HashMap<AppId, Release>, Error> {
    let ids: Vec<i64> = apps.iter().map(|app| app.id.0).collect();
    let revisions: Vec<i64> = apps.iter().map(|app| app.revision).collect();
    let rows = sqlx::query!(
        r#"SELECT r.app_id, r.revision, r.spec, r.repository AS "repository: RepositoryPath", r.tag AS "tag: Tag",
           r.index_digest AS "index_digest: Digest", r.digest AS "digest: Digest", r.inside_uid, r.inside_gid,
           r.warnings, r.rolled_back_to, r.actor, r.created_at
           FROM unnest($2::bigint[], $3::bigint[]) AS w (app_id, revision)
           JOIN release r ON r.tenant_id = $1 AND r.app_id = w.app_id AND r.revision = w.revision"#,
        tenant.0,
        &ids,
        &revisions
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let release = ReleaseRow {
                revision: row.revision,
                spec: row.spec,
                repository: row.repository,
                tag: row.tag,
                index_digest: row.index_digest,
                digest: row.digest,
                inside_uid: row.inside_uid,
                inside_gid: row.inside_gid,
                warnings: row.warnings,
                rolled_back_to: row.rolled_back_to,
                actor: row.actor,
                created_at: row.created_at,
            };
            (AppId(row.app_id), release.into())
        })
        .collect())
}

/// Releases, newest first, older than `before`.
pub(super) async fn list_releases(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    before: i64,
    limit: i64,
) -> Result<Vec<Release>, Error> {
    let rows = sqlx::query_as!(
        ReleaseRow,
        r#"SELECT revision, spec, repository AS "repository: RepositoryPath", tag AS "tag: Tag",
           index_digest AS "index_digest: Digest", digest AS "digest: Digest", inside_uid, inside_gid, warnings,
           rolled_back_to, actor, created_at
           FROM release WHERE tenant_id = $1 AND app_id = $2 AND revision < $3 ORDER BY revision DESC LIMIT $4"#,
        tenant.0,
        app.0,
        before,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Into::into).collect())
}

/// Sees to it that the app has `count` addresses: keeps its own, takes the lowest that are free and
/// rested. False when the subnet has no more.
pub(super) async fn take_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    count: i64,
    subnet: Subnet,
) -> Result<bool, Error> {
    let have = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app_address WHERE tenant_id = $1 AND app_id = $2"#,
        tenant.0,
        app.0
    )
    .fetch_one(&mut *conn)
    .await?;
    if have >= count {
        return Ok(true);
    }
    // The first two are the network and its gateway, the last is for broadcast.
    let done = sqlx::query!(
        "INSERT INTO app_address (tenant_id, host, app_id) \
         SELECT $1, n, $2 FROM generate_series(2, $4::bigint - 2) n WHERE NOT EXISTS \
         (SELECT 1 FROM app_address a WHERE a.tenant_id = $1 AND a.host = n \
          AND (a.app_id IS NOT NULL OR a.freed_at > now() - interval '1 minute')) \
         ORDER BY n LIMIT $3 \
         ON CONFLICT (tenant_id, host) DO UPDATE SET app_id = EXCLUDED.app_id, freed_at = NULL, taken_at = now()",
        tenant.0,
        app.0,
        count - have,
        i64::from(subnet.size())
    )
    .execute(conn)
    .await?;
    Ok(i64::try_from(done.rows_affected()).unwrap_or(0) == count - have)
}

/// Addresses that could be taken now.
pub(super) async fn count_free_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    subnet: Subnet,
) -> Result<i64, Error> {
    let taken = sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app_address WHERE tenant_id = $1
           AND (app_id IS NOT NULL OR freed_at > now() - interval '1 minute')"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?;
    Ok(i64::from(subnet.size()) - 3 - taken)
}

/// Apps that the tenant has made within a day, those that are gone again included.
pub(super) async fn count_made_lately(conn: &mut PgConnection, tenant: TenantId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app WHERE tenant_id = $1 AND created_at > now() - interval '1 day'"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}

/// The app's addresses, in the order in which it took them: the n-th stays the n-th.
pub(super) async fn list_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    subnet: Subnet,
) -> Result<Vec<Ipv4Addr>, Error> {
    let hosts = sqlx::query_scalar!(
        "SELECT host FROM app_address WHERE tenant_id = $1 AND app_id = $2 ORDER BY taken_at, host",
        tenant.0,
        app.0
    )
    .fetch_all(conn)
    .await?;
    hosts
        .into_iter()
        .map(|host| {
            u32::try_from(host)
                .ok()
                .and_then(|host| subnet.nth(host))
                .ok_or_else(|| Error::internal("an address beyond its subnet"))
        })
        .collect()
}

pub(super) async fn free_addresses(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
) -> Result<(), Error> {
    sqlx::query!(
        "UPDATE app_address SET app_id = NULL, freed_at = now() WHERE tenant_id = $1 AND app_id = $2",
        tenant.0,
        app.0
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Asks for the removal; the row goes when absence was observed.
pub(super) async fn set_deleted(conn: &mut PgConnection, tenant: TenantId, id: AppId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        "UPDATE app SET deleted_at = coalesce(deleted_at, now()), generation = generation + 1, changed_at = now() \
         WHERE tenant_id = $1 AND id = $2 RETURNING generation",
        tenant.0,
        id.0
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn set_removed(conn: &mut PgConnection, tenant: TenantId, id: AppId) -> Result<bool, Error> {
    let done = sqlx::query!(
        "UPDATE app SET removed_at = now(), observed = NULL WHERE tenant_id = $1 AND id = $2 AND removed_at IS NULL",
        tenant.0,
        id.0
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Apps of a tenant whose removal was not asked for yet.
pub(super) async fn list_undeleted(conn: &mut PgConnection, tenant: TenantId) -> Result<Vec<AppName>, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT name AS "name: AppName" FROM app WHERE tenant_id = $1 AND removed_at IS NULL
           AND deleted_at IS NULL ORDER BY name LIMIT 200"#,
        tenant.0
    )
    .fetch_all(conn)
    .await?)
}

pub(super) async fn count_left(conn: &mut PgConnection, tenant: TenantId) -> Result<i64, Error> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "n!" FROM app WHERE tenant_id = $1 AND removed_at IS NULL"#,
        tenant.0
    )
    .fetch_one(conn)
    .await?)
}

pub(super) async fn set_problem(
    conn: &mut PgConnection,
    id: AppId,
    problem: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query!("UPDATE app SET problem = $2 WHERE id = $1 AND problem IS DISTINCT FROM $2", id.0, problem)
        .execute(conn)
        .await?;
    Ok(())
}

/// Writes down what was seen; an older generation than known is dropped, and nothing is written
/// when nothing changed.
pub(super) async fn set_observed(conn: &mut PgConnection, seen: &AppObserved) -> Result<bool, Error> {
    let mut bare = seen.clone();
    bare.events.clear();
    let done = sqlx::query!(
        "UPDATE app SET observed = $2, observed_at = now(), observed_generation = greatest(observed_generation, $3) \
         WHERE id = $1 AND removed_at IS NULL AND observed_generation <= $3 AND generation >= $3 \
         AND (observed IS DISTINCT FROM $2 OR observed_generation < $3)",
        seen.app_id.0,
        Json(&bare) as _,
        seen.generation
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// How many events of an app are kept.
const EVENTS_KEPT: i64 = 200;

pub(super) async fn insert_events(
    conn: &mut PgConnection,
    app: AppId,
    events: &[AppEvent],
) -> Result<(), Error> {
    if events.is_empty() {
        return Ok(());
    }
    let seqs: Vec<i64> = events.iter().map(|event| i64::try_from(event.seq).unwrap_or(i64::MAX)).collect();
    let ats: Vec<OffsetDateTime> = events.iter().map(|event| event.at).collect();
    let kinds: Vec<String> = events.iter().map(|event| event.kind.clone()).collect();
    let texts: Vec<String> = events.iter().map(|event| event.text.clone()).collect();
    let done = sqlx::query!(
        "INSERT INTO app_event (tenant_id, app_id, seq, at, kind, text) \
         SELECT a.tenant_id, a.id, e.seq, e.at, e.kind, e.text FROM app a, \
         unnest($2::bigint[], $3::timestamptz[], $4::text[], $5::text[]) AS e (seq, at, kind, text) \
         WHERE a.id = $1 ON CONFLICT DO NOTHING",
        app.0,
        &seqs,
        &ats,
        &kinds,
        &texts
    )
    .execute(&mut *conn)
    .await?;
    if done.rows_affected() > 0 {
        sqlx::query!(
            "DELETE FROM app_event e USING app a WHERE a.id = $1 AND e.tenant_id = a.tenant_id AND e.app_id = a.id \
             AND (e.at, e.seq) <= (SELECT m.at, m.seq FROM app_event m WHERE m.tenant_id = a.tenant_id \
             AND m.app_id = a.id ORDER BY m.at DESC, m.seq DESC OFFSET $2 LIMIT 1)",
            app.0,
            EVENTS_KEPT
        )
        .execute(conn)
        .await?;
    }
    Ok(())
}

pub(super) async fn insert_machine_events(conn: &mut PgConnection, events: &[AppEvent]) -> Result<(), Error> {
    for event in events {
        sqlx::query!(
            "INSERT INTO machine_event (seq, at, kind, text) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            i64::try_from(event.seq).unwrap_or(i64::MAX),
            event.at,
            event.kind,
            event.text
        )
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

/// The newest events of an app, newest first.
pub(super) async fn list_events(
    conn: &mut PgConnection,
    tenant: TenantId,
    app: AppId,
    limit: i64,
) -> Result<Vec<Event>, Error> {
    Ok(sqlx::query_as!(
        Event,
        "SELECT at, kind, text FROM app_event WHERE tenant_id = $1 AND app_id = $2 ORDER BY at DESC, seq DESC LIMIT $3",
        tenant.0,
        app.0,
        limit
    )
    .fetch_all(conn)
    .await?)
}

/// Apps that the engine's side should know of, in pages by identity.
pub(super) async fn list_expected(
    conn: &mut PgConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<(AppId, TenantId, i64)>, Error> {
    let rows = sqlx::query!(
        "SELECT id, tenant_id, generation FROM app WHERE removed_at IS NULL AND deleted_at IS NULL AND id > $1 \
         AND observed_generation > 0 ORDER BY id LIMIT $2",
        after,
        limit
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (AppId(row.id), TenantId(row.tenant_id), row.generation)).collect())
}

/// Counts names of fields that were refused.
pub(super) async fn count_refused(conn: &mut PgConnection, names: &[String]) -> Result<(), Error> {
    sqlx::query!(
        "INSERT INTO refused_field (name) SELECT DISTINCT n FROM unnest($1::text[]) n ORDER BY n \
         ON CONFLICT (name) DO UPDATE SET count = refused_field.count + 1, last_at = now()",
        names
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Removes what has had its time: machine events of more than 30 days, and all but the names of fields
/// that are tried most.
pub(super) async fn prune(conn: &mut PgConnection) -> Result<(), Error> {
    sqlx::query!("DELETE FROM machine_event WHERE at < now() - interval '30 days'")
        .execute(&mut *conn)
        .await?;
    sqlx::query!(
        "DELETE FROM refused_field WHERE name IN (SELECT name FROM refused_field ORDER BY count DESC, last_at DESC OFFSET 500)"
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Which apps run one of these digests in any release that can still be rolled back to.
pub(super) async fn list_holders(
    conn: &mut PgConnection,
    tenant: TenantId,
    repository: &RepositoryPath,
    digests: &[String],
) -> Result<Vec<(String, String)>, Error> {
    let rows = sqlx::query!(
        r#"SELECT DISTINCT d AS "digest!", a.name FROM unnest($3::text[]) d
           JOIN release r ON r.tenant_id = $1 AND r.repository = $2 AND (r.digest = d OR r.index_digest = d)
           JOIN app a ON a.tenant_id = r.tenant_id AND a.id = r.app_id AND a.removed_at IS NULL"#,
        tenant.0,
        repository.as_str(),
        digests
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.digest, row.name)).collect())
}
