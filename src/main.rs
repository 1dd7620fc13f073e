//! The command line.

use std::io::{IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bulkhead::apps::spec::{AppSpec, Colour, Format, show};
use bulkhead::config::Config;
use bulkhead::ids::TenantName;
use bulkhead::registries::collector;
use bulkhead::standalone::{self, doctor, service, uninstall, units};
use bulkhead::{prober, resolver, startup, telemetry};
use clap::{Parser, Subcommand, ValueEnum};

mod ask;
mod commands;

/// Bulkhead: containers of many tenants on one platform, isolated by construction
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything on this machine: database, registry, container engine, platform
    Up {
        /// Data folder
        #[arg(long, default_value = "/var/lib/bulkhead")]
        data: PathBuf,
        /// Address, on loopback
        #[arg(long, default_value = "127.0.0.1:8080")]
        listen: SocketAddr,
        /// Also onboard a sample tenant and deploy a sample app
        #[arg(long)]
        demo: bool,
    },
    /// Run the platform against an existing database, registry and agent
    Serve {
        /// Settings (TOML)
        #[arg(long)]
        config: PathBuf,
        /// Print the effective settings and exit
        #[arg(long)]
        print_config: bool,
    },
    /// Migrate the database to this version
    Migrate {
        /// Settings (TOML); - for standard input
        #[arg(long)]
        config: PathBuf,
    },
    /// Check an app spec without a platform
    Check {
        /// YAML or JSON file; - for standard input (YAML)
        file: PathBuf,
        /// Output format
        #[arg(short, long, default_value = "text")]
        output: Output,
    },
    /// Show the container that an app spec compiles to (ids, digest and address are examples)
    Render {
        /// YAML or JSON file
        file: PathBuf,
        /// Tenant
        #[arg(long)]
        tenant: TenantName,
        /// Driver
        #[arg(long, default_value = "podman")]
        driver: DriverName,
    },
    /// Check this machine
    Doctor {
        /// Data folder
        #[arg(long, default_value = "/var/lib/bulkhead")]
        data: PathBuf,
        /// Output format
        #[arg(short, long, default_value = "text")]
        output: Output,
    },
    /// Write the files that the systemd units need: users, settings, keys; existing files stay
    Settings {
        /// Folder of the settings
        #[arg(long, default_value = units::SETTINGS)]
        settings: PathBuf,
        /// Folder of the state
        #[arg(long, default_value = units::STATE)]
        state: PathBuf,
        /// Remove them again, unless the installation has run
        #[arg(long)]
        undo: bool,
    },
    /// Write the systemd units into a folder, from the table of processes that `up` runs
    Units {
        /// Folder, such as deploy/systemd or /etc/systemd/system
        folder: PathBuf,
    },
    /// API tokens, as root on the machine
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Print a one-time link that creates an admin's account, as root on the machine: for the first admin, or
    /// if no admin can sign in
    FirstAdmin {
        /// Data folder of `up`
        #[arg(long, default_value = "/var/lib/bulkhead")]
        data: PathBuf,
        /// Settings of `serve`, if there is no such folder
        #[arg(long, conflicts_with = "data")]
        config: Option<PathBuf>,
    },
    /// The audit log
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// Network connections
    Net {
        #[command(subcommand)]
        command: NetCommand,
    },
    /// Answer health checks (started by `up` or its unit)
    #[command(hide = true)]
    Prober {
        /// Socket
        #[arg(long)]
        socket: PathBuf,
    },
    /// List the files on a registry's disk and remove those that `serve` names (runs beside the registry, as
    /// its user)
    #[command(hide = true)]
    Collector {
        /// Socket
        #[arg(long)]
        socket: PathBuf,
        /// The registry's `rootdirectory`
        #[arg(long)]
        registry: PathBuf,
        /// User id of `serve`
        #[arg(long)]
        peer_uid: u32,
    },
    /// Answer names for apps (started by `up` or its unit)
    #[command(hide = true)]
    Resolver {
        /// Socket of the agent
        #[arg(long)]
        agent: PathBuf,
        /// Settings (TOML); optional
        #[arg(long)]
        settings: PathBuf,
    },
    /// Install the platform as a service of this machine (systemd), or upgrade it: run it again with a new
    /// version
    Install {
        /// Data folder, which may be one of `up`; by default the installed one, or /var/lib/bulkhead
        #[arg(long)]
        data: Option<PathBuf>,
        /// Address of a new installation; later, change it in settings.toml of the data folder
        #[arg(long)]
        listen: Option<SocketAddr>,
    },
    /// Prepare a data folder (started by the service's units)
    #[command(hide = true)]
    Prepare {
        /// Data folder
        #[arg(long)]
        data: PathBuf,
        /// Prepare the database instead, once Postgres runs
        #[arg(long)]
        database: bool,
    },
    /// Remove an installation with everything in it
    Uninstall {
        /// Data folder
        #[arg(long, default_value = "/var/lib/bulkhead")]
        data: PathBuf,
        /// The installation's four-letter id
        #[arg(long, default_value = "")]
        confirm: String,
    },
}

