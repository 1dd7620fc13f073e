//! The platform on the real machine: `bulkhead up` with its Postgres, registry, engine and firewall, ordinary
//! clients, real containers.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot continue panics")]

mod access;
mod artifacts;
mod attacks;
mod bounds;
mod conformance;
mod contained;
mod engine;
mod faults;
mod health;
mod images;
mod inside;
mod kafka;
mod kills;
mod main_job;
mod network;
mod outside;
mod ports;
mod production;
mod pushes;
mod quotas;
mod reasons;
mod registry;
mod secrets;
mod side_by_side;
mod software;
mod strangers;
mod support;
mod tenants_bounds;
mod walls;
