//! Permissions and limits of a running container, tested from inside and from the host.

use std::fs;

use crate::support::{HTTPD, Machine, run};

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_what_the_design_says() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\nscratch: { /data: 1Mi }\n").await;
    let app = machine.running("acme", "web").await;
    let instance = &app["observed"]["instances"][0];
    let pid = machine.pid(instance);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    for caps in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(caps), "0000000000000000", "{caps}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    let start = app["uids"]["start"].as_u64().unwrap();
    let own = format!("{0} {0} {0} {0}", start + 1000);
    assert_eq!((field("Uid"), field("Gid")), (own.clone(), own));
    for map in ["uid_map", "gid_map"] {
        let text = fs::read_to_string(format!("/proc/{pid}/{map}")).unwrap();
        let numbers: Vec<u64> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers, [0, start, 1024], "{map}");
    }
    // Limits, as the kernel reports them (cgroup version 1 or 2).
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let read = |controller: &str, v1: &str, v2: &str| {
        let line = groups
            .lines()
            .find(|line| line.split(':').nth(1).is_some_and(|c| c.split(',').any(|c| c == controller)));
        let file = match line {
            Some(line) => format!("/sys/fs/cgroup/{controller}{}/{v1}", line.split(':').nth(2).unwrap()),
            None => format!("/sys/fs/cgroup{}/{v2}", groups.trim().split(':').nth(2).unwrap()),
        };
        fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}")).trim().to_owned()
    };
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(read("pids", "pids.max", "pids.max"), "512");
    let name = instance["container"].as_str().unwrap();
    let inside = |script: &str| machine.podman(&["exec", name, "/bin/busybox", "sh", "-c", script]);
    assert!(!inside("echo x > /file").0, "the root file system is read-only");
    assert!(!inside("echo x > /etc/hosts").0, "the platform owns /etc/hosts");
    assert!(inside("echo x > /tmp/file && echo x > /data/file").0, "scratch is writable");
    assert!(!inside("busybox cp /bin/busybox /tmp/b && /tmp/b true").0, "programs in scratch do not run");
    assert!(!inside("busybox dd if=/dev/zero of=/data/big bs=1M count=3").0, "scratch is bounded");
    assert!(!inside("busybox mount -t tmpfs x /tmp").0);
    assert!(!inside("busybox chroot / true").0);
    // No id of the block owns a file of the host.
    assert!(!run("find", &["/etc", "/usr", "/var/log", "-uid", &(start + 1000).to_string()]).1.contains('/'));
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_and_apps_are_apart_and_reach_only_what_they_name() {
    let machine = Machine::start().await;
    let mut robots = Vec::new();
    for name in ["acme", "evil"] {
        let robot = machine.tenant(name).await;
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
        robots.push(robot);
    }
    machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await;
    machine.running("acme", "api").await;
    machine.deploy("acme", "web", "image: web:1\nport: 8080\nconnects: { apps: [api] }\n").await;
    machine.deploy("evil", "web", "image: web:1\nport: 8080\n").await;
    let (status, body) = machine.deploy("acme", "bad", "image: web:1\nconnects: { apps: [nobody] }\n").await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-427")));
    let web = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    let api = machine.running("acme", "api").await["observed"]["instances"][0].clone();
    let evil = machine.running("evil", "web").await["observed"]["instances"][0].clone();
    let fetch = |from: &serde_json::Value, to: &str| machine.fetches(from, &[], to);
    let at =
        |of: &serde_json::Value, port: u16| format!("http://{}:{port}/", of["address"].as_str().unwrap());
    assert!(
        fetch(&web, &at(&api, 8080)),
        "a destination in connects is reachable: {}",
        machine.tail("agent")
    );
    // By name, from inside: the platform's hosts file contains the names of connects.
    let name = web["container"].as_str().unwrap();
    let mut known = false;
    for _ in 0..20 {
        let script = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 2 api 8080";
        known = machine.podman(&["exec", name, "/bin/busybox", "sh", "-c", script]).1.contains("hello");
        if known {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    assert!(known, "by name");
    assert!(!fetch(&api, &at(&web, 8080)), "only in the direction of connects");
    assert!(!fetch(&web, &at(&api, 8081)), "only on the app's port");
    assert!(!fetch(&evil, &at(&web, 8080)) && !fetch(&evil, &at(&api, 8080)), "no other tenant");
    assert!(!fetch(&web, &at(&evil, 8080)));
    // Host, gateway, internet and metadata are blocked.
    let gateway = {
        let a = web["address"].as_str().unwrap();
        format!("{}.1", a.rsplit_once('.').unwrap().0)
    };
    for target in [
        format!("http://{gateway}:{}/healthz", machine.port),
        "http://169.254.169.254/".into(),
        "http://192.0.2.1/".into(),
    ] {
        assert!(!fetch(&web, &target), "{target}");
    }
    // From the host, only the prober has access.
    assert!(
        !run("curl", &["-s", "-m", "3", "--noproxy", "*", &at(&api, 8080)]).1.contains("hello"),
        "root on the host has no access"
    );
    // A spoofed source is dropped, even towards destinations of the real source.
    let pid = machine.pid(&evil);
    let spoof = api["address"].as_str().unwrap();
    let ns = |args: &[&str]| {
        let mut all = vec!["-t", &pid, "-n"];
        all.extend(args);
        run("nsenter", &all)
    };
    assert!(ns(&["ip", "addr", "add", &format!("{spoof}/32"), "dev", "eth0"]).0);
    assert!(!machine.fetches(&evil, &["--interface", spoof], &at(&web, 8080)));
    // Denied attempts are recorded with their source.
    let (_, table) = run("nft", &["list", "table", "inet", &format!("bulkhead_{}", machine.id)]);
    assert!(table.contains("169.254.169.254"), "{table}");
    // Another program flushes the table: the agent restores it at once and records it.
    assert!(run("nft", &["delete", "table", "inet", &format!("bulkhead_{}", machine.id)]).0);
    let begun = std::time::Instant::now();
    while !run("nft", &["list", "table", "inet", &format!("bulkhead_{}", machine.id)]).0 {
        assert!(begun.elapsed().as_secs() < 5, "the table is not restored");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    println!("the table was back after {} ms", begun.elapsed().as_millis());
    assert!(!fetch(&evil, &at(&web, 8080)));
    assert!(fetch(&web, &at(&api, 8080)));
    // The agent removes a foreign element from a set, and leaves the correct elements alone.
    let table = machine.table();
    let own = |of: &serde_json::Value| of["address"].as_str().unwrap().to_owned();
    let element = format!("{{ \"bk{}1\" . {} . {} . tcp . 8080 }}", machine.id, own(&evil), own(&web));
    assert!(run("nft", &["add", "element", "inet", &table, "pairs", &element]).0);
    let begun = std::time::Instant::now();
    while run("nft", &["get", "element", "inet", &table, "pairs", &element]).0 {
        assert!(begun.elapsed().as_secs() < 5, "the foreign element stays");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    println!("the foreign element was out after {} ms", begun.elapsed().as_millis());
    let repairs = machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'firewall_repaired'");
    assert_eq!(repairs, "2", "the flush and the foreign element, and nothing else");
}
