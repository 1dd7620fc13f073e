//! Tests of the spec's public interface: accepted documents, every fault with its position, and properties.

use proptest::prelude::*;

use super::*;

const GOOD: &str = "\
spec: v1
name: web
image: team/web:1.4.2
cpu: 250m
memory: 256Mi
instances: 2
env: { LOG_LEVEL: info, java.home: /opt }
port: 8080
health: { http: { path: /healthz }, grace: 5 }
scratch: { /var/cache: 64Mi }
stop_grace: 10
connects: { apps: [api] }
";

fn yaml(text: &str) -> Result<AppSpec, Vec<Fault>> {
    AppSpec::parse(text.as_bytes(), Format::Yaml)
}

fn json(text: &str) -> Result<AppSpec, Vec<Fault>> {
    AppSpec::parse(text.as_bytes(), Format::Json)
}

/// Returns code, path, line and column of each fault.
fn seen(result: Result<AppSpec, Vec<Fault>>) -> Vec<(u16, String, u32, u32)> {
    result.unwrap_err().into_iter().map(|f| (f.code.0, f.path, f.line, f.column)).collect()
}

#[test]
fn a_good_spec_is_read_as_written() {
    let spec = yaml(GOOD).unwrap();
    assert_eq!(spec.name().as_str(), "web");
    assert_eq!(spec.image().to_string(), "team/web:1.4.2");
    assert_eq!((spec.cpu_millis(), spec.memory(), spec.instances()), (250, 256 << 20, 2));
    assert_eq!(spec.env()["java.home"], "/opt");
    let check = crate::driver::workload::HealthCheck::Http { path: "/healthz".into(), port: 8080 };
    assert_eq!(spec.health().unwrap().check, check);
    assert_eq!(spec.scratch()["/tmp"], Scratch::of(TMP));
    assert_eq!(spec.scratch()["/dev/shm"], Scratch::of(SHM));
    assert_eq!(spec.scratch()["/var/cache"], Scratch::of(64 << 20));
    assert_eq!(spec.connects().apps[0].to_string(), "api");
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let spec =
        json(r#"{"spec":"v1","name":"a","image":"a:1","cpu":0.25,"memory":"64Mi","port":9000}"#).unwrap();
    assert_eq!(
        (spec.cpu_millis(), spec.instances(), spec.singleton(), spec.stop_grace()),
        (250, 1, false, 30)
    );
    let health = spec.health().unwrap();
    assert_eq!(health.check, HealthCheck::Tcp { port: 9000 });
    assert_eq!(
        (health.purpose, spec.says_health()),
        (HealthPurpose::Readiness, false),
        "a port alone ends nothing"
    );
}

#[test]
fn health_is_said_left_out_or_refused_and_a_port_may_be_udp() {
    let of = |port: &str, health: &str| {
        let spec = yaml(&format!(
            "{}\n{port}\n{health}",
            with("port", "").replace("health: { http: { path: /healthz }, grace: 5 }\n", "")
        ));
        let spec = spec.unwrap_or_else(|faults| panic!("{port} {health}: {faults:?}"));
        assert_eq!(AppSpec::from_stored(&spec.to_json()).unwrap(), spec);
        (spec.serves(), spec.health().map(|health| health.purpose), spec.says_health())
    };
    let tcp = Some(Serves::tcp(8080));
    let udp = Some(Serves { protocol: Protocol::Udp, port: 5514 });
    assert_eq!(of("", ""), (None, None, false));
    assert_eq!(of("port: 8080", ""), (tcp, Some(HealthPurpose::Readiness), false));
    assert_eq!(of("port: {port: 8080}", "health: none"), (tcp, None, true));
    assert_eq!(
        of("port: 8080", "health: {tcp: {}}"),
        (tcp, Some(HealthPurpose::Restart), true),
        "asked for, it is kept"
    );
    assert_eq!(of("port: {port: 5514, protocol: udp}", ""), (udp, None, false));
    assert_eq!(
        of("port: {port: 5514, protocol: udp}", "health: {tcp: {port: 9000}}").1,
        Some(HealthPurpose::Restart)
    );
}

#[test]
fn scratch_has_a_size_a_use_and_room_for_shared_memory() {
    let given = with(
        "scratch",
        "scratch: {/run: 1Mi, /tmp: {size: 32Mi, exec: true}, /var/lib/pg: 2Mi, /dev/shm: 64Mi}",
    );
    let spec = yaml(&given).unwrap();
    assert_eq!(spec.scratch()["/tmp"], Scratch { size: 32 << 20, exec: true });
    assert_eq!(spec.scratch()["/dev/shm"].size, 64 << 20);
    assert!(spec.scratch().contains_key("/run") && !spec.scratch()["/run"].exec);
    assert_eq!(AppSpec::from_stored(&spec.to_json()).unwrap(), spec);
    let plain = yaml(&with("scratch", "scratch: {/tmp: {size: 16Mi, exec: false}}")).unwrap();
    assert!(plain.to_json().get("scratch").is_none(), "the default is not printed");
    // A release of an earlier version, without room for the default, still parses without a fault.
    let small = with("memory", "memory: 25Mi").replace("scratch: { /var/cache: 64Mi }\n", "");
    assert_eq!(yaml(&small).unwrap().scratch()["/dev/shm"].size, 1 << 20);
}

#[test]
fn all_faults_come_together_with_their_places() {
    let text = "\
spec: v2
name: Web
image: docker.io/library/nginx:1
cpu: lots
memry: 256Mi
privileged: true
replicas: 3
port: 80
env: { A: 1, BULKHEAD_X: y }
health: { http: { host: evil } }
scratch: { /etc/x: 1Mi }
";
    assert_eq!(
        seen(yaml(text)),
        [
            (115, "memory".into(), 1, 1),
            (116, "spec".into(), 1, 7),
            (117, "name".into(), 2, 7),
            (118, "image".into(), 3, 8),
            (119, "cpu".into(), 4, 6),
            (106, "memry".into(), 5, 1),
            (107, "privileged".into(), 6, 1),
            (106, "replicas".into(), 7, 1),
            (125, "port".into(), 8, 7),
            (114, "env.A".into(), 9, 11),
            (123, "env.BULKHEAD_X".into(), 9, 14),
            (115, "health.http.path".into(), 10, 17),
            (110, "health.http.host".into(), 10, 19),
            (127, "scratch./etc/x".into(), 11, 12),
        ]
    );
    let faults = yaml(text).unwrap_err();
    let of = |path: &str| faults.iter().find(|f| f.path == path).unwrap();
    assert_eq!(of("memry").suggestion.as_deref(), Some("did you mean memory?"));
    assert_eq!(of("replicas").suggestion.as_deref(), Some("use instances"));
    assert_eq!(of("env.A").suggestion.as_deref(), Some("write it in quotes"));
    assert!(of("privileged").reason.is_some());
    assert!(!serde_json::to_string(&faults).unwrap().contains("evil"), "values are never echoed");
}

#[test]
fn json_has_the_same_faults_at_its_own_places() {
    let text = "{\n  \"spec\": \"v1\",\n  \"name\": \"web\",\n  \"image\": \"web\",\n  \"cpu\": \"250m\",\n  \"memory\": 5,\n  \"memory\": \"64Mi\",\n  \"hostNetwork\": true\n}";
    assert_eq!(
        seen(json(text)),
        [
            (118, "image".into(), 4, 12),
            (120, "memory".into(), 6, 13),
            (105, "memory".into(), 7, 3),
            (108, "hostNetwork".into(), 8, 3),
        ]
    );
}

/// Replaces one line of the good spec.
fn with(field: &str, line: &str) -> String {
    let mut lines: Vec<&str> = GOOD.lines().filter(|l| !l.starts_with(&format!("{field}:"))).collect();
    lines.push(line);
    lines.join("\n")
}

#[test]
fn each_rule_has_its_code() {
    let cases: &[(&str, &str, u16)] = &[
        ("image", "image: web", 118),
        ("image", "image: web:latest@sha256:00", 118),
        ("image", "image: localhost:5000/web:1", 118),
        ("image", "image: https://x/web:1", 118),
        ("image", "image: ../other/web:1", 118),
        ("image", "image: 3", 114),
        ("cpu", "cpu: 5m", 119),
        ("cpu", "cpu: 0.0001", 119),
        ("cpu", "cpu: -1", 119),
        ("cpu", "cpu: 1e3", 119),
        ("cpu", "cpu: 18446744073709551.999", 119),
        ("cpu", "cpu: [1]", 114),
        ("memory", "memory: 4Mi", 120),
        ("memory", "memory: 256M", 120),
        ("memory", "memory: 268435456", 120),
        ("memory", "memory: 0.5Gi", 120),
        ("memory", "memory: 99999999999999999999Gi", 120),
        ("instances", "instances: 101", 121),
        ("instances", "instances: 1.5", 121),
        ("instances", "instances: '1'", 114),
        ("singleton", "singleton: true", 129),
        ("singleton", "singleton: yes", 114),
        ("singleton", "singleton: True", 114),
        ("command", "command: ls -l", 114),
        ("command", "command: []", 122),
        ("command", "command: ['']", 122),
        ("args", "args: [1]", 114),
        ("env", "env: [A=b]", 114),
        ("env", "env: {1A: b}", 123),
        ("env", "env: {A: null}", 114),
        ("env", "env: {A: ~}", 114),
        ("env", "env: {A: true}", 114),
        ("env", "env: {A: \"\\0\"}", 124),
        ("port", "port: 80", 125),
        ("port", "port: 65536", 125),
        ("port", "port: 0x1f90", 125),
        ("port", "port: {port: 53, protocol: udp}", 125),
        ("port", "port: {port: 5353, protocol: sctp}", 125),
        ("port", "port: {protocol: udp}", 115),
        ("port", "port: {port: 5353, host: 53}", 110),
        ("port", "port: {port: 5514, protocol: udp}", 126),
        ("health", "health: None", 114),
        ("health", "health: false", 114),
        ("health", "health: {}", 126),
        ("health", "health: {http: {path: /}, tcp: {}}", 126),
        ("health", "health: {http: {path: healthz}}", 126),
        ("health", "health: {http: {path: /, headers: {Host: x}}}", 110),
        ("health", "health: {tcp: {}, grace: 601}", 126),
        ("health", "health: {exec: [ls]}", 112),
        ("scratch", "scratch: {/: 1Mi}", 127),
        ("scratch", "scratch: {/a/../b: 1Mi}", 127),
        ("scratch", "scratch: {/proc/x: 1Mi}", 127),
        ("scratch", "scratch: {/a: 1Mi, /a/b: 1Mi}", 127),
        ("scratch", "scratch: {/tmp/a: 1Mi}", 127),
        ("scratch", "scratch: {/a: 250Mi}", 128),
        ("scratch", "scratch: {/dev/shm: 250Mi}", 128),
        ("scratch", "scratch: {/dev/shm/x: 1Mi}", 127),
        ("scratch", "scratch: {/run/secrets: 1Mi}", 127),
        ("scratch", "scratch: {/var/run/secrets/x: 1Mi}", 127),
        ("scratch", "scratch: {/run: 1Mi, /run/a: 1Mi}", 127),
        ("scratch", "scratch: {/a: {exec: true}}", 115),
        ("scratch", "scratch: {/a: {size: 1Mi, exec: yes}}", 114),
        ("scratch", "scratch: {/a: {size: 1Mi, mode: 0777}}", 106),
        ("stop_grace", "stop_grace: 121", 121),
        ("connects", "connects: {apps: [web]}", 130),
        ("connects", "connects: {apps: [a, a]}", 130),
        ("connects", "connects: {apps: [other/app/x]}", 117),
        ("connects", "connects: {apps: [o/app]}", 117),
        ("connects", "connects: {apps: [admin/app]}", 117),
        ("connects", "connects: {services: [kafka/x]}", 117),
        ("connects", "connects: {egress: [1.1.1.1]}", 117),
        ("connects", "connects: {egress: {a: b}}", 114),
        ("connects", "connects: {services: [kafka, kafka]}", 130),
        ("connects", "connects: {services: [kafka], apps: [kafka]}", 130),
        ("connects", "connects: {hosts: [a]}", 106),
        ("connects", "secrets: {A: b}", 113),
        ("connects", "volumes: [/var/run/docker.sock:/x]", 113),
        ("connects", "user: 0:0", 109),
        ("connects", "restart: always", 112),
    ];
    for (field, line, code) in cases {
        let faults = yaml(&with(field, line)).expect_err(line);
        assert!(faults.iter().any(|f| f.code.0 == *code), "{line}: {faults:?}");
        for fault in &faults {
            assert!(catalogue::explanation(&fault.code.to_string()).is_some(), "{line}");
            assert!(fault.line > 0, "{line}: {fault:?}");
        }
    }
}

#[test]
fn every_field_that_stands_twice_is_named_with_its_path() {
    let text = with("env", "env: { A: x, A: y, B: x, B: y }\nhealth: { tcp: { port: 2000, port: 2001 } }");
    let twice: Vec<_> = seen(yaml(&text)).into_iter().filter(|fault| fault.0 == 105).map(|f| f.1).collect();
    assert_eq!(twice, ["env.A", "env.B", "health", "health.tcp.port"]);
    let many: String = (0..60).map(|n| format!("K{}: a, ", n % 30)).collect();
    assert_eq!(seen(yaml(&with("env", &format!("env: {{ {many} }}")))).len(), 30);
}

#[test]
fn a_document_of_nothing_but_faults_costs_little() {
    let text: String = (0..1_900).map(|n| format!("x{n}: 1\n")).collect();
    let faults = yaml(&text).unwrap_err();
    assert_eq!(faults.len(), 201);
    assert!(faults.iter().any(|fault| fault.code == catalogue::MANY));
}

#[test]
fn what_is_stored_is_read_again_however_long_it_became() {
    let given = with("env", &format!("env:\n  A: |+\n{}", "\n".repeat(31 << 10)));
    let spec = yaml(&given).unwrap();
    let stored = spec.to_json();
    assert!(stored.to_string().len() > 60 << 10);
    assert_eq!(AppSpec::from_stored(&stored).unwrap(), spec);
    let mut value =
        serde_json::json!({"spec": "v1", "name": "a", "image": "a:1", "cpu": "1", "memory": "64Mi"});
    value["env"] = serde_json::json!({"A": "\u{7f}\"".repeat(10_000)});
    value["args"] = serde_json::json!(["\u{1}".repeat(2_000)]);
    let spec = json(&value.to_string()).unwrap();
    assert_eq!(AppSpec::from_stored(&spec.to_json()).unwrap(), spec);
}

/// The parser refuses every document that the schema refuses.
#[test]
fn the_schema_and_the_parser_agree() {
    let schema = jsonschema::validator_for(&schema()).unwrap();
    let good: serde_json::Value = yaml(GOOD).unwrap().to_json();
    assert!(schema.is_valid(&good), "{good}");
    let cases: &[(&str, serde_json::Value)] = &[
        ("/spec", serde_json::json!("v2")),
        ("/name", serde_json::json!("Web")),
        ("/name", serde_json::json!("a-")),
        ("/image", serde_json::json!(3)),
        ("/cpu", serde_json::json!("lots")),
        ("/cpu", serde_json::json!(1001)),
        ("/memory", serde_json::json!("256M")),
        ("/memory", serde_json::json!(256)),
        ("/instances", serde_json::json!(101)),
        ("/instances", serde_json::json!(-1)),
        ("/env", serde_json::json!({"1A": "b"})),
        ("/env", serde_json::json!({"A": 1})),
        ("/env", serde_json::json!({"BULKHEAD_A": "b"})),
        ("/port", serde_json::json!(80)),
        ("/port", serde_json::json!({"protocol": "udp"})),
        ("/port", serde_json::json!({"port": 5514, "protocol": "sctp"})),
        ("/health", serde_json::json!("off")),
        ("/health", serde_json::json!({})),
        ("/health", serde_json::json!({"http": {"path": "x"}})),
        ("/health", serde_json::json!({"tcp": {}, "http": {"path": "/"}})),
        ("/health", serde_json::json!({"tcp": {}, "grace": 601})),
        ("/scratch", serde_json::json!({"x": "1Mi"})),
        ("/scratch", serde_json::json!({"/x": {"exec": true}})),
        ("/scratch", serde_json::json!({"/x": {"size": "1Mi", "exec": "true"}})),
        ("/scratch", serde_json::json!({"/x": {"size": "1Mi", "uid": 0}})),
        ("/stop_grace", serde_json::json!(121)),
        ("/connects", serde_json::json!({"apps": ["a", "a"]})),
        ("/connects", serde_json::json!({"apps": ["a/b"]})),
        ("/connects", serde_json::json!({"hosts": []})),
    ];
    for (place, value) in cases {
        let mut spec = good.clone();
        *spec.pointer_mut(place).unwrap() = value.clone();
        assert!(!schema.is_valid(&spec), "the schema takes {place}: {value}");
        assert!(json(&spec.to_string()).is_err(), "the parser takes {place}: {value}");
    }
    for field in fields::REQUIRED {
        let mut spec = good.clone();
        spec.as_object_mut().unwrap().remove(*field);
        assert!(!schema.is_valid(&spec) && json(&spec.to_string()).is_err(), "{field}");
    }
    let mut spec = good;
    spec["privileged"] = serde_json::json!(true);
    assert!(!schema.is_valid(&spec) && json(&spec.to_string()).is_err());
}

#[test]
fn documents_that_are_none_stop_at_once() {
    let bomb = format!("a: &a [x]\n{}", (0..9).map(|n| format!("b{n}: [*a, *a]\n")).collect::<String>());
    let deep = "[".repeat(100_000);
    let wide = format!("{{\"env\":[{}0]}}", "0,".repeat(2_500));
    let cases: Vec<(Vec<u8>, Format, u16)> = vec![
        (bomb.into_bytes(), Format::Yaml, 103),
        (b"spec: !!str v1".to_vec(), Format::Yaml, 103),
        (b"<<: {a: b}".to_vec(), Format::Yaml, 103),
        (b"spec: v1\n---\nspec: v1\n".to_vec(), Format::Yaml, 103),
        (b"".to_vec(), Format::Yaml, 102),
        (b"a: [".to_vec(), Format::Yaml, 102),
        (b"{\"a\": 1} x".to_vec(), Format::Json, 102),
        (b"{\"a\": 01}".to_vec(), Format::Json, 102),
        (b"{'a': 1}".to_vec(), Format::Json, 102),
        (b"{\"a\": \"\\ud800\"}".to_vec(), Format::Json, 102),
        (b"{\"a\": NaN}".to_vec(), Format::Json, 102),
        (deep.as_bytes()[..60_000].to_vec(), Format::Json, 104),
        (deep.as_bytes()[..60_000].to_vec(), Format::Yaml, 104),
        (wide.into_bytes(), Format::Json, 104),
        (vec![b'x'; 100 << 20], Format::Yaml, 100),
        (b"spec: v1\nname: \xff".to_vec(), Format::Yaml, 101),
    ];
    for (text, format, code) in cases {
        let faults = AppSpec::parse(&text, format).unwrap_err();
        let start = String::from_utf8_lossy(&text[..text.len().min(20)]).into_owned();
        assert_eq!(faults[0].code.0, code, "{start}: {faults:?}");
    }
    assert_eq!(seen(AppSpec::parse(b"spec: v1\nname: \xff", Format::Yaml)), [(101, String::new(), 2, 7)]);
}

#[test]
fn the_terminal_shows_the_line_and_obeys_nothing() {
    let broken = "image: \"x\x1b]0;owned\x07\"\n";
    let shown = show(broken, "web.yaml", &yaml(broken).unwrap_err(), Colour::Never);
    assert!(!shown.contains('\x1b') && !shown.contains('\x07'), "{shown}");
    let text = "spec: v1\nname: web\nimage: web:1\ncpu: 1\nmemory: 64Mi\nmemry: 1 # \u{202e}\n";
    let shown = match yaml(text) {
        Err(faults) => show(text, "web.yaml", &faults, Colour::Never),
        Ok(_) => panic!("accepted"),
    };
    let long = format!(
        "spec: v1\nname: web\nimage: web:1\nmemory: 64Mi\nenv: {{ A: {} }}\ncpu: x\n",
        "0".repeat(30)
    );
    let long = long.replace("env: {", &format!("env: {{ B: {},", "é".repeat(300)));
    let shown_long = show(&long, "a\u{202e}b", &yaml(&long).unwrap_err(), Colour::Never);
    let lines: Vec<Vec<char>> = shown_long.lines().map(|line| line.chars().collect()).collect();
    let caret = lines.iter().position(|line| line.contains(&'^')).unwrap();
    let column = lines[caret].iter().position(|c| *c == '^').unwrap();
    assert!(lines[caret - 1].len() < 180 && lines[caret - 1][column] == '0', "{shown_long}");
    assert!(!shown_long.contains('\u{202e}'));
    assert!(shown.contains("  --> web.yaml:6:1\n   6 | memry: 1 # \u{fffd}\n     | ^\n"), "{shown}");
}

fn spec_strategy() -> impl Strategy<Value = AppSpec> {
    let name = "[a-z]([a-z0-9-]{0,20}[a-z0-9])?";
    let texts = prop::option::of(prop::collection::vec("[ -~äé\n\t]{1,20}", 1..4));
    let image = prop_oneof![
        "[a-z0-9]{1,8}(/[a-z0-9]{1,8})?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}",
        Just(format!("a@sha256:{}", "0a".repeat(32)))
    ];
    let env = prop::collection::btree_map("[A-Za-z_][A-Za-z0-9_.-]{0,10}", "[ -~äé\n\t\"\\\\]{0,30}", 0..5);
    let health = prop::option::of((any::<bool>(), 1024_u16..=65535, 0_u16..=600));
    let scratch = prop::collection::btree_map("/(a|b|c)[a-z]{0,5}", (1_u64..64).prop_map(|n| n << 12), 0..4);
    (
        (name, image, texts.clone(), texts, 10_u32..5000, 64_u64..4096),
        (0_u32..=100, any::<bool>(), env, prop::option::of(1024_u16..=65535), health),
        (scratch, 0_u16..=120, prop::collection::btree_set("x[a-z0-9]{1,10}", 0..4)),
    )
        .prop_map(|((name, image, command, args, cpu, memory), (instances, singleton, env, port, health), (scratch, grace, connects))| {
            let mut value = serde_json::json!({
                "spec": "v1", "name": name, "image": image, "cpu": format!("{cpu}m"),
                "memory": format!("{memory}Mi"), "instances": if singleton { instances.min(1) } else { instances },
                "singleton": singleton, "env": env, "stop_grace": grace,
                "scratch": scratch.into_iter().map(|(k, v)| {
                    let size = format!("{}Ki", v >> 10);
                    (k, if v % 3 == 0 { serde_json::json!({"size": size, "exec": v % 2 == 0}) } else { serde_json::json!(size) })
                }).collect::<BTreeMap<_, _>>(),
                "connects": {
                    "apps": connects.iter().filter(|c| **c != name).map(|c| if c.len() > 6 { format!("other/{c}") } else { c.clone() }).collect::<Vec<_>>(),
                    "services": connects.iter().map(|c| format!("s{c}")).collect::<Vec<_>>(),
                    "egress": connects.iter().take(1).collect::<Vec<_>>(),
                },
            });
            if let Some(command) = command { value["command"] = serde_json::json!(command); }
            if let Some(args) = args { value["args"] = serde_json::json!(args); }
            if let Some(port) = port { value["port"] = serde_json::json!(port); }
            if let Some((http, port, grace)) = health {
                value["health"] = if http {
                    serde_json::json!({"http": {"path": "/h", "port": port}, "grace": grace})
                } else {
                    serde_json::json!({"tcp": {"port": port}, "grace": grace})
                };
            }
            AppSpec::parse(value.to_string().as_bytes(), Format::Json).unwrap_or_else(|f| panic!("{value}: {f:?}"))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_printed_is_read_as_the_same(spec in spec_strategy()) {
        prop_assert_eq!(&AppSpec::from_stored(&spec.to_json()).unwrap(), &spec);
        let printed = spec.to_json().to_string();
        prop_assert_eq!(&json(&printed).unwrap(), &spec);
        // JSON is valid YAML, unless it has an escape that YAML reads differently.
        prop_assert_eq!(&yaml(&printed).unwrap(), &spec);
    }

    #[test]
    fn nothing_makes_it_panic(text in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = AppSpec::parse(&text, Format::Json);
        let _ = AppSpec::parse(&text, Format::Yaml);
    }

    #[test]
    fn mutations_are_refused_or_keep_every_bound(at in 0_usize..GOOD.len(), to in any::<u8>()) {
        let mut text = GOOD.as_bytes().to_vec();
        text[at] = to;
        if let Ok(spec) = AppSpec::parse(&text, Format::Yaml) {
            prop_assert!(spec.memory() >= LEAST_MEMORY && spec.cpu_millis() >= 10 && spec.instances() <= INSTANCES);
            prop_assert!(spec.serves().is_none_or(|serves| serves.port >= 1024));
            prop_assert!(spec.scratch().contains_key("/tmp"));
        }
    }
}

#[test]
fn a_boolean_that_was_meant_is_told_as_it_is_written() {
    for (text, instead) in [
        ("True", Some("write true")),
        ("yes", Some("write true")),
        ("\"true\"", Some("write true")),
        ("1", Some("write true")),
        ("Off", Some("write false")),
        ("0", Some("write false")),
        ("maybe", None),
        ("[true]", None),
    ] {
        let spec = format!("spec: v1\nname: web\nimage: web:1\ncpu: 10m\nmemory: 64Mi\nsingleton: {text}\n");
        let faults = AppSpec::parse(spec.as_bytes(), Format::Yaml).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert_eq!(faults[0].suggestion.as_deref(), instead, "{text}");
        assert_eq!(faults[0].path, "singleton");
    }
}
