//! The sweep over the registry, while requests change the same objects: removed and kept objects.

use std::time::{Duration, Instant};

use bulkhead::ids::Digest;
use bulkhead::registries::reconcile::once;
use serde_json::json;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::uploads::Before;

const USED: &str = "SELECT used FROM quota WHERE resource = 'registry_bytes'";

impl Before {
    async fn sweep(&self) {
        let platform = &self.app.one.platform;
        once(&platform.work, &platform.registry).await.unwrap();
    }

    /// Inserts a manifest with these additional columns.
    async fn manifest(&self, repository: &str, digest: &Digest, columns: &str, values: &str) {
        self.app
            .sql(&format!(
                "INSERT INTO manifest (tenant_id, repository, digest, media_type, size, total, pushed_by, {columns}) \
                 SELECT id, '{repository}', '{digest}', 'x', 8, 8, 'robot:1', {values} FROM tenant"
            ))
            .await;
    }

    async fn blob(&self, digest: &Digest, repositories: &[&str]) {
        self.app
            .sql(&format!("INSERT INTO blob (tenant_id, digest, size) SELECT id, '{digest}', 8 FROM tenant"))
            .await;
        for repository in repositories {
            let place = format!(
                "INSERT INTO blob_place (tenant_id, digest, repository) SELECT id, '{digest}', '{repository}' FROM tenant"
            );
            self.app.sql(&place).await;
        }
    }

    async fn count(&self, table: &str, digest: &Digest) -> i64 {
        let query = format!("SELECT count(*) FROM {table} WHERE digest = $1");
        sqlx::query_scalar(sqlx::AssertSqlSafe(query))
            .bind(digest.as_str())
            .fetch_one(&self.app.root)
            .await
            .unwrap()
    }

