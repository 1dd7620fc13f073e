//! Specs checked per second, compared with parsing the same text into a tree without checks
//! (`serde_json::Value`), in the same run. Run: `cargo bench --bench spec`.

use bulkhead::apps::spec::{AppSpec, Format};
use divan::Bencher;
use divan::counter::ItemsCount;

const JSON: &str = r#"{"spec":"v1","name":"web","image":"team/web:1.4.2","cpu":"250m","memory":"256Mi","instances":2,
"env":{"LOG_LEVEL":"info","DATABASE":"orders"},"port":8080,"health":{"http":{"path":"/healthz"},"grace":5},
"scratch":{"/var/cache":"64Mi"},"stop_grace":10,"connects":{"apps":["api"]}}"#;

const YAML: &str = "spec: v1\nname: web\nimage: team/web:1.4.2\ncpu: 250m\nmemory: 256Mi\ninstances: 2\n\
env: { LOG_LEVEL: info, DATABASE: orders }\nport: 8080\nhealth: { http: { path: /healthz }, grace: 5 }\n\
scratch: { /var/cache: 64Mi }\nstop_grace: 10\nconnects: { apps: [api] }\n";

fn main() {
    divan::main();
}

#[divan::bench(threads = [1, 2], sample_size = 2000)]
fn check_json(bencher: Bencher<'_, '_>) {
    bencher
        .counter(ItemsCount::new(1_usize))
        .bench(|| AppSpec::parse(divan::black_box(JSON.as_bytes()), Format::Json).is_ok());
}

#[divan::bench(threads = [1, 2], sample_size = 2000)]
fn check_yaml(bencher: Bencher<'_, '_>) {
    bencher
        .counter(ItemsCount::new(1_usize))
        .bench(|| AppSpec::parse(divan::black_box(YAML.as_bytes()), Format::Yaml).is_ok());
}

#[divan::bench(threads = [1, 2], sample_size = 2000)]
fn peer_serde_json_value(bencher: Bencher<'_, '_>) {
    bencher
        .counter(ItemsCount::new(1_usize))
        .bench(|| serde_json::from_slice::<serde_json::Value>(divan::black_box(JSON.as_bytes())).is_ok());
}
