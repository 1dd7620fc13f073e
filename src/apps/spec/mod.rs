//! The safe spec: the small, closed description of an app that a tenant submits. Unlisted fields do not exist.
//! A value is accepted as written, or refused with the reason.
//!
//! Every document passes through [`AppSpec::parse`]. It reads the document into a tree with positions
//! (`json.rs`, `yaml.rs`). One walk (`read.rs`) against one table of fields (`fields.rs`) then finds every
//! fault.

use std::collections::BTreeMap;

use crate::driver::workload::{Health, HealthCheck, HealthPurpose, Scratch, Serves};
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

/// Maximum size of a document, in bytes.
pub const LIMIT: usize = 64 * 1024;

/// The format of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// The connections that an app requests. All others are blocked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connects {
    /// Platform services.
    pub services: Vec<ServiceName>,
    /// Apps of the same tenant, and apps of other tenants that granted access.
    pub apps: Vec<AppRef>,
    /// Egress targets, by the tenant's names.
    pub egress: Vec<EgressName>,
}

impl Connects {
    /// Returns whether the app requests a connection of this name.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        self.services.iter().any(|service| service.as_str() == name)
            || self.apps.iter().any(|app| app.to_string() == name)
            || self.egress.iter().any(|target| target.as_str() == name)
    }
}

/// The value of `health` in a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
enum HealthField {
    /// Not set: a TCP port is checked for readiness only.
    Nothing,
    /// `none`: no check at all.
    None,
    /// A health check.
    Check(Health),
}

/// A spec without faults. Only [`AppSpec::parse`] and [`AppSpec::from_stored`] create one.
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
    health: HealthField,
    scratch: BTreeMap<String, Scratch>,
    stop_grace: u16,
    connects: Connects,
}

impl AppSpec {
    /// Reads a document. Reports all faults together, in order of position. Only a document that cannot be read
    /// at all stops at its first fault.
    pub fn parse(text: &[u8], format: Format) -> Result<Self, Vec<Fault>> {
        text_of(text).map_err(|fault| vec![fault]).and_then(|source| Self::read(source, format))
    }

    /// Reads a spec that [`AppSpec::to_json`] printed. The size limit applies to submitted documents only:
    /// escapes in its texts can make the printed spec larger.
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
    /// Command that replaces the image's entrypoint.
    #[must_use]
    pub fn command(&self) -> Option<&[String]> {
        self.command.as_deref()
    }
    /// Arguments that replace the image's.
    #[must_use]
    pub fn args(&self) -> Option<&[String]> {
        self.args.as_deref()
    }
    /// Thousandths of a core.
    #[must_use]
    pub fn cpu_millis(&self) -> u32 {
        self.cpu_millis
    }
    /// Bytes, including scratch.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }
    /// Instances; 0 stops the app but keeps it.
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
    /// Port and protocol that it serves on.
    #[must_use]
    pub fn serves(&self) -> Option<Serves> {
        self.port
    }
    /// TCP port that it serves on.
    #[must_use]
    pub fn tcp_port(&self) -> Option<u16> {
        self.port.filter(|serves| serves.protocol == Protocol::Tcp).map(|serves| serves.port)
    }
    /// Returns whether the spec sets `health`, including `none`.
    #[must_use]
    pub fn says_health(&self) -> bool {
        self.health != HealthField::Nothing
    }
    /// Returns the effective check: the given one, or a TCP connection that only decides readiness.
    #[must_use]
    pub fn health(&self) -> Option<Health> {
        match &self.health {
            HealthField::Check(health) => Some(health.clone()),
            HealthField::None => None,
            HealthField::Nothing => self.tcp_port().map(|port| Health {
                check: HealthCheck::Tcp { port },
                grace: GRACE_DEFAULT,
                purpose: HealthPurpose::Readiness,
            }),
        }
    }
    /// Writable folders by path, always including `/tmp` and `/dev/shm`.
    #[must_use]
    pub fn scratch(&self) -> &BTreeMap<String, Scratch> {
        &self.scratch
    }
    /// Seconds between the stop signal and the kill.
    #[must_use]
    pub fn stop_grace(&self) -> u16 {
        self.stop_grace
    }
    /// The connections that it requests.
    #[must_use]
    pub fn connects(&self) -> &Connects {
        &self.connects
    }
}

/// Decodes a body: checks the size limit and UTF-8, and strips a byte order mark.
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
