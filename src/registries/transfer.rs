//! The bytes of an upload on their way to the registry, and its commit. Each request's bytes go over as one part; a part
//! whose client was cut off ends where it was, so that the client can go on. What is committed is on record before the
//! registry is asked, and the commit runs to its end also when the client has hung up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, web};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::body::{Body, cut};
use super::claims::{Claim, Lost};
use super::collect;
use super::front::{FrontDoor, OciError, PATIENCE};
use super::proxy::{relay, unreachable_registry};
use super::store::{self, Ends, OpenUpload, Reserve};
use super::uploads::{
    Work, bad_digest, commit, committed, find_open, path_there, progress, state_of, status, unknown_upload,
    unreachable_answer,
};
use super::write::full;
use crate::db;
use crate::ids::{Digest, TenantName};

/// Bytes that are reserved of the quota at a time while an upload streams.
const STEP: u64 = 16 << 20;
/// How often an upload that goes on says so.
const SIGN: Duration = Duration::from_secs(120);
/// The only type of an upload's body. The registry reads a form as more parameters.
const OCTETS: &str = "application/octet-stream";

/// A part of a body on its way.
enum Part {
    Bytes(Bytes),
    /// All of it has come. A body that ends without this was cut off.
    End,
}

/// What a request to an upload ends in.
enum Outcome {
    Further(OpenUpload),
    /// It does not begin where the upload is.
    Misplaced(OpenUpload),
    Committed(Digest),
    Refused(reqwest::Response),
}

/// One PATCH, PUT or whole POST: its bytes go into an upload; with a digest the upload is committed under it.
#[derive(Clone)]
pub(super) struct Transfer {
    pub(super) work: Work,
    pub(super) id: String,
    pub(super) digest: Option<Digest>,
    /// Bytes of the body, where the client has said so.
    pub(super) length: Option<u64>,
    /// Where in the upload they begin, where the client has said so.
    pub(super) start: Option<u64>,
}

impl Transfer {
    /// Carries a body over.
    pub(super) async fn carry(self, door: &FrontDoor, body: web::Payload) -> Result<HttpResponse, OciError> {
        let (work, id) = (self.work.clone(), self.id.clone());
        // Payload is bound to its thread; a channel of two chunks carries the bytes over.
        let (sender, receiver) = mpsc::channel::<Part>(2);
        let (claimed, ready) = oneshot::channel();
        let sending = tokio::spawn(self.run(receiver, claimed));
        // Nothing is read or reserved before the upload is this request's.
        if ready.await.is_ok() {
            pump(door, &work, &id, body, sender).await?;
        }
        let asked = &work.asked;
        match sending.await.map_err(|error| OciError::from(crate::error::Error::internal(error)))?? {
            Outcome::Further(upload) => Ok(progress(StatusCode::ACCEPTED, asked, &upload)),
            Outcome::Misplaced(upload) => Ok(progress(StatusCode::RANGE_NOT_SATISFIABLE, asked, &upload)),
            Outcome::Committed(digest) => Ok(committed(asked, &digest)),
            Outcome::Refused(answer) => Ok(relay(answer)),
        }
    }

    /// Sends the body on and settles what came of it, whether or not the client is still there.
    async fn run(
        self,
        receiver: mpsc::Receiver<Part>,
        claimed: oneshot::Sender<()>,
    ) -> Result<Outcome, OciError> {
        let Work { pool, asked, .. } = &self.work;
        let claim = Claim::take(pool, asked, &self.id).await?;
        let upload = match find_open(pool, asked, &self.id).await {
            Ok(upload) => upload,
            Err(error) => {
                claim.release(Ends::Answered).await?;
                return Err(error);
            }
        };
        if self.start.is_some_and(|start| start != upload.received) {
            claim.release(Ends::Answered).await?;
            return Ok(Outcome::Misplaced(upload));
        }
        let _ = claimed.send(());
        let sent = if self.length == Some(0) {
            Sent::Whole(upload)
        } else {
            match claim.hold(self.send(&claim, upload, receiver)).await {
                Ok(sent) => sent,
                Err(Lost) => Sent::Broken(cut()),
            }
        };
        match (sent, &self.digest) {
            (Sent::Whole(upload), Some(digest)) => self.finish(claim, &upload, digest).await,
            (Sent::Whole(upload), None) => {
                claim.release(Ends::Answered).await?;
                Ok(Outcome::Further(upload))
            }
            (Sent::Refused(answer), _) => {
                claim.release(Ends::Answered).await?;
                Ok(Outcome::Refused(answer))
            }
            (Sent::Less(error), _) => {
                claim.release(Ends::Answered).await?;
                Err(error)
            }
            (Sent::Broken(error), _) => {
                claim.release(Ends::Cut).await?;
                Err(error)
            }
        }
    }

