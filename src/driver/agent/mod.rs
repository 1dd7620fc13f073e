//! The agent and its protocol: a fixed set of messages over a unix socket. `client.rs` runs in `serve`; everything
//! else runs as root and validates every request itself.

mod app;
mod check;
pub mod client;
pub mod config;
mod core;
mod engine;
mod fetching;
mod flows;
mod images;
mod journal;
mod kept;
mod limits;
mod logs;
mod names;
mod network;
mod pace;
mod plan;
mod probe;
pub mod protocol;
mod server;

pub use self::core::run;
pub(crate) use self::network::UNKNOWN_TENANT;
