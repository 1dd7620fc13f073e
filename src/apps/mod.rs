//! Apps.
pub mod spec;
