//! `up --demo`: a sample tenant with a sample app, created by an ordinary client over the public API. It
//! prints the commands that a user would type.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{DataFolder, Failed};
use crate::access::{Authority, PlatformRole, tokens};
use crate::db::{self, Within};
use crate::ids::{ActorId, Digest};

const SPEC: &str = "spec: v1\nname: hello\nimage: hello:1\ncpu: 100m\nmemory: 64Mi\ninstances: 2\nport: 8080\n\
health: { http: { path: / }, grace: 5 }\n";

fn doing(what: &'static str) -> impl Fn(reqwest::Error) -> Failed {
    move |error| Failed::doing(what, error)
}

struct Api {
    client: reqwest::Client,
    base: String,
    token: String,
}

impl Api {
    async fn call(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<(&str, String)>,
    ) -> Result<(u16, Value), Failed> {
        let mut request =
            self.client.request(method, format!("{}{path}", self.base)).bearer_auth(&self.token);
        if let Some((kind, text)) = body {
            request = request.header("content-type", kind).body(text);
        }
        let answer = request.send().await.map_err(doing("the API"))?;
        let status = answer.status().as_u16();
        let text = answer.text().await.map_err(doing("the API"))?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }
}

#[expect(clippy::print_stdout, reason = "this is what the command is for")]
fn say(text: &str) {
    println!("{text}");
}

pub(super) async fn run(folder: &DataFolder, listen: SocketAddr, pool: &PgPool) -> Result<(), Failed> {
    let token = token(pool).await?;
    let client = crate::outgoing::client().build().map_err(doing("the client"))?;
    let api = Api { client, base: format!("http://{listen}"), token };
    let tenant = "/api/v1/tenants/demo";
    say(
        "\nThe demo, as you would type it (TOKEN is an API token; create one with `bulkhead token create`):\n",
    );
    say(&format!(
        "  curl -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/json' \\\n    -d '{{\"name\": \"demo\", \"display_name\": \"Demo\"}}' http://{listen}/api/v1/tenants"
    ));
    let body = json!({"name": "demo", "display_name": "Demo"}).to_string();
    let (status, answer) =
        api.call(reqwest::Method::POST, "/api/v1/tenants", Some(("application/json", body))).await?;
    if status != 202 && status != 409 {
        return Err(Failed(format!("the tenant was not created. The API answered {status}: {answer}")));
    }
    let (status, app) = api.call(reqwest::Method::GET, &format!("{tenant}/apps/hello"), None).await?;
    if status != 200 {
        push(folder, listen, &api, tenant).await?;
        say(&format!(
            "  curl -X PUT -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/yaml' \\\n    --data-binary @hello.yaml http://{listen}{tenant}/apps/hello"
        ));
        let spec = Some(("application/yaml", SPEC.to_owned()));
        let (status, answer) = api.call(reqwest::Method::PUT, &format!("{tenant}/apps/hello"), spec).await?;
        if status != 202 {
            return Err(Failed(format!("the app was not deployed. The API answered {status}: {answer}")));
        }
        say(&format!("\n  hello.yaml:\n{}", SPEC.lines().map(|l| format!("    {l}\n")).collect::<String>()));
    }
    drop(app);
    for _ in 0..120 {
        let (_, app) = api.call(reqwest::Method::GET, &format!("{tenant}/apps/hello"), None).await?;
        if app["state"] == "running" {
            say(&format!("  hello: {}", app["summary"].as_str().unwrap_or_default()));
            say(&format!("  Look at it: http://{listen}/tenants/demo/apps/hello"));
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Err(Failed("the sample app does not become healthy. Its page shows why".into()))
}

async fn token(pool: &PgPool) -> Result<String, Failed> {
    let failed = |error: crate::error::Error| Failed(error.to_string());
    let lost = |error: sqlx::Error| Failed(error.to_string());
    let mut tx = db::begin(pool, Within::Platform).await.map_err(lost)?;
    let authority = Authority::Platform(PlatformRole::Admin);
    let actor = ActorId::new("root: up --demo");
    let (_, token) = tokens::create_as_root(&mut tx, "demo", authority, &actor, time::Duration::hours(25))
        .await
        .map_err(failed)?;
    tx.commit().await.map_err(lost)?;
    Ok(token.expose().to_owned())
}

async fn push(folder: &DataFolder, listen: SocketAddr, api: &Api, tenant: &str) -> Result<(), Failed> {
    let work = folder.path.join("run/demo");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).map_err(|error| Failed::doing("the demo's folder", error))?;
    image(&work.join("image"))
        .map_err(|error| Failed::doing("the sample image (it needs busybox-static)", error))?;
    let _ = api.call(reqwest::Method::DELETE, &format!("{tenant}/robots/demo"), None).await?;
    let body = Some(("application/json", json!({"name": "demo", "push": true, "days": 1}).to_string()));
    let (status, robot) = api.call(reqwest::Method::POST, &format!("{tenant}/robots"), body).await?;
    if status != 201 {
        return Err(Failed(format!(
            "the registry credential was not created. The API answered {status}: {robot}"
        )));
    }
    let (login, secret) =
        (robot["login"].as_str().unwrap_or_default(), robot["secret"].as_str().unwrap_or_default());
    // The credential goes through a file: every user can read the arguments of processes.
    let auth = data_encoding::BASE64.encode(format!("{login}:{secret}").as_bytes());
    let file = work.join("auth.json");
    let text = json!({"auths": {listen.to_string(): {"auth": auth}}}).to_string();
    folder.write("run/demo/auth.json", &text, (0, 0), 0o400)?;
    say(&format!(
        "  curl -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/json' \\\n    -d '{{\"name\": \"demo\", \"push\": true}}' http://{listen}{tenant}/robots\n  skopeo login --tls-verify=false --username {login} {listen}\n  skopeo copy --dest-tls-verify=false oci:IMAGE docker://{listen}/demo/hello:1"
    ));
    let done = Command::new("skopeo")
        .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", "--dest-authfile"])
        .arg(&file)
        .arg(format!("oci:{}", work.join("image").display()))
        .arg(format!("docker://{listen}/demo/hello:1"))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failed::doing("skopeo (apt-get install skopeo)", error))?;
    let _ = fs::remove_dir_all(&work);
    if done.status.success() {
        Ok(())
    } else {
        Err(Failed::doing("the push", String::from_utf8_lossy(&done.stderr)))
    }
}

