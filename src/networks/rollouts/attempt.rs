//! Probes the endpoints that a rollout opens and closes from inside tenants' apps.

use std::collections::BTreeSet;

use futures_util::StreamExt;

use super::Check;
use crate::driver::{Driver, Error, Probe, ProbeOutcome, ProbeTarget};
use crate::ids::AppId;
use crate::networks::Endpoint;
use crate::networks::store::{PlanOf, Rollout};
use crate::policy::{Protocol, Target};
use crate::reconcile::Failure;

/// Number of concurrent probes: other callers need room.
const AT_ONCE: usize = 4;
/// Number of attempts while other probes keep the agent busy.
const AGAIN: u32 = 20;
/// Maximum number of apps of a tenant, of endpoints of an app, and of probes in all. A probe may last 1.5
/// seconds, and an abort waits for the probes.
const APPS: usize = 3;
const PLACES: usize = 16;
const MOST: usize = 120;

/// The results of a round of probes.
#[derive(Debug, Default)]
pub(super) struct Tried {
    /// The probes that ran.
    pub(super) checks: Vec<Check>,
    /// Apps without a running instance: id and name.
    pub(super) idle: Vec<(AppId, String)>,
}

/// Describes the destination of a check.
pub(super) fn place(check: &Check) -> String {
    format!("{} {} {}", check.address, check.protocol, check.port)
}

/// Returns the checks for a tenant: the endpoints that apply to it must answer, the removed ones must not.
/// Endpoints of more than one address cannot be probed.
fn wanted(rollout: &Rollout, plan: &PlanOf, reached: bool) -> Vec<Check> {
    let now: &[Endpoint] = if reached { &rollout.endpoints } else { &rollout.before };
    let uses = |app: &&crate::networks::AppPlan| {
        app.flows.iter().any(|flow| {
            flow.name == rollout.service.as_str() && matches!(flow.target, Target::Service { .. })
        })
    };
    let mut out = Vec::new();
    for app in plan.apps.iter().filter(uses).take(APPS) {
        // An endpoint that the app may use for another reason is not closed. The addresses of a domain and
        // the effect of audit mode are not known here.
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

/// Reports whether an outcome is as expected. `dead`: the endpoint did not answer before the rollout either.
/// The rollout is then not at fault, unless the firewall denies the probe.
fn judge(check: &Check, dead: bool) -> bool {
    match (check.open, check.outcome) {
        (false, outcome) => !outcome.is_through(),
        (true, ProbeOutcome::Prohibited) => false,
        (true, ProbeOutcome::Reached | ProbeOutcome::Opened) => true,
        // A datagram needs no answer.
        (true, ProbeOutcome::Silent | ProbeOutcome::Unreachable) => dead || check.protocol == Protocol::Udp,
        (true, ProbeOutcome::Refused) => dead,
    }
}

/// Probes from inside the apps of these plans. `dead`: endpoints that did not answer before.
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

/// Runs one check. The inner error is a check whose app has no running instance.
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
            // Other probes are running.
            Err(Error::Transient(_)) => tokio::time::sleep(std::time::Duration::from_millis(300)).await,
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::Transient("the agent is too busy to run the probes; they are tried again".into()))
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
