//! Logs, and a few metrics for the operator.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};
use crate::fault::plain;

/// Writes an event as one line, whatever its content: input cannot start a new line or control a terminal. An
/// event arrives in one piece, with its line end.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let (body, end) = text.strip_suffix('\n').map_or((&*text, ""), |body| (body, "\n"));
        let plain: String = body.chars().map(plain).collect();
        self.0.write_all(plain.as_bytes())?;
        self.0.write_all(end.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Starts logging to standard error. Further calls do nothing.
pub fn start(log: &Log) {
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| OneLine(io::stderr()))
        .with_target(false);
    let _ = match log.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Arms the failpoints of the environment variable `FAILPOINTS`, in test builds with the feature of that
/// name. A failpoint that panics ends the whole process at that step.
pub fn arm_failpoints() {
    if cfg!(feature = "failpoints") && std::env::var_os("FAILPOINTS").is_some() {
        std::mem::forget(fail::FailScenario::setup());
        std::panic::set_hook(Box::new(|info| {
            tracing::error!(%info, "a failpoint ends this process");
            std::process::abort();
        }));
    }
}

/// Counters of this process, in Prometheus' text format at `/metrics` on a separate listener.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests answered, by class of status: index 2 is 2xx.
    pub requests: [AtomicU64; 6],
    /// Reconciles that settled.
    pub reconciles: AtomicU64,
    /// Reconciles that failed and will be retried.
    pub retries: AtomicU64,
    /// Reconciles that were parked.
    pub parked: AtomicU64,
    /// Results that arrived after their lease had passed to another worker.
    pub fenced: AtomicU64,
    /// Registry blobs without a record, which were removed.
    pub strays: AtomicU64,
    /// Their bytes.
    pub stray_bytes: AtomicU64,
}

impl Metrics {
    /// Increments a counter.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the text that a scraper reads.
    #[must_use]
    pub fn render(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::from("# TYPE bulkhead_http_responses_total counter\n");
        for (class, counter) in self.requests.iter().enumerate().skip(1) {
            let _ = writeln!(
                out,
                "bulkhead_http_responses_total{{class=\"{class}xx\"}} {}",
                counter.load(Ordering::Relaxed)
            );
        }
        for (name, counter) in [
            ("settled", &self.reconciles),
            ("retried", &self.retries),
            ("parked", &self.parked),
            ("fenced", &self.fenced),
        ] {
            let _ = writeln!(
                out,
                "# TYPE bulkhead_reconciles_{name}_total counter\nbulkhead_reconciles_{name}_total {}",
                counter.load(Ordering::Relaxed)
            );
        }
        for (name, counter) in [("removed", &self.strays), ("bytes", &self.stray_bytes)] {
            let _ = writeln!(
                out,
                "# TYPE bulkhead_registry_strays_{name}_total counter\nbulkhead_registry_strays_{name}_total {}",
                counter.load(Ordering::Relaxed)
            );
        }
        out
    }
}

/// Waits for Ctrl-C or SIGTERM.
pub async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let mut out = OneLine(Vec::new());
        out.write_all("WARN name=a\r\nERROR forged\u{1b}[2J \u{202e}x\n".as_bytes()).unwrap();
        out.write_all(b"INFO next\n").unwrap();
        let text = String::from_utf8(out.0).unwrap();
        let lines: Vec<&str> = text.split('\n').collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].starts_with("WARN name=a") && lines[0].contains("ERROR forged"));
        assert!(lines[0].chars().all(|c| plain(c) == c) && lines[1] == "INFO next" && lines[2].is_empty());
    }
}
