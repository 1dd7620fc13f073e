//! Processes that die in the middle of a step. An accepted change is carried out exactly once; a change that
//! was not accepted leaves nothing behind. Each point is exact: the process ends itself there (feature
//! `failpoints`).

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{HTTPD, Machine, run};

/// Returns the command of the n-th image: a different digest each time.
fn command(n: usize) -> Vec<String> {
    let mut command: Vec<String> = HTTPD.iter().map(ToString::to_string).collect();
    command.extend(["-r".into(), format!("release{n}")]);
    command
}

fn push(machine: &Machine, robot: &(String, String), image: &str, n: usize) {
    let command = command(n);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let begun = Instant::now();
    loop {
        let (good, text) = machine.try_push(robot, image, &command);
        if good {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{text}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_a_deploy_may_be_the_last() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let points = [
        ("serve", "apps::deploy_resolved"),
        ("serve", "apps::deploy_commit"),
        ("serve", "apps::deploy_committed"),
        ("serve", "reconcile::claimed"),
        ("serve", "apps::kept"),
        ("serve", "apps::ensured"),
        ("serve", "reconcile::finish"),
        ("agent", "agent::pulled"),
        ("agent", "agent::save"),
        ("agent", "agent::create"),
        ("agent", "agent::init"),
        ("agent", "agent::start"),
        ("agent", "agent::stop"),
    ];
    push(&machine, &robot, "acme/web:0", 0);
    let spec = |n: usize| {
        format!(
            "spec: v1\nname: web\nimage: web:{n}\ncpu: 50m\nmemory: 64Mi\nstop_grace: 1\nport: 8080\nhealth: {{ http: {{ path: / }} }}\n"
        )
    };
    let path = "/api/v1/tenants/acme/apps/web";
    let yaml = [("content-type", "application/yaml")];
    let (status, _) = machine.insist("PUT", path, &yaml, &spec(0)).await;
    assert_eq!(status, 202);
    machine.running("acme", "web").await;
    for (n, (process, point)) in points.into_iter().enumerate() {
        let n = n + 1;
        push(&machine, &robot, &format!("acme/web:{n}"), n);
        let deaths = machine.deaths(process);
        machine.arm(process, point).await;
        let (status, answer) = machine.insist("PUT", path, &yaml, &spec(n)).await;
        assert!(matches!(status, 200 | 202), "{point}: {answer}");
        assert_eq!(answer["revision"].as_u64(), Some(n as u64 + 1), "{point}: one release for one change");
        let app = machine
            .wait("acme", "web", 60, |app| {
                app["state"] == "running"
                    && app["observed"]["revision"].as_u64() == Some(n as u64 + 1)
                    && app["observed"]["instances"].as_array().is_some_and(|all| all.len() == 1)
            })
            .await;
        assert_eq!(machine.deaths(process), deaths + 1, "{point} was passed and {process} died there");
        let container = app["observed"]["instances"][0]["container"].as_str().unwrap().to_owned();
        let (_, all) = machine.podman(&["ps", "-a", "--format", "{{.Names}}"]);
        assert_eq!(
            all.split_whitespace().collect::<Vec<_>>(),
            [container.as_str()],
            "{point}: nothing is left over"
        );
        let tenant = machine.get("/api/v1/tenants/acme").await;
        assert_eq!(tenant["quota"]["instances"]["used"], json!(2), "{point}: reserved once");
    }
    // Older images are no longer needed: only those of the last two releases may remain.
    let begun = Instant::now();
    loop {
        let (_, images) = machine.podman(&["images", "-q", "--no-trunc"]);
        if images.split_whitespace().count() <= 1 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{images}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_onboarding_and_leaving_may_be_the_last() {
    let machine = Machine::start().await;
    for (n, (process, point)) in
        [("serve", "tenants::onboard_commit"), ("serve", "tenants::ensured"), ("agent", "agent::journal")]
            .into_iter()
            .enumerate()
    {
        machine.arm(process, point).await;
        let body = json!({"name": format!("tenant-{n}")}).to_string();
        let key = format!("onboard-{n}");
        let headers = [("content-type", "application/json"), ("idempotency-key", key.as_str())];
        let (status, answer) = machine.insist("POST", "/api/v1/tenants", &headers, &body).await;
        assert_eq!(status, 202, "{point}: {answer}");
        let again = machine.insist("POST", "/api/v1/tenants", &headers, &body).await;
        assert_eq!(again, (status, answer), "{point}: the same answer to the same request");
        let begun = Instant::now();
        loop {
            let (_, tenant) = machine.insist("GET", &format!("/api/v1/tenants/tenant-{n}"), &[], "").await;
            let ready = tenant["conditions"].as_array().is_some_and(|all| {
                ["Network", "Registry", "Converged"]
                    .iter()
                    .all(|wanted| all.iter().any(|c| c["type"] == *wanted && c["status"] == "true"))
            });
            if ready {
                assert_eq!(tenant["uid_ranges"].as_array().map(Vec::len), Some(1), "{point}");
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{point}: {tenant:#}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(machine.deaths(process), if process == "serve" { n + 1 } else { 1 }, "{point}");
    }
    let (_, robot) =
        machine.send("POST", "/api/v1/tenants/tenant-0/robots", json!({"name": "ci", "push": true})).await;
    let robot = (robot["login"].as_str().unwrap().to_owned(), robot["secret"].as_str().unwrap().to_owned());
    push(&machine, &robot, "tenant-0/web:1", 1);
    for point in ["apps::delete_commit", "apps::removed"] {
        let (status, _) = machine.deploy("tenant-0", "web", "image: web:1\n").await;
        assert_eq!(status, 202);
        machine.running("tenant-0", "web").await;
        machine.arm("serve", point).await;
        let path = "/api/v1/tenants/tenant-0/apps/web";
        let (status, answer) = machine.insist("DELETE", path, &[], "").await;
        assert!(matches!(status, 202 | 404), "{point}: {answer}");
        let begun = Instant::now();
        while machine.insist("GET", path, &[], "").await.0 != 404 {
            assert!(begun.elapsed() < Duration::from_secs(60), "{point}\n{}", machine.tail("serve"));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let (_, tenant) = machine.insist("GET", "/api/v1/tenants/tenant-0", &[], "").await;
        assert_eq!(tenant["quota"]["apps"]["used"], json!(0), "{point}: freed once");
        assert_eq!(tenant["quota"]["memory"]["used"], json!(0), "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_a_push_may_be_the_last() {
    let machine = Machine::start().await;
    let (robot, control) = (machine.tenant("acme").await, machine.tenant("control").await);
    for (n, point) in ["registries::blob_commit", "registries::manifest_noted", "registries::manifest_stored"]
        .into_iter()
        .enumerate()
    {
        machine.arm("serve", point).await;
        push(&machine, &robot, &format!("acme/web:{n}"), n);
        assert_eq!(machine.deaths("serve"), n + 1, "{point}");
        push(&machine, &control, &format!("control/web:{n}"), n);
    }
    let used = |tenant: serde_json::Value| tenant["quota"]["registry_bytes"]["used"].as_i64().unwrap();
    let (own, undisturbed) =
        (used(machine.get("/api/v1/tenants/acme").await), used(machine.get("/api/v1/tenants/control").await));
    assert_eq!(own, undisturbed, "nothing is counted twice or forgotten");
    let tags = machine.get("/api/v1/tenants/acme/repositories/web/tags").await;
    assert_eq!(tags["items"].as_array().map(Vec::len), Some(3), "{tags}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_may_die_at_any_time() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    push(&machine, &robot, "acme/web:0", 0);
    let path = "/api/v1/tenants/acme/apps/web";
    for (n, process) in
        ["postgres", "registry", "engine", "prober", "agent", "resolver", "serve"].into_iter().enumerate()
    {
        push(&machine, &robot, &format!("acme/web:{n}"), n);
        let spec = format!(
            "spec: v1\nname: web\nimage: web:{n}\ncpu: 50m\nmemory: 64Mi\nstop_grace: 1\nport: 8080\nhealth: {{ http: {{ path: / }} }}\n"
        );
        let (status, answer) =
            machine.insist("PUT", path, &[("content-type", "application/yaml")], &spec).await;
        assert_eq!(status, 202, "{process}: {answer}");
        machine.kill(process);
        let begun = Instant::now();
        loop {
            let (_, app) = machine.insist("GET", path, &[], "").await;
            if app["state"] == "running" && app["observed"]["revision"].as_u64() == Some(n as u64 + 1) {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(90),
                "{process}: {app:#}\n{}",
                machine.tail("agent")
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let app = machine.app("acme", "web").await;
        assert!(
            machine.fetches(&app["observed"]["instances"][0], &[], "http://127.0.0.1:8080/"),
            "{process}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_brings_everything_back() {
    let mut machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\ninstances: 2\n").await;
    let before = machine.running("acme", "web").await;
    let monitors: Vec<String> = before["observed"]["instances"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|instance| {
            let name = instance["container"].as_str().unwrap();
            let (_, conmon) = machine.podman(&["inspect", "-f", "{{.State.ConmonPid}}", name]);
            [conmon.trim().to_owned(), machine.pid(instance)]
        })
        .collect();
    let (_, sandboxes) = machine.podman(&["ps", "-aq", "--format", "{{.ID}}"]);
    let namespaces: Vec<String> = sandboxes
        .split_whitespace()
        .map(|id| {
            machine.podman(&["inspect", "-f", "{{.NetworkSettings.SandboxKey}}", id]).1.trim().to_owned()
        })
        .collect();
    machine.down();
    // Everything that a reboot removes: processes, namespaces, links, tables, mounts and all data in memory.
    for pid in &monitors {
        run("kill", &["-9", pid]);
    }
    let id = machine.id.clone();
    for namespace in namespaces {
        run("ip", &["netns", "delete", namespace.trim_start_matches("/run/netns/")]);
    }
    run("nft", &["delete", "table", "inet", machine.table().as_str()]);
    run("ip", &["link", "delete", &format!("bk{id}0")]);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut places: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    places.sort_by_key(|place| std::cmp::Reverse(place.len()));
    let own = [machine.data.display().to_string(), format!("/run/bulkhead-{id}")];
    for place in places.into_iter().filter(|place| own.iter().any(|own| place.starts_with(own.as_str()))) {
        run("umount", &["-l", place]);
    }
    std::fs::remove_dir_all(format!("/run/bulkhead-{id}")).unwrap();
    machine.up().await;
    let begun = Instant::now();
    let after = loop {
        let app = machine.running("acme", "web").await;
        let instances = app["observed"]["instances"].as_array().unwrap();
        // The platform's stored state is not the current state yet.
        if instances.len() == 2 && instances.iter().all(|i| i["number"].as_i64() > Some(2)) {
            break app;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{app:#}\n{}", machine.tail("agent"));
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    for instance in after["observed"]["instances"].as_array().unwrap() {
        assert!(machine.fetches(instance, &[], "http://127.0.0.1:8080/"), "{instance:#}");
    }
    assert!(after["events"].to_string().contains("the instance is replaced by"), "{}", after["events"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_of_a_plan_may_be_the_last() {
    let machine = Machine::start().await;
    let world = crate::outside::Outside::new();
    world.serve(9092);
    let robot = machine.tenant("acme").await;
    push(&machine, &robot, "acme/web:1", 1);
    let headers = [("content-type", "application/json")];
    let service = json!({"endpoints": [{"network": world.service(), "port": 9092}]}).to_string();
    assert_eq!(machine.insist("PUT", "/api/v1/services/kafka", &headers, &service).await.0, 201);
    let given = "/api/v1/tenants/acme/services/kafka";
    assert_eq!(machine.insist("PUT", given, &headers, "{}").await.0, 202);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\nconnects: { services: [kafka] }\n").await;
    let seen = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    let place = crate::outside::of(&machine.pid(&seen));
    assert!(crate::outside::greets(&place, world.service(), 9092));
    let mut open = true;
    for (process, point) in [
        ("serve", "networks::planned"),
        ("serve", "networks::plan_committed"),
        ("serve", "networks::applied"),
        ("agent", "agent::flows"),
    ] {
        let deaths = machine.deaths(process);
        machine.arm(process, point).await;
        open = !open;
        let status = if open {
            machine.insist("PUT", given, &headers, "{}").await.0
        } else {
            machine.insist("DELETE", given, &[], "").await.0
        };
        // A repeated revocation finds nothing: the first one was carried out before the process died.
        assert!(matches!(status, 202 | 404), "{point}: {status}");
        let begun = Instant::now();
        loop {
            let there = crate::outside::greets(&place, world.service(), 9092);
            let plan = machine.get("/api/v1/tenants/acme/network/plans").await["items"][0].clone();
            if there == open && plan["state"] == "in_force" && machine.deaths(process) == deaths + 1 {
                let key = if open { "opens" } else { "closes" };
                assert_eq!(plan[key].as_array().map(Vec::len), Some(1), "{point}: {plan}");
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(40), "{point}: {there} {plan}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    // With serve down and a new agent, connections are allowed and denied as before.
    machine.kill("agent");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(crate::outside::greets(&place, world.service(), 9092));
    // One plan for each change, no duplicates, in order.
    let plans = machine.get("/api/v1/tenants/acme/network/plans?limit=200").await;
    let numbers: Vec<i64> =
        plans["items"].as_array().unwrap().iter().map(|plan| plan["number"].as_i64().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a > b), "{numbers:?}");
    let in_force = plans["items"].as_array().unwrap().iter().filter(|plan| plan["state"] == "in_force");
    assert_eq!(in_force.count(), 1, "{plans}");
}
