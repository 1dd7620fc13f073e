//! Artifacts that clients push besides images: attestations, signatures, charts, caches. All are stored,
//! counted, listed, pulled and deleted. Only images run; the refusal of another artifact names its type.

use bulkhead::ids::Digest;
use serde_json::{Value, json};

use crate::registry::{Client, MANIFEST};
use crate::support::{HTTPD, Machine, run};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCTETS: &str = "application/octet-stream";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// A client that pushes to one repository.
struct Pusher<'m> {
    client: Client<'m>,
    token: String,
}

impl<'m> Pusher<'m> {
    async fn of(machine: &'m Machine, robot: &(String, String)) -> Self {
        let client = Client { machine, http: bulkhead::outgoing::client().build().unwrap() };
        let token = client.token(robot, &["repository:acme/web:pull,push"]).await.unwrap();
        Self { client, token }
    }

    async fn ask(&self, method: &str, path: &str, kind: &str, body: Vec<u8>) -> (u16, String) {
        let (status, _, text) =
            self.client.call(&self.token, method, &format!("/v2/acme/web/{path}"), kind, body).await;
        (status, text)
    }

    /// Uploads a blob and returns its descriptor.
    async fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let (status, text) = self.client.upload(&self.token, "acme/web", bytes).await;
        assert_eq!(status, 201, "{text}");
        json!({"mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len()})
    }

    /// Pushes a manifest under a tag and returns its descriptor.
    async fn manifest(&self, kind: &str, tag: &str, manifest: &Value) -> Value {
        let text = manifest.to_string();
        let digest = Digest::of(text.as_bytes());
        let (status, answer) =
            self.ask("PUT", &format!("manifests/{tag}"), kind, text.clone().into_bytes()).await;
        assert_eq!(status, 201, "{answer}");
        let (status, back) = self.ask("GET", &format!("manifests/{digest}"), "", vec![]).await;
        assert_eq!((status, back), (200, text.clone()), "the manifest is returned unchanged");
        json!({"mediaType": kind, "digest": digest, "size": text.len()})
    }
}

fn of(kind: &str, config: &Value, layers: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers})
}

async fn used(machine: &Machine) -> i64 {
    machine.get("/api/v1/tenants/acme").await["quota"]["registry_bytes"]["used"].as_i64().unwrap()
}

