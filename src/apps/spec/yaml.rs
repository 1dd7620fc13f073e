//! Reads YAML 1.2 into the tree: one document without anchors, aliases, tags or merge keys, so the text alone
//! defines the meaning. `granit-parser` implements the grammar; this file decides which words are numbers or
//! booleans.

use std::borrow::Cow;

use granit_parser::{Event, Parser, ScalarStyle, Span};

use super::tree::{At, SpecBudget, SpecKey, SpecNode, Value, broken, clean};
use crate::fault::Fault;
use crate::fault::catalogue as code;

struct YamlReader<'a> {
    source: &'a str,
    events: Parser<'a, granit_parser::StrInput<'a>>,
    budget: SpecBudget,
}

/// Reads a document.
pub(super) fn read(source: &str) -> Result<SpecNode<'_>, Fault> {
    let mut reader =
        YamlReader { source, events: Parser::new_from_str(source), budget: SpecBudget::default() };
    let node = loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamStart | Event::DocumentStart(..) => {}
            Event::StreamEnd => {
                return Err(reader.fault(code::SYNTAX, &span, "the document is empty"));
            }
            other => break reader.node(other, &span, 1)?,
        }
    };
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::DocumentEnd => {}
            Event::StreamEnd => return Ok(node),
            _ => return Err(reader.fault(code::YAML_FEATURE, &span, "there is a second document")),
        }
    }
}

fn at(span: &Span) -> At {
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    At { line: small(span.start.line()).max(1), column: small(span.start.col()) + 1 }
}

impl<'a> YamlReader<'a> {
    fn fault(&self, code: crate::fault::Code, span: &Span, message: impl Into<String>) -> Fault {
        broken(code, self.source, at(span), message)
    }

    /// Returns the next event, skipping comments.
    fn next(&mut self) -> Result<(Event<'a>, Span), Fault> {
        loop {
            match self.events.next() {
                None => return Ok((Event::StreamEnd, Span::default())),
                Some(Ok((Event::Comment(..), _))) => {}
                Some(Ok(pair)) => return Ok(pair),
                Some(Err(error)) => {
                    let marker = error.marker();
                    let place = At {
                        line: u32::try_from(marker.line()).unwrap_or(1).max(1),
                        column: u32::try_from(marker.col()).unwrap_or(0) + 1,
                    };
                    if matches!(error.kind(), granit_parser::ErrorKind::RecursionLimitExceeded) {
                        return Err(broken(
                            code::TOO_DEEP,
                            self.source,
                            place,
                            "the document is nested too deep",
                        ));
                    }
                    // The parser's message may quote a name from the source, so report only its kind.
                    return Err(broken(code::SYNTAX, self.source, place, "this is not valid YAML").because(
                        clean(error.kind().to_string().split(['\'', '"', '`']).next().unwrap_or("")),
                    ));
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<SpecNode<'a>, Fault> {
        let place = at(span);
        self.budget.take(depth).map_err(|why| broken(code::TOO_DEEP, self.source, place, why))?;
        let value = match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.plain(span, anchor, tag.is_some())?;
                scalar(text, style)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.plain(span, anchor, tag.is_some())?;
                self.list(depth)?
            }
            Event::MappingStart(_, anchor, tag) => {
                self.plain(span, anchor, tag.is_some())?;
                self.map(depth)?
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                return Err(self
                    .fault(code::YAML_FEATURE, span, "aliases (*name) are not available here")
                    .instead("write the value out"));
            }
            _ => return Err(self.fault(code::SYNTAX, span, "the document ends too early")),
        };
        Ok(SpecNode { at: place, value })
    }

    fn plain(&self, span: &Span, anchor: usize, tagged: bool) -> Result<(), Fault> {
        if anchor > 0 {
            return Err(self
                .fault(code::YAML_FEATURE, span, "anchors (&name) are not available here")
                .instead("write the value out"));
        }
        if tagged {
            return Err(self
                .fault(code::YAML_FEATURE, span, "tags (!name) are not available here")
                .instead("put a text into quotes instead of !!str"));
        }
        Ok(())
    }

    fn list(&mut self, depth: usize) -> Result<Value<'a>, Fault> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, span) => items.push(self.node(event, &span, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Value<'a>, Fault> {
        let mut entries = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let name = match event {
                Event::MappingEnd => break,
                Event::Scalar(text, _, anchor, tag) => {
                    self.plain(&span, anchor, tag.is_some())?;
                    if text == "<<" {
                        return Err(self
                            .fault(code::YAML_FEATURE, &span, "merge keys (<<) are not available here")
                            .instead("write the fields out"));
                    }
                    text
                }
                _ => {
                    return Err(self.fault(code::SYNTAX, &span, "the name of a field must be a plain text"));
                }
            };
            let key = SpecKey { at: at(&span), name };
            let (event, span) = self.next()?;
            entries.push((key, self.node(event, &span, depth + 1)?));
        }
        Ok(Value::Map(entries))
    }
}

/// Converts a scalar by YAML's core schema, except that only `true` and `false` are booleans. `yes`, `on` and
/// `True` remain texts, so boolean fields refuse them.
fn scalar(text: Cow<'_, str>, style: ScalarStyle) -> Value<'_> {
    if style != ScalarStyle::Plain {
        return Value::Text(text);
    }
    match &*text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        plain if is_number(plain) => Value::Number(text),
        _ => Value::Text(text),
    }
}

fn is_number(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if let Some(octal) = unsigned.strip_prefix("0o") {
        return !octal.is_empty() && octal.bytes().all(|b| b.is_ascii_digit());
    }
    if let Some(hex) = unsigned.strip_prefix("0x") {
        return !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit());
    }
    if matches!(unsigned, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent.strip_prefix(['-', '+']).unwrap_or(exponent))),
        None => (unsigned, None),
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    !(whole.is_empty() && part.is_empty())
        && digits(whole)
        && digits(part)
        && exponent.is_none_or(|exponent| !exponent.is_empty() && digits(exponent))
}
