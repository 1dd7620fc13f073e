//! Guarantees of the database against a real Postgres: user ids, quotas, work and leases, access, compiled
//! specs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot continue panics")]

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
mod transactions;
mod uid_ranges;
mod units;
mod uploads;
mod work;
