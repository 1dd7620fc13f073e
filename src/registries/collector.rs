//! The collector: a small process beside the registry, under the registry's user. It lists the registry's disk
//! and removes the objects that `serve` names; `serve` itself has no access to that disk. The collector has no
//! database and decides nothing. Each request removes only one blob, one link, one upload or one empty
//! repository.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::error::Error;
use crate::ids::{Digest, RepositoryPath, TenantName};

/// Maximum concurrent requests.
const AT_ONCE: usize = 16;
/// Maximum bytes of a request.
const QUESTION: u64 = 4 << 10;
/// Maximum bytes of an answer.
const ANSWER: u64 = 8 << 20;
/// Maximum blobs in an answer.
const BLOBS: usize = 50_000;
/// Maximum time of an answer.
const PATIENCE: Duration = Duration::from_secs(4);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum CollectorQuestion {
    /// Lists the blobs whose digest begins with this byte.
    List { prefix: u8 },
    /// Removes the bytes of a blob or manifest.
    RemoveBlob { digest: Digest },
    /// Removes an upload.
    RemoveUpload { tenant: TenantName, repository: RepositoryPath, id: String },
    /// Removes a repository's folder of a blob or manifest that it no longer has.
    RemoveLink { tenant: TenantName, repository: RepositoryPath, link: RegistryLink, digest: Digest },
    /// Removes the folders of an empty repository.
    RemoveRepository { tenant: TenantName, repository: RepositoryPath },
}

/// The kind of object that a repository's folder stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RegistryLink {
    /// A blob.
    Layer,
    /// A manifest.
    Revision,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum CollectorAnswer {
    Blobs { blobs: Vec<Blob> },
    Removed {},
    Failed { why: String },
}

/// A blob on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its digest, from its path.
    pub digest: Digest,
    /// Bytes.
    pub bytes: u64,
    /// Seconds since it was written.
    pub age: u64,
}

/// The registry's folders (Distribution's filesystem driver).
#[derive(Debug, Clone)]
struct Disk(PathBuf);

impl Disk {
    fn blobs(&self, prefix: &str) -> PathBuf {
        self.0.join("docker/registry/v2/blobs/sha256").join(prefix)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = &digest.as_str()["sha256:".len()..];
        self.blobs(&hex[..2]).join(hex)
    }

    fn repository(&self, tenant: &TenantName, repository: &RepositoryPath) -> PathBuf {
        self.0.join("docker/registry/v2/repositories").join(tenant.as_str()).join(repository.as_str())
    }

    fn link(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        link: RegistryLink,
        digest: &Digest,
    ) -> PathBuf {
        let kind = match link {
            RegistryLink::Layer => "_layers/sha256",
            RegistryLink::Revision => "_manifests/revisions/sha256",
        };
        self.repository(tenant, repository).join(kind).join(&digest.as_str()["sha256:".len()..])
    }

    fn list(&self, prefix: u8) -> io::Result<Vec<Blob>> {
        let folder = match std::fs::read_dir(self.blobs(&format!("{prefix:02x}"))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut blobs = Vec::new();
        for entry in folder.take(BLOBS) {
            let entry = entry?;
            let Some(digest) =
                entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok())
            else {
                continue;
            };
            let Ok(meta) = std::fs::symlink_metadata(entry.path().join("data")) else { continue };
            let age = meta.modified().ok().and_then(|at| at.elapsed().ok()).unwrap_or_default().as_secs();
            blobs.push(Blob { digest, bytes: meta.len(), age });
        }
        Ok(blobs)
    }

