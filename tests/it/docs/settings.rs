//! Generates the page of all settings: names, types and meanings from the source, defaults from parsed settings.

use std::fmt::Write as _;
use std::fs;

use bulkhead::config::{Config, Limits};

use super::reference::cell;
use super::root;

/// The smallest valid settings. Every other key has its default.
const SMALLEST: &str = r#"
installation = "abcd"
[server]
listen = "127.0.0.1:8080"
pull_listen = "127.0.0.1:8081"
[database]
host = "/run/x"
name = "x"
user = "x"
[registry]
url = "http://127.0.0.1:5000"
signing_key = "/x"
[agent]
socket = "/x"
[access]
key = "/x"
[pools]
uid_start = 1879048192
uid_end = 1912602624
network = "10.64.0.0/12"
"#;

/// A key of the settings.
struct Key {
    name: String,
    kind: String,
    about: String,
}

/// Returns the fields of a struct in a source file.
fn fields(file: &str, name: &str) -> Vec<Key> {
    let text = fs::read_to_string(root().join(file)).unwrap();
    let start = format!("pub struct {name} {{\n");
    let rest = text.split(&start).nth(1).unwrap_or_else(|| panic!("{file} has no struct {name}"));
    let body = rest.split("\n}\n").next().unwrap();
    let mut about = String::new();
    let mut keys = Vec::new();
    for line in body.lines().map(str::trim) {
        if let Some(part) = line.strip_prefix("///") {
            about.push_str(part);
        } else if let Some((name, kind)) = line
            .split_once(": ")
            .filter(|(name, _)| name.chars().all(|c| c.is_alphanumeric() || " _()".contains(c)))
        {
            let name = name.rsplit(' ').next().unwrap().to_owned();
            let about = std::mem::take(&mut about).trim().to_owned();
            keys.push(Key { name, kind: kind_of(kind.trim_end_matches(',')), about });
        }
    }
    assert!(!keys.is_empty(), "{file}: {name}");
    keys
}

/// Describes a Rust type in terms of TOML.
fn kind_of(rust: &str) -> String {
    let inner = rust.strip_prefix("Option<").and_then(|rest| rest.strip_suffix('>')).unwrap_or(rust);
    if let Some(item) = inner.strip_prefix("Vec<").and_then(|rest| rest.strip_suffix('>')) {
        return match item {
            "ProviderSettings" | "RoleMapping" => "list of tables".to_owned(),
            other => format!("list of: {}", kind_of(other)),
        };
    }
    match inner {
        "bool" => "true or false",
        "u8" | "u16" | "u32" | "i64" | "usize" => "number",
        "PathBuf" => "path",
        "SocketAddr" => "address with port",
        "Cidr" | "ProxyNetwork" | "Subnet" => "network",
        "IdRange" => "range of ids",
        "LogFormat" => "`text` or `json`",
        "Installation" => "four letters",
        "String" | "crate::ids::TenantName" => "string",
        other => panic!("the settings have a new type, {other}: say here what it is in TOML"),
    }
    .to_owned()
}

/// Returns the default of a key, or `required`.
fn default(section: &str, key: &Key) -> String {
    let given: toml::Table = SMALLEST.parse().unwrap();
    let whole = toml::Table::try_from(Config::parse(SMALLEST, &[]).unwrap()).unwrap();
    let within = |table: &toml::Table| {
        let place =
            if section.is_empty() { Some(table) } else { table.get(section).and_then(toml::Value::as_table) };
        place.and_then(|place| place.get(&key.name)).cloned()
    };
    match (within(&given), within(&whole)) {
        (Some(_), _) => "required".to_owned(),
        (None, Some(value)) => format!("`{value}`"),
        (None, None) => "none".to_owned(),
    }
}

fn rows(section: &str, keys: &[Key]) -> String {
    let mut rows = String::from("| key | value | default | meaning |\n| --- | --- | --- | --- |\n");
    for key in keys {
        let default = default(section, key);
        let _ = writeln!(rows, "| `{}` | {} | {default} | {} |", key.name, key.kind, cell(&key.about));
    }
    rows
}

/// Returns rows without defaults, for tables of a list and for other files.
fn plain_rows(keys: &[Key]) -> String {
    let mut rows = String::from("| key | value | meaning |\n| --- | --- | --- |\n");
    for key in keys {
        let _ = writeln!(rows, "| `{}` | {} | {} |", key.name, key.kind, cell(&key.about));
    }
    rows
}

/// Returns the rows of `limits` from the lines `name = default in least..=most` of the source.
fn limits() -> String {
    let text = fs::read_to_string(root().join("src/config/limits.rs")).unwrap();
    let lines =
        text.split("\nlimits! {\n").nth(1).unwrap().split("\n}\n").next().unwrap().lines().map(str::trim);
    let defaults = Limits::default();
    let mut rows = String::from("| key | default | bounds | meaning |\n| --- | --- | --- | --- |\n");
    let mut about = String::new();
    for line in lines {
        if let Some(part) = line.strip_prefix("///") {
            about.push_str(part);
        } else if let Some((name, rest)) = line.split_once(" = ") {
            let bounds = rest.split_once(" in ").unwrap().1.trim_end_matches(';').replace('_', "");
            let (least, most) = bounds.split_once("..=").unwrap();
            let default = defaults.of(name).unwrap();
            let _ = writeln!(rows, "| `{name}` | {default} | {least} to {most} | {} |", cell(about.trim()));
            about.clear();
        }
    }
    rows
}

pub(super) fn page() -> String {
    let sections = "src/config/sections.rs";
    let mut text = String::from(
        "# All settings\n\nThis page is generated from `src/config`, `src/driver/agent/config.rs` and \
         `src/resolver/mod.rs`. A test compares both.\n\n\
         The settings of `serve` are one TOML file. [Settings](../operator/settings.md) says where it is. The environment \
         overrides a key: `BULKHEAD_SERVER__LISTEN` is `server.listen`.\n",
    );
    let top: Vec<Key> = vec![Key {
        name: "installation".into(),
        kind: kind_of("Installation"),
        about: "The four letters of the installation.".into(),
    }];
    let _ = write!(text, "\n## Top level\n{}", rows("", &top));
    for (section, name) in [
        ("server", "Server"),
        ("database", "Database"),
        ("registry", "Registry"),
        ("agent", "AgentSettings"),
        ("access", "Access"),
        ("pools", "Pools"),
        ("log", "Log"),
    ] {
        let _ = write!(text, "\n## {section}\n{}", rows(section, &fields(sections, name)));
        if section == "access" {
            let _ =
                write!(text, "\n### access.providers\n{}", plain_rows(&fields(sections, "ProviderSettings")));
            let _ = write!(
                text,
                "\n### access.providers.roles\n{}",
                plain_rows(&fields(sections, "RoleMapping"))
            );
        }
    }
    let _ = write!(text, "\n## limits\n{}", limits());
    let _ = write!(
        text,
        "\n## agent.toml\nThe agent's own file. `bulkhead` writes it; [Settings](../operator/settings.md#agent) says which keys \
         are yours.\n\n{}",
        plain_rows(&fields("src/driver/agent/config.rs", "AgentConfig"))
    );
    let _ = write!(text, "\n## resolver.toml\n{}", plain_rows(&fields("src/resolver/mod.rs", "Settings")));
    text
}
