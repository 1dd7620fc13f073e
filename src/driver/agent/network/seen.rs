//! Reads packets from the kernel: denied ones, those that audit mode allowed, and counted ones.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use time::OffsetDateTime;

use crate::driver::agent::core::{Agent, lock};
use crate::driver::podman::firewall::kernel::{self, DeniedPackets};
use crate::driver::workload::Subnet;
use crate::driver::{Denied, Used};
use crate::ids::{AppId, TenantName};
use crate::policy::proof::{AppAddress, ExpectedFacts};
use crate::policy::{Cidr, Protocol};

/// A denial counts as caused by the platform's own probe for this long after the probe.
const OWN_TRY: Duration = Duration::from_secs(3);
/// Maximum number of denials stored for a tenant.
const REMEMBERED: usize = 500;

/// Key of a counter: tenant, app, target, protocol, port.
type CountOf = (TenantName, AppId, Cidr, Protocol, u16);

/// Packets of connections that are about to be closed, including those of counters that no longer exist.
#[derive(Debug, Default)]
pub(in crate::driver::agent) struct Counts {
    sums: HashMap<CountOf, u64>,
    last: HashMap<(u32, Ipv4Addr, Cidr, Protocol, u16), u64>,
}

/// When the connection tracking table is nearly full, a tenant with more than this fraction of it loses its
/// connections.
const SHARE: u64 = 16;
/// Minimum time between two reports of a nearly full connection tracking table.
const CROWDED: Duration = Duration::from_secs(300);

/// Maximum number of counts in one answer.
const TOLD: usize = 20_000;

impl Agent {
    /// Reads denied packets from the kernel and stores them by tenant.
    pub(in crate::driver::agent) async fn note_denials(&self) {
        let seen = kernel::denied(&self.config.table()).await;
        if seen.is_empty() {
            return;
        }
        let tenants = lock(&self.journal).bridges(&self.config);
        let standing = self.standing(&lock(&self.own).clone());
        let tried = lock(&self.tried).clone();
        let owners = owners(&standing);
        let now = OffsetDateTime::now_utc();
        let mut denials = lock(&self.denials);
        for DeniedPackets { bridge, source, target, protocol, port, ago, let_through, hasty } in seen {
            let Some((tenant, network)) = tenants.get(&bridge) else { continue };
            // The platform's own probes are not the app's doing, and a tenant must not learn from them.
            let last = Instant::now().checked_sub(Duration::from_secs(ago));
            let ours = tried
                .get(&(source, target, port))
                .is_some_and(|at| last.is_none_or(|last| last <= *at + OWN_TRY));
            // Packets over the rate limit are reported even if a probe caused them.
            if ours && !hasty {
                continue;
            }
            // A source address that belongs to no instance is forged by an unknown sender: it is recorded under no
            // app.
            let app = owners.get(&(*network, source)).copied().unwrap_or(AppId(0));
            let at = now - time::Duration::seconds(i64::try_from(ago).unwrap_or(0));
            let list = denials.entry(tenant.clone()).or_default();
            let same = |(own, known): &(AppId, Denied)| {
                let known =
                    (known.source, known.target, known.protocol, known.port, known.let_through, known.hasty);
                *own == app && known == (source, target, protocol, port, let_through, hasty)
            };
            let known = list.iter().position(same).and_then(|at| list.remove(at)).map(|(_, known)| known);
            // Seconds are rounded: a later read may seem to report an earlier packet.
            let (first, at) = known.map_or((at, at), |known| (known.first, known.last.max(at)));
            list.push_back((
                app,
                Denied { source, target, protocol, port, let_through, hasty, first, last: at },
            ));
            while list.len() > REMEMBERED {
                list.pop_front();
            }
        }
    }

    /// Returns the counts of the flows that are about to be closed.
    pub(in crate::driver::agent) async fn used(&self) -> Vec<Used> {
        let standing = self.standing(&lock(&self.own).clone());
        self.note_counts(&standing).await;
        let counts = lock(&self.counts);
        let told = |((tenant, app, network, protocol, port), packets): (&CountOf, &u64)| Used {
            tenant: tenant.clone(),
            app: *app,
            network: *network,
            protocol: *protocol,
            port: *port,
            packets: *packets,
        };
        counts.sums.iter().filter(|(_, packets)| **packets > 0).take(TOLD).map(told).collect()
    }

