//! Podman and nftables, driven by the agent.

pub mod cgroups;
pub mod client;
mod content;
pub mod dangers;
pub mod ear;
pub mod engine;
pub mod firewall;
pub mod foreign;
pub mod host;
pub mod inside;
pub mod listens;
pub mod namespace;
pub mod neighbours;
pub mod oom;
pub mod passwd;
pub mod ports;
pub mod program;
pub mod pull;
pub mod render;
pub mod rootfs;
pub mod seccomp;
pub mod tree;
