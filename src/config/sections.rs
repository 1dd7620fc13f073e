//! The sections of the settings, with their defaults.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::proxies::ProxyNetwork;
use crate::driver::workload::{IdRange, Subnet};

/// Listeners and their external address.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Address of the API, the console and the registry proxy.
    pub listen: SocketAddr,
    /// Address for the engine's pulls: loopback, plain HTTP.
    pub pull_listen: SocketAddr,
    /// Address of the metrics, for the platform's operator; no metrics if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// The address that clients use, such as `https://bulkhead.example`. If absent, the Host header decides;
    /// that works on loopback only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_url: Option<String>,
    /// PEM file with the certificate chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// PEM file with the private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// Whether a proxy in front terminates TLS. This allows plain text beyond loopback.
    #[serde(default)]
    pub behind_proxy: bool,
    /// Networks of proxies whose `X-Forwarded-For` counts. If empty, `behind_proxy` trusts the last entry of
    /// each peer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<ProxyNetwork>,
    /// Threads that answer requests.
    #[serde(default = "two")]
    pub workers: usize,
    /// Maximum connections in total; if absent, memory and file descriptors decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    /// Maximum connections of one source: an IPv4 address, or a /64 of IPv6.
    #[serde(default = "per_source")]
    pub connections_per_source: usize,
}

impl Server {
    /// Returns a server with plain HTTP on loopback and defaults otherwise.
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
            trusted_proxies: Vec::new(),
            workers: two(),
            connections: None,
            connections_per_source: per_source(),
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
    /// Name of the database.
    pub name: String,
    /// Role of requests. Row level security applies to it.
    pub user: String,
    /// File with its password; not needed for peer authentication over a unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Role of reconcilers.
    #[serde(default = "reconciler_user")]
    pub reconciler_user: String,
    /// File with its password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconciler_password_file: Option<PathBuf>,
    /// Role that may create roles, only for `migrate`.
    #[serde(default = "admin_user")]
    pub admin_user: String,
    /// File with its password; `serve` does not read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_password_file: Option<PathBuf>,
    /// Maximum number of connections.
    #[serde(default = "connections")]
    pub connections: u32,
}

impl Database {
    /// Returns the database `bulkhead` on a unix socket with peer authentication.
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

/// The registry behind the registry proxy.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Its address, such as `http://127.0.0.1:5001`, or `unix://` and the path of its socket.
    pub url: String,
    /// PEM file with the key that signs its tokens.
    pub signing_key: PathBuf,
    /// Socket of the collector beside the registry (`bulkhead collector`). Without one, the registry's disk
    /// is not compared with the records. Deleted blobs then stay until the registry's own garbage collection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collector: Option<PathBuf>,
    /// A folder on its disk. Pushes are refused before the disk is full. The disk is not watched if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<PathBuf>,
}

/// The agent on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    /// Its socket.
    pub socket: PathBuf,
}

/// Sign-in and audit log.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// File with the platform's key: 32 random bytes in base64. It encrypts second factors and signs the
    /// audit log's chain. Without it, neither can be used.
    pub key: PathBuf,
    /// File to which heads of the audit log's chain are appended, ideally on another disk; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit_heads: Option<PathBuf>,
    /// Months of audit log to keep, before the current month.
    #[serde(default = "audit_months")]
    pub audit_months: u32,
    /// OpenID Connect providers through which users can sign in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub providers: Vec<ProviderSettings>,
}

impl Access {
    /// Returns settings with this key and these heads, without providers.
    #[must_use]
    pub fn with(key: PathBuf, audit_heads: PathBuf) -> Self {
        Self { key, audit_heads: Some(audit_heads), audit_months: audit_months(), providers: Vec::new() }
    }
}

/// An OpenID Connect provider.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderSettings {
    /// Short name, as used in addresses and in the audit log.
    pub name: String,
    /// Label of its sign-in button.
    pub label: String,
    /// Its exact issuer URL, such as `https://id.example.org`.
    pub issuer: String,
    /// Client id at the provider.
    pub client_id: String,
    /// File with the client secret; none for a public client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_secret: Option<PathBuf>,
    /// Scopes to request besides `openid`.
    #[serde(default = "scopes")]
    pub scopes: Vec<String>,
    /// Hosts of its endpoints, besides the issuer's host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// PEM file with additional trusted certificates, for a private provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The claim that decides about roles.
    #[serde(default = "roles_claim")]
    pub roles_claim: String,
    /// Roles by value of that claim.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<RoleMapping>,
    /// Whether an unknown user of the provider gets an account even without any role.
    #[serde(default)]
    pub admit_all: bool,
}

/// The role for one value of a provider's claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleMapping {
    /// Value of the claim.
    pub value: String,
    /// The tenant; none for a role on the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<crate::ids::TenantName>,
    /// The role.
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
    /// User ids in a tenant's range.
    #[serde(default = "range_size")]
    pub range_size: u32,
    /// User ids in an app's block.
    #[serde(default = "block_size")]
    pub block_size: u32,
    /// Addresses of tenants' networks, such as `10.64.0.0/12`.
    pub network: Subnet,
    /// Prefix of one tenant's subnet.
    #[serde(default = "subnet_prefix")]
    pub subnet_prefix: u8,
}

impl Pools {
    /// Returns the pool of user ids as one range.
    #[must_use]
    pub fn ids(&self) -> IdRange {
        IdRange { start: self.uid_start, size: self.uid_end - self.uid_start }
    }
    /// Returns how many tenants the address pool can hold.
    #[must_use]
    pub fn networks(&self) -> u32 {
        1 << (self.subnet_prefix - self.network.prefix())
    }
    /// Returns the subnet with this number.
    #[must_use]
    pub fn subnet(&self, number: u32) -> Option<Subnet> {
        self.network.part(self.subnet_prefix, number)
    }
}

/// Log format and filter.
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

/// Format of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Readable text.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

fn two() -> usize {
    2
}
fn per_source() -> usize {
    512
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
/// Default ids of a tenant's range.
pub const RANGE_SIZE: u32 = 65_536;
/// Default ids of an app's block.
pub const BLOCK_SIZE: u32 = 1_024;
/// Default prefix of a tenant's subnet.
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
/// Registry clients first try TLS on a plain port. The web server would log each try as an error.
fn log_level() -> String {
    "info,actix_http::h1::dispatcher=off".to_owned()
}
