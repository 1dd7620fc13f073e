//! What each tenant's apps may begin to talk to, as `serve` last said: root's own copy, one file a
//! tenant, replaced in one step, so that everything is open and closed as before after a reboot with
//! `serve` down.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::driver::Error;
use crate::ids::{AppId, TenantName};
use crate::policy::never::{self, Range};
use crate::policy::{AppFlows, Cidr, Flow, Target, TenantFlows};

/// Most flows of a tenant.
pub(super) const MOST: usize = 20_000;
/// The most that a plan's number may rise at once: else one message could shut out every honest one.
const LEAP: i64 = 1 << 20;

/// All tenants' flows.
#[derive(Debug)]
pub(super) struct Flows {
    folder: PathBuf,
    by_tenant: HashMap<TenantName, TenantFlows>,
    /// The highest number that any plan had.
    highest: Option<i64>,
}

impl Flows {
    /// Reads what is on record. A file that cannot be read is said, and its tenant has no flow.
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
                Err(error) => tracing::error!(path = %path.display(), error, "these flows cannot be read"),
            }
        }
        let highest = by_tenant.values().map(|flows: &TenantFlows| flows.plan).max();
        Ok(Self { folder: folder.to_owned(), by_tenant, highest })
    }

    /// Takes over a tenant's flows, on the disk before they are believed. Returns the number of the plan that is
    /// held then: a higher one than was handed in means that a newer one was here, and nothing was taken.
    pub(super) fn take(&mut self, flows: TenantFlows) -> Result<i64, Error> {
        if let Some(known) = self.by_tenant.get(&flows.tenant) {
            if flows.plan < known.plan {
                return Ok(known.plan);
            }
            if *known == flows {
                return Ok(known.plan);
            }
        }
        // All tenants' plans have one row of numbers.
        if self.highest.is_some_and(|highest| flows.plan - highest > LEAP) {
            return Err(Error::Rejected("a plan's number rises by too much".into()));
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
        // The folder too: a power failure must not bring back what was withdrawn.
        std::fs::File::open(&self.folder)?.sync_all()
    }

    /// Forgets a tenant that has left.
    pub(super) fn forget(&mut self, tenant: &TenantName) {
        self.by_tenant.remove(tenant);
        let _ = std::fs::remove_file(self.folder.join(format!("{tenant}.json")));
    }

    /// The flows of one app.
    pub(super) fn of(&self, tenant: &TenantName, app: AppId) -> &[Flow] {
        let apps = self.by_tenant.get(tenant).map_or(&[][..], |flows| &flows.apps);
        apps.iter().find(|own| own.app == app).map_or(&[], |own| &own.flows)
    }

    /// Those flows of one app that are counted.
    pub(super) fn watched(&self, tenant: &TenantName, app: AppId) -> &[Flow] {
        let apps = self.by_tenant.get(tenant).map_or(&[][..], |flows| &flows.watched);
        apps.iter().find(|own| own.app == app).map_or(&[], |own| &own.flows)
    }

    /// Whether a tenant is on trial at a second since 1970.
    pub(super) fn on_trial(&self, tenant: &TenantName, now: i64) -> bool {
        self.by_tenant.get(tenant).and_then(|flows| flows.trial_until).is_some_and(|until| until > now)
    }

    /// All, by tenant.
    pub(super) fn all(&self) -> impl Iterator<Item = &TenantFlows> {
        self.by_tenant.values()
    }
}

/// Why a flow can never be in force on this machine, if it cannot: what `serve` says is not believed.
pub(super) fn obstacle(flow: &Flow, pool: Cidr, own: &[Range]) -> Option<String> {
    if flow.port == 0 {
        return Some("a flow has no port".into());
    }
    let named = !flow.name.is_empty()
        && flow.name.len() <= 100
        && flow.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-/".contains(&b));
    if !named {
        return Some("the name of a flow is not possible".into());
    }
    let (network, wall) = match &flow.target {
        Target::App { .. } | Target::Domain { .. } => return None,
        Target::Service { network } => (network, never::against_service(*network, own)),
        Target::Outside { network } => (network, never::against_outside(*network, own)),
    };
    if network.overlaps(pool) {
        return Some(format!("{network} touches the addresses of tenants"));
    }
    wall.map(|range| format!("{network} touches {}", range.words))
}

/// Holds the form of a tenant's flows against bounds. One that can never be in force is no reason to refuse the
/// others, of which some may be there to close something: it is left out, and told.
pub(super) fn check(flows: &TenantFlows) -> Result<(), String> {
    let count = |apps: &[AppFlows]| apps.iter().map(|app| app.flows.len()).sum::<usize>();
    if flows.plan < 1 || count(&flows.apps) > MOST || count(&flows.watched) > MOST {
        return Err(format!("a plan has a number and at most {MOST} flows"));
    }
    Ok(())
}
