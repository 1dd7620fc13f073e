//! Heads of the seal chain, outside the database: one line per round in an append-only file. An attacker who
//! cuts off the newest rows with their seals leaves a valid chain. The missing head reveals it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;

/// Size in bytes at which the file is rotated. One rotated file is kept.
const FULL: u64 = 8 << 20;

/// The file of the heads, if any.
#[derive(Debug, Clone)]
pub struct Heads(Option<PathBuf>);

impl Heads {
    /// Writes heads to this file, or nowhere.
    #[must_use]
    pub fn in_file(path: Option<PathBuf>) -> Self {
        Self(path)
    }

    fn before(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".1");
        PathBuf::from(name)
    }

    /// Appends a head. The head is on disk when this returns.
    pub fn append(&self, number: i64, mac: &[u8]) -> std::io::Result<()> {
        let Some(path) = &self.0 else { return Ok(()) };
        if fs::metadata(path).is_ok_and(|meta| meta.len() > FULL) {
            fs::rename(path, Self::before(path))?;
        }
        let mut file = File::options().create(true).append(true).open(path)?;
        writeln!(file, "{number} {}", HEXLOWER.encode(mac))?;
        file.sync_data()
    }

    /// Reads all kept heads, oldest first.
    pub fn read(&self) -> std::io::Result<Vec<(i64, Vec<u8>)>> {
        let Some(path) = &self.0 else { return Ok(Vec::new()) };
        let mut heads = Vec::new();
        for path in [Self::before(path), path.clone()] {
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            heads.extend(text.lines().filter_map(|line| {
                let (number, mac) = line.split_once(' ')?;
                Some((number.parse().ok()?, HEXLOWER.decode(mac.as_bytes()).ok()?))
            }));
        }
        Ok(heads)
    }
}
