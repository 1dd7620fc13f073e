//! The allowed flows of each tenant's apps, as `serve` last sent them. The agent keeps its own copy: one file per
//! tenant, replaced atomically. After a reboot, the same flows are allowed and denied even if `serve` is down.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::driver::Error;
use crate::ids::{AppId, TenantName};
use crate::policy::never::{self, Range};
use crate::policy::{AppFlows, Cidr, Flow, Target, TenantFlows};

/// Maximum number of flows of a tenant.
pub(super) const MOST: usize = 20_000;
/// Maximum increase of a plan's number in one message. Otherwise one message could shut out all valid later ones.
const LEAP: i64 = 1 << 20;

/// All tenants' flows.
#[derive(Debug)]
pub(super) struct Flows {
    folder: PathBuf,
    by_tenant: HashMap<TenantName, TenantFlows>,
    /// The highest number of any plan so far.
    highest: Option<i64>,
}

impl Flows {
    /// Reads the stored flows. A file that cannot be read is logged, and its tenant has no flows.
    pub(super) fn open(folder: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut by_tenant = HashMap::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let read = std::fs::read(&path).map_err(|error| error.to_string());
            match read
                .and_then(|text| serde_json::from_slice::<TenantFlows>(&text).map_err(|e| e.to_string()))
            {
                Ok(flows) => drop(by_tenant.insert(flows.tenant.clone(), flows)),
                Err(error) => tracing::error!(path = %path.display(), error, "a flows file cannot be read"),
            }
        }
        let highest = by_tenant.values().map(|flows: &TenantFlows| flows.plan).max();
        Ok(Self { folder: folder.to_owned(), by_tenant, highest })
    }

    /// Stores a tenant's flows on disk, then uses them. Returns the number of the plan in use. A higher number than
    /// the given one means that a newer plan was already there, and nothing was stored.
    pub(super) fn take(&mut self, flows: TenantFlows) -> Result<i64, Error> {
        if let Some(known) = self.by_tenant.get(&flows.tenant) {
            if flows.plan < known.plan {
                return Ok(known.plan);
            }
            if *known == flows {
                return Ok(known.plan);
            }
        }
        // The plans of all tenants share one sequence of numbers.
        if self.highest.is_some_and(|highest| flows.plan - highest > LEAP) {
            return Err(Error::Rejected("a plan's number rises by too much in one message".into()));
        }
        fail::fail_point!("agent::flows", |_| Err(Error::Transient("failpoint".into())));
        self.save(&flows).map_err(|error| Error::Transient(error.to_string()))?;
        fail::fail_point!("agent::flows_kept", |_| Err(Error::Transient("failpoint".into())));
        let number = flows.plan;
        self.highest = self.highest.max(Some(number));
        self.by_tenant.insert(flows.tenant.clone(), flows);
        Ok(number)
    }

    fn save(&self, flows: &TenantFlows) -> std::io::Result<()> {
        let fresh = self.folder.join(format!("{}.new", flows.tenant));
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(flows)?)?;
        file.sync_data()?;
        std::fs::rename(fresh, self.folder.join(format!("{}.json", flows.tenant)))?;
        // Syncs the folder too: a power failure must not bring back a withdrawn flow.
        std::fs::File::open(&self.folder)?.sync_all()
    }

    /// Forgets a tenant that was offboarded.
    pub(super) fn forget(&mut self, tenant: &TenantName) {
        self.by_tenant.remove(tenant);
        let _ = std::fs::remove_file(self.folder.join(format!("{tenant}.json")));
    }

    /// Returns the flows of one app.
    pub(super) fn of(&self, tenant: &TenantName, app: AppId) -> &[Flow] {
        let apps = self.by_tenant.get(tenant).map_or(&[][..], |flows| &flows.apps);
        apps.iter().find(|own| own.app == app).map_or(&[], |own| &own.flows)
    }

    /// Returns the flows of one app that are counted.
    pub(super) fn watched(&self, tenant: &TenantName, app: AppId) -> &[Flow] {
        let apps = self.by_tenant.get(tenant).map_or(&[][..], |flows| &flows.watched);
        apps.iter().find(|own| own.app == app).map_or(&[], |own| &own.flows)
    }

    /// Returns whether a tenant is in audit mode at a time in seconds since 1970.
    pub(super) fn on_trial(&self, tenant: &TenantName, now: i64) -> bool {
        self.by_tenant.get(tenant).and_then(|flows| flows.trial_until).is_some_and(|until| until > now)
    }

    /// Returns the flows of all tenants.
    pub(super) fn all(&self) -> impl Iterator<Item = &TenantFlows> {
        self.by_tenant.values()
    }
}

/// Returns why a flow can never be applied on this machine, if it cannot. This check does not rely on `serve`.
pub(super) fn obstacle(flow: &Flow, pool: Cidr, own: &[Range]) -> Option<String> {
    if flow.port == 0 {
        return Some("a flow has no port".into());
    }
    let named = !flow.name.is_empty()
        && flow.name.len() <= 100
        && flow.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-/".contains(&b));
    if !named {
        return Some("the name of a flow is invalid".into());
    }
    let (network, wall) = match &flow.target {
        Target::App { .. } | Target::Domain { .. } => return None,
        Target::Service { network } => (network, never::against_service(*network, own)),
        Target::Outside { network } => (network, never::against_outside(*network, own)),
    };
    if network.overlaps(pool) {
        return Some(format!("{network} overlaps the addresses of tenants"));
    }
    wall.map(|range| format!("{network} overlaps {}", range.words))
}

/// Checks the number and the size of a tenant's plan. A flow that can never be applied does not invalidate the
/// others, some of which may close something: it is left out and reported.
pub(super) fn check(flows: &TenantFlows) -> Result<(), String> {
    let count = |apps: &[AppFlows]| apps.iter().map(|app| app.flows.len()).sum::<usize>();
    if flows.plan < 1 || count(&flows.apps) > MOST || count(&flows.watched) > MOST {
        return Err(format!("a plan must have a number and at most {MOST} flows"));
    }
    Ok(())
}
