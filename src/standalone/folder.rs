//! The data folder: its files, their owners, and the users.
//!
//! | path | owner | what |
//! | --- | --- | --- |
//! | `format` | root | version of this layout |
//! | `settings.toml` | operator | settings that the operator changed |
//! | `ip_forward-before` | root | whether the machine forwarded packets before the installation |
//! | `postgres/` | db | the private cluster |
//! | `registry/` | registry | blobs and manifests |
//! | `registry.yml`, `registry-token.pem` | root | settings of the registry |
//! | `engine/` | root | the container engine's storage and settings |
//! | `agent/` | root | journal, desired state, logs of apps |
//! | `audit/` | serve | heads of the audit log's chain |
//! | `secrets/` | root, serve | the platform's key, the key of the registry's tokens |
//! | `run/` | each its own | sockets, process ids |
//! | `log/` | root | logs of the platform's own processes |

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::processes::{Layout, OwnParts};
use super::{Claim, Failed, claims};
use crate::config::{
    Access, AgentSettings, BLOCK_SIZE, Config, Database, Limits, Log, RANGE_SIZE, Registry, SUBNET_PREFIX,
    Server,
};
use crate::driver::agent::config::{AgentConfig, usual_pace};
use crate::driver::podman::engine::EngineSettings;
use crate::keys::Keys;
use crate::registries::SigningKey;

/// Version of this layout.
const FORMAT: &str = "1";

/// A user of the installation.
#[derive(Debug, Clone)]
pub struct User {
    /// Name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Ports chosen at the first start.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Ports {
    pull: u16,
}

/// A data folder, locked: no other process has it open.
#[derive(Debug)]
pub struct DataFolder {
    /// Its path.
    pub path: PathBuf,
    /// The installation's user ids and addresses.
    pub claim: Claim,
    /// `serve`.
    pub serve: User,
    /// Postgres.
    pub db: User,
    /// The registry.
    pub registry: User,
    /// The prober.
    pub prober: User,
    /// The resolver.
    pub resolver: User,
    ports: Ports,
    _lock: File,
}

fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Failed {
    move |error| Failed::doing(what, error)
}

/// Returns the part of a path that a user other than root could replace. A sticky folder such as /tmp does
/// not count: users can change only their own files in it.
pub(super) fn foreign(path: &Path) -> Option<PathBuf> {
    path.ancestors()
        .enumerate()
        .find(|(n, place)| {
            let Ok(meta) = fs::symlink_metadata(place) else { return false };
            let open = meta.mode() & 0o022 != 0 && (*n == 0 || meta.mode() & 0o1000 == 0);
            meta.uid() != 0 || open
        })
        .map(|(_, place)| place.to_owned())
}

pub(super) fn ensure_user(name: &str) -> Result<User, Failed> {
    let look = || {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.first() == Some(&name))
                .then(|| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)))?
        })
    };
    if let Some((uid, gid)) = look() {
        return Ok(User { name: name.into(), uid, gid });
    }
    let done = Command::new("useradd")
        .args(["--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"])
        .args(["--shell", "/usr/sbin/nologin", name])
        .output()
        .map_err(io("useradd"))?;
    if !done.status.success() {
        return Err(Failed::doing(
            format!("the user {name} cannot be created"),
            String::from_utf8_lossy(&done.stderr),
        ));
    }
    let (uid, gid) = look().ok_or_else(|| Failed(format!("the user {name} was created and is not found")))?;
    Ok(User { name: name.into(), uid, gid })
}

/// Writes a file in one step, with its owner and mode. No other process sees a partial file, or content
/// before the mode is set.
pub(super) fn write_file(path: &Path, text: &str, owner: (u32, u32), mode: u32) -> Result<(), Failed> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    let _ = fs::remove_file(&fresh);
    let write = || {
        let mut file =
            std::os::unix::fs::OpenOptionsExt::mode(File::options().create_new(true).write(true), 0o600)
                .open(&fresh)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        // Change the owner of the open file, not by name: the folder may belong to another user, who could
        // swap the name.
        std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().map_err(io(path.display()))
}

fn free_port() -> Result<(TcpListener, u16), Failed> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io("no free port"))?;
    let port = listener.local_addr().map_err(io("no free port"))?.port();
    Ok((listener, port))
}

