//! Reads JSON (RFC 8259) into the tree: strict, with positions, bounded in depth and number of values. Strings
//! without escapes borrow from the source.

use std::borrow::Cow;

use super::tree::{At, SpecBudget, SpecKey, SpecNode, Value, broken};
use crate::fault::Fault;
use crate::fault::catalogue as code;

struct JsonReader<'a> {
    source: &'a str,
    bytes: &'a [u8],
    at: usize,
    budget: SpecBudget,
}

/// Reads a document.
pub(super) fn read(source: &str) -> Result<SpecNode<'_>, Fault> {
    let mut reader = JsonReader { source, bytes: source.as_bytes(), at: 0, budget: SpecBudget::default() };
    let node = reader.value(1)?;
    reader.space();
    if reader.at < reader.bytes.len() {
        return Err(reader.fault("unexpected text after the end of the document"));
    }
    Ok(node)
}

impl<'a> JsonReader<'a> {
    fn fault(&self, message: &str) -> Fault {
        broken(code::SYNTAX, self.source, At::offset(self.at), message)
    }

    fn space(&mut self) {
        while matches!(self.bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Result<SpecNode<'a>, Fault> {
        self.space();
        let at = At::offset(self.at);
        self.budget.take(depth).map_err(|why| broken(code::TOO_DEEP, self.source, at, why))?;
        let value = match self.bytes.get(self.at) {
            Some(b'{') => self.map(depth)?,
            Some(b'[') => self.list(depth)?,
            Some(b'"') => Value::Text(self.text()?),
            Some(b'-' | b'0'..=b'9') => Value::Number(Cow::Borrowed(self.number()?)),
            Some(b't') => self.word("true", Value::Bool(true))?,
            Some(b'f') => self.word("false", Value::Bool(false))?,
            Some(b'n') => self.word("null", Value::Null)?,
            Some(_) => return Err(self.fault("expected a value")),
            None => return Err(self.fault("the document ends too early")),
        };
        Ok(SpecNode { at, value })
    }

    fn word(&mut self, word: &str, value: Value<'a>) -> Result<Value<'a>, Fault> {
        if self.bytes[self.at..].starts_with(word.as_bytes()) {
            self.at += word.len();
            Ok(value)
        } else {
            Err(self.fault("expected a value"))
        }
    }

    fn number(&mut self) -> Result<&'a str, Fault> {
        let start = self.at;
        let digits = |reader: &mut Self| {
            let from = reader.at;
            while reader.bytes.get(reader.at).is_some_and(u8::is_ascii_digit) {
                reader.at += 1;
            }
            reader.at - from
        };
        if self.bytes[self.at] == b'-' {
            self.at += 1;
        }
        let zero = self.bytes.get(self.at) == Some(&b'0');
        let whole = digits(self);
        let mut good = whole > 0 && !(zero && whole > 1);
        if self.bytes.get(self.at) == Some(&b'.') {
            self.at += 1;
            good &= digits(self) > 0;
        }
        if matches!(self.bytes.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.bytes.get(self.at), Some(b'+' | b'-')) {
                self.at += 1;
            }
            good &= digits(self) > 0;
        }
        if good { Ok(&self.source[start..self.at]) } else { Err(self.fault("this is not a JSON number")) }
    }

    fn text(&mut self) -> Result<Cow<'a, str>, Fault> {
        self.at += 1;
        let start = self.at;
        loop {
            match self.bytes.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Borrowed(&self.source[start..self.at - 1]));
                }
                Some(b'\\') => return self.escaped(start),
                Some(0..=0x1f) => {
                    return Err(self.fault("a control character in a string must be escaped"));
                }
                Some(_) => self.at += 1,
                None => return Err(self.fault("the string has no closing quote")),
            }
        }
    }

    fn escaped(&mut self, start: usize) -> Result<Cow<'a, str>, Fault> {
        let mut out = self.source[start..self.at].to_owned();
        loop {
            match self.bytes.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(out));
                }
                Some(b'\\') => {
                    self.at += 1;
                    out.push(self.escape()?);
                }
                Some(0..=0x1f) => {
                    return Err(self.fault("a control character in a string must be escaped"));
                }
                Some(_) => {
                    let from = self.at;
                    while !matches!(self.bytes.get(self.at), None | Some(b'"' | b'\\' | 0..=0x1f)) {
                        self.at += 1;
                    }
                    out.push_str(&self.source[from..self.at]);
                }
                None => return Err(self.fault("the string has no closing quote")),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Fault> {
        let c = match self.bytes.get(self.at) {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.unicode(),
            _ => return Err(self.fault("unknown escape")),
        };
        self.at += 1;
        Ok(c)
    }

    fn unicode(&mut self) -> Result<char, Fault> {
        let high = self.hex()?;
        let code = if (0xd800..0xdc00).contains(&high) {
            if !self.bytes[self.at..].starts_with(b"\\u") {
                return Err(self.fault("incomplete surrogate pair"));
            }
            self.at += 1;
            let low = self.hex()?;
            if !(0xdc00..0xe000).contains(&low) {
                return Err(self.fault("incomplete surrogate pair"));
            }
            0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00)
        } else {
            high
        };
        char::from_u32(code).ok_or_else(|| self.fault("incomplete surrogate pair"))
    }

    fn hex(&mut self) -> Result<u32, Fault> {
        let digits =
            self.source.get(self.at + 1..self.at + 5).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        let code = code.ok_or_else(|| self.fault("\\u must be followed by four hexadecimal digits"))?;
        self.at += 5;
        Ok(code)
    }

    fn list(&mut self, depth: usize) -> Result<Value<'a>, Fault> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.bytes.get(self.at) == Some(&b']') {
            self.at += 1;
            return Ok(Value::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            match self.bytes.get(self.at) {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(Value::List(items));
                }
                _ => return Err(self.fault("expected , or ]")),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Value<'a>, Fault> {
        self.at += 1;
        // A typical document has about this many fields, so the list never reallocates.
        let mut entries = Vec::with_capacity(if depth == 1 { 16 } else { 2 });
        self.space();
        if self.bytes.get(self.at) == Some(&b'}') {
            self.at += 1;
            return Ok(Value::Map(entries));
        }
        loop {
            self.space();
            let at = At::offset(self.at);
            if self.bytes.get(self.at) != Some(&b'"') {
                return Err(self.fault("expected the name of a field in quotes"));
            }
            let name = self.text()?;
            self.space();
            if self.bytes.get(self.at) != Some(&b':') {
                return Err(self.fault("expected :"));
            }
            self.at += 1;
            entries.push((SpecKey { at, name }, self.value(depth + 1)?));
            self.space();
            match self.bytes.get(self.at) {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    break;
                }
                _ => return Err(self.fault("expected , or }")),
            }
        }
        Ok(Value::Map(entries))
    }
}
