//! The attacks. Each starts, runs until it is told to stop, and leaves its objects to `calm`.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::{Digest, HTTPD, Machine, Value, crowd, json, layer_with, of, within};
use crate::support::Image;

type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An attack.
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    pub(crate) words: &'static str,
    pub(crate) begin: fn(Arc<Attackers>, Arc<AtomicBool>) -> Running,
}

/// Attacking tenants, each with its own registry credential and API token.
pub(crate) struct Attackers {
    machine: Arc<Machine>,
    tenants: Vec<(String, (String, String), String)>,
    http: reqwest::Client,
}

pub(crate) const ATTACKS: [Attack; 13] = [
    Attack { name: "silent", words: "30,000 silent connections of strangers", begin: silent },
    Attack { name: "heads", words: "4,000 heads of 115 KB that never end", begin: heads },
    Attack { name: "requests", words: "1,500 connections of one tenant's requests", begin: requests },
    Attack { name: "bodies", words: "120 manifests of 4 MB that stall", begin: bodies },
    Attack { name: "parsing", words: "manifests of `[[],[],...]`, 16 at once", begin: parsing },
    Attack { name: "names", words: "512 idle connections of 16 instances to the name server", begin: names },
    Attack { name: "searches", words: "12 concurrent dry runs that look up a user name", begin: searches },
    Attack {
        name: "pulls",
        words: "four tenants that deploy images of 512 MiB, five apps each",
        begin: pulls,
    },
    Attack { name: "releases", words: "releases of one app, 16 at once", begin: releases },
    Attack { name: "rows", words: "endless registry credentials, 16 at once", begin: rows },
    Attack { name: "logs", words: "8 instances that write endless log lines", begin: logs },
    Attack { name: "forks", words: "8 instances that fork endlessly", begin: forks },
    Attack { name: "fifo", words: "an image whose /etc/passwd is a FIFO", begin: fifo },
];

pub(crate) async fn settle(machine: &Arc<Machine>) -> Arc<Attackers> {
    let mut tenants = Vec::new();
    for name in ["evil", "evil-b", "evil-c", "evil-d"] {
        let robot = machine.tenant(name).await;
        let base = format!("/api/v1/tenants/{name}");
        let account = json!({"name": "client", "role": "owner"});
        assert_eq!(machine.send("POST", &format!("{base}/service-accounts"), account).await.0, 201);
        let wish = json!({"name": "client", "service_account": "client", "days": 1});
        let (status, token) = machine.send("POST", &format!("{base}/tokens"), wish).await;
        assert_eq!(status, 201, "{token}");
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
        tenants.push((name.to_owned(), robot, token["token"].as_str().unwrap().to_owned()));
    }
    let http = bulkhead::outgoing::client().build().unwrap();
    Arc::new(Attackers { machine: Arc::clone(machine), tenants, http })
}

/// Removes the attackers' apps, and waits until the platform is idle.
pub(crate) async fn calm(own: &Attackers) {
    for (tenant, ..) in &own.tenants {
        let path = format!("/api/v1/tenants/{tenant}/apps");
        let apps = own.machine.get(&format!("{path}?limit=200")).await;
        for app in apps["items"].as_array().into_iter().flatten() {
            let name = app["name"].as_str().unwrap_or_default();
            own.machine.try_ask("DELETE", &format!("{path}/{name}"), &[], "").await;
        }
    }
    tokio::time::sleep(Duration::from_secs(8)).await;
}

async fn until(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Starts this many tasks that repeat the same action until stopped.
async fn crew<F, T>(count: usize, stop: Arc<AtomicBool>, one: F)
where
    F: Fn(usize, usize) -> T + Send + Sync + Clone + 'static,
    T: Future<Output = ()> + Send,
{
    let tasks = (0..count).map(|member| {
        let (one, stop) = (one.clone(), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                let _ = tokio::time::timeout(Duration::from_secs(10), one(member, round)).await;
                round += 1;
            }
        })
    });
    futures_util::future::join_all(tasks).await;
}

fn crowds(mode: &'static str, count: usize, own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        let port = own.machine.port;
        let mut all: Vec<_> = (0..2).map(|_| crowd::spawn(mode, port, count / 2, 60)).collect();
        until(&stop).await;
        for child in &mut all {
            let _ = child.kill();
            let _ = child.wait();
        }
    })
}

fn silent(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    crowds("silent", 30_000, own, stop)
}

fn heads(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    crowds("heads", 4_000, own, stop)
}

