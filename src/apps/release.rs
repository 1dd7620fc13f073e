//! A release: a spec and the digest that its image had, for ever. Rolling back makes a new one.

use serde_json::Value;
use time::OffsetDateTime;

use super::spec::AppSpec;
use crate::driver::workload::{IdRange, InsideUser, Update, Workload, WorkloadImage};
use crate::error::Error;
use crate::ids::{AppId, AppName, Digest, RepositoryPath, Tag, TenantName};

/// What was released.
#[derive(Debug, Clone)]
pub struct Release {
    /// Its number within the app.
    pub revision: i64,
    /// The spec as it was accepted.
    pub spec: Value,
    /// Repository of the image.
    pub repository: RepositoryPath,
    /// Tag as asked for; none when the spec names a digest.
    pub tag: Option<Tag>,
    /// Digest that the tag or the spec stood for: of an index or of the manifest itself.
    pub index_digest: Digest,
    /// Digest of the manifest that runs.
    pub digest: Digest,
    /// User inside.
    pub user: InsideUser,
    /// Its supplementary groups inside.
    pub groups: Vec<u16>,
    /// What the preflight said.
    pub warnings: Value,
    /// The revision that this one brings back.
    pub rolled_back_to: Option<i64>,
    /// Who.
    pub actor: String,
    /// When.
    pub created_at: OffsetDateTime,
}

/// What the database knows of an app beside its release, for the workload.
#[derive(Debug)]
pub struct Place {
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
    /// Host ids.
    pub block: IdRange,
    /// Addresses.
    pub addresses: Vec<std::net::Ipv4Addr>,
    /// Whether it shall run at all; a suspended tenant's apps do not.
    pub running: Running,
}

/// Whether an app shall run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Running {
    /// As many instances as the spec says.
    Yes,
    /// None, because the tenant is suspended.
    Suspended,
}

impl Release {
    /// The spec, parsed again: what the database holds went through the same door.
    pub fn parse_spec(&self) -> Result<AppSpec, Error> {
        AppSpec::from_stored(&self.spec).map_err(|_| Error::internal("a stored spec has faults"))
    }

    /// The image as people write it.
    #[must_use]
    pub fn image(&self) -> String {
        match &self.tag {
            Some(tag) => format!("{}:{tag}", self.repository),
            None => format!("{}@{}", self.repository, self.index_digest),
        }
    }

    /// Compiles the release into what a driver runs. Pure: every field that matters is written
    /// here, nothing is copied through.
    pub fn workload(&self, place: Place) -> Result<Workload, Error> {
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

/// What a spec compiles to, with example ids, digest and address: for people who want to see it
/// without a platform.
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
    let workload = release.workload(Place {
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
    let instance = render::Instance {
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
