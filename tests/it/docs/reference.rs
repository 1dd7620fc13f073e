//! Generates the pages of `docs/reference` from the tables of the code.

use std::fmt::Write as _;
use std::fs;

use bulkhead::access::extract::Needs;
use bulkhead::access::{Effect, PERMISSIONS};
use bulkhead::apps::spec::schema;
use bulkhead::fault::catalogue;
use bulkhead::routes;
use serde_json::Value;

use super::{root, settings};

/// Environment variable that makes the test write the pages instead of comparing them.
const UPDATE: &str = "UPDATE_DOCS";

fn page(title: &str, source: &str, body: &str) -> String {
    format!("# {title}\n\nThis page is generated from {source}. A test compares both.\n\n{body}")
}

/// Escapes a text for a cell of a table.
pub(super) fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[test]
fn the_reference_matches_the_code() {
    let pages = [
        ("errors", errors()),
        ("permissions", permissions()),
        ("api", api()),
        ("spec", spec()),
        ("settings", settings::page()),
    ];
    let mut stale = Vec::new();
    for (name, text) in pages {
        let path = root().join(format!("docs/reference/{name}.md"));
        if std::env::var_os(UPDATE).is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        } else if fs::read_to_string(&path).unwrap_or_default() != text {
            stale.push(format!("docs/reference/{name}.md"));
        }
    }
    assert!(
        stale.is_empty(),
        "{} differ(s) from the code. Update: {UPDATE}=1 cargo test --test it docs::reference",
        stale.join(", ")
    );
}

fn errors() -> String {
    let mut body = String::new();
    for (title, from, to) in [("Specs", 100, 200), ("Images", 200, 300), ("Requests", 400, 600)] {
        let _ = write!(body, "## {title}\n| code | meaning | what to do |\n| --- | --- | --- |\n");
        for entry in catalogue::all().filter(|entry| (from..to).contains(&entry.code.0)) {
            let _ = writeln!(body, "| `{}` | {} | {} |", entry.code, cell(entry.title), cell(entry.text));
        }
        body.push('\n');
    }
    page("Error codes", "`src/fault/catalogue.rs`", body.trim_end()) + "\n"
}

fn permissions() -> String {
    let mut body = String::from(
        "Each role includes the roles before it: viewer, deployer, owner in a tenant; auditor, admin on the platform.\n\n\
         | permission | lowest role in the tenant | lowest role on the platform | in a suspended tenant |\n\
         | --- | --- | --- | --- |\n",
    );
    for row in PERMISSIONS {
        let suspended = match (row.tenant, row.effect) {
            (None, _) => "",
            (_, Effect::Reads) => "yes",
            (_, Effect::Changes) => "platform roles only",
        };
        let tenant = row.tenant.map_or("none", bulkhead::access::Role::as_str);
        let _ =
            writeln!(body, "| {} | {tenant} | {} | {suspended} |", cell(row.words), row.platform.as_str());
    }
    page("Roles and permissions", "the permission table in `src/access/mod.rs`", &body)
}

fn api() -> String {
    let mut groups: Vec<(&str, String)> = Vec::new();
    for (method, path, needs) in routes::operations() {
        let group = if path.starts_with("/api/v1/tenants") {
            "Tenants"
        } else if path.starts_with("/api/v1/me") {
            "Own account"
        } else if path.starts_with("/api/v1/") {
            "Platform"
        } else if path.ends_with("healthz") || path.ends_with("readyz") {
            "Health"
        } else {
            continue;
        };
        let needs = match needs {
            Needs::Nothing => "nothing |".to_owned(),
            Needs::Account => "an account or a token |".to_owned(),
            Needs::Role(tenant, platform) => {
                format!("{} | {}", tenant.map_or("", bulkhead::access::Role::as_str), platform.as_str())
            }
        };
        let row = format!("| {method} | `{}` | {needs} |\n", path.replace(":.+}", "}"));
        match groups.iter_mut().find(|(name, _)| *name == group) {
            Some((_, rows)) => rows.push_str(&row),
            None => groups.push((group, row)),
        }
    }
    let mut body = String::from(
        "A request needs one of both roles: in the tenant, or on the platform. [The API](../api.md) says what each call \
         does.\n",
    );
    for (name, rows) in groups {
        let _ = write!(
            body,
            "\n## {name}\n| method | path | lowest role in the tenant | lowest role on the platform |\n\
             | --- | --- | --- | --- |\n{rows}"
        );
    }
    page("Routes of the API", "the route table in `src/routes.rs`", &body)
}

