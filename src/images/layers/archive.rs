//! Reads the tar format as a stream in bounded memory and returns one entry after the other. Merges long names
//! and PAX records into their entry. Refuses forms that no builder writes or that readers interpret
//! differently.

use std::io::{ErrorKind, Read};

use super::Stop;

const BLOCK: usize = 512;
/// Maximum bytes of the headers of one entry (the limit of Go's reader).
const EXTENSION: u64 = 1 << 20;
/// Maximum length of a path and of a link, in bytes (PATH_MAX without its NUL).
pub(super) const PATH: usize = 4095;
/// Maximum bytes after the end of the archive: the engine holds them in memory.
const BEHIND: u64 = 1 << 20;

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    /// A regular file.
    File,
    /// A hard link.
    HardLink,
    /// A symbolic link.
    SymbolicLink,
    /// A device. Device (0, 0) is a whiteout: it hides the lower layers' file.
    Device {
        /// Whether it is a whiteout.
        whiteout: bool,
    },
    /// A directory.
    Directory,
    /// A FIFO.
    Fifo,
}

/// One entry of an archive.
#[derive(Debug)]
pub(super) struct ArchiveEntry {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: Type,
    pub(super) size: u64,
}

/// Reads an archive.
pub(super) struct Archive<R> {
    input: R,
    /// Unread bytes of the entry's content.
    left: u64,
    padding: u64,
    /// Bytes read so far.
    taken: u64,
    /// Bytes of all global headers.
    globals: u64,
}

#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

fn refuse<T>(why: &str) -> Result<T, Stop> {
    Err(Stop::Refused(why.to_owned()))
}

