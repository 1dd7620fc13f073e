//! Images crafted by an attacker: layers built byte by byte. None stops the engine, and none affects an app
//! of another tenant.

use std::fs;
use std::path::Path;

use bulkhead::ids::Digest;
use serde_json::{Value, json};

use crate::support::{HTTPD, Machine};

/// One entry of a layer: path, type, link, bytes.
pub(crate) type Entry<'a> = (&'a str, u8, &'a str, &'a [u8]);

pub(crate) const DIRECTORY: u8 = b'5';
const FIFO: u8 = b'6';
pub(crate) const FILE: u8 = b'0';
const HARD_LINK: u8 = b'1';
pub(crate) const SYMBOLIC_LINK: u8 = b'2';
const DEVICE: u8 = b'3';
const PAX: u8 = b'x';

/// Builds a layer of exactly these entries.
pub(crate) fn layer(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, kind, link, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(tar::EntryType::new(*kind));
        header.set_mode(0o755);
        header.set_size(bytes.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        if *kind == DEVICE {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// Builds the records of a PAX header.
pub(crate) fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len() + 1;
        while length.to_string().len() + rest.len() != length {
            length = length.to_string().len() + rest.len();
        }
        out.extend_from_slice(format!("{length}{rest}").as_bytes());
    }
    out
}

fn base() -> Vec<u8> {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed by deploy/packages");
    layer(&[
        ("bin/", DIRECTORY, "", b""),
        ("bin/busybox", FILE, "", &busybox),
        ("www/index.html", FILE, "", b"hello\n"),
    ])
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut packed, bytes).unwrap();
    packed.finish().unwrap()
}

