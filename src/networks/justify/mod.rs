//! Verifies a plan: each flow follows from the decisions, and no requested and decided flow is missing. This
//! checker is written apart from the compiler. The agent runs the second half, which verifies the firewall's
//! text, before it applies the text.

use super::compile::Gap;
use super::{AppPlan, EgressTarget, PlanFacts};
use crate::apps::connections::Connecting;
use crate::driver::workload::Serves;
use crate::ids::TenantName;
use crate::policy::never::{against_outside, against_service};
use crate::policy::{Cidr, Flow, Target};

/// Checks a plan against the decisions. On failure, names the first flow that is wrong and says why.
pub fn justify(facts: &PlanFacts, plans: &[AppPlan], gaps: &[Gap], pool: Cidr) -> Result<(), String> {
    if plans.len() != facts.apps.len() {
        return Err("the plan's apps differ from the tenant's".to_owned());
    }
    for plan in plans {
        let app = facts
            .apps
            .iter()
            .find(|app| app.id == plan.app && app.name == plan.name)
            .ok_or_else(|| format!("{} is not an app of the tenant", plan.name))?;
        for flow in &plan.flows {
            reason(facts, app, flow, pool).map_err(|why| {
                format!(
                    "{} to {} ({:?} {} {}): {why}",
                    plan.name, flow.name, flow.target, flow.protocol, flow.port
                )
            })?;
        }
        wanted(facts, app, plan, gaps)?;
    }
    Ok(())
}

fn reason(facts: &PlanFacts, app: &Connecting, flow: &Flow, pool: Cidr) -> Result<(), &'static str> {
    let connects = &app.connects;
    match &flow.target {
        Target::App { tenant, app: id } => {
            if !connects.apps.iter().any(|name| name.to_string() == flow.name) {
                return Err("the app does not name this app");
            }
            let serves = Some(Serves { protocol: flow.protocol, port: flow.port });
            let agreed = if *tenant == facts.tenant {
                flow.until.is_none()
                    && facts
                        .apps
                        .iter()
                        .any(|peer| peer.id == *id && peer.port == serves && peer.name.as_str() == flow.name)
            } else {
                facts.grants.iter().any(|grant| granted(grant, tenant, app, flow) && grant.id == *id)
            };
            if agreed { Ok(()) } else { Err("there is no such app and port, or no accepted grant for them") }
        }
        Target::Service { network } => {
            let named = connects.services.iter().any(|name| name.as_str() == flow.name);
            let given = facts.services.iter().any(|(name, endpoints)| {
                name.as_str() == flow.name
                    && endpoints
                        .iter()
                        .any(|e| e.network == *network && e.protocol == flow.protocol && e.port == flow.port)
            });
            if !named || !given {
                return Err("the app does not name this service, or the tenant may not use it");
            }
            clear(network.overlaps(pool) || against_service(*network, &[]).is_some())
        }
        Target::Outside { .. } | Target::Domain { .. } => {
            let named = connects.egress.iter().any(|name| name.as_str() == flow.name);
            let approved = facts.egress.iter().any(|target| {
                target.name.as_str() == flow.name
                    && is_there(&target.place, &flow.target)
                    && target.protocol == flow.protocol
                    && target.ports.contains(&flow.port)
                    && target.until == flow.until
            });
            if !named || !approved {
                return Err("the app does not name this target, or it is not approved");
            }
            match &flow.target {
                Target::Outside { network } => {
                    clear(network.overlaps(pool) || against_outside(*network, &[]).is_some())
                }
                // The resolver checks a domain's addresses against the reserved ranges at each lookup.
                _ => Ok(()),
            }
        }
    }
}

fn is_there(place: &EgressTarget, target: &Target) -> bool {
    match (place, target) {
        (EgressTarget::Network(own), Target::Outside { network }) => own == network,
        (EgressTarget::Domain(own), Target::Domain { domain }) => own == domain,
        _ => false,
    }
}

fn clear(walled: bool) -> Result<(), &'static str> {
    if walled { Err("it overlaps a reserved range") } else { Ok(()) }
}

fn granted(grant: &super::Granted, tenant: &TenantName, app: &Connecting, flow: &Flow) -> bool {
    grant.tenant == *tenant
        && format!("{}/{}", grant.tenant, grant.app) == flow.name
        && grant.port == Some(Serves { protocol: flow.protocol, port: flow.port })
        && grant.until == flow.until
        && grant.only.as_ref().is_none_or(|only| *only == app.name)
}

/// Checks that each name under `connects` has a flow or is reported as a gap.
fn wanted(facts: &PlanFacts, app: &Connecting, plan: &AppPlan, gaps: &[Gap]) -> Result<(), String> {
    let names = (app.connects.apps.iter().map(ToString::to_string))
        .chain(app.connects.services.iter().map(ToString::to_string))
        .chain(app.connects.egress.iter().map(ToString::to_string));
    for name in names {
        let told = gaps.iter().any(|gap| gap.app == app.name.as_str() && gap.name == name);
        if !told && !plan.flows.iter().any(|flow| flow.name == name) {
            return Err(format!(
                "{} of {} requires {name}, but the plan has no flow for it",
                app.name, facts.tenant
            ));
        }
    }
    // All endpoints of a service and all ports of a target must be open.
    for (service, endpoints) in facts.services.iter().filter(|(name, _)| app.connects.services.contains(name))
    {
        for end in endpoints {
            let open = plan.flows.iter().any(|flow| {
                flow.target == Target::Service { network: end.network }
                    && (flow.protocol, flow.port) == (end.protocol, end.port)
            });
            if !open {
                return Err(format!("{} lacks an endpoint of {service}", app.name));
            }
        }
    }
    for target in facts.egress.iter().filter(|target| app.connects.egress.contains(&target.name)) {
        let count = plan.flows.iter().filter(|flow| is_there(&target.place, &flow.target));
        let missing = target.ports.iter().any(|port| !count.clone().any(|flow| flow.port == *port));
        if missing {
            return Err(format!("{} lacks a port of {}", app.name, target.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
