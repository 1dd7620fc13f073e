//! Parses JSON as it streams in, strictly and within limits. No two keys of an object may be equal except for
//! case, at any depth. Values and depth are counted during the read, so an expensive text is refused early. A
//! reader of known fields keeps only those; all others are parsed just as strictly and dropped.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::manifest::ManifestError;

/// The refusal of equal keys.
pub(super) const TWICE: &str = "two keys are equal (but for upper and lower case)";

/// The remaining budget of one text, and the reason of its refusal.
pub(super) struct Meter {
    values: Cell<usize>,
    why: RefCell<Option<String>>,
}

/// The meter at a depth.
#[derive(Clone, Copy)]
pub(super) struct JsonBudget<'a> {
    meter: &'a Meter,
    depth: usize,
}

impl JsonBudget<'_> {
    /// Refuses the text with this reason.
    pub(super) fn refuse<E: Error>(self, why: &str) -> E {
        self.meter.why.replace(Some(why.to_owned()));
        E::custom(why)
    }

    fn count<E: Error>(self) -> Result<(), E> {
        match self.meter.values.get().checked_sub(1) {
            Some(left) => self.meter.values.set(left),
            None => return Err(self.refuse("it holds too many values")),
        }
        Ok(())
    }

    /// Returns the budget inside a list or an object.
    pub(super) fn within<E: Error>(self) -> Result<Self, E> {
        let depth = self.depth.checked_sub(1).ok_or_else(|| self.refuse("its values are nested too deep"))?;
        Ok(Self { depth, ..self })
    }
}

/// Reads a complete text within a number of values and a depth.
pub(super) fn read<'de, T>(
    bytes: &'de [u8],
    (values, depth): (usize, usize),
    reader: impl FnOnce(
        JsonBudget<'_>,
        &mut serde_json::Deserializer<serde_json::de::SliceRead<'de>>,
    ) -> serde_json::Result<T>,
) -> Result<T, ManifestError> {
    let meter = Meter { values: Cell::new(values), why: RefCell::default() };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let outcome = reader(JsonBudget { meter: &meter, depth }, &mut deserializer);
    let value = outcome.map_err(|_| {
        let why = meter.why.take();
        ManifestError(why.unwrap_or_else(|| "the manifest is not valid JSON".into()))
    })?;
    deserializer.end().map_err(|_| ManifestError("unexpected text after the manifest".into()))?;
    Ok(value)
}

/// The keys of one object.
pub(super) struct ObjectKeys<'a> {
    budget: JsonBudget<'a>,
    /// Keys so far; none for a map with keys that users choose.
    seen: Option<BTreeSet<String>>,
}

impl<'a> ObjectKeys<'a> {
    pub(super) fn new(budget: JsonBudget<'a>) -> Self {
        Self { budget, seen: Some(BTreeSet::new()) }
    }

    /// Keys of a map that users own: labels, annotations, environment. There, `A` and `a` are different keys
    /// for every reader.
    pub(super) fn of_people(budget: JsonBudget<'a>) -> Self {
        Self { budget, seen: None }
    }

    /// Returns the next key of an object; refuses a repeated key.
    pub(super) fn next<'de, A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<Option<String>, A::Error> {
        let Some(key) = map.next_key::<String>()? else { return Ok(None) };
        if let Some(seen) = &mut self.seen
            && !seen.insert(fold(&key))
        {
            return Err(self.budget.refuse(TWICE));
        }
        Ok(Some(key))
    }
}

/// Folds a key like case-insensitive readers: two letters outside ASCII fold into ASCII.
pub(super) fn fold(key: &str) -> String {
    let ascii = |c| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other,
    };
    key.chars().map(ascii).collect::<String>().to_lowercase()
}

/// Returns whether the value of this key is a map that users own. Readers fold the case of field names, so this
/// does too.
fn is_peoples_map(key: &str) -> bool {
    matches!(fold(key).as_str(), "annotations" | "labels" | "env")
}

/// Returns the key tracker for an object under this key.
fn keys_under<'a>(name: Option<&str>, budget: JsonBudget<'a>) -> ObjectKeys<'a> {
    if name.is_some_and(is_peoples_map) { ObjectKeys::of_people(budget) } else { ObjectKeys::new(budget) }
}

/// A value of which a text or a whole number is kept. Lists and objects are parsed strictly and dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Atom {
    /// A text.
    Text(String),
    /// A non-negative whole number.
    Number(u64),
    /// `null`.
    Null,
    /// Anything else.
    Other,
}

