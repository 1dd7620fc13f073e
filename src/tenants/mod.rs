//! Tenants: who they are, what they may use, and in which state they are.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::fault::{Code, Fault, Kind};
use crate::ids::{TenantId, TenantName};

pub mod actions;
pub mod api;
pub mod console;
pub mod reconcile;
mod store;

pub use store::{find_for_console, id_of, list_conditions, name_of, tenant_network, tenant_state};

/// A tenant's row.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Identity.
    pub id: TenantId,
    /// Name; also its registry project.
    pub name: TenantName,
    /// For people.
    pub display_name: String,
    /// `active`, `suspended`, `offboarding`, `offboarded`.
    pub state: String,
    /// Raised by each change.
    pub generation: i64,
    /// The last one that was carried out.
    pub observed_generation: i64,
    /// When it was onboarded.
    pub created_at: OffsetDateTime,
    /// Limits and what is used.
    pub quota: Quota,
}

/// Limits and use.
#[derive(Debug, Clone, Serialize)]
pub struct Quota {
    /// Cpu in thousandths of a core.
    pub cpu: Amount,
    /// Memory in bytes.
    pub memory: Amount,
    /// Apps.
    pub apps: Amount,
    /// Instances, those reserved for updates included.
    pub instances: Amount,
    /// Bytes in the registry.
    pub registry_bytes: Amount,
}

/// One limit.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Amount {
    /// What the admin has set.
    pub limit: i64,
    /// What is reserved or stored.
    pub used: i64,
}

/// A limit as handed in: a number, or a text with a unit.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// Cpu in thousandths, memory in bytes, or a count.
    Number(i64),
    /// `4`, `500m`; `8Gi`, `512Mi`.
    Text(String),
}

/// Limits as handed in.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaInput {
    cpu: Option<Size>,
    memory: Option<Size>,
    apps: Option<i64>,
    instances: Option<i64>,
    registry_bytes: Option<Size>,
}

/// Limits that were checked; none means "as it is".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a core.
    pub cpu_millis: Option<i64>,
    /// Bytes.
    pub memory: Option<i64>,
    /// Apps.
    pub apps: Option<i64>,
    /// Instances.
    pub instances: Option<i64>,
    /// Bytes.
    pub registry_bytes: Option<i64>,
}

fn bad(path: &str, message: impl Into<String>) -> Fault {
    Fault::new(Code(426), Kind::Invalid, path, message)
}

fn cpu(size: &Size) -> Option<i64> {
    match size {
        Size::Number(millis) => Some(*millis),
        Size::Text(text) => {
            if let Some(millis) = text.strip_suffix('m') {
                millis.parse().ok()
            } else {
                let (whole, part) = text.split_once('.').unwrap_or((text, ""));
                if part.len() > 3 || !part.bytes().all(|b| b.is_ascii_digit()) {
                    return None;
                }
                let part: i64 = format!("{part:0<3}").parse().ok()?;
                whole.parse::<i64>().ok()?.checked_mul(1000)?.checked_add(part)
            }
        }
    }
}

fn bytes(size: &Size) -> Option<i64> {
    match size {
        Size::Number(bytes) => Some(*bytes),
        Size::Text(text) => {
            let units = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40)];
            let (number, shift) = units
                .iter()
                .find_map(|(unit, shift)| text.strip_suffix(unit).map(|number| (number, *shift)))
                .unwrap_or((text, 0));
            number.parse::<i64>().ok()?.checked_mul(1 << shift)
        }
    }
}

impl QuotaInput {
    /// Checks every limit; all faults together.
    pub fn parse(&self, faults: &mut Vec<Fault>) -> Limits {
        let mut bounded = |path: &str, value: Option<Option<i64>>, least: i64, most: i64, form: &str| {
            let value = value?;
            match value {
                Some(n) if (least..=most).contains(&n) => Some(n),
                _ => {
                    faults.push(bad(path, form.to_owned()));
                    None
                }
            }
        };
        Limits {
            cpu_millis: bounded(
                "quota.cpu",
                self.cpu.as_ref().map(cpu),
                10,
                10_000_000,
                "cpu is \"4\" or \"500m\", or a number of thousandths of a core from 10 to 10000000",
            ),
            memory: bounded(
                "quota.memory",
                self.memory.as_ref().map(bytes),
                8 << 20,
                1 << 50,
                "memory is \"8Gi\" or \"512Mi\", or a number of bytes, and at least 8Mi",
            ),
            apps: bounded("quota.apps", self.apps.map(Some), 0, 1_000, "apps is 0 to 1000"),
            instances: bounded(
                "quota.instances",
                self.instances.map(Some),
                0,
                1_000,
                "instances is 0 to 1000",
            ),
            registry_bytes: bounded(
                "quota.registry_bytes",
                self.registry_bytes.as_ref().map(bytes),
                0,
                1 << 50,
                "registry_bytes is \"10Gi\" or a number of bytes",
            ),
        }
    }
}

/// What stands below a tenant in other nouns and has to be gone before the tenant is. Declared
/// here, implemented there, wired at start.
#[async_trait::async_trait]
pub trait Belongings: Send + Sync + 'static {
    /// The name of the step, for people.
    fn step(&self) -> &'static str;
    /// Goes on with the removal and says what is still left, by looking again.
    async fn remove(&self, tenant: TenantId, name: &TenantName) -> Result<Left, crate::reconcile::Failure>;
}

/// What is left of a tenant's belongings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// Something, in words.
    Some(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_take_units_and_numbers() {
        let input: QuotaInput = serde_json::from_str(
            r#"{"cpu": "1.5", "memory": "8Gi", "apps": 10, "instances": 20, "registry_bytes": 1073741824}"#,
        )
        .unwrap();
        let mut faults = Vec::new();
        let limits = input.parse(&mut faults);
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(limits.cpu_millis, Some(1500));
        assert_eq!(limits.memory, Some(8 << 30));
        assert_eq!(limits.registry_bytes, Some(1 << 30));
    }

    #[test]
    fn every_wrong_limit_is_reported() {
        let input: QuotaInput = serde_json::from_str(
            r#"{"cpu": 4, "memory": "8G", "apps": -1, "instances": 5000, "registry_bytes": "x"}"#,
        )
        .unwrap();
        let mut faults = Vec::new();
        input.parse(&mut faults);
        let paths: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
        assert_eq!(
            paths,
            ["quota.cpu", "quota.memory", "quota.apps", "quota.instances", "quota.registry_bytes"]
        );
    }
}
