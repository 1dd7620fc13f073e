//! Transfers the bytes of an upload to the registry and commits it. Each request's bytes form one part. If a
//! client disconnects, the part ends there and the client can continue later. A commit is recorded before the
//! registry is asked, and runs to its end even if the client disconnects.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, web};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::body::{TimedBody, cut};
use super::claims::{Lost, UploadClaim};
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

/// Bytes of quota reserved at a time while an upload streams.
const STEP: u64 = 16 << 20;
/// Interval of renewing the record of an active upload.
const SIGN: Duration = Duration::from_secs(120);
/// The only content type of an upload's body. The registry would read a form as more parameters.
const OCTETS: &str = "application/octet-stream";

/// A piece of a body in transit.
enum BodyPart {
    Bytes(Bytes),
    /// The body is complete. A body that ends without this was cut off.
    End,
}

/// The outcome of a request to an upload.
enum UploadOutcome {
    Further(OpenUpload),
    /// The request's start differs from the upload's position.
    Misplaced(OpenUpload),
    Committed(Digest),
    Refused(reqwest::Response),
}

/// One PATCH, PUT or whole POST: appends bytes to an upload, and commits it if there is a digest.
#[derive(Clone)]
pub(super) struct Transfer {
    pub(super) work: Work,
    pub(super) id: String,
    pub(super) digest: Option<Digest>,
    /// Length of the body, if the client sent it.
    pub(super) length: Option<u64>,
    /// Position of the bytes in the upload, if the client sent it.
    pub(super) start: Option<u64>,
}

impl Transfer {
    /// Transfers a body.
    pub(super) async fn carry(self, door: &FrontDoor, body: web::Payload) -> Result<HttpResponse, OciError> {
        let (work, id) = (self.work.clone(), self.id.clone());
        // Payload is bound to its thread, so a channel of two chunks passes the bytes on.
        let (sender, receiver) = mpsc::channel::<BodyPart>(2);
        let (claimed, ready) = oneshot::channel();
        let sending = tokio::spawn(self.run(receiver, claimed));
        // Read and reserve nothing before this request has claimed the upload.
        if ready.await.is_ok() {
            pump(door, &work, &id, body, sender).await?;
        }
        let asked = &work.asked;
        match sending.await.map_err(|error| OciError::from(crate::error::Error::internal(error)))?? {
            UploadOutcome::Further(upload) => Ok(progress(StatusCode::ACCEPTED, asked, &upload)),
            UploadOutcome::Misplaced(upload) => {
                Ok(progress(StatusCode::RANGE_NOT_SATISFIABLE, asked, &upload))
            }
            UploadOutcome::Committed(digest) => Ok(committed(asked, &digest)),
            UploadOutcome::Refused(answer) => Ok(relay(answer)),
        }
    }

