//! Unrequested probes: after each plan those of the tenant's apps, and regularly those of all apps. A forbidden
//! connection that opens is an alarm.

use std::collections::HashMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

use super::wanted::{FOREIGN, From, Try};
use super::{attempt, within};
use crate::driver::agent::app::AgentApp;
use crate::driver::agent::core::{Agent, lock};
use crate::driver::podman::firewall::Allowed;
use crate::driver::{PROBED_APPS, ProbeOutcome, ProbeSummary};
use crate::ids::TenantName;
use crate::policy::Cidr;

/// Maximum number of apps in a round of all, and how many are probed from at a time.
const ROUND: usize = 200;
const AT_ONCE: usize = 8;
/// Number of forbidden connections probed per app in a round of all. A burst of denials uses up the kernel's rate
/// of ICMP answers to an address, and the app's own attempts would wait for theirs.
const PART: usize = 4;
/// Maximum number of apps of one tenant in a round, for the same reason.
const OF_TENANT: usize = 10;
/// Delay before a fault is confirmed, and the minimum time between two reports of the same fault.
const CONFIRM: Duration = Duration::from_secs(1);
const TOLD: Duration = Duration::from_secs(600);
/// A name that never exists (RFC 6761).
const NO_NAME: &str = "closed.invalid";

/// Result of a name query from within an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Address,
    Nothing,
    Silence,
}

impl Agent {
    /// Probes all required and forbidden connections of a tenant's apps.
    pub(in crate::driver::agent) async fn probe_tenant(
        self: &Arc<Self>,
        tenant: &TenantName,
    ) -> ProbeSummary {
        let mut apps: Vec<_> =
            lock(&self.apps).values().filter(|app| app.tenant == *tenant).cloned().collect();
        apps.retain(|app| !self.places(tenant, app.id).is_empty());
        apps.sort_by_key(|app| app.id);
        apps.truncate(PROBED_APPS as usize);
        // All probes from the first app, a part from each other one. The log of a tenant's denials is rate limited,
        // and must have room for the denials of the tenant's own attempts.
        let tries = apps.into_iter().enumerate().map(|(n, app)| self.probe_from(app, n.checked_sub(1)));
        let told: Vec<_> = futures_util::stream::iter(tries).buffered(AT_ONCE).collect().await;
        let mut all = ProbeSummary::default();
        for probed in told.into_iter().flatten() {
            all.apps += probed.apps;
            all.open += probed.open;
            all.closed += probed.closed;
            all.faults.extend(probed.faults);
            all.silent.extend(probed.silent);
        }
        all
    }

    /// Probes from one instance of each app, a part of the probes each time. A round continues where the last one
    /// ended.
    pub(in crate::driver::agent) async fn probe_all(self: &Arc<Self>, round: &mut usize) {
        self.look_for_listeners().await;
        let mut apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.sort_by_key(|app| app.id);
        if apps.is_empty() {
            return;
        }
        // After one pass over all apps, the next part of each app's probes follows.
        let (start, part) = (*round % apps.len(), *round / apps.len());
        apps.rotate_left(start);
        apps.truncate(ROUND);
        *round += apps.len();
        let mut of_tenant: HashMap<TenantName, usize> = HashMap::new();
        apps.retain(|app| {
            let count = of_tenant.entry(app.tenant.clone()).or_default();
            *count += 1;
            *count <= OF_TENANT
        });
        let tries = apps.into_iter().map(|app| self.probe_from(app, Some(part)));
        futures_util::stream::iter(tries).buffer_unordered(AT_ONCE).for_each(async |_| {}).await;
    }

    /// Returns an app to probe from. None if no instance of it runs.
    fn from(&self, app: Arc<AgentApp>) -> Option<From> {
        let place = self.places(&app.tenant, app.id).into_iter().next()?;
        let gateway = lock(&self.journal).ever(&app.tenant)?.subnet.gateway();
        let flows = lock(&self.flows).of(&app.tenant, app.id).to_vec();
        Some(From { app, place, flows, gateway })
    }

