//! Specs checked per second on two threads, compared with parsing the same text into a tree without checks
//! (`serde_json::Value`).

use std::hint::black_box;
use std::time::{Duration, Instant};

use bulkhead::apps::spec::{AppSpec, Format};

use crate::{Row, median, spread};

const JSON: &str = r#"{"spec":"v1","name":"web","image":"team/web:1.4.2","cpu":"250m","memory":"256Mi","instances":2,
"env":{"LOG_LEVEL":"info","DATABASE":"orders"},"port":8080,"health":{"http":{"path":"/healthz"},"grace":5},
"scratch":{"/var/cache":"64Mi"},"stop_grace":10,"connects":{"apps":["api"]}}"#;

fn rate(work: impl Fn() + Sync) -> f64 {
    let begun = Instant::now();
    let count: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut n = 0;
                    while begun.elapsed() < Duration::from_millis(700) {
                        for _ in 0..500 {
                            work();
                        }
                        n += 500;
                    }
                    n
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    rate
}

pub(crate) fn measure() -> Row {
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        ours.push(rate(|| assert!(AppSpec::parse(black_box(JSON.as_bytes()), Format::Json).is_ok())) / 1e3);
        peer.push(
            rate(|| assert!(serde_json::from_slice::<serde_json::Value>(black_box(JSON.as_bytes())).is_ok()))
                / 1e3,
        );
    }
    Row {
        what: "specs checked, thousands per second, two threads",
        ours: spread(&ours, 0),
        peer: format!("serde_json::Value {}", spread(&peer, 0)),
        result: format!("{:.2} of the peer", median(&ours) / median(&peer)),
        goal: "1000",
    }
}
