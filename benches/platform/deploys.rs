//! Durable deploys per second over the API, compared with pgbench running the same statements on the same
//! Postgres with as many clients. Bulkhead's figure includes HTTP, reading manifest and config from the
//! registry, and the reconciler that carries out the deploys meanwhile.

use std::time::{Duration, Instant};

use crate::support::{Machine, run};
use crate::{Row, median, spread};

const CLIENTS: usize = 8;
const SECONDS: u64 = 4;

/// The statements of one deploy, in order (`src/access/store`, `src/apps/actions.rs`).
const STATEMENTS: &str = r"\set n :client_id
SELECT token_id, token_role, tenant_state FROM access_by_token(decode(repeat('00', 32), 'hex'), 'bench-' || :n::text);
SELECT id AS tenant, state FROM tenant WHERE name = 'bench-' || :n::text
\gset
SELECT n FROM unnest('{}'::text[]) n WHERE NOT EXISTS (SELECT 1 FROM app WHERE tenant_id = :tenant AND name = n AND removed_at IS NULL AND deleted_at IS NULL);
SELECT g.digest AS digest FROM tag g JOIN tenant t ON t.id = g.tenant_id WHERE t.name = 'bench-' || :n::text AND g.repository = 'web' AND g.name = '1'
\gset
BEGIN;
SELECT q.resource, coalesce(q.limit_, d.limit_), q.used, t.state FROM quota q JOIN quota_default d USING (resource) JOIN tenant t ON t.id = q.tenant_id WHERE q.tenant_id = :tenant AND q.resource IN ('registry_bytes', 'cpu', 'memory', 'apps', 'instances') ORDER BY q.resource <> 'registry_bytes', q.resource FOR SHARE OF t FOR UPDATE OF q;
SELECT id AS app, generation, revision AS old FROM app WHERE tenant_id = :tenant AND name = 'web' AND removed_at IS NULL
\gset
SELECT NOT EXISTS (SELECT 1 FROM unnest(ARRAY[:digest::text]) d WHERE NOT EXISTS (SELECT 1 FROM manifest m WHERE m.tenant_id = :tenant AND m.repository = 'web' AND m.digest = d AND m.confirmed AND m.doomed_at IS NULL));
SELECT spec, digest FROM release WHERE tenant_id = :tenant AND app_id = :app AND revision = :old;
UPDATE app SET generation = generation + 1, revision = last_revision + 1, last_revision = last_revision + 1, changed_at = now(), problem = NULL WHERE tenant_id = :tenant AND id = :app RETURNING revision AS next
\gset
SELECT number FROM network WHERE tenant_id = :tenant;
SELECT count(*) FROM app_address WHERE tenant_id = :tenant AND app_id = :app;
WITH kept AS (SELECT coalesce(q.limit_, d.limit_) AS n FROM quota_default d LEFT JOIN quota q ON q.resource = d.resource AND q.tenant_id = :tenant WHERE d.resource = 'releases_kept'), old AS (SELECT r.revision FROM release r JOIN app a ON a.tenant_id = r.tenant_id AND a.id = r.app_id WHERE r.tenant_id = :tenant AND r.app_id = :app AND r.revision <= :next - (SELECT n FROM kept) AND r.revision <> a.revision AND r.revision <> coalesce((a.observed->>'revision')::bigint, 0) AND NOT coalesce(jsonb_path_exists(a.observed, '$.instances[*].revision ? (@ == $r)', jsonb_build_object('r', r.revision)), false) ORDER BY r.revision LIMIT 20), gone AS (DELETE FROM release r USING old WHERE r.tenant_id = :tenant AND r.app_id = :app AND r.revision = old.revision) INSERT INTO release (tenant_id, app_id, revision, spec, repository, tag, index_digest, digest, inside_uid, inside_gid, warnings, actor) SELECT tenant_id, app_id, :next::bigint, spec, repository, tag, index_digest, digest, inside_uid, inside_gid, warnings, actor FROM release WHERE tenant_id = :tenant AND app_id = :app AND revision = :old;
WITH today AS (SELECT (now() AT TIME ZONE 'UTC')::date AS day), taken AS (UPDATE quota q SET used = CASE WHEN q.since = t.day THEN q.used + 1 ELSE 1 END, since = t.day FROM quota_default d, today t WHERE q.tenant_id = :tenant AND q.resource = 'changes_per_day' AND d.resource = q.resource AND (q.since IS DISTINCT FROM t.day OR q.used < coalesce(q.limit_, d.limit_)) RETURNING 1), put AS (INSERT INTO audit (tenant_id, actor, action, object, request_id, detail) SELECT :tenant, 'pgbench', 'app.release', 'web', 'bench', '{}') SELECT EXISTS (SELECT FROM taken);
INSERT INTO work (kind, object_id, tenant_id) VALUES ('bench', :app, :tenant) ON CONFLICT (kind, object_id) DO UPDATE SET wake = work.wake + 1, due_at = least(work.due_at, now()), parked_at = NULL, attempt = 0;
COMMIT;
";

