//! The root half and the way to it: closed messages over a unix socket.

pub mod protocol;
