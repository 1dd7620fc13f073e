//! Cache of resolved images. A digest always means the same bytes, so one read is enough. Whether an image
//! still exists is checked in the database on every deploy.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::distribution::ResolvedImage;
use crate::ids::Digest;

/// Approximate maximum of cached bytes.
const BYTES: u64 = 4 << 20;
/// Approximate maximum of cached images.
const IMAGES: usize = 2_000;

/// An image in a repository. Keyed by repository so that response times reveal nothing about other tenants.
type ImageKey = (String, Digest);

/// A value and its weight in bytes.
type Weighed<T> = (Arc<T>, u64);

#[derive(Debug, Clone)]
struct Bytes;

impl<T> Weighter<ImageKey, Weighed<T>> for Bytes {
    fn weight(&self, (name, _): &ImageKey, value: &Weighed<T>) -> u64 {
        // Include the key's digest and the cache's overhead.
        value.1 + name.len() as u64 + 256
    }
}

type Shelf<T> = Cache<ImageKey, Weighed<T>, Bytes>;

/// Images by repository and digest.
pub(super) struct KnownImages {
    images: Shelf<ResolvedImage>,
}

impl std::fmt::Debug for KnownImages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").field("images", &self.images.len()).finish_non_exhaustive()
    }
}

impl KnownImages {
    pub(super) fn new() -> Self {
        Self { images: Cache::with_weighter(IMAGES, BYTES, Bytes) }
    }

    /// Returns the image that a tag's digest resolves to.
    pub(super) fn image(&self, name: &str, index: &Digest) -> Option<Arc<ResolvedImage>> {
        self.images.get(&(name.to_owned(), index.clone())).map(|found| found.0)
    }

    /// Caches an image with the size of its config.
    pub(super) fn keep_image(&self, name: &str, image: &Arc<ResolvedImage>, bytes: usize) {
        let key = (name.to_owned(), image.index_digest.clone());
        self.images.insert(key, (Arc::clone(image), bytes as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::ImageConfig;

    #[test]
    fn one_repository_knows_nothing_of_another_and_the_room_is_bounded() {
        let known = KnownImages::new();
        let image = |digest: Digest| {
            Arc::new(ResolvedImage::new(digest.clone(), digest, ImageConfig::default(), Vec::new()))
        };
        let digest = Digest::of(b"x");
        known.keep_image("acme/web", &image(digest.clone()), 10);
        assert!(known.image("acme/web", &digest).is_some());
        assert!(known.image("acme/other", &digest).is_none());
        assert!(known.image("evil/web", &digest).is_none());
        for n in 0..1_000_u32 {
            known.keep_image("acme/web", &image(Digest::of(&n.to_le_bytes())), 10_000);
        }
        assert!(known.images.weight() <= BYTES, "{}", known.images.weight());
    }
}
