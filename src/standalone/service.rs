//! `bulkhead install`: the platform as a systemd service, with the same data folder that `up` uses. Each can
//! take the folder over from the other: stop the units or `up`, then start the other one.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::settings_file::{self, Overlay};
use super::{DataFolder, Failed, claims, doctor, postgres, processes, units, up};
use crate::access;
use crate::config::Config;
use crate::db::{self, Login};
use crate::registries::token::{ISSUER, SERVICE};
use crate::startup;

/// Folder of the machine's systemd units.
const UNITS: &str = "/etc/systemd/system";
/// Debian's group `staff`. Its members may write below /usr/local, so they count as root there.
const STAFF: u32 = 50;
/// Folders that a unit's sandbox hides or replaces.
const HIDDEN: [&str; 5] = ["/tmp", "/var/tmp", "/home", "/root", "/run"];

fn say(text: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// The installation that the units on this machine belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// No units.
    Nothing,
    /// Units of a data folder.
    Folder(PathBuf),
    /// Units for an operator's database and registry (`deploy/systemd`).
    Given,
}

/// Returns the installation that the units on this machine belong to.
#[must_use]
pub fn installed() -> Installed {
    installed_in(Path::new(UNITS))
}

/// Returns whether systemd runs the platform from this data folder.
pub(super) fn serves(data: &Path) -> bool {
    is_of(&installed(), data)
}

fn is_of(installed: &Installed, data: &Path) -> bool {
    let data = data.canonicalize().unwrap_or_else(|_| data.to_owned());
    match installed {
        Installed::Nothing => false,
        Installed::Folder(own) => *own == data,
        Installed::Given => data == Path::new(units::STATE),
    }
}

/// Returns whether a folder holds the state of units for an operator's database and registry.
pub(super) fn is_given(data: &Path) -> bool {
    installed() == Installed::Given && serves(data)
}

/// Returns the engine's socket of a data folder.
pub(super) fn engine_socket(data: &Path) -> PathBuf {
    if is_given(data) {
        units::layout("", "", true).engine.socket
    } else {
        data.join("run/engine/podman.sock")
    }
}

/// Returns the folder with the settings of a data folder's parts.
pub(super) fn settings_folder(data: &Path) -> PathBuf {
    if is_given(data) { units::SETTINGS.into() } else { data.to_owned() }
}

fn installed_in(folder: &Path) -> Installed {
    let Ok(text) = fs::read_to_string(folder.join(units::TARGET)) else { return Installed::Nothing };
    let data = text.lines().find_map(|line| line.strip_prefix(units::DATA_MARK));
    data.map_or(Installed::Given, |data| Installed::Folder(data.into()))
}

/// Returns the names of this platform's units in a folder.
pub(super) fn unit_files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("bulkhead-") && name.ends_with(".service"))
        .collect();
    names.sort();
    names
}

/// Returns the units on this machine, without the target.
pub(super) fn own_units() -> Vec<String> {
    unit_files(Path::new(UNITS))
}

fn systemctl(args: &[&str]) -> Result<(), Failed> {
    let done = Command::new("systemctl")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failed::doing("systemctl", error))?;
    if done.status.success() {
        return Ok(());
    }
    Err(Failed::doing(format!("systemctl {}", args.join(" ")), String::from_utf8_lossy(&done.stderr).trim()))
}

