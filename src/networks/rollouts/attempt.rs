//! Trying from within tenants' apps what a roll-out opens and closes.

use std::collections::BTreeSet;

use futures_util::StreamExt;

use super::Check;
use crate::driver::{Driver, Error, Probe, ProbeOutcome, ProbeTarget};
use crate::networks::Endpoint;
use crate::networks::store::{PlanOf, Rollout};
use crate::policy::{Protocol, Target};
use crate::reconcile::Failure;

/// How many are tried at a time: others ask too.
const AT_ONCE: usize = 4;
/// How often one is tried that others' keep waiting.
const AGAIN: u32 = 20;

/// What is tried from an app: that the endpoints answer that hold for it, and that those do not that went.
/// Endpoints of more than one address cannot be tried.
fn wanted(rollout: &Rollout, plan: &PlanOf, reached: bool) -> Vec<Check> {
    let now: &[Endpoint] = if reached { &rollout.endpoints } else { &rollout.before };
    let mut out = Vec::new();
    for app in &plan.apps {
        let uses = app.flows.iter().any(|flow| {
            flow.name == rollout.service.as_str() && matches!(flow.target, Target::Service { .. })
        });
        if !uses {
            continue;
        }
        // Open to the app for another reason, it is not closed.
        let otherwise = |end: &Endpoint| {
            app.flows.iter().any(|flow| {
                let there = match &flow.target {
                    Target::Service { network } | Target::Outside { network } => {
                        network.overlaps(end.network)
                    }
                    Target::App { .. } | Target::Domain { .. } => false,
                };
                there && (flow.protocol, flow.port) == (end.protocol, end.port)
            })
        };
        let gone = rollout.before.iter().filter(|end| reached && !now.contains(end) && !otherwise(end));
        let all = now.iter().map(|end| (end, true)).chain(gone.map(|end| (end, false)));
        out.extend(all.filter_map(|(end, open)| {
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
        (true, ProbeOutcome::Silent) => dead || check.protocol == Protocol::Udp,
        (true, ProbeOutcome::Refused) => dead,
    }
}

/// Tries from within the apps of these plans. An app of which no instance runs is left out.
pub(super) async fn attempt(
    driver: &dyn Driver,
    rollout: &Rollout,
    plans: &[PlanOf],
    reached: bool,
    dead: &BTreeSet<(crate::ids::AppId, String, String, i32)>,
) -> Result<Vec<Check>, Failure> {
    let wanted: Vec<Check> = plans.iter().flat_map(|plan| wanted(rollout, plan, reached)).collect();
    let tried = futures_util::stream::iter(wanted).map(|check| one(driver, check)).buffered(AT_ONCE);
    let tried: Vec<Result<Option<Check>, Failure>> = tried.collect().await;
    let mut out = Vec::new();
    for check in tried {
        let Some(mut check) = check? else { continue };
        let place = (check.app, check.address.to_string(), check.protocol.to_string(), i32::from(check.port));
        check.good = judge(&check, dead.contains(&place));
        out.push(check);
    }
    Ok(out)
}

async fn one(driver: &dyn Driver, check: Check) -> Result<Option<Check>, Failure> {
    let probe = Probe {
        tenant: check.tenant_name.clone(),
        app: check.app,
        target: ProbeTarget::Address(check.address),
        protocol: check.protocol,
        port: check.port,
    };
    for _ in 0..AGAIN {
        match driver.probe(&probe).await {
            Ok(outcome) => return Ok(Some(Check { outcome, ..check })),
            Err(Error::Rejected(_)) => return Ok(None),
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
        use ProbeOutcome::{Opened, Prohibited, Reached, Refused, Silent};
        for (open, protocol, outcome, dead, good) in [
            (true, Protocol::Tcp, Opened, false, true),
            (true, Protocol::Tcp, Reached, false, true),
            (true, Protocol::Tcp, Prohibited, true, false),
            (true, Protocol::Tcp, Silent, false, false),
            (true, Protocol::Tcp, Silent, true, true),
            (true, Protocol::Tcp, Refused, false, false),
            (true, Protocol::Tcp, Refused, true, true),
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
