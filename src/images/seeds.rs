//! The fields that are kept of a manifest while it streams in. All others are parsed just as strictly and
//! dropped.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::manifest::PARTS;
use super::strict::{Atom, AtomSeed, JsonBudget, ObjectKeys, fold};

/// The fields of a manifest.
#[derive(Default)]
pub(super) struct RawManifest {
    pub(super) schema_version: Option<Atom>,
    pub(super) media_type: Option<Atom>,
    pub(super) config: Option<Option<RawDescriptor>>,
    pub(super) layers: Option<DescriptorList>,
    pub(super) manifests: Option<DescriptorList>,
    pub(super) artifact_type: Option<Atom>,
    pub(super) subject: Option<Option<RawDescriptor>>,
    pub(super) annotations: Option<Option<Annotations>>,
}

/// The fields of a descriptor.
#[derive(Default)]
pub(super) struct RawDescriptor {
    pub(super) media_type: Option<Atom>,
    pub(super) digest: Option<Atom>,
    pub(super) size: Option<Atom>,
    pub(super) urls: bool,
    pub(super) data: Option<Atom>,
    pub(super) platform: Option<RawPlatform>,
}

#[derive(Default)]
pub(super) struct RawPlatform {
    pub(super) os: Option<String>,
    pub(super) architecture: Option<String>,
}

/// Texts that users attach to a manifest.
#[derive(Default)]
pub(super) struct Annotations(pub(super) BTreeMap<String, Option<String>>);

/// A list of descriptors. An entry that is not an object, or a value that is not a list, is none.
pub(super) type DescriptorList = Option<Vec<Option<RawDescriptor>>>;

/// An object whose known fields are kept.
pub(super) trait Fields: Default {
    /// Names of its fields. A key that differs from one only by case is refused: other readers take it for the
    /// field.
    const NAMES: &'static [&'static str];

    /// Returns the tracker of the object's keys.
    fn keys(budget: JsonBudget<'_>) -> ObjectKeys<'_> {
        ObjectKeys::new(budget)
    }

    /// Reads the value of one key.
    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: JsonBudget<'_>,
    ) -> Result<(), A::Error>;
}

impl Fields for RawManifest {
    const NAMES: &'static [&'static str] = &[
        "schemaVersion",
        "mediaType",
        "config",
        "layers",
        "manifests",
        "artifactType",
        "subject",
        "annotations",
    ];

    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: JsonBudget<'_>,
    ) -> Result<(), A::Error> {
        let atom = AtomSeed::under(key, budget);
        match key {
            "schemaVersion" => self.schema_version = Some(map.next_value_seed(atom)?),
            "mediaType" => self.media_type = Some(map.next_value_seed(atom)?),
            "config" => self.config = Some(map.next_value_seed(ObjectSeed::new(budget))?),
            "layers" => {
                self.layers =
                    Some(map.next_value_seed(ListSeed(budget, PARTS, "it has more than 256 layers"))?);
            }
            "manifests" => {
                let list = ListSeed(budget, PARTS, "it has more than 256 manifests");
                self.manifests = Some(map.next_value_seed(list)?);
            }
            "artifactType" => self.artifact_type = Some(map.next_value_seed(atom)?),
            "subject" => self.subject = Some(map.next_value_seed(ObjectSeed::new(budget))?),
            "annotations" => self.annotations = Some(map.next_value_seed(ObjectSeed::or_null(budget))?),
            _ => drop(map.next_value_seed(atom)?),
        }
        Ok(())
    }
}

impl Fields for Annotations {
    const NAMES: &'static [&'static str] = &[];

    fn keys(budget: JsonBudget<'_>) -> ObjectKeys<'_> {
        ObjectKeys::of_people(budget)
    }

    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: JsonBudget<'_>,
    ) -> Result<(), A::Error> {
        let value = map.next_value_seed(AtomSeed::under(key, budget))?.text();
        self.0.insert(key.to_owned(), value);
        Ok(())
    }
}