    /// Starts a sweep, and changes the database after the sweep has listed its work but before it handles
    /// this digest.
    async fn sweep_behind(&self, digest: &Digest, change: &str) {
        let mut held = self.app.root.begin().await.unwrap();
        sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))")
            .bind(digest.as_str())
            .execute(&mut *held)
            .await
            .unwrap();
        let changed = async {
            let waits =
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND $1 = ''";
            let begun = Instant::now();
            while self.app.number(waits, "").await == 0 {
                assert!(begun.elapsed() < Duration::from_secs(20), "the sweep does not ask for the digest");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            self.app.sql(change).await;
            held.commit().await.unwrap();
        };
        tokio::join!(self.sweep(), changed);
    }
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn what_came_again_since_it_was_listed_stays(options: PgPoolOptions, connect: PgConnectOptions) {
    let before = Before::start(options, connect).await;
    // Deleting when it was listed; removed and pushed again by its turn.
    let again = Digest::of(b"again");
    before.manifest("web", &again, "confirmed, doomed_at", "true, now()").await;
    before.sweep_behind(&again, "UPDATE manifest SET doomed_at = NULL").await;
    assert_eq!(before.count("manifest", &again).await, 1);
    assert_eq!(before.asked("DELETE", again.as_str()), 0, "the registry keeps it");
    // The same with a blob.
    let blob = Digest::of(b"blob");
    before.blob(&blob, &["web"]).await;
    before.app.sql("UPDATE blob SET doomed_at = now()").await;
    before.sweep_behind(&blob, "UPDATE blob SET doomed_at = NULL").await;
    assert_eq!((before.count("blob", &blob).await, before.asked("DELETE", blob.as_str())), (1, 0));
    // Unconfirmed when it was listed, and missing in the registry; confirmed, or pushed again, since.
    let old = "false, now() - interval '3 minutes'";
    for (text, change) in [
        (&b"confirmed"[..], "UPDATE manifest SET confirmed = true"),
        (b"young", "UPDATE manifest SET pushed_at = now()"),
    ] {
        let digest = Digest::of(text);
        before.seen.lacks.lock().unwrap().push(digest.to_string());
        before.manifest("web", &digest, "confirmed, pushed_at", old).await;
        before.sweep_behind(&digest, change).await;
        assert_eq!(before.count("manifest", &digest).await, 1, "{change}");
    }
    // An object that has not changed since the list is settled, and the audit log records it.
    let (there, lost) = (Digest::of(b"there"), Digest::of(b"lost"));
    before.seen.lacks.lock().unwrap().push(lost.to_string());
    before.manifest("web", &there, "confirmed, pushed_at", old).await;
    before.manifest("web", &lost, "confirmed, pushed_at", old).await;
    before.sweep().await;
    assert_eq!((before.count("manifest", &there).await, before.count("manifest", &lost).await), (1, 0));
    let told = "SELECT count(*) FROM audit WHERE action = 'image.push' AND detail->>'digest' = $1 \
                AND detail->>'pushed_by' = 'robot:1'";
    assert_eq!(before.app.number(told, there.as_str()).await, 1);
    before.stop().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn one_that_does_not_go_holds_up_nothing_else(options: PgPoolOptions, connect: PgConnectOptions) {
    let before = Before::start(options, connect).await;
    let (bad, good) = (Digest::of(b"bad"), Digest::of(b"good"));
    before.manifest("bad", &bad, "confirmed, doomed_at", "true, now() - interval '1 hour'").await;
    before.manifest("good", &good, "confirmed, doomed_at", "true, now()").await;
    let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
    before.blob(&first, &["bad"]).await;
    before.blob(&second, &["good", "better"]).await;
    before.app.sql("UPDATE blob SET at = now() - interval '3 hours'").await;
    before.sweep().await;
    assert_eq!((before.count("manifest", &bad).await, before.count("manifest", &good).await), (1, 0));
    assert_eq!((before.count("blob", &first).await, before.count("blob", &second).await), (1, 0));
    // Blobs that arrived while the tenant was offboarded are swept afterwards, including those without a
    // repository.
    let late = Digest::of(b"late");
    before.blob(&late, &[]).await;
    before.app.sql("UPDATE blob SET at = now() - interval '3 hours'").await;
    before.app.sql("UPDATE tenant SET state = 'offboarded'").await;
    before.sweep().await;
    assert_eq!(before.count("blob", &late).await, 0);
    // A commit that was not settled when the tenant was suspended is undone.
    let open = Digest::of(b"open");
    before.app.sql("UPDATE tenant SET state = 'suspended'").await;
    let upload = format!(
        "INSERT INTO upload (tenant_id, id, repository, digest, changed_at) \
         SELECT id, 'up', 'web', '{open}', now() - interval '11 minutes' FROM tenant"
    );
    before.app.sql(&upload).await;
    before.sweep().await;
    assert_eq!(before.count("blob", &open).await, 0);
    assert_eq!(before.app.number("SELECT count(*) FROM upload", "").await, 0);
    assert_eq!(before.asked("DELETE", open.as_str()), 1);
    before.stop().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn each_place_of_a_blob_counts_and_is_given_back(options: PgPoolOptions, connect: PgConnectOptions) {
    let before = Before::start(options, connect).await;
    let blob = Digest::of(b"a layer");
    before.blob(&blob, &["web"]).await;
    before.app.sql("UPDATE quota SET used = 32768 WHERE resource = 'registry_bytes'").await;
    let used = || before.app.number(USED, "");
    let path = format!("/v2/acme/other/blobs/uploads/?mount={blob}&from=acme%2Fweb");
    for _ in 0..2 {
        assert_eq!(before.send("POST", &path, b"").await.0, 201);
        assert_eq!(used().await, 2 * 32_768, "once for each repository");
    }
    assert_eq!(before.app.number("SELECT count(*) FROM upload", "").await, 0, "each mount is settled");
    // A deleting blob is not mounted any more: a plain upload begins.
    before.app.sql("UPDATE blob SET doomed_at = now()").await;
    assert_eq!(before.send("POST", &path.replace("other", "web"), b"").await.0, 202);
    before.app.sql("DELETE FROM upload").await;
    before.sweep().await;
    assert_eq!((before.count("blob_place", &blob).await, used().await), (0, 0));
    assert_eq!(before.asked("DELETE", blob.as_str()), 2);
    before.stop().await;
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn what_could_not_be_confirmed_is_not_stored(options: PgPoolOptions, connect: PgConnectOptions) {
    let before = Before::start(options, connect).await;
    let child = Digest::of(b"12345678");
    before.manifest("web", &child, "confirmed", "true").await;
    let kind = "application/vnd.oci.image.index.v1+json";
    let push = async |tag: &str| {
        let text = json!({
            "schemaVersion": 2, "mediaType": kind,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": child, "size": 8,
                "platform": {"os": "linux", "architecture": "amd64"},
            }],
        });
        let url = format!("{}/v2/acme/web/manifests/{tag}", before.app.one.address);
        let request = before.http.put(url).bearer_auth(&before.token).header("content-type", kind);
        let answer = request.body(text.to_string()).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap_or_default())
    };
    // The changes of the day are used up: refused before the registry is called.
    let day = "UPDATE quota SET since = (now() AT TIME ZONE 'UTC')::date, used = coalesce(limit_, 20000) \
               WHERE resource = 'changes_per_day'";
    before.app.sql(day).await;
    let (status, text) = push("1").await;
    assert_eq!(status, 403, "{text}");
    assert_eq!(before.asked("PUT", "/manifests/"), 0);
    // So are the tags; an existing tag can still move.
    before.app.sql("UPDATE quota SET used = 0 WHERE resource = 'changes_per_day'").await;
    assert_eq!(push("1").await.0, 201);
    before.app.sql("UPDATE quota_default SET limit_ = 1 WHERE resource = 'tags'").await;
    before.app.sql("UPDATE quota SET limit_ = NULL WHERE resource = 'tags'").await;
    let (status, text) = push("2").await;
    assert_eq!(status, 403, "{text}");
    assert_eq!(push("1").await.0, 201);
    assert_eq!(before.asked("PUT", "/manifests/"), 2);
    assert_eq!(before.app.number("SELECT count(*) FROM manifest WHERE NOT confirmed", "").await, 0);
    before.stop().await;
}
