//! A document as a tree whose every node knows its place. Both formats are read into it, and one
//! walk over it finds all faults: there is no second reader that could think otherwise.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::fault::catalogue as code;
use crate::fault::{Fault, Kind, plain};

/// Most nodes of a document.
pub(super) const NODES: usize = 2_000;
/// Deepest nesting.
pub(super) const DEPTH: usize = 16;

/// A place: a byte offset (`column` 0), or line and column counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct At {
    pub(super) line: u32,
    pub(super) column: u32,
}

impl At {
    pub(super) fn offset(offset: usize) -> Self {
        Self { line: u32::try_from(offset).unwrap_or(u32::MAX), column: 0 }
    }

    /// Line and column in characters, both from 1.
    pub(super) fn place(self, source: &str) -> (u32, u32) {
        if self.column > 0 {
            return (self.line, self.column);
        }
        let offset = (self.line as usize).min(source.len());
        let before = &source.as_bytes()[..offset];
        let line = before.iter().filter(|b| **b == b'\n').count() + 1;
        let start = before.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
        (u32::try_from(line).unwrap_or(u32::MAX), u32::try_from(column).unwrap_or(u32::MAX))
    }
}

/// A node.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) at: At,
    pub(super) value: Value<'a>,
}

/// A key with its place.
#[derive(Debug)]
pub(super) struct Key<'a> {
    pub(super) at: At,
    pub(super) name: Cow<'a, str>,
}

/// What a node is. Numbers stay as they were written.
#[derive(Debug)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    Number(Cow<'a, str>),
    Text(Cow<'a, str>),
    List(Vec<Node<'a>>),
    Map(Vec<(Key<'a>, Node<'a>)>),
}

impl Value<'_> {
    /// The type in words, for a fault. Never the value.
    pub(super) fn words(&self) -> &'static str {
        match self {
            Self::Null => "nothing (null)",
            Self::Bool(_) => "true or false",
            Self::Number(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "a group of fields",
        }
    }
}

/// Why a document could not be read at all. Only these stop before the walk.
pub(super) fn broken(code: crate::fault::Code, source: &str, at: At, message: impl Into<String>) -> Fault {
    let (line, column) = at.place(source);
    Fault::new(code, Kind::Invalid, "", message).at(line, column)
}

/// Counts nodes and depth while a tree is built.
#[derive(Debug, Default)]
pub(super) struct Budget {
    nodes: usize,
}

impl Budget {
    pub(super) fn take(&mut self, depth: usize) -> Result<(), &'static str> {
        self.nodes += 1;
        if self.nodes > NODES {
            return Err("the document has more than 2000 values");
        }
        if depth > DEPTH {
            return Err("the document is nested more than 16 levels deep");
        }
        Ok(())
    }
}

/// The keys of a group that stand there before.
fn doubled<'n, 'a>(entries: &'n [(Key<'a>, Node<'a>)]) -> impl Iterator<Item = &'n Key<'a>> {
    // A small group is faster searched than hashed.
    let mut seen = HashSet::new();
    let keys = entries.iter().map(|(key, _)| key);
    keys.enumerate()
        .filter(move |(n, key)| {
            if entries.len() <= 16 {
                entries[..*n].iter().any(|(earlier, _)| earlier.name == key.name)
            } else {
                !seen.insert(&key.name)
            }
        })
        .map(|(_, key)| key)
}

fn has_doubled(node: &Node<'_>) -> bool {
    match &node.value {
        Value::List(items) => items.iter().any(has_doubled),
        Value::Map(entries) => {
            doubled(entries).next().is_some() || entries.iter().any(|(_, value)| has_doubled(value))
        }
        _ => false,
    }
}

/// Adds a fault for each key that stands twice in its group, with its whole path.
pub(super) fn find_duplicates(source: &str, node: &Node<'_>, faults: &mut Vec<Fault>) {
    // Paths are made only where there is something to say about them.
    if has_doubled(node) {
        name_duplicates(source, node, "", faults);
    }
}

fn name_duplicates(source: &str, node: &Node<'_>, path: &str, faults: &mut Vec<Fault>) {
    match &node.value {
        Value::List(items) => {
            for (n, item) in items.iter().enumerate() {
                name_duplicates(source, item, &format!("{path}[{n}]"), faults);
            }
        }
        Value::Map(entries) => {
            for key in doubled(entries) {
                let (line, column) = key.at.place(source);
                faults.push(
                    Fault::new(
                        code::DUPLICATE,
                        Kind::Invalid,
                        below(path, &key.name),
                        "this field stands twice",
                    )
                    .at(line, column)
                    .because("of two values one would have to be dropped silently"),
                );
            }
            for (key, value) in entries {
                name_duplicates(source, value, &below(path, &key.name), faults);
            }
        }
        _ => {}
    }
}

/// The path of a field of a group.
pub(super) fn below(path: &str, name: &str) -> String {
    let name = clean(name);
    if path.is_empty() { name } else { format!("{path}.{name}") }
}

/// A name that somebody wrote, fit to be shown, of at most 64 characters.
pub(super) fn clean(name: &str) -> String {
    name.chars().map(plain).take(64).collect()
}
