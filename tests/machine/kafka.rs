//! A real broker as a platform service, and a real client in an app. The broker has two listeners; one
//! advertises itself by the service's name, as brokers do.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::outside::Outside;
use crate::support::{HTTPD, Image, Machine, layer_with, run};

/// Apache Kafka (KRaft) in the outside world of a test.
struct Broker {
    process: Child,
    dir: tempfile::TempDir,
}

impl Broker {
    fn start(world: &Outside) -> Self {
        let jars = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kafka/lib");
        assert!(std::path::Path::new(jars).exists(), "run tests/kafka/fetch (deploy/test does)");
        let dir = tempfile::tempdir().unwrap();
        let own = world.service();
        let settings = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:9093\n\
             listeners=CONTROLLER://127.0.0.1:9093,NAMED://{own}:9092,PLAIN://{own}:9094\n\
             advertised.listeners=NAMED://kafka:9092,PLAIN://{own}:9094\n\
             listener.security.protocol.map=CONTROLLER:PLAINTEXT,NAMED:PLAINTEXT,PLAIN:PLAINTEXT\n\
             controller.listener.names=CONTROLLER\ninter.broker.listener.name=PLAIN\nlog.dirs={}/log\n\
             offsets.topic.replication.factor=1\ntransaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\nnum.partitions=1\ngroup.initial.rebalance.delay.ms=0\n",
            dir.path().display()
        );
        let file = dir.path().join("server.properties").display().to_string();
        std::fs::write(&file, settings).unwrap();
        let classes = format!("{jars}/*");
        let id = "MkU3OEVBNTcwNTJENDM2Qk";
        let (good, text) = run(
            "java",
            &["-Xmx128m", "-cp", &classes, "kafka.tools.StorageTool", "format", "-t", id, "-c", &file],
        );
        assert!(good, "{text}");
        let place = world.place();
        let log = std::fs::File::create(dir.path().join("out")).unwrap();
        let process = Command::new("nsenter")
            .arg(format!("--net={place}"))
            .args(["java", "-Xmx256m", "-cp", &classes, "kafka.Kafka", &file])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut broker = Self { process, dir };
        let begun = Instant::now();
        let (place, own) = (place, own.to_string());
        while !run(
            "nsenter",
            &[&format!("--net={place}"), "kcat", "-L", "-m", "2", "-b", &format!("{own}:9094")],
        )
        .0
        {
            let ended = broker.process.try_wait().unwrap();
            let out = std::fs::read_to_string(broker.dir.path().join("out")).unwrap_or_default();
            assert!(ended.is_none() && begun.elapsed() < Duration::from_secs(60), "{ended:?} {out}");
            std::thread::sleep(Duration::from_millis(300));
        }
        broker
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns this machine's kcat with its libraries.
fn client() -> Vec<(String, Vec<u8>, u32)> {
    let (good, text) = run("ldd", &["/usr/bin/kcat"]);
    assert!(good, "{text}");
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    std::iter::once("/usr/bin/kcat")
        .chain(paths)
        .map(|path| (path[1..].to_owned(), std::fs::read(path).unwrap(), 0o755))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_asks_for_kafka_produces_and_consumes_and_no_other_gets_even_a_name() {
    let machine = Machine::start().await;
    let world = Outside::new();
    let _broker = Broker::start(&world);
    let robot = machine.tenant("acme").await;
    let dir = tempfile::tempdir().unwrap();
    let (digest, size) = layer_with(dir.path(), &client());
    Image::of(&HTTPD).write(dir.path(), &digest, size);
    let (good, text) = machine.copy(&robot, dir.path(), "acme/client:1");
    assert!(good, "{text}");
    let endpoints = json!([
        {"network": world.service(), "port": 9092}, {"network": world.service(), "port": 9094},
    ]);
    let (status, answer) =
        machine.send("PUT", "/api/v1/services/kafka", json!({"endpoints": endpoints})).await;
    assert_eq!(status, 201, "{answer}");
    assert_eq!(machine.send("PUT", "/api/v1/tenants/acme/services/kafka", json!({})).await.0, 202);
    let asking = "image: client:1\nport: 8080\nconnects: { services: [kafka] }\n";
    assert_eq!(machine.deploy("acme", "shop", asking).await.0, 202);
    assert_eq!(machine.deploy("acme", "blog", "image: client:1\nport: 8080\n").await.0, 202);
    let inside = async |app: &str, script: &str| {
        let name = machine.running("acme", app).await["observed"]["instances"][0]["container"].clone();
        machine.podman(&["exec", name.as_str().unwrap(), "/bin/busybox", "sh", "-c", script])
    };
    for (n, broker) in ["kafka:9092", &format!("{}:9094", world.service())].into_iter().enumerate() {
        let (good, text) =
            inside("shop", &format!("echo order-{n} | /usr/bin/kcat -P -b {broker} -t orders")).await;
        assert!(good, "{broker}: {text}");
        let read = format!("/usr/bin/kcat -C -b {broker} -t orders -o beginning -e -q");
        let (good, text) = inside("shop", &read).await;
        assert!(good && text.contains(&format!("order-{n}")), "{broker}: {text}");
    }
    // The other app: no name, and no packet by address either.
    let (good, text) = inside("blog", "/usr/bin/kcat -L -m 2 -b kafka:9092").await;
    assert!(!good && !text.contains("orders"), "{text}");
    assert!(!inside("blog", "/bin/busybox grep kafka /etc/hosts").await.0, "not even a name");
    let (good, text) = inside("blog", &format!("/usr/bin/kcat -L -m 2 -b {}:9094", world.service())).await;
    assert!(!good && !text.contains("orders"), "{text}");
}
