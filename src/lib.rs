//! Bulkhead: the control plane of a multi-tenant container platform, safe by construction.

pub mod apps;
pub mod config;
pub mod driver;
pub mod fault;
pub mod ids;
pub mod images;
