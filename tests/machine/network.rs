//! Who reaches whom, in packets: services, grants, the outside, and what stays closed whatever is asked for.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::outside::{Live, Outside, greets, of, within};
use crate::support::{HTTPD, Machine, run};

fn address(instance: &Value) -> Ipv4Addr {
    instance["address"].as_str().unwrap().parse().unwrap()
}

async fn instance(machine: &Machine, tenant: &str, app: &str) -> (Ipv4Addr, String) {
    let seen = machine.running(tenant, app).await["observed"]["instances"][0].clone();
    (address(&seen), of(&machine.pid(&seen)))
}

/// Waits until something holds, for at most some seconds; how long it took.
async fn until(seconds: u64, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(seconds), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

async fn two_tenants(machine: &Machine) {
    for name in ["acme", "beta"] {
        let robot = machine.tenant(name).await;
        machine.push(&robot, &format!("{name}/web:1"), &HTTPD);
    }
}

async fn put(machine: &Machine, path: &str, body: Value) -> Value {
    let (status, answer) = machine.send("PUT", path, body).await;
    assert!((200..300).contains(&status), "PUT {path}: {status} {answer}");
    answer
}

async fn delete(machine: &Machine, path: &str) {
    let (status, answer) = machine.ask(&machine.admin, "DELETE", path, None).await;
    assert!((200..300).contains(&status), "DELETE {path}: {status} {answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_for_those_who_may_use_it_and_ask_for_it() {
    let machine = Machine::start().await;
    let world = Outside::new();
    for port in [9092, 9093] {
        world.serve(port);
    }
    world.push(123);
    two_tenants(&machine).await;
    let endpoints = json!([{"network": world.service(), "port": 9092}, {"network": world.service(), "port": 123, "protocol": "udp"}]);
    put(&machine, "/api/v1/services/kafka", json!({"description": "messages", "endpoints": endpoints})).await;
    // Not given: the deploy says so, and what to do.
    let asking = "image: web:1\nport: 8080\nconnects: { services: [kafka] }\n";
    let (status, body) = machine.deploy("acme", "web", asking).await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-427")), "{body}");
    put(&machine, "/api/v1/tenants/acme/services/kafka", json!({})).await;
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("acme", "other", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    let (_, other) = instance(&machine, "acme", "other").await;
    let (_, beta) = instance(&machine, "beta", "web").await;
    assert!(greets(&web, world.service(), 9092), "what is asked for is open: {}", machine.tail("agent"));
    assert!(!greets(&web, world.service(), 9093), "on its port alone");
    assert!(!greets(&other, world.service(), 9092), "an app that does not ask gets nothing");
    assert!(!greets(&beta, world.service(), 9092), "nor a tenant that may not");
    for closed in [world.metadata(), world.private(), world.allowed()] {
        assert!(!greets(&web, closed, 9092), "{closed}");
    }
    // Its name is known to who asked, and to nobody else.
    let hosts = async |tenant: &str, app: &str| {
        let name = machine.running(tenant, app).await["observed"]["instances"][0]["container"].clone();
        machine.podman(&["exec", name.as_str().unwrap(), "/bin/busybox", "cat", "/etc/hosts"]).1
    };
    assert!(hosts("acme", "web").await.contains(&format!("{} kafka", world.service())));
    assert!(!hosts("acme", "other").await.contains("kafka"));
    // The answer from the plan, and the record of what was tried in vain, with the reason.
    let reach = machine.get("/api/v1/tenants/acme/apps/web/reach?to=kafka&port=9092").await;
    assert_eq!((&reach["open"], &reach["in_force"]), (&json!(true), &json!(true)), "{reach}");
    let path = format!("/api/v1/tenants/acme/apps/other/reach?to={}&port=9092", world.service());
    let reach = machine.get(&path).await;
    assert!(
        reach["open"] == false && reach["ask"].as_str().unwrap().contains("connects.services"),
        "{reach}"
    );
    // Tried: the service answers (who it is, no probe can know), the other app is refused at once.
    let tried = |app: &str, to: String, port: u16| {
        format!("/api/v1/tenants/acme/apps/{app}/reach?to={to}&port={port}")
    };
    let (_, probe) = machine.send("POST", &tried("web", "kafka".into(), 9092), json!({})).await;
    assert_eq!((&probe["probe"], &probe["agrees"]), (&json!("opened"), &json!(true)), "{probe}");
    for closed in [world.service(), world.metadata(), world.private(), world.allowed()] {
        let (_, probe) = machine.send("POST", &tried("other", closed.to_string(), 9092), json!({})).await;
        assert_eq!(
            (&probe["probe"], &probe["agrees"]),
            (&json!("prohibited"), &json!(true)),
            "{closed}: {probe}"
        );
    }
    // What the platform tried itself is not told as the app's doing; what the app tries is.
    let begun = Instant::now();
    loop {
        assert!(!greets(&other, world.service(), 9092));
        let denied = machine.get("/api/v1/tenants/acme/apps/other/denied").await;
        let told = denied["items"].as_array().unwrap().iter().any(|item| {
            item["target"] == json!(world.service())
                && item["port"] == 9092
                && item["why"].to_string().contains("kafka")
        });
        if told {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{denied}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // Taken away: what runs is cut, over TCP and over UDP, where only the service still sends.
    let tcp = Live::tcp(&web, world.service(), 9092);
    let udp = Live::udp(&web, world.service(), 123);
    until(5, "both live", || tcp.rounds() > 3 && udp.rounds() > 3).await;
    delete(&machine, "/api/v1/tenants/acme/services/kafka").await;
    until(5, "closed", || !greets(&web, world.service(), 9092)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = (tcp.rounds(), udp.rounds());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((tcp.rounds(), udp.rounds()), before, "nothing passes any more, in either direction");
    // The plan says what it closed, and who decided it.
    let plans = machine.get("/api/v1/tenants/acme/network/plans").await;
    let newest = &plans["items"][0];
    assert_eq!(newest["state"], "in_force", "{newest}");
    assert!(newest["closes"].to_string().contains("web to the service kafka"), "{newest}");
    assert!(newest["causes"].to_string().contains("no longer use the service kafka"), "{newest}");
    assert_eq!(newest["opens"], json!([]));
    // And what was opened before, by which deploy.
    let all = plans["items"].to_string();
    assert!(all.contains("web is deployed"), "{all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_app_is_reached_only_while_both_agree() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("beta", "api", "image: web:1\nport: 8080\n").await.0, 202);
    let (api, _) = instance(&machine, "beta", "api").await;
    let asking = "image: web:1\nport: 8080\nconnects: { apps: [beta/api] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 422, "nothing is offered");
    // An offer to nobody and an offer to somebody are answered alike.
    let offer = |to: &str| json!({"app": "api", "tenant": to, "to_app": "web"});
    let (status, nobody) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("nobody-here")).await;
    let (also, grant) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("acme")).await;
    assert_eq!((status, also), (201, 201), "{nobody} {grant}");
    assert_eq!(
        nobody.as_object().unwrap().keys().collect::<Vec<_>>(),
        grant.as_object().unwrap().keys().collect::<Vec<_>>()
    );
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 422, "an offer alone opens nothing");
    let received = machine.get("/api/v1/tenants/acme/grants/received").await;
    assert_eq!(received["items"][0]["tenant"], "beta", "{received}");
    let id = received["items"][0]["id"].as_i64().unwrap();
    // Deployed first without it, so that accepting is what opens it: the second app names nothing.
    put(&machine, &format!("/api/v1/tenants/acme/grants/{id}/acceptance"), json!({})).await;
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    assert!(greets(&web, api, 8080), "both agree: {}", machine.tail("agent"));
    assert!(!greets(&web, api, 8081));
    // Tried by the platform itself: seen at the other side, in its own list of sockets.
    let reach = |to: &str, port: u16| format!("/api/v1/tenants/acme/apps/web/reach?to={to}&port={port}");
    let (_, probe) = machine.send("POST", &reach("beta/api", 8080), json!({})).await;
    assert_eq!((&probe["probe"], &probe["agrees"]), (&json!("reached"), &json!(true)), "{probe}");
    let (_, probe) = machine.send("POST", &reach(&api.to_string(), 8081), json!({})).await;
    assert_eq!((&probe["probe"], &probe["agrees"]), (&json!("prohibited"), &json!(true)), "{probe}");
    // The same for people at a terminal.
    let ask = |to: &str, port: &str| {
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["net", "can-reach", "acme/web", to, port, "--probe", "--url", &machine.address()])
            .env("BULKHEAD_TOKEN", &machine.admin)
            .output()
            .unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    let (code, words) = ask("beta/api", "8080");
    assert!(code == Some(0) && words.contains("tried: reached"), "{words}");
    let (code, words) = ask("169.254.169.254", "80");
    assert!(code == Some(1) && words.contains("link-local"), "{words}");
    let (own, _) = instance(&machine, "acme", "web").await;
    let (_, beta) = instance(&machine, "beta", "api").await;
    assert!(!greets(&beta, own, 8080), "in one direction alone");
    // Another app of the same tenant may not even name it into being: it was granted to `web`.
    assert_eq!(machine.deploy("acme", "spy", asking).await.0, 202);
    let (_, spy) = instance(&machine, "acme", "spy").await;
    assert!(!greets(&spy, api, 8080), "it was granted to one app");
    // The giver changes the port: the grant is of the app, so the new port is what is open.
    assert_eq!(
        machine
            .deploy(
                "beta",
                "api",
                "image: web:1\nport: 8082\ncommand: [/bin/busybox, httpd, -f, -p, '8082', -h/www]\n"
            )
            .await
            .0,
        202
    );
    let (api, _) = instance(&machine, "beta", "api").await;
    until(10, "the new port", || greets(&web, api, 8082)).await;
    // From accepted to through: ended by the receiver, offered and accepted anew.
    delete(&machine, &format!("/api/v1/tenants/acme/grants/{id}")).await;
    until(5, "given back", || !greets(&web, api, 8082)).await;
    delete(&machine, &format!("/api/v1/tenants/beta/grants/{id}")).await;
    let (_, grant) = machine.send("POST", "/api/v1/tenants/beta/grants", offer("acme")).await;
    let id = grant["id"].as_i64().unwrap();
    put(&machine, &format!("/api/v1/tenants/acme/grants/{id}/acceptance"), json!({})).await;
    let took = until(5, "open again", || greets(&web, api, 8082)).await;
    println!("from accepted to through: {} ms", took.as_millis());
    // The giver withdraws alone.
    delete(&machine, &format!("/api/v1/tenants/beta/grants/{id}")).await;
    until(5, "withdrawn", || !greets(&web, api, 8082)).await;
    let plans = machine.get("/api/v1/tenants/acme/network/plans").await;
    assert!(
        plans["items"][0]["causes"].to_string().contains("the grant of beta/api is withdrawn"),
        "{plans}"
    );
    // Nobody else sees any of it.
    let eve = machine.tenant("gamma").await;
    drop(eve);
    let none = machine.get("/api/v1/tenants/gamma/grants/received").await;
    assert_eq!(none["items"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outside_is_open_where_it_was_approved_and_until_then() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(443);
    two_tenants(&machine).await;
    let asked = json!({"network": world.allowed(), "ports": [443], "reason": "to be paid"});
    put(&machine, "/api/v1/tenants/acme/egress/payments", asked).await;
    let asking = "image: web:1\nport: 8080\nconnects: { egress: [payments] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 422, "asked for is not approved");
    let waiting = machine.get("/api/v1/egress").await;
    assert_eq!(
        (&waiting["items"][0]["tenant"], &waiting["items"][0]["reason"]),
        (&json!("acme"), &json!("to be paid"))
    );
    let id = waiting["items"][0]["id"].clone();
    // What was looked at is what is decided: something else under the same name is not.
    let other = json!({"id": id.as_i64().unwrap() + 1, "approved": true});
    let (status, answer) = machine.send("PUT", "/api/v1/tenants/acme/egress/payments/decision", other).await;
    assert_eq!(status, 409, "{answer}");
    let decision = json!({"id": id, "approved": true, "days": 1});
    put(&machine, "/api/v1/tenants/acme/egress/payments/decision", decision).await;
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    assert!(greets(&web, world.allowed(), 443), "{}", machine.tail("agent"));
    for closed in [world.other(), world.service(), world.private(), world.metadata()] {
        assert!(!greets(&web, closed, 443), "{closed}");
    }
    // Nothing comes in from there by itself: its way back leads through this machine.
    let (own, _) = instance(&machine, "acme", "web").await;
    assert!(!greets(&world.place(), own, 8080), "from outside by plain routing");
    // Its time is up.
    let live = Live::tcp(&web, world.allowed(), 443);
    until(5, "live", || live.rounds() > 3).await;
    machine.sql("UPDATE egress_target SET expires_at = now() + interval '2 seconds'; UPDATE work SET due_at = now() WHERE kind = 'network'");
    until(10, "expired", || !greets(&web, world.allowed(), 443)).await;
    let before = live.rounds();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(live.rounds(), before, "what ran over it is cut");
    // What nobody reaches cannot even be asked for.
    for network in [
        "169.254.169.254",
        "10.1.2.3",
        "0.0.0.0/0",
        "168.63.129.16",
        "100.100.100.200",
        "127.0.0.1",
        "10.64.0.2",
        "224.0.0.1",
        "::1",
    ] {
        let body = json!({"network": network, "ports": [443], "reason": "x"});
        let (status, answer) = machine.send("PUT", "/api/v1/tenants/acme/egress/bad", body).await;
        assert_eq!(status, 422, "{network}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forbidden_stays_so_under_replacement_flood_and_forgery() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(9092);
    two_tenants(&machine).await;
    for tenant in ["acme", "beta"] {
        assert_eq!(machine.deploy(tenant, "web", "image: web:1\nport: 8080\n").await.0, 202);
    }
    let (own, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    // A flood of datagrams toward everything that is closed, while the table is replaced again and again.
    let target = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (counted, place) = (std::sync::Arc::clone(&target), beta.clone());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (until_then, ready) = (std::sync::Arc::clone(&stop), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        within(&place, move || {
            let socket = std::net::UdpSocket::bind((foreign, 5000)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            ready.0.send(()).unwrap();
            let mut buffer = [0; 64];
            while !until_then.load(std::sync::atomic::Ordering::Relaxed) {
                if socket.recv_from(&mut buffer).is_ok() {
                    counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            }
        });
    });
    ready.1.recv().unwrap();
    let flooding = std::sync::Arc::clone(&stop);
    let sent = std::thread::spawn(move || {
        within(&web, move || {
            let socket = std::net::UdpSocket::bind((own, 0)).unwrap();
            let mut sent = 0_usize;
            while !flooding.load(std::sync::atomic::Ordering::Relaxed) {
                sent += usize::from(socket.send_to(b"flood", (foreign, 5000)).is_ok());
            }
            sent
        })
    });
    let table = machine.table();
    let dump = run("nft", &["-s", "list", "table", "inet", &table]).1;
    let text = format!("add table inet {table}\ndelete table inet {table}\n{dump}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    for n in 0..200 {
        let (good, words) = run("nft", &["-f", file.path().to_str().unwrap()]);
        assert!(good, "{n}: {words}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let sent = sent.join().unwrap();
    assert!(sent > 1000, "{sent} were sent");
    assert_eq!(target.load(std::sync::atomic::Ordering::Relaxed), 0, "of {sent}");
    println!("0 of {sent} forbidden packets came through 200 replacements");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_host_answers_to_a_tenant() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    // Somebody listens on all addresses of the machine, and says hello to whoever comes.
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = std::io::Write::write_all(&mut &stream, b"hello\n");
        }
    });
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (own, web) = instance(&machine, "acme", "web").await;
    let gateway = Ipv4Addr::from_bits(own.to_bits() & !0x3ff | 1);
    assert!(!greets(&web, gateway, port), "the gateway is the machine, and closed");
    let (_, ours) = run("ip", &["-j", "-4", "addr", "show", "dev", "eth0"]);
    let ours: Value = serde_json::from_str(&ours).unwrap_or_default();
    if let Some(address) = ours[0]["addr_info"][0]["local"].as_str() {
        assert!(!greets(&web, address.parse().unwrap(), port), "nor at its other addresses");
    }
    let doctor = |good: bool| {
        let data = machine.data.display().to_string();
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["doctor", "--data", &data, "-o", "json"])
            .output()
            .unwrap();
        let all: Value = serde_json::from_slice(&done.stdout).unwrap();
        let list = all.as_array().or_else(|| all["findings"].as_array()).unwrap().clone();
        let found = list.into_iter().find(|finding| finding["check"] == "host from within").unwrap();
        assert_eq!(found["status"] == "ok", good, "{found}");
        found.to_string()
    };
    assert!(doctor(true).contains("none but the one for names answers"));
    // The platform's page names it, and says that it was tried.
    let page = machine.ask(&machine.admin, "GET", "/network", None).await.1.to_string();
    assert!(page.contains(&format!(" tcp {port}")) && page.contains("tried from within an app"), "{page}");
    // The check can fail: with the agent held and the table away, the same listener answers.
    machine.signal("agent", "-STOP");
    assert!(run("nft", &["delete", "table", "inet", &machine.table()]).0);
    let open = greets(&web, gateway, port);
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| doctor(false)));
    machine.signal("agent", "-CONT");
    assert!(open, "without the table it is open: so it is the table that closes it");
    assert!(told.unwrap().contains(&format!("port {port}")));
    until(5, "the table is back", || !greets(&web, gateway, port)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_firewall_is_told_and_opens_nothing() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(9092);
    two_tenants(&machine).await;
    put(
        &machine,
        "/api/v1/services/kafka",
        json!({"endpoints": [{"network": world.service(), "port": 9092}]}),
    )
    .await;
    put(&machine, "/api/v1/tenants/acme/services/kafka", json!({})).await;
    let asking = "image: web:1\nport: 8080\nconnects: { services: [kafka] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (_, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    assert!(greets(&web, world.service(), 9092), "{}", machine.tail("agent"));
    let doctor = || {
        let data = machine.data.display().to_string();
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(["doctor", "--data", &data, "-o", "json"])
            .output()
            .unwrap();
        String::from_utf8(done.stdout).unwrap()
    };
    // As Docker, ufw and firewalld do: a chain beside ours, here for this test's bridges alone.
    let table = format!("foreign_{}", machine.id);
    let bridges = format!("bk{}*", machine.id);
    for (policy, reach) in [("accept", true), ("drop", false)] {
        for priority in ["-300", "300"] {
            // A drop policy would stop other tests' packets too: here it is a rule for this test's bridges alone.
            let rule =
                if policy == "drop" { format!("iifname \"{bridges}\" drop") } else { "accept".to_owned() };
            let head = format!("type filter hook forward priority {priority}; policy accept;");
            let body = format!("table inet {table} {{\n chain c {{\n  {head}\n  {rule}\n }}\n}}\n");
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), body).unwrap();
            assert!(run("nft", &["-f", file.path().to_str().unwrap()]).0);
            assert_eq!(greets(&web, world.service(), 9092), reach, "{policy} at {priority}");
            assert!(
                !greets(&beta, world.service(), 9092) && !greets(&web, foreign, 8080),
                "{policy} at {priority}"
            );
            assert!(run("nft", &["delete", "table", "inet", &table]).0);
        }
    }
    assert!(doctor().contains("other firewalls"));
}

/// What busybox' own client is told for a name, from within an app.
async fn look_up(machine: &Machine, tenant: &str, app: &str, name: &str) -> String {
    let container = machine.running(tenant, app).await["observed"]["instances"][0]["container"].clone();
    let script = format!("busybox nslookup -type=a {name} 2>&1");
    machine.podman(&["exec", container.as_str().unwrap(), "/bin/busybox", "sh", "-c", &script]).1
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn a_domain_opens_what_it_leads_to_and_a_lying_resolver_gets_nobody_inside() {
    let machine = Machine::start().await;
    let world = Outside::new();
    world.serve(443);
    let asked = world.names(vec![
        ("pay.example.org", vec![world.allowed()]),
        ("other.example.org", vec![world.other()]),
        // Names that lead inside, alone and among others.
        ("evil.example.org", vec![world.metadata()]),
        (
            "mixed.example.org",
            vec![world.private(), world.allowed(), Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::LOCALHOST],
        ),
        ("empty.example.org", vec![]),
    ]);
    std::fs::write(machine.data.join("resolver.toml"), format!("upstream = [\"{}:53\"]\n", world.far()))
        .unwrap();
    machine.kill("resolver");
    two_tenants(&machine).await;
    for name in ["pay", "evil", "mixed", "empty", "missing"] {
        let wish = json!({"domain": format!("{name}.example.org"), "ports": [443], "reason": "to be paid"});
        let asked = put(&machine, &format!("/api/v1/tenants/acme/egress/{name}"), wish).await;
        let decision = json!({"id": asked["id"], "approved": true});
        put(&machine, &format!("/api/v1/tenants/acme/egress/{name}/decision"), decision).await;
    }
    for bad in ["*.example.org", "example", "EXAMPLE.org", "1.2.3.4", "a..b.org"] {
        let (status, answer) = machine
            .send(
                "PUT",
                "/api/v1/tenants/acme/egress/bad",
                json!({"domain": bad, "ports": [443], "reason": "x"}),
            )
            .await;
        assert_eq!(status, 422, "{bad}: {answer}");
    }
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    let asking =
        "image: web:1\nport: 8080\nconnects: { apps: [api], egress: [pay, evil, mixed, empty, missing] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (own, web) = instance(&machine, "acme", "web").await;
    let (_, other) = instance(&machine, "acme", "api").await;
    let (_, beta) = instance(&machine, "beta", "web").await;
    // Approved, but nobody has asked for the name yet: closed. Asked: open before the answer is there.
    assert!(!greets(&web, world.allowed(), 443));
    let mut told = String::new();
    for _ in 0..30 {
        told = look_up(&machine, "acme", "web", "pay.example.org").await;
        if told.contains(&world.allowed().to_string()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(
        told.contains(&world.allowed().to_string()),
        "{told}\n{}\n{}",
        machine.tail("resolver"),
        machine.tail("agent")
    );
    assert!(greets(&web, world.allowed(), 443), "open as soon as it was told");
    assert!(
        !greets(&web, world.other(), 443)
            && !greets(&other, world.allowed(), 443)
            && !greets(&beta, world.allowed(), 443)
    );
    // Lies: an address inside is never told, and never open.
    let told = look_up(&machine, "acme", "web", "evil.example.org").await;
    assert!(told.contains("SERVFAIL") && !told.contains("169.254."), "{told}");
    let told = look_up(&machine, "acme", "web", "mixed.example.org").await;
    assert!(told.contains(&world.allowed().to_string()), "{told}");
    for inside in [world.private().to_string(), "10.77.0.1".to_owned(), "127.0.0.1".to_owned()] {
        assert!(!told.contains(&inside), "{told}");
    }
    for closed in [world.metadata(), world.private()] {
        assert!(!greets(&web, closed, 443), "{closed}");
    }
    let events = machine.sql("SELECT count(*) FROM machine_event WHERE kind = 'name_refused'");
    assert!(events.parse::<i64>().unwrap() >= 2, "{events}");
    let told = look_up(&machine, "acme", "web", "missing.example.org").await;
    assert!(told.contains("NXDOMAIN"), "{told}");
    // What is not asked for has no name, and nothing of the question leaves the machine.
    for (tenant, app, name) in [
        ("acme", "web", "secret-4711.example.org"),
        ("acme", "web", "secret-4711.pay.example.org"),
        ("acme", "api", "pay.example.org"),
        ("beta", "web", "pay.example.org"),
        ("beta", "web", "api"),
        ("beta", "web", "api.acme"),
    ] {
        let told = look_up(&machine, tenant, app, name).await;
        assert!(told.contains("NXDOMAIN"), "{tenant}/{app} {name}: {told}");
    }
    assert!(!asked.lock().unwrap().iter().any(|name| name.contains("secret")), "{:?}", asked.lock().unwrap());
    // Own apps are found by the same server, without anybody outside.
    let (api, _) = instance(&machine, "acme", "api").await;
    assert!(look_up(&machine, "acme", "web", "api").await.contains(&api.to_string()));
    assert!(!asked.lock().unwrap().iter().any(|name| name == "api"));
    // Another bridge's server does not answer, and one that is asked from nowhere refuses.
    let gateway = |of: Ipv4Addr| Ipv4Addr::from_bits(of.to_bits() & !0x3ff | 1);
    let (foreign, _) = instance(&machine, "beta", "web").await;
    let mine = gateway(own);
    let theirs = gateway(foreign);
    let answered = within(&web, move || {
        let ask = |server: Ipv4Addr| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
            let question = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'a', b'p', b'i', 0, 0, 1, 0, 1];
            let _ = socket.send_to(&question, (server, 53));
            socket.recv(&mut [0; 512]).is_ok()
        };
        (ask(mine), ask(theirs))
    });
    assert_eq!(answered, (true, false));
    // The table is made anew, and the agent: what is open for a while stays so, or is found again.
    assert!(run("nft", &["delete", "table", "inet", &machine.table()]).0);
    until(5, "after a flush", || greets(&web, world.allowed(), 443)).await;
    // The approval ends: closed, live connections too, though the name is still good for a while.
    let live = Live::tcp(&web, world.allowed(), 443);
    until(5, "live", || live.rounds() > 3).await;
    for name in ["pay", "mixed"] {
        delete(&machine, &format!("/api/v1/tenants/acme/egress/{name}")).await;
    }
    until(5, "withdrawn", || !greets(&web, world.allowed(), 443)).await;
    let before = live.rounds();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(live.rounds(), before);
    assert!(look_up(&machine, "acme", "web", "pay.example.org").await.contains("NXDOMAIN"));
}

/// Sets a switch of the kernel and sets it back, also when the test fails.
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

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_cannot_take_each_others_place_with_or_without_br_netfilter() {
    let machine = Machine::start().await;
    two_tenants(&machine).await;
    assert_eq!(machine.deploy("acme", "api", "image: web:1\nport: 8080\n").await.0, 202);
    assert_eq!(machine.deploy("acme", "spy", "image: web:1\nport: 8080\n").await.0, 202);
    let asking = "image: web:1\nport: 8080\nconnects: { apps: [api] }\n";
    assert_eq!(machine.deploy("acme", "web", asking).await.0, 202);
    assert_eq!(machine.deploy("beta", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let (api, _) = instance(&machine, "acme", "api").await;
    let (spy, spy_place) = instance(&machine, "acme", "spy").await;
    let (own, web) = instance(&machine, "acme", "web").await;
    let (foreign, beta) = instance(&machine, "beta", "web").await;
    for value in ["1", "0"] {
        let _switch = Switch::set("/proc/sys/net/bridge/bridge-nf-call-iptables", value);
        assert!(greets(&web, api, 8080), "br_netfilter {value}: what is named is open");
        for (place, target, port) in [
            (&web, api, 8081),
            (&web, spy, 8080),
            (&spy_place, api, 8080),
            (&spy_place, own, 8080),
            (&beta, api, 8080),
            (&web, foreign, 8080),
        ] {
            assert!(!greets(place, target, port), "br_netfilter {value}: {target} {port}");
        }
    }
    // With rights that no app has, from within: the neighbour's address, its card, and shouting both.
    let spy_pid = machine.pid(&machine.running("acme", "spy").await["observed"]["instances"][0]);
    let inside = |args: &[&str]| run("nsenter", &[&["-t", &spy_pid, "-n", "ip"][..], args].concat());
    let octets = api.octets();
    let card = format!("0a:58:{:02x}:{:02x}:{:02x}:{:02x}", octets[0], octets[1], octets[2], octets[3]);
    assert!(inside(&["addr", "add", &format!("{api}/32"), "dev", "eth0"]).0);
    for _ in 0..3 {
        // Every connection that it begins says "I am there" to the machine.
        let (_, _) = run(
            "nsenter",
            &["-t", &spy_pid, "-n", "busybox", "arping", "-c", "1", "-A", "-I", "eth0", &api.to_string()],
        );
        assert!(greets(&web, api, 8080));
    }
    let hello = |place: &str| {
        // Who answers at the address: only the app itself serves this page.
        greets(place, api, 8080)
    };
    assert!(inside(&["link", "set", "dev", "eth0", "address", &card]).0);
    for _ in 0..5 {
        let _ = run(
            "nsenter",
            &["-t", &spy_pid, "-n", "busybox", "arping", "-c", "1", "-A", "-I", "eth0", &api.to_string()],
        );
        assert!(hello(&web), "the app keeps its place");
    }
    // What is meant for the app never comes to the other one: it listens under the stolen address, in vain.
    let stolen = within(&spy_place, move || {
        let listener = std::net::TcpListener::bind((api, 8085)).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        listener.accept().is_ok()
    });
    assert!(!stolen);
    // IPv6 is closed on the bridge, and stays so when somebody opens it there.
    let bridge = format!("bk{}0", machine.id);
    assert!(run("ip", &["-6", "addr", "show", "dev", &bridge]).1.trim().is_empty());
    let listener = std::net::TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = std::io::Write::write_all(&mut &stream, b"hello\n");
        }
    });
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6"), "0").unwrap();
    assert!(run("ip", &["-6", "addr", "add", "fd00:77::1/64", "dev", &bridge, "nodad"]).0);
    let web_pid = machine.pid(&machine.running("acme", "web").await["observed"]["instances"][0]);
    let _ = run("nsenter", &["-t", &web_pid, "-n", "sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"]);
    let _ = run(
        "nsenter",
        &["-t", &web_pid, "-n", "ip", "-6", "addr", "add", "fd00:77::2/64", "dev", "eth0", "nodad"],
    );
    let reached = within(&web, move || {
        let target = std::net::SocketAddr::new("fd00:77::1".parse().unwrap(), port);
        std::net::TcpStream::connect_timeout(&target, Duration::from_secs(1)).is_ok()
    });
    assert!(!reached, "nothing of a tenant's IPv6 is let in");
}
