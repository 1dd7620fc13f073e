//! Logs of instances: two bounded segments per instance. The engine's monitor writes into a pipe that the agent
//! reads (`app/reading.rs`). An instance of an earlier version writes into a file, which the engine truncates
//! instead of rotating: the agent follows that file and marks the gap. Memory holds one chunk.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::driver::{LogLine, LogStreamName};

/// Bytes of a segment; each instance has two.
const SEGMENT: u64 = 4 << 20;
/// Maximum length of a stored line, in bytes.
const LINE: usize = 16 << 10;
/// Bytes read at a time, so that one noisy app does not delay the others.
const CHUNK: u64 = 4 << 20;

/// The log of one instance.
#[derive(Debug)]
pub(super) struct Tail {
    raw: PathBuf,
    dir: PathBuf,
    instance: u32,
    offset: u64,
    partial: Vec<u8>,
    written: u64,
}

impl Tail {
    /// Follows a raw log and writes it into the segments `<instance>.log` and `<instance>.log.1` of a folder.
    #[must_use]
    pub(super) fn new(raw: PathBuf, dir: PathBuf, instance: u32) -> Self {
        let written = std::fs::metadata(dir.join(format!("{instance}.log"))).map_or(0, |m| m.len());
        let offset = std::fs::read_to_string(dir.join(format!("{instance}.offset")))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        Self { raw, dir, instance, offset, partial: Vec::new(), written }
    }

    fn segment(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.instance))
    }

    /// Reads new data from the raw log. Returns the lines for log followers.
    pub(super) fn advance(&mut self) -> std::io::Result<Vec<LogLine>> {
        let mut file = match File::open(&self.raw) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        let mut lines = Vec::new();
        if length < self.offset {
            // The engine has truncated the file: the lines in between are lost, and a note says so.
            self.offset = 0;
            self.partial.clear();
            lines.push(self.note("lines are missing here: they came faster than they could be stored"));
        }
        if length > self.offset {
            file.seek(SeekFrom::Start(self.offset))?;
            let mut chunk = Vec::new();
            self.offset += file.take(CHUNK).read_to_end(&mut chunk)? as u64;
            self.split(&chunk, &mut lines);
        }
        self.write(&lines)?;
        Ok(lines)
    }

    /// Takes data that was read elsewhere. Returns the lines for log followers.
    pub(super) fn take(&mut self, bytes: &[u8]) -> std::io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        self.split(bytes, &mut lines);
        self.write(&lines)?;
        Ok(lines)
    }

    fn split(&mut self, bytes: &[u8], lines: &mut Vec<LogLine>) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let room = (LINE + 128).saturating_sub(self.partial.len());
            self.partial.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                let whole = std::mem::take(&mut self.partial);
                lines.extend(parse(&whole, self.instance));
            }
        }
    }

    /// Returns a line written by the platform itself.
    #[must_use]
    pub(super) fn note(&self, text: &str) -> LogLine {
        LogLine {
            instance: self.instance,
            at: OffsetDateTime::now_utc(),
            stream: LogStreamName::Platform,
            text: text.to_owned(),
        }
    }

    /// Appends lines to the segments.
    pub(super) fn write(&mut self, lines: &[LogLine]) -> std::io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.dir)?;
        let mut out = Vec::new();
        for line in lines {
            let mut text = serde_json::to_vec(line)?;
            text.push(b'\n');
            if self.written > 0 && self.written + (out.len() + text.len()) as u64 > SEGMENT {
                self.append(&out)?;
                out.clear();
                std::fs::rename(self.segment(), self.dir.join(format!("{}.log.1", self.instance)))?;
                self.written = 0;
            }
            out.extend_from_slice(&text);
            if self.written == 0 && out.len() as u64 > SEGMENT / 2 {
                self.append(&out)?;
                out.clear();
            }
        }
        self.append(&out)?;
        std::fs::write(self.dir.join(format!("{}.offset", self.instance)), self.offset.to_string())
    }

    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut file = File::options().create(true).append(true).open(self.segment())?;
        file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Parses the engine's own format `TIME STREAM F|P TEXT`. The app's text begins after the third space.
fn parse(line: &[u8], instance: u32) -> Option<LogLine> {
    let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
    let mut parts = text.splitn(4, ' ');
    let at = OffsetDateTime::parse(parts.next()?, &Rfc3339).ok()?;
    let stream = match parts.next()? {
        "stdout" => LogStreamName::Stdout,
        "stderr" => LogStreamName::Stderr,
        _ => return None,
    };
    parts.next()?;
    let text = parts.next().unwrap_or_default();
    let mut end = text.len().min(LINE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Some(LogLine { instance, at, stream, text: text[..end].trim_end_matches('\r').to_owned() })
}

/// Returns the segments of an app: instance number, whether it is the rotated one, path.
fn segments(dir: &Path) -> Vec<(u32, bool, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (number, rest) = name.split_once('.')?;
            let rotated = match rest {
                "log" => false,
                "log.1" => true,
                _ => return None,
            };
            Some((number.parse().ok()?, rotated, entry.path()))
        })
        .collect()
}

