//! The registry proxy against other tenants, wrong credentials, false claims and full quotas.

use bulkhead::ids::Digest;
use serde_json::{Value, json};

use crate::support::{HTTPD, Image, Machine};

pub(crate) struct Client<'m> {
    pub(crate) machine: &'m Machine,
    pub(crate) http: reqwest::Client,
}

impl Client<'_> {
    /// Requests a token for these scopes, with a registry credential.
    pub(crate) async fn token(&self, robot: &(String, String), scopes: &[&str]) -> Result<String, u16> {
        let query: String = scopes
            .iter()
            .map(|scope| format!("&scope={}", scope.replace(':', "%3A").replace('/', "%2F")))
            .collect();
        let url = format!("{}/auth/token?service=bulkhead-registry{query}", self.machine.address());
        let answer = self.http.get(url).basic_auth(&robot.0, Some(&robot.1)).send().await.unwrap();
        let status = answer.status().as_u16();
        if status != 200 {
            return Err(status);
        }
        Ok(answer.json::<Value>().await.unwrap()["token"].as_str().unwrap().to_owned())
    }

    pub(crate) async fn call(
        &self,
        token: &str,
        method: &str,
        path: &str,
        kind: &str,
        body: Vec<u8>,
    ) -> (u16, String, String) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let url = if path.starts_with("/v2/") {
            format!("{}{path}", self.machine.address())
        } else {
            path.to_owned()
        };
        let answer = self
            .http
            .request(method, url)
            .bearer_auth(token)
            .header("content-type", kind)
            .body(body)
            .send()
            .await
            .unwrap();
        let status = answer.status().as_u16();
        let location =
            answer.headers().get("location").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        (status, location, answer.text().await.unwrap_or_default())
    }

    pub(crate) async fn upload(&self, token: &str, name: &str, bytes: &[u8]) -> (u16, String) {
        let (status, location, text) = self
            .call(token, "POST", &format!("/v2/{name}/blobs/uploads/"), "application/octet-stream", vec![])
            .await;
        assert_eq!(status, 202, "{text}");
        assert!(
            location.starts_with("/v2/"),
            "the address of the registry behind the proxy is hidden: {location}"
        );
        let digest = Digest::of(bytes);
        let sign = if location.contains('?') { '&' } else { '?' };
        let (status, _, text) = self
            .call(
                token,
                "PUT",
                &format!("{location}{sign}digest={digest}"),
                "application/octet-stream",
                bytes.to_vec(),
            )
            .await;
        (status, text)
    }
}

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_project_is_out_of_reach() {
    let machine = Machine::start().await;
    let (acme, evil) = (machine.tenant("acme").await, machine.tenant("evil").await);
    machine.push(&acme, "acme/web:1", &HTTPD);
    let client = Client { machine: &machine, http: bulkhead::outgoing::client().build().unwrap() };
    assert_eq!(client.token(&("acme+ci".into(), "wrong".into()), &[]).await, Err(401));
    assert_eq!(client.token(&("evil+ci".into(), acme.1.clone()), &[]).await, Err(401));
    assert_eq!(client.token(&("engine".into(), acme.1.clone()), &[]).await, Err(401));
    let (good, text) = machine.try_push(&evil, "acme/web:2", &HTTPD);
    assert!(!good, "{text}");
    let token =
        client.token(&evil, &["repository:acme/web:pull,push", "repository:evil/x:pull,push"]).await.unwrap();
    let get = |path: &'static str| client.call(&token, "GET", path, "", vec![]);
    for path in ["/v2/acme/web/tags/list", "/v2/acme/web/manifests/1", "/v2/_catalog"] {
        assert!(matches!(get(path).await.0, 401 | 403), "{path}");
    }
    assert_eq!(get("/v2/evil/../acme/web/tags/list").await.0 / 100, 4);
    // Mounting, in every form of the specification.
    let own = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    let bytes = b"a secret layer of acme".to_vec();
    assert_eq!(client.upload(&own, "acme/web", &bytes).await.0, 201);
    let digest = Digest::of(&bytes);
    let start = "/v2/evil/x/blobs/uploads/";
    for (path, body) in [
        (format!("{start}?mount={digest}&from=acme/web"), Vec::new()),
        (format!("{start}?mount={digest}&from=acme%2Fweb"), Vec::new()),
        (format!("{start}?mount={digest}"), Vec::new()),
        (start.to_owned(), format!("mount={digest}&from=acme/web").into_bytes()),
        (format!("{start}?mount={digest}&from=evil/x&from=acme/web"), Vec::new()),
        (format!("{start}?mount={digest}&from=evil/../acme/web"), Vec::new()),
    ] {
        let (status, _, text) =
            client.call(&token, "POST", &path, "application/x-www-form-urlencoded", body).await;
        assert_ne!(status, 201, "{path}: {text}");
        assert_eq!(
            client.call(&token, "GET", &format!("/v2/evil/x/blobs/{digest}"), "", vec![]).await.0,
            404,
            "{path}"
        );
    }
    // Within one tenant a mount is allowed, and counts the blob's minimum size in the other repository.
    let both = client
        .token(&acme, &["repository:acme/web:pull,push", "repository:acme/other:pull,push"])
        .await
        .unwrap();
    let used = machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64().unwrap();
    let path = format!("/v2/acme/other/blobs/uploads/?mount={digest}&from=acme/web");
    for _ in 0..2 {
        assert_eq!(client.call(&both, "POST", &path, "", vec![]).await.0, 201);
        let now = machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64();
        assert_eq!(now, Some(used + 32_768));
    }
    // A tenant may delete a blob that no manifest needs. A revoked registry credential loses access at once.
    assert_eq!(client.call(&own, "DELETE", &format!("/v2/acme/web/blobs/{digest}"), "", vec![]).await.0, 202);
    let (status, _) = machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/acme/robots/ci", None).await;
    assert_eq!(status, 204);
    assert_eq!(client.call(&own, "GET", "/v2/acme/web/tags/list", "", vec![]).await.0, 401);
    assert_eq!(client.token(&acme, &[]).await, Err(401));
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_and_full_quotas_are_refused() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let client = Client { machine: &machine, http: bulkhead::outgoing::client().build().unwrap() };
    let token = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    let (config, layer) = (br#"{"os":"linux","architecture":"amd64"}"#.to_vec(), vec![0; 1024]);
    for bytes in [&config, &layer] {
        assert_eq!(client.upload(&token, "acme/web", bytes).await.0, 201);
    }
    let good = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(&layer), "size": layer.len()}],
    });
    let put = |text: String, kind: &'static str, tag: &'static str| {
        let (client, token) = (&client, token.clone());
        async move {
            client
                .call(&token, "PUT", &format!("/v2/acme/web/manifests/{tag}"), kind, text.into_bytes())
                .await
        }
    };
    let with = |pointer: &str, value: Value| {
        let mut lie = good.clone();
        *lie.pointer_mut(pointer).unwrap() = value;
        lie.to_string()
    };
    for (lie, what) in [
        (with("/layers/0/size", json!(1)), "a smaller size"),
        (with("/layers/0/size", json!(1_000_000)), "a larger size"),
        (with("/layers/0/digest", json!(Digest::of(b"never pushed"))), "a missing layer"),
        (good.to_string().replacen('{', "{\"Layers\":[],", 1), "a key in other letters"),
        (with("/layers/0/mediaType", json!("no type at all")), "an invalid type"),
        (with("/schemaVersion", json!(1)), "an old schema"),
    ] {
        let (status, _, text) = put(lie, MANIFEST, "1").await;
        assert_eq!(status, 400, "{what}: {text}");
    }
    assert_eq!(put(good.to_string(), "application/vnd.oci.image.index.v1+json", "1").await.0, 400);
    assert_eq!(put(good.to_string(), MANIFEST, "bulkhead-keep").await.0, 403);
    assert_eq!(put(good.to_string(), MANIFEST, "1").await.0, 201);
    // An image that cannot run is refused at deploy, with the reason.
    let (status, body) = machine.deploy("acme", "web", "image: web:1\n").await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-202")), "{body}");
    // So is an image for another platform. An image with root as user runs, with a warning that explains the
    // fix.
    let other = Image { architecture: "arm64", ..Image::of(&HTTPD) };
    assert!(machine.push_image(&acme, "acme/arm:1", &other).0);
    let (status, body) = machine.deploy("acme", "arm", "image: arm:1\n").await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-201")), "{body}");
    let root = Image { user: "", ..Image::of(&HTTPD) };
    assert!(machine.push_image(&acme, "acme/root:1", &root).0);
    let (status, body) = machine.deploy("acme", "root", "image: root:1\nport: 8080\n").await;
    assert_eq!((status, body["warnings"][0]["code"].as_str()), (202, Some("BH-210")), "{body}");
    assert!(body["warnings"][0]["suggestion"].as_str().unwrap().contains("USER 1000"), "{body}");
    let app = machine.running("acme", "root").await;
    let uid = app["observed"]["instances"][0]["uid"].as_i64().unwrap();
    assert_eq!(uid, app["uids"]["start"].as_i64().unwrap() + 1000);
    // Annotations with orders to a container runtime are stored as text, and no such image runs.
    let orders = json!({"run.oci.hooks.stdout": "/etc/nologin", "run.oci.seccomp_bpf_data": "x"});
    let evil = Image { annotations: orders, ..Image::of(&HTTPD) };
    assert!(machine.push_image(&acme, "acme/evil:1", &evil).0);
    let (status, body) = machine.deploy("acme", "evil", "image: evil:1\nport: 8080\n").await;
    assert_eq!((status, body["faults"][0]["code"].as_str()), (422, Some("BH-203")), "{body}");
    assert!(body["faults"][0]["message"].as_str().unwrap().contains("run.oci.hooks.stdout"), "{body}");
    // An expired secret is not valid, and the list shows when a secret was last used.
    let robots = machine.get("/api/v1/tenants/acme/robots").await;
    assert!(
        robots["items"][0]["last_used_at"].is_string() && robots["items"][0]["secret"].is_null(),
        "{robots}"
    );
    machine.sql("UPDATE robot SET expires_at = now() - interval '1 second'");
    assert_eq!(client.token(&acme, &[]).await, Err(401));
    assert_eq!(client.call(&token, "GET", "/v2/acme/web/tags/list", "", vec![]).await.0, 401);
    machine.sql("UPDATE robot SET expires_at = now() + interval '1 day'");
    // The quota stops a push in the middle.
    let used = async || {
        machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64().unwrap()
    };
    let limit = used().await + 1_000_000;
    let (status, _) =
        machine.send("PATCH", "/api/v1/tenants/acme", json!({"quota": {"registry_bytes": limit}})).await;
    assert_eq!(status, 202);
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (status, text) = client.upload(&token, "acme/web", &big).await;
    assert_eq!(status, 403, "{text}");
    assert!(text.contains(&format!("limit {limit} bytes")), "{text}");
    let used = used().await;
    assert!(used < limit);
    // A deleted tag frees its bytes, at once for the manifest.
    let (status, _) =
        machine.ask(&machine.admin, "DELETE", "/api/v1/tenants/acme/repositories/web/tags/1", None).await;
    assert_eq!(status, 204);
    assert!(
        machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64().unwrap() < used
    );
    assert_eq!(client.call(&token, "GET", "/v2/acme/web/manifests/1", "", vec![]).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_was_cut_goes_on_or_begins_anew_and_counts_once() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let quota = json!({"quota": {"registry_bytes": 30_000_000}});
    assert_eq!(machine.send("PATCH", "/api/v1/tenants/acme", quota).await.0, 202);
    let client = Client { machine: &machine, http: bulkhead::outgoing::client().build().unwrap() };
    let token = client.token(&acme, &["repository:acme/web:pull,push"]).await.unwrap();
    let bytes: Vec<u8> = (0..6_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let octets = "application/octet-stream";
    let begin = || client.call(&token, "POST", "/v2/acme/web/blobs/uploads/", octets, vec![]);
    // serve dies between two chunks; the client continues at its offset.
    let (status, location, _) = begin().await;
    assert_eq!(status, 202);
    let (status, mut location, _) =
        client.call(&token, "PATCH", &location, octets, bytes[..2_000_000].to_vec()).await;
    assert_eq!(status, 202);
    machine.kill("serve");
    let begun = std::time::Instant::now();
    while machine.try_ask("GET", "/readyz", &[], "").await.is_none() {
        assert!(begun.elapsed().as_secs() < 30, "serve does not restart");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let (status, next, text) =
        client.call(&token, "PATCH", &location, octets, bytes[2_000_000..].to_vec()).await;
    assert_eq!(status, 202, "{text}");
    location = next;
    let finish = |location: String, digest: Digest| {
        let sign = if location.contains('?') { '&' } else { '?' };
        let (client, token) = (&client, token.clone());
        async move {
            client.call(&token, "PUT", &format!("{location}{sign}digest={digest}"), octets, vec![]).await
        }
    };
    assert_eq!(finish(location, Digest::of(&bytes)).await.0, 201);
    // The client repeatedly dies during a chunk: it announces 20,000,000 bytes and sends some. The sent bytes
    // count while the registry keeps them, and no more: the quota still fits a push.
    let other: Vec<u8> = bytes.iter().rev().copied().collect();
    for _ in 0..4 {
        let (_, location, _) = begin().await;
        let port = machine.port;
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let head = format!(
            "PATCH {location} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: {octets}\r\nContent-Length: 20000000\r\n\r\n"
        );
        std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
        std::io::Write::write_all(&mut stream, &other[..3_000_000]).unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        drop(stream);
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    }
    let (status, text) = client.upload(&token, "acme/web", &other).await;
    assert_eq!(status, 201, "{text}");
    let used = machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64();
    assert_eq!(used, Some(12_000_000), "counted once, without the cut chunks");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deployed_while_its_tag_is_deleted_is_refused_or_stays() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let client = Client { machine: &machine, http: bulkhead::outgoing::client().build().unwrap() };
    let (mut stayed, mut went) = (0, 0);
    for n in 0..12 {
        machine.push(&acme, &format!("acme/web:{n}"), &["/bin/busybox", "sleep", &format!("{}", 1000 + n)]);
        let tag = format!("/api/v1/tenants/acme/repositories/web/tags/{n}");
        let image = format!("image: web:{n}\ninstances: 0\n");
        let deploy = async { machine.deploy("acme", "web", &image).await };
        let delete = async {
            tokio::time::sleep(std::time::Duration::from_millis(25 * n)).await;
            machine.ask(&machine.admin, "DELETE", &tag, None).await
        };
        let ((status, answer), (deleted, _)) = futures_util::future::join(deploy, delete).await;
        let token = client.token(&acme, &["repository:acme/web:pull"]).await.unwrap();
        if status == 202 {
            stayed += 1;
            let path = format!("/v2/acme/web/manifests/{}", answer["digest"].as_str().unwrap());
            assert_eq!(client.call(&token, "GET", &path, "", vec![]).await.0, 200, "round {n}: {deleted}");
        } else {
            went += 1;
            assert_eq!((status, answer["faults"][0]["code"].as_str()), (422, Some("BH-200")), "{answer}");
            assert_eq!(deleted, 204);
        }
    }
    println!("{stayed} stayed, {went} went");
    assert_eq!(stayed + went, 12);
    // Cached facts of an image do not outlive the image, by tag or by digest. Another tenant has no access to
    // them.
    machine.push(&acme, "acme/web:known", &["/bin/busybox", "sleep", "900"]);
    let path = "/api/v1/tenants/acme/apps/known?dry_run=true";
    let look = async |tenant: &str, image: &str| {
        let spec = format!("spec: v1\nname: known\nimage: {image}\ncpu: 50m\nmemory: 64Mi\ninstances: 0\n");
        let path = path.replace("acme", tenant);
        machine.ask(&machine.admin, "PUT", &path, Some(("application/yaml", spec))).await
    };
    let (status, seen) = look("acme", "web:known").await;
    assert_eq!(status, 200, "{seen}");
    let digest = format!("web@{}", seen["digest"].as_str().unwrap());
    assert_eq!(look("acme", &digest).await.0, 200);
    machine.tenant("evil").await;
    assert_eq!(look("evil", &digest).await.0, 422);
    let tag = "/api/v1/tenants/acme/repositories/web/tags/known";
    assert_eq!(machine.ask(&machine.admin, "DELETE", tag, None).await.0, 204);
    for image in ["web:known", digest.as_str()] {
        let (status, answer) = look("acme", image).await;
        assert_eq!((status, answer["faults"][0]["code"].as_str()), (422, Some("BH-200")), "{answer}");
    }
}