    /// Sends the body on as one part.
    async fn send(&self, claim: &Claim, upload: OpenUpload, receiver: mpsc::Receiver<Part>) -> Sent {
        let (whole, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let body = self.stream(receiver, Arc::clone(&whole), Arc::clone(&passed));
        let Work { pool, registry, asked } = &self.work;
        let request =
            registry.request(reqwest::Method::PATCH, &asked.name, &path_there(&upload), &["pull", "push"]);
        let request = match request {
            Ok(request) => request.header(reqwest::header::CONTENT_TYPE, OCTETS).body(body),
            Err(error) => return Sent::Less(error.into()),
        };
        let answer = match request.send().await {
            Ok(answer) => answer,
            Err(error) => return Sent::Broken(unreachable_registry(error)),
        };
        match status(&answer) {
            StatusCode::ACCEPTED => {}
            // The registry does not take it up again: it has other bytes than are on record.
            StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST => return Sent::Less(unknown_upload()),
            _ => return Sent::Refused(answer),
        }
        let Some(state) = state_of(&answer) else {
            return Sent::Less(unreachable_answer("its answer has no state of the upload"));
        };
        let received = upload.received + passed.load(Ordering::SeqCst);
        let upload = OpenUpload { id: upload.id, state, received };
        match store::note_part(pool, &asked.tenant, &claim.part, &upload).await {
            Ok(true) if whole.load(Ordering::SeqCst) => Sent::Whole(upload),
            Ok(true) => Sent::Less(cut()),
            Ok(false) => Sent::Broken(unknown_upload()),
            Err(error) => Sent::Less(error.into()),
        }
    }

    /// The body as the registry reads it. `whole` tells whether all of it came, `passed` how much went over.
    fn stream(
        &self,
        receiver: mpsc::Receiver<Part>,
        whole: Arc<AtomicBool>,
        passed: Arc<AtomicU64>,
    ) -> reqwest::Body {
        let length = self.length;
        let stream = futures_util::stream::unfold(receiver, move |mut receiver| {
            let (whole, passed) = (Arc::clone(&whole), Arc::clone(&passed));
            async move {
                match receiver.recv().await {
                    Some(Part::Bytes(bytes)) => {
                        let more = bytes.len() as u64;
                        let sum = passed.fetch_add(more, Ordering::SeqCst) + more;
                        // After the last byte that was promised nothing is missing, also when the client hangs up.
                        whole.fetch_or(length == Some(sum), Ordering::SeqCst);
                        Some((Ok::<_, std::io::Error>(bytes), receiver))
                    }
                    Some(Part::End) => {
                        whole.store(true, Ordering::SeqCst);
                        None
                    }
                    // Cut off: the part ends here, and the registry keeps what it has.
                    None => None,
                }
            }
        });
        reqwest::Body::wrap_stream(stream)
    }

    /// Has the registry commit the upload.
    async fn finish(&self, claim: Claim, upload: &OpenUpload, digest: &Digest) -> Result<Outcome, OciError> {
        let Work { pool, registry, asked } = &self.work;
        if !store::ask_commit(pool, &asked.tenant, &claim.part, digest).await? {
            return Err(unknown_upload());
        }
        let rest = format!("{}&digest={digest}", path_there(upload));
        let answer = registry
            .request(reqwest::Method::PUT, &asked.name, &rest, &["pull", "push"])?
            .header(reqwest::header::CONTENT_TYPE, OCTETS)
            .header(reqwest::header::CONTENT_LENGTH, "0")
            .timeout(PATIENCE)
            .send()
            .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // Nothing was asked of a registry that could not be reached. What else is not known, the sweep settles.
                if error.is_connect() {
                    claim.release(Ends::Answered).await?;
                }
                return Err(unreachable_registry(error));
            }
        };
        match status(&answer) {
            StatusCode::CREATED => {
                if let Err(error) = self.check(&answer, digest).await {
                    claim.release(Ends::Answered).await?;
                    return Err(error);
                }
                commit(&self.work, Some(&self.id), digest).await?;
                Ok(Outcome::Committed(digest.clone()))
            }
            StatusCode::BAD_REQUEST => {
                // What was sent counts until it is cancelled: the client may still do so.
                claim.release(Ends::Answered).await?;
                Err(bad_digest("the bytes that came have another digest; upload the blob once more"))
            }
            _ => {
                claim.release(Ends::Answered).await?;
                Ok(Outcome::Refused(answer))
            }
        }
    }

    /// The registry has committed what it was asked to, or that goes again.
    async fn check(&self, answer: &reqwest::Response, digest: &Digest) -> Result<(), OciError> {
        let named = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        if named == Some(digest.as_str()) {
            return Ok(());
        }
        let Work { pool, registry, asked } = &self.work;
        tracing::error!(tenant = %asked.tenant, "ALARM: the registry has committed other bytes than it was asked to");
        if let Some(other) = named.and_then(|text| text.parse::<Digest>().ok()) {
            let mut conn = db::begin(pool, &asked.tenant).await?;
            let known = store::has_blob(&mut conn, &asked.tenant, &asked.repository, &other).await?;
            drop(conn);
            if !known {
                registry.delete_blob(&asked.name, &other).await?;
                collect::collect(registry, &other).await?;
            }
        }
        Err(unreachable_answer("it has committed other bytes than it was asked to"))
    }
}

