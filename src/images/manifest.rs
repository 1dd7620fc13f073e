//! Manifests, read strictly (OCI image specification 1.1 and Docker's schema 2). The registry's own
//! parser takes the last of two equal keys and folds case; ours refuses both, so that what was
//! checked is what every other reader sees.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::strict::{Atom, AtomSeed, Budget, Keys, read};
use crate::driver::podman::render::is_harmless_annotation;
use crate::ids::Digest;

/// Largest manifest, in bytes.
pub const LIMIT: usize = 1 << 20;
/// Most layers of an image and most images of an index.
const LAYERS: usize = 127;
const CHILDREN: usize = 64;
/// Largest layer, in bytes.
const LAYER: u64 = 10 << 30;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// What may be asked for when a manifest is fetched.
pub const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

const CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const LAYER_TYPES: [&str; 5] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
];

/// A reference to a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Type.
    pub media_type: String,
    /// Digest.
    pub digest: Digest,
    /// Bytes, as declared.
    pub size: u64,
}

/// An image of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// Its manifest.
    pub descriptor: Descriptor,
    /// Operating system.
    pub os: String,
    /// Architecture.
    pub architecture: String,
}

/// A manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// One image.
    Image {
        /// Its config.
        config: Descriptor,
        /// Its layers, from the bottom.
        layers: Vec<Descriptor>,
    },
    /// Images for several platforms.
    Index {
        /// The images.
        children: Vec<Child>,
    },
}

/// Why a manifest is refused. The text never holds anything of the manifest but names of fields.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ManifestError(pub String);

fn no<T>(why: impl Into<String>) -> Result<T, ManifestError> {
    Err(ManifestError(why.into()))
}

/// Most values of a manifest, and how deep they lie at most.
const BOUNDS: (usize, usize) = (20_000, 16);

impl Manifest {
    /// Reads a manifest that was sent as `content_type`.
    pub fn parse(bytes: &[u8], content_type: &str) -> Result<Self, ManifestError> {
        if bytes.len() > LIMIT {
            return no("the manifest is larger than 1 MiB");
        }
        if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
            return no("the manifest is not JSON of an object");
        }
        let raw = read(bytes, BOUNDS, |budget, deserializer| {
            ObjectSeed::<Raw>::new(budget).deserialize(deserializer)
        })?;
        let Some(raw) = raw else { return no("the manifest is not JSON of an object") };
        if raw.schema_version != Some(Atom::Number(2)) {
            return no("schemaVersion is not 2");
        }
        // OCI lets a manifest leave its own type out, and clients do; Docker's never do.
        match &raw.media_type {
            Some(Atom::Text(own)) if own == content_type => {}
            None if content_type.starts_with("application/vnd.oci.") => {}
            _ => return no("mediaType in the manifest is not its Content-Type"),
        }
        match content_type {
            OCI_MANIFEST | DOCKER_MANIFEST => image(raw),
            OCI_INDEX | DOCKER_INDEX => index(raw),
            _ => no("this type of manifest is not taken; an OCI or Docker (schema 2) image or index is"),
        }
    }
}

/// What is kept of a manifest.
#[derive(Default)]
struct Raw {
    schema_version: Option<Atom>,
    media_type: Option<Atom>,
    config: Option<Option<RawDescriptor>>,
    layers: Option<Listed>,
    manifests: Option<Listed>,
}

/// What is kept of a descriptor.
#[derive(Default)]
struct RawDescriptor {
    media_type: Option<Atom>,
    digest: Option<Atom>,
    size: Option<Atom>,
    urls: bool,
    data: Option<Atom>,
    platform: Option<Platform>,
}

#[derive(Default)]
struct Platform {
    os: Option<String>,
    architecture: Option<String>,
}

/// Annotations are texts for people; others reach the container runtime, where they are orders.
#[derive(Default)]
struct Annotations;

/// A list of descriptors; an entry that is no object, or no list at all, is none.
type Listed = Option<Vec<Option<RawDescriptor>>>;

/// An object of which known fields are kept.
trait Fields: Default {
    /// Reads the value of one key.
    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: Budget<'_>,
    ) -> Result<(), A::Error>;
}

