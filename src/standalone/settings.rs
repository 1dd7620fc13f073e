//! Creates what the units need before their first start: users, settings, keys, the engine's files. Existing
//! files stay, so it can run again.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use super::folder::{ensure_user, write_file};
use super::{Claim, Failed, claims, units};
use crate::config::{
    Access, AgentSettings, BLOCK_SIZE, Config, Database, Limits, Log, RANGE_SIZE, Registry, SUBNET_PREFIX,
    Server,
};
use crate::driver::agent::config::{AgentConfig, usual_pace};
use crate::driver::podman::engine;
use crate::keys::Keys;
use crate::registries::SigningKey;
use crate::registries::token::{ISSUER, SERVICE};

/// The files that were written.
#[derive(Debug)]
pub struct Written {
    /// New files.
    pub fresh: Vec<PathBuf>,
    /// Existing files, unchanged.
    pub kept: Vec<PathBuf>,
    /// The required settings of the registry.
    pub registry: String,
}

/// Writes settings below `settings` and the engine's files below `state`.
pub fn write(settings: &Path, state: &Path) -> Result<Written, Failed> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failed("run it as root: it creates users and writes their settings".into()));
    }
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| Failed::doing(path, error)
    };
    fs::create_dir_all(settings).map_err(io(settings))?;
    let settings = settings.canonicalize().map_err(io(settings))?;
    let claim = claims::claim(&settings)?;
    let (serve, prober) = (ensure_user(units::SERVE)?, ensure_user(units::PROBER)?);
    let resolver = ensure_user(units::RESOLVER)?;
    // All settings use the port of the first run.
    let known = Config::load(&settings.join("serve.toml"), &[]).ok().map(|config| config.server.pull_listen);
    let pull = match known {
        Some(pull) => pull,
        None => free_address()?,
    };
    let name = format!("{}.bulkhead.internal", claim.installation);
    let mut layout = units::layout(&name, &pull.to_string(), super::doctor::may_raise_limits());
    layout.engine.root = state.join("engine");
    let mut written = Written { fresh: Vec::new(), kept: Vec::new(), registry: String::new() };
    let mut put = |path: PathBuf, text: &str, group: u32, mode: u32| -> Result<(), Failed> {
        if path.exists() {
            written.kept.push(path);
            return Ok(());
        }
        write_file(&path, text, (0, group), mode)?;
        written.fresh.push(path);
        Ok(())
    };
    let key = settings.join("signing-key.pem");
    let pem = match fs::read_to_string(&key) {
        Ok(pem) => pem,
        Err(_) => SigningKey::generate().map_err(|error| Failed(error.to_string()))?.pem().to_owned(),
    };
    let signing = SigningKey::from_pem(&pem).map_err(|error| Failed::doing(key.display(), error))?;
    put(key.clone(), &pem, serve.gid, 0o440)?;
    let certificate = settings.join("registry-token.pem");
    put(certificate.clone(), signing.certificate(), 0, 0o444)?;
    put(settings.join("platform-key"), &Keys::generate(), serve.gid, 0o440)?;
    let config = serve_config(&claim, pull, &settings);
    let agent = AgentConfig {
        installation: claim.installation.clone(),
        state_dir: state.join("agent"),
        socket: config.agent.socket.clone(),
        peer_uid: serve.uid,
        engine_socket: layout.engine.socket.clone(),
        id_pool: claim.ids,
        range_size: RANGE_SIZE,
        block_size: BLOCK_SIZE,
        network_pool: claim.network,
        subnet_prefix: SUBNET_PREFIX,
        engine_storage: layout.engine.root.clone(),
        engine_run: layout.engine.run.clone(),
        prober_socket: layout.prober_socket.clone(),
        prober_uid: prober.uid,
        resolver_socket: layout.resolver_socket.clone(),
        resolver_uid: resolver.uid,
        resolver_gid: resolver.gid,
        closed: Vec::new(),
        new_connections_per_second: usual_pace(),
        registry_name: name,
        pull_host: pull.to_string(),
    };
    let toml = |text: Result<String, toml::ser::Error>| text.map_err(|error| Failed(error.to_string()));
    put(settings.join("serve.toml"), &toml(toml::to_string(&config))?, serve.gid, 0o440)?;
    put(settings.join("agent.toml"), &toml(toml::to_string(&agent))?, 0, 0o400)?;
    for folder in [layout.engine.root.clone(), layout.engine.root.join("networks")] {
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .map_err(io(&folder))?;
    }
    for (file, text) in engine::files(&layout.engine) {
        put(layout.engine.root.join(file), &text, 0, 0o400)?;
    }
    let realm =
        config.server.external_url.clone().unwrap_or_else(|| format!("http://{}", config.server.listen));
    written.registry = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: /var/lib/docker-registry\n  delete:\n    enabled: true\n\
         http:\n  addr: 127.0.0.1:5000\n  relativeurls: true\nauth:\n  token:\n    realm: {realm}/auth/token\n    \
         service: {SERVICE}\n    issuer: {ISSUER}\n    rootcertbundle: {}\n",
        certificate.display()
    );
    Ok(written)
}

/// Reverts `write`, unless the installation has run: the user ids of an installation that has had tenants are
/// never reused.
pub fn undo(settings: &Path, state: &Path) -> Result<(), Failed> {
    if state.join("agent/journal").exists() {
        return Err(Failed(format!(
            "{} has had tenants: removing the settings would not remove their containers, networks and ids",
            state.display()
        )));
    }
    let settings = settings.canonicalize().map_err(|error| Failed::doing(settings.display(), error))?;
    for file in ["serve.toml", "agent.toml", "signing-key.pem", "registry-token.pem", "platform-key"] {
        let _ = fs::remove_file(settings.join(file));
    }
    for (file, _) in engine::files(&units::layout("x", "x", true).engine) {
        let _ = fs::remove_file(state.join("engine").join(file));
    }
    claims::release(&settings)
}

fn serve_config(claim: &Claim, pull: SocketAddr, settings: &Path) -> Config {
    Config {
        installation: claim.installation.clone(),
        server: Server::plain(SocketAddr::from(([127, 0, 0, 1], 8080)), pull),
        database: Database::on_socket(Path::new("/run/postgresql")),
        registry: Registry {
            url: "http://127.0.0.1:5000".into(),
            signing_key: settings.join("signing-key.pem"),
            collector: None,
            disk: Some("/var/lib/docker-registry".into()),
        },
        agent: AgentSettings { socket: "/run/bulkhead/agent/agent.sock".into() },
        access: Access::with(settings.join("platform-key"), Path::new(units::AUDIT).join("heads")),
        pools: claim.pools(),
        limits: Limits::default(),
        log: Log::default(),
    }
}

fn free_address() -> Result<SocketAddr, Failed> {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map_err(|error| Failed::doing("no free port", error))
}
