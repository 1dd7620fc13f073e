//! One connection as seen by the HTTP dispatcher. The stream passes on complete heads of bounded size. It ends
//! when a head or a body takes too long, or when the client does not read. The dispatcher never sees a head
//! that it would refuse itself, so every answer carries the platform's headers.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use actix_http::ServiceConfig;
use actix_http::h1::{Codec, Message, MessageType};
use actix_web::http::StatusCode;
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::codec::Decoder;

use super::Times;
use super::admit::Seat;

/// Maximum size of a request's head, in bytes.
pub(super) const HEAD_LIMIT: usize = 16 << 10;
/// Bytes read at once.
const READ: usize = 8 << 10;
/// Maximum bytes that are drained from a refused connection before it is closed.
const DRAIN: usize = 256 << 10;

/// A plain or TLS byte stream.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// State shared by the stream and the service of a connection.
pub(super) struct Conn {
    /// Its place in the table of connections.
    pub(super) seat: Seat,
    /// Whether it came over TLS.
    pub(super) secure: bool,
    /// Whether a request is being answered.
    pub(super) busy: Cell<bool>,
    refusal: Cell<Option<StatusCode>>,
    waker: RefCell<Option<Waker>>,
    reads: Cell<bool>,
    writes: Cell<bool>,
}

impl Conn {
    /// Creates a connection that waits for its first head.
    #[must_use]
    pub(super) fn new(seat: Seat, secure: bool) -> Rc<Self> {
        Rc::new(Self {
            seat,
            secure,
            busy: Cell::new(false),
            refusal: Cell::new(None),
            waker: RefCell::new(None),
            reads: Cell::new(true),
            writes: Cell::new(false),
        })
    }

    /// Takes the status to answer instead of the request; set at most once.
    pub(super) fn take_refusal(&self) -> Option<StatusCode> {
        self.refusal.take()
    }

    /// Marks the request as answered.
    pub(super) fn answered(&self) {
        self.busy.set(false);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Sets whether the client makes the server wait, for reads and for writes.
    fn waits(&self, reads: Option<bool>, writes: Option<bool>) {
        let before = self.reads.get() || self.writes.get();
        self.reads.set(reads.unwrap_or_else(|| self.reads.get()));
        self.writes.set(writes.unwrap_or_else(|| self.writes.get()));
        let now = self.reads.get() || self.writes.get();
        if now != before {
            self.seat.waits(now);
        }
    }
}

/// A timer that is created on first use.
#[derive(Default)]
struct Clock(Option<Pin<Box<Sleep>>>);

impl Clock {
    fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx)
    }
}

/// The time that a client may still let the server wait. It earns time by the bytes it sends or reads. The
/// maximum is twice the grace: otherwise bytes that the kernel buffered at once would earn an hour.
#[derive(Clone, Copy)]
struct WaitAllowance {
    left: Duration,
    since: Option<Instant>,
}

impl WaitAllowance {
    fn new(times: &Times) -> Self {
        Self { left: times.grace, since: None }
    }

    fn moved(&mut self, bytes: usize, times: &Times) {
        let waited = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        let earned = Duration::from_millis((bytes as u64).saturating_mul(1000) / times.rate.max(1));
        self.left = (self.left.saturating_sub(waited) + earned).min(times.grace * 2);
    }

    /// Returns when the client counts as too slow.
    fn deadline(&mut self) -> Instant {
        *self.since.get_or_insert_with(Instant::now) + self.left
    }
}

enum Phase {
    /// The next head is incomplete.
    Head,
    /// The body is being read.
    Body,
    /// The request is complete and is being answered.
    Busy,
    /// The request was refused: the connection ends after the answer.
    Refused,
}

/// The stream.
pub(super) struct Wire {
    io: Box<dyn Io>,
    /// State shared with the service.
    pub(super) conn: Rc<Conn>,
    times: Times,
    /// Parses the same bytes as the dispatcher, to find the end of a request.
    tee: Codec,
    phase: Phase,
    /// Bytes read but not passed on.
    held: BytesMut,
    /// Length of the part of `held` that was searched for the end of a head.
    searched: usize,
    /// Bytes to pass on next.
    out: BytesMut,
    /// Start of the wait for this head, and the time of its first byte.
    idle: Instant,
    begun: Option<Instant>,
    /// Deadline of the request's body.
    body_by: Option<Instant>,
    reading: WaitAllowance,
    writing: WaitAllowance,
    read_clock: Clock,
    write_clock: Clock,
    drained: usize,
    drain_by: Option<Instant>,
}

