//! Records which installation on this machine has which user ids and addresses. It is one file that root
//! owns, under a lock: two installations never get the same id or address.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::Failed;
use crate::config::{BLOCK_SIZE, Pools, RANGE_SIZE, SUBNET_PREFIX};
use crate::driver::workload::{IdRange, Subnet};
use crate::ids::Installation;
use crate::uid_ranges::machine;

/// The folder of the claims: the same for all installations on the machine.
pub(super) const FOLDER: &str = "/var/lib/bulkhead-claims";

/// The user ids that systemd's table leaves free (<https://systemd.io/UIDS-GIDS/>).
const IDS: IdRange = IdRange { start: 1_879_048_192, size: 2_147_352_576 - 1_879_048_192 };
/// Ids of one installation: 512 ranges of 65,536. Eight installations fit.
const SHARE: u32 = 512 * 65_536;

/// The user ids and addresses of one installation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Id of the installation: four letters.
    pub installation: Installation,
    /// Its data folder.
    pub data: PathBuf,
    /// Its user ids.
    pub ids: IdRange,
    /// Its addresses.
    pub network: Subnet,
}

impl Claim {
    /// Returns the pools of `serve`, with the default sizes.
    #[must_use]
    pub fn pools(&self) -> Pools {
        Pools {
            uid_start: self.ids.start,
            uid_end: self.ids.start + self.ids.size,
            range_size: RANGE_SIZE,
            block_size: BLOCK_SIZE,
            network: self.network,
            subnet_prefix: SUBNET_PREFIX,
        }
    }
}

struct Locked {
    _lock: File,
    claims: Vec<Claim>,
}

fn open() -> Result<Locked, Failed> {
    // A missing file means that there are no claims. A damaged or unreadable file is an error.
    let failed = |error: std::io::Error| Failed::doing(format!("{FOLDER} cannot be used"), error);
    std::fs::create_dir_all(FOLDER).map_err(failed)?;
    // The lock is a separate file because the claims file is replaced as a whole: no crash leaves it empty.
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(Path::new(FOLDER).join("lock"))
        .map_err(failed)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    let claims = match std::fs::read_to_string(Path::new(FOLDER).join("claims.json")) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| Failed::doing(format!("{FOLDER}/claims.json is damaged"), error))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(error)),
    };
    Ok(Locked { _lock: lock, claims })
}

impl Locked {
    fn save(&self) -> Result<(), Failed> {
        let text = serde_json::to_string_pretty(&self.claims).map_err(|error| Failed(error.to_string()))?;
        super::folder::write_file(&Path::new(FOLDER).join("claims.json"), &text, (0, 0), 0o600)
    }
}

/// Returns the claim of a data folder; creates it if it does not exist.
pub(super) fn claim(data: &Path) -> Result<Claim, Failed> {
    let mut locked = open()?;
    if let Some(own) = locked.claims.iter().find(|claim| claim.data == data) {
        return Ok(own.clone());
    }
    let routes = routes();
    let ids = free_share(&locked.claims).ok_or_else(|| {
        Failed(
            "no user ids are free: every share of this machine is claimed by an installation or in use"
                .into(),
        )
    })?;
    let network = (64_u32..=240)
        .step_by(16)
        .filter_map(|second| format!("10.{second}.0.0/12").parse::<Subnet>().ok())
        .find(|net| {
            !locked.claims.iter().any(|claim| claim.network.overlaps(*net))
                && !routes.iter().any(|r| r.overlaps(*net))
        })
        .ok_or_else(|| {
            Failed(
                "no addresses are free: this machine's routes use every range of 10.64.0.0 to 10.255.255.255"
                    .into(),
            )
        })?;
    let letters: String = (0..4).map(|_| char::from(b'a' + rand::random::<u8>() % 26)).collect();
    let installation: Installation = letters.parse().map_err(|error| Failed::doing("an id", error))?;
    if locked.claims.iter().any(|claim| claim.installation == installation) {
        drop(locked);
        return claim(data);
    }
    let own = Claim { installation, data: data.to_owned(), ids, network };
    locked.claims.push(own.clone());
    locked.save()?;
    Ok(own)
}

/// Returns all claims of the machine; an empty list if the file cannot be read.
pub(super) fn all() -> Vec<Claim> {
    if !Path::new(FOLDER).exists() {
        return Vec::new();
    }
    open().map(|locked| locked.claims).unwrap_or_default()
}

/// Returns the first share of ids that no installation has claimed and that is not in use on the machine.
fn free_share(claims: &[Claim]) -> Option<IdRange> {
    (0..IDS.size / SHARE)
        .map(|n| IdRange { start: IDS.start + n * SHARE, size: SHARE })
        .filter(|ids| !claims.iter().any(|claim| claim.ids.overlaps(*ids)))
        .find(|ids| machine::look(Path::new("/"), *ids, None).clashes.is_empty())
}

/// Returns the ids that a data folder has, or would get.
pub(super) fn prospect(data: &Path) -> Option<IdRange> {
    let claims = all();
    let data = data.canonicalize().unwrap_or_else(|_| data.to_owned());
    let own = claims.iter().find(|claim| claim.data == data).map(|claim| claim.ids);
    own.or_else(|| free_share(&claims))
}

/// Returns the installation in this folder, if there is one.
pub(super) fn installation_of(data: &Path) -> Option<Installation> {
    let data = data.canonicalize().unwrap_or_else(|_| data.to_owned());
    all().into_iter().find(|claim| claim.data == data).map(|claim| claim.installation)
}

/// Releases a claim after the installation has been removed completely.
pub(super) fn release(data: &Path) -> Result<(), Failed> {
    let mut locked = open()?;
    locked.claims.retain(|claim| claim.data != data);
    locked.save()
}

/// Returns the subnets that the machine has routes to.
fn routes() -> Vec<Subnet> {
    let done = std::process::Command::new("ip").args(["-4", "-j", "route", "show", "table", "all"]).output();
    let list: serde_json::Value =
        done.ok().and_then(|done| serde_json::from_slice(&done.stdout).ok()).unwrap_or_default();
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|route| route["dst"].as_str())
        .filter_map(|dst| {
            let text = if dst.contains('/') { dst.to_owned() } else { format!("{dst}/30") };
            // A single host counts as the /30 around it.
            let (address, prefix) = text.split_once('/')?;
            let prefix = prefix.parse::<u8>().ok()?.min(30);
            let address = u32::from(address.parse::<std::net::Ipv4Addr>().ok()?);
            Subnet::new(std::net::Ipv4Addr::from(address & !(u32::MAX >> prefix)), prefix)
        })
        .collect()
}
