//! Measures layers once, as soon as a manifest references them. The read is bounded and runs outside the
//! request threads: one image at a time for each tenant, and few in total. The results are stored, so no deploy
//! reads an image again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Method, StatusCode};

use super::distribution::{away, good, read};
use super::front::{FrontDoor, OciError};
use super::proxy::ProxyRequest;
use super::{Distribution, store};
use crate::db;
use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantName};
use crate::images::layers::{self, LayerLimits, LayerReport, Stop};
use crate::images::manifest::{Descriptor, Manifest};
use crate::quotas::{Resource, exceeded};

/// Maximum time that a request waits for a measurement, which then continues in the background.
const PATIENCE: Duration = Duration::from_secs(45);
/// How long a request waits for its turn.
const TURN: Duration = Duration::from_secs(20);
/// Maximum time of one image, including the waits between its layers.
const IMAGE: Duration = Duration::from_secs(600);

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) digest: Digest,
    /// Size in bytes, as stored.
    pub(super) size: u64,
    /// Media type in its manifest.
    pub(super) media_type: String,
}

impl Layer {
    /// Returns the approximate bytes in memory.
    pub(super) fn kept(&self) -> usize {
        std::mem::size_of::<Self>() + self.digest.as_str().len() + self.media_type.len() + 64
    }
}

impl From<&Descriptor> for Layer {
    fn from(from: &Descriptor) -> Self {
        Self { digest: from.digest.clone(), size: from.size, media_type: from.media_type.clone() }
    }
}

/// The result of waiting for a measurement.
#[derive(Debug)]
pub(super) enum Measured {
    /// The reports of its layers, from the bottom up.
    Done(Vec<LayerReport>),
    /// The measurement continues.
    Underway,
}

/// Measures the image of a pushed manifest. Refuses an image that cannot be unpacked or exceeds the quota.
/// Artifacts are not unpacked and not measured. If the measurement takes too long for the client, it continues
/// in the background and a deploy waits for it.
pub(super) async fn at_push(
    door: &FrontDoor,
    asked: &ProxyRequest,
    manifest: &Manifest,
) -> Result<(), OciError> {
    let Some(layers) = manifest.measured_layers() else { return Ok(()) };
    let list: Vec<Layer> = layers.iter().map(Layer::from).collect();
    let measured = door.registry.measure(&asked.tenant, &asked.repository, &list).await;
    match measured? {
        Measured::Underway => Ok(()),
        Measured::Done(reports) => match refusal(&reports, &list) {
            None => Ok(()),
            Some(why) => Err(OciError::invalid(why)),
        },
    }
}

/// Returns the reason why an image with these layers is refused.
pub(super) fn refusal(reports: &[LayerReport], image: &[Layer]) -> Option<String> {
    let media_types = image.iter().map(|layer| layer.media_type.as_str());
    layers::refusal(reports).or_else(|| layers::mislabelled(reports, media_types))
}

impl Distribution {
    /// Ensures that the layers of an image are measured.
    pub(super) async fn measure(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        image: &[Layer],
    ) -> Result<Measured, Error> {
        if let Some(done) = self.measured(tenant, image).await? {
            return Ok(Measured::Done(done));
        }
        // Run in a separate task: a client that disconnects does not cancel the work.
        let (registry, tenant_name, repository) = (self.clone(), tenant.clone(), repository.clone());
        let list = image.to_vec();
        let work =
            tokio::spawn(async move { registry.measure_missing(&tenant_name, &repository, &list).await });
        match tokio::time::timeout(PATIENCE, work).await {
            Err(_) => return Ok(Measured::Underway),
            Ok(done) => done.map_err(Error::internal)??,
        }
        self.measured(tenant, image).await?.map(Measured::Done).ok_or_else(|| {
            Error::Unavailable("a layer of the image is being removed; push it again".into(), TURN)
        })
    }

