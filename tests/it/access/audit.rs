//! The audit log: one row per change, in the same transaction; refusals; a chain that reveals tampering.

use bulkhead::access::Role;
use bulkhead::audit::heads::Heads;
use bulkhead::audit::verify::{ChainFinding, Report, verify};
use bulkhead::keys::KeyPurpose;
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

type Wanted = Box<dyn Fn(&ChainFinding) -> bool>;

async fn check(app: &TestApp) -> Report {
    let key = app.one.platform.desk.keys.of(KeyPurpose::Audit);
    let heads = Heads::in_file(app.config.access.audit_heads.clone());
    verify(&app.one.platform.work, &key, &heads).await.unwrap()
}

async fn rows(app: &TestApp) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM audit").fetch_one(&app.root).await.unwrap()
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn each_change_is_one_row_and_a_failed_one_none(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let mut olga = app.member("olga", "acme", Role::Owner).await;
    app.member("bob", "acme", Role::Viewer).await;
    let base = "/api/v1/tenants/acme";
    let steps: Vec<(&str, String, Value, &str)> = vec![
        (
            "POST",
            format!("{base}/service-accounts"),
            json!({"name": "ci", "role": "viewer"}),
            "service_account.create",
        ),
        (
            "POST",
            format!("{base}/tokens"),
            json!({"service_account": "ci", "name": "t", "days": 1}),
            "token.create",
        ),
        ("POST", format!("{base}/invitations"), json!({"name": "carl", "role": "viewer"}), "member.invite"),
        ("PUT", format!("{base}/members/bob"), json!({"role": "deployer"}), "member.role"),
        ("POST", format!("{base}/members/bob/reset"), Value::Null, "member.reset"),
        ("DELETE", format!("{base}/members/bob"), Value::Null, "member.remove"),
        ("POST", format!("{base}/robots"), json!({"name": "push", "push": true}), "robot.create"),
        ("DELETE", format!("{base}/robots/push"), Value::Null, "robot.delete"),
        ("DELETE", format!("{base}/service-accounts/ci"), Value::Null, "service_account.delete"),
    ];
    for (method, path, body, action) in steps {
        let before = rows(&app).await;
        let (status, answer) = olga.api(method, &path, body.clone()).await;
        assert!((200..300).contains(&status), "{method} {path}: {answer}");
        assert_eq!(rows(&app).await, before + 1, "{method} {path}");
        let last = app.get(&app.admin().await, "/api/v1/audit?limit=3").await;
        let row = last["items"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["action"] == action && row["tenant"] == "acme");
        let row = row.unwrap_or_else(|| panic!("{action}: {last}"));
        assert!(
            row["actor"].as_str().unwrap().starts_with("account:") && row["request_id"].is_string(),
            "{row}"
        );
        let before = rows(&app).await;
        let again = if method == "DELETE" { path.clone() } else { format!("{path}/none") };
        let (status, _) = olga.api(method, &again, json!({"nonsense": 1})).await;
        assert!(status >= 400);
        assert_eq!(rows(&app).await, before, "a failed change leaves no row");
    }
    // Filters and pages, newest first. A tenant sees its own rows.
    let page = olga.api("GET", &format!("{base}/audit?limit=2&action=token.create"), Value::Null).await.1;
    assert_eq!(page["items"].as_array().unwrap().len(), 1, "{page}");
    let (mut seen, mut path) = (Vec::new(), format!("{base}/audit?limit=3"));
    loop {
        let page = olga.api("GET", &path, Value::Null).await.1;
        seen.extend(page["items"].as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()));
        let Some(next) = page["next"].as_str() else { break };
        path = format!("{base}/audit?limit=3&cursor={next}");
    }
    assert!(seen.len() > 9 && seen.is_sorted_by(|a, b| a > b), "{seen:?}");
    let (status, text) = olga.api("GET", &format!("{base}/audit/export"), Value::Null).await;
    assert_eq!(status, 200);
    let lines: Vec<&str> = text.as_str().unwrap().lines().collect();
    assert_eq!(lines.len(), seen.len(), "one JSON object a line");
    assert!(lines.iter().all(|line| serde_json::from_str::<Value>(line).unwrap()["id"].is_i64()));
    for bad in ["?result=maybe", "?since=yesterday", "?limit=0", "?nonsense=1", "?cursor=%21"] {
        assert_eq!(olga.api("GET", &format!("{base}/audit{bad}"), Value::Null).await.0, 400, "{bad}");
    }
    let by_name = olga.api("GET", &format!("{base}/audit?actor=olga"), Value::Null).await.1;
    assert!(by_name["items"].as_array().unwrap().len() > 5, "{by_name}");
    let text = olga.page("/tenants/acme/activity?action=member.role").await;
    assert!(
        text.contains("member.role") && text.contains("deployer") && !text.contains("robot.create"),
        "{text}"
    );
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn refusals_are_on_record_and_bounded(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.tenant("evil").await;
    let mut vera = app.member("vera", "acme", Role::Viewer).await;
    let mut eve = app.member("eve", "evil", Role::Owner).await;
    app.write_denials().await;
    let before = rows(&app).await;
    for n in 0..300 {
        vera.api("DELETE", &format!("/api/v1/tenants/acme/apps/a{n}"), Value::Null).await;
        eve.api("GET", "/api/v1/tenants/acme", Value::Null).await;
    }
    app.nobody("vera").sign_in("wrong").await;
    app.nobody("my secret password").sign_in("typed into the wrong field").await;
    app.ask("bhk_stolen", "GET", "/api/v1/me", Value::Null).await;
    app.write_denials().await;
    let added = rows(&app).await - before;
    assert_eq!(added, 5, "one row per kind of refusal, however many requests");
    let admin = app.admin().await;
    let list = app.get(&admin, "/api/v1/audit?result=denied").await.to_string();
    assert!(list.contains("\"count\":300") && list.contains("no role here"), "{list}");
    assert!(!list.contains("my secret password") && !list.contains("bhk_stolen"), "{list}");
    // The tenant sees refusals of its own members, and none of outsiders.
    let own = app.get(&admin, "/api/v1/tenants/acme/audit?result=denied").await.to_string();
    assert!(own.contains("vera") && !own.contains("eve"), "{own}");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_chain_tells_what_was_touched(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    app.seal().await;
    app.member("olga", "acme", Role::Owner).await;
    app.tenant("beta").await;
    app.seal().await;
    app.member("bob", "acme", Role::Viewer).await;
    app.member("bill", "beta", Role::Viewer).await;
    app.seal().await;
    let good = check(&app).await;
    assert_eq!(good.findings, []);
    assert!(
        good.rows == rows(&app).await && good.rounds >= 3 && good.unsealed == 0 && good.heads,
        "{good:?}"
    );
    let id = |nth: usize| {
        let root = app.root.clone();
        async move {
            let ids: Vec<i64> =
                sqlx::query_scalar("SELECT id FROM audit WHERE tenant_id IS NOT NULL ORDER BY id")
                    .fetch_all(&root)
                    .await
                    .unwrap();
            ids[nth]
        }
    };
    let (second, third) = (id(1).await, id(2).await);
    // Each tampering with its expected finding. `restore` undoes it.
    app.sql(
        "CREATE TABLE saved AS SELECT * FROM audit; CREATE TABLE seals AS SELECT * FROM audit_seal; \
             CREATE TABLE rounds AS SELECT * FROM audit_round",
    )
    .await;
    let restore = "DELETE FROM audit; INSERT INTO audit SELECT * FROM saved; DELETE FROM audit_seal; \
                   DELETE FROM audit_round; INSERT INTO audit_round SELECT * FROM rounds; \
                   INSERT INTO audit_seal SELECT * FROM seals";
    let tampers: Vec<(String, Wanted)> = vec![
        (format!("UPDATE audit SET actor = 'somebody else' WHERE id = {second}"), Box::new(move |f| matches!(f, ChainFinding::Changed { row, .. } if *row == second))),
        (format!("UPDATE audit SET at = at - interval '1 second' WHERE id = {second}"), Box::new(move |f| matches!(f, ChainFinding::Changed { row, .. } if *row == second))),
        (format!("UPDATE audit SET at = at - interval '400 days' WHERE id = {second}"), Box::new(move |f| matches!(f, ChainFinding::Changed { row, .. } if *row == second))),
        (format!("UPDATE audit SET tenant_id = (SELECT max(id) FROM tenant) WHERE id = {second}"), Box::new(move |f| matches!(f, ChainFinding::Changed { row, .. } if *row == second))),
        (format!("UPDATE audit SET detail = detail || '{{\"x\": 1}}' WHERE id = {second}"), Box::new(move |f| matches!(f, ChainFinding::Changed { row, .. } if *row == second))),
        (format!("DELETE FROM audit WHERE id = {second}"), Box::new(move |f| matches!(f, ChainFinding::Removed { row, .. } if *row == second))),
        (format!("UPDATE audit SET id = CASE id WHEN {second} THEN {third} ELSE {second} END WHERE id IN ({second}, {third})"), Box::new(move |f| matches!(f, ChainFinding::Changed { row, .. } if *row == second))),
        ("INSERT INTO audit (id, at, tx, tenant_id, actor, action, object, request_id) SELECT 900000, at, tx, tenant_id, actor, action, object, request_id FROM audit ORDER BY id LIMIT 1".into(), Box::new(|f| *f == ChainFinding::Inserted { row: 900_000 })),
        ("INSERT INTO audit (id, tx, tenant_id, actor, action, object, request_id) SELECT 900001, '99999999', tenant_id, actor, action, object, request_id FROM audit ORDER BY id LIMIT 1".into(), Box::new(|f| *f == ChainFinding::Inserted { row: 900_001 })),
        ("DELETE FROM audit_seal WHERE tenant_id IS NOT NULL AND number = 1".into(), Box::new(|f| matches!(f, ChainFinding::SealBroken { .. } | ChainFinding::RoundBroken { .. }))),
        ("UPDATE audit_seal SET macs = overlay(macs placing '\\x00'::bytea from 1) WHERE number = 1".into(), Box::new(|f| matches!(f, ChainFinding::SealBroken { .. }))),
        ("UPDATE audit_seal SET first_at = first_at - interval '1 year' WHERE number = 1".into(), Box::new(|f| matches!(f, ChainFinding::SealBroken { .. }))),
        ("UPDATE audit_seal SET number = number + 100 WHERE number <= 2; UPDATE audit_seal SET number = 103 - number WHERE number > 100".into(), Box::new(|f| matches!(f, ChainFinding::SealBroken { .. }))),
        ("DELETE FROM audit_seal WHERE round = 2; DELETE FROM audit_round WHERE number = 2".into(), Box::new(|f| *f == ChainFinding::RoundBroken { round: 2 })),
        ("UPDATE audit_round SET last_id = last_id + 1 WHERE number = 1".into(), Box::new(|f| matches!(f, ChainFinding::RoundBroken { .. }))),
        // The end is cut off with its seals: the remaining chain is valid, and the exported head reveals the
        // cut.
        ("DELETE FROM audit WHERE id IN (SELECT unnest(ids) FROM audit_seal WHERE round = (SELECT max(number) FROM audit_round)); DELETE FROM audit_seal WHERE round = (SELECT max(number) FROM audit_round); DELETE FROM audit_round WHERE number = (SELECT max(number) FROM audit_round)".into(), Box::new(|f| matches!(f, ChainFinding::TailCut { .. }))),
        ("INSERT INTO audit_retired (month, rows) VALUES (date_trunc('month', now()), 1); DELETE FROM audit".into(), Box::new(|f| matches!(f, ChainFinding::NotRetired { .. }))),
    ];
    for (tamper, wanted) in tampers {
        app.sql(&tamper).await;
        let report = check(&app).await;
        assert!(report.findings.iter().any(wanted), "{tamper}\n{:?}", report.findings);
        app.sql("DELETE FROM audit_retired").await;
        app.sql(restore).await;
        assert_eq!(check(&app).await.findings, [], "undone: {tamper}");
    }
    // Access to the database without the key is not enough to make a valid chain.
    let other = bulkhead::keys::Keys::parse(&bulkhead::keys::Keys::generate()).unwrap();
    let heads = Heads::in_file(None);
    let report = verify(&app.one.platform.work, &other.of(KeyPurpose::Audit), &heads).await.unwrap();
    assert!(!report.findings.is_empty() && !report.heads);
}

/// Rows of transactions that commit late, in another order than their numbers, are sealed. Two concurrent
/// sealers make one chain. A database that was restored into another cluster continues its chain.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn sealing_misses_nothing(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    app.tenant("acme").await;
    let runtime = app.pool_as("bulkhead_runtime").await;
    let insert = "INSERT INTO audit (tenant_id, actor, action, object, request_id) \
                  SELECT id, 'root', 'tenant.change', 'late', 'r' FROM tenant";
    let mut late = bulkhead::db::begin(&runtime, &"acme".parse().unwrap()).await.unwrap();
    sqlx::Executor::execute(&mut *late, insert).await.unwrap();
    app.member("olga", "acme", Role::Owner).await;
    app.seal().await;
    let report = check(&app).await;
    assert_eq!(report.findings, []);
    assert!(report.unsealed > 0, "rows above an open transaction are not sealed yet");
    late.commit().await.unwrap();
    app.seal().await;
    let report = check(&app).await;
    assert!(report.findings.is_empty() && report.unsealed == 0, "{report:?}");
    // Many writers, two sealers.
    let second = app.another().await;
    let key = app.one.platform.desk.keys.of(KeyPurpose::Audit);
    let heads = Heads::in_file(app.config.access.audit_heads.clone());
    let sealing = async |pool: &sqlx::PgPool| {
        for _ in 0..60 {
            bulkhead::audit::seal::seal(pool, &key, &heads).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let writing = async {
        for _ in 0..100 {
            let mut tx = bulkhead::db::begin(&runtime, &"acme".parse().unwrap()).await.unwrap();
            sqlx::Executor::execute(&mut *tx, insert).await.unwrap();
            tx.commit().await.unwrap();
        }
    };
    tokio::join!(sealing(&app.one.platform.work), sealing(&second.platform.work), writing);
    app.seal().await;
    let report = check(&app).await;
    assert!(report.findings.is_empty() && report.rows == rows(&app).await, "{report:?}");
    second.stop().await;
    // Simulate a restore into another cluster, whose transaction numbers start below the sealed ones: old rows
    // keep their high numbers, new rows get low ones.
    app.sql("UPDATE audit SET tx = ((tx::text::bigint) + 1000000)::text::xid8; \
             INSERT INTO audit (tenant_id, actor, action, object, request_id) SELECT id, 'root', 'x.y', 'unsealed', 'r' FROM tenant").await;
    let last: (i64, String, i64, Vec<u8>, Vec<u8>) = sqlx::query_as(
        "SELECT number, (tx_to::text::bigint + 1000000)::text, last_id, \
         coalesce((SELECT string_agg(s.mac, ''::bytea ORDER BY coalesce(s.tenant_id, 0), s.number) FROM audit_seal s WHERE s.round = r.number), ''::bytea), \
         coalesce((SELECT b.mac FROM audit_round b WHERE b.number = r.number - 1), ''::bytea) \
         FROM audit_round r ORDER BY number DESC LIMIT 1",
    )
    .fetch_one(&app.root)
    .await
    .unwrap();
    let number = last.0.to_be_bytes();
    let mac = bulkhead::keys::mac(
        &key,
        &[b"round", &number, last.1.as_bytes(), &last.2.to_be_bytes(), &last.3, &last.4],
    );
    sqlx::query("UPDATE audit_round SET tx_to = $1::text::xid8, mac = $2 WHERE number = $3")
        .bind(&last.1)
        .bind(&mac[..])
        .bind(last.0)
        .execute(&app.root)
        .await
        .unwrap();
    std::fs::remove_file(app.config.access.audit_heads.as_ref().unwrap()).unwrap();
    app.seal().await;
    app.member("bob", "acme", Role::Viewer).await;
    app.seal().await;
    let report = check(&app).await;
    assert!(
        report.findings.is_empty() && report.rows == rows(&app).await && report.unsealed == 0,
        "{report:?}"
    );
}

/// A month is retired after its retention period, and the audit log records it. Other deletions are found. The
/// test runs the hourly housekeeping with the role of the service.
#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn months_are_kept_given_up_and_missed(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let work = &app.one.platform.work;
    app.tenant("acme").await;
    let old = "INSERT INTO audit (at, tenant_id, actor, action, object, request_id) SELECT now() - interval '20 months', \
               id, 'root', 'tenant.change', 'old', 'r' FROM tenant, generate_series(1, 5)";
    app.sql(old).await;
    app.sql("CREATE TABLE audit_made PARTITION OF audit FOR VALUES FROM ('2024-01-01 00:00:00+00') TO ('2024-02-01 00:00:00+00'); \
             ALTER TABLE audit_made RENAME TO audit_202401; SELECT audit_close_part('audit_202401'); \
             INSERT INTO audit (at, tenant_id, actor, action, object, request_id) SELECT '2024-01-15', id, 'root', 'x.y', 'older', 'r' FROM tenant").await;
    app.seal().await;
    assert_eq!(check(&app).await.findings, []);
    let housekeeping = async || {
        bulkhead::audit::prepare_months(work).await.unwrap();
        bulkhead::audit::retire_months(work, 13).await.unwrap();
        bulkhead::access::prune(work).await.unwrap();
        bulkhead::apps::prune(work).await.unwrap();
    };
    for _ in 0..4 {
        housekeeping().await;
    }
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM audit WHERE at < now() - interval '14 months'")
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert_eq!(left, 0);
    let told: i64 = sqlx::query_scalar("SELECT count(*) FROM audit WHERE action = 'audit.retire'")
        .fetch_one(&app.root)
        .await
        .unwrap();
    assert_eq!(told, 2, "one record per retired month, and no further ones");
    app.seal().await;
    let report = check(&app).await;
    assert!(report.findings.is_empty() && report.retired == 6, "{report:?}");
    // A recent month cannot be retired by any role.
    let refused =
        sqlx::query_scalar::<_, i64>("SELECT audit_retire_month((now() - interval '1 month')::date)")
            .fetch_one(work)
            .await;
    assert!(refused.unwrap_err().to_string().contains("90 days"));
}