/// Locks a folder. If its service is stopping, waits up to 25 seconds.
fn lock_within(lock: &File, data: &Path) -> bool {
    for _ in 0..100 {
        if rustix::fs::flock(lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        if !super::service::is_stopping(data) {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_millis(250));
    }
    false
}

impl DataFolder {
    /// Opens the folder; creates it if it is new. Fails if another process has it open.
    pub fn open(path: &Path, listen: Option<SocketAddr>) -> Result<Self, Failed> {
        fs::create_dir_all(path).map_err(io(format!("{} cannot be created", path.display())))?;
        let path = path.canonicalize().map_err(io(path.display()))?;
        if let Some(place) = foreign(&path) {
            return Err(Failed(format!(
                "a user other than root can change {}: choose a --data whose parent folders only root can change",
                place.display()
            )));
        }
        if path.as_os_str().len() > 70 {
            return Err(Failed(format!(
                "the path {} is too long for sockets: choose a --data of at most 70 characters",
                path.display()
            )));
        }
        // Only root may open it: a user who can could hold the lock for ever.
        let lock = std::os::unix::fs::OpenOptionsExt::mode(
            File::options().create(true).truncate(false).write(true),
            0o600,
        )
        .open(path.join("lock"))
        .map_err(io("the data folder cannot be written"))?;
        lock.set_permissions(fs::Permissions::from_mode(0o600)).map_err(io("lock"))?;
        if !lock_within(&lock, &path) {
            return Err(Failed(format!(
                "the platform runs on {}: stop it first (Ctrl-C where `bulkhead up` runs, or systemctl stop \
                 bulkhead.target where it is a service)",
                path.display()
            )));
        }
        check_format(&path)?;
        let claim = claims::claim(&path)?;
        let user = |part: &str| ensure_user(&format!("bk{}-{part}", claim.installation));
        let (serve, db) = (user("serve")?, user("db")?);
        let (registry, prober, resolver) = (user("registry")?, user("prober")?, user("resolver")?);
        let ports = ports(&path, listen.map(|listen| listen.port()))?;
        let folder = Self { path, claim, serve, db, registry, prober, resolver, ports, _lock: lock };
        folder.lay_out()?;
        Ok(folder)
    }

    /// Returns whether the folder exists.
    #[must_use]
    pub fn exists(path: &Path) -> bool {
        path.join("format").exists()
    }

    fn lay_out(&self) -> Result<(), Failed> {
        let root = (0, 0);
        let (db, reg) = ((self.db.uid, self.db.gid), (self.registry.uid, self.registry.gid));
        let layout: [(&str, (u32, u32), u32); 15] = [
            ("", root, 0o711),
            ("postgres", db, 0o700),
            ("registry", reg, 0o700),
            ("engine", root, 0o700),
            ("engine/networks", root, 0o700),
            ("agent", root, 0o700),
            ("secrets", (0, self.serve.gid), 0o710),
            ("audit", (self.serve.uid, self.serve.gid), 0o700),
            ("log", root, 0o700),
            ("run", root, 0o711),
            ("run/postgres", (self.db.uid, self.serve.gid), 0o750),
            ("run/agent", (0, self.serve.gid), 0o750),
            ("run/engine", root, 0o700),
            // New files in it belong to the group of `serve`, which is the only other user of the registry's
            // socket.
            ("run/registry", (self.registry.uid, self.serve.gid), 0o2750),
            ("run/prober", (self.prober.uid, self.prober.gid), 0o700),
        ];
        for (name, (uid, gid), mode) in layout {
            let path = self.path.join(name);
            fs::create_dir_all(&path).map_err(io(path.display()))?;
            chown(&path, Some(uid), Some(gid)).map_err(io(path.display()))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(io(path.display()))?;
        }
        self.ensure_key()
    }

    fn ensure_key(&self) -> Result<(), Failed> {
        let path = self.signing_key();
        let pem = match fs::read_to_string(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = SigningKey::generate().map_err(|error| Failed(error.to_string()))?;
                key.pem().to_owned()
            }
            Err(error) => return Err(io(path.display())(error)),
        };
        let key = SigningKey::from_pem(&pem).map_err(|error| Failed(error.to_string()))?;
        let platform = self.path.join("secrets/platform-key");
        if !platform.exists() {
            self.write("secrets/platform-key", &Keys::generate(), (0, self.serve.gid), 0o440)?;
        }
        self.write("secrets/signing-key.pem", &pem, (0, self.serve.gid), 0o440)?;
        self.write("registry-token.pem", key.certificate(), (0, self.registry.gid), 0o440)
    }

    /// Writes a file of the folder in one step, with its owner and mode.
    pub fn write(&self, name: &str, text: &str, owner: (u32, u32), mode: u32) -> Result<(), Failed> {
        write_file(&self.path.join(name), text, owner, mode)
    }

    fn signing_key(&self) -> PathBuf {
        self.path.join("secrets/signing-key.pem")
    }

    /// Returns the registry's socket. No other user can create a socket in its folder.
    #[must_use]
    pub fn registry_socket(&self) -> PathBuf {
        self.path.join("run/registry/registry.sock")
    }

    /// Returns the registry's address.
    #[must_use]
    pub fn registry_url(&self) -> String {
        format!("unix://{}", self.registry_socket().display())
    }

    /// Returns the address on which `serve` listens for the engine.
    #[must_use]
    pub fn pull_address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.ports.pull))
    }

    /// Returns the configuration of `serve`.
    #[must_use]
    pub fn config(&self, listen: SocketAddr) -> Config {
        Config {
            installation: self.claim.installation.clone(),
            server: Server::plain(listen, self.pull_address()),
            database: Database::on_socket(&self.path.join("run/postgres")),
            registry: Registry {
                url: self.registry_url(),
                signing_key: self.signing_key(),
                collector: Some(self.path.join("run/registry/collector.sock")),
                disk: Some(self.path.clone()),
            },
            agent: AgentSettings { socket: self.path.join("run/agent/agent.sock") },
            access: Access::with(self.path.join("secrets/platform-key"), self.path.join("audit/heads")),
            pools: self.claim.pools(),
            limits: Limits::default(),
            log: Log::default(),
        }
    }

    /// Returns the configuration of the agent.
    #[must_use]
    pub fn agent_config(&self) -> AgentConfig {
        AgentConfig {
            installation: self.claim.installation.clone(),
            state_dir: self.path.join("agent"),
            socket: self.path.join("run/agent/agent.sock"),
            peer_uid: self.serve.uid,
            engine_socket: self.path.join("run/engine/podman.sock"),
            id_pool: self.claim.ids,
            range_size: RANGE_SIZE,
            block_size: BLOCK_SIZE,
            network_pool: self.claim.network,
            subnet_prefix: SUBNET_PREFIX,
            engine_storage: self.path.join("engine"),
            engine_run: self.engine().run,
            prober_socket: self.path.join("run/prober/prober.sock"),
            prober_uid: self.prober.uid,
            resolver_socket: self.path.join("run/names/names.sock"),
            resolver_uid: self.resolver.uid,
            resolver_gid: self.resolver.gid,
            closed: Vec::new(),
            new_connections_per_second: usual_pace(),
            registry_name: self.registry_name(),
            pull_host: self.pull_host(),
        }
    }

    /// Returns the paths and users of the parts.
    #[must_use]
    pub fn layout(&self, postgres: &Path, binaries: &Path) -> Layout {
        Layout {
            serve: self.serve.name.clone(),
            prober: self.prober.name.clone(),
            resolver: self.resolver.name.clone(),
            binaries: binaries.to_owned(),
            serve_settings: self.path.join("serve.toml"),
            agent_settings: self.path.join("agent.toml"),
            prober_socket: self.path.join("run/prober/prober.sock"),
            resolver_socket: self.path.join("run/names/names.sock"),
            resolver_settings: self.path.join("resolver.toml"),
            engine: self.engine(),
            engine_cgroup: Some(self.engine_cgroup()),
            own: Some(OwnParts {
                postgres: postgres.to_owned(),
                cluster: self.path.join("postgres/data"),
                database_socket: self.path.join("run/postgres"),
                database: self.db.name.clone(),
                registry_settings: self.path.join("registry.yml"),
                registry: self.registry.name.clone(),
                registry_data: self.path.join("registry/data"),
                collector_socket: self.path.join("run/registry/collector.sock"),
                serve_uid: self.serve.uid,
                has_database: true,
                has_registry: true,
            }),
        }
    }

    /// Returns the name of the engine's own cgroup, a sibling of the containers' cgroup.
    pub(super) fn engine_cgroup(&self) -> String {
        format!("bulkhead-{}-engine", self.claim.installation)
    }

    fn pull_host(&self) -> String {
        format!("127.0.0.1:{}", self.ports.pull)
    }

    fn registry_name(&self) -> String {
        format!("{}.bulkhead.internal", self.claim.installation)
    }

    /// Returns the engine's settings.
    #[must_use]
    pub fn engine(&self) -> EngineSettings {
        EngineSettings {
            root: self.path.join("engine"),
            // In memory (/run): a reboot empties it, which is how the engine detects a reboot.
            run: PathBuf::from(format!("/run/bulkhead-{}", self.claim.installation)),
            socket: self.path.join("run/engine/podman.sock"),
            registry_name: self.registry_name(),
            pull_host: self.pull_host(),
            may_raise_limits: super::doctor::may_raise_limits(),
        }
    }
}

