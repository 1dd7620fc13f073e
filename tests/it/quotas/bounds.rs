//! Every table that a tenant fills has a documented bound.

use std::collections::BTreeSet;

use bulkhead::quotas::Resource;
use bulkhead::quotas::bounds::BOUNDS;
use sqlx::PgPool;

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn every_table_of_a_tenant_has_a_bound(root: PgPool) {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id' \
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition",
    )
    .fetch_all(&root)
    .await
    .unwrap();
    let tables: BTreeSet<&str> = tables.iter().map(String::as_str).collect();
    let bounded: BTreeSet<&str> = BOUNDS.iter().map(|(table, _)| *table).collect();
    let open: Vec<_> = tables.difference(&bounded).collect();
    assert!(open.is_empty(), "add the bound of {open:?} to quotas/bounds.rs, and enforce it");
    assert_eq!(
        bounded.difference(&tables).collect::<Vec<_>>(),
        Vec::<&&str>::new(),
        "these tables no longer exist"
    );
    assert_eq!(bounded.len(), BOUNDS.len(), "each table is listed once");
    for (table, bound) in BOUNDS {
        for name in bound.split('`').skip(1).step_by(2) {
            assert!(Resource::by_name(name).is_some(), "{table}: there is no limit {name}");
        }
    }
    // The table of defaults and the resources of this binary must match.
    let known: Vec<String> =
        sqlx::query_scalar("SELECT resource FROM quota_default ORDER BY 1").fetch_all(&root).await.unwrap();
    let mut ours: Vec<&str> = Resource::ALL.iter().map(|resource| resource.name()).collect();
    ours.sort_unstable();
    assert_eq!(known, ours);
}
