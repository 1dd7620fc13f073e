//! Counted resources: which rows of a table are live, and which dead rows are deleted.

use sqlx::{PgConnection, PgPool};

use super::{lock, lock_platform, read};
use crate::error::Error;
use crate::ids::TenantId;
use crate::quotas::{How, Quota, Resource};

/// Number of dead rows (revoked, expired, withdrawn) of each kind that a tenant keeps visible. The audit log
/// keeps the history of the others.
const DEAD_KEPT: i64 = 1_000;

/// Maximum number of dead rows that one housekeeping statement deletes.
const BATCH: i64 = 1_000;

/// Counts the live rows of some resources in one statement. Tenant 0 is the platform itself.
async fn count(
    conn: &mut PgConnection,
    tenant: i64,
    resources: &[Resource],
) -> Result<Vec<(Resource, i64)>, Error> {
    let names: Vec<String> = resources.iter().map(|resource| resource.name().to_owned()).collect();
    let rows = sqlx::query!(
        r#"SELECT r AS "resource!", (CASE r
             WHEN 'repositories' THEN (SELECT count(*) FROM repository WHERE tenant_id = $1)
             WHEN 'tags' THEN (SELECT count(*) FROM tag WHERE tenant_id = $1)
             WHEN 'manifests' THEN (SELECT count(*) FROM manifest WHERE tenant_id = $1)
             WHEN 'open_uploads' THEN (SELECT count(*) FROM upload WHERE tenant_id = $1
                                       AND changed_at > now() - interval '2 hours')
             WHEN 'registry_credentials' THEN (SELECT count(*) FROM robot WHERE tenant_id = $1 AND revoked_at IS NULL
                                               AND expires_at > now())
             WHEN 'service_accounts' THEN (SELECT count(*) FROM service_account WHERE tenant_id = $1
                                           AND deleted_at IS NULL)
             WHEN 'api_tokens' THEN (SELECT count(*) FROM api_token WHERE coalesce(tenant_id, 0) = $1
                                     AND revoked_at IS NULL AND expires_at > now())
             WHEN 'platform_tokens' THEN (SELECT count(*) FROM api_token WHERE coalesce(tenant_id, 0) = 0
                                          AND revoked_at IS NULL AND expires_at > now())
             WHEN 'invitations' THEN (SELECT count(*) FROM invitation WHERE coalesce(tenant_id, 0) = $1
                                      AND used_at IS NULL AND revoked_at IS NULL AND expires_at > now())
             WHEN 'platform_invitations' THEN (SELECT count(*) FROM invitation WHERE coalesce(tenant_id, 0) = 0
                                               AND used_at IS NULL AND revoked_at IS NULL AND expires_at > now())
             WHEN 'members' THEN (SELECT count(*) FROM membership WHERE tenant_id = $1)
             WHEN 'grants' THEN (SELECT count(*) FROM grant_offer WHERE tenant_id = $1 AND withdrawn_at IS NULL)
             WHEN 'egress_targets' THEN (SELECT count(*) FROM egress_target WHERE tenant_id = $1
                                         AND state IN ('asked', 'approved'))
             ELSE 0 END)::bigint AS "n!" FROM unnest($2::text[]) r"#,
        tenant,
        &names
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().filter_map(|row| Some((Resource::by_name(&row.resource)?, row.n))).collect())
}

async fn count_one(conn: &mut PgConnection, tenant: i64, resource: Resource) -> Result<i64, Error> {
    Ok(count(conn, tenant, &[resource]).await?.first().map_or(0, |(_, n)| *n))
}

/// Takes the place of one more row of a tenant. Locks the resource, counts the live rows under the lock, and
/// fails if none fits. The caller inserts within the same transaction. Also deletes surplus dead rows.
pub async fn take_place(conn: &mut PgConnection, tenant: TenantId, resource: Resource) -> Result<(), Error> {
    let held = lock(conn, tenant, resource).await?;
    held.require_place(count_one(conn, tenant.0, resource).await?)?;
    drop_dead(conn, tenant, resource).await
}

/// Takes the place of one more row of the platform itself.
pub async fn take_platform_place(conn: &mut PgConnection, resource: Resource) -> Result<(), Error> {
    let held = lock_platform(conn, resource).await?;
    held.require_place(count_one(conn, 0, resource).await?)
}

/// Returns every limit of a tenant with its use, counted resources included.
pub async fn read_counted(conn: &mut PgConnection, tenant: TenantId) -> Result<Quota, Error> {
    let mut quota = read(conn, tenant).await?;
    let counted: Vec<Resource> =
        Resource::of_tenants().filter(|resource| resource.definition().how == How::Counted).collect();
    for (resource, used) in count(conn, tenant.0, &counted).await? {
        quota.count(resource, used);
    }
    Ok(quota)
}

