//! Actions on a tenant's connections. Each is one transaction that writes rows, audit event and work.

mod egress;
mod grants;
mod rollouts;
mod services;
mod trial;

pub use egress::{Decision, ask, decide, withdraw_target};
pub use grants::{Offer, accept, end, offer};
pub use rollouts::{abort, end_window, pause, resume};
pub use services::{Put, delete_service, give, put_service, take};
pub use trial::{begin_trial, end_trial};

/// The kind of a network's work; the object is the tenant.
pub const WORK: &str = crate::apps::connections::WORK;