impl<R: Read> Archive<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0, taken: 0, globals: 0 }
    }

    /// Returns the number of bytes read so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Returns the next entry; none at the end.
    pub(super) fn next(&mut self) -> Result<Option<ArchiveEntry>, Stop> {
        self.skip()?;
        let mut extension = Extension::default();
        let mut extended = 0;
        loop {
            let Some(block) = self.block()? else {
                return if extended == 0 { Ok(None) } else { refuse("it is cut off") };
            };
            let header = Header(&block);
            let size = header.size()?;
            match header.kind() {
                kind @ (b'x' | b'g' | b'L' | b'K') => {
                    // Global headers belong to no entry; all of an archive share one limit.
                    let sum = if kind == b'g' { &mut self.globals } else { &mut extended };
                    *sum = sum.saturating_add(size).saturating_add(BLOCK as u64);
                    if *sum > EXTENSION {
                        return refuse(
                            "the headers of an entry, or those for all entries, are larger than 1 MiB",
                        );
                    }
                    let bytes = self.bytes(size)?;
                    match kind {
                        b'x' => records(&bytes, &mut extension)?,
                        b'g' => global(&bytes)?,
                        b'L' => extension.path = Some(text(&bytes).to_vec()),
                        _ => extension.link = Some(text(&bytes).to_vec()),
                    }
                }
                kind => return self.entry(&header, kind, size, extension).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        kind: u8,
        size: u64,
        extension: Extension,
    ) -> Result<ArchiveEntry, Stop> {
        let path = extension.path.unwrap_or_else(|| header.path());
        let link = extension.link.unwrap_or_else(|| header.link());
        if path.len() > PATH || link.len() > PATH {
            return refuse("a path in it is longer than 4095 bytes");
        }
        let size = extension.size.unwrap_or(size);
        let kind = match kind {
            0 if path.ends_with(b"/") => Type::Directory,
            0 | b'0' => Type::File,
            b'1' => Type::HardLink,
            b'2' => Type::SymbolicLink,
            b'3' => Type::Device { whiteout: header.device()? == (0, 0) },
            b'4' => Type::Device { whiteout: false },
            b'5' => Type::Directory,
            b'6' => Type::Fifo,
            b'S' => return refuse("it has a sparse file"),
            _ => return refuse("it has an entry of an unknown type"),
        };
        // Other types have no content, whatever size the header claims.
        let size = if kind == Type::File { size } else { 0 };
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        Ok(ArchiveEntry { path, link, kind, size })
    }

    /// Reads the content of the entry, up to `most` bytes.
    pub(super) fn content(&mut self, most: u64) -> Result<Vec<u8>, Stop> {
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(self.left.min(most)).read_to_end(&mut bytes)?;
        self.left -= read as u64;
        self.taken += read as u64;
        Ok(bytes)
    }

    fn skip(&mut self) -> Result<(), Stop> {
        let left = self.left + self.padding;
        let skipped = std::io::copy(&mut (&mut self.input).take(left), &mut std::io::sink())?;
        self.taken += skipped;
        // The last file may lack its padding.
        if skipped < self.left {
            return refuse("it is cut off");
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// Reads the bytes of an extension.
    fn bytes(&mut self, size: u64) -> Result<Vec<u8>, Stop> {
        (self.left, self.padding) = (size, size.wrapping_neg() % BLOCK as u64);
        let bytes = self.content(size)?;
        self.skip()?;
        Ok(bytes)
    }

    /// Reads the next header; none at the end of the archive.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Stop> {
        let mut block = [0; BLOCK];
        match self.fill(&mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return refuse("it is cut off"),
        }
        if block.iter().any(|b| *b != 0) {
            return if Header(&block).is_whole() {
                Ok(Some(block))
            } else {
                refuse("it is not a tar archive")
            };
        }
        match self.fill(&mut block)? {
            0 => Ok(None),
            BLOCK if block.iter().all(|b| *b == 0) => Ok(None),
            _ => refuse("it is not a tar archive"),
        }
    }

    /// Reads a complete block, or all bytes that remain.
    fn fill(&mut self, block: &mut [u8; BLOCK]) -> Result<usize, Stop> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(read) => {
                    filled += read;
                    self.taken += read as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(filled)
    }

    /// Reads to the end of the input. Returns the total number of bytes.
    pub(super) fn finish(mut self) -> Result<u64, Stop> {
        let behind = std::io::copy(&mut (&mut self.input).take(BEHIND + 1), &mut std::io::sink())?;
        if behind > BEHIND { refuse("more than 1 MiB follows its end") } else { Ok(self.taken + behind) }
    }
}

/// A header block.
struct Header<'a>(&'a [u8; BLOCK]);

/// Returns the bytes of a field before its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

impl Header<'_> {
    /// Checks the checksum. Old archives computed a signed sum.
    fn is_whole(&self) -> bool {
        let Some(told) = octal(&self.0[148..156]) else { return false };
        let bytes = self.0.iter().enumerate().map(|(n, b)| if (148..156).contains(&n) { b' ' } else { *b });
        let (mut plain, mut signed) = (0_u64, 0_i64);
        for byte in bytes {
            plain += u64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        told == plain || i64::try_from(told) == Ok(signed)
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn size(&self) -> Result<u64, Stop> {
        number(&self.0[124..136])
    }

    fn device(&self) -> Result<(u64, u64), Stop> {
        Ok((number(&self.0[329..337])?, number(&self.0[337..345])?))
    }

    fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = text(&self.0[345..500]);
        // Only the POSIX format has a prefix.
        if &self.0[257..263] == b"ustar\0" && !prefix.is_empty() {
            return [prefix, b"/", name].concat();
        }
        name.to_vec()
    }

    fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches(|c| c == ' ' || c == '\0');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// Parses a number: octal digits, or binary if the first bit is set.
fn number(field: &[u8]) -> Result<u64, Stop> {
    let value = match field {
        [0x80, rest @ ..] => {
            rest.iter().try_fold(0_u64, |sum, b| sum.checked_mul(256).map(|sum| sum | u64::from(*b)))
        }
        // Negative, or longer than 88 bits.
        [first, ..] if first & 0x80 != 0 => None,
        _ => octal(field),
    };
    value
        .filter(|value| *value < 1 << 60)
        .ok_or_else(|| Stop::Refused("a number in it cannot be read".into()))
}

/// Reads PAX records ("LENGTH KEY=VALUE\n").
fn each(mut bytes: &[u8], mut take: impl FnMut(&[u8], &[u8]) -> Result<(), Stop>) -> Result<(), Stop> {
    while !bytes.is_empty() {
        let record = bytes.iter().position(|b| *b == b' ').and_then(|space| {
            let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
            let body = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = body.iter().position(|b| *b == b'=')?;
            Some((length, &body[..equals], &body[equals + 1..]))
        });
        let Some((length, key, value)) = record else { return refuse("an extended header cannot be read") };
        take(key, value)?;
        bytes = &bytes[length..];
    }
    Ok(())
}

fn records(bytes: &[u8], into: &mut Extension) -> Result<(), Stop> {
    each(bytes, |key, value| {
        match key {
            b"path" | b"linkpath" if value.contains(&0) => return refuse("a path in it has a NUL byte"),
            // An empty value revokes an earlier one.
            b"path" => into.path = Some(value.to_vec()).filter(|value| !value.is_empty()),
            b"linkpath" => into.link = Some(value.to_vec()).filter(|value| !value.is_empty()),
            b"size" => {
                let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                let Some(size) = size.filter(|size| *size < 1 << 60) else {
                    return refuse("a number in it cannot be read");
                };
                into.size = Some(size);
            }
            _ if key.starts_with(b"GNU.sparse.") => return refuse("it has a sparse file"),
            // `trusted.overlay.redirect` makes overlayfs show another folder in this place.
            _ if key.starts_with(b"SCHILY.xattr.trusted.") => {
                return refuse(
                    "it sets trusted attributes, which would control the kernel's overlay file system",
                );
            }
            _ => {}
        }
        Ok(())
    })
}

/// Checks a global header: only keys that do not affect entries are accepted.
fn global(bytes: &[u8]) -> Result<(), Stop> {
    each(bytes, |key, _| match key {
        b"comment" | b"mtime" | b"atime" | b"ctime" | b"uid" | b"gid" | b"uname" | b"gname" => Ok(()),
        _ => refuse("it has a header that changes all entries"),
    })
}
