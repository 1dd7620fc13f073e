//! `migrate`: creates the roles and the schema, and sets the owner. One transaction: it applies completely or
//! not at all.
//!
//! The owner of the tables cannot log in and does not bypass row level security, which is forced for it too.
//! A migration under a forced owner would give wrong results, because the owner sees no rows. A foreign key
//! would count as valid over orphans, and a backfill would report UPDATE 0. Force is therefore lifted within
//! the transaction and restored before it ends. This also works on managed databases, where no role may
//! bypass row level security.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{MIGRATOR, claim_installation};
use crate::config::Config;
use crate::error::Error;

const OWNER: &str = "bulkhead_owner";
const RUNTIME: &str = "bulkhead_runtime";
const RECONCILER: &str = "bulkhead_reconciler";

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn run(conn: &mut PgConnection, statement: String) -> Result<(), Error> {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(conn).await?;
    Ok(())
}

async fn ensure_role(conn: &mut PgConnection, name: &str, login: &str) -> Result<(), Error> {
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)")
        .bind(name)
        .fetch_one(&mut *conn)
        .await?;
    if !there {
        run(conn, format!("CREATE ROLE {} {login}", quoted(name))).await?;
    }
    Ok(())
}

/// Creates the roles, grants their privileges, and makes the owner own all existing objects.
async fn ensure_roles(conn: &mut PgConnection, config: &Config) -> Result<(), Error> {
    let database = &config.database;
    for group in [OWNER, RUNTIME, RECONCILER] {
        ensure_role(conn, group, "NOLOGIN").await?;
    }
    let may_own: bool = sqlx::query_scalar("SELECT pg_has_role(current_user, $1, 'MEMBER')")
        .bind(OWNER)
        .fetch_one(&mut *conn)
        .await?;
    if !may_own {
        run(conn, format!("GRANT {OWNER} TO CURRENT_USER")).await?;
    }
    for (login, group) in [(&database.user, RUNTIME), (&database.reconciler_user, RECONCILER)] {
        ensure_role(conn, login, "LOGIN").await?;
        if login == group {
            run(conn, format!("ALTER ROLE {} LOGIN", quoted(login))).await?;
        } else {
            run(conn, format!("GRANT {group} TO {}", quoted(login))).await?;
        }
    }
    let name = quoted(&database.name);
    run(
        conn,
        format!(
            "REVOKE ALL ON DATABASE {name} FROM PUBLIC; GRANT CONNECT ON DATABASE {name} TO {RUNTIME}, {RECONCILER}; \
             GRANT CREATE, USAGE ON SCHEMA public TO {OWNER}"
        ),
    )
    .await?;
    // A role that owns tables of an earlier version hands them over: the role of requests owns nothing.
    run(
        conn,
        format!(
            "DO $$ DECLARE part record; BEGIN \
             IF (SELECT datdba <> '{OWNER}'::regrole FROM pg_database WHERE datname = current_database()) THEN \
               EXECUTE format('ALTER DATABASE %I OWNER TO {OWNER}', current_database()); END IF; \
             FOR part IN SELECT c.oid::regclass AS name FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace \
               AND c.relkind IN ('r', 'p', 'S') AND c.relowner <> '{OWNER}'::regrole \
               AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype IN ('a', 'i') \
                               AND c.relkind = 'S') LOOP \
               EXECUTE format('ALTER TABLE %s OWNER TO {OWNER}', part.name); END LOOP; \
             FOR part IN SELECT p.oid::regprocedure AS name FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace \
               AND p.proowner <> '{OWNER}'::regrole LOOP \
               EXECUTE format('ALTER FUNCTION %s OWNER TO {OWNER}', part.name); END LOOP; END $$"
        ),
    )
    .await
}

/// Lifts or restores forced row level security for the owner.
async fn force(conn: &mut PgConnection, word: &str) -> Result<(), Error> {
    run(
        conn,
        format!(
            "DO $$ DECLARE part regclass; BEGIN FOR part IN SELECT oid::regclass FROM pg_class \
             WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND relrowsecurity LOOP \
             EXECUTE format('ALTER TABLE %s {word} ROW LEVEL SECURITY', part); END LOOP; END $$"
        ),
    )
    .await
}

async fn is_current(conn: &mut PgConnection) -> Result<bool, Error> {
    let there: bool = sqlx::query_scalar("SELECT to_regclass('public._sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *conn)
        .await?;
    if !there {
        return Ok(false);
    }
    let applied: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success").fetch_all(conn).await?;
    Ok(MIGRATOR.iter().all(|migration| applied.contains(&migration.version)))
}

/// Migrates the database to this version. The role of `conn` must be allowed to create roles.
pub async fn migrate(conn: &mut PgConnection, config: &Config) -> Result<(), Error> {
    let mut tx = conn.begin().await?;
    run(
        &mut tx,
        "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '30s'; SELECT pg_advisory_xact_lock(4711)"
            .into(),
    )
    .await?;
    ensure_roles(&mut tx, config).await?;
    run(&mut tx, format!("SET LOCAL ROLE {OWNER}")).await?;
    // Skip the locks if this version has migrated the tables already.
    if !is_current(&mut tx).await? {
        force(&mut tx, "NO FORCE").await?;
        MIGRATOR.run(&mut *tx).await.map_err(Error::internal)?;
        force(&mut tx, "FORCE").await?;
        run(&mut tx, format!("GRANT SELECT ON _sqlx_migrations TO {RUNTIME}, {RECONCILER}")).await?;
    }
    claim_installation(&mut tx, &config.installation, &config.pools).await?;
    tx.commit().await?;
    Ok(())
}