impl Atom {
    /// Returns the text, if it is one.
    pub(super) fn text(self) -> Option<String> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }
}

/// Reads an atom.
pub(super) struct AtomSeed<'a, 'k> {
    budget: JsonBudget<'a>,
    name: Option<&'k str>,
}

impl<'a, 'k> AtomSeed<'a, 'k> {
    /// An atom in a list.
    pub(super) fn new(budget: JsonBudget<'a>) -> Self {
        Self { budget, name: None }
    }

    /// An atom under a key.
    pub(super) fn under(name: &'k str, budget: JsonBudget<'a>) -> Self {
        Self { budget, name: Some(name) }
    }
}

impl<'de> DeserializeSeed<'de> for AtomSeed<'_, '_> {
    type Value = Atom;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Atom, D::Error> {
        self.budget.count()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AtomSeed<'_, '_> {
    type Value = Atom;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<Atom, E> {
        Ok(Atom::Other)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Atom, E> {
        Ok(Atom::Other)
    }
    fn visit_u64<E>(self, number: u64) -> Result<Atom, E> {
        Ok(Atom::Number(number))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Atom, E> {
        Ok(Atom::Other)
    }
    fn visit_str<E>(self, text: &str) -> Result<Atom, E> {
        Ok(Atom::Text(text.to_owned()))
    }
    fn visit_unit<E>(self) -> Result<Atom, E> {
        Ok(Atom::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Atom, A::Error> {
        let inner = self.budget.within()?;
        while list.next_element_seed(AtomSeed::new(inner))?.is_some() {}
        Ok(Atom::Other)
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Atom, A::Error> {
        let inner = self.budget.within()?;
        let mut keys = keys_under(self.name, inner);
        while let Some(key) = keys.next(&mut map)? {
            map.next_value_seed(AtomSeed::under(&key, inner))?;
        }
        Ok(Atom::Other)
    }
}

/// Maximum number of values, and depth, of a config.
const CONFIG: (usize, usize) = (10_000, 64);

/// Parses a complete text into a value.
pub(super) fn strict(bytes: &[u8]) -> Result<Value, ManifestError> {
    read(bytes, CONFIG, |budget, deserializer| Whole(budget, None).deserialize(deserializer))
}

struct Whole<'a, 'k>(JsonBudget<'a>, Option<&'k str>);

impl<'de> DeserializeSeed<'de> for Whole<'_, '_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.count()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Whole<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inner = self.0.within()?;
        let mut list = Vec::new();
        while let Some(item) = seq.next_element_seed(Whole(inner, None))? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let inner = self.0.within()?;
        let (mut map, mut keys) = (serde_json::Map::new(), keys_under(self.1, inner));
        while let Some(key) = keys.next(&mut access)? {
            let value = access.next_value_seed(Whole(inner, Some(&key)))?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_depth_are_bounded_while_they_are_read() {
        let many = format!("[{}[]]", "[],".repeat(1_300_000));
        assert_eq!(strict(many.as_bytes()).unwrap_err().0, "it holds too many values");
        let listed = |count: usize| format!("{{\"env\":[{}\"\"]}}", "\"\",".repeat(count));
        assert!(strict(listed(9_000).as_bytes()).is_ok());
        assert!(strict(listed(10_000).as_bytes()).is_err());
        let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
        assert_eq!(strict(deep.as_bytes()).unwrap_err().0, "its values are nested too deep");
        assert_eq!(strict("{\"labels\":1,\"label\u{17f}\":2}".as_bytes()).unwrap_err().0, TWICE);
        assert!(strict(br#"{"a":[{"b":1,"B":2}]}"#).unwrap_err().0 == TWICE);
        let people = br#"{"config":{"Labels":{"a":"1","A":"2"}},"env":{"x":1,"x":2}}"#;
        assert_eq!(strict(people).unwrap()["config"]["Labels"]["A"], "2");
        assert!(strict(br#"{"config":{"Labels":{"a":{"b":1,"B":2}}}}"#).unwrap_err().0 == TWICE);
        assert!(
            strict(br#"{"Labels":{},"labels":{}}"#).unwrap_err().0 == TWICE,
            "the map itself stands once"
        );
        assert_eq!(strict(br#"{"a":[1,-1,1.5,null,true,"x"]}"#).unwrap()["a"][5], "x");
    }
}
