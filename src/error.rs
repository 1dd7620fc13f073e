//! The one error type of the platform, in terms of the platform and without HTTP. Only `http/error.rs` knows
//! status codes.

use std::time::Duration;

use crate::fault::{Code, Fault};

/// An error. The cause of an `Internal` goes to the log, never to the client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object does not exist, or the client may not know that it does.
    #[error("the object does not exist, or it belongs to a tenant in which you have no role")]
    NotFound,
    /// A name is taken, or a state prevents the action.
    #[error("{0}")]
    AlreadyExists(String),
    /// The input is not valid: all faults together.
    #[error("{} fault(s)", .0.len())]
    Invalid(Vec<Fault>),
    /// The request itself cannot be read; not a fault of a field.
    #[error("{0}")]
    Malformed(String),
    /// The body is too large; the limit in bytes.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The client has no credential, or its credential is not valid.
    #[error("not signed in")]
    Unauthenticated,
    /// Signed in, but not recently enough for this action.
    #[error(
        "this action needs a recent confirmation that it is you: open /confirm and repeat the action within ten minutes"
    )]
    Unconfirmed,
    /// Too many attempts; the time until the next one.
    #[error("too many attempts: try again in {} s", .0.as_secs())]
    Throttled(Duration),
    /// The client's role does not allow this; the sentence names the role that does.
    #[error("{0}")]
    Forbidden(String),
    /// The state of the object does not allow this.
    #[error("{0}")]
    Conflict(String),
    /// `If-Match` or `If-None-Match` failed; the generation, 0 if there is no object.
    #[error("{1}")]
    PreconditionFailed(i64, String),
    /// The quota would be exceeded: one fault for each resource.
    #[error("the quota would be exceeded")]
    QuotaExceeded(Vec<Fault>),
    /// A part of the platform is not available; the time until a retry.
    #[error("{0}")]
    Unavailable(String, Duration),
    /// An internal error. The text is for the log.
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Builds an internal error from any cause.
    pub fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(cause.into())
    }

    /// Builds an error from a single fault.
    #[must_use]
    pub fn fault(fault: Fault) -> Self {
        Self::Invalid(vec![fault])
    }

    /// Returns the error with its causes: for the log, never for a client.
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

    /// Returns the stable code of the error.
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
