//! Compiles the decisions about a tenant's connections into its plan, without I/O. A name under `connects`
//! that the app may not use stays denied and is reported as a gap.

use super::{AppPlan, Endpoint, PlanFacts};
use crate::apps::connections::Connecting;
use crate::driver::workload::Serves;
use crate::ids::{AppRef, ServiceName};
use crate::policy::{Flow, Target};

/// An unresolved reference: a name under `connects` that the app may not use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The app that names it.
    pub app: String,
    /// The name under `connects`.
    pub name: String,
    /// Why it is denied.
    pub why: &'static str,
}

/// Compiles a tenant's plan.
#[must_use]
pub fn compile(facts: &PlanFacts) -> (Vec<AppPlan>, Vec<Gap>) {
    let mut gaps = Vec::new();
    let plans = facts
        .apps
        .iter()
        .map(|app| {
            let mut flows = Vec::new();
            let mut gap = |name: String, why| gaps.push(Gap { app: app.name.to_string(), name, why });
            for name in &app.connects.apps {
                match peer(facts, app, name) {
                    Ok(flow) => flows.push(flow),
                    Err(why) => gap(name.to_string(), why),
                }
            }
            for name in &app.connects.services {
                match facts.services.iter().find(|(service, _)| service == name) {
                    Some((_, endpoints)) => flows.extend(endpoints.iter().map(|endpoint| Flow {
                        name: name.to_string(),
                        target: Target::Service { network: endpoint.network },
                        protocol: endpoint.protocol,
                        port: endpoint.port,
                        until: None,
                    })),
                    None => gap(name.to_string(), "the tenant may not use this service"),
                }
            }
            for name in &app.connects.egress {
                match facts.egress.iter().find(|target| target.name == *name) {
                    Some(target) => flows.extend(target.ports.iter().map(|port| Flow {
                        name: name.to_string(),
                        target: target.place.target(),
                        protocol: target.protocol,
                        port: *port,
                        until: target.until,
                    })),
                    None => gap(name.to_string(), "the egress target is not approved, has expired, or is blocked by the platform's configuration"),
                }
            }
            flows.sort();
            flows.dedup();
            AppPlan { app: app.id, name: app.name.clone(), flows }
        })
        .collect();
    (plans, gaps)
}

/// Returns the open flows that the pending changes of these services will close.
#[must_use]
pub fn closing(plans: &[AppPlan], windows: &[(ServiceName, Vec<Endpoint>)]) -> Vec<AppPlan> {
    let closes = |flow: &Flow| {
        let Target::Service { network } = flow.target else { return false };
        let end = Endpoint { network, protocol: flow.protocol, port: flow.port };
        windows.iter().any(|(name, coming)| name.as_str() == flow.name && !end.is_among(coming))
    };
    plans
        .iter()
        .map(|app| AppPlan {
            flows: app.flows.iter().filter(|flow| closes(flow)).cloned().collect(),
            ..app.clone()
        })
        .filter(|app| !app.flows.is_empty())
        .collect()
}

fn peer(facts: &PlanFacts, app: &Connecting, name: &AppRef) -> Result<Flow, &'static str> {
    let (tenant, id, port, until) = match &name.tenant {
        None => {
            let peer = facts.apps.iter().find(|peer| peer.name == name.app).ok_or("there is no such app")?;
            (facts.tenant.clone(), peer.id, peer.port, None)
        }
        Some(tenant) => {
            let fits = |grant: &&super::Granted| {
                grant.tenant == *tenant
                    && grant.app == name.app
                    && grant.only.as_ref().is_none_or(|only| *only == app.name)
            };
            let grant =
                facts.grants.iter().find(fits).ok_or("the app is not granted, or the grant has ended")?;
            (grant.tenant.clone(), grant.id, grant.port, grant.until)
        }
    };
    let Serves { protocol, port } = port.ok_or("the app serves on no port")?;
    Ok(Flow { name: name.to_string(), target: Target::App { tenant, app: id }, protocol, port, until })
}
