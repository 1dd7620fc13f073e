//! The client that runs in `serve`: a driver that calls the agent over its socket.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio_util::codec::Framed;

use super::protocol::{Reply, Request};
use super::server::codec;
use crate::driver::{
    BlockedRanges, Denied, Driver, Error, HostSocket, LogQuery, LogStream, ObservedChanges, Probe,
    ProbeOutcome, ProbeSummary, PullSecret, Removal, TenantGrant, Used, Workload,
};
use crate::ids::{AppId, AppName, TenantId, TenantName};
use crate::policy::TenantFlows;

/// A connection to the agent, used by `serve`.
#[derive(Debug, Clone)]
pub struct AgentClient {
    socket: PathBuf,
}

type AgentFrames = Framed<UnixStream, tokio_util::codec::LengthDelimitedCodec>;

fn away(error: impl std::fmt::Display) -> Error {
    Error::Away(format!("the agent does not answer: {error}"))
}

impl AgentClient {
    /// Returns a client of the agent at this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn ask(&self, request: &Request) -> Result<AgentFrames, Error> {
        let stream = tokio::time::timeout(Duration::from_secs(3), UnixStream::connect(&self.socket))
            .await
            .map_err(away)?
            .map_err(away)?;
        let mut frames = Framed::new(stream, codec());
        let text = serde_json::to_vec(request).map_err(away)?;
        frames.send(bytes::Bytes::from(text)).await.map_err(away)?;
        Ok(frames)
    }

    async fn next(frames: &mut AgentFrames, patience: Duration) -> Result<Reply, Error> {
        match tokio::time::timeout(patience, frames.next()).await {
            Ok(Some(Ok(frame))) => serde_json::from_slice(&frame).map_err(away),
            Ok(Some(Err(error))) => Err(away(error)),
            Ok(None) => Err(away("it closed the connection")),
            Err(_) => Err(away("no answer in time")),
        }
    }

    async fn call(&self, request: &Request, patience: u64) -> Result<Reply, Error> {
        let mut frames = self.ask(request).await?;
        match Self::next(&mut frames, Duration::from_secs(patience)).await? {
            Reply::Failed { error } => Err(error),
            reply => Ok(reply),
        }
    }

    /// Returns the installation and the protocol version of the agent.
    pub async fn hello(&self) -> Result<(crate::ids::Installation, u32), Error> {
        match self.call(&Request::Hello {}, 3).await? {
            Reply::Hello { installation, protocol } => Ok((installation, protocol)),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn removal(&self, request: &Request) -> Result<Removal, Error> {
        match self.call(request, 60).await? {
            Reply::Removal { removal } => Ok(removal),
            _ => Err(away("another answer than asked for")),
        }
    }
}

#[async_trait::async_trait]
impl Driver for AgentClient {
    async fn ensure_tenant(&self, grant: &TenantGrant) -> Result<(), Error> {
        self.call(&Request::EnsureTenant { grant: grant.clone() }, 60).await.map(drop)
    }

    async fn remove_tenant(&self, tenant: &TenantName, id: TenantId) -> Result<Removal, Error> {
        self.removal(&Request::RemoveTenant { tenant: tenant.clone(), tenant_id: id }).await
    }

    async fn ensure_app(&self, workload: &Workload, pull: Option<&PullSecret>) -> Result<(), Error> {
        let request = Request::EnsureApp { workload: Box::new(workload.clone()), pull: pull.cloned() };
        // Fetching a large image takes long; the lease is renewed meanwhile.
        self.call(&request, 1800).await.map(drop)
    }

    async fn remove_app(&self, tenant: &TenantName, app: &AppName, id: AppId) -> Result<Removal, Error> {
        self.removal(&Request::RemoveApp { tenant: tenant.clone(), app: app.clone(), app_id: id }).await
    }

    async fn ensure_flows(&self, flows: &TenantFlows) -> Result<i64, Error> {
        match self.call(&Request::EnsureFlows { flows: flows.clone() }, 60).await? {
            Reply::Plan { number } => Ok(number),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn walls(&self) -> Result<BlockedRanges, Error> {
        match self.call(&Request::Walls {}, 3).await? {
            Reply::Walls { walls } => Ok(walls),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn denied(&self, tenant: &TenantName, app_id: AppId) -> Result<Vec<Denied>, Error> {
        match self.call(&Request::Denied { tenant: tenant.clone(), app_id }, 10).await? {
            Reply::Denied { denied } => Ok(denied),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn used(&self) -> Result<Vec<Used>, Error> {
        match self.call(&Request::Used {}, 15).await? {
            Reply::Used { used } => Ok(used),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn listeners(&self) -> Result<Vec<HostSocket>, Error> {
        match self.call(&Request::Listeners {}, 10).await? {
            Reply::Listeners { listeners } => Ok(listeners),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn probe(&self, probe: &Probe) -> Result<ProbeOutcome, Error> {
        match self.call(&Request::Probe { probe: probe.clone() }, 10).await? {
            Reply::Probed { outcome } => Ok(outcome),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn permits(&self, probe: &Probe) -> Result<Option<bool>, Error> {
        match self.call(&Request::Permits { probe: probe.clone() }, 3).await? {
            Reply::Permits { permits } => Ok(permits),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn probe_tenant(&self, tenant: &TenantName) -> Result<ProbeSummary, Error> {
        match self.call(&Request::ProbeTenant { tenant: tenant.clone() }, 30).await? {
            Reply::ProbedTenant { probed } => Ok(probed),
            _ => Err(away("another answer than asked for")),
        }
    }

    async fn observe(&self, cursor: Option<&str>, wait: Duration) -> Result<ObservedChanges, Error> {
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(30_000);
        let request = Request::Observe { cursor: cursor.map(str::to_owned), wait_ms };
        let mut frames = self.ask(&request).await?;
        let mut whole: Option<ObservedChanges> = None;
        loop {
            match Self::next(&mut frames, wait + Duration::from_secs(6)).await? {
                Reply::Observed { observed, last } => {
                    match &mut whole {
                        None => whole = Some(observed),
                        Some(whole) => {
                            whole.apps.extend(observed.apps);
                            whole.machine.extend(observed.machine);
                            whole.fetches.extend(observed.fetches);
                        }
                    }
                    if last {
                        return whole.ok_or_else(|| away("an empty answer"));
                    }
                }
                Reply::Failed { error } => return Err(error),
                _ => return Err(away("another answer than asked for")),
            }
        }
    }

    async fn logs(&self, query: &LogQuery) -> Result<LogStream, Error> {
        let frames = self.ask(&Request::Logs { query: query.clone() }).await?;
        let stream = futures_util::stream::unfold(Some(frames), |frames| async {
            let mut frames = frames?;
            match frames.next().await? {
                Err(error) => Some((Err(away(error)), None)),
                Ok(frame) => match serde_json::from_slice(&frame) {
                    Ok(Reply::Log { line }) => Some((Ok(line), Some(frames))),
                    Ok(Reply::Done {}) => None,
                    Ok(Reply::Failed { error }) => Some((Err(error), None)),
                    Ok(_) => Some((Err(away("another answer than asked for")), None)),
                    Err(error) => Some((Err(away(error)), None)),
                },
            }
        });
        Ok(Box::pin(stream))
    }
}
