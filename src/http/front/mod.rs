//! The front between a listener and the web server. It bounds connections in total and per source, the size and
//! time of heads, and the rate of bodies and answers. It adds the platform's headers to every answer, including
//! answers that no handler made. A connection costs little until its first head is complete.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use actix_http::{HttpService, KeepAlive, Protocol, Request, ServiceConfig};
use actix_server::{Server, ServerBuilder};
use actix_service::{IntoServiceFactory, Service, ServiceFactory, fn_factory, fn_service, map_config};
use actix_web::body::BoxBody;
use actix_web::dev::{AppConfig, ServiceResponse};
use actix_web::http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;

pub use admit::ConnectionLimits;
pub use room::bounds;

use super::source::{Proxies, network};
use crate::permits::FairPermits;
use admit::{Admissions, Full};
use wire::{Conn, HeadOutcome, Io, Wire};

mod admit;
mod refusal;
mod room;
mod service;
mod wire;

/// Length of the kernel's queue of accepted connections.
const BACKLOG: i32 = 4096;
/// Maximum number of refused connections that are still read, so that their clients see the answer.
const FAREWELLS: usize = 64;

/// Time limits for clients.
#[derive(Debug, Clone)]
pub struct Times {
    /// For a complete head, including the TLS handshake before it.
    pub head: Duration,
    /// Between two requests.
    pub idle: Duration,
    /// For the complete body of a request outside the registry.
    pub body: Duration,
    /// Minimum average rate in bytes a second, for sending a body and for reading an answer.
    pub rate: u64,
    /// Waiting time before `rate` applies; a client can earn up to twice as much.
    pub grace: Duration,
    /// For reading data that the client still sends after a refusal.
    pub drain: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            idle: Duration::from_secs(15),
            body: Duration::from_secs(30),
            rate: 4 << 10,
            grace: Duration::from_secs(15),
            drain: Duration::from_secs(1),
        }
    }
}

/// A listener and its limits.
pub struct Front {
    /// Name in the log.
    pub name: &'static str,
    /// Socket for clients.
    pub listener: TcpListener,
    /// TLS settings; none for plain HTTP.
    pub tls: Option<rustls::ServerConfig>,
    /// Number of worker threads.
    pub workers: usize,
    /// Limits of connections.
    pub bounds: ConnectionLimits,
    /// Proxies whose forwarded client address is trusted.
    pub proxies: Proxies,
    /// Time limits.
    pub times: Times,
}

/// State that all connections of a listener share.
#[derive(Clone)]
struct FrontState {
    admissions: Admissions,
    farewells: FairPermits<IpAddr>,
    /// Requests in progress of clients behind trusted proxies.
    behind: FairPermits<IpAddr>,
    proxies: Arc<Proxies>,
    times: Times,
    tls: Option<TlsAcceptor>,
}

impl Front {
    /// Creates a front for this listener, with the default time limits.
    #[must_use]
    pub fn new(name: &'static str, listener: TcpListener, workers: usize, bounds: ConnectionLimits) -> Self {
        Self { name, listener, tls: None, workers, bounds, proxies: Proxies::None, times: Times::default() }
    }