/// What came of sending a body on.
enum Sent {
    /// All of it is in the upload.
    Whole(OpenUpload),
    /// The registry has answered, and not all of the body is in the upload.
    Less(OciError),
    /// The registry has not answered: it may still write what is on its way.
    Broken(OciError),
    /// The registry's refusal.
    Refused(reqwest::Response),
}

/// Carries the body over, reserving the quota in steps before the bytes go on. What went over counts until the blob is
/// there, also when it was cut off: the registry keeps its bytes until it is cancelled or purged.
async fn pump(
    door: &FrontDoor,
    work: &Work,
    id: &str,
    body: web::Payload,
    sender: mpsc::Sender<Part>,
) -> Result<(), OciError> {
    let mut taken = Taken {
        pool: work.pool.clone(),
        tenant: work.asked.tenant.clone(),
        id: id.to_owned(),
        reserved: 0,
        passed: 0,
    };
    let mut body = Body::new(body);
    let mut sign = Instant::now();
    while let Some(chunk) = body.next().await? {
        let next = taken.passed + chunk.len() as u64;
        let needed = next.saturating_sub(taken.reserved);
        if needed > 0 || sign.elapsed() > SIGN {
            sign = Instant::now();
            // A stream may take hours: it ends with the right to push.
            if !door.is_good(&work.asked.claims).await? {
                return Err(OciError::denied("the credential of this upload is no longer good"));
            }
            // All streams of a tenant reserve under one lock: they wait for it with few connections.
            let room = door.room(&work.asked.tenant).await?;
            let step = if needed > 0 { needed.max(STEP) } else { 0 };
            match store::reserve_upload(&taken.pool, &taken.tenant, &taken.id, step, needed).await? {
                Reserve::Taken(bytes) => taken.reserved += bytes,
                Reserve::Full { used, limit } => return Err(full(&work.asked, used, limit, needed)),
                Reserve::Gone => return Err(unknown_upload()),
            }
            drop(room);
        }
        taken.passed = next;
        if sender.send(Part::Bytes(chunk)).await.is_err() {
            // The registry has answered already.
            return Ok(());
        }
    }
    let _ = sender.send(Part::End).await;
    Ok(())
}

/// What an upload has taken of the quota. When it ends, also because the client has hung up and nobody
/// waits for the answer any more, what was not needed is given back.
struct Taken {
    pool: sqlx::PgPool,
    tenant: TenantName,
    id: String,
    reserved: u64,
    passed: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let left = self.reserved.saturating_sub(self.passed);
        if left == 0 {
            return;
        }
        let (pool, tenant, id) = (self.pool.clone(), self.tenant.clone(), self.id.clone());
        actix_web::rt::spawn(async move {
            if let Err(error) = store::give_back(&pool, &tenant, &id, left).await {
                tracing::warn!(%error, "bytes that an upload did not need count for two hours more");
            }
        });
    }
}
