//! What the kernel has seen: packets that were refused, or let through on trial, and those that are counted.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use time::OffsetDateTime;

use crate::driver::agent::core::{Agent, lock};
use crate::driver::podman::firewall::kernel::{self, Refusal};
use crate::driver::workload::Subnet;
use crate::driver::{Denied, Used};
use crate::ids::{AppId, TenantName};
use crate::policy::proof::{Place, Standing};
use crate::policy::{Cidr, Protocol};

/// How long after the platform has tried something itself a refusal of it is still its own.
const OWN_TRY: Duration = Duration::from_secs(3);
/// Most refusals that are remembered of a tenant.
const REMEMBERED: usize = 500;

/// Of what something is counted: tenant, app, target, protocol, port.
type CountOf = (TenantName, AppId, Cidr, Protocol, u16);

/// Packets that were counted of connections that are about to close, also of counters that are gone.
#[derive(Debug, Default)]
pub(in crate::driver::agent) struct Counts {
    sums: HashMap<CountOf, u64>,
    last: HashMap<(u32, Ipv4Addr, Cidr, Protocol, u16), u64>,
}

/// When the table is nearly full, whoever has more than one in so many of all that there is room for loses them.
const SHARE: u64 = 16;
/// How long nothing more is told of a table of connections that is nearly full.
const CROWDED: Duration = Duration::from_secs(300);

/// Most counts that are told at a time.
const TOLD: usize = 20_000;

impl Agent {
    /// Reads from the kernel what was refused, and remembers it by tenant.
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
        for Refusal { bridge, source, target, protocol, port, ago, let_through, hasty } in seen {
            let Some((tenant, network)) = tenants.get(&bridge) else { continue };
            // What the platform tried by itself is not the app's doing, and not for the tenant to learn from.
            let last = Instant::now().checked_sub(Duration::from_secs(ago));
            let ours = tried
                .get(&(source, target, port))
                .is_some_and(|at| last.is_none_or(|last| last <= *at + OWN_TRY));
            // That too many were begun is not for what the platform tries.
            if ours && !hasty {
                continue;
            }
            // An address that is no instance's is told to nobody but the record: whoever forged it is unknown.
            let app = owners.get(&(*network, source)).copied().unwrap_or(AppId(0));
            let at = now - time::Duration::seconds(i64::try_from(ago).unwrap_or(0));
            let list = denials.entry(tenant.clone()).or_default();
            let same = |(own, known): &(AppId, Denied)| {
                let known =
                    (known.source, known.target, known.protocol, known.port, known.let_through, known.hasty);
                *own == app && known == (source, target, protocol, port, let_through, hasty)
            };
            let known = list.iter().position(same).and_then(|at| list.remove(at)).map(|(_, known)| known);
            // Seconds are rounded: a later look may seem to see an earlier packet.
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

    /// What was counted of the flows that are about to close.
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

    /// Adds up what the kernel has counted: before its counters go, and whenever somebody asks. `standing`: whose the
    /// addresses are that it has counted.
    pub(in crate::driver::agent) async fn note_counts(&self, standing: &Standing) {
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
            // A counter that is lower than it was, was made anew.
            let more = if packets >= before { packets - before } else { packets };
            *counts.sums.entry((tenant.clone(), *app, network, protocol, port)).or_default() += more;
        }
        let watched: HashSet<AppId> = standing.watched.keys().copied().collect();
        counts.sums.retain(|(_, app, ..), _| watched.contains(app));
    }

    /// When the kernel's table of tracked connections is nearly full, forgets those of every tenant that has more than
    /// a part of it, and tells so: nobody on the machine begins a connection once it is full.
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
            tracing::warn!(tenant = %name, n, "too many connections are tracked; they are forgotten");
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
            [] => ", and no tenant has many of them".to_owned(),
            [(name, (n, _)), rest @ ..] => {
                let others =
                    if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
                format!(
                    ", {n} of them begun by apps of {name}; those of {name}{others} were forgotten, and what lives among them may have to be begun anew"
                )
            }
        };
        self.machine_event(
            "connections_crowded",
            format!("{count} of the {most} connections that this machine can track were in use{whose}"),
        );
    }

    /// Whether a tenant's apps begin so many connections that nothing can be tried from within them.
    pub(in crate::driver::agent) async fn is_hurried(&self, network: u32) -> bool {
        kernel::is_hurried(&self.config.table(), &self.config.bridge(network)).await
    }

    /// What was refused of one app lately, the newest first.
    pub(in crate::driver::agent) fn denied(&self, tenant: &TenantName, app: AppId) -> Vec<Denied> {
        let denials = lock(&self.denials);
        let list = denials.get(tenant).into_iter().flatten().rev();
        list.filter(|(own, _)| *own == app).map(|(_, denied)| denied.clone()).collect()
    }
}

/// Whose an address of a network is.
fn owners(standing: &Standing) -> HashMap<(u32, Ipv4Addr), AppId> {
    let of = |(app, place): (&AppId, &Place)| {
        let (app, network) = (*app, place.network);
        place.addresses.iter().map(move |address| ((network, *address), app)).collect::<Vec<_>>()
    };
    standing.apps.iter().flat_map(of).collect()
}
