//! The client of the registry behind the registry proxy, for the platform's own reads and deletions. It mints
//! its own tokens, follows no redirects and reads no more than necessary.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{Method, Response, StatusCode, header};
use sqlx::PgPool;

use super::collector::Collector;
use super::known::KnownImages;
use super::measure::{self, Layer, Measured};
use super::room::ProxyLimits;
use super::token::{SigningKey, TokenAccess};
use super::{Reference, missing, store};
use crate::db;
use crate::driver::disk::{self, DiskConsumer};
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::ids::{Digest, RepositoryPath, TenantName};
use crate::images::ImageConfig;
use crate::images::layers::{self, Merged};
use crate::images::manifest::{self, Manifest, ManifestContent, ManifestError};
use crate::images::runnable::for_this_platform;
use crate::permits::FairPermits;

/// An image in the registry.
#[derive(Debug)]
pub struct ResolvedImage {
    /// Digest that the tag or the given digest resolves to.
    pub index_digest: Digest,
    /// The manifest for this platform.
    pub manifest_digest: Digest,
    /// Its config.
    pub config: ImageConfig,
    layers: Vec<Layer>,
}

impl ResolvedImage {
    pub(super) fn new(
        index_digest: Digest,
        manifest_digest: Digest,
        config: ImageConfig,
        layers: Vec<Layer>,
    ) -> Self {
        Self { index_digest, manifest_digest, config, layers }
    }
}

/// The client.
#[derive(Debug, Clone)]
pub struct Distribution {
    client: reqwest::Client,
    base: String,
    key: SigningKey,
    disk: Option<PathBuf>,
    pub(super) pool: PgPool,
    pub(super) measures: FairPermits<TenantName>,
    known: Arc<KnownImages>,
    room: Arc<ProxyLimits>,
    collector: Option<Collector>,
    work: Option<PgPool>,
}

/// Maximum concurrent measurements of layers: per tenant, and in total.
const MEASURES: (usize, usize) = (1, 4);

pub(super) fn away(error: impl std::fmt::Display) -> Error {
    tracing::warn!(%error, "the registry does not answer");
    Error::Unavailable("the registry does not answer".into(), Duration::from_secs(3))
}

fn fault(code: u16, message: &str) -> Error {
    Error::fault(Fault::new(Code(code), Kind::Invalid, "image", message))
}

/// Explains why an image was not found.
async fn why_missing(
    conn: &mut sqlx::PgConnection,
    tenant: &TenantName,
    repository: &RepositoryPath,
    reference: &Reference,
) -> Result<Fault, Error> {
    let mut known = missing::TenantImages {
        repositories: store::list_repository_names(conn, tenant).await?,
        ..missing::TenantImages::default()
    };
    let own = known.repositories.iter().any(|own| own == repository.as_str());
    let place = if own {
        Some(repository.as_str())
    } else {
        missing::meant(tenant.as_str(), repository.as_str(), &known.repositories)
    };
    if let Some(place) = place.and_then(|place| place.parse().ok()) {
        known.tags = store::list_tag_names(conn, tenant, &place, "", 10_000).await?.unwrap_or_default();
    }
    if let Reference::Digest(digest) = reference {
        known.elsewhere = store::find_manifest_place(conn, tenant, digest).await?;
    }
    Ok(missing::explain(tenant.as_str(), repository.as_str(), reference, &known))
}

/// Returns a client for an address, and the base URL of its paths.
pub fn reach(url: &str) -> (reqwest::ClientBuilder, String) {
    let client = crate::outgoing::client();
    match url.strip_prefix("unix://") {
        Some(socket) => (client.unix_socket(socket), "http://registry".to_owned()),
        None => (client, url.trim_end_matches('/').to_owned()),
    }
}

impl Distribution {
    /// Creates a client for the registry at `base`: `http://`, `https://`, or `unix://` and the path of its
    /// socket.
    pub fn new(pool: PgPool, base: &str, key: SigningKey) -> Result<Self, Error> {
        let (client, base) = reach(base);
        let client = client
            .connect_timeout(Duration::from_secs(3))
            .read_timeout(Duration::from_secs(60))
            .build()
            .map_err(Error::internal)?;
        let (known, room) = (Arc::new(KnownImages::new()), Arc::new(ProxyLimits::new()));
        let measures = FairPermits::new(MEASURES.0, MEASURES.1);
        Ok(Self { pool, client, base, key, disk: None, measures, known, room, collector: None, work: None })
    }

    /// Adds the collector, and the reconcilers' database pool, which sees all tenants. Whether any tenant has a
    /// digest is a query over all of them.
    #[must_use]
    pub fn with_collector(self, socket: Option<&std::path::Path>, work: PgPool) -> Self {
        Self { collector: socket.map(|socket| Collector::new(socket.to_owned())), work: Some(work), ..self }
    }

    pub(super) fn collector(&self) -> Option<&Collector> {
        self.collector.as_ref()
    }

    pub(super) fn work(&self) -> Option<&PgPool> {
        self.work.as_ref()
    }

    pub(super) fn room(&self) -> &ProxyLimits {
        &self.room
    }

