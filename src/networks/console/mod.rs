//! The noun's pages: a tenant's network, and the platform's. Every action is a plain form.

use serde_json::Value;

use super::store::Plan;
use crate::access::console::{when, who};

pub mod decide;
pub mod platform;
pub mod tenant;

struct PlanRow {
    number: i64,
    tenant: String,
    state: &'static str,
    mark: &'static str,
    message: String,
    opens: Vec<String>,
    closes: Vec<String>,
    causes: Vec<String>,
    at: String,
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

impl From<Plan> for PlanRow {
    fn from(plan: Plan) -> Self {
        let (state, mark) = match plan.state.as_str() {
            "in_force" => ("in force", "running"),
            "proven" => ("being applied", "changing"),
            "refused" => ("not proven", "failed"),
            _ => ("over", "stopped"),
        };
        let causes = plan.causes.as_array().into_iter().flatten().map(|cause| {
            let text = |key: &str| cause[key].as_str().unwrap_or_default();
            format!("{} ({})", text("words"), who(text("actor")))
        });
        Self {
            causes: causes.collect(),
            opens: texts(&plan.opens),
            closes: texts(&plan.closes),
            at: when(plan.created_at),
            number: plan.number,
            tenant: plan.tenant,
            message: plan.message,
            state,
            mark,
        }
    }
}
