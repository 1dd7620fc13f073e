//! Prints a spec as the shortest document that parses to the same spec. The database stores this form.

use serde_json::{Map, Value, json};

use super::{AppSpec, HealthField, fields};
use crate::driver::scratch::SHM;
use crate::driver::workload::{HealthCheck, Scratch, Serves};
use crate::policy::Protocol;

impl AppSpec {
    /// Returns the spec as JSON, without fields that have their default.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("spec".into(), json!("v1"));
        out.insert("name".into(), json!(self.name));
        out.insert("image".into(), json!(self.image.to_string()));
        if let Some(command) = &self.command {
            out.insert("command".into(), json!(command));
        }
        if let Some(args) = &self.args {
            out.insert("args".into(), json!(args));
        }
        out.insert("cpu".into(), json!(format!("{}m", self.cpu_millis)));
        out.insert("memory".into(), json!(fields::print_size(self.memory)));
        out.insert("instances".into(), json!(self.instances));
        if self.singleton {
            out.insert("singleton".into(), json!(true));
        }
        if !self.env.is_empty() {
            out.insert("env".into(), json!(self.env));
        }
        if let Some(Serves { port, protocol }) = self.port {
            let value = match protocol {
                Protocol::Tcp => json!(port),
                Protocol::Udp => json!({"port": port, "protocol": "udp"}),
            };
            out.insert("port".into(), value);
        }
        match &self.health {
            HealthField::Nothing => {}
            HealthField::None => {
                out.insert("health".into(), json!("none"));
            }
            HealthField::Check(health) => {
                let mut check = match &health.check {
                    HealthCheck::Http { path, port } => json!({"http": {"path": path, "port": port}}),
                    HealthCheck::Tcp { port } => json!({"tcp": {"port": port}}),
                };
                if health.grace != fields::GRACE_DEFAULT {
                    check["grace"] = json!(health.grace);
                }
                out.insert("health".into(), check);
            }
        }
        let others = self.scratch.iter().filter(|(path, _)| *path != SHM);
        let others = others.fold(0_u64, |sum, (_, scratch)| sum.saturating_add(scratch.size));
        let shm = super::scratch::default_shm(self.memory, others);
        let usual = |path: &str| match path {
            "/tmp" => Some(Scratch::of(fields::TMP)),
            SHM => Some(Scratch::of(shm)),
            _ => None,
        };
        let scratch: Map<String, Value> = self
            .scratch
            .iter()
            .filter(|(path, scratch)| usual(path) != Some(**scratch))
            .map(|(path, scratch)| {
                let size = fields::print_size(scratch.size);
                let value = if scratch.exec { json!({"size": size, "exec": true}) } else { json!(size) };
                (path.clone(), value)
            })
            .collect();
        if !scratch.is_empty() {
            out.insert("scratch".into(), Value::Object(scratch));
        }
        if self.stop_grace != fields::STOP_GRACE.1 {
            out.insert("stop_grace".into(), json!(self.stop_grace));
        }
        let mut connects = Map::new();
        for (name, list) in [
            ("services", json!(self.connects.services)),
            ("apps", json!(self.connects.apps)),
            ("egress", json!(self.connects.egress)),
        ] {
            if list.as_array().is_some_and(|list| !list.is_empty()) {
                connects.insert(name.into(), list);
            }
        }
        if !connects.is_empty() {
            out.insert("connects".into(), Value::Object(connects));
        }
        Value::Object(out)
    }
}
