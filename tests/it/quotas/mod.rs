//! Limits per tenant: rows of resource and use, things that are counted, releases that are kept.

mod attacks;
mod bounds;
mod releases;
mod rows;
