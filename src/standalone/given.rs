//! Reverts `deploy/systemd/install`: removes units, users, settings, containers and state. The database and
//! the registry belong to the operator and stay.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use super::uninstall::{EngineParts, discard_user, remove_containers, unmount_below};
use super::{Failed, claims, service, units};
use crate::driver::agent::config::AgentConfig;
use crate::driver::podman::firewall::kernel;

/// Files that `bulkhead settings` writes.
const SETTINGS: [&str; 6] =
    ["serve.toml", "agent.toml", "signing-key.pem", "registry-token.pem", "platform-key", "resolver.toml"];

/// Removes the installation. `confirm` is its four-letter id. Returns what the operator must remove.
pub(super) async fn uninstall(confirm: &str) -> Result<String, Failed> {
    let (settings, state) = (Path::new(units::SETTINGS), Path::new(units::STATE));
    let agent = AgentConfig::load(&settings.join("agent.toml")).map_err(Failed)?;
    let id = agent.installation.as_str();
    if confirm != id {
        return Err(Failed(format!(
            "this removes the installation {id} with all its tenants and apps: confirm with --confirm {id}"
        )));
    }
    service::remove_units()?;
    let mut layout = units::layout(&agent.registry_name, &agent.pull_host, super::doctor::may_raise_limits());
    layout.engine.root.clone_from(&agent.engine_storage);
    // The folder of the engine's socket was removed with the unit.
    if let Some(folder) = layout.engine.socket.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| Failed::doing(folder.display(), error))?;
    }
    let parts = EngineParts { settings: &layout.engine, id, group: None, below: state };
    remove_containers(&parts).await?;
    kernel::remove(&agent.table()).await;
    unmount_below(&layout.engine.run);
    let _ = std::fs::remove_dir_all(&layout.engine.run);
    let _ = std::fs::remove_dir_all("/run/bulkhead");
    for user in [units::SERVE, units::PROBER, units::RESOLVER] {
        discard_user(user);
    }
    claims::release(settings)?;
    for folder in ["agent", "engine", "audit"] {
        let path = state.join(folder);
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(|error| Failed::doing(path.display(), error))?;
        }
    }
    for file in SETTINGS {
        let _ = std::fs::remove_file(settings.join(file));
    }
    // These fail if the operator has own files in the folder; then the folder stays.
    let _ = std::fs::remove_dir(state);
    let _ = std::fs::remove_dir(settings);
    Ok("not removed: the database (runuser -u postgres -- dropdb bulkhead) and the registry with its images"
        .into())
}
