//! `bulkhead-agent`: the privileged agent on a machine with Podman. It contains no web server.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead::config::Log;
use bulkhead::driver::agent::config::AgentConfig;
use bulkhead::driver::podman::{pull, rootfs};
use clap::Parser;

/// The privileged agent of Bulkhead: runs tenants' containers and isolates them from each other.
#[derive(Parser)]
#[command(version)]
struct AgentArguments {
    /// Settings (TOML), owned by root.
    #[arg(long)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == pull::ENTER) {
        return pull::enter(arguments);
    }
    // This mode inspects one image in its own mount namespace and exits. It reads no settings.
    if std::env::args_os().skip(1).eq([rootfs::ARGUMENT]) {
        return rootfs::answer();
    }
    let arguments = AgentArguments::parse();
    bulkhead::telemetry::start(&Log::default());
    bulkhead::telemetry::arm_failpoints();
    let outcome = AgentConfig::load(&arguments.config).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        runtime.block_on(bulkhead::driver::agent::run(config, bulkhead::telemetry::asked_to_stop()))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "the agent stops after an error");
            ExitCode::FAILURE
        }
    }
}