async fn refused(machine: &Machine, image: &str) -> String {
    let (status, body) = machine.deploy("acme", "x", &format!("image: {image}\n")).await;
    assert_eq!(status, 422, "{image}: {body}");
    body["faults"][0]["message"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_no_image_is_stored_and_does_not_run() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    machine.push(&acme, "acme/web:1", &HTTPD);
    let pusher = Pusher::of(&machine, &acme).await;
    let (_, text) = pusher.ask("GET", "manifests/1", "", vec![]).await;
    let image = json!({"mediaType": MANIFEST, "digest": Digest::of(text.as_bytes()), "size": text.len(),
        "platform": {"os": "linux", "architecture": "amd64"}});
    // The form that buildx sends: an index with the image and its attestations.
    let config = pusher.blob(CONFIG, br#"{"architecture":"unknown","os":"unknown","config":{}}"#).await;
    let mut layer = pusher
        .blob("application/vnd.in-toto+json", br#"{"_type":"https://in-toto.io/Statement/v0.1"}"#)
        .await;
    layer["annotations"] = json!({"in-toto.io/predicate-type": "https://slsa.dev/provenance/v0.2"});
    let mut attestation = pusher.manifest(MANIFEST, "attestation", &of(MANIFEST, &config, &[layer])).await;
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [image, attestation],
        "annotations": {"team": "web", "Team": "Web"}});
    let index = pusher.manifest(INDEX, "buildx", &index).await;
    assert!(refused(&machine, "web:attestation").await.contains("application/vnd.in-toto+json"));
    let (status, body) = machine.deploy("acme", "web", "image: web:buildx\nport: 8080\n").await;
    assert_eq!(status, 202, "{body}");
    machine.running("acme", "web").await;
    // A signature, a chart, a cache, an empty index, an index of an index, an image without layers, unknown fields.
    let empty = pusher.blob("application/vnd.oci.empty.v1+json", b"{}").await;
    let data = pusher.blob("application/vnd.example.data", b"some bytes").await;
    let mut signature = of(MANIFEST, &empty, std::slice::from_ref(&data));
    signature["artifactType"] = json!("application/vnd.dev.cosign.artifact.sig.v1+json");
    signature["subject"] = json!({"mediaType": INDEX, "digest": index["digest"], "size": index["size"]});
    signature["annotations"] = json!({"org.example.by": "ci"});
    signature["org.example.unknown"] = json!({"a": [1, {"b": null}]});
    let signature = pusher.manifest(MANIFEST, "signature", &signature).await;
    let chart = pusher.blob("application/vnd.cncf.helm.config.v1+json", br#"{"name":"chart"}"#).await;
    pusher.manifest(MANIFEST, "chart", &of(MANIFEST, &chart, std::slice::from_ref(&data))).await;
    let cache = pusher.blob("application/vnd.buildkit.cacheconfig.v0", br#"{"layers":[]}"#).await;
    pusher.manifest(MANIFEST, "cache", &of(MANIFEST, &cache, std::slice::from_ref(&data))).await;
    pusher.manifest(INDEX, "empty", &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})).await;
    let mut inner = index.clone();
    inner["platform"] = json!({"os": "linux", "architecture": "amd64"});
    pusher
        .manifest(INDEX, "nested", &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [inner]}))
        .await;
    let zstd =
        pusher.blob("application/vnd.oci.image.layer.v1.tar+zstd", b"\x28\xb5\x2f\xfd and so on").await;
    pusher.manifest(MANIFEST, "zstd", &of(MANIFEST, &config, &[zstd])).await;
    pusher.manifest(MANIFEST, "bare", &of(MANIFEST, &config, &[])).await;
    for (tag, met) in [
        ("signature", "application/vnd.dev.cosign.artifact.sig.v1+json"),
        ("chart", "application/vnd.cncf.helm.config.v1+json"),
        ("cache", "application/vnd.buildkit.cacheconfig.v0"),
        ("empty", "empty"),
        ("nested", "index within an index"),
        ("zstd", "compression=gzip"),
        ("bare", "1 to 127 layers"),
    ] {
        let text = refused(&machine, &format!("web:{tag}")).await;
        assert!(text.contains(met), "{tag}: {text}");
    }
    // Duplicate keys are refused only among a manifest's own keys.
    let twins = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[],"Manifests":[]}"#;
    assert_eq!(pusher.ask("PUT", "manifests/x", INDEX, twins.into()).await.0, 400);
    // Referrers are listed by subject, optionally of one type.
    let list = async |query: &str| {
        let path = format!("referrers/{}{query}", index["digest"].as_str().unwrap());
        let (status, text) = pusher.ask("GET", &path, "", vec![]).await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()["manifests"].clone()
    };
    let all = list("").await;
    assert_eq!(all[0]["digest"], signature["digest"]);
    assert_eq!(all[0]["annotations"], json!({"org.example.by": "ci"}));
    assert_eq!(all[0]["artifactType"], "application/vnd.dev.cosign.artifact.sig.v1+json");
    assert_eq!(list("?artifactType=a%2Fb").await, json!([]));
    // All are listed, in pages.
    let tags = machine.get("/api/v1/tenants/acme/repositories/web/tags").await;
    assert_eq!(tags["items"].as_array().unwrap().len(), 10, "{tags}");
    let (_, page) = pusher.ask("GET", "tags/list?n=2&last=buildx", "", vec![]).await;
    assert_eq!(serde_json::from_str::<Value>(&page).unwrap()["tags"], json!(["cache", "chart"]));
    let (status, text) = pusher.ask("GET", "tags/list?N=2", "", vec![]).await;
    assert!(status == 400 && text.contains("parameter N"), "{text}");
    // Artifacts of running apps stay, with the reason: by tag, by digest, and by the index that contains the
    // image.
    for reference in ["buildx", index["digest"].as_str().unwrap(), "1", image["digest"].as_str().unwrap()] {
        let (status, text) = pusher.ask("DELETE", &format!("manifests/{reference}"), "", vec![]).await;
        assert!(status == 409 && text.contains("deployed by: web"), "{reference}: {status} {text}");
    }
    let held = pusher.ask("DELETE", &format!("blobs/{}", data["digest"].as_str().unwrap()), "", vec![]).await;
    assert!(held.0 == 409 && held.1.contains("needs this blob"), "{held:?}");
    // All others can be deleted with an ordinary client, which frees their bytes.
    let before = used(&machine).await;
    let dir = tempfile::tempdir().unwrap();
    let auth = machine.auth_file(dir.path(), &acme);
    let chart = format!("docker://127.0.0.1:{}/acme/web:chart", machine.port);
    let (good, text) = run("skopeo", &["delete", "--tls-verify=false", "--authfile", &auth, &chart]);
    assert!(good, "{text}");
    assert!(used(&machine).await < before);
    assert_eq!(pusher.ask("GET", "manifests/chart", "", vec![]).await.0, 404);
    let before = used(&machine).await;
    assert_eq!(pusher.ask("DELETE", "manifests/signature", "", vec![]).await.0, 202);
    assert_eq!(
        list("").await.as_array().map(Vec::len),
        Some(1),
        "the subject and its attached artifacts stay"
    );
    let path = format!("manifests/{}", signature["digest"].as_str().unwrap());
    assert_eq!(pusher.ask("DELETE", &path, "", vec![]).await.0, 202);
    assert_eq!(list("").await, json!([]));
    assert!(used(&machine).await < before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_it_was_cut_off() {
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let pusher = Pusher::of(&machine, &acme).await;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let digest = Digest::of(&bytes);
    let client = &pusher.client;
    let (status, location, _) =
        client.call(&pusher.token, "POST", "/v2/acme/web/blobs/uploads/", OCTETS, vec![]).await;
    assert_eq!(status, 202);
    // The connection breaks during a part, during a PATCH and during the last PUT.
    let cut = |method: &str, query: &str, from: usize, to: usize| {
        let head = format!(
            "{method} {location}{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: {OCTETS}\r\n\
             Content-Length: {}\r\n\r\n",
            pusher.token,
            bytes.len() - from
        );
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", machine.port)).unwrap();
        std::io::Write::write_all(&mut stream, &[head.as_bytes(), &bytes[from..to]].concat()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(400));
    };
    let progress = async |least: usize| {
        let begun = std::time::Instant::now();
        loop {
            let url = format!("{}{location}", machine.address());
            let answer = client.http.get(url).bearer_auth(&pusher.token).send().await.unwrap();
            assert_eq!(answer.status().as_u16(), 204);
            let range = answer.headers()["range"].to_str().unwrap().to_owned();
            let last: usize = range.strip_prefix("0-").unwrap().parse().unwrap();
            if last + 1 >= least {
                return last + 1;
            }
            assert!(begun.elapsed().as_secs() < 20, "{range}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    cut("PATCH", "", 0, 1_000_000);
    let there = progress(1_000_000).await;
    assert_eq!(there, 1_000_000);
    cut("PUT", &format!("?digest={digest}"), there, 2_000_000);
    let there = progress(2_000_000).await;
    // A part at a wrong offset is answered with the right offset.
    let url = format!("{}{location}", machine.address());
    let wrong = client.http.patch(&url).bearer_auth(&pusher.token).header("content-range", "0-9");
    let answer = wrong.body(bytes[..10].to_vec()).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["range"].to_str().unwrap()), (416, "0-1999999"));
    let range = format!("{there}-{}", bytes.len() - 1);
    let rest = client.http.put(format!("{url}?digest={digest}")).bearer_auth(&pusher.token);
    let answer = rest.header("content-range", range).body(bytes[there..].to_vec()).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 201, "{:?}", answer.text().await);
    let blob = format!("{}/v2/acme/web/blobs/{digest}", machine.address());
    for (range, status, length) in [
        ("bytes=2999990-", 206, 10),
        ("bytes=3000000-", 416, 0),
        ("bytes=5-1", 416, 0),
        ("bytes=0-1,3-4", 200, 3_000_000),
    ] {
        let asked = client.http.get(&blob).bearer_auth(&pusher.token).header("range", range);
        let answer = asked.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{range}");
        assert_eq!(answer.bytes().await.unwrap().len(), length, "{range}");
    }
    assert_eq!(used(&machine).await, 3_000_000, "the blob counts once");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_name_or_a_right_is_said_with_the_command_that_mends_it() {
    let machine = Machine::start().await;
    let (acme, _) = (machine.tenant("acme").await, machine.tenant("globex").await);
    let at = format!("127.0.0.1:{}", machine.port);
    let long = format!("acme/{}:1", "a".repeat(200));
    for (name, said) in [
        ("web:1".to_owned(), format!("docker tag IMAGE {at}/acme/web:TAG")),
        ("acmee/web:1".to_owned(), format!("docker tag IMAGE {at}/acme/web:TAG")),
        ("globex/web:1".to_owned(), "of the tenant acme".to_owned()),
        (long, "128".to_owned()),
    ] {
        let (good, text) = machine.try_push(&acme, &name, &HTTPD);
        assert!(!good && text.contains(&said), "{name}: {text}");
    }
    // An existing and a missing tenant get the same answer.
    let client = Client { machine: &machine, http: bulkhead::outgoing::client().build().unwrap() };
    let token = client.token(&acme, &["repository:globex/web:pull,push"]).await.unwrap();
    let ask = async |tenant: &str| {
        let (status, _, text) =
            client.call(&token, "GET", &format!("/v2/{tenant}/web/tags/list"), "", vec![]).await;
        (status, text.replace(tenant, "TENANT"))
    };
    assert_eq!(ask("globex").await, ask("nobody").await);
    // A credential for pulls only.
    let body = json!({"name": "reader", "push": false});
    let (status, reader) = machine.send("POST", "/api/v1/tenants/acme/robots", body).await;
    assert_eq!(status, 201, "{reader}");
    let secret = |field: &str| reader[field].as_str().unwrap().to_owned();
    let (good, text) = machine.try_push(&(secret("login"), secret("secret")), "acme/web:1", &HTTPD);
    assert!(!good && text.contains("may pull and not push") && text.contains("robots"), "{text}");
}
