//! Measures each layer once by a bounded read of its stream: its size on the engine's disk, and the files that
//! a privileged process would open in it. Nothing is unpacked here.
//!
//! The engine (Podman 4.3 with containers/storage) decides what can be unpacked; `tree.rs` implements its
//! rules.

use std::io::{BufReader, Cursor, Read};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::ids::Digest;

mod archive;
mod packing;
mod tree;

pub use packing::Packing;

use archive::{Archive, ArchiveEntry, Type};
use tree::{LayerNode, Tree};

/// Maximum size of `etc/passwd` and `etc/group`, in bytes.
const NAMES: u64 = 256 << 10;
/// Maximum bytes of them that are stored for name lookups.
const KEPT: usize = 32 << 10;
/// Maximum number of files in a layer whose text is held during the read.
const HELD: usize = 64;
/// Minimum bytes that a file takes on the disk.
const DISK_BLOCK: u64 = 4096;
/// A layer may unpack to this many times its size, and always to `SMALL`.
const RATIO: u64 = 200;
const SMALL: u64 = 1 << 20;
/// Maximum bytes that one layer may unpack to.
const LARGEST: u64 = 32 << 30;

/// The reason why a layer was not read to its end.
#[derive(Debug)]
pub enum Stop {
    /// The layer is never accepted, with the reason.
    Refused(String),
    /// The layer exceeds the remaining quota.
    Quota,
    /// The time limit was reached.
    Late,
    /// The received bytes do not match the digest.
    Altered,
    /// The layer could not be read.
    Broken(std::io::Error),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        // The limits of the lower stream arrive wrapped in errors of the readers above it.
        match error.downcast::<Bound>() {
            Ok(Bound::Ratio) => Self::Refused(format!("it unpacks to more than {RATIO} times its size")),
            Ok(Bound::Size) => Self::Refused("it unpacks to more than 32 GiB".into()),
            Ok(Bound::Late) => Self::Late,
            Ok(Bound::Altered) => Self::Altered,
            Ok(Bound::Away(error)) => Self::Broken(error),
            Err(error) => match error.kind() {
                std::io::ErrorKind::InvalidData
                | std::io::ErrorKind::InvalidInput
                | std::io::ErrorKind::UnexpectedEof => Self::Refused("its compression is damaged".into()),
                _ => Self::Broken(error),
            },
        }
    }
}

/// A limit that a stream has reached.
#[derive(Debug, thiserror::Error)]
enum Bound {
    #[error("ratio")]
    Ratio,
    #[error("size")]
    Size,
    #[error("late")]
    Late,
    #[error("altered")]
    Altered,
    #[error("away")]
    Away(std::io::Error),
}

/// The content of a layer at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum There {
    /// Nothing: the lower layers decide.
    Nothing,
    /// A whiteout: hides the path of the lower layers.
    Hidden,
    /// A directory.
    Directory {
        /// Whether it hides the content of the lower layers.
        opaque: bool,
    },
    /// A regular file of bounded size, with its stored text.
    File(String),
    /// A refused file, with the reason.
    Refused(String),
}

/// The result of measuring a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Digest of the unpacked layer.
    pub diff_id: Digest,
    /// Bytes that it takes on the engine's disk.
    pub bytes: u64,
    /// Files and directories in it.
    pub files: u64,
    /// Compression; none for a refused layer.
    #[serde(default)]
    pub packing: Option<Packing>,
    /// Reason of the refusal; empty for an accepted layer.
    #[serde(default)]
    pub refused: String,
    /// Whether it hides all lower layers.
    #[serde(default)]
    pub opaque: bool,
    /// `etc`.
    pub etc: There,
    /// `etc/passwd`.
    pub passwd: There,
    /// `etc/group`.
    pub group: There,
}

impl LayerReport {
    /// Creates the report of a refused layer.
    #[must_use]
    pub fn refused(why: String) -> Self {
        Self {
            diff_id: Digest::of(b""),
            bytes: 0,
            files: 0,
            packing: None,
            refused: why,
            opaque: false,
            etc: There::Nothing,
            passwd: There::Nothing,
            group: There::Nothing,
        }
    }
}

/// Limits of one read.
#[derive(Debug, Clone, Copy)]
pub struct LayerLimits {
    /// Bytes of the stored layer.
    pub stored: u64,
    /// Bytes that it may take on the engine's disk.
    pub budget: u64,
    /// Deadline.
    pub until: Instant,
}