/// Refuses a folder that the units could not use.
fn require_folder(data: &Path) -> Result<(), Failed> {
    if let Some(hidden) = HIDDEN.iter().find(|hidden| data.starts_with(hidden)) {
        return Err(Failed(format!(
            "{} is below {hidden}, which the service's sandbox hides: choose a --data such as /var/lib/bulkhead",
            data.display()
        )));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.".contains(c);
    if !data.is_absolute() || !data.to_str().is_some_and(|text| text.chars().all(plain)) {
        return Err(Failed(format!(
            "{} is not valid in a unit file: choose a --data that starts with / and has letters, digits, - _ and . only",
            data.display()
        )));
    }
    Ok(())
}

/// Refuses a program that a user other than root can replace: the units run it as root. Also refuses a
/// program below a folder that the sandbox hides: it would not start.
fn require_program(program: &Path) -> Result<(), Failed> {
    let remedy = "run deploy/install, or install the package: both put it where only root can write";
    if let Some(hidden) = HIDDEN.iter().find(|hidden| program.starts_with(hidden)) {
        return Err(Failed(format!(
            "{} is below {hidden}, which the service's sandbox hides: {remedy}",
            program.display()
        )));
    }
    let both = [program.to_owned(), program.with_file_name("bulkhead-agent")];
    for place in both.iter().flat_map(|program| program.ancestors()) {
        let seen = fs::symlink_metadata(place).map_err(|error| Failed::doing(place.display(), error))?;
        let group = seen.mode() & 0o020 != 0 && ![0, STAFF].contains(&seen.gid());
        let others = seen.mode() & 0o002 != 0;
        if seen.uid() != 0 || (group || others) && seen.mode() & 0o1000 == 0 {
            return Err(Failed(format!("a user other than root can change {}: {remedy}", place.display())));
        }
    }
    Ok(())
}

/// Returns the data folder: the requested one, else the installed one, else the default.
fn choose(asked: Option<PathBuf>, installed: Installed) -> Result<PathBuf, Failed> {
    match (asked, installed) {
        (_, Installed::Given) => Err(Failed(format!(
            "{UNITS} has units for a database and registry of your own: upgrade them with deploy/systemd/install, or \
             remove that installation first (bulkhead uninstall)"
        ))),
        (Some(asked), Installed::Folder(own)) if asked != own => Err(Failed(format!(
            "the service of this machine uses {}: leave --data out, or uninstall that installation first",
            own.display()
        ))),
        (_, Installed::Folder(own)) => Ok(own),
        (asked, Installed::Nothing) => Ok(asked.unwrap_or_else(|| units::STATE.into())),
    }
}

fn program() -> Result<PathBuf, Failed> {
    std::env::current_exe().map_err(|error| Failed::doing("the path of this program is not known", error))
}

/// Installs or upgrades the service: folder, settings, units, database. Then starts it.
pub async fn install(asked: Option<PathBuf>, listen: Option<SocketAddr>) -> Result<(), Failed> {
    let data = choose(asked, installed())?;
    require_folder(&data)?;
    require_program(&program()?)?;
    if !Path::new("/run/systemd/system").exists() {
        return Err(Failed(
            "systemd does not run on this machine: use `bulkhead up`, which does not need it".into(),
        ));
    }
    let findings = doctor::examine(&data, None);
    let bad: Vec<String> = findings
        .iter()
        .filter(|finding| finding.status == doctor::Status::Failed)
        .map(|finding| format!("  {}: {}\n    {}", finding.check, finding.finding, finding.remedy))
        .collect();
    if !bad.is_empty() {
        return Err(Failed(format!("this machine is not ready:\n{}", bad.join("\n"))));
    }
    for finding in findings.iter().filter(|finding| finding.status == doctor::Status::Warning) {
        say(format!("note: {}: {}\n  {}", finding.check, finding.finding, finding.remedy));
    }
    if installed() != Installed::Nothing {
        say("stopping the platform; apps keep running");
        stop()?;
    }
    let folder = DataFolder::open(&data, Some(listen.unwrap_or(settings_file::LISTEN)))?;
    write_listen(&folder, listen)?;
    let config = make_ready(&folder)?;
    write_units(&folder)?;
    let id = folder.claim.installation.clone();
    // The units take the lock themselves.
    drop(folder);
    say(format!("installation {id} in {}; starting", data.display()));
    systemctl(&["enable", "--quiet", units::TARGET])?;
    systemctl(&["start", units::TARGET])?;
    require_active()?;
    tell(&data, &config, id.as_str()).await
}

/// Writes the first settings of a folder. Refuses a requested address that differs from the existing
/// settings.
fn write_listen(folder: &DataFolder, listen: Option<SocketAddr>) -> Result<(), Failed> {
    let path = settings_file::place(&folder.path);
    match (fs::read_to_string(&path), listen) {
        (Err(_), listen) => {
            let listen = listen.unwrap_or(settings_file::LISTEN);
            let text = format!(
                "# Settings that differ from the defaults. Each start creates `serve.toml` beside this file from it.\n\
                 # After a change: systemctl restart {}\n\n[server]\nlisten = \"{listen}\"\n",
                units::TARGET
            );
            super::folder::write_file(&path, &text, (0, folder.serve.gid), 0o640)
        }
        (Ok(text), Some(listen)) if !text.contains(&format!("\"{listen}\"")) => Err(Failed(format!(
            "{} sets the address of this folder: write listen = \"{listen}\" into its [server] and omit --listen",
            path.display()
        ))),
        (Ok(_), _) => Ok(()),
    }
}

/// `bulkhead prepare`: the work of the first unit at each start. Fails while a foreground `up` has the
/// folder.
pub fn prepare(data: &Path) -> Result<(), Failed> {
    if !DataFolder::exists(data) {
        return Err(Failed(format!("{} is not a data folder of Bulkhead", data.display())));
    }
    let folder = DataFolder::open(data, None)?;
    make_ready(&folder).map(drop)
}

fn make_ready(folder: &DataFolder) -> Result<Config, Failed> {
    let overlay = Overlay::load(&folder.path)?;
    let (text, config) = overlay.over(folder)?;
    for process in table(folder, &overlay)?.iter().rev() {
        process.end_leftover(&folder.path);
    }
    up::write_settings(folder, &text)?;
    if !overlay.database() {
        let (major, bin) = postgres::programs().ok_or_else(|| Failed("Postgres is not installed".into()))?;
        postgres::ensure(folder, major, &bin)?;
    }
    up::remove_sockets(folder);
    Ok(config)
}

/// `bulkhead prepare --database`: migrates the database before `serve` starts.
pub async fn prepare_database(data: &Path) -> Result<(), Failed> {
    if !Overlay::load(data)?.database() {
        postgres::prepare(data).await?;
    }
    let config = Config::load(&data.join("serve.toml"), &[]).map_err(|error| Failed(error.to_string()))?;
    startup::migrate(&config).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        Failed(format!("the database cannot be migrated to this version: {error} {cause}"))
    })
}