    fn remove_repository(&self, tenant: &TenantName, repository: &RepositoryPath) -> io::Result<()> {
        let folder = self.repository(tenant, repository);
        // A repository's own folders begin with an underscore, which names never do: repositories below stay.
        for part in ["_uploads", "_layers", "_manifests"] {
            gone(std::fs::remove_dir_all(folder.join(part)))?;
        }
        let top = self.0.join("docker/registry/v2/repositories");
        for empty in folder.ancestors().take_while(|path| *path != top) {
            if std::fs::remove_dir(empty).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn answer(&self, question: CollectorQuestion) -> CollectorAnswer {
        let removed = match question {
            CollectorQuestion::List { prefix } => match self.list(prefix) {
                Ok(blobs) => return CollectorAnswer::Blobs { blobs },
                Err(error) => Err(error),
            },
            CollectorQuestion::RemoveBlob { digest } => gone(std::fs::remove_dir_all(self.blob(&digest))),
            CollectorQuestion::RemoveUpload { tenant, repository, id } if super::proxy::is_upload_id(&id) => {
                gone(std::fs::remove_dir_all(self.repository(&tenant, &repository).join("_uploads").join(id)))
            }
            CollectorQuestion::RemoveUpload { .. } => {
                Err(io::Error::other("this is not the id of an upload"))
            }
            CollectorQuestion::RemoveLink { tenant, repository, link, digest } => {
                gone(std::fs::remove_dir_all(self.link(&tenant, &repository, link, &digest)))
            }
            CollectorQuestion::RemoveRepository { tenant, repository } => {
                self.remove_repository(&tenant, &repository)
            }
        };
        match removed {
            Ok(()) => CollectorAnswer::Removed {},
            Err(error) => CollectorAnswer::Failed { why: error.to_string() },
        }
    }
}

/// Treats a missing file as removed.
fn gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Answers requests about the registry's folder on a socket until the process ends. Only root, this process's
/// user and the user `peer` get answers.
pub async fn serve(socket: &Path, root: &Path, peer: u32) -> io::Result<()> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    // The folder's permissions decide who can connect; the peer's user id decides who gets answers.
    std::fs::set_permissions(socket, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    crate::readiness::ready();
    let own = rustix::process::getuid().as_raw();
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let disk = Disk(root.to_owned());
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(uid) = stream.peer_cred().map(|cred| cred.uid()) else { continue };
        if ![0, own, peer].contains(&uid) {
            tracing::warn!(uid, "refused a request of a user other than the user of serve");
            continue;
        }
        let disk = disk.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(Duration::from_secs(30), answer(stream, disk)).await;
            drop(permit);
        });
    }
}

async fn answer(stream: UnixStream, disk: Disk) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(QUESTION)).read_line(&mut line).await?;
    let answer = match serde_json::from_str::<CollectorQuestion>(&line) {
        Ok(question) => {
            tokio::task::spawn_blocking(move || disk.answer(question)).await.map_err(io::Error::other)?
        }
        Err(_) => CollectorAnswer::Failed { why: "the request cannot be read".into() },
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    write.write_all(&text).await
}

/// The collector's client, used by `serve`.
#[derive(Debug, Clone)]
pub struct Collector {
    socket: PathBuf,
}