    /// Returns the reports of all layers; none if a layer is not measured yet.
    async fn measured(
        &self,
        tenant: &TenantName,
        image: &[Layer],
    ) -> Result<Option<Vec<LayerReport>>, Error> {
        let known = self.reports(tenant, image).await?;
        // The layers above a refused one are not read.
        let refused = known.values().any(|report| !report.refused.is_empty());
        let unread = || refused.then(|| LayerReport::refused(String::new()));
        Ok(image.iter().map(|layer| known.get(&layer.digest).cloned().or_else(unread)).collect())
    }

    async fn reports(
        &self,
        tenant: &TenantName,
        image: &[Layer],
    ) -> Result<HashMap<Digest, LayerReport>, Error> {
        let digests: Vec<String> = image.iter().map(|layer| layer.digest.to_string()).collect();
        let mut conn = db::begin(&self.pool, tenant).await?;
        Ok(store::list_reports(&mut conn, tenant, &digests).await?.into_iter().collect())
    }

    /// Each layer waits for its own turn, so an image with many layers delays others by one layer at most.
    async fn measure_missing(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        image: &[Layer],
    ) -> Result<(), Error> {
        let until = Instant::now() + IMAGE;
        let mut patience = TURN;
        for layer in image {
            if !self.reports(tenant, std::slice::from_ref(layer)).await?.is_empty() {
                continue;
            }
            let turn = self.measures.take(tenant, patience).await.map_err(|_| {
                Error::Unavailable(
                    "other images are being measured; this image follows in a few seconds".into(),
                    Duration::from_secs(5),
                )
            })?;
            patience = until.saturating_duration_since(Instant::now());
            // During the wait, another push may have measured the same layer.
            if !self.reports(tenant, std::slice::from_ref(layer)).await?.is_empty() {
                continue;
            }
            let report = self.measure_layer(tenant, repository, layer, until).await?;
            store::insert_report(&self.pool, tenant, &layer.digest, &report).await?;
            fail::fail_point!("registries::layer_measured", |_| Err(Error::internal("failpoint")));
            drop(turn);
            if !report.refused.is_empty() {
                break;
            }
        }
        Ok(())
    }

    async fn measure_layer(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        layer: &Layer,
        until: Instant,
    ) -> Result<LayerReport, Error> {
        let mut conn = db::begin(&self.pool, tenant).await?;
        let amount = store::image_use(&mut conn, tenant).await?;
        drop(conn);
        let name = format!("{tenant}/{repository}");
        let request = self.request(Method::GET, &name, &format!("blobs/{}", layer.digest), &["pull"])?;
        let answer = read(request).await.map_err(away)?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Err(Error::Unavailable("a layer of the image is gone; push it again".into(), TURN));
        }
        let answer = good(answer)?;
        let stream = answer.bytes_stream().map(|chunk| chunk.map_err(std::io::Error::other));
        let reader = tokio_util::io::SyncIoBridge::new(tokio_util::io::StreamReader::new(stream));
        let bounds = LayerLimits { stored: layer.size, budget: amount.left().unsigned_abs(), until };
        let digest = layer.digest.clone();
        let outcome = tokio::task::spawn_blocking(move || layers::measure(reader, &digest, bounds)).await;
        match outcome.map_err(Error::internal)? {
            Ok(report) => Ok(report),
            Err(Stop::Refused(why)) => Ok(LayerReport::refused(why)),
            // No verdict: a slow read today may be fast enough later.
            Err(Stop::Late) => Err(Error::Unavailable(
                "the image takes longer than 10 minutes to read; completed layers are kept: push it again, \
                 or build it with smaller layers"
                    .into(),
                TURN,
            )),
            Err(Stop::Altered) => {
                tracing::error!(%tenant, %repository, digest = %layer.digest,
                    "ALARM: the registry's bytes of a layer do not match its digest");
                Err(Error::Unavailable(
                    "the registry's copy of a layer is damaged; ask the operator to check the registry's disk"
                        .into(),
                    TURN,
                ))
            }
            Err(Stop::Quota) => Err(exceeded(Resource::ImageBytes, amount, amount.left().saturating_add(1))),
            Err(Stop::Broken(error)) => Err(away(error)),
        }
    }
}
