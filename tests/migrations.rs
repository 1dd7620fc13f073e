//! Runs the migrations over a database with data: each migration is followed by its sample rows, so later
//! migrations run over them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot continue panics")]

use std::collections::BTreeSet;
use std::fs;

use sqlx::migrate::Migrator;
use sqlx::{Executor, PgPool};

#[sqlx::test(migrations = false)]
async fn each_migration_runs_over_sample_rows(pool: PgPool) {
    let mut applied = Vec::new();
    for migration in bulkhead::db::MIGRATOR.iter() {
        applied.push(migration.clone());
        let step = Migrator::with_migrations(applied.clone());
        step.run(&pool).await.unwrap();
        let file = format!("tests/it/samples/{}.sql", migration.version);
        let rows = fs::read_to_string(&file)
            .unwrap_or_else(|_| panic!("{file}: give the tables of this migration sample rows"));
        pool.execute(sqlx::AssertSqlSafe(rows)).await.unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    // A table without sample rows would make the test blind.
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace \
         WHERE nspname = 'public' AND relkind IN ('r', 'p') AND NOT relispartition AND relname <> 'audit_retired'",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert!(tables.len() > 15);
    for table in tables {
        let query = format!("SELECT count(*) FROM {table}");
        let rows: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(query)).fetch_one(&pool).await.unwrap();
        assert!(rows > 0, "{table} has no sample row");
    }
}

/// A new column of a filled table must define the value of existing rows.
#[test]
fn a_new_column_that_must_be_there_has_a_default() {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir("migrations").unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let (version, verb) = name.split_once('_').unwrap();
        assert!(version.len() == 14 && version.bytes().all(|b| b.is_ascii_digit()), "{name}");
        assert!(
            verb.contains('_') && path.extension().is_some_and(|e| e == "sql"),
            "{name}: VERSION_verb_noun.sql"
        );
        names.insert(name);
        let sql = fs::read_to_string(&path).unwrap().to_uppercase();
        for statement in sql.split(';').filter(|s| s.contains("ADD COLUMN")) {
            assert!(
                !statement.contains("NOT NULL") || statement.contains("DEFAULT"),
                "{}: NOT NULL needs DEFAULT",
                path.display()
            );
        }
    }
    assert!(!names.is_empty());
}
