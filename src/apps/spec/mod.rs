//! The safe spec: the small, closed description that a tenant hands in. What is not listed does not
//! exist; a value is accepted as written or refused with the reason.
//!
//! A document goes through one door: [`AppSpec::parse`] reads it into a tree with places (`json.rs`,
//! `yaml.rs`), one walk (`read.rs`) against one table of fields (`fields.rs`) finds every fault.

use std::collections::BTreeMap;

use crate::driver::workload::{Health, HealthCheck, Purpose, Scratch, Serves};
use crate::fault::{Fault, Kind, catalogue};
use crate::ids::{AppName, AppRef, EgressName, ServiceName};
use crate::policy::Protocol;

mod connects;
mod fields;
mod forbidden;
mod health;
mod json;
mod print;
mod read;
mod schema;
mod scratch;
mod show;
mod tree;
mod yaml;

pub use fields::{
    GRACE, GRACE_DEFAULT, INSTANCES, ImageRef, ImageReference, LEAST_MEMORY, SHM, STOP_GRACE, TMP,
};
pub use schema::schema;
pub use show::{Colour, show};

/// Largest document, in bytes.
pub const LIMIT: usize = 64 * 1024;

/// The format of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// What an app asks to reach: nothing else is open to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connects {
    /// Platform services.
    pub services: Vec<ServiceName>,
    /// Apps of the own tenant, and of others that have granted them.
    pub apps: Vec<AppRef>,
    /// Places outside, as the tenant calls them.
    pub egress: Vec<EgressName>,
}

impl Connects {
    /// Whether something of this name is asked for.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        self.services.iter().any(|service| service.as_str() == name)
            || self.apps.iter().any(|app| app.to_string() == name)
            || self.egress.iter().any(|target| target.as_str() == name)
    }
}

/// What a spec says about `health`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    /// Nothing: a TCP port is watched for readiness.
    Nothing,
    /// `none`: not even that.
    None,
    /// A check.
    Check(Health),
}

/// A spec without a fault. There is no other way to one than [`AppSpec::parse`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppSpec {
    name: AppName,
    image: ImageRef,
    command: Option<Vec<String>>,
    args: Option<Vec<String>>,
    cpu_millis: u32,
    memory: u64,
    instances: u32,
    singleton: bool,
    env: BTreeMap<String, String>,
    port: Option<Serves>,
    health: Asked,
    scratch: BTreeMap<String, Scratch>,
    stop_grace: u16,
    connects: Connects,
}

impl AppSpec {
    /// Reads a document. All its faults are reported together, by place; only a document that is no
    /// document at all stops at its first one.
    pub fn parse(text: &[u8], format: Format) -> Result<Self, Vec<Fault>> {
        text_of(text).map_err(|fault| vec![fault]).and_then(|source| Self::read(source, format))
    }

    /// Reads a spec as [`AppSpec::to_json`] printed it. The size of a document is a bound for what is
    /// handed in: printed, the same spec can be larger, by the escapes of its texts.
    pub fn from_stored(stored: &serde_json::Value) -> Result<Self, Vec<Fault>> {
        Self::read(&stored.to_string(), Format::Json)
    }

    fn read(source: &str, format: Format) -> Result<Self, Vec<Fault>> {
        let read = match format {
            Format::Json => json::read(source),
            Format::Yaml => yaml::read(source),
        };
        let node = read.map_err(|fault| vec![fault])?;
        let mut faults = Vec::new();
        tree::find_duplicates(source, &node, &mut faults);
        let spec = read::walk(source, &node, &mut faults);
        match spec {
            Some(spec) if faults.is_empty() => Ok(spec),
            _ => {
                faults.sort_by_key(|fault| (fault.line, fault.column));
                Err(faults)
            }
        }
    }

    /// Name; it never changes.
    #[must_use]
    pub fn name(&self) -> &AppName {
        &self.name
    }
    /// Image.
    #[must_use]
    pub fn image(&self) -> &ImageRef {
        &self.image
    }
    /// Entrypoint in place of the image's.
    #[must_use]
    pub fn command(&self) -> Option<&[String]> {
        self.command.as_deref()
    }
    /// Arguments in place of the image's.
    #[must_use]
    pub fn args(&self) -> Option<&[String]> {
        self.args.as_deref()
    }
    /// Thousandths of a core.
    #[must_use]
    pub fn cpu_millis(&self) -> u32 {
        self.cpu_millis
    }
    /// Bytes; scratch counts within.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }
    /// Instances; 0 is stopped but kept.
    #[must_use]
    pub fn instances(&self) -> u32 {
        self.instances
    }
    /// Whether the old instance stops before the new one starts.
    #[must_use]
    pub fn singleton(&self) -> bool {
        self.singleton
    }
    /// Environment.
    #[must_use]
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }
    /// Where it serves.
    #[must_use]
    pub fn serves(&self) -> Option<Serves> {
        self.port
    }
    /// The TCP port that it serves on.
    #[must_use]
    pub fn tcp_port(&self) -> Option<u16> {
        self.port.filter(|serves| serves.protocol == Protocol::Tcp).map(|serves| serves.port)
    }
    /// Whether it says how it is checked, or that it is not.
    #[must_use]
    pub fn says_health(&self) -> bool {
        self.health != Asked::Nothing
    }
    /// The check in force: the given one, or a connection to the TCP port that only tells whether it is ready.
    #[must_use]
    pub fn health(&self) -> Option<Health> {
        match &self.health {
            Asked::Check(health) => Some(health.clone()),
            Asked::None => None,
            Asked::Nothing => self.tcp_port().map(|port| Health {
                check: HealthCheck::Tcp { port },
                grace: GRACE_DEFAULT,
                purpose: Purpose::Readiness,
            }),
        }
    }
    /// Writable folders by path; `/tmp` and `/dev/shm` are always among them.
    #[must_use]
    pub fn scratch(&self) -> &BTreeMap<String, Scratch> {
        &self.scratch
    }
    /// Seconds between the request to stop and the end.
    #[must_use]
    pub fn stop_grace(&self) -> u16 {
        self.stop_grace
    }
    /// What it reaches.
    #[must_use]
    pub fn connects(&self) -> &Connects {
        &self.connects
    }
}

/// The text of a body: within the limit, UTF-8, without a byte order mark.
fn text_of(text: &[u8]) -> Result<&str, Fault> {
    if text.len() > LIMIT {
        return Err(Fault::new(catalogue::TOO_LARGE, Kind::Invalid, "", "the spec is larger than 64 KiB"));
    }
    match std::str::from_utf8(text) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let good = std::str::from_utf8(&text[..error.valid_up_to()]).unwrap_or_default();
            let (line, column) = tree::At::offset(good.len()).place(good);
            Err(Fault::new(catalogue::NOT_UTF8, Kind::Invalid, "", "the spec is not UTF-8 from here on")
                .at(line, column))
        }
    }
}

#[cfg(test)]
mod tests;
