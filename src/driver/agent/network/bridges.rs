//! The bridges as the root half keeps them: that they are there, that the machine knows who is on them, that each
//! port is held to its own card.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::driver::Error;
use crate::driver::agent::app::App;
use crate::driver::agent::core::{Agent, lock};
use crate::driver::podman::neighbours::{self, Neighbours};
use crate::driver::podman::ports;
use crate::ids::TenantName;

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

    /// Sees to it that the machine takes nobody for another one on a bridge.
    pub(in crate::driver::agent) async fn keep_neighbours(&self) {
        match neighbours::hold(&self.neighbours()).await {
            Ok(mended) => {
                for (bridge, what) in mended {
                    self.machine_event("neighbours_repaired", format!("{bridge}: {what}; it was set right"));
                }
            }
            Err(error) => tracing::warn!(%error, "the neighbours on the bridges cannot be kept"),
        }
    }

    /// Who is on which bridge.
    fn neighbours(&self) -> BTreeMap<String, Neighbours> {
        let apps: Vec<Arc<App>> = lock(&self.apps).values().cloned().collect();
        let mut bridges = BTreeMap::new();
        for app in apps {
            let Some(recorded) = lock(&self.journal).tenant(&app.tenant).cloned() else { continue };
            let gateway = recorded.subnet.gateway();
            let bridge = bridges
                .entry(self.config.bridge(recorded.network))
                .or_insert_with(|| Neighbours { gateway, addresses: BTreeSet::new() });
            bridge.addresses.extend(lock(&app.kept).attached());
        }
        bridges
    }
}

/// Mends what the machine knows of its neighbours as soon as the kernel tells that some were forgotten.
pub(in crate::driver::agent) async fn minding(agent: Arc<Agent>) {
    let ear = match neighbours::forgetting() {
        Ok(ear) => ear,
        Err(error) => {
            tracing::warn!(%error, "the kernel's messages are not heard; bridges are looked at every few seconds");
            return;
        }
    };
    loop {
        ear.heard().await;
        agent.keep_neighbours().await;
        // Whoever makes the machine forget all the time does not keep us at it.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
