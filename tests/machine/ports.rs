//! A user of the machine takes a port of the platform while it is down. Nothing is sent there, and `up` names
//! the user.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{HTTPD, Machine, run};

/// A listener of the user `nobody` on a port, and the file with all data that it received.
struct Squatter(Child, std::path::PathBuf);

impl Squatter {
    fn on(port: u16) -> Self {
        let file = std::path::PathBuf::from(format!("/tmp/bulkhead-test-squatter-{port}"));
        let out = fs::File::create(&file).unwrap();
        let child = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--", "/bin/busybox", "nc"])
            .args(["-l", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(out)
            .spawn()
            .unwrap();
        let own = Self(child, file);
        let begun = Instant::now();
        let target = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        while bulkhead::driver::listener::require(target, 65_534).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "the listener of the user nobody did not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        own
    }

    /// Returns whether it still listens and has received nothing.
    fn has_heard_nothing(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none() && fs::read(&self.1).unwrap().is_empty()
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_file(&self.1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_another_user_has_taken_gets_nothing() {
    let mut machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    machine.push(&acme, "acme/web:1", &HTTPD);
    let mode = fs::metadata(machine.data.join("lock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = fs::read_to_string(machine.data.join("ports.json")).unwrap();
    let ports: serde_json::Value = serde_json::from_str(&text).unwrap();
    let pull = u16::try_from(ports["pull"].as_u64().unwrap()).unwrap();
    assert!(ports["registry"].is_null(), "the registry has no port: {ports}");
    machine.down();
    let data = machine.data.display().to_string();
    let listen = format!("127.0.0.1:{}", machine.port);
    for port in [pull, machine.port] {
        let mut squatter = Squatter::on(port);
        let (good, text) = run(
            "timeout",
            &["30", env!("CARGO_BIN_EXE_bulkhead"), "up", "--data", &data, "--listen", &listen],
        );
        assert!(!good && text.contains(&port.to_string()), "{text}");
        if port == pull {
            assert!(text.contains("65534"), "{text}");
        }
        assert!(squatter.has_heard_nothing(), "something was sent to {port}");
    }
    machine.up().await;
    // The agent checks the owner of the port before each pull: another user's port gets no credential.
    let file = machine.data.join("agent.toml");
    let settings = fs::read_to_string(&file).unwrap();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut squatter = Squatter::on(other);
    fs::write(&file, settings.replace(&format!("127.0.0.1:{pull}"), &format!("127.0.0.1:{other}"))).unwrap();
    machine.kill("agent");
    assert_eq!(machine.deploy("acme", "web", "image: web:1\nport: 8080\n").await.0, 202);
    let begun = Instant::now();
    while !machine.tail("agent").contains("does not belong to serve") {
        assert!(begun.elapsed() < Duration::from_secs(40), "{}", machine.tail("agent"));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(squatter.has_heard_nothing(), "a credential was sent to another user");
    drop(squatter);
    fs::write(&file, settings).unwrap();
    machine.kill("agent");
    machine.running("acme", "web").await;
}
