//! Answers the resolver's questions. The source address identifies the app; its flows determine which names it may
//! resolve. A resolved address is in the kernel's set before the answer is sent.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::codec::Framed;

use super::core::{Agent, lock};
use super::server::codec;
use crate::driver::podman::firewall::{kernel, seconds};
use crate::ids::{AppId, DomainName, TenantName};
use crate::permits::FairPermits;
use crate::policy::never::{self, Range};
use crate::policy::{Cidr, Target};
use crate::resolver::{ResolverAnswer, ResolverQuestion};

/// Time to live of an app's or a service's address, in seconds: it may change with the next release.
const OWN: u32 = 5;
/// Minimum time that a domain's address stays open, and the time added to its time to live, in seconds. Clients use
/// addresses longer than their time to live.
const FLOOR: u32 = 60;
const GRACE: u64 = 15 * 60;
/// Seconds by which an address may close earlier than the latest answer demands, within the grace. A query that
/// changes nothing else leaves the firewall alone.
const SLACK: u64 = 60;
/// Maximum time to live, in seconds.
const CEILING: u32 = 3600;
/// Maximum number of addresses of one domain that are open for an app at a time.
const OPEN: usize = 64;

/// Resolved addresses of the domains that apps may reach.
pub(super) type ResolvedNames = std::collections::HashMap<(AppId, DomainName), BTreeMap<Ipv4Addr, u64>>;

/// Starts answering the resolver.
pub(super) fn serve(agent: Arc<Agent>) -> Result<JoinHandle<()>, String> {
    let path = agent.config.resolver_socket.clone();
    // Only the resolver's group may enter this folder: other users cannot connect at all.
    let folder = path.parent().ok_or("the path of the resolver's socket has no folder")?;
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::create_dir_all(folder).map_err(failed)?;
    std::os::unix::fs::chown(folder, Some(0), Some(agent.config.resolver_gid)).map_err(failed)?;
    std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o750)).map_err(failed)?;
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .map_err(|error| error.to_string())?;
    let room = Arc::new(Semaphore::new(256));
    // Permits per tenant, identified by its bridge, and in total. The rest is for the question where to listen.
    let tenants = FairPermits::new(48, 224);
    Ok(tokio::spawn(async move {
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            if stream.peer_cred().map(|peer| peer.uid()).ok() != Some(agent.config.resolver_uid) {
                tracing::warn!(
                    "a process of another user than the resolver connected to its socket and was refused"
                );
                continue;
            }
            let (agent, tenants) = (Arc::clone(&agent), tenants.clone());
            tokio::spawn(async move {
                let _ = tokio::time::timeout(Duration::from_secs(5), answer(&agent, &tenants, stream)).await;
                drop(permit);
            });
        }
    }))
}

async fn answer(agent: &Agent, tenants: &FairPermits<Ipv4Addr>, stream: UnixStream) {
    let mut frames = Framed::new(stream, codec());
    let Some(Ok(frame)) = frames.next().await else { return };
    let question = serde_json::from_slice(&frame);
    let _room = match &question {
        Ok(ResolverQuestion::Name { gateway, .. } | ResolverQuestion::Found { gateway, .. }) => {
            let Ok(room) = tenants.take(gateway, Duration::from_secs(1)).await else { return };
            Some(room)
        }
        _ => None,
    };
    let answer = match question {
        Ok(ResolverQuestion::Gateways {}) => ResolverAnswer::Gateways { gateways: agent.gateways() },
        Ok(ResolverQuestion::Name { source, gateway, name }) => agent.name(source, gateway, &name),
        Ok(ResolverQuestion::Found { source, gateway, domain, addresses, ttl }) => {
            agent.found(source, gateway, &domain, addresses, ttl).await
        }
        Err(_) => ResolverAnswer::Failed {},
    };
    if let Ok(text) = serde_json::to_vec(&answer) {
        let _ = frames.send(bytes::Bytes::from(text)).await;
    }
}

impl Agent {
    /// Returns the bridges' own addresses.
    fn gateways(&self) -> Vec<Ipv4Addr> {
        let apps: Vec<_> = lock(&self.apps).values().map(|app| app.tenant.clone()).collect();
        let journal = lock(&self.journal);
        let mut all: Vec<Ipv4Addr> =
            apps.iter().filter_map(|tenant| Some(journal.ever(tenant)?.subnet.gateway())).collect();
        all.sort();
        all.dedup();
        all
    }

    /// Returns the app that has an instance at this address behind this bridge.
    ///
    /// A record may be locked while it is written to disk: other tasks continue meanwhile.
    fn asker(&self, source: Ipv4Addr, gateway: Ipv4Addr) -> Option<(TenantName, AppId)> {
        tokio::task::block_in_place(|| self.asker_of(source, gateway))
    }

    fn asker_of(&self, source: Ipv4Addr, gateway: Ipv4Addr) -> Option<(TenantName, AppId)> {
        let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
        apps.into_iter().find_map(|app| {
            let subnet = lock(&self.journal).ever(&app.tenant)?.subnet;
            let there = subnet.gateway() == gateway && subnet.contains(source);
            (there && lock(&app.kept).in_use().contains(&source)).then(|| (app.tenant.clone(), app.id))
        })
    }

