//! The database's promises against a real Postgres: user ids, work and leases, what a spec compiles to.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on panics")]

mod command_line;
mod render;
mod uid_ranges;
mod units;
mod work;