impl Fields for RawDescriptor {
    const NAMES: &'static [&'static str] =
        &["mediaType", "digest", "size", "urls", "data", "platform", "annotations", "artifactType"];

    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: JsonBudget<'_>,
    ) -> Result<(), A::Error> {
        let atom = AtomSeed::under(key, budget);
        match key {
            "mediaType" => self.media_type = Some(map.next_value_seed(atom)?),
            "digest" => self.digest = Some(map.next_value_seed(atom)?),
            "size" => self.size = Some(map.next_value_seed(atom)?),
            "data" => self.data = Some(map.next_value_seed(atom)?),
            "platform" => self.platform = map.next_value_seed(ObjectSeed::new(budget))?,
            other => {
                self.urls |= other == "urls";
                map.next_value_seed(atom)?;
            }
        }
        Ok(())
    }
}

impl Fields for RawPlatform {
    const NAMES: &'static [&'static str] = &["os", "architecture", "variant"];

    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: JsonBudget<'_>,
    ) -> Result<(), A::Error> {
        let value = map.next_value_seed(AtomSeed::under(key, budget))?;
        match key {
            "os" => self.os = value.text(),
            "architecture" => self.architecture = value.text(),
            _ => {}
        }
        Ok(())
    }
}

/// Reads an object; none for any other value.
pub(super) struct ObjectSeed<'a, T> {
    budget: JsonBudget<'a>,
    null: bool,
    kind: PhantomData<T>,
}

impl<'a, T> ObjectSeed<'a, T> {
    pub(super) fn new(budget: JsonBudget<'a>) -> Self {
        Self { budget, null: false, kind: PhantomData }
    }
    /// `null` reads as an empty object.
    fn or_null(budget: JsonBudget<'a>) -> Self {
        Self { budget, null: true, kind: PhantomData }
    }
}

impl<'de, T: Fields> DeserializeSeed<'de> for ObjectSeed<'_, T> {
    type Value = Option<T>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Fields> Visitor<'de> for ObjectSeed<'_, T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<Option<T>, E> {
        Ok(None)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Option<T>, E> {
        Ok(None)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Option<T>, E> {
        Ok(None)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Option<T>, E> {
        Ok(None)
    }
    fn visit_str<E>(self, _: &str) -> Result<Option<T>, E> {
        Ok(None)
    }
    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(self.null.then(T::default))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Option<T>, A::Error> {
        AtomSeed::new(self.budget).visit_seq(list).map(|_| None)
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<T>, A::Error> {
        let inner = self.budget.within()?;
        let (mut read, mut keys) = (T::default(), T::keys(inner));
        while let Some(key) = keys.next(&mut map)? {
            if let Some(name) = T::NAMES.iter().find(|name| **name != key && fold(name) == fold(&key)) {
                return Err(
                    inner.refuse(&format!("a key differs from the field {name} in upper and lower case"))
                );
            }
            read.field(&key, &mut map, inner)?;
        }
        Ok(Some(read))
    }
}

/// Reads a list of descriptors up to a maximum length; none for any other value.
struct ListSeed<'a>(JsonBudget<'a>, usize, &'static str);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = DescriptorList;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<DescriptorList, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = DescriptorList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<DescriptorList, E> {
        Ok(None)
    }
    fn visit_i64<E>(self, _: i64) -> Result<DescriptorList, E> {
        Ok(None)
    }
    fn visit_u64<E>(self, _: u64) -> Result<DescriptorList, E> {
        Ok(None)
    }
    fn visit_f64<E>(self, _: f64) -> Result<DescriptorList, E> {
        Ok(None)
    }
    fn visit_str<E>(self, _: &str) -> Result<DescriptorList, E> {
        Ok(None)
    }
    fn visit_unit<E>(self) -> Result<DescriptorList, E> {
        Ok(None)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<DescriptorList, A::Error> {
        let inner = self.0.within()?;
        let mut read = Vec::new();
        while let Some(item) = list.next_element_seed(ObjectSeed::new(inner))? {
            if read.len() == self.1 {
                return Err(inner.refuse(self.2));
            }
            read.push(item);
        }
        Ok(Some(read))
    }
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DescriptorList, A::Error> {
        AtomSeed::new(self.0).visit_map(map).map(|_| None)
    }
}
