//! The one error of the platform, without HTTP words: what went wrong in terms of the platform.
//! `http/error.rs` alone knows status codes.

use std::time::Duration;

use crate::fault::{Code, Fault};

/// What went wrong. The cause of an `Internal` goes to the log, never to the client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not exist, or whoever asks may not know that it does.
    #[error("there is no such thing, or it belongs to a tenant that you have no role in")]
    NotFound,
    /// A name is taken, or a state stands in the way.
    #[error("{0}")]
    AlreadyExists(String),
    /// What was handed in is wrong: all faults together.
    #[error("{} fault(s)", .0.len())]
    Invalid(Vec<Fault>),
    /// The request itself cannot be read; no fault of a field.
    #[error("{0}")]
    Malformed(String),
    /// Too large, with the limit in bytes.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// Nobody, or somebody whose credential is not (or no longer) good.
    #[error("not signed in")]
    Unauthenticated,
    /// Signed in, but too long ago for this: the person proves once more to be there.
    #[error("this needs you to confirm that it is you; sign-ins count for ten minutes")]
    Unconfirmed,
    /// Too many tries; how long until the next one.
    #[error("too many tries: the next one is possible in {} s", .0.as_secs())]
    Throttled(Duration),
    /// Known, but not allowed to do this; the sentence says which role may.
    #[error("{0}")]
    Forbidden(String),
    /// The state of the object stands against it.
    #[error("{0}")]
    Conflict(String),
    /// `If-Match` or `If-None-Match` did not hold; the generation, 0 while there is no object.
    #[error("{1}")]
    PreconditionFailed(i64, String),
    /// It would exceed the quota: one fault for each resource.
    #[error("it does not fit into the quota")]
    QuotaExceeded(Vec<Fault>),
    /// A part of the platform is not there; try again after a while.
    #[error("{0}")]
    Unavailable(String, Duration),
    /// A mistake of ours. The text is for the log.
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// An internal error from any cause.
    pub fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(cause.into())
    }

    /// A single fault.
    #[must_use]
    pub fn fault(fault: Fault) -> Self {
        Self::Invalid(vec![fault])
    }

    /// What it was, with its causes: for the log, never for a client.
    #[must_use]
    pub fn for_log(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    }

    /// The stable code of the error.
    #[must_use]
    pub fn code(&self) -> Code {
        Code(match self {
            Self::Malformed(_) => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden(_) => 403,
            Self::NotFound => 404,
            Self::Unconfirmed => 407,
            Self::AlreadyExists(_) => 409,
            Self::Conflict(_) => 410,
            Self::PreconditionFailed(..) => 412,
            Self::TooLarge(_) => 413,
            Self::Invalid(_) => 422,
            Self::QuotaExceeded(_) => 423,
            Self::Throttled(_) => 429,
            Self::Internal(_) => 500,
            Self::Unavailable(..) => 503,
        })
    }
}
