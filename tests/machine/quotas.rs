//! Limits on the running platform: old releases are removed while the app runs, and a release that does not
//! start leaves the running one in place.

use serde_json::json;

use crate::support::Machine;

#[tokio::test(flavor = "multi_thread")]
async fn releases_go_while_the_app_runs_and_those_that_run_stay() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.push(&robot, "acme/web:1", &["/bin/busybox", "sleep", "1000"]);
    let quota = json!({"quota": {"releases_kept": 3}});
    assert_eq!(machine.send("PATCH", "/api/v1/tenants/acme", quota).await.0, 202);
    machine.deploy("acme", "web", "image: web:1\n").await;
    let first = machine.running("acme", "web").await;
    assert_eq!(first["observed"]["instances"][0]["revision"], 1, "{first}");
    // None of these starts: the first release keeps running, however many follow.
    for n in 0..8 {
        let body = format!("image: web:1\ncommand: [/nonexistent]\nenv: {{ ROUND: \"{n}\" }}\n");
        let (status, answer) = machine.deploy("acme", "web", &body).await;
        assert_eq!(status, 202, "{answer}");
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    let kept = machine.sql("SELECT string_agg(revision::text, ',' ORDER BY revision) FROM release");
    let kept: Vec<i64> = kept.trim().split(',').map(|text| text.parse().unwrap()).collect();
    assert!(kept.ends_with(&[7, 8, 9]) && kept.contains(&1) && kept.len() <= 6, "{kept:?}");
    let app = machine.app("acme", "web").await;
    assert!(
        app["observed"]["instances"]
            .as_array()
            .unwrap()
            .iter()
            .any(|one| one["revision"] == 1 && one["state"] == "running"),
        "{app}"
    );
    let path = "/api/v1/tenants/acme/apps/web/releases";
    let (status, gone) = machine.send("POST", path, json!({"revision": 3})).await;
    assert_eq!(status, 422, "{gone}");
    assert!(gone["faults"][0]["message"].as_str().unwrap().contains("no longer kept"), "{gone}");
    // The running release can be rolled back to, although it is older than the kept ones.
    let (status, answer) = machine.send("POST", path, json!({"revision": 1})).await;
    assert_eq!(status, 202, "{answer}");
    let app = machine.running("acme", "web").await;
    assert_eq!(app["observed"]["instances"][0]["revision"], 10, "{app}");
    // The limits page shows the usage, which is freed with the app.
    let quota = machine.get("/api/v1/tenants/acme/quota").await["quota"].clone();
    assert_eq!(quota["manifests"]["used"], 1, "{quota}");
    assert_eq!((&quota["tags"]["used"], &quota["repositories"]["used"]), (&json!(1), &json!(1)));
    assert_eq!(quota["apps"]["used"], 1);
    assert!(quota["changes_per_day"]["used"].as_i64().unwrap() >= 11, "{quota}");
}
