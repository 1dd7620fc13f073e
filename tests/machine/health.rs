//! Readiness, health and replacement: causes that end an instance, and causes that only delay it.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use bulkhead::driver::podman::namespace::within;
use serde_json::Value;

use crate::support::{HTTPD, Machine};

fn first(app: &Value) -> &Value {
    &app["observed"]["instances"][0]
}

fn shell(script: &str) -> [&str; 4] {
    ["/bin/busybox", "sh", "-c", script]
}

/// Deploys with a stop grace of its own.
async fn slow(machine: &Machine, app: &str, rest: &str) -> Value {
    let spec = format!("spec: v1\nname: {app}\ncpu: 50m\nmemory: 64Mi\n{rest}");
    let path = format!("/api/v1/tenants/acme/apps/{app}");
    let (status, body) = machine.ask(&machine.admin, "PUT", &path, Some(("application/yaml", spec))).await;
    assert_eq!(status, 202, "{body}");
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_alone_is_waited_for_and_ends_nothing() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let httpd = "exec busybox httpd -f -h /www -p";
    for (image, script) in [
        ("late", format!("sleep 24; {httpd} 8080")),
        ("inward", format!("{httpd} 127.0.0.1:8080")),
        ("other", format!("{httpd} 9000")),
        ("none", "exec sleep 1000".to_owned()),
        ("flaps", "sleep 4; exit 3".to_owned()),
    ] {
        machine.push(&robot, &format!("acme/{image}:1"), &shell(&script));
    }
    let begun = Instant::now();
    machine.deploy("acme", "late", "image: late:1\nport: 8080\n").await;
    for (app, image, rest) in [
        ("inward", "inward", "port: 8080\n"),
        ("other", "other", "port: 8080\n"),
        ("none", "none", "port: 8080\nhealth: none\n"),
        ("ill", "none", "port: 8080\nhealth: { tcp: {}, grace: 1 }\n"),
        ("syslog", "none", "port: {port: 5514, protocol: udp}\n"),
        ("client", "none", "connects: { apps: [syslog] }\n"),
        ("flaps", "flaps", ""),
    ] {
        let (status, body) = machine.deploy("acme", app, &format!("image: {image}:1\n{rest}")).await;
        assert_eq!(status, 202, "{app}: {body}");
    }
    // Without a check, or over UDP, nothing delays readiness.
    machine.running("acme", "none").await;
    machine.running("acme", "syslog").await;
    for (app, sign) in [
        ("inward", "listens on 127.0.0.1:8080 only; listen on 0.0.0.0"),
        ("other", "listens on port 9000; write its port in the spec"),
    ] {
        let seen = machine.wait("acme", app, 20, |app| first(app)["why"].is_string()).await;
        assert!(first(&seen)["why"].as_str().unwrap().contains(sign), "{app}: {seen:#}");
        let seen = machine.wait("acme", app, 20, |app| app["summary"].as_str().unwrap().contains(sign)).await;
        assert_eq!((seen["state"].as_str(), first(&seen)["restarts"].as_i64()), (Some("changing"), Some(0)));
    }
    // A failed health check ends the instance; the message states the grace.
    let ill = machine.wait("acme", "ill", 30, |app| first(app)["last_end"]["cause"] == "unhealthy").await;
    let detail = first(&ill)["last_end"]["detail"].as_str().unwrap();
    for sign in ["port 8080", "nothing listens", "grace of 1 s"] {
        assert!(detail.contains(sign), "{detail}");
    }
    // An app that exits repeatedly is not called running in between.
    let flaps = machine.wait("acme", "flaps", 60, |app| app["state"] == "flapping").await;
    assert!(flaps["summary"].as_str().unwrap().contains("times in a row"), "{}", flaps["summary"]);
    // An app that serves UDP is reachable over UDP.
    let server = machine.running("acme", "syslog").await;
    let client = machine.running("acme", "client").await;
    let to = format!("{}:5514", first(&server)["address"].as_str().unwrap());
    let network = |instance: &Value| format!("/proc/{}/ns/net", machine.pid(instance));
    let listener =
        within(&network(first(&server)), || UdpSocket::bind("0.0.0.0:5514")).await.unwrap().unwrap();
    listener.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let asked = Instant::now();
    let from = network(first(&client));
    let mut heard = [0; 16];
    loop {
        let to = to.clone();
        let sent = within(&from, move || UdpSocket::bind("0.0.0.0:0")?.send_to(b"over-udp", to));
        let _ = sent.await.unwrap();
        if listener.recv(&mut heard).is_ok_and(|length| &heard[..length] == b"over-udp") {
            break;
        }
        assert!(asked.elapsed().as_secs() < 20, "nothing arrives over UDP: {}", machine.tail("agent"));
    }
    // The slow app was given its time.
    let late = machine.running("acme", "late").await;
    assert_eq!(first(&late)["restarts"].as_i64(), Some(0), "{late:#}");
    assert!(begun.elapsed() > Duration::from_secs(24), "the app was not marked ready too early");
    assert_eq!(first(&late)["why"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scale_replaces_nothing_and_a_release_waits_for_nobody_who_stops() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let stubborn = "trap '' TERM; busybox httpd -f -p 8080 -h /www & while true; do sleep 1; done";
    machine.push(&robot, "acme/web:1", &shell(stubborn));
    machine.push(&robot, "acme/plain:1", &HTTPD);
    let web = "image: web:1\nport: 8080\nstop_grace: 60\n";
    slow(&machine, "web", web).await;
    let before = machine.running("acme", "web").await;
    let (name, started) = (first(&before)["container"].clone(), first(&before)["started"].clone());
    // More instances, then fewer: the first instance keeps running.
    let three = slow(&machine, "web", &format!("{web}instances: 3\n")).await;
    assert_eq!(three["revision"].as_i64(), Some(2), "{three}");
    let more = machine.running("acme", "web").await;
    let all = more["observed"]["instances"].as_array().unwrap();
    assert_eq!(all.len(), 3, "{more:#}");
    assert!(all.iter().all(|i| i["revision"] == 2), "{more:#}");
    assert!(all.iter().any(|i| i["container"] == name && i["started"] == started), "{more:#}");
    slow(&machine, "web", web).await;
    let fewer = machine
        .wait("acme", "web", 40, |app| {
            let all = app["observed"]["instances"].as_array().unwrap();
            all.iter().filter(|i| i["state"] == "running").count() == 1 && app["observed"]["revision"] == 3
        })
        .await;
    let left =
        fewer["observed"]["instances"].as_array().unwrap().iter().find(|i| i["state"] == "running").unwrap();
    assert_eq!((&left["container"], &left["started"]), (&name, &started));
    // Two releases in a row, while the replaced instances take a minute to stop.
    let begun = Instant::now();
    for value in ["a", "b", "c"] {
        slow(&machine, "web", &format!("{web}env: {{ RELEASE: {value} }}\n")).await;
        let revision = machine.app("acme", "web").await["revision"].clone();
        machine
            .wait("acme", "web", 40, |app| {
                let all = app["observed"]["instances"].as_array().unwrap();
                all.iter().any(|i| i["revision"] == revision && i["state"] == "running")
            })
            .await;
        println!("release {value} runs after {} ms", begun.elapsed().as_millis());
        if value == "b" {
            break;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(40), "the release waited for the old instances");
    // A singleton waits, and its summary says for which instance and until when.
    let single = "image: web:1\nport: 8080\nsingleton: true\nstop_grace: 20\n";
    slow(&machine, "single", single).await;
    machine.running("acme", "single").await;
    slow(&machine, "single", &format!("{single}env: {{ A: b }}\n")).await;
    let waits = machine
        .wait("acme", "single", 15, |app| app["summary"].as_str().unwrap().contains("Waits for"))
        .await;
    let summary = waits["summary"].as_str().unwrap();
    assert!(summary.contains("instance 1 to stop, until") && summary.contains("stop_grace"), "{summary}");
}
