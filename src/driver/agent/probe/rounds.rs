//! Trying it without being asked: after each plan what the tenant's apps must reach and must not, and again and
//! again for all. What must be closed and is open is an alarm.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use time::OffsetDateTime;

use super::{Place, attempt, within};
use crate::driver::agent::app::App;
use crate::driver::agent::core::{Agent, lock};
use crate::driver::podman::firewall::Allowed;
use crate::driver::{PROBED_APPS, ProbeOutcome, Probed};
use crate::ids::TenantName;
use crate::policy::{Cidr, Flow, Protocol, Target};

/// Most apps of one round of all, and how many are tried from at a time.
const ROUND: usize = 200;
const AT_ONCE: usize = 8;
/// Most flows of an app that are tried.
const FLOWS: usize = 8;
/// Of what must be closed so many are tried in one round of all: a burst of refusals uses up what the kernel
/// answers to an address in a second, and the app's own attempts would wait for theirs.
const PART: usize = 4;
/// The port that is tried where no wall looks at ports.
const ANY: u16 = 1;
/// Metadata of clouds, and link-local beside it.
const METADATA: [Ipv4Addr; 4] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(169, 254, 1, 1),
];
/// An address in each private range.
const PRIVATE: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 255, 255, 254),
    Ipv4Addr::new(172, 31, 255, 254),
    Ipv4Addr::new(192, 168, 255, 254),
    Ipv4Addr::new(100, 127, 255, 254),
];
/// An address outside at which nobody has been since relays of 6to4 were given up (RFC 7526).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 88, 99, 1);
/// What an instance of somebody else is called.
const FOREIGN: &str = "an app of another tenant";
/// After what time a fault is looked at again, and for how long the same one is told once.
const CONFIRM: Duration = Duration::from_secs(1);
const TOLD: Duration = Duration::from_secs(600);
/// A name that nobody may have (RFC 6761).
const NO_NAME: &str = "closed.invalid";

/// Something to be tried.
#[derive(Debug, Clone)]
struct Try {
    what: String,
    address: Ipv4Addr,
    protocol: Protocol,
    port: u16,
    open: bool,
    /// The instance that is there, where it is one of ours.
    peer: Option<Place>,
}

impl Try {
    /// Whether it is the same as another one.
    fn is_like(&self, other: &Self) -> bool {
        (self.address, self.protocol, self.port, self.open)
            == (other.address, other.protocol, other.port, other.open)
    }

    /// Whether an outcome is not as it must be. Silence, where it must be open, is somebody who is busy or away;
    /// between instances no refusal is anybody's but this machine's.
    fn is_bad(&self, outcome: ProbeOutcome) -> bool {
        match outcome {
            outcome if !self.open => outcome.is_through(),
            ProbeOutcome::Prohibited => true,
            ProbeOutcome::Unreachable => self.peer.is_some(),
            _ => false,
        }
    }
}

/// What came of names that were asked for from within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Address,
    Nothing,
    Silence,
}

/// An app to try from.
struct From {
    app: Arc<App>,
    place: Place,
    flows: Vec<Flow>,
    gateway: Ipv4Addr,
}

impl Agent {
    /// Tries what a tenant's apps must reach and must not, all of it.
    pub(in crate::driver::agent) async fn probe_tenant(self: &Arc<Self>, tenant: &TenantName) -> Probed {
        let mut apps: Vec<_> =
            lock(&self.apps).values().filter(|app| app.tenant == *tenant).cloned().collect();
        apps.retain(|app| !self.places(tenant, app.id).is_empty());
        apps.sort_by_key(|app| app.id);
        apps.truncate(PROBED_APPS as usize);
        let tries = apps.into_iter().map(|app| self.probe_from(app, None));
        let told: Vec<_> = futures_util::stream::iter(tries).buffered(AT_ONCE).collect().await;
        let mut all = Probed::default();
        for probed in told.into_iter().flatten() {
            all.apps += probed.apps;
            all.open += probed.open;
            all.closed += probed.closed;
            all.faults.extend(probed.faults);
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
        self.note_tried(from.place.address, server, 53);
        let outcomes = self.outcomes(&from, tries).await?;
        let asked = within(from.place.clone(), move || {
            // The resolver may have been started this very moment.
            let own = (0..3).map(|_| ask(server, &name)).find(|told| *told != Told::Silence);
            (own.unwrap_or(Told::Silence), ask(server, NO_NAME))
        });
        let (own, foreign) = asked.await.ok()?;
        let (good, bad): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|(to, outcome)| !to.is_bad(*outcome));
        let bad = if bad.is_empty() { bad } else { self.confirmed(app, bad).await };
        let (probed, events) = tally(&from, &good, &bad, own, foreign);
        for (kind, text) in events {
            self.tell(kind, text);
        }
        Some(probed)
    }

