//! An app that does not run as specified shows the reason, while it waits and after it has exited.

use std::time::{Duration, Instant};

use crate::support::{Image, Machine, layer_with};

/// Polls the summaries of an app until one contains `wanted`.
async fn told(machine: &Machine, app: &str, wanted: &str) -> String {
    let begun = Instant::now();
    let mut last = String::new();
    while begun.elapsed().as_secs() < 40 {
        let app = machine.app("acme", app).await;
        last = app["summary"].as_str().unwrap_or_default().to_owned();
        if last.contains(wanted) {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never said {wanted:?}; last: {last}\n{}", machine.tail("agent"))
}

/// Deploys a singleton that stops slowly.
async fn singleton(machine: &Machine, image: &str) {
    let spec = format!(
        "spec: v1\nname: one\ncpu: 50m\nmemory: 64Mi\nimage: {image}\nsingleton: true\nstop_grace: 6\n"
    );
    let path = "/api/v1/tenants/acme/apps/one";
    let (status, body) = machine.ask(&machine.admin, "PUT", path, Some(("application/yaml", spec))).await;
    assert_eq!(status, 202, "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_does_not_run_says_what_it_waits_for() {
    let machine = Machine::start().await;
    let robot = machine.tenant("acme").await;
    // A crash: the summary shows the line with the error, not the noise after it.
    let script = "echo starting; echo 'Error: no database at db:5432' >&2; echo '    at connect (db.js:3)' >&2; \
                  echo '}'; echo 'Node.js v18.19.0'; exit 1";
    machine.push(&robot, "acme/bad:1", &["/bin/busybox", "sh", "-c", script]);
    machine.deploy("acme", "bad", "image: bad:1\n").await;
    let text = told(&machine, "bad", "Error: no database at db:5432").await;
    assert!(!text.contains("Node.js"), "{text}");
    // A singleton waits for its old instance, which ignores the stop signal.
    let stubborn = "trap '' TERM; while :; do busybox sleep 1; done";
    machine.push(&robot, "acme/one:1", &["/bin/busybox", "sh", "-c", stubborn]);
    machine.push(&robot, "acme/one:2", &["/bin/busybox", "sleep", "1000"]);
    singleton(&machine, "one:1").await;
    machine.running("acme", "one").await;
    singleton(&machine, "one:2").await;
    let text = told(&machine, "one", "to stop").await;
    assert!(text.contains("0 of 1 running"), "{text}");
    told(&machine, "one", "1 of 1 running.").await;
    // A large image is being pulled, for a new app and for an update: the summary shows the progress.
    let dir = tempfile::tempdir().unwrap();
    let noise: Vec<u8> =
        (0..48_u64 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let (digest, size) = layer_with(dir.path(), &[("big".to_owned(), noise, 0o644)]);
    Image::of(&["/bin/busybox", "sleep", "1000"]).write(dir.path(), &digest, size);
    let (good, text) = machine.copy(&robot, dir.path(), "acme/big:1");
    assert!(good, "{text}");
    singleton(&machine, "big:1").await;
    let text = told(&machine, "one", "Pulling the image of release 3").await;
    assert!(text.contains("MiB so far of an image of"), "{text}");
    assert!(!text.starts_with("1 of 1 running. "), "{text}");
    told(&machine, "one", "1 of 1 running.").await;
}
