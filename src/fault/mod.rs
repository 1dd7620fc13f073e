//! One fault in the input of a user or a program: the problem, its position, the reason, and the remedy. API,
//! console, `bulkhead check` and the dry run show this same object. A fault never echoes a value, only names
//! and bounds: the input may contain a secret.

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
    /// Returns the address of the explanation, on Bulkhead's own server.
    #[must_use]
    pub fn docs(self) -> String {
        format!("/docs/errors/{self}")
    }
}

/// The kind of a fault. It tells a program how to react.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The field does not exist.
    Unknown,
    /// Other platforms have this field, but Bulkhead does not, for a reason.
    Forbidden,
    /// The value has the wrong type, form or size.
    Invalid,
    /// A required field is missing.
    Missing,
    /// Two fields, or a field and the state of the platform, contradict each other.
    Conflict,
    /// The tenant's quota would be exceeded.
    Quota,
    /// Accepted, but the app will probably not work as expected. Only in `warnings`.
    Warning,
}

/// A fault: the problem, its position, the reason, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Stable code.
    pub code: Code,
    /// Kind.
    pub kind: Kind,
    /// Dotted path of the field, such as `health.http.path`; empty for the whole document.
    pub path: String,
    /// Line of the source, from 1; 0 without a source.
    #[serde(skip_serializing_if = "is_zero")]
    pub line: u32,
    /// Column of the source in characters, from 1; 0 without a source.
    #[serde(skip_serializing_if = "is_zero")]
    pub column: u32,
    /// The problem, in one sentence.
    pub message: String,
    /// The reason for the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The remedy, or the nearest valid name.
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
    /// Returns a fault without position, reason and suggestion.
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

    /// Adds a position in the source.
    #[must_use]
    pub fn at(mut self, line: u32, column: u32) -> Self {
        self.line = line;
        self.column = column;
        self
    }

    /// Adds a reason.
    #[must_use]
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    /// Adds a suggestion.
    #[must_use]
    pub fn instead(mut self, suggestion: impl Into<String>) -> Self {
        self.suggestion = Some(suggestion.into());
        self
    }
}

/// Replaces control characters, and characters that hide or reverse text, by U+FFFD. Input therefore cannot
/// control a terminal or a page.
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
    /// The meaning and the remedy, in plain sentences.
    pub text: &'static str,
}
