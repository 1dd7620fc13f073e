//! Row-level security: what the database enforces even if a query forgets its condition.

use std::collections::BTreeSet;

use bulkhead::db::{self, Within};
use bulkhead::ids::TenantId;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, Executor, PgPool};

use crate::support::pool_as;

/// Tables without a tenant. A new table must be listed here or have a policy.
const COMMON: &[&str] = &[
    "_sqlx_migrations",
    "account",
    "account_identity",
    "audit_retired",
    "audit_round",
    "first_admin_link",
    "idempotency",
    "installation",
    "known_place",
    "machine_event",
    "network_rollout",
    "quota_default",
    "recovery_code",
    "refused_field",
    "second_factor",
    "service",
    "session",
    "sign_in",
    "tenant",
    "throttle",
];

async fn populate(root: &PgPool) {
    for migration in db::MIGRATOR.iter() {
        let file = format!("tests/it/samples/{}.sql", migration.version);
        // Skip rows of the first schema that no longer fit the current one.
        let rows = std::fs::read_to_string(&file).unwrap();
        for statement in rows.split(";\n").filter(|statement| !statement.trim().is_empty()) {
            if statement.contains("INTO quota (tenant_id, cpu_millis") {
                fill_quota(root).await;
                continue;
            }
            if statement.contains("INTO session (hash, token_id)") {
                continue;
            }
            root.execute(AssertSqlSafe(statement.to_owned()))
                .await
                .unwrap_or_else(|e| panic!("{statement}: {e}"));
        }
    }
}

/// Inserts each tenant's quota in the current schema.
async fn fill_quota(root: &PgPool) {
    root.execute(
        "INSERT INTO quota (tenant_id, resource) SELECT id, resource FROM tenant, quota_default \
                  WHERE resource NOT LIKE 'platform%'",
    )
    .await
    .unwrap();
}

async fn tables(root: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace \
         AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 1",
    )
    .fetch_all(root)
    .await
    .unwrap()
}

async fn of_tenants(root: &PgPool) -> Vec<String> {
    let all = tables(root).await;
    all.into_iter().filter(|table| !COMMON.contains(&table.as_str())).collect()
}

/// Returns the tenants whose rows a bare statement reaches. Rolls the statement back.
async fn reach(
    pool: &PgPool,
    within: Option<i64>,
    statement: String,
) -> Result<BTreeSet<Option<i64>>, String> {
    let mut tx = match within {
        Some(id) => db::begin(pool, TenantId(id)).await.unwrap(),
        None => pool.begin().await.unwrap(),
    };
    let rows: Result<Vec<Option<i64>>, _> =
        sqlx::query_scalar(AssertSqlSafe(statement)).fetch_all(&mut *tx).await;
    tx.rollback().await.unwrap();
    rows.map(|rows| rows.into_iter().collect()).map_err(|error| error.to_string())
}

/// Returns the leaks of every table in every context. A test below checks this function itself.
async fn leaks(root: &PgPool, runtime: &PgPool) -> Vec<String> {
    let ids: Vec<i64> =
        sqlx::query_scalar("SELECT id FROM tenant ORDER BY id LIMIT 2").fetch_all(root).await.unwrap();
    let mut found = Vec::new();
    for table in of_tenants(root).await {
        for within in [None, Some(ids[0]), Some(ids[1])] {
            for statement in [
                format!("SELECT tenant_id FROM {table}"),
                format!("UPDATE {table} SET tenant_id = tenant_id RETURNING tenant_id"),
                format!("DELETE FROM {table} RETURNING tenant_id"),
            ] {
                let verb = statement.split(' ').next().unwrap().to_owned();
                match reach(runtime, within, statement).await {
                    Ok(seen) if within.is_none() && seen.is_empty() => {}
                    Ok(seen) if seen.iter().all(|id| within.is_some() && *id == within) => {
                        if verb == "SELECT" && seen.is_empty() {
                            found.push(format!("{table}: a tenant does not see its own rows"));
                        }
                    }
                    Ok(seen) => found.push(format!("{table}: {verb} under {within:?} reaches {seen:?}")),
                    // The privilege is not granted at all.
                    Err(error) if error.contains("permission denied") && verb != "SELECT" => {}
                    Err(error) if error.contains("foreign key") => {}
                    Err(error) => found.push(format!("{table}: {verb} under {within:?}: {error}")),
                }
            }
            // A row for tenant B, inserted by tenant A or without a tenant: the policy must refuse it.
            if within != Some(ids[1]) {
                let insert =
                    format!("INSERT INTO {table} (tenant_id) VALUES ({}) RETURNING tenant_id", ids[1]);
                match reach(runtime, within, insert).await {
                    Err(error)
                        if error.contains("row-level security") || error.contains("permission denied") => {}
                    other => found.push(format!("{table}: INSERT for another under {within:?}: {other:?}")),
                }
            }
        }
    }
    found
}

