//! The commands that need no platform: their output and exit codes.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;

const WRONG: &str = "spec: v1\nname: web\nimage: web:1\ncpu: 250m\nmemry: 64Mi\nprivileged: true\n";
const GOOD: &str = "spec: v1\nname: web\nimage: web:1\ncpu: 250m\nmemory: 64Mi\n";

fn bulkhead(args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
fn check_shows_every_fault_at_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("web.yaml");
    std::fs::write(&file, WRONG).unwrap();
    let file = file.display().to_string();
    let (code, _, shown) = bulkhead(&["check", &file], "");
    assert_eq!(code, Some(1));
    for part in ["BH-115", ":5:1", "5 | memry: 64Mi", "^", "did you mean memory?", "BH-107", "3 fault(s)"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(!shown.contains('\u{1b}'), "no colours without a terminal");
    // The same faults as JSON, and from standard input.
    let (code, json, _) = bulkhead(&["check", "-", "-o", "json"], WRONG);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, json["ok"].as_bool()), (Some(1), Some(false)));
    let codes: Vec<&str> =
        json["faults"].as_array().unwrap().iter().map(|fault| fault["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["BH-115", "BH-106", "BH-107"]);
    assert_eq!(json["faults"][1]["line"], 5);
    let (code, said, _) = bulkhead(&["check", "-"], GOOD);
    assert!(code == Some(0) && said.contains("has no fault"), "{said}");
    let (code, _, said) = bulkhead(&["check", "/nowhere.yaml"], "");
    assert!(code == Some(1) && said.contains("/nowhere.yaml: No such file"), "{said}");
}

#[test]
fn render_shows_what_it_compiles_to() {
    let (code, json, _) = bulkhead(&["render", "-", "--tenant", "acme", "--driver", "podman"], GOOD);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, json["read_only_filesystem"].as_bool()), (Some(0), Some(true)));
    assert!(json["image"].as_str().unwrap().contains("/acme/web@sha256:"), "{json}");
    let (code, _, said) = bulkhead(&["render", "-", "--tenant", "Acme!"], GOOD);
    assert!(code == Some(2) && said.contains("a tenant name must start with a letter"), "{said}");
}
