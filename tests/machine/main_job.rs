//! The tour of the README: onboard, push, deploy, inspect, change, roll back, delete, offboard.

use serde_json::json;

use crate::support::{HTTPD, Machine, run};

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomers_tour_from_onboarding_to_leaving() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    let tenant = machine.get("/api/v1/tenants/acme").await;
    assert_eq!(
        tenant["uid_ranges"][0]["end"].as_i64().unwrap() - tenant["uid_ranges"][0]["start"].as_i64().unwrap(),
        65_536
    );
    // A missing image is reported before anything is written.
    let (status, body) = machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-200")), "{body}");
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.push(&robot, "acme/web:2", &["/bin/busybox", "httpd", "-f", "-v", "-p", "8080", "-h/www"]);
    let (status, dry) = machine
        .ask(
            &machine.admin,
            "PUT",
            "/api/v1/tenants/acme/apps/web?dry_run=true",
            Some((
                "application/json",
                json!({"spec": "v1", "name": "web", "image": "web:1", "cpu": 0.05, "memory": "64Mi"})
                    .to_string(),
            )),
        )
        .await;
    assert_eq!((status, dry["would"].as_str()), (200, Some("create")), "{dry}");
    let (status, _) = machine.ask(&machine.admin, "GET", "/api/v1/tenants/acme/apps/web", None).await;
    assert_eq!(status, 404, "a dry run changes nothing");

    let health = "port: 8080\ninstances: 2\nhealth: { http: { path: / }, grace: 5 }\n";
    let (status, body) = machine.deploy("acme", "web", &format!("image: web:1\n{health}")).await;
    assert_eq!((status, body["revision"].as_i64()), (202, Some(1)), "{body}");
    let app = machine.running("acme", "web").await;
    let instances = app["observed"]["instances"].as_array().unwrap();
    assert_eq!(instances.len(), 2);
    let (start, end) = (app["uids"]["start"].as_i64().unwrap(), app["uids"]["end"].as_i64().unwrap());
    for instance in instances {
        let uid = instance["uid"].as_i64().unwrap();
        assert_eq!(uid, start + 1000, "the image's user, by name, inside the block");
        assert!(uid < end);
    }
    let owner = machine.get(&format!("/api/v1/uids/{}", start + 1000)).await;
    assert_eq!((owner["tenant"].as_str(), owner["app"]["name"].as_str()), (Some("acme"), Some("web")));
    // The same spec again changes nothing.
    let (status, again) = machine.deploy("acme", "web", &format!("image: web:1\n{health}")).await;
    assert_eq!((status, again["changed"].as_bool()), (200, Some(false)));

    // A new release, then a rollback. A client with an outdated generation gets an error.
    let stale = machine
        .try_ask(
            "PUT",
            "/api/v1/tenants/acme/apps/web",
            &[("content-type", "application/yaml"), ("if-match", "\"7\"")],
            "spec: v1\nname: web\nimage: web:2\ncpu: 50m\nmemory: 64Mi\n",
        )
        .await
        .unwrap();
    assert_eq!((stale.0, stale.1["code"].as_str()), (412, Some("BH-412")), "{}", stale.1);
    let (status, _) = machine.deploy("acme", "web", &format!("image: web:2\n{health}")).await;
    assert_eq!(status, 202);
    let second = machine.running("acme", "web").await;
    assert_ne!(second["image"]["digest"], app["image"]["digest"]);
    let (status, back) =
        machine.send("POST", "/api/v1/tenants/acme/apps/web/releases", json!({"revision": 1})).await;
    assert_eq!((status, back["revision"].as_i64()), (202, Some(3)), "{back}");
    let third = machine.running("acme", "web").await;
    assert_eq!(third["image"]["digest"], app["image"]["digest"]);
    // The image of a deployed app stays; the tag list names the app.
    let tags = machine.get("/api/v1/tenants/acme/repositories/web/tags").await;
    assert_eq!(tags["items"][0]["apps"], json!(["web"]));
    let (status, _) =
        machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/acme/repositories/web/tags/1", None).await;
    assert_eq!(status, 409);

    // During a suspension nothing runs and nothing is lost.
    let (status, _) = machine.ask(&machine.admin, "PUT", "/api/v1/tenants/acme/suspension", None).await;
    assert_eq!(status, 202);
    machine
        .wait("acme", "web", 30, |app| app["observed"]["instances"].as_array().is_some_and(Vec::is_empty))
        .await;
    let (status, _) = machine.deploy("acme", "web", &format!("image: web:2\n{health}")).await;
    assert_eq!(status, 409);
    let (status, _) = machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/acme/suspension", None).await;
    assert_eq!(status, 202);
    machine
        .wait("acme", "web", 30, |app| app["observed"]["instances"].as_array().is_some_and(|i| i.len() == 2))
        .await;
    machine.running("acme", "web").await;

    leave(&machine).await;
}

async fn leave(machine: &Machine) {
    let (status, _) =
        machine.send("PUT", "/api/v1/tenants/acme/offboarding", json!({"confirm": "other"})).await;
    assert_eq!(status, 422);
    let (status, _) =
        machine.send("PUT", "/api/v1/tenants/acme/offboarding", json!({"confirm": "acme"})).await;
    assert_eq!(status, 202);
    let mut rounds = 0;
    loop {
        let steps = machine.get("/api/v1/tenants/acme/offboarding").await;
        if steps["state"] == "offboarded" {
            assert!(steps["steps"].as_array().unwrap().iter().all(|step| step["state"] == "done"), "{steps}");
            break;
        }
        rounds += 1;
        assert!(rounds < 150, "{steps}\n{}", machine.tail("serve"));
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    assert_eq!(machine.podman(&["ps", "-aq"]).1.trim(), "");
    let bridge = format!("bk{}0", machine.id);
    assert!(!run("ip", &["link", "show", &bridge]).0, "the bridge is gone");
    let (status, body) = machine.send("POST", "/api/v1/tenants", json!({"name": "acme"})).await;
    assert_eq!((status, body["code"].as_str()), (409, Some("BH-409")), "a name is never reused");
    let pool = machine.get("/api/v1/uid-ranges").await;
    assert_eq!(pool["items"][0]["state"], "burnt");
}
