//! Pushes by an attacker: the registry stores exactly the recorded blobs, whatever a client claims and
//! whenever it hangs up. Pushes of one tenant delay no other tenant.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead::ids::Digest;
use serde_json::{Value, json};

use crate::registry::{Client, MANIFEST};
use crate::support::{HTTPD, Machine, run};

const OCTETS: &str = "application/octet-stream";
const START: &str = "/v2/acme/web/blobs/uploads/";

fn client(machine: &Machine) -> Client<'_> {
    Client { machine, http: bulkhead::outgoing::client().build().unwrap() }
}

fn disk(machine: &Machine) -> PathBuf {
    machine.data.join("registry/data/docker/registry/v2")
}

/// Returns the digests on the registry's disk.
fn stored(machine: &Machine) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for prefix in std::fs::read_dir(disk(machine).join("blobs/sha256")).into_iter().flatten().flatten() {
        for blob in std::fs::read_dir(prefix.path()).into_iter().flatten().flatten() {
            found.insert(format!("sha256:{}", blob.file_name().to_string_lossy()));
        }
    }
    found
}

/// Returns the digests in the database.
fn named(machine: &Machine) -> BTreeSet<String> {
    let text = machine.sql("SELECT digest FROM blob UNION SELECT digest FROM manifest");
    text.lines().map(str::to_owned).collect()
}

