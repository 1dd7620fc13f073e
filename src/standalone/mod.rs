//! `bulkhead up`: everything on one machine, each part under its own user, nothing of it known to
//! another installation.

mod bounds;
mod claims;
mod demo;
pub mod doctor;
mod doors;
mod folder;
mod forwarding;
mod given;
mod numbers;
mod postgres;
mod processes;
mod running;
pub mod service;
pub mod settings;
mod settings_file;
mod surroundings;
pub mod uninstall;
pub mod units;
mod up;

pub use claims::Claim;
pub use folder::Folder;
pub use processes::{Layout, OwnParts, Process, table};
pub use up::{Options, up};

/// What went wrong on the way up, with the remedy, for people.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

impl Failed {
    /// From a sentence about what was being done, and the cause.
    pub fn doing(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {error}"))
    }
}
