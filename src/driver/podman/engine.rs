//! The engine of an installation, with its own storage, settings and socket. The facts are those of Podman 4.3 in
//! Debian 12.

use std::path::{Path, PathBuf};

use super::seccomp;

/// The runtime that starts containers. Never crun: it takes instructions from annotations (`run.oci.*`: a host file
/// to write to, another system call filter), and the engine copies an image's annotations to its containers.
pub const RUNTIME: &str = "runc";

/// Paths and addresses of an engine, and the limits of its machine.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Folder of storage and settings.
    pub root: PathBuf,
    /// Folder of state that ends with a reboot.
    pub run: PathBuf,
    /// Socket of the API.
    pub socket: PathBuf,
    /// Name of the registry in the engine.
    pub registry_name: String,
    /// Address behind that name: Bulkhead's listener for pulls.
    pub pull_host: String,
    /// Whether this process can raise limits above its own (`CAP_SYS_RESOURCE`).
    pub may_raise_limits: bool,
}

impl EngineSettings {
    fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// Returns the engine's own files: name within the folder, and text.
#[must_use]
pub fn files(settings: &EngineSettings) -> Vec<(&'static str, String)> {
    // Without CAP_SYS_RESOURCE, the distribution's default limits cannot be set at all.
    let limits = if settings.may_raise_limits {
        "\"nofile=65536:65536\", \"nproc=4096:4096\""
    } else {
        "\"nofile=1024:1024\", \"nproc=1024:1024\""
    };
    // Instances write no core files; locked memory and message queues are small.
    let limits = format!(
        "default_ulimits = [{limits}, \"core=0:0\", \"memlock=65536:65536\", \"msgqueue=262144:262144\"]"
    );
    let containers = format!(
        "[containers]\n{limits}\nseccomp_profile = \"{filter}\"\nbase_hosts_file = \"none\"\nlog_driver = \"k8s-file\"\nhttp_proxy = false\n\
         init = false\nprivileged = false\ndns_servers = []\n\n\
         [engine]\nruntime = \"{RUNTIME}\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n\
         image_parallel_copies = 2\nnetwork_cmd_path = \"\"\n\n\
         [network]\nnetwork_backend = \"netavark\"\nnetwork_config_dir = \"{networks}\"\n\
         default_subnet = \"192.0.2.0/28\"\ndefault_subnet_pools = [{{base = \"192.0.2.0/24\", size = 28}}]\n",
        filter = settings.file(seccomp::FILE).display(),
        networks = settings.file("networks").display(),
    );
    let storage = format!(
        "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
        settings.file("storage").display(),
        settings.run.display()
    );
    let registries = format!(
        "unqualified-search-registries = []\nshort-name-mode = \"enforcing\"\n\n[[registry]]\nprefix = \"{}\"\n\
         location = \"{}\"\ninsecure = true\n",
        settings.registry_name, settings.pull_host
    );
    let policy = "{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}\n".to_owned();
    vec![
        ("containers.conf", containers),
        ("storage.conf", storage),
        ("registries.conf", registries),
        ("policy.json", policy),
        (seccomp::FILE, seccomp::PROFILE.to_owned()),
    ]
}

/// Returns the command that serves the API: program, arguments, environment.
#[must_use]
pub fn command(settings: &EngineSettings) -> (&'static str, Vec<String>, Vec<(String, String)>) {
    let (program, mut args, env) = client(settings);
    let socket = format!("unix://{}", settings.socket.display());
    args.extend(["system", "service", "--time", "0", &socket].map(ToString::to_string));
    (program, args, env)
}

/// Returns the command line of the same engine, without a subcommand: program, arguments, environment.
#[must_use]
pub fn client(settings: &EngineSettings) -> (&'static str, Vec<String>, Vec<(String, String)>) {
    let show = |path: &Path| path.display().to_string();
    let args = [
        "--root",
        &show(&settings.file("storage")),
        "--runroot",
        &show(&settings.run),
        // The engine's own marker of a reboot. If two engines shared it, only one would notice the reboot.
        "--tmpdir",
        &show(&settings.run.join("engine")),
        "--runtime",
        RUNTIME,
        "--cgroup-manager",
        "cgroupfs",
        "--network-config-dir",
        &show(&settings.file("networks")),
        "--storage-driver",
        "overlay",
        "--log-level",
        "warn",
    ]
    .iter()
    .map(ToString::to_string)
    .collect();
    let env = [
        ("CONTAINERS_CONF", settings.file("containers.conf")),
        ("CONTAINERS_STORAGE_CONF", settings.file("storage.conf")),
        ("CONTAINERS_REGISTRIES_CONF", settings.file("registries.conf")),
    ]
    .into_iter()
    .map(|(name, path)| (name.to_owned(), show(&path)))
    .collect();
    ("podman", args, env)
}
