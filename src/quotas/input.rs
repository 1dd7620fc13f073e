//! Limits as an admin sends them: parsed and checked against each resource's range, with all faults together.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Number;

use super::{Definition, Resource, Unit};
use crate::fault::{Code, Fault, Kind};

/// A limit as sent: a number, or a text with a unit. A number for cpu means cores, as in a spec.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// Cores, bytes, or a count.
    Number(Number),
    /// `4`, `0.25`, `500m`; `8Gi`, `512Mi`; `default`.
    Text(String),
}

/// Limits as sent, by resource name.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub struct QuotaInput(BTreeMap<String, Option<Size>>);

/// A checked limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaLimit {
    /// A limit of the tenant itself.
    Own(i64),
    /// Back to the default of the settings.
    Default,
}

/// Checked limits. A resource that is not listed keeps its limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuotaLimits(BTreeMap<Resource, QuotaLimit>);

impl QuotaLimits {
    /// Iterates over the limits.
    pub fn iter(&self) -> impl Iterator<Item = (Resource, QuotaLimit)> {
        self.0.iter().map(|(resource, limit)| (*resource, *limit))
    }

    /// Returns the limit of a resource, if it is a number.
    #[must_use]
    pub fn get(&self, resource: Resource) -> Option<i64> {
        match self.0.get(&resource) {
            Some(QuotaLimit::Own(n)) => Some(*n),
            _ => None,
        }
    }

    /// Sets a limit unless one is set.
    pub fn or(&mut self, resource: Resource, limit: i64) {
        self.0.entry(resource).or_insert(QuotaLimit::Own(limit));
    }

    /// Formats the limits for the audit log.
    #[must_use]
    pub fn view(&self) -> serde_json::Value {
        let shown = |(resource, limit): (Resource, QuotaLimit)| {
            let limit = match limit {
                QuotaLimit::Own(n) => serde_json::json!(n),
                QuotaLimit::Default => serde_json::json!("default"),
            };
            (resource.name().to_owned(), limit)
        };
        serde_json::Value::Object(self.iter().map(shown).collect())
    }
}

/// Maximum number of cores in a number without quotes. Earlier versions read a number as thousandths of a core.
/// A client that still sends thousandths gets a fault instead of a quota that is a thousand times too large.
const MOST_BARE_CORES: i64 = 1_000;

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Parses thousandths of a core from `250m`, `0.25` or `4`.
fn millis(text: &str) -> Option<i64> {
    if let Some(millis) = text.strip_suffix('m') {
        return digits(millis).then(|| millis.parse().ok()).flatten();
    }
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    if !digits(whole) || !digits(part) || part.len() > 3 {
        return None;
    }
    let part: i64 = format!("{part:0<3}").parse().ok()?;
    whole.parse::<i64>().ok()?.checked_mul(1000)?.checked_add(part)
}

fn cpu(size: &Size) -> Option<i64> {
    match size {
        Size::Number(cores) => millis(&cores.to_string()).filter(|n| *n <= MOST_BARE_CORES * 1000),
        Size::Text(text) => millis(text),
    }
}

/// Formats thousandths of a core as in a spec: `4` or `250m`.
#[must_use]
pub fn print_cpu(millis: i64) -> String {
    if millis % 1000 == 0 { (millis / 1000).to_string() } else { format!("{millis}m") }
}

fn bytes(size: &Size) -> Option<i64> {
    match size {
        Size::Number(bytes) => bytes.as_i64(),
        Size::Text(text) => {
            let units = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40)];
            let (number, shift) = units
                .iter()
                .find_map(|(unit, shift)| text.strip_suffix(unit).map(|number| (number, *shift)))
                .unwrap_or((text, 0));
            digits(number).then(|| number.parse::<i64>().ok()?.checked_mul(1 << shift)).flatten()
        }
    }
}

fn count(size: &Size) -> Option<i64> {
    match size {
        Size::Number(n) => n.as_i64(),
        Size::Text(_) => None,
    }
}

/// Describes the valid values of a resource's limit.
fn form(resource: Resource) -> String {
    let Definition { name, unit, range: (least, most), .. } = resource.definition();
    let default = if resource.is_own() { "" } else { ", or \"default\"" };
    match unit {
        Unit::Cpu => format!(
            "{name} must be cores, as in a spec: 4, 0.25 or \"500m\", from {least}m to {most}m; a number without quotes can be at \
             most {MOST_BARE_CORES} cores: write thousandths as \"16000m\""
        ),
        Unit::Bytes => {
            format!("{name} must be \"8Gi\" or \"512Mi\", or a number of bytes from {least} to {most}")
        }
        Unit::Count => format!("{name} must be {least} to {most}{default}"),
    }
}

