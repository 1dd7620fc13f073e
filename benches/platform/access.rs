//! The cost of sessions, sign-ins and the audit log: a request with session, role and row level security
//! against the bare query; a hundred concurrent sign-ins; the audit log at five million rows.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use actix_web::{App, HttpResponse, HttpServer, web};
use bulkhead::db::Page;
use serde::Serialize;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};

use crate::support::Machine;
use crate::{Row, median, spread};

const CLIENTS: usize = 8;
const SECONDS: u64 = 3;
const PASSWORD: &str = "wholly unguessable sentence 7";

async fn pool(machine: &Machine) -> PgPool {
    let options = PgConnectOptions::new_without_pgpass()
        .socket(machine.data.join("run/postgres"))
        .username("postgres")
        .database("bulkhead");
    PgPoolOptions::new().max_connections(16).connect_with(options).await.unwrap()
}

async fn run(pool: &PgPool, statement: &str) {
    sqlx::query(AssertSqlSafe(statement.to_owned())).execute(pool).await.unwrap();
}

/// Returns a session of the first admin, created through the console.
async fn session(machine: &Machine) -> String {
    let link = std::fs::read_to_string(machine.data.join("secrets/first-admin-link")).unwrap();
    let answer = bulkhead::outgoing::client()
        .build()
        .unwrap()
        .post(link.trim())
        .header("origin", machine.address())
        .header("content-type", "application/x-www-form-urlencoded")
        .body(format!("name=ada&password={}", PASSWORD.replace(' ', "+")))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 303);
    answer.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned()
}

/// The peer returns the same rows and the same page without session, role, transaction or policy.
#[derive(Serialize, sqlx::FromRow)]
struct Robot {
    name: String,
    push: bool,
    created_by: String,
    #[serde(with = "time::serde::rfc3339")]
    created_at: time::OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    expires_at: time::OffsetDateTime,
    #[serde(with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    last_used_at: Option<time::OffsetDateTime>,
}

async fn bare(pool: web::Data<PgPool>, tenant: web::Data<i64>) -> HttpResponse {
    let rows: Vec<Robot> = sqlx::query_as(
        "SELECT name, push, created_by, created_at, expires_at, last_used_at FROM robot \
         WHERE tenant_id = $1 AND revoked_at IS NULL AND name > $2 ORDER BY name LIMIT $3",
    )
    .bind(**tenant)
    .bind("")
    .bind(51_i64)
    .fetch_all(&**pool)
    .await
    .unwrap();
    HttpResponse::Ok().json(Page::new(rows, 50, |row| row.name.clone()))
}

async fn rate(url: &str, cookie: &str) -> f64 {
    let begun = Instant::now();
    let http = bulkhead::outgoing::client().build().unwrap();
    let clients = (0..CLIENTS).map(|_| {
        let http = http.clone();
        async move {
            let mut done = 0_u32;
            while begun.elapsed() < Duration::from_secs(SECONDS) {
                let answer = http.get(url).header("cookie", cookie).send().await.unwrap();
                assert_eq!(answer.status(), 200);
                assert!(answer.bytes().await.unwrap().len() > 1_000);
                done += 1;
            }
            done
        }
    });
    let done: u32 = futures_util::future::join_all(clients).await.iter().sum();
    f64::from(done) / begun.elapsed().as_secs_f64()
}

