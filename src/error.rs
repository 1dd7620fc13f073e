//! The one error of the platform, without HTTP words: what went wrong in terms of the platform.
//! `http/error.rs` alone knows status codes.

use std::time::Duration;

use crate::fault::{Code, Explanation, Fault};

/// What went wrong. The cause of an `Internal` goes to the log, never to the client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not exist, or whoever asks may not know that it does.
    #[error("not found")]
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
    /// Known, but not allowed to do this; the sentence says which role may.
    #[error("{0}")]
    Forbidden(String),
    /// The state of the object stands against it.
    #[error("{0}")]
    Conflict(String),
    /// `If-Match` did not hold.
    #[error("the object has changed: its generation is {0}")]
    PreconditionFailed(i64),
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

    /// The stable code of the error.
    #[must_use]
    pub fn code(&self) -> Code {
        Code(match self {
            Self::Malformed(_) => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden(_) => 403,
            Self::NotFound => 404,
            Self::AlreadyExists(_) => 409,
            Self::Conflict(_) => 410,
            Self::PreconditionFailed(_) => 412,
            Self::TooLarge(_) => 413,
            Self::Invalid(_) => 422,
            Self::QuotaExceeded(_) => 423,
            Self::Internal(_) => 500,
            Self::Unavailable(..) => 503,
        })
    }
}

/// Errors of the API, as documented at `/docs/errors/BH-nnn`.
pub const CATALOGUE: &[Explanation] = &[
    Explanation {
        code: Code(400),
        title: "The request cannot be read",
        text: "The body is not the JSON or YAML that its Content-Type says, a parameter has the wrong form, or a header is missing. The detail says which. Nothing was changed.",
    },
    Explanation {
        code: Code(401),
        title: "Not signed in",
        text: "Send an API token as `Authorization: Bearer bhk_...`, or sign in at the console. A token that has expired or was revoked is answered the same way.",
    },
    Explanation {
        code: Code(403),
        title: "Not allowed",
        text: "You are known, and your role does not include this. The detail names the role that does.",
    },
    Explanation {
        code: Code(404),
        title: "Not found",
        text: "There is no such thing, or it belongs to a tenant that you have no role in: the answer is the same on purpose.",
    },
    Explanation {
        code: Code(409),
        title: "Already taken",
        text: "The name is in use, or was in use once: names of tenants are never given again.",
    },
    Explanation {
        code: Code(410),
        title: "Not possible in this state",
        text: "The object is in a state that does not allow this, such as a deploy to a suspended tenant. The detail says which state and what to do first.",
    },
    Explanation {
        code: Code(412),
        title: "The object has changed",
        text: "The generation in `If-Match` is not the current one. Read the object again, look at what changed, and send your change with its new ETag.",
    },
    Explanation {
        code: Code(413),
        title: "Too large",
        text: "The body exceeds the limit that the detail names. An app spec may have 64 KiB.",
    },
    Explanation {
        code: Code(422),
        title: "The input has faults",
        text: "`faults` lists all of them, each with its own code, place, reason and suggestion. Nothing was changed.",
    },
    Explanation {
        code: Code(423),
        title: "It does not fit into the quota",
        text: "`faults` has one entry for each resource, with what is used, what was asked and what is left. Make the app smaller, stop or delete another one, or ask the admin for a larger quota. With `singleton: true` an app needs no reserve for rolling updates.",
    },
    Explanation {
        code: Code(424),
        title: "The user ids are used up",
        text: "Every range of the pool has been given, and ranges never return. The admin has to set up another installation with a pool of its own.",
    },
    Explanation {
        code: Code(425),
        title: "The networks are used up",
        text: "Every subnet of the pool has been given, and numbers never return.",
    },
    Explanation {
        code: Code(426),
        title: "A field of the request is wrong",
        text: "A name, a number or a duration is out of its bounds; the fault says which bounds.",
    },
    Explanation {
        code: Code(427),
        title: "The app that is named does not exist",
        text: "`connects.apps` names an app that the tenant does not have. Deploy that one first, or correct the name.",
    },
    Explanation {
        code: Code(428),
        title: "The name in the spec is not the name in the address",
        text: "PUT .../apps/NAME takes a spec with `name: NAME`.",
    },
    Explanation {
        code: Code(500),
        title: "A mistake of ours",
        text: "It is logged under the request id. Nothing was changed, or all of it was; asking again with the same Idempotency-Key is safe.",
    },
    Explanation {
        code: Code(503),
        title: "A part of the platform is not there",
        text: "The database, the registry or the engine does not answer. Running apps go on. Try again after the seconds in Retry-After.",
    },
];