/// Number of ended instances whose log is kept.
const ENDED: usize = 5;

/// Removes the logs of all instances except the existing ones and the last few that have ended.
pub(super) fn prune(dir: &Path, there: &[u32]) {
    let mut ended: Vec<u32> = segments(dir)
        .into_iter()
        .map(|(number, ..)| number)
        .filter(|number| !there.contains(number))
        .collect();
    ended.sort_unstable_by(|a, b| b.cmp(a));
    ended.dedup();
    for number in ended.into_iter().skip(ENDED) {
        for rest in ["log", "log.1", "offset", "raw", "pipe", "passwd", "group"] {
            let _ = std::fs::remove_file(dir.join(format!("{number}.{rest}")));
        }
    }
}

/// Maximum bytes of all segments together that one query reads.
const READ: u64 = 4 << 20;

/// Returns the last lines of an app's instances, oldest first, as far back as a bounded read reaches.
pub(super) fn last(dir: &Path, instance: Option<u32>, count: usize) -> Vec<LogLine> {
    let mut files = segments(dir);
    files.retain(|(number, ..)| instance.is_none_or(|wanted| wanted == *number));
    // Rotated segments first, so that each instance's lines are in order before the sort by time.
    files.sort_by_key(|(number, rotated, _)| (*number, !rotated));
    let share = READ / (files.len() as u64).max(1);
    let mut lines: Vec<LogLine> = Vec::new();
    for (_, _, path) in files {
        let Ok(mut file) = File::open(path) else { continue };
        let length = file.metadata().map_or(0, |meta| meta.len());
        let skip = length.saturating_sub(share);
        if file.seek(SeekFrom::Start(skip)).is_err() {
            continue;
        }
        let mut own = std::collections::VecDeque::new();
        // If the read begins in the middle of a line, the rest of that line is skipped.
        let whole = BufReader::new(file).split(b'\n').map_while(Result::ok).skip(usize::from(skip > 0));
        for line in whole {
            if own.len() == count {
                own.pop_front();
            }
            own.push_back(line);
        }
        lines.extend(own.iter().filter_map(|line| serde_json::from_slice::<LogLine>(line).ok()));
    }
    lines.sort_by_key(|line| line.at);
    let skip = lines.len().saturating_sub(count);
    lines.split_off(skip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_bounded_and_a_gap_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        let mut tail = Tail::new(raw.clone(), dir.path().join("own"), 3);
        let stamp = "2026-11-24T12:00:00.000000001Z";
        std::fs::write(
            &raw,
            format!("{stamp} stdout F one\n{stamp} stderr F {}\n{stamp} stdout F tw", "x".repeat(100_000)),
        )
        .unwrap();
        let lines = tail.advance().unwrap();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1].text.len(), LINE);
        std::fs::write(&raw, format!("{stamp} stdout F after\n")).unwrap();
        let lines = tail.advance().unwrap();
        assert_eq!(lines[0].stream, LogStreamName::Platform);
        assert_eq!(lines[1].text, "after");
        assert_eq!(last(&dir.path().join("own"), None, 10).len(), 4);
        // A forged prefix remains text.
        std::fs::write(
            &raw,
            format!("{stamp} stdout F after\n{stamp} stdout F 2099-01-01T00:00:00Z stderr F x\n"),
        )
        .unwrap();
        let lines = tail.advance().unwrap();
        assert_eq!(lines[0].text, "2099-01-01T00:00:00Z stderr F x");
    }

    #[test]
    fn segments_never_grow_beyond_their_bound() {
        let dir = tempfile::tempdir().unwrap();
        let mut tail = Tail::new(dir.path().join("raw"), dir.path().join("own"), 1);
        let line = tail.note(&"y".repeat(10_000));
        for _ in 0..2_000 {
            tail.write(std::slice::from_ref(&line)).unwrap();
        }
        let size: u64 = std::fs::read_dir(dir.path().join("own"))
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(size <= 2 * SEGMENT + 64, "{size}");
        assert_eq!(last(&dir.path().join("own"), None, 10).len(), 10);
    }

    #[test]
    fn the_logs_of_the_last_few_that_have_ended_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for n in 1..=20 {
            let mut tail = Tail::new(dir.path().join(format!("{n}.raw")), dir.path().to_owned(), n);
            let line = tail.note("x");
            tail.write(&[line]).unwrap();
        }
        prune(dir.path(), &[3, 20]);
        let mut left: Vec<u32> = segments(dir.path()).into_iter().map(|(number, ..)| number).collect();
        left.sort_unstable();
        assert_eq!(left, [3, 15, 16, 17, 18, 19, 20]);
    }
}