impl Fields for Raw {
    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: Budget<'_>,
    ) -> Result<(), A::Error> {
        match key {
            "schemaVersion" => self.schema_version = Some(map.next_value_seed(AtomSeed(budget))?),
            "mediaType" => self.media_type = Some(map.next_value_seed(AtomSeed(budget))?),
            "config" => self.config = Some(map.next_value_seed(ObjectSeed::new(budget))?),
            "layers" => {
                self.layers =
                    Some(map.next_value_seed(ListSeed(budget, LAYERS, "an image has 1 to 127 layers"))?);
            }
            "manifests" => {
                let list = ListSeed(budget, CHILDREN, "an index has 1 to 64 manifests");
                self.manifests = Some(map.next_value_seed(list)?);
            }
            "annotations" => match map.next_value_seed(ObjectSeed::<Annotations>::or_null(budget))? {
                Some(Annotations) => {}
                None => return Err(budget.refuse(ANNOTATION)),
            },
            _ => drop(map.next_value_seed(AtomSeed(budget))?),
        }
        Ok(())
    }
}

const ANNOTATION: &str =
    "an annotation is not one of org.opencontainers.image.*, com.docker.* or vnd.docker.*";

impl Fields for Annotations {
    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: Budget<'_>,
    ) -> Result<(), A::Error> {
        if !is_harmless_annotation(key) {
            return Err(budget.refuse(ANNOTATION));
        }
        map.next_value_seed(AtomSeed(budget)).map(drop)
    }
}

impl Fields for RawDescriptor {
    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: Budget<'_>,
    ) -> Result<(), A::Error> {
        match key {
            "mediaType" => self.media_type = Some(map.next_value_seed(AtomSeed(budget))?),
            "digest" => self.digest = Some(map.next_value_seed(AtomSeed(budget))?),
            "size" => self.size = Some(map.next_value_seed(AtomSeed(budget))?),
            "data" => self.data = Some(map.next_value_seed(AtomSeed(budget))?),
            "platform" => self.platform = map.next_value_seed(ObjectSeed::new(budget))?,
            other => {
                self.urls |= other == "urls";
                map.next_value_seed(AtomSeed(budget))?;
            }
        }
        Ok(())
    }
}

impl Fields for Platform {
    fn field<'de, A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        budget: Budget<'_>,
    ) -> Result<(), A::Error> {
        let value = map.next_value_seed(AtomSeed(budget))?;
        match key {
            "os" => self.os = value.text(),
            "architecture" => self.architecture = value.text(),
            _ => {}
        }
        Ok(())
    }
}

/// Reads an object; none for any other value.
struct ObjectSeed<'a, T> {
    budget: Budget<'a>,
    null: bool,
    kind: PhantomData<T>,
}