#[derive(Subcommand)]
enum NetCommand {
    /// Show whether an app can reach a destination: by the plan, and with --probe by a test. Calls the API,
    /// with the token in BULKHEAD_TOKEN
    CanReach {
        /// TENANT/APP
        app: bulkhead::ids::AppRef,
        /// A name of `connects`, or an IPv4 address
        to: String,
        /// Port of the destination
        port: u16,
        /// UDP instead of TCP
        #[arg(long)]
        udp: bool,
        /// Also test it from within an instance of the app
        #[arg(long)]
        probe: bool,
        /// Address of the platform
        #[arg(long, env = "BULKHEAD_URL", default_value = "http://127.0.0.1:8080")]
        url: String,
        /// Output format
        #[arg(short, long, default_value = "text")]
        output: Output,
    },
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Create a token; it is printed once
    Create {
        /// For the platform, with the role admin
        #[arg(long, conflicts_with_all = ["tenant", "auditor"], required_unless_present_any = ["tenant", "auditor"])]
        admin: bool,
        /// For the platform, with the role auditor
        #[arg(long, conflicts_with = "tenant")]
        auditor: bool,
        /// For one tenant
        #[arg(long)]
        tenant: Option<TenantName>,
        /// Role in the tenant: viewer, deployer, owner
        #[arg(long, default_value = "deployer")]
        role: String,
        /// Name, for the console and the audit log
        #[arg(long)]
        name: String,
        /// Days until it expires
        #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u16).range(1..=365))]
        days: u16,
        /// Data folder of `up`
        #[arg(long, default_value = "/var/lib/bulkhead")]
        data: PathBuf,
        /// Settings of `serve`, if there is no such folder
        #[arg(long, conflicts_with = "data")]
        config: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Verify every row against the chain that seals them, and list changed, removed and inserted rows
    Verify {
        /// Data folder of `up`
        #[arg(long, default_value = "/var/lib/bulkhead")]
        data: PathBuf,
        /// Settings of `serve`, if there is no such folder
        #[arg(long, conflicts_with = "data")]
        config: Option<PathBuf>,
        /// Output format
        #[arg(short, long, default_value = "text")]
        output: Output,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum DriverName {
    Podman,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bulkhead: {error}");
            ExitCode::FAILURE
        }
    }
}

fn block_on<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(work)
}

fn explain(error: &bulkhead::error::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => cause.to_string(),
        None => error.to_string(),
    }
}

fn load(path: &Path) -> Result<Config, String> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(|error| error.to_string())?;
        return Config::parse(&text, &environment).map_err(|error| error.to_string());
    }
    Config::load(path, &environment).map_err(|error| error.to_string())
}

fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn run(command: Command) -> Result<ExitCode, String> {
    match command {
        Command::Up { data, listen, demo } => {
            telemetry::start(&bulkhead::config::Log { level: "warn".into(), ..Default::default() });
            let options = standalone::Options { data, listen, demo };
            block_on(async { standalone::up(options).await.map_err(|error| error.to_string()) })?;
        }
        Command::Serve { config, print_config } => {
            let config = load(&config)?;
            if print_config {
                print(&toml::to_string(&config).map_err(|error| error.to_string())?);
                return Ok(ExitCode::SUCCESS);
            }
            telemetry::start(&config.log);
            telemetry::arm_failpoints();
            actix_web::rt::System::new()
                .block_on(startup::serve(config, telemetry::asked_to_stop()))
                .map_err(|error| explain(&error))?;
        }
        Command::Migrate { config } => {
            let config = load(&config)?;
            block_on(async { startup::migrate(&config).await.map_err(|error| explain(&error)) })?;
            print("the database is at this version");
        }
        Command::Check { file, output } => return check(&file, output),
        Command::Render { file, tenant, driver: DriverName::Podman } => return render(&file, tenant),
        Command::Doctor { data, output } => return Ok(examine(&data, output)),
        Command::Settings { settings, state, undo: true } => {
            standalone::settings::undo(&settings, &state).map_err(|error| error.to_string())?;
        }
        Command::Settings { settings, state, undo: false } => write_settings(&settings, &state)?,
        Command::Units { folder } => {
            for (name, text) in units::units() {
                let path = folder.join(name);
                std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
            }
        }
        Command::Token { command } => commands::create_token(command)?,
        Command::FirstAdmin { data, config } => commands::first_admin(&data, config)?,
        Command::Audit { command: AuditCommand::Verify { data, config, output } } => {
            return commands::verify_audit(&data, config, output);
        }
        Command::Net { command } => return ask::can_reach(command),
        Command::Prober { socket } => {
            block_on(async { prober::serve(&socket).await.map_err(|error| error.to_string()) })?;
        }
        Command::Collector { socket, registry, peer_uid } => {
            telemetry::start(&bulkhead::config::Log::default());
            block_on(async {
                collector::serve(&socket, &registry, peer_uid).await.map_err(|error| error.to_string())
            })?;
        }
        Command::Resolver { agent, settings } => {
            telemetry::start(&bulkhead::config::Log::default());
            let settings = resolver::Settings::load(&settings)?;
            block_on(async { resolver::serve(&agent, &settings).await })?;
        }
        Command::Install { data, listen } => {
            telemetry::start(&bulkhead::config::Log { level: "warn".into(), ..Default::default() });
            block_on(async { service::install(data, listen).await.map_err(|error| error.to_string()) })?;
        }
        Command::Prepare { data, database: false } => {
            service::prepare(&data).map_err(|error| error.to_string())?;
        }
        Command::Prepare { data, database: true } => {
            block_on(async { service::prepare_database(&data).await.map_err(|error| error.to_string()) })?;
        }
        Command::Uninstall { data, confirm } => {
            telemetry::start(&bulkhead::config::Log { level: "warn".into(), ..Default::default() });
            block_on(async {
                uninstall::uninstall(&data, &confirm).await.map_err(|error| error.to_string())
            })?;
            print("removed");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> Result<(Vec<u8>, Format), String> {
    let limit = bulkhead::apps::spec::LIMIT as u64 + 1;
    let mut text = Vec::new();
    let outcome = if file == Path::new("-") {
        std::io::stdin().take(limit).read_to_end(&mut text)
    } else {
        std::fs::File::open(file).and_then(|open| open.take(limit).read_to_end(&mut text))
    };
    outcome.map_err(|error| format!("{}: {error}", file.display()))?;
    let json = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    Ok((text, if json { Format::Json } else { Format::Yaml }))
}

fn check(file: &Path, output: Output) -> Result<ExitCode, String> {
    let (text, format) = read(file)?;
    let result = AppSpec::parse(&text, format);
    let faults = result.as_ref().err().cloned().unwrap_or_default();
    if output == Output::Json {
        let body = serde_json::json!({"ok": faults.is_empty(), "faults": faults});
        print(&serde_json::to_string_pretty(&body).map_err(|error| error.to_string())?);
    } else if let Ok(spec) = &result {
        print(&format!(
            "{}: the spec of {} has no fault; only the platform can check quota, image and names",
            file.display(),
            spec.name()
        ));
    } else {
        let colour = if std::io::stderr().is_terminal() { Colour::Always } else { Colour::Never };
        let shown = show(&String::from_utf8_lossy(&text), &file.display().to_string(), &faults, colour);
        let _ = writeln!(std::io::stderr(), "{shown}{} fault(s)", faults.len());
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(file: &Path, tenant: TenantName) -> Result<ExitCode, String> {
    let (text, format) = read(file)?;
    match AppSpec::parse(&text, format) {
        Ok(spec) => {
            let shown = bulkhead::apps::render_example(&spec, tenant).map_err(|error| explain(&error))?;
            print(&serde_json::to_string_pretty(&shown).map_err(|error| error.to_string())?);
            Ok(ExitCode::SUCCESS)
        }
        Err(_) => check(file, Output::Text),
    }
}

fn examine(data: &Path, output: Output) -> ExitCode {
    let findings = doctor::examine(data, None);
    if output == Output::Json {
        print(&serde_json::to_string_pretty(&findings).unwrap_or_default());
    } else {
        for finding in &findings {
            let mark = match finding.status {
                doctor::Status::Ok => "ok     ",
                doctor::Status::Warning => "warning",
                doctor::Status::Failed => "FAILED ",
            };
            print(&format!("{mark} {:<16} {}", finding.check, finding.finding));
            if !finding.remedy.is_empty() {
                print(&format!("        {:<16} -> {}", "", finding.remedy));
            }
        }
    }
    let bad = findings.iter().any(|finding| finding.status == doctor::Status::Failed);
    if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn write_settings(settings: &Path, state: &Path) -> Result<(), String> {
    let written = standalone::settings::write(settings, state).map_err(|error| error.to_string())?;
    for path in &written.fresh {
        print(&format!("written  {}", path.display()));
    }
    for path in &written.kept {
        print(&format!("kept     {}", path.display()));
    }
    let settings = settings.display();
    print(&format!(
        "\nNext, as root, in this order.\n\n1. The registry (CNCF Distribution). Replace /etc/docker/registry/config.yml as a \
         whole (Debian's default accepts the network and uses another kind of auth):\n\n{}\n   systemctl enable docker-registry && \
         systemctl restart docker-registry\n",
        written.registry
    ));
    print(&format!(
        "2. Postgres. If there is no cluster yet (pg_lsclusters): pg_createcluster 15 main\n   First line of its \
         pg_hba.conf:\n\nlocal bulkhead bulkhead,bulkhead_reconciler peer map=bulkhead\n\n   and at the end of \
         pg_ident.conf:\n\n{}\n   systemctl enable postgresql && systemctl restart postgresql\n   runuser -u postgres -- \
         createdb bulkhead\n   runuser -u postgres -- bulkhead migrate --config - < {settings}/serve.toml\n",
        units::IDENT
    ));
    print(&format!(
        "3. The platform. Review {settings}/serve.toml, then:\n   systemctl enable --now {}\n   bulkhead first-admin \
         --config {settings}/serve.toml",
        units::TARGET
    ));
    Ok(())
}
