//! Time from an accepted deploy to a running process, compared with a manual `podman run` with the same
//! engine, image and limits. Also the time of `bulkhead serve` from start to ready, against a limit.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Machine, run};
use crate::{Row, median, spread};

async fn ours(machine: &Machine, name: &str) -> f64 {
    let begun = Instant::now();
    let (status, answer) = machine.deploy("acme", name, "image: web:1\n").await;
    assert_eq!(status, 202, "{answer}");
    loop {
        let app = machine.app("acme", name).await;
        if app["observed"]["instances"][0]["uid"].is_number() {
            return begun.elapsed().as_secs_f64() * 1e3;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{app:#}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn peer(machine: &Machine, image: &str, name: &str) -> f64 {
    let begun = Instant::now();
    let (good, text) = machine.podman(&[
        "run",
        "--detach",
        "--name",
        name,
        "--network",
        "bench",
        "--uidmap",
        "0:2000000000:1024",
        "--gidmap",
        "0:2000000000:1024",
        "--user",
        "1000:1000",
        "--cap-drop",
        "all",
        "--security-opt",
        "no-new-privileges",
        "--read-only",
        "--memory",
        "64m",
        "--cpus",
        "0.05",
        "--pids-limit",
        "512",
        image,
    ]);
    assert!(good, "{text}");
    begun.elapsed().as_secs_f64() * 1e3
}

/// The peer's network. Its bridge is removed even after a failure.
struct Bridge<'a> {
    machine: &'a Machine,
    interface: String,
}

impl<'a> Bridge<'a> {
    fn new(machine: &'a Machine) -> Self {
        let (good, text) = machine.podman(&["network", "create", "--subnet", "198.51.100.0/24", "bench"]);
        assert!(good, "{text}");
        // This engine chooses its own bridge names.
        let (good, interface) =
            machine.podman(&["network", "inspect", "--format", "{{.NetworkInterface}}", "bench"]);
        assert!(good && !interface.trim().is_empty(), "{interface}");
        let interface = interface.trim().to_owned();
        Self { machine, interface }
    }
}

impl Drop for Bridge<'_> {
    fn drop(&mut self) {
        self.machine.podman(&["network", "rm", "--force", "--time", "0", "bench"]);
        run("ip", &["link", "del", &self.interface]);
    }
}

pub(crate) async fn deploy_to_running() -> Row {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &["/bin/busybox", "sleep", "1000"]);
    // The image is in the engine's store in both cases.
    machine.deploy("acme", "warm", "image: web:1\n").await;
    machine.running("acme", "warm").await;
    let (good, text) = machine.podman(&["images", "--quiet", "--no-trunc"]);
    assert!(good, "{text}");
    let image = text.trim().to_owned();
    let bridge = Bridge::new(&machine);
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for n in 0..7 {
        mine.push(ours(&machine, &format!("app{n}")).await);
        theirs.push(peer(&machine, &image, &format!("bench{n}")));
        machine.podman(&["rm", "--force", "--time", "0", &format!("bench{n}")]);
        let path = format!("/api/v1/tenants/acme/apps/app{n}");
        assert_eq!(machine.ask(&machine.admin, "DELETE", &path, None).await.0, 202);
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    drop(bridge);
    Row {
        what: "accepted deploy to running, ms",
        ours: spread(&mine, 0),
        peer: format!("manual podman run {}", spread(&theirs, 0)),
        result: format!("{:.2} times the peer", median(&mine) / median(&theirs)),
        goal: "at most 1.3 times",
    }
}

pub(crate) async fn serve_to_ready() -> Row {
    let machine = Machine::start().await;
    let config = machine.data.join("serve.toml").display().to_string();
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let http = bulkhead::outgoing::client().build().unwrap();
    let user = format!("bk{}-serve", machine.id);
    let mut times = Vec::new();
    for _ in 0..7 {
        let (listen, pull) = (port(), port());
        let begun = Instant::now();
        let mut child = Command::new("setpriv")
            .args(["--reuid", &user, "--regid", &user, "--clear-groups", "--"])
            .args([env!("CARGO_BIN_EXE_bulkhead"), "serve", "--config", &config])
            .env("BULKHEAD_SERVER__LISTEN", format!("127.0.0.1:{listen}"))
            .env("BULKHEAD_SERVER__PULL_LISTEN", format!("127.0.0.1:{pull}"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let address = format!("http://127.0.0.1:{listen}/readyz");
        while !http.get(&address).send().await.is_ok_and(|answer| answer.status() == 200) {
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        run("kill", &["-TERM", &child.id().to_string()]);
        let _ = child.wait();
    }
    Row {
        what: "bulkhead serve from start to ready, warm, ms",
        ours: spread(&times, 0),
        peer: "limit 60".into(),
        result: format!("{:.2} of the limit", median(&times) / 60.0),
        goal: "60",
    }
}
