//! Trying from within tenants' apps what a roll-out opens and closes.

use std::collections::BTreeSet;

use futures_util::StreamExt;

use super::Check;
use crate::driver::{Driver, Error, Probe, ProbeOutcome, ProbeTarget};
use crate::ids::AppId;
use crate::networks::Endpoint;
use crate::networks::store::{PlanOf, Rollout};
use crate::policy::{Protocol, Target};
use crate::reconcile::Failure;

/// How many are tried at a time: others ask too.
const AT_ONCE: usize = 4;
/// How often one is tried that others keep waiting.
const AGAIN: u32 = 20;
/// Most apps of a tenant, places of an app, and tries in all: each may last one and a half seconds, and whoever
/// aborts a roll-out waits for them.
const APPS: usize = 3;
const PLACES: usize = 16;
const MOST: usize = 120;

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Tried {
    /// What was tried.
    pub(super) checks: Vec<Check>,
    /// Apps of which no instance runs: by number and name.
    pub(super) idle: Vec<(AppId, String)>,
}

/// Where something answers, in words.
pub(super) fn place(check: &Check) -> String {
    format!("{} {} {}", check.address, check.protocol, check.port)
}

/// What is tried from an app: that the endpoints answer that hold for it, and that those do not that went.
/// Endpoints of more than one address cannot be tried.
fn wanted(rollout: &Rollout, plan: &PlanOf, reached: bool) -> Vec<Check> {
    let now: &[Endpoint] = if reached { &rollout.endpoints } else { &rollout.before };
    let uses = |app: &&crate::networks::AppPlan| {
        app.flows.iter().any(|flow| {
            flow.name == rollout.service.as_str() && matches!(flow.target, Target::Service { .. })
        })
    };
    let mut out = Vec::new();
    for app in plan.apps.iter().filter(uses).take(APPS) {
        // Open to the app for another reason, it is not closed; where a name leads, or what a trial lets out, is not
        // known here.
        let otherwise = |end: &Endpoint| {
            plan.on_trial
                || app.flows.iter().any(|flow| {
                    let there = match &flow.target {
                        Target::Service { network } | Target::Outside { network } => {
                            network.overlaps(end.network)
                        }
                        Target::Domain { .. } => true,
                        Target::App { .. } => false,
                    };
                    there && (flow.protocol, flow.port) == (end.protocol, end.port)
                })
        };
        let gone = rollout.before.iter().filter(|end| reached && !end.is_among(now) && !otherwise(end));
        let all = now.iter().map(|end| (end, true)).chain(gone.map(|end| (end, false)));
        out.extend(all.take(PLACES).filter_map(|(end, open)| {
            Some(Check {
                tenant: plan.tenant,
                tenant_name: plan.name.clone(),
                app: app.app,
                app_name: app.name.clone(),
                address: end.network.single()?,
                protocol: end.protocol,
                port: end.port,
                open,
                outcome: ProbeOutcome::Silent,
                good: false,
            })
        }));
    }
    out
}

/// Whether what came of it is as it must be. `dead`: whether it did not answer before either: then it is no fault of
/// the roll-out that it does not now, unless the firewall says so.
fn judge(check: &Check, dead: bool) -> bool {
    match (check.open, check.outcome) {
        (false, outcome) => !outcome.is_through(),
        (true, ProbeOutcome::Prohibited) => false,
        (true, ProbeOutcome::Reached | ProbeOutcome::Opened) => true,
        // Nobody has to answer a datagram.
        (true, ProbeOutcome::Silent | ProbeOutcome::Unreachable) => dead || check.protocol == Protocol::Udp,
        (true, ProbeOutcome::Refused) => dead,
    }
}

/// Tries from within the apps of these plans. `dead`: places that answered nobody before.
pub(super) async fn attempt(
    driver: &dyn Driver,
    rollout: &Rollout,
    plans: &[PlanOf],
    reached: bool,
    dead: &BTreeSet<String>,
) -> Result<Tried, Failure> {
    let wanted: Vec<Check> =
        plans.iter().flat_map(|plan| wanted(rollout, plan, reached)).take(MOST).collect();
    let tries = futures_util::stream::iter(wanted).map(|check| one(driver, check)).buffered(AT_ONCE);
    let tries: Vec<Result<Result<Check, Check>, Failure>> = tries.collect().await;
    let mut tried = Tried::default();
    for check in tries {
        match check? {
            Ok(mut check) => {
                check.good = judge(&check, dead.contains(&place(&check)));
                tried.checks.push(check);
            }
            Err(idle) => {
                let idle = (idle.app, format!("{}/{}", idle.tenant_name, idle.app_name));
                if !tried.idle.contains(&idle) {
                    tried.idle.push(idle);
                }
            }
        }
    }
    Ok(tried)
}

/// Tries one; the inner error is one of whose app no instance runs.
async fn one(driver: &dyn Driver, check: Check) -> Result<Result<Check, Check>, Failure> {
    let probe = Probe {
        tenant: check.tenant_name.clone(),
        app: check.app,
        target: ProbeTarget::Address(check.address),
        protocol: check.protocol,
        port: check.port,
        platform: true,
    };
    for _ in 0..AGAIN {
        match driver.probe(&probe).await {
            Ok(outcome) => return Ok(Ok(Check { outcome, ..check })),
            Err(Error::Rejected(_)) => return Ok(Err(check)),
            // Others are being tried.
            Err(Error::Transient(_)) => tokio::time::sleep(std::time::Duration::from_millis(300)).await,
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::Transient("the agent does not get to try what is open; it is asked again".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(open: bool, protocol: Protocol, outcome: ProbeOutcome) -> Check {
        Check {
            tenant: crate::ids::TenantId(1),
            tenant_name: "acme".parse().unwrap(),
            app: crate::ids::AppId(1),
            app_name: "web".parse().unwrap(),
            address: std::net::Ipv4Addr::new(10, 5, 0, 2),
            protocol,
            port: 9092,
            open,
            outcome,
            good: false,
        }
    }

    #[test]
    fn what_the_firewall_refuses_is_a_fault_and_a_service_that_was_dead_before_is_none() {
        use ProbeOutcome::{Opened, Prohibited, Reached, Refused, Silent, Unreachable};
        for (open, protocol, outcome, dead, good) in [
            (true, Protocol::Tcp, Opened, false, true),
            (true, Protocol::Tcp, Reached, false, true),
            (true, Protocol::Tcp, Prohibited, true, false),
            (true, Protocol::Tcp, Silent, false, false),
            (true, Protocol::Tcp, Silent, true, true),
            (true, Protocol::Tcp, Refused, false, false),
            (true, Protocol::Tcp, Refused, true, true),
            (true, Protocol::Tcp, Unreachable, false, false),
            (true, Protocol::Tcp, Unreachable, true, true),
            (true, Protocol::Udp, Silent, false, true),
            (true, Protocol::Udp, Prohibited, false, false),
            (false, Protocol::Tcp, Prohibited, false, true),
            (false, Protocol::Tcp, Silent, false, true),
            (false, Protocol::Tcp, Refused, true, false),
            (false, Protocol::Tcp, Opened, true, false),
        ] {
            assert_eq!(judge(&check(open, protocol, outcome), dead), good, "{open} {protocol} {outcome}");
        }
    }
}