/// Measures one layer: gzip (all its members) or a plain archive, detected by its first bytes. The verdict
/// applies only to the exact bytes of the digest, so bytes that the verdict does not need are read to the end
/// too.
pub fn measure(layer: impl Read, digest: &Digest, bounds: LayerLimits) -> Result<LayerReport, Stop> {
    let mut stored = Stored { input: layer, hash: Sha256::new(), read: 0, bounds };
    let outcome = unpack(&mut stored, bounds);
    if matches!(outcome, Ok(_) | Err(Stop::Refused(_))) {
        stored.check(digest)?;
    }
    outcome
}

fn unpack(stored: &mut impl Read, bounds: LayerLimits) -> Result<LayerReport, Stop> {
    let mut layer = BufReader::with_capacity(64 << 10, stored);
    let mut head = Vec::with_capacity(packing::HEAD);
    (&mut layer).take(packing::HEAD as u64).read_to_end(&mut head)?;
    let packing = Packing::of(&head)?;
    let layer = BufReader::with_capacity(64 << 10, Cursor::new(head).chain(layer));
    let report = match packing {
        Packing::Gzip => read(flate2::bufread::MultiGzDecoder::new(layer), bounds),
        Packing::Plain => read(layer, bounds),
    }?;
    Ok(LayerReport { packing: Some(packing), ..report })
}

fn read(archive: impl Read, bounds: LayerLimits) -> Result<LayerReport, Stop> {
    let mut unpacked = Unpacked::new(archive, bounds);
    walk(&mut unpacked, bounds).and_then(|report| unpacked.end(report))
}

fn digest_of(hash: Sha256) -> Option<Digest> {
    format!("sha256:{}", data_encoding::HEXLOWER.encode(&hash.finalize())).parse().ok()
}

/// The stored layer. Errors here are not the layer's fault.
struct Stored<R> {
    input: R,
    hash: Sha256,
    read: u64,
    bounds: LayerLimits,
}

impl<R: Read> Stored<R> {
    /// Reads to the end and compares all bytes with the digest and the size.
    fn check(mut self, digest: &Digest) -> Result<(), Stop> {
        std::io::copy(&mut self, &mut std::io::sink())?;
        if self.read == self.bounds.stored && digest_of(self.hash).as_ref() == Some(digest) {
            return Ok(());
        }
        Err(Stop::Altered)
    }
}

impl<R: Read> Read for Stored<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(into).map_err(|error| match error.kind() {
            std::io::ErrorKind::Interrupted => error,
            _ => std::io::Error::other(Bound::Away(error)),
        })?;
        self.hash.update(&into[..read]);
        self.read += read as u64;
        if self.read > self.bounds.stored {
            return Err(std::io::Error::other(Bound::Altered));
        }
        if Instant::now() > self.bounds.until {
            return Err(std::io::Error::other(Bound::Late));
        }
        Ok(read)
    }
}

/// The unpacked layer: counted, hashed and limited.
struct Unpacked<R> {
    input: R,
    hash: Sha256,
    read: u64,
    most: (u64, fn() -> Bound),
    until: Instant,
}

impl<R: Read> Unpacked<R> {
    fn new(input: R, bounds: LayerLimits) -> Self {
        let ratio = bounds.stored.saturating_mul(RATIO).max(SMALL);
        let most: (u64, fn() -> Bound) =
            if ratio <= LARGEST { (ratio, || Bound::Ratio) } else { (LARGEST, || Bound::Size) };
        Self { input, hash: Sha256::new(), read: 0, most, until: bounds.until }
    }

    fn end(self, report: LayerReport) -> Result<LayerReport, Stop> {
        let diff_id = digest_of(self.hash).ok_or_else(|| Stop::Refused("it has no digest".into()))?;
        Ok(LayerReport { diff_id, ..report })
    }
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(into)?;
        self.hash.update(&into[..read]);
        self.read += read as u64;
        if self.read > self.most.0 {
            return Err(std::io::Error::other((self.most.1)()));
        }
        if Instant::now() > self.until {
            return Err(std::io::Error::other(Bound::Late));
        }
        Ok(read)
    }
}

fn walk(input: &mut impl Read, bounds: LayerLimits) -> Result<LayerReport, Stop> {
    let mut archive = Archive::new(BufReader::with_capacity(64 << 10, input));
    let mut tree = Tree::new();
    let (mut bytes, mut held) = (0_u64, 0);
    while let Some(entry) = archive.next()? {
        bytes = bytes.saturating_add(entry.size.next_multiple_of(DISK_BLOCK).max(DISK_BLOCK));
        // Bytes that belong to no file count too, because the engine reads them.
        if bytes.max(archive.taken()) > bounds.budget {
            return Err(Stop::Quota);
        }
        let text = if held < HELD && may_be_names(&entry) {
            held += 1;
            Some(kept(&archive.content(NAMES)?))
        } else {
            None
        };
        tree.add(&entry, text)?;
    }
    let taken = archive.finish()?;
    let files = tree.len() as u64;
    Ok(LayerReport {
        diff_id: Digest::of(b""),
        bytes: bytes.saturating_add(tree.implied() * DISK_BLOCK).max(taken),
        files,
        packing: None,
        refused: String::new(),
        opaque: tree.is_opaque(),
        etc: folder(tree.at(&["etc"])),
        passwd: names(tree.at(&["etc", "passwd"]), "etc/passwd"),
        group: names(tree.at(&["etc", "group"]), "etc/group"),
    })
}

