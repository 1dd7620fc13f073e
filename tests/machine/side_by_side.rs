//! Two installations on one machine, and a disk that fills up.

use std::time::{Duration, Instant};

use crate::support::{HTTPD, Machine, run};

#[tokio::test(flavor = "multi_thread")]
async fn two_installations_share_nothing() {
    let (one, two) = (Machine::start().await, Machine::start().await);
    let mut seen = Vec::new();
    for machine in [&one, &two] {
        let robot = machine.tenant("acme").await;
        machine.push(&robot, "acme/web:1", &HTTPD);
        machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
        let app = machine.running("acme", "web").await;
        let config = machine.agent_config();
        let start = config["id_pool"]["start"].as_integer().unwrap();
        seen.push((
            app,
            config["network_pool"].as_str().unwrap().to_owned(),
            start,
            config["id_pool"]["size"].as_integer().unwrap(),
        ));
    }
    assert_ne!(one.id, two.id);
    assert_ne!(seen[0].1, seen[1].1, "no subnet is shared");
    assert!(seen[0].2 + seen[0].3 <= seen[1].2 || seen[1].2 + seen[1].3 <= seen[0].2, "no id is shared");
    // The same tenant and app exist on both, and neither reaches the other.
    let target = seen[1].0["observed"]["instances"][0]["address"].as_str().unwrap().to_owned();
    let source = &seen[0].0["observed"]["instances"][0];
    assert!(!one.fetches(source, &[], &format!("http://{target}:8080/")));
    assert!(one.fetches(source, &[], "http://127.0.0.1:8080/"));
    drop(one);
    // Removing one does not affect the other.
    let app = two.running("acme", "web").await;
    assert!(two.fetches(&app["observed"]["instances"][0], &[], "http://127.0.0.1:8080/"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_survived() {
    let machine = Machine::on_a_disk_of("2200m").await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    let before = machine.running("acme", "web").await["observed"]["instances"][0].clone();
    let filler = machine.data.join("filler");
    let (good, text) = run("sh", &["-c", &format!("cat /dev/zero > {} || true", filler.display())]);
    assert!(good, "{text}");
    // New work that cannot be completed is refused or unavailable, never half done.
    let (pushed, _) = machine.try_push(&robot, "acme/other:1", &["/bin/busybox", "sleep", "12345"]);
    assert!(!pushed, "a push onto a full disk");
    let spec = "spec: v1\nname: late\nimage: web:1\ncpu: 50m\nmemory: 64Mi\nstop_grace: 1\n";
    let path = "/api/v1/tenants/acme/apps/late";
    let refused = machine.try_ask("PUT", path, &[("content-type", "application/yaml")], spec).await;
    let pid = machine.pid(&before);
    assert!(machine.fetches(&before, &[], "http://127.0.0.1:8080/"), "running apps continue");
    std::fs::remove_file(&filler).unwrap();
    // With free space again, everything continues by itself.
    let (status, _) = machine.insist("PUT", path, &[("content-type", "application/yaml")], spec).await;
    assert!(matches!(status, 200 | 202), "{refused:?}, then {status}");
    let begun = Instant::now();
    loop {
        let (_, app) = machine.insist("GET", path, &[], "").await;
        if app["state"] == "running" {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{app:#}\n{}", machine.tail("agent"));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    machine.push(&robot, "acme/other:1", &["/bin/busybox", "sleep", "12345"]);
    assert_eq!(machine.pid(&before), pid, "the same process all along");
}