fn requests(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(crew(1_500, stop, move |_, _| {
        let asked = own.http.get(format!("{}/api/v1/tenants/evil/apps", own.machine.address()));
        let asked = asked.bearer_auth(&own.tenants[0].2).send();
        async move {
            if let Ok(answer) = asked.await {
                let busy = answer.status() == 429;
                let _ = answer.bytes().await;
                if busy {
                    // Pause, so that the attacker does not take a whole core of the shared machine.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            } else {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }))
}

async fn registry_token(own: &Attackers, repository: &str) -> String {
    let robot = &own.tenants[0].1;
    let url = format!(
        "{}/auth/token?service=bulkhead-registry&scope=repository%3Aevil%2F{repository}%3Apull%2Cpush",
        own.machine.address()
    );
    let asked = own.http.get(url).basic_auth(&robot.0, Some(&robot.1)).send().await;
    let body = match asked {
        Ok(answer) => answer.json::<Value>().await.unwrap_or_default(),
        Err(_) => Value::Null,
    };
    body["token"].as_str().unwrap_or_default().to_owned()
}

fn bodies(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        let token = registry_token(&own, "x").await;
        let port = own.machine.port;
        crew(120, stop, move |member, _| {
            let token = token.clone();
            async move {
                let _ = tokio::task::spawn_blocking(move || stall(port, &token, member)).await;
            }
        })
        .await;
    })
}

/// Sends all but the last byte of a manifest, then waits.
fn stall(port: u16, token: &str, member: usize) {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(9)));
    let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
    let head = format!(
        "PUT /v2/evil/x/manifests/{member} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/vnd.oci.image.manifest.v1+json\r\nContent-Length: 4000000\r\n\r\n"
    );
    if stream.write_all(head.as_bytes()).is_ok() && stream.write_all(&vec![b' '; 3_999_999]).is_ok() {
        let _ = stream.read(&mut [0; 512]);
    }
}

fn parsing(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        let token = registry_token(&own, "x").await;
        let body = bytes::Bytes::from(format!("[{}[]]", "[],".repeat(340_000)));
        crew(16, stop, move |member, _| {
            let url = format!("{}/v2/evil/x/manifests/{member}", own.machine.address());
            let asked = own.http.put(url).bearer_auth(&token).body(body.clone());
            let asked = asked.header("content-type", "application/vnd.oci.image.manifest.v1+json").send();
            async move {
                if let Ok(answer) = asked.await {
                    let _ = answer.bytes().await;
                }
            }
        })
        .await;
    })
}

fn spec(app: &str, rest: &str) -> String {
    format!("spec: v1\nname: {app}\ncpu: 50m\nmemory: 64Mi\nstop_grace: 1\n{rest}")
}

async fn put_app(own: &Attackers, tenant: usize, app: &str, query: &str, rest: &str) {
    let (name, _, token) = &own.tenants[tenant];
    let url = format!("{}/api/v1/tenants/{name}/apps/{app}{query}", own.machine.address());
    let asked = own.http.put(url).bearer_auth(token).header("content-type", "application/yaml");
    if let Ok(answer) = asked.body(spec(app, rest)).send().await {
        let _ = answer.bytes().await;
    }
}

/// Starts instances of the first attacker that run a command. Returns when they run.
async fn instances(own: &Attackers, tag: &str, command: &str, count: usize) {
    own.machine.push(&own.tenants[0].1, &format!("evil/{tag}:1"), &["/bin/sh", "-c", command]);
    for n in 0..count {
        put_app(own, 0, &format!("{tag}-{n}"), "", &format!("image: {tag}:1\n")).await;
    }
}

fn names(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        let mut places = Vec::new();
        for n in 0..16 {
            put_app(&own, 0, &format!("web-{n}"), "", "image: web:1\nport: 8080\n").await;
        }
        for n in 0..16 {
            let app = own.machine.running("evil", &format!("web-{n}")).await;
            let instance = &app["observed"]["instances"][0];
            let address: std::net::Ipv4Addr = instance["address"].as_str().unwrap().parse().unwrap();
            let gateway = std::net::Ipv4Addr::from_bits(address.to_bits() & !0x3ff | 1);
            places.push((of(&own.machine.pid(instance)), gateway));
        }
        let tasks = places.into_iter().map(|(place, gateway)| {
            let stop = Arc::clone(&stop);
            tokio::task::spawn_blocking(move || {
                within(&place, move || {
                    let mut idle: Vec<Option<TcpStream>> = (0..32).map(|_| None).collect();
                    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                    let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x07unknown\0\0\x01\0\x01";
                    while !stop.load(Ordering::Relaxed) {
                        for place in &mut idle {
                            let dead = place.as_mut().is_none_or(|stream| {
                                let _ = stream.set_nonblocking(true);
                                !matches!(stream.read(&mut [0; 16]), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
                            });
                            if dead {
                                let address = (gateway, 53).into();
                                *place = TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok();
                            }
                            for _ in 0..8 {
                                let _ = socket.send_to(question, (gateway, 53));
                            }
                        }
                        std::thread::sleep(Duration::from_millis(5));
                    }
                });
            })
        });
        futures_util::future::join_all(tasks).await;
    })
}

/// Pushes an image whose layer contains these additional files.
fn push_with(own: &Attackers, tenant: usize, name: &str, user: &str, more: &[(String, Vec<u8>, u32)]) {
    let dir = tempfile::tempdir().unwrap();
    let (digest, size) = layer_with(dir.path(), more);
    let image = Image { user, ..Image::of(&HTTPD) };
    image.write(dir.path(), &digest, size);
    let (tenant, robot, _) = &own.tenants[tenant];
    let (good, text) = own.machine.copy(robot, dir.path(), &format!("{tenant}/{name}:1"));
    if !good {
        eprintln!("{name} was not accepted: {}", text.lines().last().unwrap_or_default());
    }
}