/// The result of waiting for a head.
pub(super) enum HeadOutcome {
    /// A complete head arrived.
    Head,
    /// The client closed the connection.
    Gone,
    /// The head is refused.
    Refused(StatusCode),
}

impl Wire {
    /// Creates a stream whose first head must be complete within the limits, counted from `accepted`.
    pub(super) fn new(
        io: Box<dyn Io>,
        conn: Rc<Conn>,
        times: Times,
        config: ServiceConfig,
        accepted: Instant,
    ) -> Self {
        Self {
            io,
            conn,
            reading: WaitAllowance::new(&times),
            writing: WaitAllowance::new(&times),
            times,
            tee: Codec::new(config),
            phase: Phase::Head,
            held: BytesMut::new(),
            searched: 0,
            out: BytesMut::new(),
            idle: accepted,
            begun: Some(accepted),
            body_by: None,
            read_clock: Clock::default(),
            write_clock: Clock::default(),
            drained: 0,
            drain_by: None,
        }
    }

    /// Waits for the first head, before the dispatcher is set up.
    pub(super) fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<HeadOutcome>> {
        self.poll_head(cx)
    }

    /// Writes an answer and ends the connection, without a dispatcher.
    pub(super) async fn say_farewell(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.phase = Phase::Refused;
        self.write_all(bytes).await?;
        self.shutdown().await
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<HeadOutcome>> {
        loop {
            while let Some(b'\r' | b'\n') = self.held.first() {
                self.held.advance(1);
            }
            // No request begins with such a byte. Clients that try TLS first on a plain port get their answer
            // at once.
            if self.held.first().is_some_and(|byte| !byte.is_ascii_graphic()) {
                return Poll::Ready(Ok(HeadOutcome::Refused(StatusCode::BAD_REQUEST)));
            }
            if let Some(end) = head_end(&self.held, self.searched.saturating_sub(3)) {
                self.searched = 0;
                return Poll::Ready(Ok(if end > HEAD_LIMIT {
                    HeadOutcome::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
                } else {
                    self.take_head(end)
                }));
            }
            self.searched = self.held.len();
            if self.held.len() >= HEAD_LIMIT {
                return Poll::Ready(Ok(HeadOutcome::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)));
            }
            match self.fill(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(HeadOutcome::Gone)),
                Poll::Ready(Ok(_)) => {
                    self.begun.get_or_insert_with(Instant::now);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.conn.waits(Some(true), None);
                    let deadline = match self.begun {
                        Some(begun) => begun + self.times.head,
                        None => self.idle + self.times.idle,
                    };
                    std::task::ready!(self.read_clock.poll(cx, deadline));
                    return Poll::Ready(Ok(if self.begun.is_some() {
                        HeadOutcome::Refused(StatusCode::REQUEST_TIMEOUT)
                    } else {
                        HeadOutcome::Gone
                    }));
                }
            }
        }
    }

    /// Reads into `held`.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut room = [std::mem::MaybeUninit::uninit(); READ];
        let mut buffer = ReadBuf::uninit(&mut room);
        std::task::ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
        self.held.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Parses the head with the dispatcher's parser, so this stream refuses every head that the dispatcher
    /// would refuse.
    fn take_head(&mut self, end: usize) -> HeadOutcome {
        let head = self.held.split_to(end);
        if self.held.is_empty() {
            // Free the buffer: an idle connection keeps no memory.
            self.held = BytesMut::new();
        }
        let mut copy = BytesMut::from(&head[..]);
        let request = match self.tee.decode(&mut copy) {
            Ok(Some(Message::Item(request))) if copy.is_empty() => request,
            Err(actix_http::error::ParseError::TooLarge) => {
                return HeadOutcome::Refused(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
            }
            _ => return HeadOutcome::Refused(StatusCode::BAD_REQUEST),
        };
        let body = match self.tee.message_type() {
            MessageType::None => false,
            MessageType::Payload => true,
            // The bytes after an upgrade or a CONNECT have no known end.
            MessageType::Stream => return HeadOutcome::Refused(StatusCode::BAD_REQUEST),
        };
        let now = Instant::now();
        let long = request.path().starts_with("/v2/");
        self.body_by = (!long).then(|| now + self.times.body);
        self.reading = WaitAllowance::new(&self.times);
        self.writing = self.reading;
        self.begun = None;
        self.out = head;
        self.conn.busy.set(true);
        self.conn.waits(Some(false), None);
        self.phase = if body { Phase::Body } else { Phase::Busy };
        if body {
            let ahead = self.held.split();
            if let Err(status) = self.body(&ahead) {
                return HeadOutcome::Refused(status);
            }
        }
        HeadOutcome::Head
    }

    /// Splits received bytes: those of the body are passed on, the rest belongs to the next head.
    fn body(&mut self, bytes: &[u8]) -> Result<(), StatusCode> {
        let mut rest = BytesMut::from(bytes);
        loop {
            match self.tee.decode(&mut rest) {
                Ok(Some(Message::Chunk(None))) => {
                    self.phase = Phase::Busy;
                    break;
                }
                Ok(Some(_)) => {}
                // The parser keeps an incomplete chunk header, as the dispatcher's parser does.
                Ok(None) => {
                    rest.clear();
                    break;
                }
                Err(_) => return Err(StatusCode::BAD_REQUEST),
            }
        }
        self.out.extend_from_slice(&bytes[..bytes.len() - rest.len()]);
        self.held.extend_from_slice(&rest);
        self.reading.moved(bytes.len(), &self.times);
        Ok(())
    }

    /// Sets the answer to this status. Between two requests, the dispatcher gets an artificial request that the
    /// service answers with it. During a request, the service ends that request.
    fn refuse(&mut self, status: StatusCode) {
        if !self.conn.busy.replace(true) {
            self.out = BytesMut::from(&b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n"[..]);
        }
        self.conn.refusal.set(Some(status));
        self.phase = Phase::Refused;
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        match self.fill(cx) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Ok(false)),
            Poll::Ready(Ok(_)) => {
                self.conn.waits(Some(false), None);
                let bytes = self.held.split();
                if let Err(status) = self.body(&bytes) {
                    self.refuse_body(cx, status);
                }
                return Poll::Ready(Ok(true));
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => {}
        }
        self.conn.waits(Some(true), None);
        let slow = self.reading.deadline();
        let deadline = self.body_by.map_or(slow, |by| by.min(slow));
        std::task::ready!(self.read_clock.poll(cx, deadline));
        if !self.conn.busy.get() {
            // The request is already answered, and the rest of its body does not arrive.
            return Poll::Ready(Ok(false));
        }
        self.refuse_body(cx, StatusCode::REQUEST_TIMEOUT);
        Poll::Ready(Ok(true))
    }

    fn refuse_body(&mut self, cx: &mut Context<'_>, status: StatusCode) {
        self.refuse(status);
        cx.waker().wake_by_ref();
    }
}

