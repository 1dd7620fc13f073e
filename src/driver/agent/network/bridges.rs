//! The bridges as the root half keeps them: that they are there, that the machine knows who is on them, that each
//! port is held to its own card.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use crate::driver::Error;
use crate::driver::agent::app::App;
use crate::driver::agent::core::{Agent, lock};
use crate::driver::agent::kept::{Instance, Kept};
use crate::driver::podman::ear::Ear;
use crate::driver::podman::neighbours::{self, Neighbours};
use crate::driver::podman::ports::{self, Seen};
use crate::driver::workload::Subnet;
use crate::ids::TenantName;

/// After what the machine was told again, nothing is heard for so long.
const SHORTEST: Duration = Duration::from_millis(25);
/// The same, if it forgets at once again and again. It is looked at every few seconds in any case.
const LONGEST: Duration = Duration::from_secs(5);

impl Agent {
    /// Sees to it that a tenant's network is there.
    pub(in crate::driver::agent) async fn ensure_network(&self, tenant: &TenantName) -> Result<(), Error> {
        let recorded = lock(&self.journal).tenant(tenant).cloned();
        let recorded = recorded.ok_or_else(|| Error::Rejected("this tenant is not in the journal".into()))?;
        let bridge = self.config.bridge(recorded.network);
        let made = self.podman.ensure_network(&bridge).await?;
        if made {
            self.machine_event("network_made", format!("the network {bridge} of {tenant} was made"));
        }
        Ok(())
    }

    /// Sees to it that the networks of all tenants that have apps are there and that each address is known; looks for
    /// ports that are not held to their card.
    pub(in crate::driver::agent) async fn keep_networks(&self) {
        let tenants: BTreeSet<TenantName> = lock(&self.apps).values().map(|app| app.tenant.clone()).collect();
        for tenant in tenants {
            if let Err(error) = self.ensure_network(&tenant).await {
                tracing::warn!(%error, %tenant, "a network cannot be made");
            }
        }
        self.keep_neighbours().await;
        match ports::unlocked().await {
            Ok(unlocked) => *lock(&self.unlocked) = unlocked,
            Err(error) => tracing::warn!(%error, "the ports cannot be looked at"),
        }
    }

    /// Sees to it that the machine knows who is who on the bridges. Whether something had to be set right.
    pub(in crate::driver::agent) async fn keep_neighbours(&self) -> bool {
        let held = neighbours::hold(&self.neighbours()).await;
        if let Some(error) = held.failed {
            tracing::warn!(%error, "the neighbours on a bridge cannot be kept");
        }
        for (bridge, what) in &held.mended {
            self.machine_event("neighbours_repaired", format!("{bridge}: {what}; it was set right"));
        }
        !held.mended.is_empty()
    }

    /// Closes the ports of what runs and settles who is on them: an earlier version may have left them otherwise. First
    /// within all of them: once a bridge answers nobody any more, whoever still asks is cut off.
    pub(in crate::driver::agent) async fn settle(&self, all: &[Kept]) {
        for kept in all {
            for instance in &kept.instances {
                let Some(port) = &instance.port else { continue };
                if port.look() == Seen::Gone {
                    continue;
                }
                let settled = match (port.close().await, self.place_of(kept, instance)) {
                    (Ok(()), Some((bridge, own, subnet))) => {
                        ports::settle_within(&bridge, &instance.sandbox, own, subnet).await
                    }
                    (Ok(()), None) => continue,
                    (Err(error), _) => Err(error),
                };
                if let Err(error) = settled {
                    tracing::warn!(%error, app = %kept.workload.app, "an instance is not settled yet");
                    lock(&self.unsettled).insert(port.clone());
                }
            }
        }
    }

    /// Settles an instance that could not be settled before. What came of it, in words, if it was one.
    pub(in crate::driver::agent) async fn settle_again(
        &self,
        kept: &Kept,
        instance: &Instance,
    ) -> Option<String> {
        let port = instance.port.as_ref().filter(|port| lock(&self.unsettled).contains(port))?;
        let (bridge, own, subnet) = self.place_of(kept, instance)?;
        match ports::settle(&bridge, &instance.sandbox, own, subnet).await {
            Ok(()) => {
                lock(&self.unsettled).remove(port);
                Some(format!("instance {}: its network was settled late", instance.number))
            }
            Err(error) => {
                tracing::warn!(%error, app = %kept.workload.app, "an instance is not settled yet");
                None
            }
        }
    }

    /// The bridge, the address and the subnet of an instance.
    fn place_of(&self, kept: &Kept, instance: &Instance) -> Option<(String, Ipv4Addr, Subnet)> {
        let recorded = lock(&self.journal).tenant(&kept.workload.tenant).cloned()?;
        Some((self.config.bridge(recorded.network), kept.address_of(instance)?, recorded.subnet))
    }

    /// Who is on which bridge.
    fn neighbours(&self) -> BTreeMap<String, Neighbours> {
        let apps: Vec<Arc<App>> = lock(&self.apps).values().cloned().collect();
        let mut bridges = BTreeMap::new();
        for app in apps {
            let Some(recorded) = lock(&self.journal).tenant(&app.tenant).cloned() else { continue };
            let gateway = recorded.subnet.gateway();
            let bridge = bridges.entry(self.config.bridge(recorded.network)).or_insert_with(|| Neighbours {
                gateway,
                addresses: BTreeSet::new(),
                attached: BTreeSet::new(),
            });
            let kept = lock(&app.kept);
            bridge.addresses.extend(kept.in_use());
            bridge.attached.extend(kept.attached());
        }
        bridges
    }
}

/// Mends what the machine knows of its neighbours as soon as the kernel tells that some were forgotten.
pub(in crate::driver::agent) async fn minding(agent: Arc<Agent>, ear: Ear) {
    let mut pause = SHORTEST;
    loop {
        ear.heard().await;
        // Whoever makes the machine forget all the time does not keep us at it.
        pause = if agent.keep_neighbours().await { (pause * 2).min(LONGEST) } else { SHORTEST };
        tokio::time::sleep(pause).await;
    }
}