/// Builds a small image from files of this machine, in the OCI image layout: busybox as a web server with one
/// page.
fn image(dir: &Path) -> std::io::Result<()> {
    let busybox = fs::read("/bin/busybox")?;
    let page = "<!doctype html><title>hello</title><h1>Hello from Bulkhead</h1>\n";
    let mut layer = tar::Builder::new(Vec::new());
    let mut add = |path: &str, bytes: &[u8], mode: u32| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        header.set_mtime(0);
        header.set_cksum();
        layer.append_data(&mut header, path, bytes)
    };
    add("bin/busybox", &busybox, 0o755)?;
    add("bin/sh", &busybox, 0o755)?;
    add("www/index.html", page.as_bytes(), 0o644)?;
    add("etc/passwd", b"app:x:1000:1000::/:/bin/sh\n", 0o644)?;
    let layer = layer.into_inner()?;
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8]| -> std::io::Result<Value> {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(&digest.as_str()[7..]), bytes)?;
        Ok(json!({"digest": digest, "size": bytes.len()}))
    };
    let with = |mut descriptor: Value, kind: &str| {
        descriptor["mediaType"] = json!(format!("application/vnd.oci.image.{kind}"));
        descriptor
    };
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "User": "1000:1000", "ExposedPorts": {"8080/tcp": {}},
            "Cmd": ["/bin/busybox", "httpd", "-f", "-v", "-p", "8080", "-h", "/www"],
        },
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]},
    });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": with(put(config.to_string().as_bytes())?, "config.v1+json"),
        "layers": [with(put(&layer)?, "layer.v1.tar")],
    });
    let index = json!({
        "schemaVersion": 2, "manifests": [with(put(manifest.to_string().as_bytes())?, "manifest.v1+json")],
    });
    fs::write(dir.join("index.json"), index.to_string())?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
}