impl QuotaInput {
    /// Checks every limit and collects all faults.
    pub fn parse(&self, faults: &mut Vec<Fault>) -> QuotaLimits {
        let mut limits = QuotaLimits::default();
        let mut bad = |name: &str, message: String| {
            faults.push(Fault::new(Code(426), Kind::Invalid, format!("quota.{name}"), message));
        };
        for resource in Resource::of_tenants() {
            let Definition { name, unit, range: (least, most), .. } = resource.definition();
            let Some(Some(size)) = self.0.get(name) else { continue };
            if matches!(size, Size::Text(text) if text == "default") && !resource.is_own() {
                limits.0.insert(resource, QuotaLimit::Default);
                continue;
            }
            let value = match unit {
                Unit::Cpu => cpu(size),
                Unit::Bytes => bytes(size),
                Unit::Count => count(size),
            };
            match value {
                Some(n) if (least..=most).contains(&n) => {
                    limits.0.insert(resource, QuotaLimit::Own(n));
                }
                _ => bad(name, form(resource)),
            }
        }
        let known: Vec<&str> = Resource::of_tenants().map(Resource::name).collect();
        for name in self.0.keys().filter(|name| !known.contains(&name.as_str())) {
            let name: String = name.chars().take(40).map(crate::fault::plain).collect();
            let near = known.iter().min_by_key(|k| strsim::damerau_levenshtein(&name, k)).copied();
            bad(
                &name,
                format!(
                    "there is no limit of this name; did you mean {}? Known limits: {}",
                    near.unwrap_or_default(),
                    known.join(", ")
                ),
            );
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (QuotaLimits, Vec<String>) {
        let input: QuotaInput = serde_json::from_str(text).unwrap();
        let mut faults = Vec::new();
        let limits = input.parse(&mut faults);
        (limits, faults.into_iter().map(|fault| fault.path).collect())
    }

    #[test]
    fn limits_take_units_and_numbers() {
        let (limits, faults) = parse(
            r#"{"cpu": "1.5", "memory": "8Gi", "apps": 10, "instances": 20, "registry_bytes": 1073741824,
                "api_tokens": 3, "tags": "default", "pids": null}"#,
        );
        assert_eq!(faults, Vec::<String>::new());
        assert_eq!(limits.get(Resource::Cpu), Some(1500));
        assert_eq!(limits.get(Resource::Memory), Some(8 << 30));
        assert_eq!(limits.get(Resource::RegistryBytes), Some(1 << 30));
        assert_eq!(limits.get(Resource::ApiTokens), Some(3));
        assert_eq!(limits.get(Resource::Pids), None);
        assert!(limits.iter().any(|row| row == (Resource::Tags, QuotaLimit::Default)));
    }

    #[test]
    fn cpu_is_written_as_in_a_spec() {
        let read = |text: &str| parse(&format!("{{\"cpu\": {text}}}")).0.get(Resource::Cpu);
        for (text, millis) in [
            ("16", 16_000),
            ("0.25", 250),
            ("\"16000m\"", 16_000),
            ("\"250m\"", 250),
            ("\"1.5\"", 1_500),
            ("1000", 1_000_000),
            ("\"10000\"", 10_000_000),
        ] {
            assert_eq!(read(text), Some(millis), "{text}");
            // A printed limit parses to the same value.
            assert_eq!(read(&format!("\"{}\"", print_cpu(millis))), Some(millis), "{text}");
        }
        for text in
            ["1001", "16000", "0.0001", "-4", "0", "\"+4\"", "\"m\"", "\"4 \"", "\"-1m\"", "0.001", "true"]
        {
            let input = serde_json::from_str::<QuotaInput>(&format!("{{\"cpu\": {text}}}"));
            let limit = input.ok().and_then(|input| input.parse(&mut Vec::new()).get(Resource::Cpu));
            assert_eq!(limit, None, "{text}");
        }
    }

    #[test]
    fn every_wrong_limit_is_reported() {
        let (_, faults) = parse(
            r#"{"cpu": 16000, "memory": "8G", "apps": -1, "instances": 5000, "registry_bytes": "x", "members": 0,
                "grants": "9", "platform_tokens": 5, "unicorns": 1}"#,
        );
        assert_eq!(
            faults,
            [
                "quota.cpu",
                "quota.memory",
                "quota.apps",
                "quota.instances",
                "quota.registry_bytes",
                "quota.members",
                "quota.grants",
                "quota.platform_tokens",
                "quota.unicorns"
            ]
        );
        // A sum that overflows is a fault too, and a resource that every tenant sets has no default.
        let (_, faults) =
            parse(r#"{"memory": "9999999999Ti", "cpu": "9223372036854775807", "apps": "default"}"#);
        assert_eq!(faults.len(), 3);
    }
}
