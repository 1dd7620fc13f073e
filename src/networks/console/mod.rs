//! The network pages of a tenant and of the platform. Every action is a plain form.

use serde_json::Value;

use super::store::Plan;
use crate::access::console::{when, who};
use crate::driver::ProbeSummary;

pub mod decide;
pub mod platform;
pub mod rollout;
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
    tried: String,
    faults: Vec<String>,
    silent: Vec<String>,
    at: String,
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

impl From<Plan> for PlanRow {
    fn from(plan: Plan) -> Self {
        let (state, mark) = match plan.state.as_str() {
            "in_force" => ("Applied", "running"),
            "proven" => ("Applying", "changing"),
            "refused" => ("Not verified", "failed"),
            _ => ("Superseded", "stopped"),
        };
        let causes = plan.causes.as_array().into_iter().flatten().map(|cause| {
            let text = |key: &str| cause[key].as_str().unwrap_or_default();
            format!("{} ({})", text("words"), who(text("actor")))
        });
        let probed: Option<ProbeSummary> = plan.probed.and_then(|probed| serde_json::from_value(probed).ok());
        let tried = match &probed {
            None => String::new(),
            Some(probed) if probed.apps == 0 => "Not tested: no app was running".to_owned(),
            Some(ProbeSummary { apps, open, closed, .. }) => {
                format!("Tested from {apps} app(s): {open} must be open, {closed} must be closed")
            }
        };
        Self {
            tried,
            silent: probed.as_ref().map(|probed| probed.silent.clone()).unwrap_or_default(),
            faults: probed.map(|probed| probed.faults).unwrap_or_default(),
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
