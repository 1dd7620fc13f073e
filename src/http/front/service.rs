//! The application as called by a connection. It reports finished answers, answers requests that the stream
//! refused, and bounds the requests in progress of each client behind a trusted proxy.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use actix_http::header::{HeaderName, HeaderValue};
use actix_http::{HttpMessage, Request, Response};
use actix_service::{Service, ServiceFactory};
use actix_web::HttpResponse;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::ServiceResponse;
use actix_web::http::StatusCode;
use bytes::Bytes;

use super::wire::Conn;
use super::{FrontState, network, refusal};
use crate::permits::Permit;

const FORWARDED: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Makes the service of a worker.
pub(super) struct Factory<F> {
    pub(super) app: F,
    pub(super) shared: FrontState,
}

/// The service of a worker.
pub(super) struct Fronted<S> {
    app: S,
    shared: FrontState,
}

type ServiceFuture<T, E> = Pin<Box<dyn Future<Output = Result<T, E>>>>;

impl<F> ServiceFactory<Request> for Factory<F>
where
    F: ServiceFactory<Request, Config = (), Response = ServiceResponse<BoxBody>, Error = actix_web::Error>,
    F::Future: 'static,
    F::InitError: fmt::Debug,
    F::Service: 'static,
    <F::Service as Service<Request>>::Future: 'static,
{
    type Response = Response<FrontBody>;
    type Error = actix_web::Error;
    type Config = ();
    type Service = Fronted<F::Service>;
    type InitError = F::InitError;
    type Future = ServiceFuture<Self::Service, Self::InitError>;

    fn new_service(&self, (): ()) -> Self::Future {
        let (made, shared) = (self.app.new_service(()), self.shared.clone());
        Box::pin(async move { Ok(Fronted { app: made.await?, shared }) })
    }
}

impl<S> Service<Request> for Fronted<S>
where
    S: Service<Request, Response = ServiceResponse<BoxBody>, Error = actix_web::Error>,
    S::Future: 'static,
{
    type Response = Response<FrontBody>;
    type Error = actix_web::Error;
    type Future = ServiceFuture<Self::Response, Self::Error>;

    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.app.poll_ready(cx)
    }

    fn call(&self, req: Request) -> Self::Future {
        let conn = req.conn_data::<Rc<Conn>>().cloned();
        let done = conn.as_ref().map(|conn| Done(Rc::clone(conn)));
        let secure = conn.as_ref().is_some_and(|conn| conn.secure);
        let refused =
            |status, done, room| FrontBody::of(refusal::response(status, secure).into(), done, room);
        if let Some(status) = conn.as_ref().and_then(|conn| conn.take_refusal()) {
            let answer = refused(status, done, None);
            return Box::pin(async move { Ok(answer) });
        }
        let room = match self.room(&req) {
            Ok(room) => room,
            Err(status) => {
                let answer = refused(status, done, None);
                return Box::pin(async move { Ok(answer) });
            }
        };
        let mut call = Box::pin(self.app.call(req));
        Box::pin(async move {
            let outcome = std::future::poll_fn(|cx| {
                if let Some(status) = conn.as_ref().and_then(|conn| conn.take_refusal()) {
                    return Poll::Ready(Err(status));
                }
                call.as_mut().poll(cx).map(Ok)
            })
            .await;
            let response: Response<BoxBody> = match outcome {
                Ok(Ok(response)) => response.into(),
                Ok(Err(error)) => HttpResponse::from_error(error).into(),
                Err(status) => refusal::response(status, secure).into(),
            };
            Ok(FrontBody::of(response, done, room))
        })
    }
}

impl<S> Fronted<S> {
    /// Takes a permit for a client behind a trusted proxy.
    fn room(&self, req: &Request) -> Result<Option<Permit<IpAddr>>, StatusCode> {
        let Some(peer) = req.peer_addr().map(|peer| peer.ip()) else { return Ok(None) };
        let proxies = &self.shared.proxies;
        if !proxies.trusts(peer) {
            return Ok(None);
        }
        let lines: Vec<&[u8]> = req.headers().get_all(FORWARDED).map(HeaderValue::as_bytes).collect();
        let own = lines.is_empty();
        let source = network(proxies.client(peer, lines.into_iter()));
        // The proxy's own requests (its health checks) are limited by its connections.
        if own && source == network(peer) {
            return Ok(None);
        }
        match self.shared.behind.try_take(&source) {
            Ok(permit) => Ok(Some(permit)),
            Err(crate::permits::Busy::Key) => Err(StatusCode::TOO_MANY_REQUESTS),
            Err(crate::permits::Busy::All) => Err(StatusCode::SERVICE_UNAVAILABLE),
        }
    }
}

/// Tells the stream on drop that the request is answered.
struct Done(Rc<Conn>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.answered();
    }
}

/// The body of an answer, with the permits that are returned at its end.
pub(super) struct FrontBody {
    body: BoxBody,
    _done: Option<Done>,
    _room: Option<Permit<IpAddr>>,
}

impl FrontBody {
    fn of(response: Response<BoxBody>, done: Option<Done>, room: Option<Permit<IpAddr>>) -> Response<Self> {
        response.map_body(|_, body| Self { body, _done: done, _room: room })
    }
}

impl MessageBody for FrontBody {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(cx)
    }
}
