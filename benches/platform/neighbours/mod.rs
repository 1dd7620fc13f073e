//! The cost of a hostile neighbour, for a tenant with ten apps and a client at 20 requests per second. The
//! tenant runs first alone, then next to each attack of another tenant or a stranger at full strength. The
//! tenant alone is the peer.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead::ids::Digest;
use serde_json::{Value, json};

use crate::outside::{of, within};
use crate::support::{HTTPD, Machine, layer_with, run};

mod attacks;
pub(crate) mod crowd;

use attacks::ATTACKS;

/// Duration of each attack in seconds.
const SECONDS: u64 = 20;
/// Time between two requests of the client.
const GAP: Duration = Duration::from_millis(50);
/// A slower request counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Maximum downtime of an instance, in seconds.
const AWAY: f64 = 5.0;
/// Processes of the platform, and the MiB that each unit allows.
const PROCESSES: [(&str, u64); 6] = [
    ("serve", 1024),
    ("agent", 1024),
    ("prober", 128),
    ("resolver", 256),
    ("registry", 1024),
    ("engine", 2048),
];

/// The kinds of requests that the client sends, in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Api,
    Name,
    Deploy,
    Push,
}

const TURNS: [Kind; 20] = {
    use Kind::{Api, Deploy, Name, Push};
    [
        Api, Name, Api, Deploy, Api, Api, Name, Push, Api, Api, Api, Name, Api, Deploy, Api, Api, Name, Push,
        Api, Api,
    ]
};

/// The attacked tenant.
struct Victim {
    machine: Arc<Machine>,
    http: reqwest::Client,
    token: String,
    robot: (String, String),
    /// The network namespace of an instance of `web`, and its name server.
    place: String,
    gateway: Ipv4Addr,
}

/// Milliseconds of each answered request, and the failed requests.
#[derive(Default)]
struct Tally {
    took: BTreeMap<Kind, Vec<f64>>,
    failed: BTreeMap<Kind, Vec<String>>,
}

/// The victim's measurements during a phase.
struct Seen {
    tally: Tally,
    restart: f64,
    memory: Vec<(&'static str, u64, u64)>,
}

impl Victim {
    async fn settle(machine: &Arc<Machine>) -> Self {
        let robot = machine.tenant("victim").await;
        let accounts = "/api/v1/tenants/victim/service-accounts";
        let made = machine.send("POST", accounts, json!({"name": "client", "role": "owner"})).await;
        assert_eq!(made.0, 201, "{made:?}");
        let wish = json!({"name": "client", "service_account": "client", "days": 1});
        let (status, token) = machine.send("POST", "/api/v1/tenants/victim/tokens", wish).await;
        assert_eq!(status, 201, "{token}");
        machine.push(&robot, "victim/web:1", &HTTPD);
        for n in 0..10 {
            let rest = if n == 0 { "connects: { apps: [app-1] }\n" } else { "" };
            if n == 0 {
                let own = machine.deploy("victim", "app-1", "image: web:1\nport: 8080\n").await;
                assert_eq!(own.0, 202, "{own:?}");
            }
            let app = format!("app-{n}");
            let own = machine.deploy("victim", &app, &format!("image: web:1\nport: 8080\n{rest}")).await;
            assert!(matches!(own.0, 200 | 202), "{own:?}");
        }
        for n in 0..10 {
            machine.running("victim", &format!("app-{n}")).await;
        }
        let app = machine.app("victim", "app-0").await;
        let instance = &app["observed"]["instances"][0];
        let address: Ipv4Addr = instance["address"].as_str().unwrap().parse().unwrap();
        let place = of(&machine.pid(instance));
        let gateway = Ipv4Addr::from_bits(address.to_bits() & !0x3ff | 1);
        let begun = Instant::now();
        while !within(&place, move || resolves(gateway)) {
            assert!(begun.elapsed() < Duration::from_secs(60), "the name is not known");
        }
        Self {
            http: client(),
            token: token["token"].as_str().unwrap().to_owned(),
            robot,
            place,
            gateway,
            machine: Arc::clone(machine),
        }
    }