fn layout(folder: &DataFolder, overlay: &Overlay) -> Result<processes::Layout, Failed> {
    let bin = postgres::programs().map(|(_, bin)| bin).unwrap_or_default();
    let binaries = program()?.parent().map(Path::to_path_buf).unwrap_or_default();
    let mut layout = folder.layout(&bin, &binaries);
    // systemd creates a cgroup for each unit.
    layout.engine_cgroup = None;
    if let Some(own) = &mut layout.own {
        own.has_database = !overlay.database();
        own.has_registry = !overlay.registry();
    }
    Ok(layout)
}

fn table(folder: &DataFolder, overlay: &Overlay) -> Result<Vec<processes::Process>, Failed> {
    Ok(processes::table(&layout(folder, overlay)?))
}

fn write_units(folder: &DataFolder) -> Result<(), Failed> {
    let overlay = Overlay::load(&folder.path)?;
    let fresh = units::units_of(&layout(folder, &overlay)?, &folder.path, &program()?);
    for (name, text) in &fresh {
        super::folder::write_file(&Path::new(UNITS).join(name), text, (0, 0), 0o644)?;
    }
    // Units that this version or these settings no longer have.
    for name in own_units().iter().filter(|name| !fresh.iter().any(|(fresh, _)| fresh == *name)) {
        let _ = systemctl(&["disable", "--quiet", "--now", name]);
        let _ = fs::remove_file(Path::new(UNITS).join(name));
    }
    systemctl(&["daemon-reload"])
}

