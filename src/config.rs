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
    /// Signing in, and what is on record.
    pub access: Access,
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
    /// Role of requests. Row level security holds for it.
    pub user: String,
    /// File with its password; none for peer authentication over a unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Role of reconcilers.
    #[serde(default = "reconciler_user")]
    pub reconciler_user: String,
    /// File with its password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconciler_password_file: Option<PathBuf>,
    /// Role that may make roles, for `migrate` alone.
    #[serde(default = "admin_user")]
    pub admin_user: String,
    /// File with its password; `serve` needs and reads none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_password_file: Option<PathBuf>,
    /// Largest number of connections.
    #[serde(default = "connections")]
    pub connections: u32,
}

impl Database {
    /// The database `bulkhead` on a unix socket, where everybody is who the system says.
    #[must_use]
    pub fn on_socket(folder: &Path) -> Self {
        Self {
            host: folder.display().to_string(),
            port: postgres_port(),
            name: "bulkhead".into(),
            user: "bulkhead".into(),
            password_file: None,
            reconciler_user: reconciler_user(),
            reconciler_password_file: None,
            admin_user: admin_user(),
            admin_password_file: None,
            connections: connections(),
        }
    }
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

/// Signing in, and what is on record.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// File with the platform's key: 32 random bytes in base64. It seals second factors and signs the
    /// audit's chain; without it neither is worth anything.
    pub key: PathBuf,
    /// File to which the audit's heads are appended, best on another disk; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit_heads: Option<PathBuf>,
    /// Months that the audit keeps before the month of today.
    #[serde(default = "audit_months")]
    pub audit_months: u32,
    /// Providers that people may come through.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub providers: Vec<Provider>,
}

impl Access {
    /// With this key and these heads, and no provider.
    #[must_use]
    pub fn with(key: PathBuf, audit_heads: PathBuf) -> Self {
        Self { key, audit_heads: Some(audit_heads), audit_months: audit_months(), providers: Vec::new() }
    }
}

/// An OpenID Connect provider.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Short name: stands in addresses and on record.
    pub name: String,
    /// What its button says.
    pub label: String,
    /// Its exact issuer, such as `https://id.example.org`.
    pub issuer: String,
    /// Our name there.
    pub client_id: String,
    /// File with our secret there; none for a public client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_secret: Option<PathBuf>,
    /// What to ask for beside `openid`.
    #[serde(default = "scopes")]
    pub scopes: Vec<String>,
    /// Hosts beside the issuer's own on which it has endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// PEM file with certificates to trust beside the usual ones, for a provider of one's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The claim that roles are mapped from.
    #[serde(default = "roles_claim")]
    pub roles_claim: String,
    /// What a value of that claim gives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<RoleMapping>,
    /// Whether somebody whom the provider knows and we do not gets an account, also without any role.
    #[serde(default)]
    pub admit_all: bool,
}

/// What a value of a provider's claim gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleMapping {
    /// The value.
    pub value: String,
    /// The tenant; none for the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<crate::ids::TenantName>,
    /// The role there.
    pub role: String,
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
fn audit_months() -> u32 {
    13
}
fn scopes() -> Vec<String> {
    ["profile", "email"].map(String::from).into()
}
fn roles_claim() -> String {
    "groups".to_owned()
}
fn reconciler_user() -> String {
    "bulkhead_reconciler".to_owned()
}
fn admin_user() -> String {
    "postgres".to_owned()
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
    ("", &["installation", "server", "database", "registry", "agent", "access", "pools", "log"]),
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
    ("registry", &["url", "signing_key"]),
    ("agent", &["socket"]),
    ("access", &["key", "audit_heads", "audit_months", "providers"]),
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
        let logins = [&self.database.user, &self.database.reconciler_user, &self.database.admin_user];
        if logins[0] == logins[1]
            || logins[..2].contains(&logins[2])
            || logins.contains(&&"bulkhead_owner".to_owned())
        {
            faults.push(
                "database.user, database.reconciler_user and database.admin_user are three roles, and none is \
                 bulkhead_owner"
                    .into(),
            );
        }
        self.check_providers(faults);
        self.check_pools(faults);
    }

    fn check_providers(&self, faults: &mut Vec<String>) {
        if self.access.audit_months < 3 {
            faults.push("access.audit_months is at least 3".into());
        }
        let mut seen = Vec::new();
        for provider in &self.access.providers {
            let at = |field: &str| format!("access.providers: {}: {field}", provider.name);
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !(1..=32).contains(&provider.name.len())
                || !provider.name.bytes().all(plain)
                || matches!(provider.name.as_str(), "local" | "second-factor")
            {
                faults
                    .push(at("name has 1 to 32 of a to z, 0 to 9 and -, and is not local or second-factor"));
            }
            let own = (provider.name.as_str(), provider.issuer.as_str());
            if seen.iter().any(|(name, issuer)| *name == own.0 || *issuer == own.1) {
                faults.push(at("each provider has a name and an issuer of its own"));
            }
            seen.push(own);
            let plain_loopback = provider
                .issuer
                .strip_prefix("http://")
                .is_some_and(|rest| is_loopback(rest.split('/').next().unwrap_or_default()));
            if !provider.issuer.starts_with("https://") && !plain_loopback {
                faults.push(at("issuer starts with https:// unless it is this machine's loopback"));
            }
            for mapping in &provider.roles {
                let known: &[&str] = match mapping.tenant {
                    Some(_) => &["viewer", "deployer", "owner"],
                    None => &["auditor", "admin"],
                };
                if !known.contains(&mapping.role.as_str()) {
                    faults.push(at(&format!("roles: {} is one of {}", mapping.value, known.join(", "))));
                }
            }
        }
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

    fn provider(name: &str, issuer: &str) -> Provider {
        Provider {
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
        let with = |providers: Vec<Provider>| {
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
    fn roles_of_the_database_are_three() {
        assert!(faults(GOOD, &[("BULKHEAD_DATABASE__RECONCILER_USER", "bulkhead")]).contains("three roles"));
        assert!(faults(GOOD, &[("BULKHEAD_DATABASE__USER", "postgres")]).contains("three roles"));
    }

    #[test]
    fn every_key_is_known_to_the_suggestions() {
        let mut config = Config::parse(GOOD, &[]).unwrap();
        config.server.metrics_listen = Some("127.0.0.1:1".parse().unwrap());
        config.server.external_url = Some(String::new());
        config.server.tls_certificate = Some("x".into());
        config.server.tls_key = Some("x".into());
        config.database.password_file = Some("x".into());
        config.database.reconciler_password_file = Some("x".into());
        config.database.admin_password_file = Some("x".into());
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