    /// Answers a query for a name, as far as the app's flows allow.
    fn name(&self, source: Ipv4Addr, gateway: Ipv4Addr, name: &str) -> ResolverAnswer {
        let Some((tenant, app)) = self.asker(source, gateway) else { return ResolverAnswer::Refused {} };
        if self.app(app).is_some_and(|own| own.name.as_str() == name) {
            return ResolverAnswer::Known { addresses: vec![source], ttl: OWN };
        }
        let flows = lock(&self.flows).of(&tenant, app).to_vec();
        let mut addresses = Vec::new();
        let mut known = false;
        for flow in flows {
            // Another tenant's app `api` of `acme` is `api.acme`.
            let called = match flow.name.split_once('/') {
                Some((tenant, app)) => format!("{app}.{tenant}"),
                None => flow.name,
            };
            match flow.target {
                Target::Domain { domain } if domain.as_str() == name => return ResolverAnswer::Outside {},
                Target::App { tenant, app } if called == name => {
                    known = true;
                    addresses.extend(self.running(&tenant, app));
                }
                Target::Service { network } if called == name => {
                    known = true;
                    addresses.extend(network.single());
                }
                _ => {}
            }
        }
        addresses.sort();
        addresses.dedup();
        if known { ResolverAnswer::Known { addresses, ttl: OWN } } else { ResolverAnswer::Unknown {} }
    }

    /// Opens the addresses resolved for a domain, as far as allowed, and returns the open ones.
    async fn found(
        &self,
        source: Ipv4Addr,
        gateway: Ipv4Addr,
        domain: &str,
        mut addresses: Vec<Ipv4Addr>,
        ttl: u32,
    ) -> ResolverAnswer {
        let (Some((tenant, app)), Ok(domain)) = (self.asker(source, gateway), domain.parse::<DomainName>())
        else {
            return ResolverAnswer::Refused {};
        };
        let named = lock(&self.flows)
            .of(&tenant, app)
            .iter()
            .any(|flow| matches!(&flow.target, Target::Domain { domain: own } if *own == domain));
        if !named {
            return ResolverAnswer::Unknown {};
        }
        let (pool, own) = (self.config.pool(), lock(&self.own).clone());
        let before = addresses.len();
        addresses.retain(|address| is_outside(*address, pool, &own));
        if addresses.len() < before {
            // A name that resolves to an internal address is an attack or a mistake; the address stays closed.
            let text =
                format!("{domain} resolves to a reserved or blocked address; it is withheld from {tenant}");
            self.tell("name_refused", text);
        }
        if addresses.is_empty() {
            return if before == 0 {
                ResolverAnswer::Known { addresses, ttl: OWN }
            } else {
                ResolverAnswer::Failed {}
            };
        }
        let ttl = ttl.min(CEILING);
        let end = seconds() + u64::from(ttl.max(FLOOR)) + GRACE;
        let key = (app, domain);
        let before = {
            let mut found = lock(&self.found);
            let open = found.entry(key.clone()).or_default();
            if addresses.iter().all(|address| open.get(address).is_some_and(|until| until + SLACK >= end)) {
                return ResolverAnswer::Known { addresses, ttl };
            }
            let before = open.clone();
            for address in &addresses {
                let until = open.entry(*address).or_default();
                *until = end.max(*until);
            }
            while open.len() > OPEN {
                let Some(oldest) = open.iter().min_by_key(|(_, end)| **end).map(|(address, _)| *address)
                else {
                    break;
                };
                open.remove(&oldest);
            }
            before
        };
        match self.refresh_firewall().await {
            Ok(()) => ResolverAnswer::Known { addresses, ttl },
            Err(error) => {
                tracing::warn!(%error, "a resolved address cannot be opened; the query fails");
                // The next query must not take these addresses for open.
                lock(&self.found).insert(key, before);
                ResolverAnswer::Failed {}
            }
        }
    }

    /// Extends addresses that are still in use: a connection may outlive the time to live of its name.
    pub(super) async fn keep_found_open(&self) {
        let soon = seconds() + 120;
        let closing: Vec<Ipv4Addr> = lock(&self.found)
            .values()
            .flat_map(|addresses| {
                addresses.iter().filter(|(_, end)| **end < soon).map(|(address, _)| *address)
            })
            .collect();
        if closing.is_empty() {
            return;
        }
        let used = kernel::connected().await;
        let apps: std::collections::HashMap<Ipv4Addr, AppId> = {
            let apps: Vec<_> = lock(&self.apps).values().cloned().collect();
            apps.iter()
                .flat_map(|app| {
                    lock(&app.kept).in_use().into_iter().map(|address| (address, app.id)).collect::<Vec<_>>()
                })
                .collect()
        };
        for ((app, _), addresses) in lock(&self.found).iter_mut() {
            for (address, end) in
                addresses.iter_mut().filter(|(address, end)| **end < soon && closing.contains(address))
            {
                if used.iter().any(|(from, to)| to == address && apps.get(from) == Some(app)) {
                    *end = seconds() + GRACE;
                }
            }
        }
    }

    /// Returns the open addresses of resolved names, until their time is over.
    pub(super) fn resolved(&self) -> ResolvedNames {
        let now = seconds();
        let mut found = lock(&self.found);
        found.retain(|_, addresses| {
            addresses.retain(|_, end| *end > now);
            !addresses.is_empty()
        });
        found.clone()
    }
}

fn is_outside(address: Ipv4Addr, pool: Cidr, own: &[Range]) -> bool {
    !pool.contains(address) && never::against_outside(Cidr::of(address), own).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_leads_inside() {
        let own = [never::own("45.99.99.99".parse().unwrap())];
        let pool = "10.64.0.0/12".parse().unwrap();
        for inside in [
            "169.254.169.254",
            "10.64.0.2",
            "10.0.0.1",
            "127.0.0.1",
            "168.63.129.16",
            "45.99.99.99",
            "0.0.0.0",
            "224.0.0.1",
        ] {
            assert!(!is_outside(inside.parse().unwrap(), pool, &own), "{inside}");
        }
        assert!(is_outside("45.99.99.98".parse().unwrap(), pool, &own));
    }
}