    /// Adds a folder on the registry's disk, to check its free space.
    #[must_use]
    pub fn on_disk(self, disk: Option<PathBuf>) -> Self {
        Self { disk, ..self }
    }

    /// Returns whether the registry's disk has room for pushes, beside the space reserved for other parts.
    pub(super) fn has_room(&self) -> bool {
        let room = self.disk.as_deref().and_then(|place| disk::room(DiskConsumer::Registry, place));
        room.is_none_or(|room| room.has(0))
    }

    /// Checks whether the registry answers.
    pub async fn ping(&self) -> Result<(), Error> {
        let token = self.key.mint("platform", Vec::new())?;
        let answer = self
            .client
            .get(format!("{}/v2/", self.base))
            .bearer_auth(token)
            .timeout(Duration::from_secs(2))
            .send()
            .await
            .map_err(away)?;
        if answer.status().is_success() { Ok(()) } else { Err(away(answer.status())) }
    }

    /// Builds a request to one repository with the minimum rights.
    pub(super) fn request(
        &self,
        method: Method,
        name: &str,
        rest: &str,
        actions: &[&str],
    ) -> Result<reqwest::RequestBuilder, Error> {
        let token = self.key.mint("platform", vec![TokenAccess::to(name.to_owned(), actions)])?;
        Ok(self.client.request(method, format!("{}/v2/{name}/{rest}", self.base)).bearer_auth(token))
    }

    /// Builds a mount request: reads one repository and writes the other.
    pub(super) fn mount_request(
        &self,
        name: &str,
        from: &str,
        rest: &str,
    ) -> Result<reqwest::RequestBuilder, Error> {
        let access = vec![
            TokenAccess::to(name.to_owned(), &["pull", "push"]),
            TokenAccess::to(from.to_owned(), &["pull"]),
        ];
        let token = self.key.mint("platform", access)?;
        Ok(self.client.post(format!("{}/v2/{name}/{rest}", self.base)).bearer_auth(token))
    }

