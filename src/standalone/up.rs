//! `bulkhead up`: checks the machine, creates missing parts, starts all processes in order, prints the
//! address, and stops them in reverse order. Tenants' containers keep running.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::processes::{self, SupervisedProcess};
use super::{DataFolder, Failed, demo, doctor, doors, postgres, service, units};
use crate::access;
use crate::db::{self, Login};
use crate::driver::podman::engine;
use crate::registries::reach;
use crate::registries::token::{ISSUER, SERVICE};
use crate::{startup, telemetry};

/// Arguments of `up`.
#[derive(Debug, Clone)]
pub struct Options {
    /// Data folder.
    pub data: PathBuf,
    /// Address.
    pub listen: SocketAddr,
    /// Whether to onboard a sample tenant and deploy a sample app.
    pub demo: bool,
}

fn say(text: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

struct RunningProcesses(Vec<SupervisedProcess>);

impl RunningProcesses {
    async fn stop(self) {
        for kept in self.0.into_iter().rev() {
            kept.stop().await;
        }
    }
}

/// Runs everything until Ctrl-C or SIGTERM.
pub async fn up(options: Options) -> Result<(), Failed> {
    let findings = doctor::examine(&options.data, Some(options.listen));
    let bad: Vec<_> = findings.iter().filter(|f| f.status == doctor::Status::Failed).collect();
    if !bad.is_empty() {
        let text: Vec<String> =
            bad.iter().map(|f| format!("  {}: {}\n    {}", f.check, f.finding, f.remedy)).collect();
        return Err(Failed(format!("this machine is not ready:\n{}", text.join("\n"))));
    }
    for finding in findings.iter().filter(|f| f.status == doctor::Status::Warning) {
        say(format!("note: {}: {}", finding.check, finding.finding));
    }
    let folder = DataFolder::open(&options.data, Some(options.listen))?;
    let (major, bin) = postgres::programs().ok_or_else(|| Failed("Postgres is not installed".into()))?;
    say(format!("installation {} in {}", folder.claim.installation, folder.path.display()));
    if service::installed() == service::Installed::Folder(folder.path.clone()) {
        say(format!(
            "note: the installed service uses this folder too, and starts at the next boot of the machine (systemctl \
             disable {} prevents that)",
            units::TARGET
        ));
    }
    let config = folder.config(options.listen);
    let serve = toml::to_string(&config).map_err(|error| Failed(error.to_string()))?;
    write_settings(&folder, &serve)?;
    let binaries = std::env::current_exe()
        .ok()
        .and_then(|path| path.parent().map(Path::to_path_buf))
        .ok_or_else(|| Failed("the path of this program is not known".into()))?;
    let table = processes::table(&folder.layout(&bin, &binaries));
    for process in table.iter().rev() {
        process.end_leftover(&folder.path);
    }
    remove_sockets(&folder);
    doors::require_free(&folder, options.listen)?;
    postgres::ensure(&folder, major, &bin)?;
    let mut running = RunningProcesses(Vec::new());
    let stop = telemetry::asked_to_stop();
    tokio::pin!(stop);
    let outcome = tokio::select! {
        outcome = start(&folder, &options, table, &mut running) => outcome,
        () = &mut stop => Err(Failed("stopped before everything was up".into())),
    };
    if let Err(error) = outcome {
        running.stop().await;
        return Err(error);
    }
    tokio::select! {
        () = &mut stop => {}
        () = doors::watch(&folder, options.listen) => {}
    }
    say("stopping; tenants' containers keep running");
    running.stop().await;
    say("stopped");
    Ok(())
}

/// Removes sockets of an earlier run: a leftover socket would look like a ready process.
pub(super) fn remove_sockets(folder: &DataFolder) {
    for socket in [
        "engine/podman.sock",
        "prober/prober.sock",
        "agent/agent.sock",
        "registry/registry.sock",
        "registry/collector.sock",
    ] {
        let _ = std::fs::remove_file(folder.path.join("run").join(socket));
    }
}

/// Writes the settings of all parts; the caller provides those of `serve`.
pub(super) fn write_settings(folder: &DataFolder, serve: &str) -> Result<(), Failed> {
    let toml = |text: Result<String, toml::ser::Error>| text.map_err(|error| Failed(error.to_string()));
    folder.write("serve.toml", serve, (0, folder.serve.gid), 0o440)?;
    let mut agent = folder.agent_config();
    agent.keep_from(&folder.path.join("agent.toml")).map_err(Failed)?;
    let agent = toml(toml::to_string(&agent))?;
    folder.write("agent.toml", &agent, (0, 0), 0o400)?;
    for (name, text) in engine::files(&folder.engine()) {
        folder.write(&format!("engine/{name}"), &text, (0, 0), 0o400)?;
    }
    let registry = format!(
        "version: 0.1\nlog:\n  level: warn\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
         rootdirectory: {root}/data\n  delete:\n    enabled: true\n  maintenance:\n    uploadpurging:\n      \
         enabled: true\n      age: 1h\n      interval: 1h\n      dryrun: false\nhttp:\n  net: unix\n  addr: {socket}\n  \
         relativeurls: true\n  secret: {secret}\nauth:\n  token:\n    realm: http://127.0.0.1/auth/token\n    \
         service: {SERVICE}\n    issuer: {ISSUER}\n    rootcertbundle: {certificate}\n",
        root = folder.path.join("registry").display(),
        certificate = folder.path.join("registry-token.pem").display(),
        socket = folder.registry_socket().display(),
        secret = http_secret(folder)?,
    );
    folder.write("registry.yml", &registry, (0, folder.registry.gid), 0o440)
}

/// Returns the secret that signs the registry's upload states. It is created once: uploads survive a restart.
fn http_secret(folder: &DataFolder) -> Result<String, Failed> {
    let path = folder.path.join("secrets/registry-http-secret");
    if let Ok(text) = std::fs::read_to_string(&path) {
        return Ok(text.trim().to_owned());
    }
    let secret = access::credentials::Secret::generate("");
    folder.write("secrets/registry-http-secret", secret.expose(), (0, 0), 0o400)?;
    Ok(secret.expose().to_owned())
}

async fn start(
    folder: &DataFolder,
    options: &Options,
    table: Vec<processes::Process>,
    running: &mut RunningProcesses,
) -> Result<(), Failed> {
    for process in table {
        let name = process.name;
        let begun = std::time::Instant::now();
        running.0.push(SupervisedProcess::start(process, &folder.path)?);
        ready(folder, options, name).await?;
        say(format!("  {name:<9} ready after {} ms", begun.elapsed().as_millis()));
    }
    let config = folder.config(options.listen);
    let login = db::options(&config.database, Login::Runtime).map_err(|error| Failed(error.to_string()))?;
    let pool = db::pool(login, 2);
    let mut conn = pool.acquire().await.map_err(|error| Failed::doing("the database", error))?;
    say(format!("\nBulkhead is at http://{}", options.listen));
    let failed = |error: crate::error::Error| Failed(error.to_string());
    if !access::has_admin(&mut conn).await.map_err(failed)? {
        let path = access::first_admin::make_link(&pool).await.map_err(failed)?;
        let address = format!("http://{}{path}", options.listen);
        folder.write("secrets/first-admin-link", &format!("{address}\n"), (0, 0), 0o400)?;
        say(format!("First admin (works once, for a day): {address}"));
        say(format!("It is also in {}", folder.path.join("secrets/first-admin-link").display()));
    }
    drop(conn);
    if options.demo {
        demo::run(folder, options.listen, &pool).await?;
    }
    pool.close().await;
    say("\nCtrl-C stops the platform; apps keep running.");
    Ok(())
}

/// Waits until a process is ready.
async fn ready(folder: &DataFolder, options: &Options, name: &str) -> Result<(), Failed> {
    match name {
        "postgres" => {
            postgres::prepare(&folder.path).await?;
            let config = folder.config(options.listen);
            startup::migrate(&config).await.map_err(|error| {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                Failed(format!("the database cannot be migrated to this version: {error} {cause}"))
            })?;
            Ok(())
        }
        "registry" => wait_http(folder, name, &folder.registry_url(), "/v2/", 401).await,
        "collector" => {
            wait_for(folder, name, || folder.path.join("run/registry/collector.sock").exists()).await
        }
        "engine" => wait_for(folder, name, || folder.path.join("run/engine/podman.sock").exists()).await,
        "prober" => wait_for(folder, name, || folder.path.join("run/prober/prober.sock").exists()).await,
        "agent" => wait_for(folder, name, || folder.path.join("run/agent/agent.sock").exists()).await,
        // Clients of the resolver retry, so nothing waits for it.
        "resolver" => Ok(()),
        _ => {
            // Nothing is sent to a port until the kernel confirms that `serve` owns it.
            for door in [folder.pull_address(), options.listen] {
                wait_for(folder, name, || doors::is_served(folder, door)).await?;
            }
            wait_http(folder, name, &format!("http://{}", options.listen), "/readyz", 200).await
        }
    }
}

fn not_ready(folder: &DataFolder, name: &str) -> Failed {
    let log = folder.path.join(format!("log/{name}.log"));
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let last: Vec<&str> = text.lines().rev().take(5).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    Failed(format!("{name} does not start. The end of {}:\n{}", log.display(), last.join("\n")))
}

async fn wait_for(folder: &DataFolder, name: &str, there: impl Fn() -> bool) -> Result<(), Failed> {
    for _ in 0..1200 {
        if there() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(not_ready(folder, name))
}

async fn wait_http(
    folder: &DataFolder,
    name: &str,
    url: &str,
    path: &str,
    status: u16,
) -> Result<(), Failed> {
    let (client, base) = reach(url);
    let client = client.build().map_err(|error| Failed(error.to_string()))?;
    for _ in 0..1200 {
        let answer = client.get(format!("{base}{path}")).timeout(Duration::from_secs(2)).send().await;
        if answer.is_ok_and(|answer| answer.status().as_u16() == status) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(not_ready(folder, name))
}