fn check_format(path: &Path) -> Result<(), Failed> {
    let file = path.join("format");
    match fs::read_to_string(&file) {
        Ok(text) if text.trim() == FORMAT => Ok(()),
        Ok(text) => Err(Failed(format!(
            "{} has format {}, and this version of bulkhead reads format {FORMAT}: use the version that created it, or a newer one",
            path.display(),
            text.trim()
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            super::forwarding::remember(Path::new("/proc"), path).map_err(io(path.display()))?;
            fs::write(&file, format!("{FORMAT}\n")).map_err(io(file.display()))
        }
        Err(error) => Err(io(file.display())(error)),
    }
}

fn ports(path: &Path, taken: Option<u16>) -> Result<Ports, Failed> {
    let file = path.join("ports.json");
    if let Ok(text) = fs::read_to_string(&file) {
        return serde_json::from_str(&text).map_err(|error| Failed::doing(file.display(), error));
    }
    // Must differ from the requested port.
    let pull = loop {
        let (_held, port) = free_port()?;
        if Some(port) != taken {
            break port;
        }
    };
    let ports = Ports { pull };
    let text = serde_json::to_string(&ports).map_err(|error| Failed(error.to_string()))?;
    fs::write(&file, text).map_err(io(file.display()))?;
    Ok(ports)
}