pub(crate) async fn signed() -> Row {
    let machine = Machine::start().await;
    machine.tenant("acme").await;
    let root = pool(&machine).await;
    run(
        &root,
        "INSERT INTO robot (tenant_id, name, push, hash, created_by, expires_at) SELECT id, 'r' || n, true, \
         sha256(n::text::bytea), 'root', now() + interval '1 day' FROM tenant, generate_series(1, 500) n",
    )
    .await;
    let tenant: i64 = sqlx::query_scalar("SELECT id FROM tenant").fetch_one(&root).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = format!("http://{}/robots", listener.local_addr().unwrap());
    let inner = root.clone();
    let server = HttpServer::new(move || {
        App::new()
            .app_data(web::Data::new(inner.clone()))
            .app_data(web::Data::new(tenant))
            .route("/robots", web::get().to(bare))
    })
    .workers(2)
    .disable_signals()
    .listen(listener)
    .unwrap()
    .run();
    let handle = server.handle();
    tokio::spawn(server);
    let cookie = session(&machine).await;
    let url = format!("{}/api/v1/tenants/acme/robots", machine.address());
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        mine.push(rate(&url, &cookie).await);
        theirs.push(rate(&peer, &cookie).await);
    }
    handle.stop(false).await;
    let overhead = (median(&theirs) / median(&mine) - 1.0) * 100.0;
    Row {
        what: "signed-in requests a second (session, role, row level security), 8 clients",
        ours: spread(&mine, 0),
        peer: format!("the same query bare {}", spread(&theirs, 0)),
        result: format!("{overhead:.0} % more time per request"),
        goal: "at most 15 %",
    }
}

pub(crate) async fn logins() -> Row {
    let machine = Machine::start().await;
    session(&machine).await;
    let root = pool(&machine).await;
    run(
        &root,
        "INSERT INTO account (name, display_name, password) SELECT 'p' || n, 'x', a.password \
         FROM account a, generate_series(1, 100) n WHERE a.name = 'ada'",
    )
    .await;
    let address = machine.address();
    let begun = Instant::now();
    let people = (1..=100_u8).map(|n| {
        // Each sign-in has its own source address, like real users.
        let from = IpAddr::V4(Ipv4Addr::new(127, 0, 1, n));
        let http = bulkhead::outgoing::client().local_address(from).build().unwrap();
        let body = format!("name=p{n}&password={}", PASSWORD.replace(' ', "+"));
        let request = http
            .post(format!("{address}/login"))
            .header("origin", &address)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(body);
        async move { request.send().await.unwrap().status().as_u16() }
    });
    let statuses = futures_util::future::join_all(people).await;
    assert!(statuses.iter().all(|status| *status == 303), "{statuses:?}");
    let seconds = begun.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "megabytes for people")]
    let peak = machine.memory("VmHWM:") as f64 / 1024.0;
    Row {
        what: "resident memory of serve during 100 concurrent sign-ins, maximum MB",
        ours: format!("{peak:.1} (all signed in after {seconds:.1} s)"),
        peer: "limit 128".into(),
        result: format!("{:.2} of the limit", peak / 128.0),
        goal: "128",
    }
}

/// Rows of the audit log in this measurement.
const ROWS: u32 = 5_000_000;

async fn fill(root: &PgPool) {
    run(
        root,
        "INSERT INTO tenant (name, display_name) SELECT 'bench-' || n, 'x' FROM generate_series(1, 100) n",
    )
    .await;
    for month in 1..=12 {
        run(
            root,
            &format!(
                "DO $$ DECLARE first date := (date_trunc('month', now()) - interval '{month} months')::date; \
                 part text := 'audit_' || to_char(first, 'YYYYMM'); BEGIN \
                 EXECUTE format('CREATE TABLE %I PARTITION OF audit FOR VALUES FROM (%L) TO (%L)', part, \
                 to_char(first, 'YYYY-MM-DD') || ' 00:00:00+00', to_char(first + interval '1 month', 'YYYY-MM-DD') || ' 00:00:00+00'); \
                 PERFORM audit_close_part(part); END $$"
            ),
        )
        .await;
    }
    // Batches of 5,000 rows, oldest first, spread over a year, like real traffic. Half of all rows belong to
    // one tenant. Of each tenant's rows, one in 50 is from an account and one in 10,000 is a denial.
    let parts = ROWS / 5_000;
    let statements = (0..parts).map(|part| {
        format!(
            "INSERT INTO audit (at, tenant_id, actor, action, object, result, request_id, detail) \
             SELECT now() - interval '360 days' * (1.0 - {part}.0 / {parts}), t.id, \
             CASE WHEN k % 9973 = 0 THEN 'account:900 rare' ELSE 'account:' || k % 50 || ' person' || k % 50 END, \
             'noun' || k / 50 % 5 || '.verb' || k / 7 % 4, 'object-' || k * 7919 % 1000, \
             CASE WHEN k % 10007 = 0 THEN 'denied' ELSE 'done' END, 'request', '{{\"revision\": 7}}' \
             FROM (SELECT n, n / 128 * 37 + n % 37 AS k FROM generate_series({from}::bigint, {to}) n) n \
             JOIN tenant t ON t.name = 'bench-' || CASE WHEN n % 2 = 0 THEN 7 ELSE n / 2 % 100 + 1 END",
            from = part * 5_000,
            to = (part + 1) * 5_000 - 1
        )
    });
    for statement in statements {
        run(root, &statement).await;
    }
    run(root, "ANALYZE audit").await;
}

