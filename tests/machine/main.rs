//! The platform on the real machine: `bulkhead up` with its Postgres, registry, engine and firewall,
//! ordinary clients, real containers.

mod access;
mod attacks;
mod contained;
mod faults;
mod main_job;
mod registry;
mod support;