fn searches(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        let files: Vec<_> = (0..3_000).map(|n| (format!("data/{n}"), vec![0; 16_384], 0o644)).collect();
        for n in 0..12 {
            let mut own_files = files.clone();
            own_files.push((format!("data/own-{n}"), vec![1], 0o644));
            push_with(&own, 0, &format!("many-{n}"), "app", &own_files);
        }
        crew(12, stop, move |member, round| {
            let own = Arc::clone(&own);
            async move {
                // A different command each time: no answer comes from a cache.
                let rest = format!("image: many-{member}:1\nenv: {{ N: \"{round}\" }}\ninstances: 0\n");
                put_app(&own, 0, &format!("dry-{member}"), "?dry_run=true", &rest).await;
            }
        })
        .await;
    })
}

fn pulls(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        for tenant in 0..4 {
            blow_up(&own, tenant).await;
            for n in 0..5 {
                put_app(&own, tenant, &format!("large-{n}"), "", "image: large:1\n").await;
            }
        }
        until(&stop).await;
    })
}

/// Pushes an image that unpacks to 512 MiB, a hundred times its size.
async fn blow_up(own: &Arc<Attackers>, tenant: usize) {
    let own = Arc::clone(own);
    let pushed = tokio::task::spawn_blocking(move || {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("image/blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let mut layer = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        let mut piece = vec![0; 64 << 10];
        for n in 0..8192 {
            piece[..500].fill_with(rand::random);
            let mut header = tar::Header::new_ustar();
            header.set_size(piece.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            layer.append_data(&mut header, format!("data/{tenant}/{n}"), piece.as_slice()).unwrap();
        }
        let layer = layer.into_inner().unwrap().finish().unwrap();
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(layer.as_slice()).read_to_end(&mut plain).unwrap();
        let (digest, unpacked) = (Digest::of(&layer), Digest::of(&plain));
        std::fs::write(blobs.join(&digest.as_str()[7..]), &layer).unwrap();
        let put = |text: String, kind: &str| {
            let digest = Digest::of(text.as_bytes());
            std::fs::write(blobs.join(&digest.as_str()[7..]), &text).unwrap();
            json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": text.len()})
        };
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"User": "1000", "Cmd": ["/bin/none"]},
            "rootfs": {"type": "layers", "diff_ids": [unpacked]},
        });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": put(config.to_string(), "config.v1+json"),
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": layer.len()}],
        });
        let index = json!({"schemaVersion": 2, "manifests": [put(manifest.to_string(), "manifest.v1+json")]});
        std::fs::write(dir.path().join("image/index.json"), index.to_string()).unwrap();
        std::fs::write(dir.path().join("image/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let (name, robot, _) = &own.tenants[tenant];
        own.machine.copy(robot, dir.path(), &format!("{name}/large:1"))
    });
    if let Ok((false, text)) = pushed.await {
        eprintln!("a large image was not accepted: {}", text.lines().last().unwrap_or_default());
    }
}

fn releases(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(crew(16, stop, move |member, round| {
        let own = Arc::clone(&own);
        async move {
            let filler = "x".repeat(20_000);
            let rest = format!(
                "image: web:1\ninstances: 0\nenv: {{ N: \"{member}-{round}\", FILLER: \"{filler}\" }}\n"
            );
            put_app(&own, 0, "flood", "", &rest).await;
        }
    }))
}

fn rows(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(crew(16, stop, move |member, round| {
        let url = format!("{}/api/v1/tenants/evil/robots", own.machine.address());
        let body = json!({"name": format!("r-{member}-{round}"), "push": true});
        let asked = own.http.post(url).bearer_auth(&own.tenants[0].2).json(&body).send();
        async move {
            if let Ok(answer) = asked.await {
                let _ = answer.bytes().await;
            }
        }
    }))
}

fn logs(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        instances(&own, "loud", "exec busybox yes a-line-that-is-written-without-end", 8).await;
        until(&stop).await;
    })
}

fn forks(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        instances(&own, "bomb", "f() { f | f & }; f; busybox sleep 600", 8).await;
        until(&stop).await;
    })
}

fn fifo(own: Arc<Attackers>, stop: Arc<AtomicBool>) -> Running {
    Box::pin(async move {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("image/blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let mut layer = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Fifo);
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        layer.append_data(&mut header, "etc/passwd", &[][..]).unwrap();
        let bytes = layer.into_inner().unwrap();
        let digest = Digest::of(&bytes);
        std::fs::write(blobs.join(&digest.as_str()[7..]), &bytes).unwrap();
        let image = Image { user: "1000", ..Image::of(&HTTPD) };
        image.write(dir.path(), &digest, bytes.len() as u64);
        let (good, text) = own.machine.copy(&own.tenants[0].1, dir.path(), "evil/fifo:1");
        if !good {
            eprintln!("the FIFO was not accepted: {}", text.lines().last().unwrap_or_default());
        }
        for n in 0..4 {
            put_app(&own, 0, &format!("fifo-{n}"), "", "image: fifo:1\n").await;
        }
        until(&stop).await;
    })
}