/// Writes an image with these layers and this config, in the OCI layout.
fn write(dir: &Path, layers: &[(Vec<u8>, Vec<u8>)], config: &Value) {
    let blobs = dir.join("image/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], kind: &str| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(&digest.as_str()[7..]), bytes).unwrap();
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": bytes.len()})
    };
    let parts: Vec<Value> = layers.iter().map(|(_, packed)| put(packed, "layer.v1.tar+gzip")).collect();
    let diffs: Vec<Digest> = layers.iter().map(|(plain, _)| Digest::of(plain)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": diffs},
    });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(config.to_string().as_bytes(), "config.v1+json"), "layers": parts,
    });
    let index =
        json!({"schemaVersion": 2, "manifests": [put(manifest.to_string().as_bytes(), "manifest.v1+json")]});
    fs::write(dir.join("image/index.json"), index.to_string()).unwrap();
    fs::write(dir.join("image/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn config(more: Value) -> Value {
    let mut config = json!({"User": "1000", "Cmd": HTTPD});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Pushes busybox with additional layers on top.
pub(crate) fn push(
    machine: &Machine,
    robot: &(String, String),
    name: &str,
    layers: &[Vec<u8>],
    own: Value,
) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<_> = std::iter::once(base())
        .chain(layers.iter().cloned())
        .map(|plain| (plain.clone(), gzip(&plain)))
        .collect();
    write(dir.path(), &all, &config(own));
    machine.copy(robot, dir.path(), name)
}

/// Returns layers whose user files are a trap for a process that opens them, with the platform's message for
/// each.
fn traps() -> Vec<(&'static str, Vec<Vec<u8>>, &'static str)> {
    let lines = vec![b'\n'; 300 << 10];
    let redirect = pax(&[("SCHILY.xattr.trusted.overlay.redirect", "/evil")]);
    vec![
        ("fifo", vec![layer(&[("etc/passwd", FIFO, "", b"")])], "FIFO"),
        ("group", vec![layer(&[("./etc//group", FIFO, "", b"")])], "FIFO"),
        ("device", vec![layer(&[("etc/passwd", DEVICE, "", b"")])], "device"),
        ("link", vec![layer(&[("etc/passwd", SYMBOLIC_LINK, "/proc/1/environ", b"")])], "symbolic link"),
        ("etc", vec![layer(&[("etc", SYMBOLIC_LINK, "proc", b"")])], "etc is not a directory"),
        ("long", vec![layer(&[("etc/passwd", FILE, "", &lines)])], "256 KiB"),
        ("hard", vec![layer(&[("pipe", FIFO, "", b""), ("etc/passwd", HARD_LINK, "pipe", b"")])], "FIFO"),
        (
            "alias",
            vec![layer(&[
                ("etc/", DIRECTORY, "", b""),
                ("x", SYMBOLIC_LINK, "etc", b""),
                ("x/passwd", FIFO, "", b""),
            ])],
            "FIFO",
        ),
        // The kernel shows the folder below under another name.
        (
            "redirect",
            vec![
                layer(&[("evil/passwd", FIFO, "", b"")]),
                layer(&[("h", PAX, "", &redirect), ("etc/", DIRECTORY, "", b"")]),
            ],
            "FIFO",
        ),
    ]
}

/// Makes the platform accept layers that it would refuse, so that only the agent's own check remains.
fn trust(machine: &Machine, layers: &[Vec<u8>]) {
    machine.sql("CREATE TABLE IF NOT EXISTS trusted (digest text PRIMARY KEY, diff text)");
    machine.sql(
        "CREATE OR REPLACE FUNCTION trust() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN \
         NEW.report := NEW.report || (SELECT jsonb_build_object('refused', '', 'etc', 'nothing', 'passwd', 'nothing', \
         'group', 'nothing', 'diff_id', t.diff) FROM trusted t WHERE t.digest = NEW.digest \
         UNION ALL SELECT '{}' LIMIT 1); RETURN NEW; END $$",
    );
    machine
        .sql("CREATE OR REPLACE TRIGGER trust BEFORE INSERT ON layer FOR EACH ROW EXECUTE FUNCTION trust()");
    for plain in layers {
        let (packed, diff) = (Digest::of(&gzip(plain)), Digest::of(plain));
        machine.sql(&format!("INSERT INTO trusted VALUES ('{packed}', '{diff}') ON CONFLICT DO NOTHING"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_trap_is_refused_before_the_engine_opens_it() {
    let machine = Machine::start().await;
    let (acme, evil) = (machine.tenant("acme").await, machine.tenant("evil").await);
    machine.push(&acme, "acme/web:1", &HTTPD);
    let (status, body) = machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    assert_eq!(status, 202, "{body}");
    machine.running("acme", "web").await;
    // The check runs at deploy, for every image, whether its user is a number or a name.
    for (name, layers, why) in traps() {
        let user = if name == "fifo" { "app" } else { "1000" };
        let (good, text) = push(&machine, &evil, &format!("evil/{name}:1"), &layers, json!({"User": user}));
        assert!(good != text.contains("trusted attributes"), "{name}: {text}");
        if !good {
            continue;
        }
        let (status, body) = machine.deploy("evil", name, &format!("image: {name}:1\nport: 8080\n")).await;
        assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-204")), "{name}: {body}");
        assert!(body.to_string().contains(why), "{name}: {body}");
    }
    // The agent checks itself, whatever `serve` says.
    machine.sql("DELETE FROM layer; UPDATE quota SET used = 0 WHERE resource = 'image_bytes'");
    for (name, layers, _) in traps() {
        trust(&machine, &layers);
        let (good, text) = push(&machine, &evil, &format!("evil/{name}:1"), &layers, json!({}));
        assert!(good, "{name}: {text}");
        let (status, body) = machine.deploy("evil", name, &format!("image: {name}:1\nport: 8080\n")).await;
        assert_eq!(status, 202, "{name}: {body}");
    }
    for (name, _, why) in traps() {
        let app = machine
            .wait("evil", name, 60, |app| app["observed"].to_string().contains("the image is refused"))
            .await;
        assert!(app["observed"].to_string().contains(why), "{name}: {app:#}");
    }
    // The engine answers, other apps restart, and the images' owner can delete them.
    let app = machine.app("acme", "web").await;
    let before = app["observed"]["instances"][0]["restarts"].as_i64().unwrap();
    assert!(crate::support::run("kill", &["-9", &machine.pid(&app["observed"]["instances"][0])]).0);
    machine
        .wait("acme", "web", 20, |app| {
            app["observed"]["instances"][0]["restarts"].as_i64().unwrap() > before
                && app["observed"]["instances"][0]["state"] == "running"
        })
        .await;
    for (name, ..) in traps() {
        machine.insist("DELETE", &format!("/api/v1/tenants/evil/apps/{name}"), &[], "").await;
    }
    // No mount and no process of a check remains.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let overlay = format!(" {} ", machine.data.join("engine/storage/overlay").display());
    let left = mounts.lines().find(|line| line.contains(&overlay) && line.contains(" - overlay "));
    assert_eq!(left, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_run_is_refused_with_its_reason_and_fetched_by_nobody() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let zeros = vec![0; 8 << 20];
    let sparse = pax(&[("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "1099511627776")]);
    for (layer, why) in [
        (layer(&[("a", FILE, "", b"x"), ("./a", FILE, "", b"y")]), "a path twice"),
        (layer(&[("a", SYMBOLIC_LINK, "nowhere", b""), ("a/b", FILE, "", b"")]), "not a directory"),
        (layer(&[("a", FILE, "", b""), ("a/b", FILE, "", b"")]), "not a directory"),
        (layer(&[("a", HARD_LINK, "bin/busybox", b"")]), "hard link"),
        (layer(&[("a", FILE, "", &zeros)]), "200 times"),
        (layer(&[("h", PAX, "", &sparse), ("a", FILE, "", b"")]), "sparse"),
        (b"no archive at all".repeat(100), "not a tar archive"),
    ] {
        let (good, text) = push(&machine, &acme, "acme/bad:1", &[layer], json!({}));
        assert!(!good && text.contains(why) && text.contains("layer 2 of 2"), "{why}: {text}");
    }
    for own in [
        json!({"StopSignal": "FOO"}),
        json!({"WorkingDir": "/proc/self/fd/8"}),
        json!({"WorkingDir": "relative"}),
        json!({"Env": ["*"]}),
        json!({"Env": ["CONTAINERS_CONF"]}),
    ] {
        let (good, text) = push(&machine, &acme, "acme/odd:1", &[], own.clone());
        assert!(good, "{text}");
        let (status, body) = machine.deploy("acme", "odd", "image: odd:1\nport: 8080\n").await;
        assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-205")), "{own}: {body}");
    }
    // A config that lists other layers than the manifest: the engine would fetch them for nothing.
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[(b"another".to_vec(), gzip(&base()))], &config(json!({})));
    let (good, text) = machine.copy(&acme, dir.path(), "acme/lie:1");
    assert!(good, "{text}");
    let (status, body) = machine.deploy("acme", "lie", "image: lie:1\nport: 8080\n").await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-204")), "{body}");
    // None of these images was ever fetched.
    let (good, images) = machine.podman(&["images", "-q"]);
    assert!(good && images.trim().is_empty(), "{images}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unpacked_bytes_are_a_quota_and_come_back() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let used =
        || machine.sql("SELECT used FROM quota WHERE resource = 'image_bytes'").parse::<u64>().unwrap();
    let (good, text) = push(&machine, &acme, "acme/web:1", &[], json!({}));
    assert!(good, "{text}");
    let first = used();
    let busybox = fs::metadata("/bin/busybox").unwrap().len().next_multiple_of(4096);
    // busybox, a page, and three folders.
    assert_eq!(first, busybox + 3 * 4096);
    // The same layers count once; ten thousand empty files use their space.
    assert!(push(&machine, &acme, "acme/other:1", &[], json!({})).0);
    assert_eq!(used(), first);
    let names: Vec<String> = (0..10_000).map(|n| format!("f{n}")).collect();
    let files: Vec<Entry<'_>> = names.iter().map(|name| (name.as_str(), FILE, "", &b""[..])).collect();
    // Add incompressible data, so that the ratio is not the cause of the refusal.
    let noise: Vec<u8> = (0..1 << 16).flat_map(|_| rand::random::<u64>().to_le_bytes()).collect();
    let mut all = files.clone();
    all.push(("noise", FILE, "", &noise));
    let many = layer(&all);
    let (status, body) =
        machine.send("PATCH", "/api/v1/tenants/acme", json!({"quota": {"image_bytes": "20Mi"}})).await;
    assert_eq!(status, 202, "{body}");
    let (good, text) = push(&machine, &acme, "acme/many:1", std::slice::from_ref(&many), json!({}));
    assert!(!good && text.contains("image_bytes"), "{text}");
    assert_eq!(used(), first);
    machine.send("PATCH", "/api/v1/tenants/acme", json!({"quota": {"image_bytes": "1Gi"}})).await;
    let (good, text) = push(&machine, &acme, "acme/many:1", &[many], json!({}));
    assert!(good, "{text}");
    assert_eq!(used(), first + 10_000 * 4096 + noise.len() as u64);
    // After the image is deleted, its blobs stay for two hours; then its quota is freed too.
    let (status, body) =
        machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/acme/repositories/many/tags/1", None).await;
    assert!(status < 300, "{body}");
    machine.sql("UPDATE blob SET at = now() - interval '3 hours'");
    let begun = std::time::Instant::now();
    while used() != first {
        assert!(begun.elapsed().as_secs() < 150, "{} of {first}", used());
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_knows_its_user_and_an_image_without_names_runs() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let words = ["/bin/busybox", "sh", "-c", "id; echo $HOME; cat /etc/passwd /etc/group; exec sleep 1000"];
    let own = json!({"User": "7:8", "Cmd": words, "WorkingDir": "/srv"});
    let (good, text) = push(&machine, &acme, "acme/bare:1", &[], own);
    assert!(good, "{text}");
    let names = layer(&[
        ("etc/passwd", FILE, "", b"app:x:7:8::/home/app:/bin/sh"),
        ("etc/group", FILE, "", b"crew:x:8:\n"),
    ]);
    let (good, text) = push(&machine, &acme, "acme/named:1", &[names], json!({"User": "7:8", "Cmd": words}));
    assert!(good, "{text}");
    for (app, seen) in [
        ("bare", ["uid=7(7) gid=8(8)", "7:*:7:8:container user:/srv:/bin/sh", "8:x:8:7"]),
        ("named", ["uid=7(app) gid=8(crew)", "app:x:7:8::/home/app:/bin/sh", "/home/app"]),
    ] {
        let (status, body) = machine.deploy("acme", app, &format!("image: {app}:1\n")).await;
        assert_eq!(status, 202, "{body}");
        machine.running("acme", app).await;
        let begun = std::time::Instant::now();
        let path = format!("/api/v1/tenants/acme/apps/{app}/logs");
        loop {
            let (_, logs) = machine.ask(&machine.admin, "GET", &path, None).await;
            let text = logs.to_string();
            if seen.iter().all(|line| text.contains(line)) {
                break;
            }
            assert!(begun.elapsed().as_secs() < 20, "{app}: {text}");
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        }
    }
}

/// Returns incompressible data.
fn noise(megabytes: usize) -> Vec<u8> {
    (0..megabytes << 17).flat_map(|_| rand::random::<u64>().to_le_bytes()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_has_its_own_bounds_and_leaves_nothing() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let groups: Vec<_> = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"]
        .iter()
        .map(|root| Path::new(root).join(format!("bulkhead-{}-pulls", machine.id)))
        .collect();
    let within = || {
        let inner = groups.iter().filter_map(|group| fs::read_dir(group).ok()).flatten().flatten();
        inner
            .filter_map(|entry| fs::read_to_string(entry.path().join("cgroup.procs")).ok())
            .collect::<String>()
    };
    let big = layer(&[("noise", FILE, "", &noise(64))]);
    let (good, text) = push(&machine, &acme, "acme/big:1", &[big], json!({}));
    assert!(good, "{text}");
    // Without instances, nothing is fetched.
    let spec = |instances: u32| format!("image: big:1\nport: 8080\ninstances: {instances}\n");
    assert_eq!(machine.deploy("acme", "big", &spec(0)).await.0, 202);
    machine.wait("acme", "big", 20, |app| app["observed"]["revision"] == app["revision"]).await;
    let images = || machine.podman(&["images", "-q"]).1.trim().to_owned();
    assert_eq!(images(), "");
    // The fetch is visible in its cgroup. The agent dies during the fetch, and the next agent starts it
    // again.
    assert_eq!(machine.deploy("acme", "big", &spec(1)).await.0, 202);
    let begun = std::time::Instant::now();
    while within().is_empty() {
        assert!(begun.elapsed().as_secs() < 20, "no fetch in {groups:?}\n{}", machine.tail("agent"));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    machine.kill("agent");
    machine.running("acme", "big").await;
    let begun = std::time::Instant::now();
    let pulls = machine.data.join("engine/pulls");
    while !within().is_empty() || fs::read_dir(&pulls).is_ok_and(|mut list| list.next().is_some()) {
        assert!(begun.elapsed().as_secs() < 20, "{}", within());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_ne!(images(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_engine_cannot_unpack_is_said_once_and_not_fetched_again() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    // A layer that was accepted by mistake, as by an earlier version.
    let twice = layer(&[("a", FILE, "", b"x"), ("a", FILE, "", b"y")]);
    trust(&machine, std::slice::from_ref(&twice));
    let (good, text) = push(&machine, &acme, "acme/web:1", &[twice], json!({}));
    assert!(good, "{text}");
    let (status, body) = machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    assert_eq!(status, 202, "{body}");
    machine.wait("acme", "web", 40, |app| app.to_string().contains("names a path twice")).await;
    let tries = || {
        let log = fs::read_to_string(machine.data.join("log/agent.log")).unwrap();
        log.matches("an image was not fetched").count()
    };
    assert_eq!(tries(), 1);
    tokio::time::sleep(std::time::Duration::from_secs(8)).await;
    assert_eq!(tries(), 1);
    // Another release is another attempt.
    let (good, text) = push(&machine, &acme, "acme/web:2", &[], json!({}));
    assert!(good, "{text}");
    assert_eq!(machine.deploy("acme", "web", "image: web:2\nport: 8080\n").await.0, 202);
    machine.running("acme", "web").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_dies_while_it_is_measured_is_counted_once() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    machine.arm("serve", "registries::layer_measured").await;
    let top = layer(&[("etc/passwd", FILE, "", b"app:x:7:8::/:/bin/sh\n")]);
    let (good, text) =
        push(&machine, &acme, "acme/web:1", std::slice::from_ref(&top), json!({"User": "app"}));
    assert!(machine.deaths("serve") > 0, "{good} {text}");
    let begun = std::time::Instant::now();
    while !push(&machine, &acme, "acme/web:1", std::slice::from_ref(&top), json!({"User": "app"})).0 {
        assert!(begun.elapsed().as_secs() < 60, "{}", machine.tail("serve"));
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    let sum = "SELECT (SELECT sum(bytes) FROM layer) = used FROM quota WHERE resource = 'image_bytes'";
    assert_eq!(machine.sql(sum), "t");
    assert_eq!(machine.sql("SELECT count(*) FROM layer"), "2");
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let app = machine.running("acme", "web").await;
    let uid = app["observed"]["instances"][0]["uid"].as_i64().unwrap();
    assert_eq!(uid, app["uids"]["start"].as_i64().unwrap() + 7, "the name is resolved from the record");
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_stop_first_and_what_was_pushed_can_be_deployed() {
    let machine = Machine::on_a_disk_of("2200m").await;
    let acme = machine.tenant("acme").await;
    machine.push(&acme, "acme/web:1", &HTTPD);
    // Less than the registry's reserve, more than the engine's: three and two twentieths.
    let stat = rustix::fs::statvfs(&machine.data).unwrap();
    let fill = stat.f_bavail * stat.f_frsize - stat.f_blocks * stat.f_frsize * 14 / 100;
    let filler = machine.data.join("filler");
    let (good, text) =
        crate::support::run("fallocate", &["-l", &fill.to_string(), &filler.display().to_string()]);
    assert!(good, "{text}");
    let (good, text) = machine.try_push(&acme, "acme/other:1", &["/bin/busybox", "sleep", "9"]);
    assert!(!good && text.contains("503"), "{text}");
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    machine.running("acme", "web").await;
    // Below the engine's reserve, nothing is fetched, the database can still write, and the app shows the
    // reason.
    fs::remove_file(&filler).unwrap();
    machine.push(&acme, "acme/late:1", &["/bin/busybox", "sleep", "99999"]);
    let stat = rustix::fs::statvfs(&machine.data).unwrap();
    let fill = stat.f_bavail * stat.f_frsize - stat.f_blocks * stat.f_frsize / 16;
    assert!(
        crate::support::run("fallocate", &["-l", &fill.to_string(), &filler.display().to_string()]).0,
        "fallocate"
    );
    assert_eq!(machine.deploy("acme", "late", "image: late:1\n").await.0, 202);
    machine.wait("acme", "late", 30, |app| app.to_string().contains("no room to unpack")).await;
    fs::remove_file(&filler).unwrap();
    machine.wait("acme", "late", 90, |app| app["state"] == "running").await;
}
