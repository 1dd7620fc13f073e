//! Services, grants, egress targets, plans and rollouts in the database.

mod decided;
mod egress;
mod grants;
mod plans;
mod probed;
mod rollouts;
mod services;

pub(super) use {decided::*, egress::*, grants::*, plans::*, probed::*, rollouts::*, services::*};