impl Wire {
    /// Limits a flush or a shutdown to the client's remaining time. With TLS both wait for the client to read,
    /// because written data stays in a buffer of this process.
    fn bound(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
        if outcome.is_ready() {
            self.conn.waits(None, Some(false));
            self.writing.moved(0, &self.times);
            return outcome;
        }
        self.conn.waits(None, Some(true));
        let deadline = self.writing.deadline();
        std::task::ready!(self.write_clock.poll(cx, deadline));
        Poll::Ready(Err(io::Error::from(io::ErrorKind::TimedOut)))
    }
}

/// Returns the end of the head: the offset after its first empty line.
fn head_end(bytes: &[u8], mut from: usize) -> Option<usize> {
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == b'\n') {
        let after = from + at + 1;
        match bytes[after..] {
            [b'\n', ..] => return Some(after + 1),
            [b'\r', b'\n', ..] => return Some(after + 2),
            _ => from = after,
        }
    }
    None
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        loop {
            if !wire.out.is_empty() {
                let n = wire.out.len().min(buffer.remaining());
                buffer.put_slice(&wire.out.split_to(n));
                return Poll::Ready(Ok(()));
            }
            match wire.phase {
                Phase::Head => match std::task::ready!(wire.poll_head(cx))? {
                    HeadOutcome::Head => {}
                    HeadOutcome::Gone => return Poll::Ready(Ok(())),
                    HeadOutcome::Refused(status) => wire.refuse(status),
                },
                Phase::Body => {
                    if !std::task::ready!(wire.poll_body(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                Phase::Busy if !wire.conn.busy.get() => {
                    wire.phase = Phase::Head;
                    wire.idle = Instant::now();
                    wire.begun = (!wire.held.is_empty()).then_some(wire.idle);
                }
                // Keep reading to notice a client that hangs up; the bytes that it sends ahead are bounded.
                Phase::Busy => {
                    *wire.conn.waker.borrow_mut() = Some(cx.waker().clone());
                    if wire.held.len() >= HEAD_LIMIT {
                        return Poll::Pending;
                    }
                    if std::task::ready!(wire.fill(cx))? == 0 {
                        return Poll::Ready(Ok(()));
                    }
                }
                Phase::Refused => return Poll::Pending,
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = self.get_mut();
        match Pin::new(&mut wire.io).poll_write(cx, bytes) {
            Poll::Ready(outcome) => {
                wire.conn.waits(None, Some(false));
                wire.writing.moved(*outcome.as_ref().unwrap_or(&0), &wire.times);
                Poll::Ready(outcome)
            }
            Poll::Pending => {
                wire.conn.waits(None, Some(true));
                let deadline = wire.writing.deadline();
                std::task::ready!(wire.write_clock.poll(cx, deadline));
                Poll::Ready(Err(io::Error::from(io::ErrorKind::TimedOut)))
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let outcome = Pin::new(&mut wire.io).poll_flush(cx);
        wire.bound(cx, outcome)
    }

    /// Half-closes the connection first, then reads the client's data for a moment. A reset right after the
    /// answer would destroy the answer.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        if wire.drain_by.is_none() {
            let outcome = Pin::new(&mut wire.io).poll_shutdown(cx);
            std::task::ready!(wire.bound(cx, outcome))?;
            if !matches!(wire.phase, Phase::Refused | Phase::Body) {
                return Poll::Ready(Ok(()));
            }
            wire.drain_by = Some(Instant::now() + wire.times.drain);
            wire.conn.waits(Some(true), None);
        }
        let by = wire.drain_by.unwrap_or_else(Instant::now);
        while wire.drained < DRAIN {
            match wire.fill(cx) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    wire.held.clear();
                    wire.drained += n;
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    std::task::ready!(wire.read_clock.poll(cx, by));
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::admit::{Admissions, ConnectionLimits};
    use super::*;

    #[test]
    fn a_head_ends_at_its_first_empty_line() {
        assert_eq!(head_end(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nrest", 0), Some(27));
        assert_eq!(head_end(b"GET / HTTP/1.1\nhost: x\n\nrest", 0), Some(24));
        assert_eq!(head_end(b"GET / HTTP/1.1\r\n\nrest", 0), Some(17));
        assert_eq!(head_end(b"GET / HTTP/1.1\r\nhost: x\r\n", 0), None);
        assert_eq!(head_end(b"", 0), None);
    }

    /// A TLS client that reads nothing: written data is buffered, and no flush completes.
    struct Unread;

    impl AsyncRead for Unread {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Unread {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[actix_web::test]
    async fn a_client_that_lets_a_flush_wait_makes_room_and_is_given_up() {
        let address = |text: &str| text.parse().unwrap();
        for shut in [false, true] {
            let all = Admissions::new(ConnectionLimits { all: 1, per_source: 1 });
            let seat = all.admit(address("192.0.2.1"), true).ok().unwrap();
            let conn = Conn::new(seat, true);
            conn.waits(Some(false), Some(false));
            assert!(all.admit(address("192.0.2.2"), true).is_err(), "a request is being answered");
            let times = Times { grace: Duration::from_millis(50), ..Times::default() };
            let mut wire = Wire::new(Box::new(Unread), conn, times, ServiceConfig::default(), Instant::now());
            wire.write_all(b"HTTP/1.1 200 OK").await.unwrap();
            let mut end = Box::pin(async { if shut { wire.shutdown().await } else { wire.flush().await } });
            assert!(futures_util::poll!(&mut end).is_pending());
            let newcomer = all.admit(address("192.0.2.2"), true);
            assert!(newcomer.is_ok(), "the client is waited for, and makes room");
            assert_eq!(end.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
    }

    #[test]
    fn a_client_earns_time_by_what_it_moves() {
        let times = Times { rate: 1000, grace: Duration::from_secs(10), ..Times::default() };
        let left = |pace: &WaitAllowance| (pace.left + Duration::from_millis(500)).as_secs();
        let mut pace = WaitAllowance::new(&times);
        assert_eq!(left(&pace), 10);
        pace.since = Instant::now().checked_sub(Duration::from_secs(4));
        pace.moved(2000, &times);
        assert_eq!(left(&pace), 10 + 2 - 4);
        // The server's own work costs the client nothing: only waiting counts.
        pace.moved(0, &times);
        assert_eq!(left(&pace), 8);
        // A burst into buffers does not earn an hour.
        pace.moved(100_000_000, &times);
        assert_eq!(left(&pace), 20);
        pace.since = Instant::now().checked_sub(Duration::from_secs(60));
        assert!(pace.deadline() < Instant::now());
    }
}
