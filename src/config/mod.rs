//! The configuration, read once: a TOML file, then the environment (`BULKHEAD_SECTION__KEY`), then a
//! cross-check of all settings. An unknown key is an error that suggests the nearest key. Secrets come from
//! files that the configuration names, never from arguments.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::ids::Installation;

mod check;
mod limits;
mod proxies;
mod sections;

pub use check::is_loopback;
pub use limits::Limits;
pub use proxies::ProxyNetwork;
pub use sections::{
    Access, AgentSettings, BLOCK_SIZE, Database, Log, LogFormat, Pools, ProviderSettings, RANGE_SIZE,
    Registry, RoleMapping, SUBNET_PREFIX, Server,
};

/// All settings of `bulkhead serve`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Id of the installation: four letters.
    pub installation: Installation,
    /// Listeners.
    pub server: Server,
    /// Postgres.
    pub database: Database,
    /// The registry behind the registry proxy.
    pub registry: Registry,
    /// The agent.
    pub agent: AgentSettings,
    /// Sign-in and audit log.
    pub access: Access,
    /// Pools of ids and addresses. They cannot change after the database is created.
    pub pools: Pools,
    /// Limits of each tenant on counted resources.
    #[serde(default)]
    pub limits: Limits,
    /// Logging.
    #[serde(default)]
    pub log: Log,
}
/// Every key, for suggestions. A test compares the list with the types.
const KEYS: &[(&str, &[&str])] = &[
    ("", &["installation", "server", "database", "registry", "agent", "access", "pools", "limits", "log"]),
    (
        "server",
        &[
            "listen",
            "pull_listen",
            "metrics_listen",
            "external_url",
            "tls_certificate",
            "tls_key",
            "behind_proxy",
            "trusted_proxies",
            "workers",
            "connections",
            "connections_per_source",
        ],
    ),
    (
        "database",
        &[
            "host",
            "port",
            "name",
            "user",
            "password_file",
            "reconciler_user",
            "reconciler_password_file",
            "admin_user",
            "admin_password_file",
            "connections",
        ],
    ),
    ("registry", &["url", "signing_key", "disk", "collector"]),
    ("agent", &["socket"]),
    ("access", &["key", "audit_heads", "audit_months", "providers"]),
    ("pools", &["uid_start", "uid_end", "range_size", "block_size", "network", "subnet_prefix"]),
    ("limits", Limits::KEYS),
    ("log", &["format", "level"]),
];

/// The faults of a configuration: all together, one sentence each.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is not valid:\n  - {}", .0.join("\n  - "))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// Reads the file and the environment, and checks all settings.
    pub fn load(path: &Path, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError(vec![format!("{} cannot be read: {error}", path.display())]))?;
        Self::parse(&text, environment)
    }

    /// Does the same from a string.
    pub fn parse(text: &str, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| ConfigError(vec![error.to_string()]))?;
        let mut faults = Vec::new();
        for (name, value) in environment {
            // The commands that call the API read these variables; they are not settings.
            if ["BULKHEAD_TOKEN", "BULKHEAD_URL"].contains(&name.as_str()) {
                continue;
            }
            if let Some(key) = name.strip_prefix("BULKHEAD_") {
                override_key(&mut table, name, key, value, &mut faults);
            }
        }
        unknown_keys(&table, &mut faults);
        if !faults.is_empty() {
            return Err(ConfigError(faults));
        }
        let config: Self = toml::Value::Table(table)
            .try_into()
            .map_err(|error: toml::de::Error| ConfigError(vec![error.to_string().trim().to_owned()]))?;
        config.check(&mut faults);
        if faults.is_empty() { Ok(config) } else { Err(ConfigError(faults)) }
    }
}

