//! Trying it without being asked: after each plan what the tenant's apps must reach and must not, and again and
//! again for all. What must be closed and is open is an alarm.

use std::collections::HashMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

use super::wanted::{FOREIGN, From, Try};
use super::{attempt, within};
use crate::driver::agent::app::App;
use crate::driver::agent::core::{Agent, lock};
use crate::driver::podman::firewall::Allowed;
use crate::driver::{PROBED_APPS, ProbeOutcome, Probed};
use crate::ids::TenantName;
use crate::policy::Cidr;

/// Most apps of one round of all, and how many are tried from at a time.
const ROUND: usize = 200;
const AT_ONCE: usize = 8;
/// Of what must be closed so many are tried in one round of all: a burst of refusals uses up what the kernel
/// answers to an address in a second, and the app's own attempts would wait for theirs.
const PART: usize = 4;
/// Most apps of one tenant in a round, for the same reason.
const OF_TENANT: usize = 10;
/// After what time a fault is looked at again, and for how long the same one is told once.
const CONFIRM: Duration = Duration::from_secs(1);
const TOLD: Duration = Duration::from_secs(600);
/// A name that nobody may have (RFC 6761).
const NO_NAME: &str = "closed.invalid";

/// What came of names that were asked for from within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Address,
    Nothing,
    Silence,
}

impl Agent {
    /// Tries what a tenant's apps must reach and must not, all of it.
    pub(in crate::driver::agent) async fn probe_tenant(self: &Arc<Self>, tenant: &TenantName) -> Probed {
        let mut apps: Vec<_> =
            lock(&self.apps).values().filter(|app| app.tenant == *tenant).cloned().collect();
        apps.retain(|app| !self.places(tenant, app.id).is_empty());
        apps.sort_by_key(|app| app.id);
        apps.truncate(PROBED_APPS as usize);
        // All from the first; from the others a part each: what is refused to a tenant is written down at so many a
        // second, and its own attempts are to be among them.
        let tries = apps.into_iter().enumerate().map(|(n, app)| self.probe_from(app, n.checked_sub(1)));
        let told: Vec<_> = futures_util::stream::iter(tries).buffered(AT_ONCE).collect().await;
        let mut all = Probed::default();
        for probed in told.into_iter().flatten() {
            all.apps += probed.apps;
            all.open += probed.open;
            all.closed += probed.closed;
            all.faults.extend(probed.faults);
            all.silent.extend(probed.silent);
        }
        all
    }

    /// Tries from one instance of each app, a part of it each time. A round begins where the last one ended.
    pub(in crate::driver::agent) async fn probe_all(self: &Arc<Self>, round: &mut usize) {
        self.look_for_listeners().await;
        let mut apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.sort_by_key(|app| app.id);
        if apps.is_empty() {
            return;
        }
        // Once around all apps is one part of what is tried from each.
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

    /// An app as it stands, to be tried from. None if no instance of it runs.
    fn from(&self, app: Arc<App>) -> Option<From> {
        let place = self.places(&app.tenant, app.id).into_iter().next()?;
        let gateway = lock(&self.journal).ever(&app.tenant)?.subnet.gateway();
        let flows = lock(&self.flows).of(&app.tenant, app.id).to_vec();
        Some(From { app, place, flows, gateway })
    }

    /// Tries from one app: all, or the n-th part of what must be closed. None if no instance of it runs.
    async fn probe_from(self: &Arc<Self>, app: Arc<App>, part: Option<usize>) -> Option<Probed> {
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
            // The resolver may have been started this very moment.
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
        // An instance that ended meanwhile could be told anything.
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

    /// Asks for an app's own name once more. None while none of its instances runs: then the name leads nowhere, as
    /// it must.
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
        // What was dropped because its tenant begins too many connections says nothing, either way.
        for (to, outcome) in outcomes.into_iter().filter(|(_, it)| !hurried || *it != ProbeOutcome::Silent) {
            let outcome = self.by_whom(outcome, own, (to.address, to.protocol, to.port)).await;
            out.push((to, outcome));
        }
        Some(out)
    }

    /// What is not as it must be is tried once more, if it is still meant so by then: between what is on record and
    /// what is in force there is a moment.
    async fn confirmed(
        self: &Arc<Self>,
        app: Arc<App>,
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
            // The rules that are in force open it: the record is about to say so, or no longer.
            if to.open || !self.permits(&rule).await {
                out.push((to, outcome));
            }
        }
        out
    }

    /// Tells something as an event, and the same again only after a while.
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

/// Tries all at once, each on a thread of its own in the same namespace.
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

/// What was tried, as it is kept with the plan, and the events that follow from it.
fn tally(
    from: &From,
    good: &[(Try, ProbeOutcome)],
    bad: &[(Try, ProbeOutcome)],
    own: Told,
    foreign: Told,
) -> (Probed, Vec<(&'static str, String)>) {
    let count = |open: bool| {
        // Whether there is somebody else whose app could be tried, is not told.
        let counts = |to: &Try| to.open == open && to.what != FOREIGN;
        1 + u32::try_from(good.iter().chain(bad).filter(|(to, _)| counts(to)).count()).unwrap_or(0)
    };
    let mut faults: Vec<(&'static str, String)> = bad
        .iter()
        .map(|(Try { what, address, protocol, port, open, .. }, outcome)| {
            if *open {
                (
                    "probe_failed",
                    format!("does not get to {what} ({protocol} {port}), which is open by plan: {outcome}"),
                )
            } else if what == FOREIGN {
                // Where it is, is nobody's business.
                ("probe_alarm", format!("gets to {what}, which must be closed"))
            } else {
                let text = format!(
                    "gets to {what} at {address} ({protocol} {port}), which must be closed: {outcome}"
                );
                ("probe_alarm", text)
            }
        })
        .collect();
    if own != Told::Address {
        faults.push(("probe_failed", "does not learn its own name".to_owned()));
    }
    if foreign == Told::Address {
        faults.push(("probe_alarm", format!("learns the name {NO_NAME}, which must lead nowhere")));
    }
    let App { tenant, name, .. } = &*from.app;
    let probed = Probed {
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

/// Asks a name server for a name's address.
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