/// Returns name and state of each unit that is not active, from the output of `systemctl show`.
fn inactive(text: &str) -> Vec<(String, String)> {
    let value = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().to_owned()
    };
    text.split("\n\n")
        .filter(|block| !block.trim().is_empty())
        .map(|block| (value(block, "Id"), value(block, "ActiveState")))
        .filter(|(_, state)| state != "active")
        .collect()
}

/// Returns the platform's units that are not active, each with its state.
pub(super) fn not_active() -> Result<Vec<(String, String)>, Failed> {
    let units = own_units();
    let done = Command::new("systemctl")
        .args(["show", "--property=Id,ActiveState"])
        .args(&units)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failed::doing("systemctl", error))?;
    Ok(inactive(&String::from_utf8_lossy(&done.stdout)))
}

fn require_active() -> Result<(), Failed> {
    let bad = not_active()?;
    let Some((first, _)) = bad.first() else { return Ok(()) };
    let list: Vec<String> = bad.iter().map(|(name, state)| format!("{name} is {state}")).collect();
    Err(Failed(format!("{}. See journalctl -n 20 -u {first}", list.join(", "))))
}

/// Prints the platform's address and, while it has no admin, the link for the first admin.
async fn tell(data: &Path, config: &Config, id: &str) -> Result<(), Failed> {
    let scheme = if config.server.tls_certificate.is_some() { "https" } else { "http" };
    let address =
        config.server.external_url.clone().unwrap_or_else(|| format!("{scheme}://{}", config.server.listen));
    say(format!("Bulkhead is at {address}. It starts with the machine."));
    let login = db::options(&config.database, Login::Runtime).map_err(|error| Failed(error.to_string()))?;
    let pool = db::pool(login, 2);
    let failed = |error: crate::error::Error| Failed(error.to_string());
    let mut conn = pool.acquire().await.map_err(|error| Failed::doing("the database", error))?;
    if !access::has_admin(&mut conn).await.map_err(failed)? {
        let link = format!("{address}{}", access::first_admin::make_link(&pool).await.map_err(failed)?);
        let file = data.join("secrets/first-admin-link");
        super::folder::write_file(&file, &format!("{link}\n"), (0, 0), 0o400)?;
        say(format!("First admin (works once, for a day): {link}\nIt is also in {}", file.display()));
    }
    drop(conn);
    pool.close().await;
    say(format!("Settings: {}. Logs: journalctl -u 'bulkhead-*'", settings_file::place(data).display()));
    if Overlay::load(data)?.registry() {
        say(format!(
            "Set in your registry: auth.token: realm {address}/auth/token, service {SERVICE}, issuer {ISSUER}, \
             rootcertbundle {}; storage.delete.enabled: true; http.relativeurls: true",
            data.join("registry-token.pem").display()
        ));
    }
    say(format!(
        "Upgrade: install the new version and run this again. Remove: bulkhead uninstall --confirm {id}"
    ));
    Ok(())
}

/// Stops all units and waits for each: stopping the target alone returns while its parts still run.
fn stop() -> Result<(), Failed> {
    let units = own_units();
    let mut args = vec!["stop", units::TARGET];
    args.extend(units.iter().map(String::as_str));
    systemctl(&args)
}

/// Returns whether the service of a folder is stopping; its lock is free soon.
pub(super) fn is_stopping(data: &Path) -> bool {
    serves(data)
        && Command::new("systemctl")
            .args(["is-active", "--quiet", units::TARGET])
            .stdin(Stdio::null())
            .status()
            .is_ok_and(|status| !status.success())
}

/// Opens the folder of an installation for removal. Checks the confirmation before it stops the units.
pub(super) fn open_to_remove(data: &Path, confirm: &str) -> Result<DataFolder, Failed> {
    if let Some(id) = claims::installation_of(data) {
        if id.as_str() != confirm {
            return Err(Failed(format!(
                "this removes the installation {id} with all its tenants, apps and images: confirm with --confirm {id}"
            )));
        }
        remove(data)?;
    }
    DataFolder::open(data, None)
}