/// Describes the values that a schema allows.
fn shape(schema: &Value) -> String {
    let bounds = |least: &str, most: &str| match (schema.get(least), schema.get(most)) {
        (Some(least), Some(most)) => format!(", {least} to {most}"),
        (Some(least), None) => format!(", at least {least}"),
        (None, Some(most)) => format!(", at most {most}"),
        (None, None) => String::new(),
    };
    if let Some(value) = schema["const"].as_str() {
        return format!("`{value}`");
    }
    if let Some(values) = schema["enum"].as_array() {
        return values
            .iter()
            .map(|value| format!("`{}`", value.as_str().unwrap()))
            .collect::<Vec<_>>()
            .join(" or ");
    }
    if let Some(one) = schema["oneOf"].as_array().filter(|one| one[0].get("required").is_none()) {
        return one.iter().map(shape).collect::<Vec<_>>().join("; or ");
    }
    match schema["type"].as_str().unwrap_or_default() {
        "string" => {
            let pattern = schema["pattern"].as_str().map(|pattern| format!(" matching `{pattern}`"));
            let most = schema["maxLength"].as_u64().map(|most| format!(", at most {most} characters"));
            format!("string{}{}", pattern.unwrap_or_default(), most.unwrap_or_default())
        }
        "array" => {
            let many = bounds("minItems", "maxItems");
            format!("list of {} items, each: {}", many.trim_start_matches(", "), shape(&schema["items"]))
        }
        "object" if schema.get("properties").is_some() => "object".to_owned(),
        "object" => {
            let keys = schema["propertyNames"]["pattern"].as_str().unwrap_or(".*");
            let most = schema["maxProperties"].as_u64().unwrap_or_default();
            format!(
                "map of at most {most} keys matching `{keys}`, to: {}",
                shape(&schema["additionalProperties"])
            )
        }
        other => format!("{other}{}", bounds("minimum", "maximum")),
    }
}

/// Writes a row for each field of a schema, nested fields included.
fn fields(schema: &Value, path: &str, rows: &mut String) {
    let required = schema["required"].as_array().map(Vec::as_slice).unwrap_or_default();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let own = format!("{path}{name}");
        let default = match field.get("default") {
            Some(Value::String(text)) => format!("`{text}`"),
            Some(value) => format!("`{value}`"),
            None if required.iter().any(|known| known == name) => "required".to_owned(),
            None => String::new(),
        };
        let about = field["description"].as_str().unwrap_or_default();
        let _ = writeln!(rows, "| `{own}` | {} | {default} | {} |", cell(&shape(field)), cell(about));
        let inner = [field, &field["additionalProperties"]];
        for (inner, step) in inner.into_iter().zip([".", ".PATH."]) {
            for part in std::iter::once(inner).chain(inner["oneOf"].as_array().into_iter().flatten()) {
                fields(part, &format!("{own}{step}"), rows);
            }
        }
    }
}

fn spec() -> String {
    let mut body = String::from(
        "[The spec](../tenant/spec.md) explains the fields. `GET /api/v1/schemas/app-spec` returns the JSON Schema for \
         editors.\n\n| field | shape | default | meaning |\n| --- | --- | --- | --- |\n",
    );
    fields(&schema(), "", &mut body);
    page("Fields of the spec", "the schema in `src/apps/spec/schema.rs`", &body)
}
