//! A document as a tree in which every node knows its position. Both formats parse into this tree and a single
//! walk finds all faults, so two readers can never disagree.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::fault::catalogue as code;
use crate::fault::{Fault, Kind, plain};

/// Maximum number of nodes in a document.
pub(super) const NODES: usize = 2_000;
/// Maximum depth of nesting.
pub(super) const DEPTH: usize = 16;

/// A position: a byte offset (`column` is 0), or line and column from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct At {
    pub(super) line: u32,
    pub(super) column: u32,
}

impl At {
    pub(super) fn offset(offset: usize) -> Self {
        Self { line: u32::try_from(offset).unwrap_or(u32::MAX), column: 0 }
    }

    /// Returns line and column in characters, both from 1.
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
pub(super) struct SpecNode<'a> {
    pub(super) at: At,
    pub(super) value: Value<'a>,
}

/// A key with its position.
#[derive(Debug)]
pub(super) struct SpecKey<'a> {
    pub(super) at: At,
    pub(super) name: Cow<'a, str>,
}

/// The value of a node. Numbers keep their source text.
#[derive(Debug)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    Number(Cow<'a, str>),
    Text(Cow<'a, str>),
    List(Vec<SpecNode<'a>>),
    Map(Vec<(SpecKey<'a>, SpecNode<'a>)>),
}

impl Value<'_> {
    /// Returns the name of the type, for a fault. Never contains the value.
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

/// Builds the fault of an unreadable document. Only these faults prevent the walk.
pub(super) fn broken(code: crate::fault::Code, source: &str, at: At, message: impl Into<String>) -> Fault {
    let (line, column) = at.place(source);
    Fault::new(code, Kind::Invalid, "", message).at(line, column)
}

/// Counts nodes and depth while a tree is built.
#[derive(Debug, Default)]
pub(super) struct SpecBudget {
    nodes: usize,
}

impl SpecBudget {
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

/// Returns the keys that repeat an earlier key of the group.
fn doubled<'n, 'a>(entries: &'n [(SpecKey<'a>, SpecNode<'a>)]) -> impl Iterator<Item = &'n SpecKey<'a>> {
    // In a small group, a search is faster than a hash set.
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

fn has_doubled(node: &SpecNode<'_>) -> bool {
    match &node.value {
        Value::List(items) => items.iter().any(has_doubled),
        Value::Map(entries) => {
            doubled(entries).next().is_some() || entries.iter().any(|(_, value)| has_doubled(value))
        }
        _ => false,
    }
}

/// Adds a fault with the full path for each repeated key of a group.
pub(super) fn find_duplicates(source: &str, node: &SpecNode<'_>, faults: &mut Vec<Fault>) {
    // Build paths only if there is a duplicate to report.
    if has_doubled(node) {
        name_duplicates(source, node, "", faults);
    }
}

fn name_duplicates(source: &str, node: &SpecNode<'_>, path: &str, faults: &mut Vec<Fault>) {
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
                        "this field is given twice",
                    )
                    .at(line, column)
                    .because("one of the two values would be ignored silently"),
                );
            }
            for (key, value) in entries {
                name_duplicates(source, value, &below(path, &key.name), faults);
            }
        }
        _ => {}
    }
}

/// Returns the path of a field in a group.
pub(super) fn below(path: &str, name: &str) -> String {
    let name = clean(name);
    if path.is_empty() { name } else { format!("{path}.{name}") }
}

/// Returns a field name from the document in a form that is safe to show, cut to 64 characters.
pub(super) fn clean(name: &str) -> String {
    name.chars().map(plain).take(64).collect()
}
