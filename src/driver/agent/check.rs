//! The agent's own check of a workload, independent of the checks in `serve`. The types cannot express anything
//! dangerous; this check bounds their values.

use crate::driver::workload::{HealthCheck, Update, Workload};

use super::journal::TenantRecord;
use crate::driver::scratch::{SHM, closed, is_path};

/// Maximum number of addresses: each instance, an old instance that stops beside each, and one for updates.
const ADDRESSES: usize = 201;
const MEMORY: u64 = 1 << 40;

/// Checks a workload. Returns the first fault as an error.
pub(super) fn check(workload: &Workload, tenant: &TenantRecord) -> Result<(), String> {
    let no = |why: &str| Err(why.to_owned());
    let w = workload;
    if w.block.size < 16 || w.block.size > 65_536 {
        return no("a block has 16 to 65536 ids");
    }
    let inside = |id: u16| id >= 1 && u32::from(id) < w.block.size;
    let group = |id: u16| u32::from(id) < w.block.size;
    if !inside(w.user.uid)
        || !group(w.user.gid)
        || w.groups.len() > 64
        || !w.groups.iter().all(|id| group(*id))
    {
        return no("the user or one of its groups is not in the block, or the user is root");
    }
    if !(10..=1_000_000).contains(&w.cpu_millis) || !((8 << 20)..=MEMORY).contains(&w.memory) {
        return no("cpu or memory is out of bounds");
    }
    let surge = usize::from(w.update == Update::Rolling && w.instances > 0);
    if w.addresses.len() > ADDRESSES || w.addresses.len() < w.instances as usize + surge {
        return no("there are too few or too many addresses");
    }
    let last = tenant.subnet.size() - 1;
    for (n, address) in w.addresses.iter().enumerate() {
        let host = u32::from(*address).wrapping_sub(u32::from(tenant.subnet.address()));
        if !tenant.subnet.contains(*address) || host < 2 || host >= last || w.addresses[..n].contains(address)
        {
            return no("an address is not a host address of the tenant's subnet, or occurs twice");
        }
    }
    if w.scratch.len() > 18
        || !w.scratch.keys().all(|path| is_path(path) && closed(path).is_none())
        || !w.scratch.contains_key("/tmp")
    {
        return no("a scratch path is invalid");
    }
    // The default of shared memory is larger than a small app ever uses; the memory limit bounds it anyway.
    let counted = w.scratch.iter().filter(|(path, _)| *path != SHM);
    let scratch = counted.fold(0_u64, |sum, (_, scratch)| sum.saturating_add(scratch.size));
    let shm = w.scratch.get(SHM).map_or(0, |shm| shm.size);
    if scratch.saturating_add(8 << 20) > w.memory
        || shm > w.memory
        || w.scratch.values().any(|scratch| scratch.size < 4096)
    {
        return no("scratch does not fit into memory");
    }
    let texts = w.command.iter().flatten().chain(w.args.iter().flatten());
    let mut sum = 0;
    for text in texts.chain(w.env.values()) {
        sum += text.len();
        if text.contains('\0') {
            return no("command, args or env contain the character NUL");
        }
    }
    if sum > 256 << 10 || w.env.len() > 256 {
        return no("command, args and env are too large");
    }
    let key = |key: &String| {
        !key.is_empty()
            && key.len() <= 128
            && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    if !w.env.keys().all(key) {
        return no("the name of an environment variable is invalid");
    }
    if w.port.is_some_and(|port| port < 1024) {
        return no("a port is below 1024");
    }
    if let Some(health) = &w.health {
        let good = match &health.check {
            HealthCheck::Tcp { port } => *port >= 1024,
            HealthCheck::Http { path, port } => {
                *port >= 1024
                    && path.starts_with('/')
                    && path.len() <= 256
                    && path.bytes().all(|b| (0x21..0x7f).contains(&b))
            }
        };
        if !good || health.grace > 3600 {
            return no("the health check is out of bounds");
        }
    }
    if w.stop_grace > 600 || w.revision < 1 || w.generation < 1 {
        return no("stop_grace, revision or generation is out of bounds");
    }
    Ok(())
}