async fn both(options: PgPoolOptions, connect: &PgConnectOptions) -> (PgPool, PgPool) {
    let root = options.connect_with(connect.clone()).await.unwrap();
    populate(&root).await;
    // NOT NULL columns would hide the policy behind another error.
    for table in of_tenants(&root).await {
        let columns: Vec<String> = sqlx::query_scalar(
            "SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = $1::regclass AND a.attnum > 0 \
             AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attname <> 'tenant_id' \
             AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary AND a.attnum = ANY(i.indkey))",
        )
        .bind(&table)
        .fetch_all(&root)
        .await
        .unwrap();
        for column in columns {
            let drop = format!("ALTER TABLE {table} ALTER COLUMN {column} DROP NOT NULL");
            root.execute(AssertSqlSafe(drop)).await.unwrap();
        }
    }
    let runtime = pool_as(connect, "bulkhead_runtime").await;
    (root, runtime)
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn no_bare_statement_reaches_another_tenant(options: PgPoolOptions, connect: PgConnectOptions) {
    let (root, runtime) = both(options, &connect).await;
    let found = leaks(&root, &runtime).await;
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(of_tenants(&root).await.len() >= 22);
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_proof_sees_each_policy_that_is_dropped(options: PgPoolOptions, connect: PgConnectOptions) {
    let (root, runtime) = both(options, &connect).await;
    for table in of_tenants(&root).await {
        root.execute(AssertSqlSafe(format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY"))).await.unwrap();
        let found = leaks(&root, &runtime).await;
        assert!(
            found.iter().any(|leak| leak.starts_with(&format!("{table}:"))),
            "{table} is open, and the check does not see it"
        );
        root.execute(AssertSqlSafe(format!("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY"))).await.unwrap();
        root.execute(AssertSqlSafe(format!(
            "ALTER POLICY of_tenant ON {table} USING (true) WITH CHECK (true)"
        )))
        .await
        .unwrap();
        let found = leaks(&root, &runtime).await;
        assert!(
            found.iter().any(|leak| leak.starts_with(&format!("{table}:"))),
            "{table}'s policy is open, and the check does not see it"
        );
        let again = "(tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint))";
        root.execute(AssertSqlSafe(format!(
            "ALTER POLICY of_tenant ON {table} USING {again} WITH CHECK {again}"
        )))
        .await
        .unwrap();
    }
    assert!(leaks(&root, &runtime).await.is_empty());
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_catalogue_is_as_designed(options: PgPoolOptions, connect: PgConnectOptions) {
    let root = options.connect_with(connect).await.unwrap();
    // Each table with a tenant_id, partitions included, has forced row-level security.
    let open: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id' \
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') \
         AND NOT (c.relrowsecurity AND c.relforcerowsecurity)",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    assert_eq!(open, Vec::<String>::new());
    // Each table without a tenant_id is on the list.
    let nobody: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace \
         AND c.relkind IN ('r', 'p') AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid \
         AND a.attname = 'tenant_id')",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    for table in nobody {
        assert!(COMMON.contains(&table.as_str()), "{table} has no tenant_id: add one, or list it in COMMON");
    }
    // No role bypasses row-level security, and the role of requests owns nothing.
    let strong: Vec<String> = sqlx::query_scalar(
        "SELECT rolname::text FROM pg_roles WHERE rolname LIKE 'bulkhead%' AND (rolsuper OR rolbypassrls OR rolcreaterole)",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    assert_eq!(strong, Vec::<String>::new());
    // The audit log can be inserted and read. No role can update or delete a row, or choose its time.
    for role in ["bulkhead_runtime", "bulkhead_reconciler"] {
        for (privilege, wanted) in
            [("SELECT", true), ("UPDATE", false), ("DELETE", false), ("TRUNCATE", false)]
        {
            let has: bool = sqlx::query_scalar("SELECT has_table_privilege($1, 'audit', $2)")
                .bind(role)
                .bind(privilege)
                .fetch_one(&root)
                .await
                .unwrap();
            assert_eq!(has, wanted, "{role} {privilege}");
        }
        for column in ["id", "at", "tx"] {
            let has: bool = sqlx::query_scalar("SELECT has_column_privilege($1, 'audit', $2, 'INSERT')")
                .bind(role)
                .bind(column)
                .fetch_one(&root)
                .await
                .unwrap();
            assert!(!has, "{role} may choose {column}");
        }
        let may_change_releases: bool =
            sqlx::query_scalar("SELECT has_table_privilege($1, 'release', 'UPDATE')")
                .bind(role)
                .fetch_one(&root)
                .await
                .unwrap();
        assert!(!may_change_releases, "{role}");
    }
    // Functions with elevated rights run with a fixed search path.
    let loose: Vec<String> = sqlx::query_scalar(
        "SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef \
         AND (proconfig IS NULL OR NOT 'search_path=pg_catalog, public' = ANY(proconfig))",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    assert_eq!(loose, Vec::<String>::new());
    // Composite keys: a child names its tenant in every key to a parent of the same tenant. The one key across
    // tenants is the answer to another tenant's offer; it names that tenant.
    let single: Vec<String> = sqlx::query_scalar(
        "SELECT k.conname::text FROM pg_constraint k WHERE k.contype = 'f' AND k.connamespace = 'public'::regnamespace \
         AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = k.confrelid AND a.attname = 'tenant_id') \
         AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = k.conrelid AND a.attname = 'tenant_id' \
                         AND a.attnum = ANY(k.conkey)) \
         AND k.conname <> 'grant_answer_is_to_an_offer'",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    assert_eq!(single, Vec::<String>::new());
}

/// Runs `migrate` as on a managed database: with a role that is no superuser, over tables that another role
/// created and filled. A migration that adds a foreign key or fills a column must see all rows.
#[sqlx::test(migrations = false)]
async fn migrations_under_a_forced_owner_do_not_lie(options: PgPoolOptions, connect: PgConnectOptions) {
    let root = options.connect_with(connect.clone()).await.unwrap();
    let database: String =
        sqlx::query_scalar("SELECT current_database()::text").fetch_one(&root).await.unwrap();
    let early: Vec<_> = db::MIGRATOR.iter().filter(|m| m.version < 20_261_125_000_000).cloned().collect();
    Migrator::with_migrations(early).run(&root).await.unwrap();
    for version in ["20261124120000", "20261124120100"] {
        let rows = std::fs::read_to_string(format!("tests/it/samples/{version}.sql")).unwrap();
        root.execute(AssertSqlSafe(rows.replace("'demo'", "'abcd'"))).await.unwrap();
    }
    let before: i64 = sqlx::query_scalar("SELECT count(*) FROM audit").fetch_one(&root).await.unwrap();
    let text = include_str!("settings.toml").replace("DATABASE", &database);
    let config = bulkhead::config::Config::parse(&text, &[]).unwrap();
    let mut conn = root.acquire().await.unwrap();
    db::migrate(&mut conn, &config).await.unwrap();
    db::migrate(&mut conn, &config).await.unwrap();
    let after: i64 = sqlx::query_scalar("SELECT count(*) FROM audit").fetch_one(&root).await.unwrap();
    assert_eq!(after, before, "all rows are kept");
    let foreign: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'S') \
         AND relowner <> 'bulkhead_owner'::regrole",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    assert_eq!(foreign, Vec::<String>::new(), "the owner role owns all tables");
    // The forced owner sees nothing; within the transaction of `migrate` it sees everything.
    let owner = pool_as(&connect, "bulkhead_owner").await;
    let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM quota").fetch_one(&owner).await.unwrap();
    assert_eq!(seen, 0, "row-level security applies to the owner too");
    let mut tx = owner.begin().await.unwrap();
    tx.execute("ALTER TABLE quota NO FORCE ROW LEVEL SECURITY").await.unwrap();
    let filled = tx.execute("UPDATE quota SET limit_ = limit_").await.unwrap();
    assert!(filled.rows_affected() >= 2, "a backfill reaches its rows");
    tx.rollback().await.unwrap();
    let forced: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relrowsecurity AND NOT relforcerowsecurity",
    )
    .fetch_one(&root)
    .await
    .unwrap();
    assert_eq!(forced, 0, "row-level security is forced again");
    // The real roles work with the result.
    let runtime = pool_as(&connect, "bulkhead_runtime").await;
    db::check_role(&runtime).await.unwrap();
    db::check_schema(&runtime).await.unwrap();
    let mut tx = db::begin(&runtime, &"acme".parse().unwrap()).await.unwrap();
    let own: i64 = sqlx::query_scalar("SELECT count(*) FROM quota").fetch_one(&mut *tx).await.unwrap();
    assert!(own > 10, "a row of every resource");
    drop(tx);
    let mut tx = db::begin(&runtime, Within::Platform).await.unwrap();
    let all: i64 = sqlx::query_scalar("SELECT count(*) FROM quota").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(all, 2 * own, "a platform transaction sees all rows");
    drop(tx);
    for unfit in ["bulkhead_owner", "postgres"] {
        let pool = pool_as(&connect, unfit).await;
        assert!(db::check_role(&pool).await.is_err(), "{unfit} bypasses row-level security");
    }
}
