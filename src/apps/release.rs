//! A release: a spec and the digest of its image, immutable. A rollback makes a new release.

use serde_json::Value;
use time::OffsetDateTime;

use super::spec::AppSpec;
use crate::driver::workload::{IdRange, InsideUser, Update, Workload, WorkloadImage};
use crate::error::Error;
use crate::ids::{AppId, AppName, Digest, RepositoryPath, Tag, TenantName};

/// A release.
#[derive(Debug, Clone)]
pub struct Release {
    /// Its number within the app.
    pub revision: i64,
    /// The spec as it was accepted.
    pub spec: Value,
    /// Repository of the image.
    pub repository: RepositoryPath,
    /// Tag from the spec; none when the spec names a digest.
    pub tag: Option<Tag>,
    /// Digest that the tag or the spec resolved to: an index, or the manifest itself.
    pub index_digest: Digest,
    /// Digest of the manifest that runs.
    pub digest: Digest,
    /// User inside the container.
    pub user: InsideUser,
    /// Its supplementary groups inside the container.
    pub groups: Vec<u16>,
    /// Warnings of the image preflight.
    pub warnings: Value,
    /// The revision that this rollback restores.
    pub rolled_back_to: Option<i64>,
    /// Account that made the release.
    pub actor: String,
    /// When.
    pub created_at: OffsetDateTime,
}

/// Facts about an app from the database that complete its workload.
#[derive(Debug)]
pub struct WorkloadFacts {
    /// Tenant.
    pub tenant: TenantName,
    /// App.
    pub app: AppName,
    /// Identity.
    pub app_id: AppId,
    /// Generation.
    pub generation: i64,
    /// Epoch of the lease.
    pub epoch: i64,
    /// User ids on the host.
    pub block: IdRange,
    /// Addresses.
    pub addresses: Vec<std::net::Ipv4Addr>,
    /// Whether it may run: apps of a suspended tenant may not.
    pub running: Running,
}

/// Whether an app may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Running {
    /// The number of instances in the spec.
    Yes,
    /// No instances, because the tenant is suspended.
    Suspended,
}

impl Release {
    /// Parses the spec again. The stored spec passed the same parser when it was accepted.
    pub fn parse_spec(&self) -> Result<AppSpec, Error> {
        AppSpec::from_stored(&self.spec).map_err(|_| Error::internal("a stored spec has faults"))
    }

    /// Returns the image in the form that users write.
    #[must_use]
    pub fn image(&self) -> String {
        match &self.tag {
            Some(tag) => format!("{}:{tag}", self.repository),
            None => format!("{}@{}", self.repository, self.index_digest),
        }
    }

    /// Compiles the release into the workload that a driver runs. Pure: sets every field explicitly and copies
    /// nothing through.
    pub fn workload(&self, place: WorkloadFacts) -> Result<Workload, Error> {
        let spec = self.parse_spec()?;
        Ok(Workload {
            tenant: place.tenant,
            app: place.app,
            app_id: place.app_id,
            revision: self.revision,
            generation: place.generation,
            epoch: place.epoch,
            image: WorkloadImage { repository: self.repository.clone(), digest: self.digest.clone() },
            command: spec.command().map(<[String]>::to_vec),
            args: spec.args().map(<[String]>::to_vec),
            user: self.user,
            groups: self.groups.clone(),
            block: place.block,
            cpu_millis: spec.cpu_millis(),
            memory: spec.memory(),
            instances: if place.running == Running::Yes { spec.instances() } else { 0 },
            update: if spec.singleton() { Update::Replace } else { Update::Rolling },
            env: spec.env().clone(),
            port: spec.serves().map(|serves| serves.port),
            health: spec.health(),
            scratch: spec.scratch().clone(),
            stop_grace: spec.stop_grace(),
            addresses: place.addresses,
        })
    }
}

/// Compiles a spec with example ids, digest and address, to inspect the result without a platform.
pub fn render_example(spec: &AppSpec, tenant: TenantName) -> Result<Value, Error> {
    use crate::driver::agent::config::AgentConfig;
    use crate::driver::podman::{inside, render};
    let subnet: crate::driver::workload::Subnet = "10.64.0.0/22".parse().map_err(Error::internal)?;
    let address = subnet.nth(2).ok_or_else(|| Error::internal("an example"))?;
    let release = Release {
        revision: 1,
        spec: spec.to_json(),
        repository: spec.image().repository().clone(),
        tag: None,
        index_digest: Digest::of(b""),
        digest: Digest::of(b""),
        user: InsideUser { uid: 1000, gid: 1000 },
        groups: Vec::new(),
        warnings: Value::Array(Vec::new()),
        rolled_back_to: None,
        actor: String::new(),
        created_at: OffsetDateTime::now_utc(),
    };
    let workload = release.workload(WorkloadFacts {
        tenant,
        app: spec.name().clone(),
        app_id: AppId(1),
        generation: 1,
        epoch: 1,
        block: IdRange { start: 1_879_048_192, size: 1024 },
        addresses: vec![address],
        running: Running::Yes,
    })?;
    let config = AgentConfig {
        installation: "demo".parse().map_err(Error::internal)?,
        state_dir: "/var/lib/bulkhead/agent".into(),
        socket: "/".into(),
        peer_uid: 0,
        engine_socket: "/".into(),
        id_pool: IdRange { start: 1_879_048_192, size: 1024 },
        range_size: 1024,
        block_size: 1024,
        network_pool: subnet,
        subnet_prefix: subnet.prefix(),
        engine_storage: "/".into(),
        engine_run: "/".into(),
        prober_socket: "/".into(),
        prober_uid: 0,
        resolver_socket: "/".into(),
        resolver_uid: 0,
        resolver_gid: 0,
        closed: Vec::new(),
        new_connections_per_second: crate::driver::agent::config::usual_pace(),
        registry_name: "demo.bulkhead.internal".into(),
        pull_host: "127.0.0.1:1".into(),
    };
    let scratch: Vec<render::Mount> = (workload.scratch.iter())
        .map(|(path, scratch)| render::Mount {
            path: path.clone(),
            size: scratch.size,
            exec: scratch.exec,
            mode: inside::mode(path, None),
        })
        .collect();
    let instance = render::NewInstance {
        container: &render::name(&config, &workload, 1),
        number: 1,
        gateway: subnet.gateway(),
        network: "bkdemo0",
        log: "/var/lib/bulkhead/agent/logs/1/1.raw",
        filter: "/var/lib/bulkhead/agent/seccomp.json",
        names: ["/var/lib/bulkhead/agent/logs/1/1.passwd", "/var/lib/bulkhead/agent/logs/1/1.group"],
        scratch: &scratch,
    };
    Ok(render::create(&config, &workload, &instance))
}