fn override_key(table: &mut toml::Table, name: &str, key: &str, value: &str, faults: &mut Vec<String>) {
    let key = key.to_ascii_lowercase();
    let (section, field) = key.split_once("__").unwrap_or(("", &key));
    let known = KEYS.iter().find(|(s, _)| *s == section).is_some_and(|(_, keys)| keys.contains(&field));
    if !known || (section.is_empty() && field != "installation") {
        faults.push(format!(
            "the environment variable {name} names no setting; settings are called BULKHEAD_SECTION__KEY, such as \
             BULKHEAD_SERVER__LISTEN"
        ));
        return;
    }
    // Numbers and booleans are written as in the file; any other value is a string.
    let parsed = value
        .parse::<i64>()
        .map(toml::Value::Integer)
        .or_else(|_| value.parse::<bool>().map(toml::Value::Boolean))
        .unwrap_or_else(|_| toml::Value::String(value.to_owned()));
    if section.is_empty() {
        table.insert(field.to_owned(), parsed);
    } else if let Some(section) = table
        .entry(section.to_owned())
        .or_insert_with(|| toml::Value::Table(toml::Table::new()))
        .as_table_mut()
    {
        section.insert(field.to_owned(), parsed);
    }
}

fn unknown_keys(table: &toml::Table, faults: &mut Vec<String>) {
    let mut look = |section: &str, table: &toml::Table| {
        let Some((_, keys)) = KEYS.iter().find(|(s, _)| *s == section) else { return };
        for key in table.keys().filter(|key| !keys.contains(&key.as_str())) {
            let full = if section.is_empty() { key.clone() } else { format!("{section}.{key}") };
            let near = keys
                .iter()
                .map(|known| (strsim::damerau_levenshtein(key, known), *known))
                .min()
                .filter(|(distance, _)| *distance <= 3);
            faults.push(match near {
                Some((_, near)) => format!("there is no setting {full}; did you mean {near}?"),
                None => format!("there is no setting {full}; the settings are: {}", keys.join(", ")),
            });
        }
    };
    look("", table);
    for (section, value) in table {
        if let Some(inner) = value.as_table() {
            look(section, inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const GOOD: &str = r#"
installation = "abcd"
[server]
listen = "127.0.0.1:8080"
pull_listen = "127.0.0.1:8081"
[database]
host = "/run/x"
name = "bulkhead"
user = "bulkhead"
[registry]
url = "http://127.0.0.1:5001"
signing_key = "/x/key.pem"
[agent]
socket = "/x/agent.sock"
[access]
key = "/x/platform-key"
[pools]
uid_start = 1879048192
uid_end = 1912602624
network = "10.64.0.0/12"
"#;

    fn faults(text: &str, env: &[(&str, &str)]) -> String {
        let env: Vec<_> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        match Config::parse(text, &env) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_good_file_is_taken_and_the_environment_wins() {
        let env =
            [("BULKHEAD_SERVER__LISTEN".to_owned(), "127.0.0.1:9".to_owned()), ("PATH".into(), "x".into())];
        let config = Config::parse(GOOD, &env).unwrap();
        assert_eq!(config.server.listen.port(), 9);
        assert_eq!(config.pools.networks(), 1024);
        assert_eq!(config.pools.subnet(1).unwrap().to_string(), "10.64.4.0/22");
        assert!(config.pools.subnet(1024).is_none());
    }

    #[test]
    fn an_unknown_key_is_refused_with_a_suggestion() {
        let text = GOOD.replace("listen = \"127.0.0.1:8080\"", "lisen = \"127.0.0.1:8080\"");
        assert!(faults(&text, &[]).contains("no setting server.lisen; did you mean listen?"));
        assert!(
            faults(GOOD, &[("BULKHEAD_SERVER__LISEN", "x")])
                .contains("BULKHEAD_SERVER__LISEN names no setting")
        );
    }

    #[test]
    fn plain_text_beyond_loopback_is_refused() {
        let open = [
            ("BULKHEAD_SERVER__LISTEN", "0.0.0.0:8080"),
            ("BULKHEAD_SERVER__EXTERNAL_URL", "https://b.example"),
        ];
        assert!(faults(GOOD, &open).contains("would be plain text"));
        let mut proxied = open.to_vec();
        proxied.push(("BULKHEAD_SERVER__BEHIND_PROXY", "true"));
        assert_eq!(faults(GOOD, &proxied), "");
        assert!(faults(GOOD, &[("BULKHEAD_SERVER__EXTERNAL_URL", "http://b.example")]).contains("https://"));
    }

    #[test]
    fn pools_that_cannot_work_are_refused() {
        assert!(faults(GOOD, &[("BULKHEAD_POOLS__UID_END", "3000000000")]).contains("2147483647"));
        assert!(faults(GOOD, &[("BULKHEAD_POOLS__BLOCK_SIZE", "1000")]).contains("divides"));
        assert!(faults(GOOD, &[("BULKHEAD_POOLS__SUBNET_PREFIX", "30")]).contains("subnet_prefix"));
    }

    fn provider(name: &str, issuer: &str) -> ProviderSettings {
        ProviderSettings {
            name: name.into(),
            label: "x".into(),
            issuer: issuer.into(),
            client_id: "x".into(),
            client_secret: None,
            scopes: Vec::new(),
            hosts: Vec::new(),
            ca: None,
            roles_claim: "groups".into(),
            roles: Vec::new(),
            admit_all: false,
        }
    }

    #[test]
    fn providers_are_apart_and_reached_over_tls() {
        let with = |providers: Vec<ProviderSettings>| {
            let mut config = Config::parse(GOOD, &[]).unwrap();
            config.access.providers = providers;
            faults(&toml::to_string(&config).unwrap(), &[])
        };
        assert_eq!(with(vec![provider("a", "https://a.example"), provider("b", "http://127.0.0.1:3")]), "");
        assert!(with(vec![provider("a", "http://a.example")]).contains("https://"));
        assert!(with(vec![provider("a", "https://x"), provider("b", "https://x")]).contains("of its own"));
        assert!(with(vec![provider("local", "https://x")]).contains("is not local"));
        let mut wrong = provider("a", "https://a.example");
        wrong.roles = vec![RoleMapping { value: "x".into(), tenant: None, role: "owner".into() }];
        assert!(with(vec![wrong]).contains("auditor, admin"));
    }

    #[test]
    fn limits_have_defaults_and_bounds() {
        let config = Config::parse(GOOD, &[]).unwrap();
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.limits.of("open_uploads"), Some(64));
        assert_eq!(config.limits.of("cpu"), None);
        assert!(
            faults(GOOD, &[("BULKHEAD_LIMITS__API_TOKENS", "0")]).contains("limits.api_tokens must be 1 to")
        );
        assert!(faults(GOOD, &[("BULKHEAD_LIMITS__REQUEST_BURST", "3")]).contains("at least"));
        assert!(
            faults(&format!("{GOOD}[limits]\napi_tokns = 3\n"), &[]).contains("did you mean api_tokens?")
        );
    }

    #[test]
    fn roles_of_the_database_are_three() {
        assert!(faults(GOOD, &[("BULKHEAD_DATABASE__RECONCILER_USER", "bulkhead")]).contains("three roles"));
        assert!(faults(GOOD, &[("BULKHEAD_DATABASE__USER", "postgres")]).contains("three roles"));
    }

    #[test]
    fn every_key_is_known_to_the_suggestions() {
        let mut config = Config::parse(GOOD, &[]).unwrap();
        config.server.metrics_listen = Some("127.0.0.1:1".parse().unwrap());
        config.server.external_url = Some(String::new());
        config.server.connections = Some(64);
        config.server.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
        config.server.tls_certificate = Some("x".into());
        config.server.tls_key = Some("x".into());
        config.database.password_file = Some("x".into());
        config.database.reconciler_password_file = Some("x".into());
        config.database.admin_password_file = Some("x".into());
        config.registry.collector = Some("x".into());
        config.registry.disk = Some("x".into());
        config.access.audit_heads = Some("x".into());
        config.access.providers = vec![provider("id", "https://id.example")];
        let toml::Value::Table(table) = toml::Value::try_from(&config).unwrap() else { panic!() };
        let mut seen: Vec<(String, Vec<String>)> = vec![(String::new(), table.keys().cloned().collect())];
        for (section, value) in &table {
            if let Some(inner) = value.as_table() {
                seen.push((section.clone(), inner.keys().cloned().collect()));
            }
        }
        assert_eq!(seen.len(), KEYS.len());
        for (section, keys) in seen {
            let known = KEYS.iter().find(|(s, _)| *s == section).unwrap().1;
            let mut known: Vec<_> = known.iter().map(ToString::to_string).collect();
            let mut keys = keys;
            known.sort();
            keys.sort();
            assert_eq!(keys, known, "section {section}");
        }
    }
}
