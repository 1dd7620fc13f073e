//! Tracks which images are being fetched, for which app, and their progress. An app that does not run yet shows
//! what it waits for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::Notify;

use crate::driver::Fetching;
use crate::driver::workload::Workload;
use crate::ids::AppId;

/// Interval at which the bytes of a fetch are reported.
const PROGRESS: Duration = Duration::from_secs(1);
/// Maximum depth and maximum number of files when the folder of a fetch is measured.
const LOOK: (usize, usize) = (4, 2_000);

#[derive(Debug)]
struct FetchEntry {
    fetching: Fetching,
    folder: Option<PathBuf>,
}

/// The fetches of this agent.
#[derive(Debug, Clone, Default)]
pub(super) struct Fetches(Arc<SharedFetches>);

#[derive(Debug, Default)]
struct SharedFetches {
    all: Mutex<HashMap<AppId, FetchEntry>>,
    /// Rises when a fetch begins, gets its turn, or ends.
    rounds: AtomicU64,
    changed: Notify,
}

/// A recorded fetch; dropping it ends the record.
#[derive(Debug)]
pub(super) struct FetchRecord {
    fetches: Fetches,
    app: AppId,
}

impl Fetches {
    fn with<T>(&self, change: impl FnOnce(&mut HashMap<AppId, FetchEntry>) -> T) -> T {
        change(&mut self.0.all.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns a count that rises when a fetch begins, gets its turn, or ends.
    pub(super) fn rounds(&self) -> u64 {
        self.0.rounds.load(Ordering::Relaxed)
    }

    /// Waits for such a change. While a fetch is under way, it returns after [`PROGRESS`]: the byte count changes
    /// all the time.
    pub(super) async fn changed(&self) {
        if self.with(|all| all.is_empty()) {
            self.0.changed.notified().await;
        } else {
            let _ = tokio::time::timeout(PROGRESS, self.0.changed.notified()).await;
            self.0.rounds.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell(&self) {
        self.0.rounds.fetch_add(1, Ordering::Relaxed);
        self.0.changed.notify_waiters();
    }

    /// Records a fetch that waits for its turn.
    pub(super) fn record(&self, workload: &Workload, unpacked: u64) -> FetchRecord {
        let app = workload.app_id;
        let since = OffsetDateTime::now_utc();
        let fetching = Fetching { app, revision: workload.revision, since, waits: true, bytes: 0, unpacked };
        self.with(|all| all.insert(app, FetchEntry { fetching, folder: None }));
        self.tell();
        FetchRecord { fetches: self.clone(), app }
    }

    /// Returns all fetches, each with its bytes so far.
    pub(super) fn seen(&self) -> Vec<Fetching> {
        let all: Vec<(Fetching, Option<PathBuf>)> = self
            .with(|all| all.values().map(|entry| (entry.fetching.clone(), entry.folder.clone())).collect());
        all.into_iter()
            .map(|(fetching, folder)| Fetching {
                bytes: folder.map_or(0, |folder| size(&folder)),
                ..fetching
            })
            .collect()
    }
}

impl FetchRecord {
    /// Marks the start of the fetch; its data is first written to this folder.
    pub(super) fn begin(&self, folder: PathBuf) {
        self.fetches.with(|all| {
            if let Some(entry) = all.get_mut(&self.app) {
                entry.fetching.waits = false;
                entry.fetching.since = OffsetDateTime::now_utc();
                entry.folder = Some(folder);
            }
        });
        self.fetches.tell();
    }
}

impl Drop for FetchRecord {
    fn drop(&mut self) {
        self.fetches.with(|all| all.remove(&self.app));
        self.fetches.tell();
    }
}

/// Returns the bytes of the files below a folder; links are not followed.
fn size(folder: &Path) -> u64 {
    let mut open = vec![(folder.to_owned(), 0)];
    let (mut sum, mut seen) = (0_u64, 0);
    while let Some((folder, depth)) = open.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            seen += 1;
            if seen > LOOK.1 {
                return sum;
            }
            match entry.metadata() {
                Ok(data) if data.is_file() => sum = sum.saturating_add(data.len()),
                Ok(data) if data.is_dir() && depth < LOOK.0 => open.push((entry.path(), depth + 1)),
                _ => {}
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_folder_are_counted_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("container_images_storage1");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("1"), vec![0; 3_000]).unwrap();
        std::fs::write(dir.path().join("auth.json"), vec![0; 10]).unwrap();
        std::os::unix::fs::symlink("/", inner.join("link")).unwrap();
        assert_eq!(size(dir.path()), 3_010);
        assert_eq!(size(&dir.path().join("none")), 0);
    }
}
