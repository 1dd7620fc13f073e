//! The configuration, read once: a TOML file, then the environment (`BULKHEAD_SECTION__KEY`), then
//! cross-checked as a whole. An unknown key is refused with the name that was probably meant.
//! Secrets come from files that the configuration names, never from arguments.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::driver::workload::{IdRange, Subnet};
use crate::ids::Installation;

/// All settings of `bulkhead serve`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The four letters of the installation.
    pub installation: Installation,
    /// What faces the network.
    pub server: Server,
    /// Postgres.
    pub database: Database,
    /// The registry behind the front door.
    pub registry: Registry,
    /// The root half.
    pub agent: Agent,
    /// Pools of ids and addresses. Fixed once the database was made.
    pub pools: Pools,
    /// Logging.
    #[serde(default)]
    pub log: Log,
}

/// Listeners and what they are called from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// API, console and registry front door.
    pub listen: SocketAddr,
    /// Where the engine pulls from: loopback, plain HTTP.
    pub pull_listen: SocketAddr,
    /// Metrics for the platform's own operator; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// The address that clients know, such as `https://bulkhead.example`; without it, it is taken
    /// from the Host header, on loopback only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_url: Option<String>,
    /// PEM file with the certificate chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// PEM file with the private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// A proxy in front ends TLS; then plain text beyond loopback is allowed.
    #[serde(default)]
    pub behind_proxy: bool,
    /// Threads that answer requests.
    #[serde(default = "two")]
    pub workers: usize,
}

impl Server {
    /// In plain text on loopback, and nothing else.
    #[must_use]
    pub fn plain(listen: SocketAddr, pull_listen: SocketAddr) -> Self {
        Self {
            listen,
            pull_listen,
            metrics_listen: None,
            external_url: None,
            tls_certificate: None,
            tls_key: None,
            behind_proxy: false,
            workers: two(),
        }
    }
}

/// Postgres.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    /// Host name, or the folder of a unix socket.
    pub host: String,
    /// Port; also part of the name of a unix socket.
    #[serde(default = "postgres_port")]
    pub port: u16,
    /// Database.
    pub name: String,
    /// Role.
    pub user: String,
    /// File with the password; none for peer authentication over a unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Largest number of connections.
    #[serde(default = "connections")]
    pub connections: u32,
}

/// The registry behind the front door.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Its address, such as `http://127.0.0.1:5001`.
    pub url: String,
    /// PEM file with the key that signs its tokens.
    pub signing_key: PathBuf,
}

/// The root half on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// Its socket.
    pub socket: PathBuf,
}

/// Pools of ids and addresses.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pools {
    /// First user id of the pool.
    pub uid_start: u32,
    /// One past the last user id of the pool.
    pub uid_end: u32,
    /// Ids in a range of a tenant.
    #[serde(default = "range_size")]
    pub range_size: u32,
    /// Ids in a block of an app.
    #[serde(default = "block_size")]
    pub block_size: u32,
    /// Addresses of tenants' networks, such as `10.64.0.0/12`.
    pub network: Subnet,
    /// Prefix of one tenant's subnet.
    #[serde(default = "subnet_prefix")]
    pub subnet_prefix: u8,
}

impl Pools {
    /// The pool of user ids as one range.
    #[must_use]
    pub fn ids(&self) -> IdRange {
        IdRange { start: self.uid_start, size: self.uid_end - self.uid_start }
    }
    /// How many tenants the address pool can hold.
    #[must_use]
    pub fn networks(&self) -> u32 {
        1 << (self.subnet_prefix - self.network.prefix())
    }
    /// The subnet with this number.
    #[must_use]
    pub fn subnet(&self, number: u32) -> Option<Subnet> {
        self.network.part(self.subnet_prefix, number)
    }
}

/// How to log.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// `text` or `json`.
    #[serde(default)]
    pub format: LogFormat,
    /// Filter, as in `info` or `bulkhead=debug,info`.
    #[serde(default = "log_level")]
    pub level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: log_level() }
    }
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

fn two() -> usize {
    2
}
fn postgres_port() -> u16 {
    5432
}
fn connections() -> u32 {
    16
}
/// Ids of a tenant's range, unless set otherwise.
pub const RANGE_SIZE: u32 = 65_536;
/// Ids of an app's block, unless set otherwise.
pub const BLOCK_SIZE: u32 = 1_024;
/// Prefix of a tenant's subnet, unless set otherwise.
pub const SUBNET_PREFIX: u8 = 22;

fn range_size() -> u32 {
    RANGE_SIZE
}
fn block_size() -> u32 {
    BLOCK_SIZE
}
fn subnet_prefix() -> u8 {
    SUBNET_PREFIX
}
/// Registry clients first try TLS on a plain port; the web server would call each such try an error.
fn log_level() -> String {
    "info,actix_http::h1::dispatcher=off".to_owned()
}

/// Every key that there is, for suggestions. A test holds it against the types.
const KEYS: &[(&str, &[&str])] = &[
    ("", &["installation", "server", "database", "registry", "agent", "pools", "log"]),
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
            "workers",
        ],
    ),
    ("database", &["host", "port", "name", "user", "password_file", "connections"]),
    ("registry", &["url", "signing_key"]),
    ("agent", &["socket"]),
    ("pools", &["uid_start", "uid_end", "range_size", "block_size", "network", "subnet_prefix"]),
    ("log", &["format", "level"]),
];

