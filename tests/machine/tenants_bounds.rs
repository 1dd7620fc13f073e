//! Limits over all instances of a tenant, and over all tenants. Fork bombs and memory hogs in many instances
//! at once do not affect the platform or other tenants.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{HTTPD, Machine};

/// Returns a file of a group, in either version of control groups.
fn file(machine: &Machine, group: &str, v1: &str, v2: &str) -> String {
    let own = format!("bulkhead-{}{group}", machine.id);
    if fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap() {
        return format!("/sys/fs/cgroup/{own}/{v2}");
    }
    format!("/sys/fs/cgroup/{}/{own}/{v1}", v1.split('.').next().unwrap())
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}

async fn becomes(path: &str, wanted: &str) {
    let begun = Instant::now();
    while read(path) != wanted {
        assert!(begun.elapsed().as_secs() < 20, "{path} is {} and not {wanted}", read(path));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fork_bombs_in_many_instances_fill_their_tenants_own_room_alone() {
    let machine = Machine::start().await;
    let robot = machine.tenant("evil").await;
    let victim = machine.tenant("acme").await;
    machine.push(&victim, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\nhealth: { http: { path: / } }\n").await;
    let before = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    let pids = file(&machine, "/t-evil", "pids.max", "pids.max");
    becomes(&pids, "4096").await;
    let (status, body) = machine.send("PATCH", "/api/v1/tenants/evil", json!({"quota": {"pids": 200}})).await;
    assert_eq!(status, 202, "{body}");
    becomes(&pids, "200").await;

    let script = "while true; do busybox sleep 60 & done 2>/dev/null; busybox sleep 1000";
    machine.push(&robot, "evil/bomb:1", &["/bin/busybox", "sh", "-c", script]);
    machine.deploy("evil", "bomb", "image: bomb:1\ninstances: 4\n").await;
    let current = file(&machine, "/t-evil", "pids.current", "pids.current");
    let begun = Instant::now();
    while read(&current).parse::<u64>().unwrap() < 190 {
        assert!(begun.elapsed().as_secs() < 40, "only {} processes", read(&current));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for _ in 0..20 {
        // The processes that the engine moves in from outside add a handful.
        assert!(read(&current).parse::<u64>().unwrap() <= 200 + 40, "{}", read(&current));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // Another tenant deploys, and running apps continue. Then the culprit is removed.
    machine.deploy("acme", "more", "image: web:1\nport: 8080\n").await;
    machine.running("acme", "more").await;
    let after = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    assert_eq!((after["started"].clone(), &after["restarts"]), (before["started"].clone(), &json!(0)));
    let (status, _) = machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/evil/apps/bomb", None).await;
    assert_eq!(status, 202);
    let begun = Instant::now();
    while read(&current) != "0" {
        assert!(begun.elapsed().as_secs() < 60, "{} processes are left", read(&current));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_of_many_instances_is_their_tenants_and_bounds_are_repaired() {
    let machine = Machine::start().await;
    let robot = machine.tenant("evil").await;
    let victim = machine.tenant("acme").await;
    machine.push(&victim, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\nhealth: { http: { path: / } }\n").await;
    let before = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    machine.push(&robot, "evil/fat:1", &["/bin/busybox", "sleep", "1000"]);
    machine.deploy("evil", "fat", "image: fat:1\ninstances: 4\n").await;
    let app = machine.running("evil", "fat").await;
    let memory = file(&machine, "/t-evil", "memory.limit_in_bytes", "memory.max");
    // A limit that an admin lowers stops no running instance, and applies as soon as instances have exited.
    let (status, body) =
        machine.send("PATCH", "/api/v1/tenants/evil", json!({"quota": {"memory": "96Mi"}})).await;
    assert_eq!(status, 202, "{body}");
    let watchers = 256_u64 << 20;
    becomes(&memory, &(watchers + ((4 * 64) << 20)).to_string()).await;
    let begun = app["observed"]["instances"][0]["started"].clone();
    assert_eq!(machine.running("evil", "fat").await["observed"]["instances"][0]["started"], begun);
    let (status, _) = machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/evil/apps/fat", None).await;
    assert_eq!(status, 202);
    let begun = Instant::now();
    while machine.deploy("evil", "thin", "image: fat:1\nsingleton: true\n").await.0 >= 300 {
        assert!(begun.elapsed().as_secs() < 60, "the memory of deleted apps is not freed");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    machine.running("evil", "thin").await;
    becomes(&memory, &(watchers + (96 << 20)).to_string()).await;
    let cpu = file(&machine, "/t-evil", "cpu.cfs_quota_us", "cpu.max");
    let (status, body) =
        machine.send("PATCH", "/api/v1/tenants/evil", json!({"quota": {"cpu": "10m"}})).await;
    assert_eq!(status, 202, "{body}");
    becomes(&cpu, if cpu.ends_with("max") { "5000 100000" } else { "5000" }).await;
    let begun = Instant::now();
    let (status, _) = machine.ask("", "GET", "/healthz", None).await;
    assert!(status == 200 && begun.elapsed().as_secs() < 2);
    let after = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    assert_eq!((after["started"].clone(), &after["restarts"]), (before["started"].clone(), &json!(0)));

    // All tenants together leave room for the platform.
    let total: u64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap();
    let all: u64 = read(&file(&machine, "", "memory.limit_in_bytes", "memory.max")).parse().unwrap();
    assert!(all < total * 1024 - (500 << 20), "{all} of {total} KiB");
    let most: u64 = read("/proc/sys/kernel/pid_max").parse().unwrap();
    let pids: u64 = read(&file(&machine, "", "pids.max", "pids.max")).parse().unwrap();
    assert!(pids + 1000 < most, "{pids} of {most}");

    // Removed limits are restored, and the repair is recorded.
    let path = file(&machine, "", "pids.max", "pids.max");
    fs::write(&path, "max").unwrap();
    becomes(&path, &pids.to_string()).await;
    let begun = Instant::now();
    while machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'bounds_repaired'") == "0" {
        assert!(begun.elapsed().as_secs() < 20, "the repair is not recorded");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    // Nothing of an offboarded tenant stays behind.
    let leave = machine.send("PUT", "/api/v1/tenants/evil/offboarding", json!({"confirm": "evil"})).await;
    assert_eq!(leave.0, 202, "{leave:?}");
    let begun = Instant::now();
    while fs::exists(&memory).unwrap() {
        assert!(begun.elapsed().as_secs() < 60, "{memory} is left");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
