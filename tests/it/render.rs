//! Compiled specs: a snapshot for review, and properties of every possible spec.

use bulkhead::apps::release::render_example;
use bulkhead::apps::spec::{AppSpec, Format};
use proptest::prelude::*;
use serde_json::{Value, json};

fn render(spec: &Value) -> Result<Value, Vec<bulkhead::fault::Fault>> {
    let spec = AppSpec::parse(spec.to_string().as_bytes(), Format::Json)?;
    Ok(render_example(&spec, "acme".parse().unwrap()).unwrap())
}

#[test]
fn a_spec_compiles_to_this_container() {
    let spec = json!({
        "spec": "v1", "name": "web", "image": "team/web:1", "command": ["/bin/web"], "cpu": "250m",
        "memory": "256Mi", "instances": 1, "env": {"LOG": "info"}, "port": 8080,
        "health": {"http": {"path": "/healthz"}}, "scratch": {"/var/cache": "64Mi"},
        "stop_grace": 10, "connects": {"apps": ["api"]},
    });
    insta::assert_json_snapshot!(render(&spec).unwrap());
}

/// Generates pieces that users, programs and attackers put into a spec.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(vec![
            "v1",
            "web",
            "web:1",
            "250m",
            "64Mi",
            "0",
            "root",
            "/",
            "/tmp",
            "/etc",
            "/var/run/docker.sock",
            "host",
            "--privileged",
            "a:1@sha256:0",
            "0:0",
            "NET_ADMIN",
            "1Gi",
            "/proc/self",
        ])
        .prop_map(Value::from),
        "[ -~]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let key = prop::sample::select(vec![
            "spec",
            "name",
            "image",
            "command",
            "args",
            "cpu",
            "memory",
            "instances",
            "singleton",
            "env",
            "port",
            "health",
            "scratch",
            "stop_grace",
            "connects",
            "http",
            "tcp",
            "path",
            "grace",
            "apps",
            "privileged",
            "user",
            "cap_add",
            "volumes",
            "hostNetwork",
            "/tmp",
            "/data",
            "A",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.prop_map(str::to_owned), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn good() -> Value {
    json!({
        "spec": "v1", "name": "web", "image": "web:1", "cpu": "100m", "memory": "64Mi", "port": 8080,
        "health": {"tcp": {}}, "scratch": {"/data": "1Mi"}, "env": {"A": "b"}, "connects": {"apps": ["api"]},
        "command": ["x"], "args": ["y"], "instances": 2, "singleton": false, "stop_grace": 1,
    })
}

