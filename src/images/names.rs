//! Users and groups of an image: its own /etc/passwd and /etc/group, found by a bounded read of its
//! layers as a stream. Nothing is ever unpacked.

use std::collections::BTreeMap;
use std::io::Read;

/// Largest passwd or group file, in bytes.
const FILE: u64 = 256 << 10;
/// Most bytes that are unpacked of all layers on the search.
pub const UNPACKED: u64 = 2 << 30;
/// Most entries of one layer that are looked at.
const ENTRIES: usize = 500_000;

/// Names of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    users: BTreeMap<String, (u32, u32)>,
    groups: BTreeMap<String, u32>,
}

impl Names {
    /// From the texts of the two files (passwd(5), group(5)). The first line of a name counts.
    #[must_use]
    pub fn parse(passwd: &str, group: &str) -> Self {
        let mut names = Self::default();
        for line in passwd.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [name, _, uid, gid, ..] = fields[..]
                && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
            {
                names.users.entry(name.to_owned()).or_insert((uid, gid));
            }
        }
        for line in group.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [name, _, gid, ..] = fields[..]
                && let Ok(gid) = gid.parse()
            {
                names.groups.entry(name.to_owned()).or_insert(gid);
            }
        }
        names
    }

    /// Ids of a user.
    #[must_use]
    pub fn user(&self, name: &str) -> Option<(u32, u32)> {
        self.users.get(name).copied()
    }
    /// Id of a group.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<u32> {
        self.groups.get(name).copied()
    }
    /// The group of a user with this number.
    #[must_use]
    pub fn group_of(&self, uid: u32) -> Option<u32> {
        self.users.values().find(|(own, _)| *own == uid).map(|(_, gid)| *gid)
    }
}

/// What one layer says about the two files: a text, or that the file was removed, or nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// `etc/passwd`.
    pub passwd: Option<String>,
    /// `etc/group`.
    pub group: Option<String>,
}

impl Found {
    /// Whether no lower layer has to be asked.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.passwd.is_some() && self.group.is_some()
    }
    /// Fills what is missing from a lower layer.
    pub fn fill(&mut self, lower: Self) {
        if self.passwd.is_none() {
            self.passwd = lower.passwd;
        }
        if self.group.is_none() {
            self.group = lower.group;
        }
    }
}

/// Looks through one layer: gzip (all members) or plain tar, told apart by its first bytes. A file
/// that is anything but a plain file, or that a whiteout removes, reads as empty.
///
/// `budget`: bytes that may still be unpacked; what is used is taken off.
pub fn search(layer: impl Read, budget: &mut u64) -> std::io::Result<Found> {
    let mut layer = std::io::BufReader::new(layer);
    let magic = std::io::BufRead::fill_buf(&mut layer)?;
    if magic.starts_with(&[0x1f, 0x8b]) {
        entries(flate2::bufread::MultiGzDecoder::new(layer), budget)
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Err(std::io::Error::other("zstd layers are not looked into"))
    } else {
        entries(layer, budget)
    }
}

fn entries(reader: impl Read, budget: &mut u64) -> std::io::Result<Found> {
    let mut bounded = reader.take(*budget);
    let found = read_entries(&mut bounded);
    *budget = bounded.limit();
    if *budget == 0 {
        return Err(std::io::Error::other("the image is too large to be searched for names"));
    }
    found
}

fn read_entries(reader: &mut impl Read) -> std::io::Result<Found> {
    let mut archive = tar::Archive::new(reader);
    let mut found = Found::default();
    // Raw: extension headers (long names, pax) would be read whole into memory, and neither file needs one.
    for (n, entry) in archive.entries()?.raw(true).enumerate() {
        if n > ENTRIES {
            return Err(std::io::Error::other("too many entries"));
        }
        let entry = entry?;
        let path = entry.path_bytes();
        let path = path.strip_prefix(b"./").or_else(|| path.strip_prefix(b"/")).unwrap_or(&path);
        let slot = match path {
            b"etc/passwd" | b"etc/.wh.passwd" => &mut found.passwd,
            b"etc/group" | b"etc/.wh.group" => &mut found.group,
            b"etc/.wh..wh..opq" | b".wh.etc" => {
                found.fill(Found { passwd: Some(String::new()), group: Some(String::new()) });
                continue;
            }
            _ => continue,
        };
        let plain =
            entry.header().entry_type().is_file() && path.starts_with(b"etc/") && !path.contains(&b'.');
        let mut text = Vec::new();
        if plain {
            entry.take(FILE).read_to_end(&mut text)?;
        }
        *slot = Some(String::from_utf8_lossy(&text).into_owned());
        if found.is_whole() {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn layer(files: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append_data(&mut header, path, text.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn both_files_are_found_in_plain_and_packed_layers() {
        let plain = layer(&[("bin/x", "y"), ("etc/passwd", "app:x:7:8:"), ("etc/group", "app:x:8:")]);
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&plain).unwrap();
        for bytes in [plain, packed.finish().unwrap()] {
            let found = search(&bytes[..], &mut { UNPACKED }).unwrap();
            let names = Names::parse(&found.passwd.unwrap(), &found.group.unwrap());
            assert_eq!(names.user("app"), Some((7, 8)));
        }
    }

    #[test]
    fn a_whiteout_hides_what_lies_below() {
        let mut top = search(&layer(&[("etc/.wh.passwd", "")])[..], &mut { UNPACKED }).unwrap();
        let lower = layer(&[("etc/passwd", "app:x:7:8:"), ("etc/group", "g:x:1:")]);
        top.fill(search(&lower[..], &mut { UNPACKED }).unwrap());
        assert_eq!(top.passwd.as_deref(), Some(""));
        assert_eq!(top.group.as_deref(), Some("g:x:1:"));
    }

    #[test]
    fn a_bomb_costs_no_more_than_the_budget_and_no_memory() {
        // A long name of half a gigabyte: its header says so, and zeros follow.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(512 << 20);
        header.set_cksum();
        let bomb = (&header.as_bytes()[..]).chain(std::io::repeat(0));
        let mut budget = 64 << 20;
        assert!(search(bomb, &mut budget).is_err());
        assert_eq!(budget, 0);
    }
}
