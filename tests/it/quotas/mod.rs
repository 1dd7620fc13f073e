//! Quotas per tenant: rows of resource and use, counted resources, kept releases.

mod attacks;
mod bounds;
mod releases;
mod rows;