/// Checks the invariants of every container that the engine receives.
fn keeps_every_invariant(container: &Value) -> Result<(), TestCaseError> {
    for no in ["privileged", "env_host", "httpproxy", "stdin", "terminal", "init", "publish_image_ports"] {
        prop_assert_eq!(&container[no], &json!(false), "{}", no);
    }
    prop_assert_eq!(&container["cap_drop"], &json!(["ALL"]));
    prop_assert_eq!(&container["cap_add"], &json!([]));
    prop_assert_eq!(&container["no_new_privileges"], &json!(true));
    prop_assert_eq!(&container["read_only_filesystem"], &json!(true));
    prop_assert_eq!(&container["groups"], &json!([]));
    prop_assert!(container["seccomp_profile_path"].as_str().unwrap().ends_with("/seccomp.json"));
    prop_assert_eq!(&container["oom_score_adj"], &json!(500));
    for space in ["userns", "pidns", "utsns", "cgroupns"] {
        prop_assert_eq!(&container[space]["nsmode"], &json!("private"), "{}", space);
    }
    prop_assert_eq!(&container["ipcns"]["nsmode"], &json!("none"));
    prop_assert_eq!(&container["netns"]["nsmode"], &json!("bridge"));
    prop_assert_eq!(container["Networks"].as_object().unwrap().len(), 1);
    let map = &container["idmappings"]["UIDMap"];
    prop_assert_eq!(map, &json!([{"container_id": 0, "host_id": 1_879_048_192_u32, "size": 1024}]));
    prop_assert_eq!(&container["idmappings"]["GIDMap"], map);
    let user = container["user"].as_str().unwrap();
    prop_assert!(user.split(':').all(|id| (1..1024).contains(&id.parse::<u32>().unwrap())), "{}", user);
    let mut sum = 0;
    let mut bound = Vec::new();
    for mount in container["mounts"].as_array().unwrap() {
        let options = mount["options"].as_array().unwrap();
        for needed in ["noexec", "nosuid", "nodev"] {
            prop_assert!(options.contains(&json!(needed)), "{}", mount);
        }
        // Of the host's files, an instance sees only the two that the platform wrote for it, read-only.
        if mount["type"] == "bind" {
            prop_assert!(options.contains(&json!("ro")), "{}", mount);
            bound.push(mount["destination"].as_str().unwrap().to_owned());
            continue;
        }
        prop_assert_eq!(&mount["type"], &json!("tmpfs"));
        let size = options.iter().find_map(|o| o.as_str().unwrap().strip_prefix("size=")).unwrap();
        sum += size.parse::<u64>().unwrap();
        let path = mount["destination"].as_str().unwrap();
        let closed = ["/proc", "/sys", "/etc", "/run"];
        prop_assert!(
            path.len() > 1 && !closed.iter().any(|no| path == *no || path.starts_with(&format!("{no}/"))),
            "{}",
            path
        );
    }
    prop_assert_eq!(bound, ["/etc/passwd", "/etc/group"]);
    prop_assert_eq!(&container["manage_password"], &json!(false));
    let limits = &container["resource_limits"];
    prop_assert!(limits["memory"]["limit"].as_u64().unwrap() > sum);
    prop_assert_eq!(&limits["memory"]["limit"], &limits["memory"]["swap"]);
    prop_assert!(limits["cpu"]["quota"].as_u64().unwrap() >= 1_000);
    prop_assert_eq!(&limits["pids"]["limit"], &json!(512));
    prop_assert!(container["image"].as_str().unwrap().contains("/acme/"));
    prop_assert!(container["image"].as_str().unwrap().contains("@sha256:"));
    for never in
        ["volumes", "devices", "image_volumes", "portmappings", "hostadd", "secrets", "rootfs", "sysctl"]
    {
        prop_assert!(container.get(never).is_none(), "{}", never);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn every_spec_has_faults_or_compiles_to_a_safe_container(
        changes in prop::collection::vec((0_usize..16, anything()), 1..3),
        extra in prop::option::of(("[a-zA-Z_]{1,16}", anything())),
    ) {
        let mut spec = good();
        let keys: Vec<String> = spec.as_object().unwrap().keys().cloned().collect();
        for (at, value) in changes {
            match keys.get(at) {
                Some(key) => spec[key.as_str()] = value,
                None => spec["name"] = json!("other"),
            }
        }
        if let Some((key, value)) = extra {
            spec[key.as_str()] = value;
        }
        match render(&spec) {
            Ok(container) => keeps_every_invariant(&container)?,
            Err(faults) => {
                prop_assert!(!faults.is_empty());
                for fault in faults {
                    prop_assert!(!fault.message.is_empty() && !fault.docs.is_empty());
                }
            }
        }
    }

    #[test]
    fn every_accepted_size_compiles(
        cpu in 10_u32..100_000, memory in 32_u64..1_000_000, tmp in 4_u64..8_192, instances in 0_u32..=100,
        path in "/[a-z]{1,12}(/[a-z]{1,12}){0,3}", grace in 0_u16..=120,
    ) {
        let mut spec = good();
        spec["cpu"] = json!(format!("{cpu}m"));
        spec["memory"] = json!(format!("{memory}Mi"));
        spec["scratch"] = json!({"/tmp": format!("{tmp}Ki"), path: "4Ki"});
        spec["instances"] = json!(instances);
        spec["stop_grace"] = json!(grace);
        if let Ok(container) = render(&spec) {
            keeps_every_invariant(&container)?;
            prop_assert_eq!(&container["resource_limits"]["memory"]["limit"], &json!(memory << 20));
        }
    }
}
