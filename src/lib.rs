//! Bulkhead: the control plane of a multi-tenant container platform, safe by construction.
//!
//! Folders are nouns. A module imports only modules before it in the order of `tests/architecture.rs`.

#![recursion_limit = "256"]

pub mod access;
pub mod activity;
pub mod apps;
pub mod audit;
pub mod config;
pub mod db;
pub mod docs;
pub mod driver;
pub mod error;
pub mod fault;
pub mod http;
pub mod ids;
pub mod images;
pub mod keys;
pub mod networks;
pub mod outgoing;
pub mod permits;
pub mod policy;
pub mod prober;
pub mod quotas;
pub mod readiness;
pub mod reconcile;
pub mod registries;
pub mod resolver;
pub mod routes;
pub mod standalone;
pub mod startup;
pub mod telemetry;
pub mod tenants;
pub mod uid_ranges;
