//! Network isolation, tested with packets: named and granted connections are open, all others are denied.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::outside::of;
use crate::support::{HTTPD, Machine};

mod closed;
mod crowds;
mod domains;
mod forged;
mod grants;
mod host;
mod neighbours;
mod rollouts;
mod services;

/// Sets a kernel switch and restores it on drop, also when the test fails.
struct Switch(&'static str, String);

impl Switch {
    fn set(path: &'static str, value: &str) -> Self {
        let before = std::fs::read_to_string(path).unwrap_or_default();
        let _ = std::fs::write(path, value);
        Self(path, before)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0, self.1.trim());
    }
}

fn address(instance: &Value) -> Ipv4Addr {
    instance["address"].as_str().unwrap().parse().unwrap()
}

pub(super) async fn instance(machine: &Machine, tenant: &str, app: &str) -> (Ipv4Addr, String) {
    let seen = machine.running(tenant, app).await["observed"]["instances"][0].clone();
    (address(&seen), of(&machine.pid(&seen)))
}

/// Waits until a condition holds, at most `seconds`. Returns the time it took.
pub(super) async fn until(seconds: u64, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(seconds), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

pub(super) async fn two_tenants(machine: &Machine) {
    for name in ["acme", "beta"] {
        let robot = machine.tenant(name).await;
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
    }
}

pub(super) async fn put(machine: &Machine, path: &str, body: Value) -> Value {
    let (status, answer) = machine.send("PUT", path, body).await;
    assert!((200..300).contains(&status), "PUT {path}: {status} {answer}");
    answer
}

pub(super) async fn delete(machine: &Machine, path: &str) {
    let (status, answer) = machine.ask(&machine.admin, "DELETE", path, None).await;
    assert!((200..300).contains(&status), "DELETE {path}: {status} {answer}");
}
