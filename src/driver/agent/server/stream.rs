//! Streams logs to one reader: stored lines first, then live ones.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use super::super::core::{Agent, lock};
use super::super::logs;
use super::super::protocol::Reply;
use super::{ClientFrames, ROOM, send};
use crate::driver::{Error, LogQuery};
use crate::ids::TenantName;

/// Maximum number of log readers, in total and per tenant.
const READERS: usize = 128;
const READERS_OF_TENANT: usize = 16;
/// Maximum number of readers whose stored lines are in memory, per tenant and in total, and for how long.
pub(in crate::driver::agent) const STORED: (usize, usize) = (2, 32);
const STORED_WITHIN: Duration = Duration::from_secs(300);
/// A log reader; counted until it is dropped.
pub(super) struct LogReader {
    agent: Arc<Agent>,
    tenant: TenantName,
}

impl LogReader {
    pub(super) fn enter(agent: &Arc<Agent>, tenant: &TenantName) -> Option<Self> {
        let mut readers = lock(&agent.readers);
        let own = readers.get(tenant).copied().unwrap_or(0);
        if own >= READERS_OF_TENANT || readers.values().sum::<usize>() >= READERS {
            return None;
        }
        readers.insert(tenant.clone(), own + 1);
        drop(readers);
        Some(Self { agent: Arc::clone(agent), tenant: tenant.clone() })
    }
}

impl Drop for LogReader {
    fn drop(&mut self) {
        let mut readers = lock(&self.agent.readers);
        match readers.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(readers.remove(&self.tenant)),
        }
    }
}

pub(super) async fn stream_logs(agent: &Arc<Agent>, frames: &mut ClientFrames, query: &LogQuery) {
    let Some(app) = agent.app(query.app_id).filter(|app| app.tenant == query.tenant && app.name == query.app)
    else {
        let _ = send(frames, &Reply::Done {}).await;
        return;
    };
    // Subscribed first, so that no line is lost between the stored and the live ones.
    let mut live = app.lines.subscribe();
    let dir = agent.logs_dir(app.id);
    let (instance, count) = (query.instance, query.tail.clamp(1, 10_000) as usize);
    // Stored lines stay in memory until they are sent: few readers at a time, and with a time limit.
    let Ok(room) = agent.stored.take(&query.tenant, ROOM).await else {
        let error = Error::Transient("many logs are being read; try again in a moment".into());
        let _ = send(frames, &Reply::Failed { error }).await;
        return;
    };
    let stored =
        tokio::task::spawn_blocking(move || logs::last(&dir, instance, count)).await.unwrap_or_default();
    let newest = stored.last().map(|line| line.at);
    let sending = async {
        for line in stored {
            send(frames, &Reply::Log { line }).await?;
        }
        Ok::<_, ()>(())
    };
    if !matches!(tokio::time::timeout(STORED_WITHIN, sending).await, Ok(Ok(()))) {
        return;
    }
    drop(room);
    if !query.follow {
        let _ = send(frames, &Reply::Done {}).await;
        return;
    }
    let leaving = app.leaving();
    drop(app);
    loop {
        tokio::select! {
            line = live.recv() => {
                let line = match line {
                    Ok(line) => line,
                    // A slow reader loses lines and gets a note; the app does not slow down.
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(n)) => crate::driver::LogLine {
                        instance: query.instance.unwrap_or(0),
                        at: time::OffsetDateTime::now_utc(),
                        stream: crate::driver::LogStreamName::Platform,
                        text: format!("{n} lines are not shown: they were written faster than they were read"),
                    },
                    Err(_) => break,
                };
                let wanted = query.instance.is_none_or(|n| n == line.instance) && newest.is_none_or(|at| line.at > at);
                if wanted && send(frames, &Reply::Log { line }).await.is_err() {
                    return;
                }
            }
            // Any data from the client, or its end, ends the stream.
            _ = frames.next() => return,
            () = leaving.cancelled() => break,
        }
    }
    let _ = send(frames, &Reply::Done {}).await;
}
