//! Answers to invalid requests.

use serde_json::json;

use crate::support::Machine;

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_explained_and_changes_nothing() {
    let machine = Machine::start().await;
    let (status, body) =
        machine.send("POST", "/api/v1/tenants", json!({"name": "Bad!", "quota": {"cpu": 4000}})).await;
    assert_eq!(status, 422);
    let paths: Vec<_> =
        body["faults"].as_array().unwrap().iter().map(|f| f["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["name", "quota.cpu"]);
    let hidden = json!({"name": "acme", "display_name": "Acme \u{202e}gro.live"});
    assert_eq!(machine.send("POST", "/api/v1/tenants", hidden).await.0, 422);
    machine.tenant("acme").await;
    let path = "/api/v1/tenants/acme/apps/web";
    let put = |kind: &'static str, text: String| machine.ask(&machine.admin, "PUT", path, Some((kind, text)));
    let (status, body) =
        put("application/yaml", "spec: v1\nname: web\nprivileged: true\nmemry: 1Gi\n".into()).await;
    assert_eq!(status, 422);
    assert!(body["faults"].as_array().unwrap().len() >= 4, "{body}");
    assert_eq!(put("text/plain", "x".into()).await.0, 400);
    assert_eq!(put("application/json", "{".into()).await.0, 422);
    assert_eq!(put("application/json", format!("{{\"a\":\"{}\"}}", "x".repeat(200_000))).await.0, 413);
    assert_eq!(machine.get("/api/v1/tenants/acme/apps").await["items"], json!([]));
    assert_eq!(machine.ask(&machine.admin, "GET", "/api/v1/tenants?limit=0", None).await.0, 400);
    assert_eq!(machine.ask(&machine.admin, "GET", "/api/v1/tenants?cursor=%21", None).await.0, 400);
    assert_eq!(machine.ask(&machine.admin, "GET", "/api/v1/tenants?nonsense=1", None).await.0, 400);
    // A repeated request gets the same answer and is not executed again.
    let http = bulkhead::outgoing::client().build().unwrap();
    let post = |name: &str| {
        http.post(format!("{}/api/v1/tenants", machine.address()))
            .bearer_auth(&machine.admin)
            .header("idempotency-key", "k1")
            .json(&json!({"name": name}))
            .send()
    };
    assert_eq!(post("once").await.unwrap().status(), 202);
    assert_eq!(post("once").await.unwrap().status(), 202);
    assert_eq!(post("other").await.unwrap().status(), 409);
    // Lists have pages, and every row appears once.
    let (mut names, mut path) = (Vec::new(), "/api/v1/tenants?limit=1".to_owned());
    loop {
        let page = machine.get(&path).await;
        names.extend(
            page["items"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_owned()),
        );
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/api/v1/tenants?limit=1&cursor={next}");
    }
    assert_eq!(names, ["acme", "once"]);
    // A body of 100 MB is refused while it arrives; memory does not grow with it.
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(100_000_000).unwrap();
    let before = machine.memory("VmHWM:");
    let (_, code) = crate::support::run(
        "curl",
        &[
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-X",
            "PUT",
            "-H",
            "Content-Type: application/yaml",
            "-H",
            &format!("Authorization: Bearer {}", machine.admin),
            "--data-binary",
            &format!("@{}", large.display()),
            &format!("{}{path}", machine.address(), path = "/api/v1/tenants/acme/apps/web"),
        ],
    );
    assert_eq!(code, "413");
    assert!(machine.memory("VmHWM:") < before + 8_000, "{before} kB, then {}", machine.memory("VmHWM:"));
    // A token is valid until it expires.
    let token = machine.token(&["--tenant", "acme", "--name", "short"]);
    assert_eq!(machine.ask(&token, "GET", "/api/v1/tenants/acme", None).await.0, 200);
    machine.sql("UPDATE api_token SET expires_at = now() - interval '1 second' WHERE name = 'short'");
    assert_eq!(machine.ask(&token, "GET", "/api/v1/tenants/acme", None).await.0, 401);
    let denied = machine.sql("SELECT count(*) FROM audit WHERE action IN ('tenant.onboard', 'token.create')");
    assert!(denied.parse::<i64>().unwrap() >= 4, "the audit log has every change");
}