async fn ours(machine: &Machine, round: usize) -> f64 {
    let begun = Instant::now();
    let clients = (0..CLIENTS).map(|client| async move {
        let path = format!("/api/v1/tenants/bench-{client}/apps/web");
        let mut done = 0_u32;
        while begun.elapsed() < Duration::from_secs(SECONDS) {
            let spec = format!(
                "spec: v1\nname: web\nimage: web:1\ncpu: 50m\nmemory: 64Mi\ninstances: 0\nenv: {{ ROUND: \"{round}-{done}\" }}\n"
            );
            let body = Some(("application/yaml", spec));
            let (status, answer) = machine.ask(&machine.admin, "PUT", &path, body).await;
            assert_eq!(status, 202, "{answer}");
            done += 1;
        }
        done
    });
    let done: u32 = futures_util::future::join_all(clients).await.iter().sum();
    f64::from(done) / begun.elapsed().as_secs_f64()
}

fn peer(machine: &Machine, script: &str) -> f64 {
    let socket = machine.data.join("run/postgres").display().to_string();
    let (good, text) = run(
        "/usr/lib/postgresql/15/bin/pgbench",
        &[
            "-h",
            &socket,
            "-U",
            "postgres",
            "-n",
            "-M",
            "prepared",
            "-c",
            &CLIENTS.to_string(),
            "-j",
            "2",
            "-T",
            &SECONDS.to_string(),
            "-f",
            script,
            "bulkhead",
        ],
    );
    let line =
        text.lines().find_map(|line| line.strip_prefix("tps = ")).unwrap_or_else(|| panic!("{good} {text}"));
    line.split(' ').next().unwrap().parse().unwrap()
}

pub(crate) async fn measure() -> Row {
    let machine = Machine::start().await;
    for client in 0..CLIENTS {
        let name = format!("bench-{client}");
        let robot = machine.tenant(&name).await;
        machine.push(&robot, &format!("{name}/web:1"), &["/bin/busybox", "sleep", "1000"]);
        machine.deploy(&name, "web", "image: web:1\ninstances: 0\n").await;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("deploy.sql");
    std::fs::write(&script, STATEMENTS).unwrap();
    let script = script.display().to_string();
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..5 {
        mine.push(ours(&machine, round).await);
        // Let the reconciler finish before the peer is measured.
        tokio::time::sleep(Duration::from_secs(3)).await;
        theirs.push(peer(&machine, &script));
    }
    Row {
        what: "durable deploys per second, 8 clients",
        ours: spread(&mine, 0),
        peer: format!("pgbench, the same statements {}", spread(&theirs, 0)),
        result: format!("{:.2} of the peer", median(&mine) / median(&theirs)),
        goal: "0.6",
    }
}
