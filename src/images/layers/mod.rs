//! What an image becomes on the engine's disk, and what it would give a process of root to open: measured once for
//! each layer by a bounded read of it as a stream. Nothing is ever unpacked here.
//!
//! The engine (Podman 4.3 with containers/storage) decides what can be unpacked; its rules are those of `tree.rs`.

use std::io::{BufReader, Cursor, Read};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::ids::Digest;

mod archive;
mod packing;
mod tree;

pub use packing::Packing;

use archive::{Archive, Entry, Type};
use tree::{Node, Tree};

/// Largest `etc/passwd` and `etc/group`, in bytes.
const NAMES: u64 = 256 << 10;
/// How much of them is kept to look names up in.
const KEPT: usize = 32 << 10;
/// Most files of a layer whose text is held while it is read.
const HELD: usize = 64;
/// Bytes that a file takes at least on the disk.
const DISK_BLOCK: u64 = 4096;
/// A layer may unpack to so many times its size, and in any case to `SMALL`.
const RATIO: u64 = 200;
const SMALL: u64 = 1 << 20;
/// Most bytes that one layer may unpack to.
const LARGEST: u64 = 32 << 30;

/// Why a layer was not read to its end.
#[derive(Debug)]
pub enum Stop {
    /// It will never be taken, and why.
    Refused(String),
    /// More than was left of the quota.
    Quota,
    /// It took too long.
    Late,
    /// Other bytes came than its digest names.
    Altered,
    /// It could not be read.
    Broken(std::io::Error),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        // The bounds of the stream below come up through the readers above it as errors of theirs.
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

/// A bound that a stream has met.
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

/// What a layer has at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum There {
    /// Nothing: what lies below counts.
    Nothing,
    /// It hides what lies below.
    Hidden,
    /// A directory; whether it hides what lies below in it.
    Directory {
        /// It does.
        opaque: bool,
    },
    /// A regular file of bounded size, and the text of it that is kept.
    File(String),
    /// Something that is refused, in a few words.
    Refused(String),
}

/// What is known of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Digest of the unpacked layer.
    pub diff_id: Digest,
    /// Bytes that it takes on the engine's disk.
    pub bytes: u64,
    /// Files and directories in it.
    pub files: u64,
    /// How it is packed; not known of a layer that is not taken.
    #[serde(default)]
    pub packing: Option<Packing>,
    /// Why it is not taken; empty when it is.
    #[serde(default)]
    pub refused: String,
    /// Whether it hides everything below.
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
    /// The report on a layer that is not taken.
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

/// Bounds of one read.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of the layer as it is stored.
    pub stored: u64,
    /// Bytes that it may become on the engine's disk.
    pub budget: u64,
    /// When it must have ended.
    pub until: Instant,
}

/// Measures one layer: gzip (all its members) or a plain archive, told apart by its first bytes. A verdict is given
/// only on the very bytes that the digest names: what was not needed for it is read to its end, too.
pub fn measure(layer: impl Read, digest: &Digest, bounds: Bounds) -> Result<LayerReport, Stop> {
    let mut stored = Stored { input: layer, hash: Sha256::new(), read: 0, bounds };
    let outcome = unpack(&mut stored, bounds);
    if matches!(outcome, Ok(_) | Err(Stop::Refused(_))) {
        stored.check(digest)?;
    }
    outcome
}

fn unpack(stored: &mut impl Read, bounds: Bounds) -> Result<LayerReport, Stop> {
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

fn read(archive: impl Read, bounds: Bounds) -> Result<LayerReport, Stop> {
    let mut unpacked = Unpacked::new(archive, bounds);
    walk(&mut unpacked, bounds).and_then(|report| unpacked.end(report))
}

fn digest_of(hash: Sha256) -> Option<Digest> {
    format!("sha256:{}", data_encoding::HEXLOWER.encode(&hash.finalize())).parse().ok()
}

/// The layer as it is stored: what goes wrong here is not the layer's fault.
struct Stored<R> {
    input: R,
    hash: Sha256,
    read: u64,
    bounds: Bounds,
}

impl<R: Read> Stored<R> {
    /// Reads on to the end, and holds all that came against the digest and the size.
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

/// The unpacked layer: counted, hashed and held to its bounds.
struct Unpacked<R> {
    input: R,
    hash: Sha256,
    read: u64,
    most: (u64, fn() -> Bound),
    until: Instant,
}

impl<R: Read> Unpacked<R> {
    fn new(input: R, bounds: Bounds) -> Self {
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

fn walk(input: &mut impl Read, bounds: Bounds) -> Result<LayerReport, Stop> {
    let mut archive = Archive::new(BufReader::with_capacity(64 << 10, input));
    let mut tree = Tree::new();
    let (mut bytes, mut held) = (0_u64, 0);
    while let Some(entry) = archive.next()? {
        bytes = bytes.saturating_add(entry.size.next_multiple_of(DISK_BLOCK).max(DISK_BLOCK));
        // Bytes that become no file count as they are: the engine reads them, too.
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

fn may_be_names(entry: &Entry) -> bool {
    let last = entry.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    entry.kind == Type::File && entry.size <= NAMES && matches!(last, b"passwd" | b"group")
}

/// Whole lines of a file, as far as they are kept. No NUL: the database takes none.
fn kept(bytes: &[u8]) -> Box<str> {
    let mut text = String::from_utf8_lossy(bytes).replace('\0', "");
    // What replaces bytes that are no text is longer than they are.
    if text.len() > KEPT {
        let end = text.as_bytes()[..KEPT].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        text.truncate(end);
    }
    text.into()
}

fn folder(node: Option<&Node>) -> There {
    match node {
        None => There::Nothing,
        Some(Node::Whiteout) => There::Hidden,
        Some(Node::Directory { opaque }) => There::Directory { opaque: *opaque },
        Some(_) => There::Refused("etc is not a directory".into()),
    }
}

fn names(node: Option<&Node>, path: &str) -> There {
    let what = match node {
        None => return There::Nothing,
        Some(Node::Whiteout) => return There::Hidden,
        Some(Node::File(size, text)) if *size <= NAMES => {
            return There::File(text.clone().unwrap_or_default().into());
        }
        Some(Node::File(..)) => return There::Refused(format!("{path} is larger than 256 KiB")),
        Some(Node::Fifo) => "a FIFO",
        Some(Node::SymbolicLink(_)) => "a symbolic link",
        Some(Node::Directory { .. }) => "a directory",
        Some(Node::Device) => "a device",
    };
    There::Refused(format!("{path} is {what}, not a regular file"))
}

/// What the layers of an image are together, from the bottom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Merged {
    /// Why the image is not taken.
    pub refused: Option<String>,
    /// `etc/passwd`, as far as it is kept.
    pub passwd: String,
    /// `etc/group`, likewise.
    pub group: String,
}

/// The first layer that is not taken, and why.
#[must_use]
pub fn refusal(layers: &[LayerReport]) -> Option<String> {
    let (n, layer) = layers.iter().enumerate().find(|(_, layer)| !layer.refused.is_empty())?;
    Some(format!("layer {} of {}: {}", n + 1, layers.len(), layer.refused))
}

/// The first layer that is packed in another way than its media type says, and how.
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

/// Lays layers upon each other as the kernel does.
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
            // Below a directory it is hidden; at the top it is what the image has.
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
