//! Keeps the bridges correct: they exist, the machine has a static neighbour entry for each address, and each port
//! is locked to its MAC address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use crate::driver::Error;
use crate::driver::agent::app::AgentApp;
use crate::driver::agent::core::{Agent, lock};
use crate::driver::agent::kept::{AppRecord, Instance};
use crate::driver::podman::ear::Ear;
use crate::driver::podman::neighbours::{self, Neighbours};
use crate::driver::podman::ports::{self, PortState};
use crate::driver::workload::Subnet;
use crate::ids::TenantName;

/// Minimum pause after neighbour entries were restored.
const SHORTEST: Duration = Duration::from_millis(25);
/// Maximum pause if entries are lost again and again. They are also checked every few seconds.
const LONGEST: Duration = Duration::from_secs(5);

impl Agent {
    /// Creates a tenant's network if it is missing.
    pub(in crate::driver::agent) async fn ensure_network(&self, tenant: &TenantName) -> Result<(), Error> {
        let recorded = lock(&self.journal).tenant(tenant).cloned();
        let recorded = recorded.ok_or_else(|| Error::Rejected("this tenant is not in the journal".into()))?;
        let bridge = self.config.bridge(recorded.network);
        let made = self.podman.ensure_network(&bridge).await?;
        if made {
            self.machine_event("network_made", format!("the network {bridge} of {tenant} was created"));
        }
        Ok(())
    }

    /// Creates missing networks of all tenants that have apps, and restores missing neighbour entries. Collects the
    /// ports that are not locked to their MAC address.
    pub(in crate::driver::agent) async fn keep_networks(&self) {
        let tenants: BTreeSet<TenantName> = lock(&self.apps).values().map(|app| app.tenant.clone()).collect();
        for tenant in tenants {
            if let Err(error) = self.ensure_network(&tenant).await {
                tracing::warn!(%error, %tenant, "a network cannot be created");
            }
        }
        self.keep_neighbours().await;
        match ports::unlocked().await {
            Ok(unlocked) => *lock(&self.unlocked) = unlocked,
            Err(error) => tracing::warn!(%error, "the bridge ports cannot be read"),
        }
    }

    /// Restores the static neighbour entries of the bridges. Returns whether an entry had to be repaired.
    pub(in crate::driver::agent) async fn keep_neighbours(&self) -> bool {
        let held = neighbours::hold(&self.neighbours()).await;
        if let Some(error) = held.failed {
            tracing::warn!(%error, "the neighbour entries of a bridge cannot be restored");
        }
        for (bridge, what) in &held.mended {
            self.machine_event("neighbours_repaired", format!("{bridge}: {what}; repaired"));
        }
        !held.mended.is_empty()
    }

    /// Closes the ports of running instances and sets their neighbour entries, which an earlier version may have
    /// configured differently. The entries inside the instances come first: once a bridge no longer answers ARP, an
    /// instance without entries has no network.
    pub(in crate::driver::agent) async fn settle(&self, all: &[AppRecord]) {
        for kept in all {
            for instance in &kept.instances {
                let Some(port) = &instance.port else { continue };
                if port.look() == PortState::Gone {
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
                    tracing::warn!(%error, app = %kept.workload.app, "the network of an instance cannot be configured yet");
                    lock(&self.unsettled).insert(port.clone());
                }
            }
        }
    }

    /// Configures an instance that could not be configured before. Returns a message if it succeeded.
    pub(in crate::driver::agent) async fn settle_again(
        &self,
        kept: &AppRecord,
        instance: &Instance,
    ) -> Option<String> {
        let port = instance.port.as_ref().filter(|port| lock(&self.unsettled).contains(port))?;
        let (bridge, own, subnet) = self.place_of(kept, instance)?;
        match ports::settle(&bridge, &instance.sandbox, own, subnet).await {
            Ok(()) => {
                lock(&self.unsettled).remove(port);
                Some(format!("instance {}: its network was configured late", instance.number))
            }
            Err(error) => {
                tracing::warn!(%error, app = %kept.workload.app, "the network of an instance cannot be configured yet");
                None
            }
        }
    }

    /// Returns the bridge, the address and the subnet of an instance.
    fn place_of(&self, kept: &AppRecord, instance: &Instance) -> Option<(String, Ipv4Addr, Subnet)> {
        let recorded = lock(&self.journal).tenant(&kept.workload.tenant).cloned()?;
        Some((self.config.bridge(recorded.network), kept.address_of(instance)?, recorded.subnet))
    }

    /// Returns the addresses on each bridge.
    fn neighbours(&self) -> BTreeMap<String, Neighbours> {
        let apps: Vec<Arc<AgentApp>> = lock(&self.apps).values().cloned().collect();
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

/// Restores neighbour entries as soon as the kernel reports that some were removed.
pub(in crate::driver::agent) async fn minding(agent: Arc<Agent>, ear: Ear) {
    let mut pause = SHORTEST;
    loop {
        ear.heard().await;
        // A program that removes entries all the time must not keep the agent busy.
        pause = if agent.keep_neighbours().await { (pause * 2).min(LONGEST) } else { SHORTEST };
        tokio::time::sleep(pause).await;
    }
}
