//! Trying it without being asked: after each plan what the tenant's apps must reach and must not, and again and
//! again for all. What must be closed and is open is an alarm.

use std::collections::HashSet;
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
use crate::driver::{PROBED_APPS, ProbeOutcome, Probed};
use crate::ids::TenantName;
use crate::policy::{Flow, Protocol, Target};

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
        apps.sort_by_key(|app| app.id);
        apps.truncate(PROBED_APPS as usize);
        let tries = apps.into_iter().map(|app| self.probe_from(app, None));
        let told: Vec<_> = futures_util::stream::iter(tries).buffered(AT_ONCE).collect().await;
        let mut all = Probed::default();
        for (probed, events) in told.into_iter().flatten() {
            for (kind, text) in events {
                self.machine_event(kind, text);
            }
            all.apps += probed.apps;
            all.open += probed.open;
            all.closed += probed.closed;
            all.faults.extend(probed.faults);
        }
        all
    }

    /// Tries from one instance of each app, a part of it each time. A round begins where the last one ended.
    pub(in crate::driver::agent) async fn probe_all(
        self: &Arc<Self>,
        round: &mut usize,
        told: &mut HashSet<String>,
    ) {
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
        let seen: Vec<_> = futures_util::stream::iter(tries).buffer_unordered(AT_ONCE).collect().await;
        let events: Vec<_> = seen.into_iter().flatten().flat_map(|(_, events)| events).collect();
        // Told once, and again only after it was good in between.
        let now: HashSet<String> = events.iter().map(|(_, text)| text.clone()).collect();
        for (kind, text) in events {
            if told.insert(text.clone()) {
                self.machine_event(kind, text);
            }
        }
        told.retain(|text| now.contains(text));
    }

    /// Tries from one app: all, or the n-th part of what must be closed. None if no instance of it runs.
    async fn probe_from(
        self: &Arc<Self>,
        app: Arc<App>,
        part: Option<usize>,
    ) -> Option<(Probed, Vec<(&'static str, String)>)> {
        let place = self.places(&app.tenant, app.id).into_iter().next()?;
        let gateway = lock(&self.journal).ever(&app.tenant)?.subnet.gateway();
        let flows = lock(&self.flows).of(&app.tenant, app.id).to_vec();
        let from = From { app, place, flows, gateway };
        let mut tries = self.must_close(&from);
        if let Some(part) = part {
            let count = tries.len().max(1);
            tries.rotate_left(part * PART % count);
            tries.truncate(PART);
        }
        for to in &tries {
            self.note_tried(from.place.address, to.address, to.port);
        }
        tries.extend(self.must_open(&from));
        let (name, server) = (from.app.name.to_string(), from.gateway);
        self.note_tried(from.place.address, server, 53);
        let tried = within(from.place.clone(), move || {
            let outcomes = attempt_all(tries);
            // The resolver may have been started this very moment.
            let own = (0..3).map(|_| ask(server, &name)).find(|told| *told != Told::Silence);
            (outcomes, own.unwrap_or(Told::Silence), ask(server, NO_NAME))
        });
        let (outcomes, own, foreign) = tried.await.ok()?;
        Some(tally(&from, outcomes, own, foreign))
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
                let what = if own { "an app that it does not name" } else { "an app of another tenant" };
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
        let tcp = |flow: &&Flow| flow.protocol == Protocol::Tcp && !counted.contains(flow);
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

fn tally(
    from: &From,
    outcomes: Vec<(Try, ProbeOutcome)>,
    own: Told,
    foreign: Told,
) -> (Probed, Vec<(&'static str, String)>) {
    let who = format!("{}/{}", from.app.tenant, from.app.name);
    let mut probed = Probed { apps: 1, open: 1, closed: 1, faults: Vec::new() };
    let mut events = Vec::new();
    for (to, outcome) in outcomes {
        let Try { what, address, protocol, port, open, .. } = to;
        if open {
            probed.open += 1;
            // Silence is somebody who is busy or away; a refusal by the firewall is ours.
            if outcome == ProbeOutcome::Prohibited {
                let text =
                    format!("does not get to {what} ({protocol} {port}), which is open by plan: {outcome}");
                events.push(("probe_failed", text));
            }
        } else {
            probed.closed += 1;
            if outcome.is_through() {
                // Where another tenant's instance is, is nobody's business.
                let at = if what.starts_with("an app") { String::new() } else { format!(" at {address}") };
                let text = format!("gets to {what}{at} ({protocol} {port}), which must be closed: {outcome}");
                events.push(("probe_alarm", text));
            }
        }
    }
    if own != Told::Address {
        events.push(("probe_failed", "does not learn its own name".to_owned()));
    }
    if foreign == Told::Address {
        events.push(("probe_alarm", format!("learns the name {NO_NAME}, which must lead nowhere")));
    }
    probed.faults = events.iter().map(|(_, text)| format!("{} {text}", from.app.name)).collect();
    let alarm = |(kind, text): (&'static str, String)| {
        let word = if kind == "probe_alarm" { "ALARM: " } else { "" };
        (kind, format!("{word}{who} {text}"))
    };
    (probed, events.into_iter().map(alarm).collect())
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
