//! The house's rules as a test: who may import whom, where queries stand, that each file says why it
//! exists and is reached. Sizes are printed, not enforced.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A module imports only from those before it.
const ORDER: &[&str] = &[
    "ids",
    "fault",
    "docs",
    "permits",
    "error",
    "outgoing",
    "keys",
    "readiness",
    "prober",
    "policy",
    "resolver",
    "driver",
    "config",
    "telemetry",
    "db",
    "quotas",
    "reconcile",
    "http",
    "audit",
    "access",
    "activity",
    "uid_ranges",
    "tenants",
    "images",
    "registries",
    "apps",
    "networks",
    "routes",
    "startup",
    "standalone",
    "commands",
    "ask",
    "main",
];

fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::from(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What a build has left is none of ours.
                if !path.ends_with("target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The code of a file without comments and without its own tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The module of the first level that a file belongs to.
fn module(path: &Path) -> String {
    let first = path.components().nth(1).unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// What follows `crate::` in a text: single names and those in braces.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let name = |text: &str| -> String {
            text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
        };
        match rest.strip_prefix('{') {
            None => {
                found.insert(name(rest));
            }
            Some(list) => {
                let mut depth = 0;
                let mut start = 0;
                for (n, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => {
                            found.insert(name(&list[start..n]));
                            break;
                        }
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            found.insert(name(&list[start..n]));
                            start = n + 1;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    found
}

#[test]
fn modules_import_only_from_those_before_them() {
    let place = |name: &str| ORDER.iter().position(|known| *known == name);
    let mut wrong = Vec::new();
    for path in files("src") {
        let own = module(&path);
        // The root half's own binary stands beside the library and sees all of it.
        if own == "lib" || own == "bin" {
            continue;
        }
        let here = place(&own).unwrap_or_else(|| panic!("{own} has no place in the order"));
        for import in imports(&code(&path)) {
            if place(&import).is_some_and(|there| there > here) {
                wrong.push(format!("{}: {own} imports {import}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(
        imports("use crate::{a, b::{c, d}, e}; crate::f::g()"),
        ["a", "b", "e", "f"].map(String::from).into()
    );
}

#[test]
fn each_role_keeps_to_its_work() {
    let mut wrong = Vec::new();
    for path in files("src") {
        let code = code(&path);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let module = module(&path);
        let mut forbid = |what: &str, why: &str| {
            if code.contains(what) {
                wrong.push(format!("{}: {what}: {why}", path.display()));
            }
        };
        let in_store = name == "store.rs" || path.components().any(|part| part.as_os_str() == "store");
        let is_database = in_store || module == "db" || name == "postgres.rs";
        if !is_database {
            for query in ["sqlx::query", "query_as!", "query_scalar!"] {
                forbid(query, "queries stand in a store");
            }
        }
        if in_store {
            for word in ["actix_web", "reqwest", "crate::http"] {
                forbid(word, "a store knows the database alone");
            }
        }
        if module == "driver" {
            for word in ["sqlx", "actix_web", "crate::db", "crate::tenants", "crate::apps"] {
                forbid(word, "a driver knows no tables, no roles and no HTTP server");
            }
        }
        if name == "render.rs" || module == "fault" || module == "ids" {
            for word in ["tokio::", "std::fs", "now_utc()"] {
                forbid(word, "pure: no clock, no input, no output");
            }
        }
        // Checklist of attacks: no command line is put together from text, and no statement but in one place.
        for word in ["new(\"sh\")", "new(\"bash\")", "new(\"/bin/"] {
            forbid(word, "no shell: arguments are a list");
        }
        if module != "db" {
            forbid("AssertSqlSafe", "a statement is a literal, values are bound");
        }
        for word in ["todo!(", "unimplemented!(", "dbg!("] {
            forbid(word, "left open");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn each_file_says_why_it_exists() {
    for path in files("src").iter().chain(&files("tests")).chain(&files("benches")) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.starts_with("//! "), "{} does not open with //!", path.display());
    }
}

#[test]
fn each_file_is_reached() {
    let all: BTreeSet<PathBuf> = files("src").into_iter().collect();
    let mut reached = BTreeSet::new();
    let mut open: Vec<PathBuf> = ["src/lib.rs", "src/main.rs", "src/bin/agent.rs"].map(PathBuf::from).into();
    while let Some(path) = open.pop() {
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy();
        let is_root = matches!(&*name, "lib" | "main" | "mod");
        let folder = path.parent().unwrap();
        let folder = if is_root { folder.to_path_buf() } else { folder.join(&*name) };
        for line in text.lines() {
            let line = line.trim().trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
            let line = line.trim_start_matches("pub ");
            let Some(name) = line.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')) else {
                continue;
            };
            for file in [folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")] {
                if all.contains(&file) {
                    open.push(file);
                }
            }
        }
        reached.insert(path);
    }
    let lost: Vec<_> = all.difference(&reached).collect();
    assert!(lost.is_empty(), "no mod leads to {lost:?}");
}

#[test]
fn sizes_are_printed() {
    let mut sizes: Vec<(usize, PathBuf)> = files("src")
        .into_iter()
        .map(|path| (fs::read_to_string(&path).unwrap().lines().count(), path))
        .collect();
    sizes.sort();
    for (lines, path) in sizes.iter().rev().take(8) {
        println!("{lines:5} {}", path.display());
    }
    assert!(!sizes.is_empty());
}
