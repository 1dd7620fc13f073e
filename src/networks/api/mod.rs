//! The networks API.

use serde::Deserialize;

use crate::access::api::NumberPath;
use crate::config::Config;
use crate::driver::Driver;
use crate::error::Error;
use crate::fault::{Code, Fault, Kind};
use crate::policy::Cidr;
use crate::policy::never::Range;

pub mod egress;
pub mod grants;
pub mod plans;
pub mod reach;
pub mod rollouts;
pub mod services;
pub mod trial;

/// The name in the path. An invalid name is answered with 404.
#[derive(Deserialize)]
pub struct NamePath {
    name: String,
}

impl NamePath {
    /// Parses the name for a request that creates an object: an invalid name is a validation fault, not a
    /// 404.
    fn checked<T: std::str::FromStr>(&self) -> Result<T, Error>
    where
        T::Err: std::fmt::Display,
    {
        self.name.parse().map_err(|error: T::Err| {
            Error::fault(Fault::new(Code(426), Kind::Invalid, "name", error.to_string()))
        })
    }

    fn parse<T: std::str::FromStr>(&self) -> Result<T, Error> {
        self.name.parse().map_err(|_| Error::NotFound)
    }
}

fn parse<T: std::str::FromStr>(text: &str, path: &str, faults: &mut Vec<Fault>) -> Option<T>
where
    T::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|error: T::Err| faults.push(Fault::new(Code(426), Kind::Invalid, path, error.to_string())))
        .ok()
}

fn days(days: Option<i32>, faults: &mut Vec<Fault>) {
    if days.is_some_and(|days| !(1..=3650).contains(&days)) {
        faults.push(Fault::new(Code(426), Kind::Invalid, "days", "days is 1 to 3650, or absent for no end"));
    }
}

/// Returns the pool of the tenants' subnets and the reserved ranges of the machine. The machine's ranges are
/// empty while the agent does not answer. The agent enforces them in any case.
async fn walls(config: &Config, driver: &dyn Driver) -> (Cidr, Vec<Range>) {
    let walls = driver.walls().await.unwrap_or_default();
    (super::connections::pool(&config.pools), walls.ranges())
}
