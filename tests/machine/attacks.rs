//! A compromised `serve` against the agent: tries every message that the agent's socket accepts, as the user
//! of `serve`.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{HTTPD, Machine, run};

fn ask(socket: &str, message: &[u8]) -> Option<Value> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    stream.write_all(&u32::try_from(message.len()).ok()?.to_be_bytes()).ok()?;
    stream.write_all(message).ok()?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut text = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

fn refused(socket: &str, what: &str, message: &Value) {
    let answer = ask(socket, message.to_string().as_bytes());
    let text = answer.map(|a| a.to_string()).unwrap_or_default();
    assert!(text.contains("failed"), "{what} was not refused: {text}");
}

/// Runs only as the child of the test below, as the user of `serve`.
#[test]
fn as_a_conquered_serve() {
    let Ok(socket) = std::env::var("BULKHEAD_TEST_ATTACK") else { return };
    let good: Value = serde_json::from_str(&std::env::var("BULKHEAD_TEST_WORKLOAD").unwrap()).unwrap();
    assert!(ask(&socket, br#"{"hello":{}}"#).unwrap()["hello"]["installation"].is_string());
    let app = |change: &dyn Fn(&mut Value)| {
        let mut workload = good.clone();
        change(&mut workload);
        json!({"ensure_app": {"workload": workload, "pull": null}})
    };
    let evil_block = good["block"]["start"].as_u64().unwrap() + 65_536;
    refused(&socket, "another tenant's block", &app(&|w| w["block"]["start"] = json!(evil_block)));
    refused(
        &socket,
        "the block of another app",
        &app(&|w| {
            w["app_id"] = json!(999);
            w["app"] = json!("other");
        }),
    );
    refused(&socket, "another tenant for the app", &app(&|w| w["tenant"] = json!("evil")));
    refused(&socket, "an unknown tenant", &app(&|w| w["tenant"] = json!("nobody")));
    refused(&socket, "the host's root", &app(&|w| w["block"]["start"] = json!(0)));
    refused(&socket, "root inside", &app(&|w| w["user"]["uid"] = json!(0)));
    refused(&socket, "an older generation", &app(&|w| w["generation"] = json!(0)));
    refused(
        &socket,
        "an address of another tenant",
        &app(&|w| w["addresses"] = json!(["10.64.4.2", "10.64.4.3", "10.64.4.4"])),
    );
    refused(
        &socket,
        "the gateway's address",
        &app(&|w| {
            let a = w["addresses"][0].as_str().unwrap().rsplit_once('.').unwrap().0.to_owned() + ".1";
            w["addresses"][0] = json!(a);
        }),
    );
    refused(&socket, "a foreign image", &app(&|w| w["image"]["repository"] = json!("../evil/web")));
    refused(&socket, "an image by tag", &app(&|w| w["image"]["digest"] = json!("latest")));
    refused(&socket, "a mount over /proc", &app(&|w| w["scratch"]["/proc/sys"] = json!(4096)));
    refused(&socket, "a host path", &app(&|w| w["scratch"]["/a/../../etc"] = json!(4096)));
    refused(&socket, "a field that does not exist", &app(&|w| w["privileged"] = json!(true)));
    refused(&socket, "endless memory", &app(&|w| w["memory"] = json!(1_u64 << 60)));
    refused(&socket, "a low port", &app(&|w| w["port"] = json!(22)));
    let grant = |change: &dyn Fn(&mut Value)| {
        let mut grant = json!({"tenant": "fresh", "tenant_id": 99, "ranges": [{"start": good["block"]["start"].as_u64().unwrap() + 131_072, "size": 65_536}], "network": 77, "subnet": "10.64.80.0/22"});
        change(&mut grant);
        json!({"ensure_tenant": {"grant": grant}})
    };
    let start = good["block"]["start"].clone();
    refused(&socket, "a range of another tenant", &grant(&|g| g["ranges"][0]["start"] = start.clone()));
    refused(&socket, "a range of the host", &grant(&|g| g["ranges"] = json!([{"start": 0, "size": 65_536}])));
    refused(&socket, "a range beyond the pool", &grant(&|g| g["ranges"][0]["start"] = json!(2_147_000_000)));
    refused(&socket, "the bridge of another tenant", &grant(&|g| g["network"] = json!(0)));
    refused(&socket, "a subnet of the outside", &grant(&|g| g["subnet"] = json!("192.168.0.0/22")));
    refused(
        &socket,
        "a change of the journal",
        &grant(&|g| {
            g["tenant"] = json!("acme");
            g["tenant_id"] = json!(1);
        }),
    );
    refused(
        &socket,
        "removal under another identity",
        &json!({"remove_tenant": {"tenant": "acme", "tenant_id": 55}}),
    );
    refused(
        &socket,
        "removal of a tenant with apps",
        &json!({"remove_tenant": {"tenant": "acme", "tenant_id": 1}}),
    );
    refused(
        &socket,
        "removal of an app under another name",
        &json!({"remove_app": {"tenant": "evil", "app": "web", "app_id": good["app_id"]}}),
    );
    // Invalid messages.
    for message in [&b"{}"[..], b"", b"\xff\xfe", b"{\"exec\":{\"command\":\"sh\"}}", b"[[[[[[[[[["] {
        let answer = ask(&socket, message);
        assert!(answer.is_none_or(|a| a["failed"].is_object()));
    }
    // A frame with a huge length, and one that never arrives: the agent closes the connection and continues.
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(&u32::MAX.to_be_bytes()).unwrap();
    let mut rest = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    let idle: Vec<_> = (0..40).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert!(ask(&socket, br#"{"hello":{}}"#).is_some(), "other clients still get answers");
    drop(idle);
    // This user cannot access the agent's files or the engine.
    let data = std::path::Path::new(&socket).ancestors().nth(3).unwrap();
    for file in ["agent/journal", "run/engine/podman.sock", "agent.toml", "registry.yml", "postgres/data"] {
        assert!(
            std::fs::File::open(data.join(file)).is_err() && UnixStream::connect(data.join(file)).is_err(),
            "{file}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conquered_serve_gains_nothing_from_the_root_half() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    machine.tenant("evil").await;
    machine.push(&robot, "acme/web:1", &HTTPD);
    machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await;
    let before = machine.running("acme", "web").await;
    let kept = std::fs::read_dir(machine.data.join("agent/apps")).unwrap().next().unwrap().unwrap().path();
    let kept: Value = serde_json::from_slice(&std::fs::read(kept).unwrap()).unwrap();
    let socket = machine.data.join("run/agent/agent.sock").display().to_string();
    // The agent does not answer root either.
    assert!(ask(&socket, br#"{"hello":{}}"#).is_none());
    let copy = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o755))
        .tempdir_in("/tmp")
        .unwrap();
    let exe = copy.path().join("attack");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    std::fs::set_permissions(&exe, std::fs::Permissions::from_mode(0o755)).unwrap();
    let user = format!("bk{}-serve", machine.id);
    let done = std::process::Command::new("setpriv")
        .args(["--reuid", &user, "--regid", &user, "--clear-groups", "--"])
        .arg(&exe)
        .args(["--exact", "attacks::as_a_conquered_serve", "--nocapture"])
        .env("BULKHEAD_TEST_ATTACK", &socket)
        .env("BULKHEAD_TEST_WORKLOAD", kept["workload"].to_string())
        .current_dir("/")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && text.contains("1 passed"), "{text}");
    let after = machine.running("acme", "web").await;
    assert_eq!(
        after["observed"]["instances"][0]["container"],
        before["observed"]["instances"][0]["container"]
    );
    let (_, containers) = machine.podman(&["ps", "-aq"]);
    assert_eq!(containers.lines().count(), 1, "{containers}");
    assert!(!run("ip", &["link", "show", &format!("bk{}77", machine.id)]).0);
}
