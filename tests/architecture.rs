//! The rules of the source tree as tests: imports between modules, the place of queries, module comments,
//! reachable files, names of types, and plain words. Sizes are printed, not enforced.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot continue panics")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The order of modules. A module imports only modules before it.
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

/// The type names that may stand in several top folders, with the reason.
const ROLE_TYPES: &[(&str, &str)] =
    &[("Error", "each fallible layer has one, and callers name it by its module, such as `driver::Error`")];

fn files(folder: &str) -> Vec<PathBuf> {
    files_of(folder, "rs")
}

/// Returns the files below a folder that have this extension.
fn files_of(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::from(folder)];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // Skip build output.
                if !path.ends_with("target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Returns the code of a file, without comments and without its unit tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Returns the top-level module of a file.
fn module(path: &Path) -> String {
    let first = path.components().nth(1).unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// Returns the names that follow `crate::` in a text, including names in braces.
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

/// Returns the names of the types that a file defines. An indented definition is not counted: it belongs to
/// an impl block, a function, a macro, or a test module.
fn types(source: &str) -> Vec<String> {
    let definition = |line: &str| {
        let rest = match line.strip_prefix("pub") {
            None => line,
            Some(rest) if rest.starts_with('(') => rest.split_once(") ")?.1,
            Some(rest) => rest.strip_prefix(' ')?,
        };
        let rest = rest.strip_prefix("unsafe ").unwrap_or(rest);
        let rest = ["struct ", "enum ", "trait ", "type ", "union "]
            .iter()
            .find_map(|word| rest.strip_prefix(word))?;
        Some(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
    };
    source.lines().filter_map(definition).collect()
}

/// Returns the text of all comments: a `//` within a literal starts none.
fn comments(source: &str) -> String {
    let mut found = String::new();
    let mut rest = source;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let in_word = before.is_alphanumeric() || before == '_';
        let length = if rest.starts_with("//") {
            let line = rest.lines().next().unwrap_or_default();
            found.push_str(line.trim_start_matches(['/', '!']));
            found.push('\n');
            line.len()
        } else if let Some(length) = raw_string(rest).filter(|_| !in_word) {
            length
        } else if c == '"' {
            string(rest)
        } else if c == '\'' {
            character(rest)
        } else {
            c.len_utf8()
        };
        before = c;
        rest = &rest[length..];
    }
    found
}

/// Returns the length of the raw string at the start of a text, such as `r#"a"#`, if there is one.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let quoted = after.trim_start_matches('#');
    let end = format!("\"{}", &after[..after.len() - quoted.len()]);
    let body = quoted.strip_prefix('"')?;
    let close = body.find(end.as_str())?;
    Some(text.len() - body.len() + close + end.len())
}

/// Returns the length of the string at the start of a text, with its quotes.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Returns the length of the character literal at the start of a text; 1 for the quote of a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        // The escaped character may be a quote.
        (Some((_, '\\')), Some((at, escaped))) => {
            let after = at + escaped.len_utf8();
            text[after..].find('\'').map_or(1, |end| after + end + 1)
        }
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 1,
    }
}

/// Pronouns that stand for a component, a tenant or a user. Write the noun.
const PRONOUNS: &[&str] = &["whoever", "somebody", "nobody", "whom"];

/// Words that make a riddle of a sentence after `what`. Write the noun.
const AFTER_WHAT: &[&str] = &["is", "was", "it"];

/// Counts the words of a text, its pronouns, and its riddles.
fn words(text: &str) -> [usize; 3] {
    let text = text.to_lowercase();
    let words: Vec<&str> =
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect();
    let pronouns = words.iter().copied().filter(|word| PRONOUNS.contains(word)).count();
    let riddles = words.windows(2).filter(|pair| pair[0] == "what" && AFTER_WHAT.contains(&pair[1])).count();
    [words.len(), pronouns, riddles]
}

