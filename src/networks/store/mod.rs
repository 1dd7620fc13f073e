//! Services, grants, places outside and plans in the database.

mod decided;
mod egress;
mod grants;
mod plans;
mod services;

pub(super) use {decided::*, egress::*, grants::*, plans::*, services::*};
