//! One table of the fields and the forms of their values. The walk, the schema and the suggestions read it.

use crate::ids::{Digest, RepositoryPath, Tag};

/// Fields of the document.
pub(super) const TOP: &[&str] = &[
    "spec",
    "name",
    "image",
    "command",
    "args",
    "cpu",
    "memory",
    "instances",
    "singleton",
    "env",
    "port",
    "health",
    "scratch",
    "stop_grace",
    "connects",
];
/// Required fields.
pub(super) const REQUIRED: &[&str] = &["spec", "name", "image", "cpu", "memory"];
/// Fields of `port` as a group.
pub(super) const PORT: &[&str] = &["port", "protocol"];
/// Fields of `health`.
pub(super) const HEALTH: &[&str] = &["http", "tcp", "grace"];
/// Fields of `health.http`.
pub(super) const HTTP: &[&str] = &["path", "port"];
/// Fields of `health.tcp`.
pub(super) const TCP: &[&str] = &["port"];
/// Fields of a scratch entry as a group.
pub(super) const SCRATCH: &[&str] = &["size", "exec"];
/// Fields of `connects`.
pub(super) const CONNECTS: &[&str] = &["services", "apps", "egress"];
/// Maximum number of names in each of them.
pub(super) const MOST_CONNECTS: usize = 64;

/// Maximum instances of an app.
pub const INSTANCES: u32 = 100;
/// Maximum grace of a health check, in seconds.
pub const GRACE: u16 = 600;
/// Default grace of a health check, in seconds.
pub const GRACE_DEFAULT: u16 = 10;
/// Maximum and default time to stop, in seconds.
pub const STOP_GRACE: (u16, u16) = (120, 30);
/// Default size of `/tmp`, in bytes.
pub const TMP: u64 = 16 << 20;
/// Default size of `/dev/shm`, in bytes; the memory limit bounds its content.
pub const SHM: u64 = 16 << 20;
/// Minimum memory in bytes, and the minimum that scratch must leave for the process.
pub const LEAST_MEMORY: u64 = 8 << 20;
pub(super) const MOST_MEMORY: u64 = 1024 << 30;

/// The tag or digest of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageReference {
    /// A tag, resolved when the release is made.
    Tag(Tag),
    /// A digest.
    Digest(Digest),
}

/// An image of the tenant's own project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    pub(super) repository: RepositoryPath,
    pub(super) reference: ImageReference,
}

impl ImageRef {
    /// Repository within the project.
    #[must_use]
    pub fn repository(&self) -> &RepositoryPath {
        &self.repository
    }
    /// Tag or digest.
    #[must_use]
    pub fn reference(&self) -> &ImageReference {
        &self.reference
    }

    /// Parses `repository:tag` or `repository@sha256:...`. The error is a message and a suggestion; it never
    /// contains the input.
    pub(super) fn parse(text: &str) -> Result<Self, (&'static str, String)> {
        let host = text.split('/').next().filter(|_| text.contains('/'));
        if text.contains("://") || host.is_some_and(|h| h.contains(['.', ':']) || h == "localhost") {
            return Err((
                "the image names a host",
                "leave out the host and the tenant: HOST/TENANT/web:1 is web:1 here; images come from the \
                 tenant's own project, so push the image there first"
                    .into(),
            ));
        }
        let (repository, reference) = if let Some((repository, digest)) = text.split_once('@') {
            if repository.contains(':') {
                return Err(("the image has a tag and a digest", "use only one of them".into()));
            }
            let digest = digest.parse().map_err(|error: crate::ids::NameError| {
                ("the digest of the image has the wrong form", error.to_string())
            })?;
            (repository, ImageReference::Digest(digest))
        } else if let Some((repository, tag)) = text.split_once(':') {
            let tag = tag.parse().map_err(|error: crate::ids::NameError| {
                ("the tag of the image has the wrong form", error.to_string())
            })?;
            (repository, ImageReference::Tag(tag))
        } else {
            return Err((
                "the image has no tag",
                "write repository:tag or repository@sha256:...; the tag latest is not implied".into(),
            ));
        };
        let repository = repository.parse().map_err(|error: crate::ids::NameError| {
            ("the repository of the image has the wrong form", error.to_string())
        })?;
        Ok(Self { repository, reference })
    }
}

impl std::fmt::Display for ImageRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.reference {
            ImageReference::Tag(tag) => write!(f, "{}:{tag}", self.repository),
            ImageReference::Digest(digest) => write!(f, "{}@{digest}", self.repository),
        }
    }
}

/// Parses cpu into thousandths of a core: `250m`, `2`, `0.25`.
pub(super) fn cpu(text: &str) -> Option<u32> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let millis: u64 = if let Some(millis) = text.strip_suffix('m') {
        if !digits(millis) {
            return None;
        }
        millis.parse().ok()?
    } else {
        let (whole, part) = match text.split_once('.') {
            Some((whole, part)) if digits(part) && part.len() <= 3 => (whole, part),
            Some(_) => return None,
            None => (text, "0"),
        };
        if !digits(whole) {
            return None;
        }
        let scale = [100, 10, 1][part.len() - 1];
        whole.parse::<u64>().ok()?.checked_mul(1_000)?.checked_add(part.parse::<u64>().ok()? * scale)?
    };
    u32::try_from(millis).ok().filter(|millis| (10..=1_000_000).contains(millis))
}

/// Parses a size into bytes: a whole number with `Ki`, `Mi` or `Gi`.
pub(super) fn size(text: &str) -> Option<u64> {
    let (number, shift) = [("Ki", 10), ("Mi", 20), ("Gi", 30)]
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))?;
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes <= MOST_MEMORY).then_some(bytes)
}

/// Formats a size in the largest unit that divides it.
pub(super) fn print_size(bytes: u64) -> String {
    for (unit, shift) in [("Gi", 30), ("Mi", 20)] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{}Ki", bytes >> 10)
}