impl<'a, T> ObjectSeed<'a, T> {
    fn new(budget: Budget<'a>) -> Self {
        Self { budget, null: false, kind: PhantomData }
    }
    /// `null` reads as an empty object.
    fn or_null(budget: Budget<'a>) -> Self {
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
        AtomSeed(self.budget).visit_seq(list).map(|_| None)
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<T>, A::Error> {
        let inner = self.budget.within()?;
        let (mut read, mut keys) = (T::default(), Keys::new(inner));
        while let Some(key) = keys.next(&mut map)? {
            read.field(&key, &mut map, inner)?;
        }
        Ok(Some(read))
    }
}

/// Reads a list of at most so many descriptors; none for any other value.
struct ListSeed<'a>(Budget<'a>, usize, &'static str);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = Listed;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Listed, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = Listed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<Listed, E> {
        Ok(None)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Listed, E> {
        Ok(None)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Listed, E> {
        Ok(None)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Listed, E> {
        Ok(None)
    }
    fn visit_str<E>(self, _: &str) -> Result<Listed, E> {
        Ok(None)
    }
    fn visit_unit<E>(self) -> Result<Listed, E> {
        Ok(None)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Listed, A::Error> {
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
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Listed, A::Error> {
        AtomSeed(self.0).visit_map(map).map(|_| None)
    }
}

fn image(raw: Raw) -> Result<Manifest, ManifestError> {
    if raw.manifests.is_some() {
        return no("a manifest of an image has no manifests");
    }
    let config = descriptor(raw.config.flatten(), "config", &CONFIG_TYPES)?;
    if config.size > super::config::LIMIT as u64 {
        return no("the config is larger than 4 MiB");
    }
    let Some(Some(list)) = raw.layers else { return no("layers is missing") };
    if list.is_empty() {
        return no("an image has 1 to 127 layers");
    }
    let layers = list
        .into_iter()
        .map(|layer| descriptor(layer, "layers", &LAYER_TYPES))
        .collect::<Result<Vec<_>, _>>()?;
    // Builders repeat the empty layer; more than that is made to be read again and again.
    let different: std::collections::HashSet<&Digest> = layers.iter().map(|layer| &layer.digest).collect();
    if layers.len() - different.len() > 32 {
        return no("the same layer stands there too often");
    }
    Ok(Manifest::Image { config, layers })
}

fn index(raw: Raw) -> Result<Manifest, ManifestError> {
    if raw.config.is_some() || raw.layers.is_some() {
        return no("an index has no config and no layers");
    }
    let Some(Some(list)) = raw.manifests else { return no("manifests is missing") };
    if list.is_empty() {
        return no("an index has 1 to 64 manifests");
    }
    let mut children = Vec::with_capacity(list.len());
    for mut child in list {
        let platform = child.as_mut().and_then(|child| child.platform.take()).unwrap_or_default();
        let descriptor = descriptor(child, "manifests", &[OCI_MANIFEST, DOCKER_MANIFEST])?;
        let known = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
        let (os, architecture) = (known(platform.os), known(platform.architecture));
        children.push(Child { descriptor, os, architecture });
    }
    Ok(Manifest::Index { children })
}

fn descriptor(raw: Option<RawDescriptor>, place: &str, types: &[&str]) -> Result<Descriptor, ManifestError> {
    let Some(raw) = raw else { return no(format!("{place} is not a descriptor")) };
    if raw.urls {
        return no(format!("{place} has urls: content from elsewhere is not taken"));
    }
    let media_type = raw.media_type.and_then(Atom::text).unwrap_or_default();
    if !types.contains(&media_type.as_str()) {
        return no(format!("a mediaType in {place} is not taken"));
    }
    let Some(digest) = raw.digest.and_then(Atom::text).and_then(|text| text.parse::<Digest>().ok()) else {
        return no(format!("a digest in {place} is not sha256"));
    };
    let size = match raw.size {
        Some(Atom::Number(size)) if size <= LAYER => size,
        _ => return no(format!("a size in {place} is not a number of bytes up to 10 GiB")),
    };
    if let Some(data) = raw.data {
        let bytes = data.text().and_then(|text| data_encoding::BASE64.decode(text.as_bytes()).ok());
        if bytes.is_none_or(|bytes| Digest::of(&bytes) != digest || bytes.len() as u64 != size) {
            return no(format!("data in {place} is not what its digest says"));
        }
    }
    Ok(Descriptor { media_type, digest, size })
}

#[cfg(test)]
mod tests {
    use super::super::strict::TWICE;
    use super::*;
    use serde_json::Value;

    fn image_json(edit: impl Fn(&mut Value)) -> String {
        let digest = Digest::of(b"x");
        let mut value = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": CONFIG_TYPES[0], "digest": digest, "size": 1},
            "layers": [{"mediaType": LAYER_TYPES[1], "digest": digest, "size": 1}],
        });
        edit(&mut value);
        value.to_string()
    }

    fn refused(text: &str) -> String {
        Manifest::parse(text.as_bytes(), OCI_MANIFEST).unwrap_err().0
    }

    #[test]
    fn a_good_manifest_is_read() {
        assert!(matches!(
            Manifest::parse(image_json(|_| ()).as_bytes(), OCI_MANIFEST),
            Ok(Manifest::Image { layers, .. }) if layers.len() == 1
        ));
        let bare = image_json(|v| {
            v.as_object_mut().unwrap().remove("mediaType");
        });
        assert!(Manifest::parse(bare.as_bytes(), OCI_MANIFEST).is_ok());
        assert!(Manifest::parse(bare.as_bytes(), DOCKER_MANIFEST).is_err());
    }

    #[test]
    fn lies_are_refused() {
        let good = image_json(|_| ());
        assert_eq!(refused(&good.replacen('{', "{\"Layers\":[],", 1)), TWICE);
        assert_eq!(refused(&good.replacen('{', "{\"layers\":[],", 1)), TWICE);
        assert!(refused(&format!("{good} x")).contains("after the manifest"));
        assert!(refused(&format!("\u{feff}{good}")).contains("not JSON"));
        assert!(refused(&good.replace(OCI_MANIFEST, OCI_INDEX)).contains("Content-Type"));
        assert!(
            refused(&image_json(|v| v["layers"][0]["urls"] = serde_json::json!(["http://x"])))
                .contains("urls")
        );
        assert!(
            refused(&image_json(|v| v["layers"][0]["mediaType"] = "application/x".into()))
                .contains("mediaType")
        );
        assert!(refused(&image_json(|v| v["layers"][0]["size"] = (-1).into())).contains("size"));
        assert!(refused(&image_json(|v| v["layers"][0]["size"] = 1.5.into())).contains("size"));
        assert!(refused(&image_json(|v| v["layers"][0]["digest"] = "sha512:x".into())).contains("digest"));
        assert!(refused(&image_json(|v| v["config"]["data"] = "AAAA".into())).contains("data"));
        assert!(refused(&image_json(|v| v["manifests"] = serde_json::json!([]))).contains("manifests"));
        assert!(refused(&image_json(|v| v["layers"] = serde_json::json!([]))).contains("1 to 127"));
        assert!(refused(&"[".repeat(100_000)).contains("not JSON"));
        for key in
            ["run.oci.hooks.stdout", "run.oci.seccomp_bpf_data", "io.podman.annotations.privileged", ""]
        {
            assert!(
                refused(&image_json(|v| v["annotations"] = serde_json::json!({key: "x"})))
                    .contains("annotation")
            );
        }
        let fine =
            image_json(|v| v["annotations"] = serde_json::json!({"org.opencontainers.image.created": "x"}));
        assert!(Manifest::parse(fine.as_bytes(), OCI_MANIFEST).is_ok());
        for value in ["[[],[[]],{\"A\":[{\"b\":1,\"B\":2}]}]", "{\"x\":{\"y\":1,\"Y\":2}}"] {
            assert_eq!(refused(&good.replacen('{', &format!("{{\"unknown\":{value},"), 1)), TWICE);
        }
        let twice = image_json(|v| {
            let layer = v["layers"][0].clone();
            v["layers"].as_array_mut().unwrap().extend((0..40).map(|_| layer.clone()));
        });
        assert!(refused(&twice).contains("the same layer"));
    }

    #[test]
    fn what_is_made_to_be_expensive_ends_early() {
        let good = image_json(|_| ());
        let lists = "[],".repeat(300_000);
        assert_eq!(
            refused(&good.replacen('{', &format!("{{\"x\":[{lists}[]],"), 1)),
            "it holds too many values"
        );
        let deep = format!("{}{}", "[".repeat(60), "]".repeat(60));
        assert_eq!(refused(&good.replacen('{', &format!("{{\"x\":{deep},"), 1)), "its values lie too deep");
        let keys: String = (0..30_000).map(|n| format!("\"k{n}\":0,")).collect();
        assert_eq!(refused(&good.replacen('{', &format!("{{{keys}"), 1)), "it holds too many values");
        assert!(refused(&format!("[{lists}[]]")).contains("not JSON"));
        assert!(
            refused(&image_json(|v| {
                let layer = v["layers"][0].clone();
                v["layers"] = (0..1_000).map(|_| layer.clone()).collect();
            }))
            .contains("1 to 127")
        );
        assert!(refused(&" ".repeat(LIMIT + 1)).contains("1 MiB"));
    }

    #[test]
    fn values_of_another_form_are_none() {
        for form in
            [serde_json::json!([]), serde_json::json!("x"), serde_json::json!(null), serde_json::json!(7)]
        {
            assert!(
                refused(&image_json(|v| v["config"] = form.clone())).contains("not a descriptor"),
                "{form}"
            );
        }
        assert!(refused(&image_json(|v| v["layers"] = serde_json::json!({"a": 1}))).contains("missing"));
        assert!(refused(&image_json(|v| v["layers"] = serde_json::json!([[]]))).contains("not a descriptor"));
        assert!(refused(&image_json(|v| v["annotations"] = serde_json::json!([]))).contains("annotation"));
        let null = image_json(|v| v["annotations"] = Value::Null);
        assert!(Manifest::parse(null.as_bytes(), OCI_MANIFEST).is_ok());
    }

    #[test]
    fn an_index_says_for_which_platform_each_image_is() {
        let digest = Digest::of(b"x");
        let child = |platform: Value| serde_json::json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": 1, "platform": platform});
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            child(serde_json::json!({"os": "linux", "architecture": "amd64", "variant": "v2"})), child(Value::Null)]});
        let Ok(Manifest::Index { children }) = Manifest::parse(index.to_string().as_bytes(), OCI_INDEX)
        else {
            panic!("an index is read");
        };
        assert_eq!((children[0].os.as_str(), children[0].architecture.as_str()), ("linux", "amd64"));
        assert_eq!(children[1].os, "unknown");
    }
}
