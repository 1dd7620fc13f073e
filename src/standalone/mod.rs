//! `bulkhead up`: the whole platform on one machine. Each part has its own user, and installations know
//! nothing of each other.

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
pub use folder::DataFolder;
pub use processes::{Layout, OwnParts, Process, table};
pub use up::{Options, up};

/// An error of the command line, with its remedy.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

impl Failed {
    /// Builds an error from the failed action and its cause.
    pub fn doing(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {error}"))
    }
}