/// Deletes the oldest surplus dead rows of a kind, a few per call, so that deletion keeps up with creation.
async fn drop_dead(conn: &mut PgConnection, tenant: TenantId, resource: Resource) -> Result<(), Error> {
    match resource {
        Resource::RegistryCredentials => {
            sqlx::query!(
                "DELETE FROM robot WHERE tenant_id = $1 AND id IN (SELECT id FROM robot WHERE tenant_id = $1 \
                 AND (revoked_at IS NOT NULL OR expires_at <= now()) ORDER BY id DESC OFFSET $2 LIMIT 20)",
                tenant.0,
                DEAD_KEPT
            )
            .execute(conn)
            .await?;
        }
        Resource::ApiTokens => {
            sqlx::query!(
                "DELETE FROM api_token WHERE id IN (SELECT id FROM api_token WHERE coalesce(tenant_id, 0) = $1 \
                 AND (revoked_at IS NOT NULL OR expires_at <= now()) ORDER BY id DESC OFFSET $2 LIMIT 20)",
                tenant.0,
                DEAD_KEPT
            )
            .execute(conn)
            .await?;
        }
        Resource::ServiceAccounts => {
            sqlx::query!(
                "DELETE FROM service_account s WHERE s.tenant_id = $1 AND s.id IN (SELECT id FROM service_account \
                   WHERE tenant_id = $1 AND deleted_at IS NOT NULL ORDER BY id DESC OFFSET $2 LIMIT 20) \
                 AND NOT EXISTS (SELECT FROM api_token k WHERE k.tenant_id = s.tenant_id AND k.service_account_id = s.id)",
                tenant.0,
                DEAD_KEPT
            )
            .execute(conn)
            .await?;
        }
        Resource::Invitations => {
            sqlx::query!(
                "DELETE FROM invitation WHERE id IN (SELECT id FROM invitation WHERE coalesce(tenant_id, 0) = $1 \
                 AND (used_at IS NOT NULL OR revoked_at IS NOT NULL OR expires_at <= now()) \
                 ORDER BY id DESC OFFSET $2 LIMIT 20)",
                tenant.0,
                DEAD_KEPT
            )
            .execute(conn)
            .await?;
        }
        Resource::EgressTargets => {
            sqlx::query!(
                "DELETE FROM egress_target WHERE tenant_id = $1 AND id IN (SELECT id FROM egress_target \
                 WHERE tenant_id = $1 AND state IN ('refused', 'withdrawn') ORDER BY id DESC OFFSET $2 LIMIT 20)",
                tenant.0,
                DEAD_KEPT
            )
            .execute(conn)
            .await?;
        }
        _ => {}
    }
    Ok(())
}

/// Deletes rows that have been dead for 90 days, in batches, until none is left.
pub async fn prune(pool: &PgPool) -> Result<(), Error> {
    // Delete tokens before their service accounts, and answers before their offers.
    for _ in 0..10_000 {
        let mut conn = pool.acquire().await?;
        let gone = sqlx::query_scalar!(
            r#"WITH tokens AS (DELETE FROM api_token WHERE id IN (SELECT id FROM api_token
                 WHERE least(coalesce(revoked_at, expires_at), expires_at) < now() - interval '90 days' LIMIT $1) RETURNING 1),
               robots AS (DELETE FROM robot WHERE id IN (SELECT id FROM robot
                 WHERE least(coalesce(revoked_at, expires_at), expires_at) < now() - interval '90 days' LIMIT $1) RETURNING 1),
               links AS (DELETE FROM invitation WHERE id IN (SELECT id FROM invitation
                 WHERE least(coalesce(used_at, revoked_at, expires_at), expires_at) < now() - interval '90 days' LIMIT $1)
                 RETURNING 1),
               targets AS (DELETE FROM egress_target WHERE id IN (SELECT id FROM egress_target
                 WHERE state IN ('refused', 'withdrawn') AND coalesce(ended_at, decided_at, asked_at) < now() - interval '90 days'
                 LIMIT $1) RETURNING 1),
               answers AS (DELETE FROM grant_answer a WHERE (a.from_tenant_id, a.offer_id) IN (SELECT o.tenant_id, o.id
                 FROM grant_offer o JOIN grant_answer x ON x.from_tenant_id = o.tenant_id AND x.offer_id = o.id
                 WHERE o.withdrawn_at < now() - interval '90 days' LIMIT $1) RETURNING 1)
               SELECT (SELECT count(*) FROM tokens) + (SELECT count(*) FROM robots) + (SELECT count(*) FROM links)
                 + (SELECT count(*) FROM targets) + (SELECT count(*) FROM answers) AS "n!""#,
            BATCH
        )
        .fetch_one(&mut *conn)
        .await?;
        let parents = sqlx::query_scalar!(
            r#"WITH services AS (DELETE FROM service_account WHERE id IN (SELECT s.id FROM service_account s
                 WHERE s.deleted_at < now() - interval '90 days' AND NOT EXISTS (SELECT FROM api_token k
                   WHERE k.tenant_id = s.tenant_id AND k.service_account_id = s.id) LIMIT $1) RETURNING 1),
               offers AS (DELETE FROM grant_offer WHERE id IN (SELECT o.id FROM grant_offer o
                 WHERE o.withdrawn_at < now() - interval '90 days' AND NOT EXISTS (SELECT FROM grant_answer a
                   WHERE a.from_tenant_id = o.tenant_id AND a.offer_id = o.id) LIMIT $1) RETURNING 1)
               SELECT (SELECT count(*) FROM services) + (SELECT count(*) FROM offers) AS "n!""#,
            BATCH
        )
        .fetch_one(&mut *conn)
        .await?;
        if gone + parents == 0 {
            break;
        }
    }
    Ok(())
}
