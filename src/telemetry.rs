//! Logs, and the few numbers that an operator watches.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Starts logging to standard error. A second call does nothing.
pub fn start(log: &Log) {
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let _ = match log.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Arms the failpoints that the environment names (`FAILPOINTS`; in builds with the feature of that
/// name, for tests). A point that panics there ends the whole process at that very step.
pub fn arm_failpoints() {
    if cfg!(feature = "failpoints") && std::env::var_os("FAILPOINTS").is_some() {
        std::mem::forget(fail::FailScenario::setup());
        std::panic::set_hook(Box::new(|info| {
            tracing::error!(%info, "a failpoint ends this process");
            std::process::abort();
        }));
    }
}

/// Counters of this process, in Prometheus' text form at `/metrics` on a listener of their own.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests answered, by class of status: index 2 is 2xx.
    pub requests: [AtomicU64; 6],
    /// Reconciles that settled.
    pub reconciles: AtomicU64,
    /// Reconciles that failed and will be tried again.
    pub retries: AtomicU64,
    /// Reconciles that were parked.
    pub parked: AtomicU64,
    /// Results that came too late: the lease had passed on.
    pub fenced: AtomicU64,
}

impl Metrics {
    /// Adds one.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The text that a scraper reads.
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
