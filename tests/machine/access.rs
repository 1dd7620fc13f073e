//! Who gets in where: every route as everybody.

use bulkhead::routes::API;
use serde_json::json;

use crate::support::Machine;

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_everybody_as_its_permission_says() {
    let machine = Machine::start().await;
    machine.tenant("acme").await;
    machine.tenant("evil").await;
    let of = |tenant: &str, role: &str| machine.token(&["--tenant", tenant, "--role", role, "--name", "t"]);
    let auditor = machine.token(&["--auditor", "--name", "t"]);
    let (viewer, deployer, owner, stranger) =
        (of("acme", "viewer"), of("acme", "deployer"), of("acme", "owner"), of("evil", "owner"));
    let reads = |method: &str| method == "GET";
    for (method, path) in API {
        let address = path
            .replace("{tenant}", "acme")
            .replace("{app}", "none")
            .replace("{robot}", "none")
            .replace("{repository}", "none")
            .replace("{tag}", "none")
            .replace("{uid}", "5");
        let in_tenant = path.contains("{tenant}");
        let public = path.contains("/schemas/");
        let credentials = path.contains("/robots") && !reads(method);
        let deploys = (path.contains("/apps") || path.contains("/repositories")) && !reads(method);
        for (who, token) in [
            ("anonymous", ""),
            ("nonsense", "bhk_nonsense"),
            ("stranger", stranger.as_str()),
            ("viewer", &viewer),
            ("deployer", &deployer),
            ("owner", &owner),
            ("auditor", &auditor),
        ] {
            // A body that is refused after the permission was checked, so that nothing changes.
            let (status, body) =
                machine.ask(token, method, &address, Some(("text/plain", String::new()))).await;
            let allowed = match who {
                "auditor" => reads(method),
                "viewer" => in_tenant && reads(method),
                "deployer" => in_tenant && (reads(method) || deploys),
                "owner" => in_tenant && (reads(method) || deploys || credentials),
                _ => false,
            };
            let wanted: &[u16] = match who {
                _ if public => &[200],
                "anonymous" | "nonsense" => &[401],
                "stranger" => &[404],
                "viewer" | "deployer" | "owner" if !in_tenant => &[404],
                _ if allowed => &[200, 202, 204, 400, 404, 422],
                _ => &[403],
            };
            assert!(wanted.contains(&status), "{method} {path} as {who}: {status} {body}");
            if status >= 400 {
                assert_eq!(body["status"], status, "problem+json with the request's id: {body}");
                assert!(
                    body["request_id"].is_string()
                        && body["type"].as_str().unwrap().starts_with("/docs/errors/")
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_admins_link_works_once_and_pages_are_safe() {
    let machine = Machine::start().await;
    let link = std::fs::read_to_string(machine.data.join("secrets/first-admin-link")).unwrap();
    let link = link.trim();
    let http = bulkhead::outgoing::client().build().unwrap();
    let get = http.get(link).send().await.unwrap();
    assert_eq!(get.status(), 200);
    assert!(get.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    assert_eq!(get.headers()["cache-control"], "no-store");
    assert_eq!(http.get(link).send().await.unwrap().status(), 200, "looking does not use it up");
    let foreign = http.post(link).header("origin", "http://evil.example").send().await.unwrap();
    assert_eq!(foreign.status(), 403);
    let used = http.post(link).header("origin", machine.address()).send().await.unwrap();
    assert_eq!(used.status(), 200);
    let cookie = used.headers()["set-cookie"].to_str().unwrap().to_owned();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Lax"), "{cookie}");
    let text = used.text().await.unwrap();
    let token = text.split("bhk_").nth(1).unwrap().split('<').next().unwrap();
    assert_eq!(machine.ask(&format!("bhk_{token}"), "GET", "/api/v1/tenants", None).await.0, 200);
    assert_eq!(http.post(link).header("origin", machine.address()).send().await.unwrap().status(), 404);
    let session = cookie.split(';').next().unwrap();
    let page = |path: &str| {
        http.get(format!("{}{path}", machine.address()))
            .header("cookie", session)
            .header("accept", "text/html")
            .send()
    };
    for path in ["/tenants", "/docs/errors", "/docs/errors/BH-107", "/login"] {
        assert_eq!(page(path).await.unwrap().status(), 200, "{path}");
    }
    let missing = page("/tenants/nobody").await.unwrap();
    assert_eq!(missing.status(), 404);
    assert!(missing.text().await.unwrap().contains("<h1>Not found</h1>"));
    // A sign-in that fails says so on its own page; a form without its field is told as an error.
    let login = |body: &'static str| {
        http.post(format!("{}/login", machine.address()))
            .header("origin", machine.address())
            .header("content-type", "application/x-www-form-urlencoded")
            .header("accept", "text/html")
            .body(body)
            .send()
    };
    let wrong = login("token=bhk_nonsense").await.unwrap();
    assert_eq!(wrong.status(), 401);
    let text = wrong.text().await.unwrap();
    assert!(text.contains("This token is not known") && text.contains("<form"), "{text}");
    let odd = login("tokn=x").await.unwrap();
    assert_eq!(odd.status(), 400);
    assert!(odd.text().await.unwrap().contains("<h1>The request cannot be read</h1>"));
    // A session alone changes nothing without our own page's origin.
    let forged = http
        .post(format!("{}/api/v1/tenants", machine.address()))
        .header("cookie", session)
        .header("origin", "http://evil.example")
        .json(&json!({"name": "forged"}))
        .send()
        .await
        .unwrap();
    assert_eq!(forged.status(), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_explained_and_changes_nothing() {
    let machine = Machine::start().await;
    let (status, body) =
        machine.send("POST", "/api/v1/tenants", json!({"name": "Bad!", "quota": {"cpu": 4}})).await;
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
    // A repeated request is answered again and not done again.
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
    // Lists come in pages, and every row once.
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
    // A body of 100 MB is refused while it comes; memory does not grow with it.
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
    // A token ends with its time.
    let token = machine.token(&["--tenant", "acme", "--name", "short"]);
    assert_eq!(machine.ask(&token, "GET", "/api/v1/tenants/acme", None).await.0, 200);
    machine.sql("UPDATE api_token SET expires_at = now() - interval '1 second' WHERE name = 'short'");
    assert_eq!(machine.ask(&token, "GET", "/api/v1/tenants/acme", None).await.0, 401);
    let denied = machine.sql("SELECT count(*) FROM audit WHERE action IN ('tenant.onboard', 'token.create')");
    assert!(denied.parse::<i64>().unwrap() >= 4, "every change is on record");
}