    /// Adds up the kernel's counters: before they are removed, and on each request. `standing` tells which app owns
    /// each counted address.
    pub(in crate::driver::agent) async fn note_counts(&self, standing: &ExpectedFacts) {
        if lock(&self.flows).all().all(|plan| plan.watched.is_empty()) {
            *lock(&self.counts) = Counts::default();
            return;
        }
        let seen = kernel::counted(&self.config.table()).await;
        let tenants = lock(&self.journal).bridges(&self.config);
        let owners = owners(standing);
        let mut counts = lock(&self.counts);
        for (bridge, source, network, protocol, port, packets) in seen {
            let Some((tenant, number)) = tenants.get(&bridge) else { continue };
            let Some(app) = owners.get(&(*number, source)) else { continue };
            let element = (*number, source, network, protocol, port);
            let before = counts.last.insert(element, packets).unwrap_or(0);
            // A counter that is lower than before was created anew.
            let more = if packets >= before { packets - before } else { packets };
            *counts.sums.entry((tenant.clone(), *app, network, protocol, port)).or_default() += more;
        }
        let watched: HashSet<AppId> = standing.watched.keys().copied().collect();
        counts.sums.retain(|(_, app, ..), _| watched.contains(app));
    }

    /// Drops the tracked connections of every tenant with more than its fraction when the kernel's connection
    /// tracking table is nearly full, and reports it. Once that table is full, no process on the machine can open a
    /// connection.
    pub(in crate::driver::agent) async fn relieve(&self) {
        let Some((count, most)) = kernel::tracked_of().filter(|both| kernel::is_crowded(*both)) else {
            return;
        };
        let subnets = lock(&self.journal).by_subnet();
        let mut sums: HashMap<&TenantName, (u64, Subnet)> = HashMap::new();
        for (_, source, ..) in kernel::tracked(self.config.pool()).await {
            let near = subnets.range(..=source).next_back();
            if let Some((_, (name, subnet))) = near.filter(|(_, (_, subnet))| subnet.contains(source)) {
                sums.entry(name).or_insert((0, *subnet)).0 += 1;
            }
        }
        let mut greedy: Vec<_> = sums.into_iter().filter(|(_, (n, _))| *n > most / SHARE).collect();
        greedy.sort_by_key(|(_, (n, _))| std::cmp::Reverse(*n));
        for (name, (n, subnet)) in &greedy {
            tracing::warn!(tenant = %name, n, "a tenant has too many tracked connections; they are dropped");
            if let Some(subnet) = Cidr::new(subnet.address(), subnet.prefix()) {
                kernel::forget(subnet).await;
            }
        }
        {
            let mut told = lock(&self.crowded);
            if told.is_some_and(|last| last.elapsed() < CROWDED) {
                return;
            }
            *told = Some(Instant::now());
        }
        let whose = match greedy.as_slice() {
            [] => "; no tenant has a large part of them".to_owned(),
            [(name, (n, _)), rest @ ..] => {
                let others =
                    if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
                format!(
                    "; {n} belong to {name}. The entries of {name}{others} were dropped; clients may have to reconnect"
                )
            }
        };
        self.machine_event(
            "connections_crowded",
            format!("the connection tracking table is nearly full: {count} of {most} entries{whose}"),
        );
    }

    /// Returns whether a tenant is rate limited, so that probes from its instances say nothing.
    pub(in crate::driver::agent) async fn is_hurried(&self, network: u32) -> bool {
        kernel::is_hurried(&self.config.table(), &self.config.bridge(network)).await
    }

    /// Returns the recent denials of one app, the newest first.
    pub(in crate::driver::agent) fn denied(&self, tenant: &TenantName, app: AppId) -> Vec<Denied> {
        let denials = lock(&self.denials);
        let list = denials.get(tenant).into_iter().flatten().rev();
        list.filter(|(own, _)| *own == app).map(|(_, denied)| denied.clone()).collect()
    }
}

/// Returns the app of each address, by network.
fn owners(standing: &ExpectedFacts) -> HashMap<(u32, Ipv4Addr), AppId> {
    let of = |(app, place): (&AppId, &AppAddress)| {
        let (app, network) = (*app, place.network);
        place.addresses.iter().map(move |address| ((network, *address), app)).collect::<Vec<_>>()
    };
    standing.apps.iter().flat_map(of).collect()
}