    /// Probes from one app: everything, or the n-th part of the forbidden connections. None if no instance of it
    /// runs.
    async fn probe_from(self: &Arc<Self>, app: Arc<AgentApp>, part: Option<usize>) -> Option<ProbeSummary> {
        let from = self.from(Arc::clone(&app))?;
        let mut tries = self.must_close(&from);
        if let Some(part) = part {
            let count = tries.len().max(1);
            tries.rotate_left(part * PART % count);
            tries.truncate(PART);
        }
        tries.extend(self.must_open(&from));
        let (name, server) = (from.app.name.to_string(), from.gateway);
        let name_again = name.clone();
        self.note_tried(from.place.address, server, 53);
        let outcomes = self.outcomes(&from, tries).await?;
        let asked = within(&from.place, move || {
            // The resolver may have just started.
            let own = (0..3).map(|_| ask(server, &name)).find(|told| *told != Told::Silence);
            (own.unwrap_or(Told::Silence), ask(server, NO_NAME))
        });
        let (mut own, foreign) = asked.await.ok()?;
        if (own == Told::Silence || foreign == Told::Silence) && self.is_hurried(from.place.network).await {
            return None;
        }
        let (good, bad): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|(to, outcome)| !to.is_bad(*outcome));
        let bad = if bad.is_empty() { bad } else { self.confirmed(Arc::clone(&app), bad).await };
        if own != Told::Address {
            own = self.own_name_again(&from, name_again).await?;
        }
        // The result of an instance that has ended meanwhile means nothing.
        if (!bad.is_empty() || own != Told::Address) && !self.still_there(&from) {
            return None;
        }
        let (probed, events) = tally(&from, &good, &bad, own, foreign);
        for (kind, text) in events {
            self.tell(kind, text);
        }
        Some(probed)
    }

    fn still_there(&self, from: &From) -> bool {
        let places = self.places(&from.app.tenant, from.app.id);
        places.iter().any(|place| place.address == from.place.address)
    }

    /// Queries an app's own name once more. None if no instance of the app runs: the name then correctly has no
    /// address.
    async fn own_name_again(&self, from: &From, name: String) -> Option<Told> {
        tokio::time::sleep(CONFIRM).await;
        let server = from.gateway;
        let told = within(&from.place, move || ask(server, &name)).await.ok()?;
        let runs = !self.running(&from.app.tenant, from.app.id).is_empty();
        (runs || told == Told::Address).then_some(told)
    }

    async fn outcomes(&self, from: &From, tries: Vec<Try>) -> Option<Vec<(Try, ProbeOutcome)>> {
        for to in &tries {
            self.note_tried(from.place.address, to.address, to.port);
        }
        let outcomes = within(&from.place, move || attempt_all(tries)).await.ok()?;
        let mut out = Vec::with_capacity(outcomes.len());
        let own = (from.place.network, from.place.address);
        let silent = outcomes.iter().any(|(_, outcome)| *outcome == ProbeOutcome::Silent);
        let hurried = silent && self.is_hurried(from.place.network).await;
        // Packets dropped by the tenant's rate limit say nothing, either way.
        for (to, outcome) in outcomes.into_iter().filter(|(_, it)| !hurried || *it != ProbeOutcome::Silent) {
            let outcome = self.by_whom(outcome, own, (to.address, to.protocol, to.port)).await;
            out.push((to, outcome));
        }
        Some(out)
    }

    /// Repeats the probes with a fault if they are still expected. The recorded and the applied state may differ
    /// for a moment.
    async fn confirmed(
        self: &Arc<Self>,
        app: Arc<AgentApp>,
        bad: Vec<(Try, ProbeOutcome)>,
    ) -> Vec<(Try, ProbeOutcome)> {
        tokio::time::sleep(CONFIRM).await;
        let Some(from) = self.from(app) else { return Vec::new() };
        let mut meant = self.must_close(&from);
        meant.extend(self.must_open(&from));
        let again = meant.into_iter().filter(|to| bad.iter().any(|(bad, _)| bad.is_like(to))).collect();
        let outcomes = self.outcomes(&from, again).await.unwrap_or_default();
        let (network, source) = (from.place.network, from.place.address);
        let mut out = Vec::new();
        for (to, outcome) in outcomes.into_iter().filter(|(to, outcome)| to.is_bad(*outcome)) {
            let target = Cidr::of(to.address);
            let rule = Allowed { network, source, target, protocol: to.protocol, port: to.port };
            // The applied rules allow it: the recorded state is just changing.
            if to.open || !self.permits(&rule).await {
                out.push((to, outcome));
            }
        }
        out
    }

    /// Reports an event; the same text again only after a while.
    pub(in crate::driver::agent) fn tell(&self, kind: &str, text: String) {
        let now = std::time::Instant::now();
        let mut told = lock(&self.told);
        told.retain(|_, at| now.duration_since(*at) < TOLD);
        if told.insert(text.clone(), now).is_none() {
            drop(told);
            self.machine_event(kind, text);
        }
    }
}