impl Collector {
    /// Creates a client for this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn ask(&self, question: &CollectorQuestion) -> Result<CollectorAnswer, Error> {
        let away = |error: io::Error| {
            tracing::warn!(%error, "the collector does not answer");
            Error::Unavailable("the registry's collector does not answer".into(), Duration::from_secs(5))
        };
        let asking = async {
            let (read, mut write) = UnixStream::connect(&self.socket).await?.into_split();
            let mut text = serde_json::to_vec(question)?;
            text.push(b'\n');
            write.write_all(&text).await?;
            let mut line = String::new();
            BufReader::new(read.take(ANSWER)).read_line(&mut line).await?;
            serde_json::from_str::<CollectorAnswer>(&line).map_err(io::Error::other)
        };
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(Ok(CollectorAnswer::Failed { why })) => Err(away(io::Error::other(why))),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(away(error)),
            Err(_) => Err(away(io::Error::from(io::ErrorKind::TimedOut))),
        }
    }

    /// Lists the blobs whose digest begins with this byte.
    pub(super) async fn list(&self, prefix: u8) -> Result<Vec<Blob>, Error> {
        match self.ask(&CollectorQuestion::List { prefix }).await? {
            CollectorAnswer::Blobs { blobs } => Ok(blobs),
            _ => Err(Error::internal("unexpected answer of the collector")),
        }
    }

    /// Removes the bytes of a blob or manifest.
    pub(super) async fn remove_blob(&self, digest: &Digest) -> Result<(), Error> {
        self.ask(&CollectorQuestion::RemoveBlob { digest: digest.clone() }).await.map(drop)
    }

    /// Removes an upload.
    pub(super) async fn remove_upload(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        id: &str,
    ) -> Result<(), Error> {
        let (tenant, repository) = (tenant.clone(), repository.clone());
        self.ask(&CollectorQuestion::RemoveUpload { tenant, repository, id: id.to_owned() }).await.map(drop)
    }

    /// Removes a repository's folder of a blob or manifest that it no longer has.
    pub(super) async fn remove_link(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
        link: RegistryLink,
        digest: &Digest,
    ) -> Result<(), Error> {
        let (tenant, repository, digest) = (tenant.clone(), repository.clone(), digest.clone());
        self.ask(&CollectorQuestion::RemoveLink { tenant, repository, link, digest }).await.map(drop)
    }

    /// Removes the folders of an empty repository.
    pub(super) async fn remove_repository(
        &self,
        tenant: &TenantName,
        repository: &RepositoryPath,
    ) -> Result<(), Error> {
        let (tenant, repository) = (tenant.clone(), repository.clone());
        self.ask(&CollectorQuestion::RemoveRepository { tenant, repository }).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn blob(root: &Path, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let folder = Disk(root.to_owned()).blob(&digest);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("data"), bytes).unwrap();
        digest
    }

    #[tokio::test]
    async fn what_lies_on_the_disk_is_said_and_removed_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("data");
        let (a, b) = (blob(&root, b"a"), blob(&root, b"another"));
        let socket = dir.path().join("collector.sock");
        let (path, folder) = (socket.clone(), root.clone());
        tokio::spawn(async move { serve(&path, &folder, 0).await });
        for _ in 0..100 {
            if socket.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let collector = Collector::new(socket);
        let prefix = |digest: &Digest| u8::from_str_radix(&digest.as_str()[7..9], 16).unwrap();
        let listed = collector.list(prefix(&b)).await.unwrap();
        assert!(listed.iter().any(|blob| blob.digest == b && blob.bytes == 7), "{listed:?}");
        collector.remove_blob(&b).await.unwrap();
        collector.remove_blob(&b).await.unwrap();
        assert!(!collector.list(prefix(&b)).await.unwrap().iter().any(|blob| blob.digest == b));
        assert!(collector.list(prefix(&a)).await.unwrap().iter().any(|blob| blob.digest == a));
    }

    #[test]
    fn only_what_is_named_goes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk(dir.path().to_owned());
        let (tenant, web): (TenantName, RepositoryPath) = ("acme".parse().unwrap(), "web".parse().unwrap());
        let own = disk.repository(&tenant, &web);
        for path in ["_uploads/1-f", "_layers", "below/_layers"] {
            fs::create_dir_all(own.join(path)).unwrap();
        }
        let upload = |id: &str| CollectorQuestion::RemoveUpload {
            tenant: tenant.clone(),
            repository: web.clone(),
            id: id.into(),
        };
        for id in ["..", "../..", "", "a/b", "."] {
            assert!(matches!(disk.answer(upload(id)), CollectorAnswer::Failed { .. }), "{id}");
        }
        assert!(own.join("_uploads/1-f").exists());
        assert!(matches!(disk.answer(upload("1-f")), CollectorAnswer::Removed {}));
        assert!(!own.join("_uploads/1-f").exists());
        // Removes the folder of one link and no other.
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        for (link, kind) in
            [(RegistryLink::Layer, "_layers"), (RegistryLink::Revision, "_manifests/revisions")]
        {
            for digest in [&one, &two] {
                fs::create_dir_all(own.join(kind).join("sha256").join(&digest.as_str()[7..])).unwrap();
            }
            let remove = |digest: &Digest| {
                let (tenant, repository, digest) = (tenant.clone(), web.clone(), digest.clone());
                disk.answer(CollectorQuestion::RemoveLink { tenant, repository, link, digest })
            };
            for _ in 0..2 {
                assert!(matches!(remove(&one), CollectorAnswer::Removed {}), "once or twice");
            }
            let left: Vec<_> = fs::read_dir(own.join(kind).join("sha256")).unwrap().flatten().collect();
            assert_eq!(left.len(), 1);
            assert_eq!(left[0].file_name().to_string_lossy(), two.as_str()[7..]);
        }
        let question =
            CollectorQuestion::RemoveRepository { tenant: tenant.clone(), repository: web.clone() };
        assert!(matches!(disk.answer(question), CollectorAnswer::Removed {}));
        assert!(!own.join("_layers").exists() && own.join("below/_layers").exists());
        for text in [r#"{"remove_upload":{"tenant":"..","repository":"web","id":"a"}}"#, "{}", "[]"] {
            assert!(serde_json::from_str::<CollectorQuestion>(text).is_err(), "{text}");
        }
    }
}