fn noise(bytes: usize, seed: u32) -> Vec<u8> {
    (0..bytes)
        .map(|n| (u32::try_from(n).unwrap() ^ seed).wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

fn with(location: &str, query: &str) -> String {
    format!("{location}{}{query}", if location.contains('?') { '&' } else { '?' })
}

async fn used(machine: &Machine) -> i64 {
    machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64().unwrap()
}

/// Sends a request byte by byte and returns the answer received within the time.
fn raw(machine: &Machine, text: &[u8], patience: Duration) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", machine.port)).unwrap();
    let _ = stream.write_all(text);
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut answer = vec![0; 2_048];
    let read = stream.read(&mut answer).unwrap_or(0);
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_is_what_was_asked_for() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let limit = json!({"quota": {"registry_bytes": 16 << 20}});
    assert_eq!(machine.send("PATCH", "/api/v1/tenants/acme", limit).await.0, 202);
    let client = client(&machine);
    let token = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    let small = b"a small blob that is there".to_vec();
    assert_eq!(client.upload(&token, "acme/web", &small).await.0, 201);
    assert_eq!(used(&machine).await, 32_768, "a blob counts at least 32 KiB");
    let known = Digest::of(&small);
    let ask = async |method: &str, path: &str, kind: &str, body: Vec<u8>| {
        client.call(&token, method, path, kind, body).await
    };
    // The query names a small existing blob, the form body another one; in every encoding of a form.
    let boundary = "multipart/form-data; boundary=x";
    let mut refused = 0;
    for (n, kind) in
        ["application/x-www-form-urlencoded", boundary, "application/x-www-form-urlencoded; charset=utf-8"]
            .iter()
            .cycle()
            .take(6)
            .enumerate()
    {
        let big = noise(9 << 20, u32::try_from(n).unwrap());
        let (status, location, _) = ask("POST", START, OCTETS, vec![]).await;
        if status != 202 {
            refused += 1;
            continue;
        }
        let (status, next, text) = ask("PATCH", &location, OCTETS, big.clone()).await;
        if status == 403 {
            assert!(text.contains("quota"), "{text}");
            refused += 1;
        } else {
            assert_eq!(status, 202, "{text}");
            let other = Digest::of(&big);
            let form = if *kind == boundary {
                format!("--x\r\nContent-Disposition: form-data; name=\"digest\"\r\n\r\n{other}\r\n--x--\r\n")
            } else {
                format!("digest={other}")
            };
            let path = with(&next, &format!("digest={known}"));
            let (status, _, text) = ask("PUT", &path, kind, form.into_bytes()).await;
            assert_eq!(status, 400, "{kind}: {text}");
            assert_eq!(
                client.call(&token, "GET", &format!("/v2/acme/web/blobs/{other}"), "", vec![]).await.0,
                404
            );
        }
    }
    assert!(refused >= 3, "uploaded bytes count until the upload is cancelled: {refused}");
    assert_eq!(stored(&machine), named(&machine), "60 MiB past the quota");
    machine.sql("DELETE FROM upload");
    // Parameters that are duplicated, misplaced, in another case, or unknown.
    let bytes = noise(1_000, 77);
    let (other, evil) = (Digest::of(&bytes), Digest::of(b"evil"));
    for query in [
        format!("digest={known}&digest={other}"),
        format!("digest={other}&%64igest={known}"),
        format!("digest={other}&Digest={known}"),
        format!("digest={other}&mount={known}&from=acme/web"),
        format!("digest={other}%26digest={known}"),
        format!("digest=sha256%253A{}", &other.as_str()[7..]),
        format!("digest=sha512:{}", "0".repeat(128)),
        format!("digest={evil}"),
        "digest=".into(),
    ] {
        let (status, location, _) = ask("POST", START, OCTETS, vec![]).await;
        assert_eq!(status, 202);
        let (status, _, text) = ask("PUT", &with(&location, &query), OCTETS, bytes.clone()).await;
        assert_eq!(status, 400, "{query}: {text}");
    }
    let (_, location, _) = ask("POST", START, OCTETS, vec![]).await;
    let (status, _, text) =
        ask("PATCH", &with(&location, &format!("digest={other}")), OCTETS, bytes.clone()).await;
    assert_eq!(status, 400, "{text}");
    // A forged state, another repository, an upload that was never started.
    let (_, second, _) = ask("POST", START, OCTETS, vec![]).await;
    let path = with(&with(&location, "_state=abc"), &format!("digest={other}"));
    assert_eq!(ask("PUT", &path, OCTETS, bytes.clone()).await.0, 400);
    let moved = second.replace("acme/web", "acme/other");
    let both = client.token(&acme, &["repository:acme/other:pull,push"]).await.unwrap();
    let path = with(&moved, &format!("digest={other}"));
    assert_eq!(client.call(&both, "PUT", &path, OCTETS, bytes.clone()).await.0, 404);
    // A content length beside a transfer encoding: either the request is refused, or the chunks count.
    let path = with(&second, &format!("digest={other}"));
    let head = format!(
        "PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 5\r\n\
         Transfer-Encoding: chunked\r\n\r\n3e8\r\n"
    );
    let mut text = head.into_bytes();
    text.extend_from_slice(&bytes);
    text.extend_from_slice(b"\r\n0\r\n\r\n");
    let answer = raw(&machine, &text, Duration::from_secs(10));
    assert!(answer.starts_with("HTTP/1.1 201") || answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(stored(&machine), named(&machine));
    // An ordinary push still works, with the digest encoded or not.
    let encoded = format!("digest={}", Digest::of(&bytes).as_str().replace(':', "%3A"));
    let (_, location, _) = ask("POST", START, OCTETS, vec![]).await;
    assert_eq!(ask("PUT", &with(&location, &encoded), "text/plain", bytes).await.0, 201);
    machine.push(&acme, "acme/web:1", &HTTPD);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_leaves_nothing_without_a_record() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let client = client(&machine);
    let token = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    for n in 0..40_u32 {
        let bytes = noise(50_000 + 7_000 * n as usize, n);
        let (status, location, text) = client.call(&token, "POST", START, OCTETS, vec![]).await;
        assert_eq!(status, 202, "{text}");
        let path = with(&location, &format!("digest={}", Digest::of(&bytes)));
        let head = format!(
            "PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: {OCTETS}\r\n"
        );
        let mut text = head.into_bytes();
        if n % 2 == 0 {
            text.extend_from_slice(format!("Content-Length: {}\r\n\r\n", bytes.len()).as_bytes());
            text.extend_from_slice(&bytes);
        } else {
            text.extend_from_slice(
                format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n", bytes.len()).as_bytes(),
            );
            text.extend_from_slice(&bytes);
            text.extend_from_slice(b"\r\n0\r\n\r\n");
        }
        let mut stream = TcpStream::connect(("127.0.0.1", machine.port)).unwrap();
        stream.write_all(&text).unwrap();
        // At once, halfway, a little later: the client hangs up at each step of the commit.
        tokio::time::sleep(Duration::from_millis(u64::from(n) * 4)).await;
        if n % 3 == 0 {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        drop(stream);
    }
    let begun = Instant::now();
    loop {
        let (disk, record) = (stored(&machine), named(&machine));
        let open: i64 = machine.sql("SELECT count(*) FROM upload WHERE digest IS NOT NULL").parse().unwrap();
        if disk == record && open == 0 {
            println!("{} of 40 were stored, each recorded", disk.len());
            assert!(disk.len() > 5, "the test hangs up too early to say anything");
            break;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "on the disk and not recorded: {:?}; open: {open}",
            disk.difference(&record).collect::<Vec<_>>()
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // `serve` dies between the registry's commit and the record: the bytes are recorded later.
    machine.arm("serve", "registries::blob_commit").await;
    let bytes = noise(90_000, 4_711);
    let (_, location, _) = client.call(&token, "POST", START, OCTETS, vec![]).await;
    let path = with(&location, &format!("digest={}", Digest::of(&bytes)));
    let url = format!("{}{path}", machine.address());
    let sent = client
        .http
        .put(url)
        .bearer_auth(&token)
        .header("content-type", OCTETS)
        .body(bytes.clone())
        .send()
        .await;
    assert!(sent.is_err(), "{sent:?}");
    let digest = Digest::of(&bytes).to_string();
    assert!(stored(&machine).contains(&digest) && !named(&machine).contains(&digest));
    machine.get("/api/v1/tenants/acme").await;
    machine.sql("UPDATE upload SET changed_at = now() - interval '11 minutes' WHERE digest IS NOT NULL");
    let begun = Instant::now();
    while !named(&machine).contains(&digest) {
        assert!(begun.elapsed() < Duration::from_secs(90), "{}", machine.tail("serve"));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(machine.sql("SELECT count(*) FROM upload WHERE digest IS NOT NULL"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_without_a_record_are_found_told_and_removed() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    machine.push(&acme, "acme/web:1", &HTTPD);
    let before = stored(&machine);
    let plant = |bytes: &[u8], old: bool| {
        let digest = Digest::of(bytes);
        let hex = &digest.as_str()[7..];
        let folder = disk(&machine).join("blobs/sha256").join(&hex[..2]).join(hex);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("data"), bytes).unwrap();
        let top = machine.data.join("registry/data").display().to_string();
        assert!(run("chown", &["-R", "--reference", &top, &top]).0);
        if old {
            assert!(run("touch", &["-d", "-2 hours", &folder.join("data").display().to_string()]).0);
        }
        digest.to_string()
    };
    let (stray, fresh) = (plant(&noise(100_000, 5), true), plant(b"just now", false));
    let wait = async |gone: &str| {
        let begun = Instant::now();
        while stored(&machine).contains(gone) {
            assert!(begun.elapsed() < Duration::from_secs(40), "{}", machine.tail("serve"));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    wait(&stray).await;
    wait(&fresh).await;
    assert_eq!(stored(&machine), before, "recorded blobs stay");
    let told =
        machine.sql("SELECT object, detail->>'bytes' FROM audit WHERE action = 'registry.stray' ORDER BY 2");
    assert!(told.contains(&format!("{stray}|100000")) && told.contains(&fresh), "{told}");
    assert!(machine.tail("serve").contains("ALARM"), "{}", machine.tail("serve"));
    // Two tenants have the same bytes: they are deleted with the last tenant's copy, and count until then.
    let evil = machine.tenant("evil").await;
    machine.push(&evil, "evil/web:1", &HTTPD);
    let manifest = machine.sql("SELECT digest FROM manifest WHERE repository = 'web' LIMIT 1");
    let delete = async |tenant: &str| {
        let tag = format!("/api/v1/tenants/{tenant}/repositories/web/tags/1");
        assert_eq!(machine.ask(&machine.admin, "DELETE", &tag, None).await.0, 204);
    };
    let revision =
        disk(&machine).join("repositories/acme/web/_manifests/revisions/sha256").join(&manifest[7..]);
    assert!(revision.exists());
    delete("acme").await;
    assert!(stored(&machine).contains(&manifest), "another tenant has it");
    assert!(!revision.exists(), "nothing is left of it in the repository");
    machine.sql("UPDATE blob SET at = now() - interval '3 hours'");
    delete("evil").await;
    assert!(!stored(&machine).contains(&manifest), "no tenant has it any more");
    let begun = Instant::now();
    while used(&machine).await > 0 || !stored(&machine).is_empty() {
        assert!(
            begun.elapsed() < Duration::from_secs(150),
            "{} bytes, {:?}",
            used(&machine).await,
            stored(&machine)
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let layers = disk(&machine).join("repositories/acme/web/_layers/sha256");
    assert_eq!(std::fs::read_dir(layers).into_iter().flatten().count(), 0, "nor of its layers");
    machine.push(&acme, "acme/web:1", &HTTPD);
    // A user of the machine can access neither the registry nor the collector.
    for socket in ["registry.sock", "collector.sock"] {
        let path = machine.data.join("run/registry").join(socket).display().to_string();
        assert!(std::path::Path::new(&path).exists());
        let url = "http://registry/v2/";
        let all = [
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
            "curl",
            "-sS",
            "--unix-socket",
            &path,
            url,
        ];
        let (good, text) = run("setpriv", &all);
        assert!(!good && !text.contains("UNAUTHORIZED"), "{socket}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn things_are_counted_and_not_only_bytes() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let client = client(&machine);
    let token = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    let quota = json!({"quota": {"registry_bytes": 10 << 20, "open_uploads": 20, "repositories": 3}});
    assert_eq!(machine.send("PATCH", "/api/v1/tenants/acme", quota).await.0, 202);
    // Empty uploads have a limit, and each uses quota. A cancelled upload frees its place at once.
    let mut open = Vec::new();
    let text = loop {
        let (status, location, text) = client.call(&token, "POST", START, OCTETS, vec![]).await;
        if status != 202 {
            assert_eq!(status, 403, "{text}");
            break text;
        }
        open.push(location);
        assert!(open.len() <= 20, "unlimited uploads");
    };
    assert_eq!(open.len(), 20, "{text}");
    let begun = stored_uploads(&machine);
    let last = open.pop().unwrap();
    let (status, next, _) = client.call(&token, "PATCH", &last, OCTETS, noise(2 << 20, 1)).await;
    assert_eq!(status, 202);
    assert_eq!(client.call(&token, "DELETE", &next, "", vec![]).await.0, 204);
    assert_eq!(client.call(&token, "PATCH", &next, OCTETS, vec![1]).await.0, 404);
    assert_eq!(stored_uploads(&machine), begun - 1, "its files are gone");
    // The registry gives up an upload that was cut; it can still be cancelled.
    let (_, location, _) = client.call(&token, "POST", START, OCTETS, vec![]).await;
    let head = format!(
        "PATCH {location} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: {OCTETS}\r\n\
         Content-Length: 5000000\r\n\r\n"
    );
    let mut stream = TcpStream::connect(("127.0.0.1", machine.port)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&noise(1_000_000, 3)).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    drop(stream);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (status, _, text) = client.call(&token, "DELETE", &location, "", vec![]).await;
    assert_eq!(status, 204, "{text}");
    assert_eq!(stored_uploads(&machine), begun - 1, "its files are gone too");
    for location in open {
        assert_eq!(client.call(&token, "DELETE", &location, "", vec![]).await.0, 204);
    }
    assert_eq!(machine.sql("SELECT count(*) FROM upload"), "0");
    // 320 blobs of four bytes fill the 10 MiB of quota.
    let mut pushed = 0;
    for n in 0..400_u32 {
        let (status, location, _) = client.call(&token, "POST", START, OCTETS, vec![]).await;
        if status == 403 {
            break;
        }
        let bytes = n.to_le_bytes();
        let path = with(&location, &format!("digest={}", Digest::of(&bytes)));
        let (status, _, text) = client.call(&token, "PUT", &path, OCTETS, bytes.to_vec()).await;
        if status == 403 {
            break;
        }
        assert_eq!(status, 201, "{text}");
        pushed += 1;
    }
    assert!((318..=320).contains(&pushed), "{pushed} fit");
    assert_eq!(used(&machine).await, pushed * 32_768);
    // Repositories have a limit, even without a manifest.
    let more = json!({"quota": {"registry_bytes": 100 << 20}});
    assert_eq!(machine.send("PATCH", "/api/v1/tenants/acme", more).await.0, 202);
    for (name, expected) in [("b", 202), ("c/d", 202), ("e", 403), ("b", 202)] {
        let token = client.token(&acme, &[&format!("repository:acme/{name}:pull,push")]).await.unwrap();
        let path = format!("/v2/acme/{name}/blobs/uploads/");
        assert_eq!(client.call(&token, "POST", &path, OCTETS, vec![]).await.0, expected, "{name}");
    }
}

/// Returns the number of uploads on the registry's disk.
fn stored_uploads(machine: &Machine) -> usize {
    let folder = disk(machine).join("repositories/acme/web/_uploads");
    std::fs::read_dir(folder).into_iter().flatten().flatten().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_that_stall_or_cost_hold_up_nobody_else() {
    let machine = Machine::start().await;
    let (evil, acme) = (machine.tenant("evil").await, machine.tenant("acme").await);
    let client = client(&machine);
    let token = client.token(&evil, &["repository:evil/web:pull,push"]).await.unwrap();
    let before = machine.memory("VmRSS:");
    let head = |n: usize, length: usize| {
        format!(
            "PUT /v2/evil/web/manifests/{n} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: {MANIFEST}\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let mut stalled = Vec::new();
    for n in 0..120 {
        let mut stream = TcpStream::connect(("127.0.0.1", machine.port)).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        stream.write_all(head(n, 1 << 20).as_bytes()).unwrap();
        let _ = stream.write_all(&vec![b' '; (1 << 20) - 1]);
        stalled.push(stream);
    }
    machine.push(&acme, "acme/web:1", &HTTPD);
    let grown = machine.memory("VmRSS:").saturating_sub(before);
    println!("serve has grown by {grown} kB under 120 stalled manifests");
    assert!(grown < 100_000, "{grown} kB");
    // No request waits for ever: 429 without a free place, 408 without data.
    let mut answers = BTreeSet::new();
    for stream in &mut stalled {
        stream.set_read_timeout(Some(Duration::from_secs(75))).unwrap();
        let mut text = [0; 12];
        if stream.read_exact(&mut text).is_ok() {
            answers.insert(String::from_utf8_lossy(&text).into_owned());
        }
    }
    assert!(answers.contains("HTTP/1.1 408") && answers.contains("HTTP/1.1 429"), "{answers:?}");
    drop(stalled);
    // Endless lists are refused during parsing; a list of 5 MB is not read at all.
    let lists = |size: usize| format!("[{}[]]", "[],".repeat(size / 3));
    let nested = |size: usize| {
        let mut text: Value = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": {}});
        text["x"] = json!("LISTS");
        text.to_string().replace("\"LISTS\"", &lists(size))
    };
    for n in 0..12 {
        let text = if n % 2 == 0 { lists(900_000) } else { nested(900_000) };
        let path = format!("/v2/evil/web/manifests/{n}");
        let (status, _, answer) = client.call(&token, "PUT", &path, MANIFEST, text.into_bytes()).await;
        assert_eq!(status, 400, "{answer}");
        assert_eq!(machine.try_ask("GET", "/healthz", &[], "").await.unwrap().0, 200);
    }
    let mut text = head(1, 5_000_000).into_bytes();
    text.extend_from_slice(lists(1_100_000).as_bytes());
    let answer = raw(&machine, &text, Duration::from_secs(20));
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

/// Sends the head and some bytes of a request that keeps its upload's file open.
fn held(machine: &Machine, token: &str, method: &str, path: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", machine.port)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: {OCTETS}\r\n\
         Content-Length: 1048576\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), bytes].concat()).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_is_never_written_to_again() {
    let machine = Machine::start().await;
    let (acme, victim) = (machine.tenant("acme").await, machine.tenant("victim").await);
    let client = client(&machine);
    let token = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    let good = b"8 good b".to_vec();
    let digest = Digest::of(&good);
    let mut taken = 0;
    for (n, first) in [&b"E"[..], b"", &noise(5_000, 9)].into_iter().enumerate() {
        let (status, location, text) = client.call(&token, "POST", START, OCTETS, vec![]).await;
        assert_eq!(status, 202, "{text}");
        let mut open = held(&machine, &token, "PATCH", &location, first);
        tokio::time::sleep(Duration::from_millis(700)).await;
        let path = with(&location, &format!("digest={digest}"));
        assert_eq!(client.call(&token, "PUT", &path, OCTETS, good.clone()).await.0, 409, "round {n}");
        assert_eq!(client.call(&token, "DELETE", &location, OCTETS, vec![]).await.0, 409, "round {n}");
        // The rest of the first request arrives, or the connection is cut: then the same state is committed
        // as soon as possible.
        if n == 0 {
            let _ = open.write_all(&noise(1_048_576 - first.len(), 3));
            let _ = open.read(&mut [0; 512]);
        }
        drop(open);
        let begun = Instant::now();
        loop {
            let (status, _, text) = client.call(&token, "PUT", &path, OCTETS, good.clone()).await;
            if status != 409 {
                taken += usize::from(status == 201);
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{text}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        for name in stored(&machine) {
            let hex = &name[7..];
            let file = disk(&machine).join("blobs/sha256").join(&hex[..2]).join(hex).join("data");
            assert_eq!(Digest::of(&std::fs::read(file).unwrap()).to_string(), name, "round {n}");
        }
    }
    println!("{taken} of 3 were committed after the cut");
    let own = client.token(&victim, &["repository:victim/w:pull,push"]).await.unwrap();
    assert_eq!(client.upload(&own, "victim/w", &good).await.0, 201);
    let path = format!("/v2/victim/w/blobs/{digest}");
    let (status, _, text) = client.call(&own, "GET", &path, "", vec![]).await;
    assert_eq!((status, text.as_bytes()), (200, &good[..]));
    // Bytes that change anyway are reported.
    let hex = &digest.as_str()[7..];
    let file = disk(&machine).join("blobs/sha256").join(&hex[..2]).join(hex).join("data");
    std::fs::write(file, b"other bytes, and more").unwrap();
    let begun = Instant::now();
    while !machine.tail("serve").contains("another size than was committed") {
        assert!(begun.elapsed() < Duration::from_secs(40), "{}", machine.tail("serve"));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