/// What is wrong with the configuration: all of it together, a sentence each.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is not usable:\n  - {}", .0.join("\n  - "))]
pub struct ConfigError(pub Vec<String>);

impl Config {
    /// Reads the file and the environment and checks the whole.
    pub fn load(path: &Path, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError(vec![format!("{} cannot be read: {error}", path.display())]))?;
        Self::parse(&text, environment)
    }

    /// The same from a text.
    pub fn parse(text: &str, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| ConfigError(vec![error.to_string()]))?;
        let mut faults = Vec::new();
        for (name, value) in environment {
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

    /// What must hold between settings.
    fn check(&self, faults: &mut Vec<String>) {
        let server = &self.server;
        if server.tls_certificate.is_some() != server.tls_key.is_some() {
            faults
                .push("server.tls_certificate and server.tls_key belong together: give both or none".into());
        }
        if !server.listen.ip().is_loopback() && server.tls_certificate.is_none() && !server.behind_proxy {
            faults.push(format!(
                "server.listen {} is beyond loopback and would be plain text: give server.tls_certificate and \
                 server.tls_key, or say server.behind_proxy = true when a proxy in front ends TLS",
                server.listen
            ));
        }
        if !server.pull_listen.ip().is_loopback() {
            faults.push(
                "server.pull_listen is for the engine on this machine: give it a loopback address".into(),
            );
        }
        if server.pull_listen == server.listen || server.metrics_listen == Some(server.listen) {
            faults.push(
                "server.listen, server.pull_listen and server.metrics_listen need an address each".into(),
            );
        }
        if let Some(url) = &server.external_url {
            check_external_url(url, faults);
        } else if !server.listen.ip().is_loopback() {
            faults.push(
                "server.external_url is needed beyond loopback: it stands in the links and in the registry's realm"
                    .into(),
            );
        }
        if server.workers == 0 || server.workers > 64 {
            faults.push("server.workers is 1 to 64".into());
        }
        if self.database.connections < 4 {
            faults.push("database.connections is at least 4".into());
        }
        self.check_pools(faults);
    }

    fn check_pools(&self, faults: &mut Vec<String>) {
        let pools = &self.pools;
        if pools.uid_start < 65_536 || pools.uid_end > 2_147_483_647 || pools.uid_end <= pools.uid_start {
            faults.push(
                "pools.uid_start to pools.uid_end lie between 65536 and 2147483647, which is the highest id that \
                 container runtimes accept"
                    .into(),
            );
        } else if pools.range_size == 0 || pools.uid_end - pools.uid_start < pools.range_size {
            faults.push("the pool of user ids does not hold a single pools.range_size".into());
        }
        if pools.block_size < 16 || !pools.range_size.is_multiple_of(pools.block_size.max(1)) {
            faults.push("pools.block_size is at least 16 and divides pools.range_size".into());
        }
        if pools.subnet_prefix < pools.network.prefix() || pools.subnet_prefix > 28 {
            faults.push("pools.subnet_prefix lies between the prefix of pools.network and 28".into());
        }
    }
}

fn check_external_url(text: &str, faults: &mut Vec<String>) {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    match rest {
        None => faults.push("server.external_url starts with https:// or http://".into()),
        Some(host) if host.is_empty() || host.contains(['/', '@', '?', '#', ' ']) => {
            faults.push("server.external_url is a scheme, a host and perhaps a port, without a path".into());
        }
        Some(host) if text.starts_with("http://") && !is_loopback(host) => {
            faults.push("server.external_url is https:// unless it is this machine's loopback".into());
        }
        Some(_) => {}
    }
}

/// Whether the host part of an address (`host` or `host:port`) is this machine's loopback.
#[must_use]
pub fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn override_key(table: &mut toml::Table, name: &str, key: &str, value: &str, faults: &mut Vec<String>) {
    let key = key.to_ascii_lowercase();
    let (section, field) = key.split_once("__").unwrap_or(("", &key));
    let known = KEYS.iter().find(|(s, _)| *s == section).is_some_and(|(_, keys)| keys.contains(&field));
    if !known || (section.is_empty() && field != "installation") {
        faults.push(format!(
            "the environment variable {name} names no setting; they are called BULKHEAD_SECTION__KEY, such as \
             BULKHEAD_SERVER__LISTEN"
        ));
        return;
    }
    // Numbers and booleans are written as they are in the file; everything else is a text.
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
                None => format!("there is no setting {full}; there are: {}", keys.join(", ")),
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

    #[test]
    fn every_key_is_known_to_the_suggestions() {
        let mut config = Config::parse(GOOD, &[]).unwrap();
        config.server.metrics_listen = Some("127.0.0.1:1".parse().unwrap());
        config.server.external_url = Some(String::new());
        config.server.tls_certificate = Some("x".into());
        config.server.tls_key = Some("x".into());
        config.database.password_file = Some("x".into());
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
