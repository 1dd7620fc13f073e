//! Reading the audit log. Each combination of filters finds the same rows as a scan of the table, however few
//! match, page by page and in the export.

use bulkhead::access::{PlatformRole, Role};
use serde_json::Value;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};

use crate::support::{Person, TestApp};

/// Query parameter, and the same condition in SQL.
type Given = (&'static str, &'static str);

const ACTORS: [Given; 3] =
    [("", "true"), ("&actor=service:s3", "actor = 'service:s3'"), ("&actor=service:none", "false")];
const ACTIONS: [Given; 2] = [("", "true"), ("&action=noun1.verb", "action = 'noun1.verb'")];
const OBJECTS: [Given; 2] = [("", "true"), ("&object=o5", "object = 'o5'")];
const RESULTS: [Given; 3] =
    [("", "true"), ("&result=denied", "result = 'denied'"), ("&result=done", "result = 'done'")];
const TIMES: [Given; 3] = [
    ("", "true"),
    (
        "&since=2026-03-03T00:00:00Z&until=2026-04-10T00:00:00Z",
        "at >= '2026-03-03T00:00:00Z' AND at < '2026-04-10T00:00:00Z'",
    ),
    ("&until=2026-02-20T12:00:00Z", "at < '2026-02-20T12:00:00Z'"),
];

async fn ids(pool: &PgPool, condition: &str) -> Vec<i64> {
    let query = format!("SELECT id FROM audit WHERE {condition} ORDER BY id DESC");
    sqlx::query_scalar(AssertSqlSafe(query)).fetch_all(pool).await.unwrap()
}

/// Returns the ids on all pages, and the number of pages.
async fn pages(who: &mut Person, base: &str, filter: &str) -> (Vec<i64>, usize) {
    let (mut seen, mut cursor, mut count) = (Vec::new(), String::new(), 0);
    loop {
        let (status, page) = who.api("GET", &format!("{base}?limit=200{filter}{cursor}"), Value::Null).await;
        assert_eq!(status, 200, "{filter}: {page}");
        count += 1;
        seen.extend(page["items"].as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()));
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return (seen, count),
        }
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn every_filter_finds_what_is_there(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.tenant("other").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    let mut admin = app.person("ada", Some(PlatformRole::Admin)).await;
    // Rows of half a year, half of them the tenant's, spread over several partitions.
    sqlx::query(
        "INSERT INTO audit (at, tenant_id, actor, action, object, result, request_id) \
         SELECT '2026-01-01T00:00:00Z'::timestamptz + n * interval '30 minutes', t.id, 'service:s' || n % 7, \
         'noun' || n % 3 || '.verb', 'o' || n % 11, CASE WHEN n % 1999 = 0 THEN 'denied' ELSE 'done' END, 'r' \
         FROM generate_series(1, 8000) n JOIN tenant t ON t.name = CASE WHEN n % 2 = 0 THEN 'acme' ELSE 'other' END",
    )
    .execute(&app.root)
    .await
    .unwrap();
    let before: i64 = sqlx::query_scalar("SELECT max(id) FROM audit").fetch_one(&app.root).await.unwrap();
    let own = "tenant_id = (SELECT id FROM tenant WHERE name = 'acme')";
    let mut checked = 0;
    for (who, base, within) in
        [(&mut olga, "/api/v1/tenants/acme/audit", own), (&mut admin, "/api/v1/audit", "true")]
    {
        for (actor, action, object, result, time) in combinations() {
            let filter = [actor.0, action.0, object.0, result.0, time.0].concat();
            let condition = format!(
                "id <= {before} AND {within} AND {} AND {} AND {} AND {} AND {}",
                actor.1, action.1, object.1, result.1, time.1
            );
            let (mut found, _) = pages(who, base, &filter).await;
            found.retain(|id| *id <= before);
            assert_eq!(found, ids(&app.root, &condition).await, "{base} {filter}");
            checked += 1;
        }
    }
    assert_eq!(checked, 2 * 3 * 2 * 2 * 3 * 3);
    // The match lies further back than one page reads: empty pages lead to it, and the export contains it.
    let rare = "&actor=service:s4&result=denied";
    let base = "/api/v1/audit";
    let (found, count) = pages(&mut admin, base, rare).await;
    let wanted = ids(&app.root, "actor = 'service:s4' AND result = 'denied'").await;
    assert!(!wanted.is_empty() && found == wanted, "{found:?} {wanted:?}");
    sqlx::query(
        "INSERT INTO audit (actor, action, object, request_id) \
         SELECT 'service:s4', 'a.b', 'o', 'r' FROM generate_series(1, 15000)",
    )
    .execute(&app.root)
    .await
    .unwrap();
    let (found, more) = pages(&mut admin, base, rare).await;
    assert!(found == wanted && more >= count + 20, "{count} pages, then {more}");
    let (_, first) = admin.api("GET", &format!("{base}?limit=200{rare}"), Value::Null).await;
    assert!(first["items"].as_array().unwrap().is_empty() && first["next"].is_string(), "{first}");
    let page = admin.page(&format!("/audit?{}", rare.trim_start_matches('&'))).await;
    assert!(page.contains("href=\"?cursor="), "{page}");
    let (_, file) = admin.api("GET", &format!("{base}/export?{rare}"), Value::Null).await;
    let text = file.as_str().map_or_else(|| file.to_string(), str::to_owned);
    for id in wanted {
        assert!(text.contains(&id.to_string()), "{id}: {text}");
    }
}

type Combination = (Given, Given, Given, Given, Given);

fn combinations() -> Vec<Combination> {
    let mut all = Vec::new();
    for actor in ACTORS {
        for action in ACTIONS {
            for object in OBJECTS {
                for result in RESULTS {
                    all.extend(TIMES.map(|time| (actor, action, object, result, time)));
                }
            }
        }
    }
    all
}
