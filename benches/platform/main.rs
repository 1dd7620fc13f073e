//! Measurements of the platform, each against a named peer or limit in the same run: at least five
//! alternating pairs, medians in a table. `deploy/bench` runs it as root on a quiet machine. Arguments select
//! measurements by name.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a measurement that fails panics"
)]

mod access;
mod deploys;
mod memory;
mod neighbours;
mod network;
#[path = "../../tests/machine/outside.rs"]
#[expect(dead_code, reason = "the tests need more of it")]
mod outside;
mod specs;
mod starts;
#[path = "../../tests/machine/support.rs"]
#[expect(dead_code, reason = "the tests need more of it")]
mod support;
mod uid_ranges;

/// One row of the table.
pub(crate) struct Row {
    what: &'static str,
    ours: String,
    peer: String,
    result: String,
    goal: &'static str,
}

/// Returns the median.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Formats `median (minimum to maximum)` with this many digits.
pub(crate) fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().fold(f64::MAX, f64::min);
    let most = values.iter().copied().fold(f64::MIN, f64::max);
    format!("{:.digits$} ({least:.digits$} to {most:.digits$})", median(values))
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "crowd") {
        return neighbours::crowd::main(&args[1..]);
    }
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let wanted = |name: &str| asked.is_empty() || asked.iter().any(|a| a == name);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(at) = asked.iter().position(|name| name == "neighbours") {
        return runtime.block_on(neighbours::measure(&asked[at + 1..]));
    }
    println!("| measure | Bulkhead | peer or limit | result | goal |\n| --- | --- | --- | --- | --- |");
    // Print each row at once, so a later failure does not lose it.
    let say = |row: Row| {
        println!("| {} | {} | {} | {} | {} |", row.what, row.ours, row.peer, row.result, row.goal);
    };
    if wanted("specs") {
        say(specs::measure());
    }
    runtime.block_on(async {
        if wanted("uids") {
            say(uid_ranges::measure().await);
        }
        if wanted("start") {
            say(starts::serve_to_ready().await);
        }
        if wanted("running") {
            say(starts::deploy_to_running().await);
        }
        if wanted("deploys") {
            say(deploys::measure().await);
        }
        if wanted("signed") {
            say(access::signed().await);
        }
        if wanted("logins") {
            say(access::logins().await);
        }
        if wanted("audit") {
            access::audit().await.into_iter().for_each(say);
        }
        if wanted("network") {
            network::measure().await.into_iter().for_each(say);
        }
        if wanted("idle") {
            say(memory::idle().await);
        }
        if wanted("push") {
            say(memory::push().await);
        }
    });
}