#[test]
fn modules_import_only_from_those_before_them() {
    let place = |name: &str| ORDER.iter().position(|known| *known == name);
    let mut wrong = Vec::new();
    for path in files("src") {
        let own = module(&path);
        // The agent's binary stands beside the library and may use all of it.
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
                forbid(query, "queries belong in a store");
            }
        }
        if in_store {
            for word in ["actix_web", "reqwest", "crate::http"] {
                forbid(word, "a store uses only the database");
            }
        }
        if module == "driver" {
            for word in ["sqlx", "actix_web", "crate::db", "crate::tenants", "crate::apps"] {
                forbid(word, "a driver uses no tables, no roles and no HTTP server");
            }
        }
        if name == "render.rs" || module == "fault" || module == "ids" {
            for word in ["tokio::", "std::fs", "now_utc()"] {
                forbid(word, "pure: no clock, no input, no output");
            }
        }
        // No command line is built from text, and only one place builds a statement from text.
        for word in ["new(\"sh\")", "new(\"bash\")", "new(\"/bin/"] {
            forbid(word, "no shell: arguments are a list");
        }
        if module != "db" {
            forbid("AssertSqlSafe", "a statement is a literal, and values are bound");
        }
        for word in ["todo!(", "unimplemented!(", "dbg!("] {
            forbid(word, "unfinished");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn each_file_says_why_it_exists() {
    for path in files("src").iter().chain(&files("tests")).chain(&files("benches")) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.starts_with("//! "), "{} does not start with //!", path.display());
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
fn each_type_name_stands_in_one_noun() {
    let mut nouns: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in files("src") {
        let in_tests =
            path.components().any(|part| matches!(part.as_os_str().to_str(), Some("tests" | "tests.rs")));
        if in_tests {
            continue;
        }
        for name in types(&fs::read_to_string(&path).unwrap()) {
            nouns.entry(name).or_default().insert(module(&path));
        }
    }
    assert!(nouns.len() > 100, "found only {} types", nouns.len());
    let wrong: Vec<String> = nouns
        .iter()
        .filter(|(name, nouns)| nouns.len() > 1 && !ROLE_TYPES.iter().any(|(role, _)| role == name))
        .map(|(name, nouns)| format!("{name}: {}", nouns.iter().cloned().collect::<Vec<_>>().join(", ")))
        .collect();
    assert!(wrong.is_empty(), "a type name stands in several nouns:\n{}", wrong.join("\n"));
    for (role, reason) in ROLE_TYPES {
        let used = nouns.get(*role).map_or(0, BTreeSet::len);
        assert!(used > 1, "{role} ({reason}) needs no exception: it stands in {used} nouns");
    }
    assert_eq!(
        types(
            "pub struct A<T>(T);\npub(in crate::a) enum B {\nenumerate C\n    type D = E;\ntype F = G;\n/// enum H\n"
        ),
        ["A", "B", "F"]
    );
}

#[test]
fn comments_use_plain_words() {
    let mut total = [0_usize; 3];
    let mut hits = Vec::new();
    for path in ["src", "tests", "benches"].into_iter().flat_map(files) {
        let counts = words(&comments(&fs::read_to_string(&path).unwrap()));
        for (sum, count) in total.iter_mut().zip(counts) {
            *sum += count;
        }
        if counts[1] + counts[2] > 0 {
            hits.push((counts[1] + counts[2], path));
        }
    }
    hits.sort();
    let worst: Vec<String> =
        hits.iter().rev().take(20).map(|(count, path)| format!("{count:5} {}", path.display())).collect();
    let [all, pronouns, riddles] = total;
    // At most 0.3 pronouns and 0.5 riddles in 1,000 words.
    assert!(
        pronouns * 10_000 <= all * 3 && riddles * 10_000 <= all * 5,
        "{all} words have {pronouns} of {PRONOUNS:?} and {riddles} of `what` before {AFTER_WHAT:?}; most in\n{}",
        worst.join("\n")
    );
    assert_eq!(
        comments(
            "let a = \"https://x\"; // one\nlet b = r#\"// \" //\"#; //! two\n/// 3's\n['\"', '\\'', 'd']; // four"
        ),
        " one\n two\n 3's\n four\n"
    );
    assert_eq!(words("What is it? Somebody's."), [5, 1, 1]);
}

#[test]
fn pages_and_faults_use_plain_words() {
    let mut paths = files_of("templates", "html");
    paths.push(PathBuf::from("src/fault/catalogue.rs"));
    let mut wrong = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        for piece in text.lines().flat_map(|line| line.split(['<', '>', '{', '}'])) {
            let [_, pronouns, riddles] = words(piece);
            if pronouns + riddles > 0 {
                wrong.push(format!("{}: {}", path.display(), piece.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "write the noun:\n{}", wrong.join("\n"));
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