fn may_be_names(entry: &ArchiveEntry) -> bool {
    let last = entry.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    entry.kind == Type::File && entry.size <= NAMES && matches!(last, b"passwd" | b"group")
}

/// Returns the complete lines that are stored of a file. Removes NUL, which the database refuses.
fn kept(bytes: &[u8]) -> Box<str> {
    let mut text = String::from_utf8_lossy(bytes).replace('\0', "");
    // The replacement of a non-text byte is longer than the byte.
    if text.len() > KEPT {
        let end = text.as_bytes()[..KEPT].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        text.truncate(end);
    }
    text.into()
}

fn folder(node: Option<&LayerNode>) -> There {
    match node {
        None => There::Nothing,
        Some(LayerNode::Whiteout) => There::Hidden,
        Some(LayerNode::Directory { opaque }) => There::Directory { opaque: *opaque },
        Some(_) => There::Refused("etc is not a directory".into()),
    }
}

fn names(node: Option<&LayerNode>, path: &str) -> There {
    let what = match node {
        None => return There::Nothing,
        Some(LayerNode::Whiteout) => return There::Hidden,
        Some(LayerNode::File(size, text)) if *size <= NAMES => {
            return There::File(text.clone().unwrap_or_default().into());
        }
        Some(LayerNode::File(..)) => return There::Refused(format!("{path} is larger than 256 KiB")),
        Some(LayerNode::Fifo) => "a FIFO",
        Some(LayerNode::SymbolicLink(_)) => "a symbolic link",
        Some(LayerNode::Directory { .. }) => "a directory",
        Some(LayerNode::Device) => "a device",
    };
    There::Refused(format!("{path} is {what}, not a regular file"))
}

/// The merged layers of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Merged {
    /// Reason why the image is refused.
    pub refused: Option<String>,
    /// `etc/passwd`, up to the stored length.
    pub passwd: String,
    /// `etc/group`, up to the stored length.
    pub group: String,
}

/// Returns the first refused layer with its reason.
#[must_use]
pub fn refusal(layers: &[LayerReport]) -> Option<String> {
    let (n, layer) = layers.iter().enumerate().find(|(_, layer)| !layer.refused.is_empty())?;
    Some(format!("layer {} of {}: {}", n + 1, layers.len(), layer.refused))
}

/// Returns the first layer whose compression contradicts its media type, with both.
pub fn mislabelled<'a>(
    layers: &[LayerReport],
    media_types: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let mut all = layers.iter().zip(media_types).enumerate();
    all.find_map(|(n, (layer, media_type))| {
        let why = layer.packing?.against(media_type)?;
        Some(format!("layer {} of {}: {why}", n + 1, layers.len()))
    })
}

/// Merges layers in the same way as the kernel's overlay file system.
#[must_use]
pub fn merge(layers: &[LayerReport]) -> Merged {
    if let Some(why) = refusal(layers) {
        return stopped(&why);
    }
    let (mut passwd, mut group) = (None, None);
    let mut is_directory = false;
    for layer in layers.iter().rev() {
        match &layer.etc {
            There::Directory { .. } => is_directory = true,
            // Below a directory it is hidden; at the top it is the image's `etc`.
            There::Refused(why) if !is_directory => return stopped(why),
            There::Hidden | There::Refused(_) | There::File(_) => break,
            There::Nothing => {}
        }
        for (slot, there) in [(&mut passwd, &layer.passwd), (&mut group, &layer.group)] {
            if slot.is_none() && *there != There::Nothing {
                *slot = Some(there);
            }
        }
        if layer.opaque || layer.etc == (There::Directory { opaque: true }) {
            break;
        }
    }
    let text = |there: Option<&There>| match there {
        Some(There::Refused(why)) => Err(why.clone()),
        Some(There::File(text)) => Ok(text.clone()),
        _ => Ok(String::new()),
    };
    match (text(passwd), text(group)) {
        (Ok(passwd), Ok(group)) => Merged { refused: None, passwd, group },
        (Err(why), _) | (_, Err(why)) => stopped(&why),
    }
}

fn stopped(why: &str) -> Merged {
    Merged { refused: Some(why.to_owned()), ..Merged::default() }
}

#[cfg(test)]
mod tests;
