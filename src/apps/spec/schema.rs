//! The JSON Schema of a spec (draft 2020-12), for completion in editors. It describes single fields; only the
//! platform checks rules between fields.

use serde_json::{Value, json};

use super::fields;

/// Returns the schema.
#[must_use]
pub fn schema() -> Value {
    let port = json!({"type": "integer", "minimum": 1024, "maximum": 65535});
    let text = json!({"type": "string", "maxLength": 8192});
    let name = json!({"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$"});
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Bulkhead app spec, v1",
        "type": "object",
        "additionalProperties": false,
        "required": fields::REQUIRED,
        "properties": {
            "spec": {"const": "v1", "description": "Version of the format."},
            "name": name,
            "image": {
                "type": "string",
                "description": "repository:tag or repository@sha256:... of the tenant's own project.",
            },
            "command": {"type": "array", "items": text, "minItems": 1, "maxItems": 64},
            "args": {"type": "array", "items": text, "maxItems": 64},
            "cpu": {
                "description": "250m or a number of cores.",
                "oneOf": [
                    {"type": "string", "pattern": "^([0-9]+m|[0-9]+(\\.[0-9]{1,3})?)$"},
                    {"type": "number", "minimum": 0.01, "maximum": 1000},
                ],
            },
            "memory": size("At least 8Mi, including scratch."),
            "instances": {"type": "integer", "minimum": 0, "maximum": fields::INSTANCES, "default": 1},
            "singleton": {"type": "boolean", "default": false},
            "env": {
                "type": "object",
                "maxProperties": 128,
                "propertyNames": {"pattern": "^(?!BULKHEAD_)[A-Za-z_][A-Za-z0-9_.-]{0,127}$"},
                "additionalProperties": {"type": "string"},
            },
            "port": {
                "description": "A TCP port, or {port, protocol} for UDP.",
                "oneOf": [
                    port,
                    {
                        "type": "object",
                        "additionalProperties": false,
                        "required": ["port"],
                        "properties": {"port": port, "protocol": {"enum": ["tcp", "udp"], "default": "tcp"}},
                    },
                ],
            },
            "health": health(&port),
            "scratch": scratch(),
            "stop_grace": {
                "type": "integer", "minimum": 0, "maximum": fields::STOP_GRACE.0, "default": fields::STOP_GRACE.1,
            },
            "connects": {
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "services": {"type": "array", "items": name, "maxItems": fields::MOST_CONNECTS, "uniqueItems": true},
                    "apps": {
                        "type": "array", "maxItems": fields::MOST_CONNECTS, "uniqueItems": true,
                        "items": {
                            "type": "string", "maxLength": 78,
                            "pattern": "^([a-z][a-z0-9-]{1,30}[a-z0-9]/)?[a-z]([a-z0-9-]{0,43}[a-z0-9])?$",
                        },
                    },
                    "egress": {"type": "array", "items": name, "maxItems": fields::MOST_CONNECTS, "uniqueItems": true},
                },
            },
        },
    })
}

fn size(what: &str) -> Value {
    json!({"type": "string", "pattern": "^[0-9]+(Ki|Mi|Gi)$", "description": what})
}

fn scratch() -> Value {
    json!({
        "type": "object",
        "maxProperties": 16,
        "propertyNames": {"pattern": "^/"},
        "description": "Writable folders in memory, which count as memory. Default: 16Mi each for /tmp and /dev/shm.",
        "additionalProperties": {
            "oneOf": [
                size("Memory-backed."),
                {
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["size"],
                    "properties": {
                        "size": size("Memory-backed."),
                        "exec": {
                            "type": "boolean", "default": false,
                            "description": "Files in it may be executed: libraries that a program unpacks.",
                        },
                    },
                },
            ],
        },
    })
}

fn health(port: &Value) -> Value {
    json!({"oneOf": [{"const": "none", "description": "No check."}, {
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "http": {
                "type": "object",
                "additionalProperties": false,
                "required": ["path"],
                "properties": {"path": {"type": "string", "pattern": "^/", "maxLength": 256}, "port": port},
            },
            "tcp": {"type": "object", "additionalProperties": false, "properties": {"port": port}},
            "grace": {
                "type": "integer", "minimum": 0, "maximum": fields::GRACE, "default": fields::GRACE_DEFAULT,
            },
        },
        "oneOf": [{"required": ["http"]}, {"required": ["tcp"]}],
    }]})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(value: &Value) -> Vec<&str> {
        let mut keys: Vec<_> = value["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    fn sorted<'a>(table: &[&'a str]) -> Vec<&'a str> {
        let mut table = table.to_vec();
        table.sort_unstable();
        table
    }

    #[test]
    fn the_schema_has_the_fields_of_the_table() {
        let schema = schema();
        let properties = &schema["properties"];
        assert_eq!(keys(&schema), sorted(fields::TOP));
        assert_eq!(keys(&properties["port"]["oneOf"][1]), sorted(fields::PORT));
        let health = &properties["health"]["oneOf"][1];
        assert_eq!(keys(health), sorted(fields::HEALTH));
        assert_eq!(keys(&health["properties"]["http"]), sorted(fields::HTTP));
        assert_eq!(keys(&health["properties"]["tcp"]), sorted(fields::TCP));
        let scratch = &properties["scratch"]["additionalProperties"]["oneOf"][1];
        assert_eq!(keys(scratch), sorted(fields::SCRATCH));
        assert_eq!(keys(&properties["connects"]), sorted(fields::CONNECTS));
    }
}
