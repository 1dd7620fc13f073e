//! The engine has its own limits: neither an instance nor its monitor counts towards them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{HTTPD, Machine, run};

/// Returns the agent's record of the only app's first instance.
fn instance(machine: &Machine) -> Value {
    let files = fs::read_dir(machine.data.join("agent/apps")).unwrap();
    let texts = files.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let mut kept = texts.filter_map(|text| serde_json::from_str::<Value>(&text).ok());
    kept.next().unwrap_or_default()["instances"][0].clone()
}

fn engine(machine: &Machine) -> String {
    let text = fs::read_to_string(machine.data.join("run/engine.pid")).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_has_limits_of_its_own_and_no_monitor_is_within_them() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    machine.running("acme", "web").await;
    let own = format!("bulkhead-{}-engine", machine.id);
    let within = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap().contains(&own);
    assert!(within(&engine(&machine)));
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let limit = |controller: &str, file: &str| {
        let root = Path::new("/sys/fs/cgroup");
        let place = if unified { root.join(&own) } else { root.join(controller).join(&own) };
        fs::read_to_string(place.join(file)).unwrap().trim().to_owned()
    };
    let memory = if unified { "memory.max" } else { "memory.limit_in_bytes" };
    assert_eq!(limit("memory", memory), (1_024_u64 << 20).to_string());
    assert_eq!(limit("pids", "pids.max"), "1024");
    // Repeat after a restart of the engine and of an instance.
    for round in ["first", "second"] {
        let now = instance(&machine);
        for pid in [now["pid"].to_string(), now["conmon"].to_string()] {
            assert!(!within(&pid), "{round}: {pid}");
        }
        if round == "second" {
            break;
        }
        let before = now["pid"].to_string();
        machine.kill("engine");
        assert!(run("kill", &["-9", &before]).0);
        let begun = Instant::now();
        loop {
            let pid = instance(&machine)["pid"].to_string();
            if pid != before && Path::new(&format!("/proc/{pid}/ns/net")).exists() {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{}", machine.tail("agent"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert!(within(&engine(&machine)), "a restarted engine has the same limits");
}