    async fn registry_token(&self) -> String {
        let url = format!(
            "{}/auth/token?service=bulkhead-registry&scope=repository%3Avictim%2Fpushed%3Apull%2Cpush",
            self.machine.address()
        );
        for _ in 0..20 {
            let asked = self.http.get(&url).basic_auth(&self.robot.0, Some(&self.robot.1)).send().await;
            if let Ok(answer) = asked
                && let Ok(body) = answer.json::<Value>().await
                && let Some(token) = body["token"].as_str()
            {
                return token.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        String::new()
    }

    /// Sends one request of a kind; returns the error as text.
    async fn ask(&self, kind: Kind, n: usize, registry: &str) -> Result<(), String> {
        let base = format!("{}/api/v1/tenants/victim/apps", self.machine.address());
        let text = |error: reqwest::Error| format!("{error:?}");
        let good = |answer: reqwest::Response, wanted: u16| {
            let status = answer.status().as_u16();
            if status == wanted { Ok(answer) } else { Err(format!("{kind:?}: status {status}")) }
        };
        match kind {
            Kind::Api => {
                let asked = self.http.get(format!("{base}/app-{}", n % 10)).bearer_auth(&self.token);
                good(asked.send().await.map_err(text)?, 200)?.bytes().await.map_err(text)?;
            }
            Kind::Deploy => {
                // Without instances: only the time to accept counts here. The engine has its own row.
                let spec = format!(
                    "spec: v1\nname: still\nimage: web:1\ncpu: 50m\nmemory: 64Mi\ninstances: 0\nenv: {{ N: \"{n}\" }}\n"
                );
                let asked = self.http.put(format!("{base}/still")).bearer_auth(&self.token);
                let asked = asked.header("content-type", "application/yaml").body(spec);
                good(asked.send().await.map_err(text)?, 202)?;
            }
            Kind::Name => {
                let (place, gateway) = (self.place.clone(), self.gateway);
                let found = tokio::task::spawn_blocking(move || within(&place, move || resolves(gateway)));
                if !found.await.map_err(|error| error.to_string())? {
                    return Err("Name: no answer".into());
                }
            }
            Kind::Push => {
                let bytes = rand::random::<[u8; 32]>().to_vec();
                let url = format!("{}/v2/victim/pushed/blobs/uploads/", self.machine.address());
                let begun = self.http.post(url).bearer_auth(registry).send().await.map_err(text)?;
                let begun = good(begun, 202)?;
                let place = begun.headers()["location"].to_str().unwrap_or_default().to_owned();
                let sign = if place.contains('?') { '&' } else { '?' };
                let url = format!("{}{place}{sign}digest={}", self.machine.address(), Digest::of(&bytes));
                let put = self.http.put(url).bearer_auth(registry).body(bytes);
                good(put.send().await.map_err(text)?, 201)?;
            }
        }
        Ok(())
    }

    /// Sends 20 requests per second for `SECONDS`, and kills an instance meanwhile.
    async fn live(self: &Arc<Self>, killed: usize) -> Seen {
        let tally: Arc<Mutex<Tally>> = Arc::default();
        let registry = self.registry_token().await;
        let own = Arc::clone(self);
        let restart = tokio::spawn(async move { own.restart(killed).await });
        let mut ticks = tokio::time::interval(GAP);
        let (begun, mut n, mut tasks) = (Instant::now(), 0, Vec::new());
        let mut most: BTreeMap<&'static str, u64> = BTreeMap::new();
        while begun.elapsed() < Duration::from_secs(SECONDS) {
            ticks.tick().await;
            let (own, tally, registry) = (Arc::clone(self), Arc::clone(&tally), registry.clone());
            let kind = TURNS[n % TURNS.len()];
            n += 1;
            tasks.push(tokio::spawn(async move {
                let at = Instant::now();
                let outcome = tokio::time::timeout(PATIENCE, own.ask(kind, n, &registry)).await;
                let mut tally = tally.lock().unwrap();
                match outcome {
                    Ok(Ok(())) => {
                        tally.took.entry(kind).or_default().push(at.elapsed().as_secs_f64() * 1000.0);
                    }
                    Ok(Err(error)) => tally.failed.entry(kind).or_default().push(error),
                    Err(_) => {
                        tally.failed.entry(kind).or_default().push(format!("{kind:?}: no answer in 5 s"));
                    }
                }
            }));
            if n.is_multiple_of(10) {
                for (name, _) in PROCESSES {
                    let now = resident(&self.machine, name);
                    let entry = most.entry(name).or_default();
                    *entry = (*entry).max(now);
                }
            }
        }
        futures_util::future::join_all(tasks).await;
        let restart = restart.await.unwrap();
        let tally = std::mem::take(&mut *tally.lock().unwrap());
        let memory = PROCESSES.iter().map(|(name, limit)| (*name, most[name], *limit)).collect();
        Seen { tally, restart, memory }
    }

    /// Kills an instance and returns the seconds until another process answers in its place.
    async fn restart(&self, app: usize) -> f64 {
        // Not the app whose name is looked up: it has no address while it is down.
        let name = format!("app-{}", 2 + app % 8);
        tokio::time::sleep(Duration::from_secs(SECONDS / 3)).await;
        let file = self.machine.data.join("agent/apps");
        let record = |wanted: &str| -> Option<i64> {
            let texts = std::fs::read_dir(&file).ok()?.flatten();
            let mut all = texts.filter_map(|at| std::fs::read(at.path()).ok());
            all.find_map(|text| {
                let kept: Value = serde_json::from_slice(&text).ok()?;
                let own = kept["workload"]["tenant"] == "victim" && kept["workload"]["app"] == wanted;
                own.then(|| kept["instances"][0]["pid"].as_i64()).flatten()
            })
        };
        let Some(before) = record(&name).filter(|pid| *pid > 0) else { return f64::INFINITY };
        let begun = Instant::now();
        run("kill", &["-9", &before.to_string()]);
        while begun.elapsed() < Duration::from_secs(40) {
            if let Some(now) = record(&name)
                && now > 0
                && now != before
                && std::path::Path::new(&format!("/proc/{now}/ns/net")).exists()
            {
                return begun.elapsed().as_secs_f64();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        f64::INFINITY
    }
}

/// The tenant's client has its own source address, as on a network, and keeps no connection.
fn client() -> reqwest::Client {
    let own = std::net::Ipv4Addr::new(127, 200, 0, 1);
    bulkhead::outgoing::client().local_address(Some(own.into())).pool_max_idle_per_host(0).build().unwrap()
}

/// Returns whether the name server resolves `app-1`, from within the namespace.
fn resolves(gateway: Ipv4Addr) -> bool {
    let Ok(socket) = UdpSocket::bind("0.0.0.0:0") else { return false };
    let _ = socket.set_read_timeout(Some(PATIENCE));
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 5];
    question.extend_from_slice(b"app-1\0\0\x01\0\x01");
    let mut buffer = [0; 512];
    // Retry without an answer, as every stub resolver does after a second or more.
    socket.send_to(&question, (gateway, 53)).is_ok()
        && socket.recv(&mut buffer).is_ok_and(|n| n > question.len() && buffer[7] > 0)
}

/// Returns the resident MiB of a process of the platform.
fn resident(machine: &Machine, name: &str) -> u64 {
    let pid = std::fs::read_to_string(machine.data.join(format!("run/{name}.pid"))).unwrap_or_default();
    let pid = pid.split(' ').next().unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) >> 10
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a place in a short list"
)]
fn p99(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = ((sorted.len() as f64 * 0.99).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(place - 1).copied().unwrap_or(f64::NAN)
}

/// Runs the selected attacks, or all, and prints the table.
pub(crate) async fn measure(asked: &[String]) {
    let machine = Arc::new(Machine::start().await);
    // High limits for the attacking tenants: the platform's bounds are tested, not a small quota.
    let victim = Arc::new(Victim::settle(&machine).await);
    let attackers = attacks::settle(&machine).await;
    println!(
        "\n| beside | API p99 ms | names | deploys | pushes | worst ratio | errors | restart s | most memory of a process |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    // Wait until the first plans and checks are done, then measure the tenant at rest.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let alone = victim.live(0).await;
    let mut floor = BTreeMap::new();
    for kind in [Kind::Api, Kind::Name, Kind::Deploy, Kind::Push] {
        floor.insert(kind, p99(alone.tally.took.get(&kind).map_or(&[][..], Vec::as_slice)));
    }
    say("nothing: alone", &alone, &floor);
    for (n, attack) in ATTACKS.iter().enumerate() {
        if !asked.is_empty() && !asked.iter().any(|name| name == attack.name) {
            continue;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let running = tokio::spawn((attack.begin)(Arc::clone(&attackers), Arc::clone(&stop)));
        tokio::time::sleep(Duration::from_secs(3)).await;
        let seen = victim.live(n + 1).await;
        stop.store(true, Ordering::Relaxed);
        let _ = tokio::time::timeout(Duration::from_secs(60), running).await;
        say(attack.words, &seen, &floor);
        attacks::calm(&attackers).await;
    }
}

fn say(what: &str, seen: &Seen, floor: &BTreeMap<Kind, f64>) {
    let mut cells = Vec::new();
    let mut worst = 0.0_f64;
    for kind in [Kind::Api, Kind::Name, Kind::Deploy, Kind::Push] {
        let now = p99(seen.tally.took.get(&kind).map_or(&[][..], Vec::as_slice));
        cells.push(format!("{now:.1}"));
        worst = worst.max(now / floor[&kind]);
    }
    let failed: usize = seen.tally.failed.values().map(Vec::len).sum();
    let asked = failed + seen.tally.took.values().map(Vec::len).sum::<usize>();
    let (name, most, limit) = seen.memory.iter().max_by_key(|(_, most, limit)| most * 1000 / limit).unwrap();
    let late = if seen.restart > AWAY { " (late)" } else { "" };
    println!(
        "| {what} | {} | {worst:.1} | {failed} of {asked} | {:.1}{late} | {name} {most} of {limit} MiB |",
        cells.join(" | "),
        seen.restart
    );
    for (kind, errors) in &seen.tally.failed {
        eprintln!("{what}: {kind:?} failed {} times, such as: {}", errors.len(), errors[0]);
    }
    let _ = std::io::stdout().flush();
}