    async fn outcomes(&self, from: &From, tries: Vec<Try>) -> Option<Vec<(Try, ProbeOutcome)>> {
        for to in &tries {
            self.note_tried(from.place.address, to.address, to.port);
        }
        let outcomes = within(from.place.clone(), move || attempt_all(tries)).await.ok()?;
        let mut out = Vec::with_capacity(outcomes.len());
        let own = (from.place.network, from.place.address);
        for (to, outcome) in outcomes {
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
    fn tell(&self, kind: &str, text: String) {
        let now = std::time::Instant::now();
        let mut told = lock(&self.told);
        told.retain(|_, at| now.duration_since(*at) < TOLD);
        if told.insert(text.clone(), now).is_none() {
            drop(told);
            self.machine_event(kind, text);
        }
    }

    /// What must be closed to an app, whatever its plan says; what its plan opens is left out.
    fn must_close(&self, from: &From) -> Vec<Try> {
        let tcp = |what: &str, address, port| Try {
            what: what.to_owned(),
            address,
            protocol: Protocol::Tcp,
            port,
            open: false,
            peer: None,
        };
        let mut out: Vec<Try> = METADATA.iter().map(|at| tcp("metadata", *at, ANY)).collect();
        out.push(tcp("this machine", from.gateway, ANY));
        out.extend(self.walls().own.first().map(|own| tcp("this machine", *own, ANY)));
        // Of the others' addresses the same ones for everybody: what is tried tells nobody who is where.
        let (pool, prefix) = (self.config.network_pool, self.config.subnet_prefix);
        let others = [pool.part(prefix, 0), pool.part(prefix, 1)].into_iter().flatten();
        if let Some(other) = others.into_iter().find(|other| other.gateway() != from.gateway) {
            out.push(tcp("the name server of others", other.gateway(), 53));
            out.extend(other.nth(2).map(|at| tcp("another tenant", at, ANY)));
        }
        out.extend(
            PRIVATE.iter().filter(|at| !pool.contains(**at)).map(|at| tcp("a private range", *at, ANY)),
        );
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if !lock(&self.flows).on_trial(&from.app.tenant, now) {
            out.push(tcp("the outside", OUTSIDE, ANY));
            out.push(Try { protocol: Protocol::Udp, ..tcp("another name server", OUTSIDE, 53) });
        }
        out.extend(self.neighbour(from, true));
        out.extend(self.neighbour(from, false));
        let opens = |to: &Try| {
            from.flows.iter().any(|flow| {
                let there = match &flow.target {
                    Target::Service { network } | Target::Outside { network } => network.contains(to.address),
                    Target::App { .. } | Target::Domain { .. } => false,
                };
                there && (flow.protocol, flow.port) == (to.protocol, to.port)
            })
        };
        out.retain(|to| !opens(to));
        out
    }

    /// An instance of an app that this one does not name: of the own tenant, or of another.
    fn neighbour(&self, from: &From, own: bool) -> Option<Try> {
        let mut apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.sort_by_key(|app| app.id);
        apps.into_iter()
            .filter(|app| app.id != from.app.id && (app.tenant == from.app.tenant) == own)
            .filter(|app| {
                let names =
                    |flow: &Flow| matches!(&flow.target, Target::App { app: to, .. } if *to == app.id);
                !from.flows.iter().any(names)
            })
            .find_map(|app| {
                let port = lock(&app.kept).workload.port?;
                let peer = self.places(&app.tenant, app.id).into_iter().next()?;
                let what = if own { "an app that it does not name" } else { FOREIGN };
                Some(Try {
                    what: what.to_owned(),
                    address: peer.address,
                    protocol: Protocol::Tcp,
                    port,
                    open: false,
                    peer: Some(peer),
                })
            })
    }

    /// What must be open to an app by its plan. What is counted is left alone: the count is the app's.
    fn must_open(&self, from: &From) -> Vec<Try> {
        let counted = lock(&self.flows).watched(&from.app.tenant, from.app.id).to_vec();
        // Under whatever name: a count knows none.
        let is_counted = |flow: &Flow| {
            let network = |flow: &Flow| match flow.target {
                Target::Service { network } => Some(network),
                _ => None,
            };
            let same = |own: &&Flow| (own.protocol, own.port) == (flow.protocol, flow.port);
            counted.iter().filter(same).any(|own| match (network(own), network(flow)) {
                (Some(own), Some(to)) => own.overlaps(to),
                _ => false,
            })
        };
        let tcp = |flow: &&Flow| flow.protocol == Protocol::Tcp && !is_counted(flow);
        from.flows
            .iter()
            .filter(tcp)
            .filter_map(|flow| {
                let (address, peer) = match &flow.target {
                    Target::App { tenant, app } => {
                        let peer = self.places(tenant, *app).into_iter().next()?;
                        (peer.address, Some(peer))
                    }
                    Target::Service { network } => (network.single()?, None),
                    // Whoever is there outside is not to be knocked at each minute.
                    Target::Outside { .. } | Target::Domain { .. } => return None,
                };
                let (what, protocol, port) = (flow.name.clone(), flow.protocol, flow.port);
                Some(Try { what, address, protocol, port, open: true, peer })
            })
            .take(FLOWS)
            .collect()
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