pub(crate) async fn audit() -> Vec<Row> {
    let machine = Machine::start().await;
    let root = pool(&machine).await;
    fill(&root).await;
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM audit").fetch_one(&root).await.unwrap();
    assert!(rows >= i64::from(ROWS));
    // The sealer catches up. It has far more work here than in normal operation.
    let begun = Instant::now();
    loop {
        let sealed: Option<i64> = sqlx::query_scalar("SELECT sum(cardinality(ids))::bigint FROM audit_seal")
            .fetch_one(&root)
            .await
            .unwrap();
        if sealed.unwrap_or(0) >= i64::from(ROWS) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(1_200), "{sealed:?} rows sealed");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut times = Vec::new();
    for base in ["/api/v1/tenants/bench-7/audit", "/api/v1/tenants/bench-8/audit", "/api/v1/audit"] {
        for filter in [
            "",
            "&actor=account:6%20person6",
            "&actor=account:900%20rare",
            "&actor=account:999%20nobody",
            "&action=noun1.verb2",
            "&object=object-714",
            "&result=denied",
            "&result=done",
            "&actor=account:6%20person6&action=noun1.verb2",
            "&actor=account:6%20person6&object=object-6",
            "&actor=account:6%20person6&result=denied",
            "&since=2026-03-03T00:00:00Z&until=2026-03-10T00:00:00Z",
            "&actor=account:6%20person6&until=2026-03-10T00:00:00Z",
        ] {
            let mut path = format!("{base}?limit=50{filter}");
            for _ in 0..3 {
                // Warm up: each connection of the pool prepares the statement once.
                for _ in 0..20 {
                    machine.get(&path).await;
                }
                let mut several = Vec::new();
                for _ in 0..5 {
                    let begun = Instant::now();
                    machine.get(&path).await;
                    several.push(begun.elapsed().as_secs_f64() * 1_000.0);
                }
                times.push((median(&several), path.clone()));
                let page = machine.get(&path).await;
                let Some(next) = page["next"].as_str() else { break };
                path = format!("{base}?limit=50{filter}&cursor={next}");
            }
        }
    }
    times.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let (worst, at) = times.last().cloned().unwrap();
    eprintln!("worst: {at}");
    let times: Vec<f64> = times.into_iter().map(|(time, _)| time).collect();
    let data = machine.data.display().to_string();
    let begun = Instant::now();
    let done = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["audit", "verify", "--data", &data])
        .output()
        .unwrap();
    let seconds = begun.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{text}");
    vec![
        Row {
            what: "a page of the audit log at 5 million rows, one tenant's or all, any filter, ms (HTTP included)",
            ours: spread(&times, 1),
            peer: "limit 5".into(),
            result: format!("worst {:.2} of the limit", worst / 5.0),
            goal: "5",
        },
        Row {
            what: "`bulkhead audit verify` at 5 million rows, s",
            ours: format!("{seconds:.1}"),
            peer: "none".into(),
            result: format!("{:.0} thousand rows a second", f64::from(ROWS) / seconds / 1_000.0),
            goal: "none set",
        },
    ]
}