    /// Sends the body and settles the outcome, even if the client has disconnected.
    async fn run(
        self,
        receiver: mpsc::Receiver<BodyPart>,
        claimed: oneshot::Sender<()>,
    ) -> Result<UploadOutcome, OciError> {
        let Work { pool, asked, .. } = &self.work;
        let claim = UploadClaim::take(pool, asked, &self.id).await?;
        let upload = match find_open(pool, asked, &self.id).await {
            Ok(upload) => upload,
            Err(error) => {
                claim.release(Ends::Answered).await?;
                return Err(error);
            }
        };
        if self.start.is_some_and(|start| start != upload.received) {
            claim.release(Ends::Answered).await?;
            return Ok(UploadOutcome::Misplaced(upload));
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
                Ok(UploadOutcome::Further(upload))
            }
            (Sent::Refused(answer), _) => {
                claim.release(Ends::Answered).await?;
                Ok(UploadOutcome::Refused(answer))
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

    /// Sends the body to the registry as one part.
    async fn send(
        &self,
        claim: &UploadClaim,
        upload: OpenUpload,
        receiver: mpsc::Receiver<BodyPart>,
    ) -> Sent {
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
            // The registry cannot resume the upload: its bytes differ from the recorded ones.
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

    /// Builds the body for the registry. `whole` tells whether all of it arrived, `passed` counts the bytes
    /// sent.
    fn stream(
        &self,
        receiver: mpsc::Receiver<BodyPart>,
        whole: Arc<AtomicBool>,
        passed: Arc<AtomicU64>,
    ) -> reqwest::Body {
        let length = self.length;
        let stream = futures_util::stream::unfold(receiver, move |mut receiver| {
            let (whole, passed) = (Arc::clone(&whole), Arc::clone(&passed));
            async move {
                match receiver.recv().await {
                    Some(BodyPart::Bytes(bytes)) => {
                        let more = bytes.len() as u64;
                        let sum = passed.fetch_add(more, Ordering::SeqCst) + more;
                        // After the last announced byte the body is complete, even if the client disconnects.
                        whole.fetch_or(length == Some(sum), Ordering::SeqCst);
                        Some((Ok::<_, std::io::Error>(bytes), receiver))
                    }
                    Some(BodyPart::End) => {
                        whole.store(true, Ordering::SeqCst);
                        None
                    }
                    // Cut off: the part ends here, and the registry keeps the bytes so far.
                    None => None,
                }
            }
        });
        reqwest::Body::wrap_stream(stream)
    }

    /// Asks the registry to commit the upload.
    async fn finish(
        &self,
        claim: UploadClaim,
        upload: &OpenUpload,
        digest: &Digest,
    ) -> Result<UploadOutcome, OciError> {
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
                // If the connection failed, the registry was not asked. The sweep settles all other unknown
                // outcomes.
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
                Ok(UploadOutcome::Committed(digest.clone()))
            }
            StatusCode::BAD_REQUEST => {
                // The sent bytes count until the upload is cancelled, which the client may still do.
                claim.release(Ends::Answered).await?;
                Err(bad_digest("the received bytes have a different digest; upload the blob again"))
            }
            _ => {
                claim.release(Ends::Answered).await?;
                Ok(UploadOutcome::Refused(answer))
            }
        }
    }

    /// Checks that the registry committed the requested digest; otherwise removes the committed blob.
    async fn check(&self, answer: &reqwest::Response, digest: &Digest) -> Result<(), OciError> {
        let named = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        if named == Some(digest.as_str()) {
            return Ok(());
        }
        let Work { pool, registry, asked } = &self.work;
        tracing::error!(tenant = %asked.tenant, "ALARM: the registry committed a different digest than requested");
        if let Some(other) = named.and_then(|text| text.parse::<Digest>().ok()) {
            let mut conn = db::begin(pool, &asked.tenant).await?;
            let known = store::has_blob(&mut conn, &asked.tenant, &asked.repository, &other).await?;
            drop(conn);
            if !known {
                registry.delete_blob(&asked.name, &other).await?;
                collect::collect(registry, &other).await?;
            }
        }
        Err(unreachable_answer("it committed a different digest than requested"))
    }
}

/// The outcome of sending a body.
enum Sent {
    /// The whole body is in the upload.
    Whole(OpenUpload),
    /// The registry answered, but part of the body is missing in the upload.
    Less(OciError),
    /// The registry did not answer: it may still write data in transit.
    Broken(OciError),
    /// The registry's refusal.
    Refused(reqwest::Response),
}

/// Passes the body on and reserves quota in steps before the bytes are sent. Sent bytes count until the blob is
/// committed, even after an interruption: the registry keeps them until the upload is cancelled or purged.
async fn pump(
    door: &FrontDoor,
    work: &Work,
    id: &str,
    body: web::Payload,
    sender: mpsc::Sender<BodyPart>,
) -> Result<(), OciError> {
    let mut taken = UploadReservation {
        pool: work.pool.clone(),
        tenant: work.asked.tenant.clone(),
        id: id.to_owned(),
        reserved: 0,
        passed: 0,
    };
    let mut body = TimedBody::new(body);
    let mut sign = Instant::now();
    while let Some(chunk) = body.next().await? {
        let next = taken.passed + chunk.len() as u64;
        let needed = next.saturating_sub(taken.reserved);
        if needed > 0 || sign.elapsed() > SIGN {
            sign = Instant::now();
            // A stream may take hours; it ends when the right to push ends.
            if !door.is_good(&work.asked.claims).await? {
                return Err(OciError::denied("the credential of this upload is no longer valid"));
            }
            // All streams of a tenant reserve under one lock. The permit limits the connections that wait for
            // it.
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
        if sender.send(BodyPart::Bytes(chunk)).await.is_err() {
            // The registry has answered already.
            return Ok(());
        }
    }
    let _ = sender.send(BodyPart::End).await;
    Ok(())
}

/// An upload's reservation in the quota. On drop, also after a client disconnected, it returns the unused
/// bytes.
struct UploadReservation {
    pool: sqlx::PgPool,
    tenant: TenantName,
    id: String,
    reserved: u64,
    passed: u64,
}

impl Drop for UploadReservation {
    fn drop(&mut self) {
        let left = self.reserved.saturating_sub(self.passed);
        if left == 0 {
            return;
        }
        let (pool, tenant, id) = (self.pool.clone(), self.tenant.clone(), self.id.clone());
        actix_web::rt::spawn(async move {
            if let Err(error) = store::give_back(&pool, &tenant, &id, left).await {
                tracing::warn!(%error, "unused bytes of an upload could not be returned; they count for two more hours");
            }
        });
    }
}