/// Runs all probes at once, each on its own thread in the same namespace.
fn attempt_all(tries: Vec<Try>) -> Vec<(Try, ProbeOutcome)> {
    std::thread::scope(|scope| {
        let one = |to: Try| {
            scope.spawn(move || {
                let outcome = attempt(to.address, to.protocol, to.port, to.peer.as_ref());
                (to, outcome)
            })
        };
        let running: Vec<_> = tries.into_iter().map(one).collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

/// Sums up the results, as stored with the plan, and the events that follow from them.
fn tally(
    from: &From,
    good: &[(Try, ProbeOutcome)],
    bad: &[(Try, ProbeOutcome)],
    own: Told,
    foreign: Told,
) -> (ProbeSummary, Vec<(&'static str, String)>) {
    let count = |open: bool| {
        // The counts do not reveal whether another tenant has an app to probe.
        let counts = |to: &Try| to.open == open && to.what != FOREIGN;
        1 + u32::try_from(good.iter().chain(bad).filter(|(to, _)| counts(to)).count()).unwrap_or(0)
    };
    let mut faults: Vec<(&'static str, String)> = bad
        .iter()
        .map(|(Try { what, address, protocol, port, open, .. }, outcome)| {
            if *open {
                (
                    "probe_failed",
                    format!("cannot reach {what} ({protocol} {port}), which its plan allows: {outcome}"),
                )
            } else if what == FOREIGN {
                // The address of another tenant's app is not revealed.
                ("probe_alarm", format!("reaches {what}, which must be denied"))
            } else {
                let text = format!(
                    "reaches {what} at {address} ({protocol} {port}), which must be denied: {outcome}"
                );
                ("probe_alarm", text)
            }
        })
        .collect();
    if own != Told::Address {
        faults.push(("probe_failed", "cannot resolve its own name".to_owned()));
    }
    if foreign == Told::Address {
        faults.push(("probe_alarm", format!("resolves the name {NO_NAME}, which must have no address")));
    }
    let AgentApp { tenant, name, .. } = &*from.app;
    let probed = ProbeSummary {
        apps: 1,
        open: count(true),
        closed: count(false),
        faults: faults.iter().map(|(_, text)| format!("{name} {text}")).collect(),
        silent: good
            .iter()
            .filter(|(to, outcome)| {
                to.open && !matches!(outcome, ProbeOutcome::Reached | ProbeOutcome::Opened)
            })
            .map(|(to, outcome)| format!("{name} to {} ({} {}): {outcome}", to.what, to.protocol, to.port))
            .collect(),
    };
    let event = |(kind, text): (&'static str, String)| {
        let word = if kind == "probe_alarm" { "ALARM: " } else { "" };
        (kind, format!("{word}{tenant}/{name} {text}"))
    };
    (probed, faults.into_iter().map(event).collect())
}

/// Queries a name server for a name's address.
fn ask(server: Ipv4Addr, name: &str) -> Told {
    let mut question = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    let Ok(name) = Name::from_ascii(name) else { return Told::Silence };
    question.add_query(Query::query(name, RecordType::A));
    let answer = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.connect((server, 53))?;
        socket.send(&question.to_vec().map_err(std::io::Error::other)?)?;
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer)?;
        Message::from_vec(&buffer[..length]).map_err(std::io::Error::other)
    });
    match answer {
        Ok(answer) if answer.metadata.id != question.metadata.id => Told::Silence,
        Ok(answer)
            if answer.metadata.response_code == ResponseCode::NoError && !answer.answers.is_empty() =>
        {
            Told::Address
        }
        Ok(_) => Told::Nothing,
        Err(_) => Told::Silence,
    }
}
