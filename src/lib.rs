//! Bulkhead: the control plane of a multi-tenant container platform, safe by construction.

pub mod driver;
pub mod fault;
pub mod ids;