    /// Serves until the returned server's handle stops it.
    ///
    /// `app` makes the application of a worker; its outermost layer is [`super::outermost`].
    pub fn serve<F, I, S>(self, app: F) -> io::Result<Server>
    where
        F: Fn() -> I + Send + Clone + 'static,
        I: IntoServiceFactory<S, Request>,
        S: ServiceFactory<
                Request,
                Config = AppConfig,
                Response = ServiceResponse<BoxBody>,
                Error = actix_web::Error,
            > + 'static,
        S::InitError: fmt::Debug,
        S::Service: 'static,
        <S::Service as Service<Request>>::Future: 'static,
    {
        rustix::net::listen(&self.listener, BACKLOG)?;
        let tls = self.tls.map(|mut config| {
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            TlsAcceptor::from(Arc::new(config))
        });
        let shared = FrontState {
            admissions: Admissions::new(self.bounds),
            farewells: FairPermits::new(4, FAREWELLS),
            behind: FairPermits::new(self.bounds.per_source, self.bounds.all),
            proxies: Arc::new(self.proxies),
            times: self.times,
            tls,
        };
        // The front limits connections itself: a paused worker would lock out every client.
        let builder = ServerBuilder::new()
            .workers(self.workers)
            .max_concurrent_connections(1 << 30)
            .shutdown_timeout(5)
            .disable_signals();
        let stopping = builder.graceful_shutdown_signal();
        let builder = builder.listen(self.name, self.listener, move || {
            let (shared, stopping) = (shared.clone(), stopping.clone());
            let signal = stopping.clone();
            let app = map_config(app().into_factory(), |()| AppConfig::default());
            let http = HttpService::build()
                .keep_alive(KeepAlive::Os)
                .client_request_timeout(Duration::ZERO)
                .client_disconnect_timeout(Duration::from_secs(1))
                .h1_allow_half_closed(false)
                .graceful_shutdown_signal(move || {
                    let signal = signal.clone();
                    async move { signal.notified().await }
                })
                .on_connect_ext(|wire: &Wire, data| {
                    data.insert(Rc::clone(&wire.conn));
                })
                .finish(service::Factory { app, shared: shared.clone() });
            let http = Rc::new(http);
            fn_factory(move || {
                let (http, shared, stopping) = (Rc::clone(&http), shared.clone(), stopping.clone());
                async move {
                    let handler = Rc::new(http.new_service(()).await?);
                    let closing = shared.admissions.clone();
                    actix_web::rt::spawn(async move {
                        stopping.notified().await;
                        closing.close();
                    });
                    let config = ServiceConfig::default();
                    Ok::<_, ()>(fn_service(move |stream: TcpStream| {
                        let (handler, shared, config) = (Rc::clone(&handler), shared.clone(), config.clone());
                        async move {
                            let peer = stream.peer_addr().ok();
                            let answer = |wire: Wire| handler.call((wire, Protocol::Http1, peer));
                            shared.connection(stream, config, answer).await;
                            Ok::<_, Infallible>(())
                        }
                    }))
                }
            })
        })?;
        Ok(builder.run())
    }
}

/// Returns whether a request came over TLS.
#[must_use]
pub fn is_secure(req: &actix_web::HttpRequest) -> bool {
    req.conn_data::<Rc<Conn>>().is_some_and(|conn| conn.secure)
}

impl FrontState {
    /// Handles one connection from its first byte to its end.
    async fn connection<A>(&self, stream: TcpStream, config: ServiceConfig, answer: impl FnOnce(Wire) -> A)
    where
        A: Future,
    {
        let accepted = Instant::now();
        let Ok(peer) = stream.peer_addr() else { return };
        let source = network(peer.ip());
        let seat = match self.admissions.admit(source, !self.proxies.trusts(peer.ip())) {
            Ok(seat) => seat,
            Err(full) => return self.turn_away(stream, source, full).await,
        };
        let conn = Conn::new(seat, self.tls.is_some());
        let own = Rc::clone(&conn);
        let run = async {
            // Before the first byte, a connection consists of a socket and this future only.
            let by = accepted + self.times.head;
            let _ = timeout_at(by, stream.readable()).await;
            let io: Box<dyn Io> = match &self.tls {
                None => Box::new(stream),
                Some(tls) => match timeout_at(by, Box::pin(tls.accept(stream))).await {
                    Ok(Ok(stream)) => Box::new(stream),
                    _ => return,
                },
            };
            let mut wire = Box::new(Wire::new(io, conn, self.times.clone(), config, accepted));
            match poll_fn(|cx| wire.poll_first(cx)).await {
                // Boxed: a connection without a request does not pay for the dispatcher's memory.
                Ok(HeadOutcome::Head) => drop(Box::pin(answer(*wire)).await),
                Ok(HeadOutcome::Refused(status)) => {
                    let secure = wire.conn.secure;
                    let bytes = refusal::bytes(status, secure);
                    let _ = timeout(self.times.drain * 5, wire.say_farewell(&bytes)).await;
                }
                Ok(HeadOutcome::Gone) | Err(_) => {}
            }
        };
        let mut run = Box::pin(run);
        poll_fn(|cx| match own.seat.poll_cut(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => run.as_mut().poll(cx),
        })
        .await;
    }

    /// Answers a connection that was not admitted. Over TLS an answer would need a handshake, so the connection
    /// is closed.
    async fn turn_away(&self, mut stream: TcpStream, source: IpAddr, full: Full) {
        if self.tls.is_some() {
            return;
        }
        let status = match full {
            Full::Source => StatusCode::TOO_MANY_REQUESTS,
            Full::All => StatusCode::SERVICE_UNAVAILABLE,
        };
        let Ok(_few) = self.farewells.try_take(&source) else { return };
        let _ = timeout(self.times.drain, async {
            stream.write_all(&refusal::bytes(status, false)).await?;
            stream.shutdown().await?;
            let mut sink = [0; 4096];
            while stream.read(&mut sink).await? > 0 {}
            Ok::<_, io::Error>(())
        })
        .await;
    }
}
