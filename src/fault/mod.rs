//! One fault: what is wrong in something that a person or a program handed in, where, why, and
//! what to do. API, console, `bulkhead check` and the dry run all show this same object. A fault
//! never echoes a value, only names and bounds: what was handed in may hold a secret.

pub mod catalogue;

use serde::Serialize;

/// A stable code, `BH-nnn`. 100 to 199 are faults of an app spec, 400 and up are API errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub u16);

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BH-{}", self.0)
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Code {
    /// Where the code is explained, on Bulkhead's own address.
    #[must_use]
    pub fn docs(self) -> String {
        format!("/docs/errors/{self}")
    }
}

/// The kind of a fault: it tells a program what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// There is no such field.
    Unknown,
    /// The field is known from other platforms and not available here, for a reason.
    Forbidden,
    /// The value has the wrong type, form or size.
    Invalid,
    /// A required field is not there.
    Missing,
    /// Two fields, or a field and the state of the platform, contradict each other.
    Conflict,
    /// It would exceed the tenant's quota.
    Quota,
    /// Accepted, but something will probably not work as expected. Only in `warnings`.
    Warning,
}

/// What is wrong, where, why, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Stable code.
    pub code: Code,
    /// Kind.
    pub kind: Kind,
    /// Dotted path of the field, such as `health.http.path`; empty for the whole document.
    pub path: String,
    /// Line of the source, from 1; 0 where there is no source.
    #[serde(skip_serializing_if = "is_zero")]
    pub line: u32,
    /// Column of the source in characters, from 1; 0 where there is no source.
    #[serde(skip_serializing_if = "is_zero")]
    pub column: u32,
    /// What is wrong, in one sentence.
    pub message: String,
    /// Why it is so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What to do instead, or the name that was probably meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<String>,
    /// Address of the explanation.
    pub docs: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's skip_serializing_if hands a reference")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Fault {
    /// A fault without position, reason and suggestion.
    #[must_use]
    pub fn new(code: Code, kind: Kind, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code,
            kind,
            path: path.into(),
            line: 0,
            column: 0,
            message: message.into(),
            reason: None,
            suggestion: None,
            docs: code.docs(),
        }
    }

    /// The same with a position in the source.
    #[must_use]
    pub fn at(mut self, line: u32, column: u32) -> Self {
        self.line = line;
        self.column = column;
        self
    }

    /// The same with a reason.
    #[must_use]
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    /// The same with a suggestion.
    #[must_use]
    pub fn instead(mut self, suggestion: impl Into<String>) -> Self {
        self.suggestion = Some(suggestion.into());
        self
    }
}

/// A character fit for a screen: control characters, and those that turn or hide what follows, become
/// U+FFFD, so that what somebody handed in steers no terminal and no page.
#[must_use]
pub fn plain(c: char) -> char {
    let hidden = matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    if c.is_control() || hidden { '\u{fffd}' } else { c }
}

/// One entry of the catalogue behind `/docs/errors/BH-nnn`.
#[derive(Debug, Clone, Copy)]
pub struct Explanation {
    /// The code.
    pub code: Code,
    /// A short title; the `title` of problem+json.
    pub title: &'static str,
    /// What it means and what to do, in plain sentences.
    pub text: &'static str,
}