    /// Fetches a blob or manifest and checks its digest and a size limit.
    async fn fetch(
        &self,
        name: &str,
        rest: &str,
        digest: &Digest,
        limit: usize,
    ) -> Result<Option<(Vec<u8>, String)>, Error> {
        let request =
            self.request(Method::GET, name, rest, &["pull"])?.header(header::ACCEPT, manifest::ACCEPT);
        let answer = read(request).await.map_err(away)?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = good(answer)?;
        let kind = answer
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let mut bytes = Vec::new();
        let mut stream = answer.bytes_stream();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(away)?);
            if bytes.len() > limit {
                let why = format!("its manifest or config is larger than {} MiB", limit >> 20);
                return Err(fault(203, &why));
            }
        }
        if Digest::of(&bytes) != *digest {
            return Err(fault(203, "the registry's bytes do not match the digest"));
        }
        Ok(Some((bytes, kind)))
    }

    async fn manifest(
        &self,
        tenant: &TenantName,
        name: &str,
        digest: &Digest,
    ) -> Result<Option<Manifest>, Error> {
        let rest = format!("manifests/{digest}");
        let Some((bytes, kind)) = self.fetch(name, &rest, digest, manifest::LIMIT).await? else {
            return Ok(None);
        };
        self.parse(tenant, move || Manifest::parse(&bytes, &kind)).await.map(Some)
    }

    /// Parses untrusted content outside the request threads, one at a time for each tenant.
    async fn parse<T: Send + 'static>(
        &self,
        tenant: &TenantName,
        parser: impl FnOnce() -> Result<T, ManifestError> + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.room.parsers.turn(tenant).await?;
        let parsed = tokio::task::spawn_blocking(move || {
            let parsed = parser();
            drop(turn);
            parsed
        });
        parsed.await.map_err(Error::internal)?.map_err(|error| fault(203, &error.to_string()))
    }

    /// Resolves a tag or digest to the image for linux/amd64.
    pub async fn resolve(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        reference: &Reference,
    ) -> Result<Arc<ResolvedImage>, Error> {
        let missing = || {
            Error::fault(
                Fault::new(Code(200), Kind::Conflict, "image", "the tenant's project has no such image")
                    .instead("push it first; GET .../repositories lists the repositories"),
            )
        };
        let mut conn = db::begin(&self.pool, tenant).await?;
        let known = match reference {
            Reference::Tag(tag) => store::find_tag(&mut conn, tenant, repository, tag).await?,
            Reference::Digest(digest) => store::find_manifest(&mut conn, tenant, repository, digest).await?,
        };
        let Some(index_digest) = known else {
            return Err(Error::fault(why_missing(&mut conn, tenant, repository, reference).await?));
        };
        drop(conn);
        let name = format!("{tenant}/{repository}");
        if let Some(image) = self.known.image(&name, &index_digest) {
            return Ok(image);
        }
        // The permit bounds the content of images in memory.
        let _place = self.room.manifests.turn(tenant).await?;
        let mut manifest_digest = index_digest.clone();
        let mut found = self.manifest(tenant, &name, &index_digest).await?.ok_or_else(missing)?;
        if let ManifestContent::Index { children } = &found.parts {
            let child = for_this_platform(children).map_err(|error| fault(201, &error.to_string()))?;
            manifest_digest = child.descriptor.digest.clone();
            found = self.manifest(tenant, &name, &manifest_digest).await?.ok_or_else(missing)?;
        }
        let (config, layers) = found.runnable().map_err(|error| fault(203, &error.to_string()))?;
        let (bytes, _) = self
            .fetch(&name, &format!("blobs/{}", config.digest), &config.digest, crate::images::config::LIMIT)
            .await?
            .ok_or_else(missing)?;
        let config = self.parse(tenant, move || ImageConfig::parse(&bytes)).await?;
        let layers: Vec<_> = layers.iter().map(Layer::from).collect();
        let size = config.kept() + layers.iter().map(Layer::kept).sum::<usize>();
        let image = Arc::new(ResolvedImage::new(index_digest, manifest_digest, config, layers));
        self.known.keep_image(&name, &image, size);
        Ok(image)
    }

    /// Returns the merged layers of an image. Layers that were not measured at the push are measured now.
    pub async fn merged(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        image: &ResolvedImage,
    ) -> Result<Merged, Error> {
        let Measured::Done(reports) = self.measure(tenant, repository, &image.layers).await? else {
            return Err(Error::Unavailable(
                "the image is still being measured; deploy it again in a minute".into(),
                Duration::from_secs(30),
            ));
        };
        let mut merged = layers::merge(&reports);
        merged.refused = measure::refusal(&reports, &image.layers).or(merged.refused);
        let told: Vec<&str> = reports.iter().map(|report| report.diff_id.as_str()).collect();
        if merged.refused.is_none() && told != image.config.diff_ids {
            merged.refused = Some("its layers differ from the layers in its config (rootfs.diff_ids)".into());
        }
        Ok(merged)
    }

    /// Returns the size of a blob in the registry.
    pub(super) async fn blob_size(&self, name: &str, digest: &Digest) -> Result<Option<u64>, Error> {
        self.size(name, &format!("blobs/{digest}")).await
    }

    /// Returns the size of a manifest in the registry.
    pub(super) async fn manifest_size(&self, name: &str, digest: &Digest) -> Result<Option<u64>, Error> {
        self.size(name, &format!("manifests/{digest}")).await
    }

    async fn size(&self, name: &str, rest: &str) -> Result<Option<u64>, Error> {
        let request =
            self.request(Method::HEAD, name, rest, &["pull"])?.header(header::ACCEPT, manifest::ACCEPT);
        let answer = read(request).await.map_err(away)?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = good(answer)?;
        let length = answer.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        length.map(Some).ok_or_else(|| away("no length"))
    }

    /// Ensures that a tag outside the tenants' control keeps a deployed manifest.
    pub async fn put_keeper_tag(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        digest: &Digest,
    ) -> Result<(), Error> {
        let name = format!("{tenant}/{repository}");
        let tag = format!("bulkhead-keep-{}", digest.short());
        if self.size(&name, &format!("manifests/{tag}")).await?.is_some() {
            return Ok(());
        }
        let Some((bytes, kind)) =
            self.fetch(&name, &format!("manifests/{digest}"), digest, manifest::LIMIT).await?
        else {
            return Err(Error::Conflict("the image is no longer in the registry".into()));
        };
        let answer = self
            .request(Method::PUT, &name, &format!("manifests/{tag}"), &["pull", "push"])?
            .header(header::CONTENT_TYPE, kind)
            .body(bytes)
            .send()
            .await
            .map_err(away)?;
        good(answer).map(drop)
    }

    /// Deletes a manifest; a missing one counts as deleted.
    pub(super) async fn delete_manifest(&self, name: &str, digest: &Digest) -> Result<(), Error> {
        self.delete(name, &format!("manifests/{digest}")).await
    }

    /// Removes a blob from one repository; a missing one counts as removed.
    pub(super) async fn delete_blob(&self, name: &str, digest: &Digest) -> Result<(), Error> {
        self.delete(name, &format!("blobs/{digest}")).await
    }

    async fn delete(&self, name: &str, rest: &str) -> Result<(), Error> {
        let answer =
            self.request(Method::DELETE, name, rest, &["pull", "delete"])?.send().await.map_err(away)?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(());
        }
        good(answer).map(drop)
    }
}

/// Sends a read request. The registry (Distribution 2.8 on files) answers 500 if the content is being written
/// at the same time, so this function retries on server errors.
pub(super) async fn read(request: reqwest::RequestBuilder) -> reqwest::Result<Response> {
    let mut tries = 0;
    loop {
        let Some(this) = request.try_clone() else { return request.send().await };
        let answer = this.send().await?;
        tries += 1;
        if !answer.status().is_server_error() || tries == 4 {
            return Ok(answer);
        }
        tokio::time::sleep(Duration::from_millis(20 << tries)).await;
    }
}

pub(super) fn good(answer: Response) -> Result<Response, Error> {
    if answer.status().is_success() { Ok(answer) } else { Err(away(answer.status())) }
}
