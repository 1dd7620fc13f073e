//! Expectations of an ordinary image inside its instance: writable folders, reopenable streams, groups. A
//! crafted image gains nothing by the same fields.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::images::{DIRECTORY, Entry, FILE, SYMBOLIC_LINK, layer, push};
use crate::support::Machine;

/// Waits for a line in the log of an app.
async fn said(machine: &Machine, app: &str, wanted: &str) -> String {
    let path = format!("/api/v1/tenants/acme/apps/{app}/logs");
    let begun = Instant::now();
    loop {
        let (_, logs) = machine.ask(&machine.admin, "GET", &path, None).await;
        let text = logs.to_string();
        if text.contains(wanted) {
            return text;
        }
        assert!(
            begun.elapsed().as_secs() < 30,
            "{app} does not say {wanted}: {text}\n{}",
            machine.tail("agent")
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Deploys an image that cannot run. Returns the reason that the app shows.
async fn reason(machine: &Machine, app: &str, rest: &str) -> String {
    let (status, body) = machine.deploy("acme", app, &format!("image: {app}:1\n{rest}")).await;
    assert_eq!(status, 202, "{app}: {body}");
    let app = machine.wait("acme", app, 30, |app| app["state"] == "failed").await;
    app["summary"].as_str().unwrap().to_owned()
}

const SCRIPT: &str = "
for d in /data /tmp /run/nginx /var/run/nginx /var/lib/pg /var/log/app /dev/shm; do
  echo x > $d/file && echo good-$d- || echo bad-$d-
done
ls -ldn /data /tmp /run/nginx /dev/shm
cat /data/old/file
busybox cp /bin/busybox /tmp/busybox && /tmp/busybox echo good-exec-
busybox cp /bin/busybox /var/lib/pg/busybox && /var/lib/pg/busybox echo bad-noexec-
echo good-stdout- > /dev/stdout
echo good-stderr- > /dev/stderr
echo good-self- >> /proc/self/fd/1
echo good-link- > /var/log/access.log
busybox dd if=/dev/zero of=/dev/shm/large bs=1M count=20 2>/dev/null && echo bad-shm- || echo good-shm-
busybox dd if=/dev/zero of=/dev/shm/large bs=1M count=3 2>/dev/null && echo good-shm3-
rm -f /dev/shm/large
mkdir /etc/x /run/other 2>/dev/null && echo bad-root-
id -u; id -g; id -G
echo the-end-
exec sleep 1000
";

#[tokio::test(flavor = "multi_thread")]
async fn what_an_image_writes_to_belongs_to_its_user() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let entries: [Entry<'_>; 12] = [
        ("data/", DIRECTORY, "", b""),
        ("data/old/", DIRECTORY, "", b""),
        ("data/old/file", FILE, "", b"copied-in-\n"),
        ("tmp/", DIRECTORY, "", b""),
        ("run/", DIRECTORY, "", b""),
        ("var/run", SYMBOLIC_LINK, "/run", b""),
        ("var/log/app/", DIRECTORY, "", b""),
        ("var/log/access.log", SYMBOLIC_LINK, "/dev/stdout", b""),
        ("etc/passwd", FILE, "", b"app:x:77:0::/:/bin/sh\n"),
        ("etc/group", FILE, "", b"root:x:0:\nextra:x:50:app\nfar:x:70000:app\nmore:x:51:x,app\n"),
        ("bin/sh", SYMBOLIC_LINK, "busybox", b""),
        ("srv/", DIRECTORY, "", b""),
    ];
    let config = json!({"User": "app", "Cmd": ["sh", "-c", SCRIPT], "Env": ["PATH=/bin"]});
    let (good, text) = push(&machine, &acme, "acme/app:1", &[layer(&entries)], config);
    assert!(good, "{text}");
    let scratch = "scratch: { /data: 1Mi, /tmp: {size: 8Mi, exec: true}, /var/run/nginx: 64Ki, /var/lib/pg: 4Mi, \
                   /var/log/app: 64Ki, /dev/shm: 4Mi }";
    let (status, body) = machine.deploy("acme", "app", &format!("image: app:1\n{scratch}\n")).await;
    assert_eq!(status, 202, "{body}");
    assert!(body["warnings"].to_string().contains("far (70000)"), "{body}");
    let app = machine.running("acme", "app").await;
    let text = said(&machine, "app", "the-end-").await;
    assert!(!text.contains("bad-"), "{text}");
    for sign in [
        "/data",
        "/tmp",
        "/run/nginx",
        "/var/run/nginx",
        "/var/lib/pg",
        "/var/log/app",
        "/dev/shm",
        "exec",
        "stdout",
        "stderr",
        "self",
        "link",
        "shm",
        "shm3",
    ] {
        assert!(text.contains(&format!("good-{sign}-")), "{sign}: {text}");
    }
    for line in [
        "copied-in-",
        "drwxr-xr-x    3 77       0",
        "drwxrwxrwt    2 77       0",
        "drwx------    2 77       0",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(text.contains("0 50 51"), "its groups: {text}");
    // Seen from outside: executable mounts have all other restrictions.
    let instance = &app["observed"]["instances"][0];
    let pid = machine.pid(instance);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    let options = |at: &str| {
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(1) == Some(at))
            .unwrap_or_else(|| panic!("{at}: {mounts}"));
        line.split(' ').nth(3).unwrap().split(',').map(str::to_owned).collect::<Vec<_>>()
    };
    for at in ["/data", "/tmp", "/run/nginx", "/var/lib/pg", "/var/log/app", "/dev/shm"] {
        let options = options(at);
        for option in ["nosuid", "nodev"] {
            assert!(options.iter().any(|o| o == option), "{at}: {options:?}");
        }
        assert_eq!(options.iter().any(|o| o == "noexec"), at != "/tmp", "{at}: {options:?}");
    }
    // Every id belongs to the app's own block.
    let start = app["uids"]["start"].as_u64().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for name in ["Uid:", "Gid:", "Groups:"] {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        for id in line.split_whitespace().skip(1) {
            let id: u64 = id.parse().unwrap();
            assert!((start..start + 1024).contains(&id), "{line}");
        }
    }
    // By default, shared memory is large enough for a database.
    let config = json!({"User": "7", "Cmd": ["/bin/busybox", "sh", "-c", "busybox dd if=/dev/zero of=/dev/shm/x bs=1M count=15 && echo fits-; exec sleep 1000"]});
    assert!(push(&machine, &acme, "acme/plain:1", &[], config).0);
    assert_eq!(machine.deploy("acme", "plain", "image: plain:1\n").await.0, 202);
    said(&machine, "plain", "fits-").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scratch_never_covers_what_the_platform_fills() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let links: [Entry<'_>; 6] = [
        ("kernel", SYMBOLIC_LINK, "/proc", b""),
        ("system", SYMBOLIC_LINK, "../../sys/fs/cgroup", b""),
        ("secret", SYMBOLIC_LINK, "/run/secrets", b""),
        ("settings", SYMBOLIC_LINK, "etc", b""),
        ("loop", SYMBOLIC_LINK, "/loop", b""),
        ("again", SYMBOLIC_LINK, "/data", b""),
    ];
    for (app, path, sign) in [
        ("kernel", "/kernel", "lies in /proc"),
        ("kernels", "/kernel/sys/kernel", "lies in /proc"),
        ("system", "/system", "lies in /sys"),
        ("secret", "/secret", "lies in /run/secrets"),
        ("settings", "/settings/ssl", "lies in /etc"),
        ("loop", "/loop", "too many links"),
        ("again", "/again: 64Ki, /data", "name only one of the two"),
    ] {
        assert!(push(&machine, &acme, &format!("acme/{app}:1"), &[layer(&links)], json!({})).0);
        let why = reason(&machine, app, &format!("scratch: {{ {path}: 64Ki }}\n")).await;
        assert!(why.contains(sign), "{app}: {why}");
    }
    for path in ["/proc/sys", "/etc/ssl", "/run/secrets", "/var/run/secrets/x", "/dev/shm/x", "/dev"] {
        let (status, body) = machine
            .deploy("acme", "kernel", &format!("image: kernel:1\nscratch: {{ {path}: 64Ki }}\n"))
            .await;
        assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-127")), "{path}: {body}");
    }
    // No instance of them was ever created.
    let (good, text) = machine.podman(&["ps", "--all", "--format", "{{.Names}}"]);
    assert!(good && !text.contains("acme"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_cannot_run_says_why() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let mut arm = fs::read("/bin/busybox").unwrap();
    arm[18..20].copy_from_slice(&183_u16.to_le_bytes());
    let dynamic = fs::read("/bin/true").unwrap();
    let entries: [Entry<'_>; 5] = [
        ("srv/arm", FILE, "", &arm),
        ("srv/dynamic", FILE, "", &dynamic),
        ("srv/script", FILE, "", b"#!/usr/bin/python3\nprint()\n"),
        ("srv/words", FILE, "", b"echo hello\n"),
        ("srv/sub/", DIRECTORY, "", b""),
    ];
    let cases: [(&str, Value, &str); 7] = [
        ("arm", json!(["/srv/arm"]), "aarch64"),
        ("dynamic", json!(["/srv/dynamic"]), "needs the loader /lib64/ld-linux-x86-64.so.2"),
        ("script", json!(["/srv/script"]), "/usr/bin/python3, which is not in the image"),
        ("words", json!(["/srv/words"]), "neither as an ELF file"),
        ("shell", json!(["bash", "-c", "true"]), "none of the folders of PATH"),
        ("absent", json!(["/srv/absent"]), "is not in the image"),
        ("folder", json!(["/srv/sub"]), "is a folder"),
    ];
    for (app, command, sign) in cases {
        let (good, text) =
            push(&machine, &acme, &format!("acme/{app}:1"), &[layer(&entries)], json!({"Cmd": command}));
        assert!(good, "{text}");
        let why = reason(&machine, app, "").await;
        assert!(why.contains(sign), "{app}: {why}");
    }
    // A program with a file capability, as its distribution ships it.
    let mut tar = tar::Builder::new(Vec::new());
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    tar.append_pax_extensions([("SCHILY.xattr.security.capability", &capability[..])]).unwrap();
    let program = fs::read("/bin/busybox").unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    tar.append_data(&mut header, "srv/server", &program[..]).unwrap();
    let capable = tar.into_inner().unwrap();
    let words = json!({"Cmd": ["/srv/server", "sleep", "1000"]});
    assert!(push(&machine, &acme, "acme/capable:1", &[capable], words).0);
    let why = reason(&machine, "capable", "").await;
    assert!(why.contains("cap_net_bind_service") && why.contains("setcap -r /srv/server"), "{why}");
    // Programs in scratch run if the spec allows it.
    let own = json!({"Cmd": ["/opt/busybox", "sleep", "1000"]});
    let opt: [Entry<'_>; 1] = [("opt/busybox", FILE, "", &program)];
    assert!(push(&machine, &acme, "acme/opt:1", &[layer(&opt)], own).0);
    let why = reason(&machine, "opt", "scratch: { /opt: 4Mi }\n").await;
    assert!(why.contains("/opt: {size: 64Mi, exec: true}"), "{why}");
    machine.deploy("acme", "opt", "image: opt:1\nscratch: { /opt: {size: 4Mi, exec: true} }\n").await;
    machine.running("acme", "opt").await;
}