/// Stops and removes the units of a data folder, if it has any.
fn remove(data: &Path) -> Result<(), Failed> {
    let data = data.canonicalize().unwrap_or_else(|_| data.to_owned());
    if installed() == Installed::Folder(data) { remove_units() } else { Ok(()) }
}

/// Stops and removes all units of this machine.
pub(super) fn remove_units() -> Result<(), Failed> {
    systemctl(&["disable", "--quiet", units::TARGET])?;
    stop()?;
    for name in own_units() {
        let _ = fs::remove_file(Path::new(UNITS).join(name));
    }
    let _ = fs::remove_file(Path::new(UNITS).join(units::TARGET));
    systemctl(&["daemon-reload"])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_program_that_others_can_exchange_is_refused() {
        let folder = tempfile::tempdir_in("/opt").unwrap();
        let program = folder.path().join("bulkhead");
        fs::write(&program, "").unwrap();
        fs::write(folder.path().join("bulkhead-agent"), "").unwrap();
        assert!(require_program(&program).is_ok());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(require_program(&program).is_err());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(folder.path(), Some(1000), None).unwrap();
        assert!(require_program(&program).is_err(), "its folder is another user's");
        assert!(require_program(Path::new("/home/somebody/target/release/bulkhead")).is_err());
    }

    #[test]
    fn units_of_a_folder_are_told_from_those_for_given_parts() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(installed_in(folder.path()), Installed::Nothing);
        let target = folder.path().join(units::TARGET);
        fs::write(&target, "# Data folder: /srv/bulkhead\n[Unit]\n").unwrap();
        assert_eq!(installed_in(folder.path()), Installed::Folder("/srv/bulkhead".into()));
        fs::write(&target, "[Unit]\nDescription=Bulkhead\n").unwrap();
        assert_eq!(installed_in(folder.path()), Installed::Given);
        for name in ["bulkhead-serve.service", "bulkhead-agent.service", "other.service", "bulkhead-x.timer"]
        {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(unit_files(folder.path()), ["bulkhead-agent.service", "bulkhead-serve.service"]);
    }

    #[test]
    fn a_folder_of_up_is_not_the_service_s() {
        let own = Installed::Folder("/srv/b".into());
        assert!(is_of(&own, Path::new("/srv/b")) && !is_of(&own, Path::new("/var/lib/bulkhead")));
        assert!(is_of(&Installed::Given, Path::new("/var/lib/bulkhead")));
        assert!(!is_of(&Installed::Given, Path::new("/srv/b")));
        assert!(!is_of(&Installed::Nothing, Path::new("/var/lib/bulkhead")));
    }

    #[test]
    fn one_folder_is_the_service_of_a_machine() {
        let own = || Installed::Folder("/var/lib/bulkhead".into());
        assert_eq!(choose(None, Installed::Nothing).unwrap(), Path::new("/var/lib/bulkhead"));
        assert_eq!(choose(Some("/srv/b".into()), Installed::Nothing).unwrap(), Path::new("/srv/b"));
        assert_eq!(choose(None, own()).unwrap(), Path::new("/var/lib/bulkhead"));
        assert!(choose(Some("/srv/b".into()), own()).unwrap_err().0.contains("uninstall"));
        assert!(choose(None, Installed::Given).unwrap_err().0.contains("deploy/systemd/install"));
    }

    #[test]
    fn folders_that_a_unit_could_not_serve_are_refused() {
        for good in ["/var/lib/bulkhead", "/srv/b_1.x", "/tmpfiles"] {
            assert!(require_folder(Path::new(good)).is_ok(), "{good}");
        }
        for bad in ["/tmp/x", "/home/ada/b", "/root", "relative", "/srv/a b", "/srv/%h", "/srv/$x"] {
            assert!(require_folder(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_unit_that_is_not_active_is_named_with_its_state() {
        let text = "Id=bulkhead-agent.service\nActiveState=active\n\nId=bulkhead-serve.service\nActiveState=activating\n";
        assert_eq!(inactive(text), [("bulkhead-serve.service".to_owned(), "activating".to_owned())]);
        assert!(inactive("").is_empty());
    }
}
