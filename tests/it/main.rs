//! The database's promises against a real Postgres: user ids, quotas, work and leases, who gets in, what a spec
//! compiles to.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on panics")]

mod access;
mod asked;
mod command_line;
mod docs;
mod front;
mod packages;
mod quotas;
mod registry;
mod render;
mod support;
mod sweeps;
mod uid_ranges;
mod units;
mod uploads;
mod work;
