//! The sections of the settings, with what holds when nothing is said.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::proxies::Cidr;
use crate::driver::workload::{IdRange, Subnet};

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
    /// Networks of proxies whose `X-Forwarded-For` counts. Without any, `behind_proxy` trusts the last entry of each
    /// peer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<Cidr>,
    /// Threads that answer requests.
    #[serde(default = "two")]
    pub workers: usize,
    /// Connections in all; when absent, as many as memory and descriptors bear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    /// Connections of one source: an IPv4 address, or a /64 of IPv6.
    #[serde(default = "per_source")]
    pub connections_per_source: usize,
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
    /// Its address, such as `http://127.0.0.1:5001`, or `unix://` and the path of its socket.
    pub url: String,
    /// PEM file with the key that signs its tokens.
    pub signing_key: PathBuf,
    /// Socket of the collector beside the registry (`bulkhead collector`). Without one the registry's disk is not compared
    /// with the record, and what was deleted stays there until the registry's own garbage collection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collector: Option<PathBuf>,
    /// A folder on its disk, for pushes to be refused before the disk is full. Not watched when it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<PathBuf>,
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
