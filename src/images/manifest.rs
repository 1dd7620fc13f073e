//! Manifests, read strictly (OCI image specification 1.1 and Docker's schema 2). The registry's own
//! parser takes the last of two equal keys and folds case; ours refuses both, so that what was
//! checked is what every other reader sees.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::driver::podman::render::is_harmless_annotation;
use crate::ids::Digest;

/// Largest manifest and largest config, in bytes.
pub const LIMIT: usize = 4 << 20;
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

impl Manifest {
    /// Reads a manifest that was sent as `content_type`.
    pub fn parse(bytes: &[u8], content_type: &str) -> Result<Self, ManifestError> {
        if bytes.len() > LIMIT {
            return no("the manifest is larger than 4 MiB");
        }
        let value = strict(bytes)?;
        let Value::Object(map) = &value else { return no("the manifest is not an object") };
        if map.get("schemaVersion").and_then(Value::as_u64) != Some(2) {
            return no("schemaVersion is not 2");
        }
        // OCI lets a manifest leave its own type out, and clients do; Docker's never do.
        match map.get("mediaType") {
            Some(Value::String(own)) if own == content_type => {}
            None if content_type.starts_with("application/vnd.oci.") => {}
            _ => return no("mediaType in the manifest is not its Content-Type"),
        }
        annotations(map)?;
        match content_type {
            OCI_MANIFEST | DOCKER_MANIFEST => image(map),
            OCI_INDEX | DOCKER_INDEX => index(map),
            _ => no("this type of manifest is not taken; an OCI or Docker (schema 2) image or index is"),
        }
    }
}

type Map = serde_json::Map<String, Value>;

/// Annotations are texts for people; others reach the container runtime, where they are orders.
fn annotations(map: &Map) -> Result<(), ManifestError> {
    match map.get("annotations") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(list)) if list.keys().all(|key| is_harmless_annotation(key)) => Ok(()),
        Some(_) => no("an annotation is not one of org.opencontainers.image.*, com.docker.* or vnd.docker.*"),
    }
}

fn image(map: &Map) -> Result<Manifest, ManifestError> {
    if map.contains_key("manifests") {
        return no("a manifest of an image has no manifests");
    }
    let config = descriptor(map.get("config"), "config", &CONFIG_TYPES)?;
    if config.size > LIMIT as u64 {
        return no("the config is larger than 4 MiB");
    }
    let Some(Value::Array(list)) = map.get("layers") else { return no("layers is missing") };
    if list.is_empty() || list.len() > LAYERS {
        return no("an image has 1 to 127 layers");
    }
    let layers = list
        .iter()
        .map(|layer| descriptor(Some(layer), "layers", &LAYER_TYPES))
        .collect::<Result<Vec<_>, _>>()?;
    // Builders repeat the empty layer; more than that is made to be read again and again.
    let different: std::collections::HashSet<&Digest> = layers.iter().map(|layer| &layer.digest).collect();
    if layers.len() - different.len() > 32 {
        return no("the same layer stands there too often");
    }
    Ok(Manifest::Image { config, layers })
}

fn index(map: &Map) -> Result<Manifest, ManifestError> {
    if map.contains_key("config") || map.contains_key("layers") {
        return no("an index has no config and no layers");
    }
    let Some(Value::Array(list)) = map.get("manifests") else { return no("manifests is missing") };
    if list.is_empty() || list.len() > CHILDREN {
        return no("an index has 1 to 64 manifests");
    }
    let mut children = Vec::with_capacity(list.len());
    for child in list {
        let descriptor = descriptor(Some(child), "manifests", &[OCI_MANIFEST, DOCKER_MANIFEST])?;
        let platform = &child["platform"];
        let text = |key: &str| platform[key].as_str().unwrap_or("unknown").to_owned();
        children.push(Child { descriptor, os: text("os"), architecture: text("architecture") });
    }
    Ok(Manifest::Index { children })
}

fn descriptor(value: Option<&Value>, place: &str, types: &[&str]) -> Result<Descriptor, ManifestError> {
    let Some(Value::Object(map)) = value else { return no(format!("{place} is not a descriptor")) };
    if map.contains_key("urls") {
        return no(format!("{place} has urls: content from elsewhere is not taken"));
    }
    let media_type = map.get("mediaType").and_then(Value::as_str).unwrap_or_default();
    if !types.contains(&media_type) {
        return no(format!("a mediaType in {place} is not taken"));
    }
    let Some(digest) = map.get("digest").and_then(Value::as_str).and_then(|text| text.parse::<Digest>().ok())
    else {
        return no(format!("a digest in {place} is not sha256"));
    };
    let Some(size) = map.get("size").and_then(Value::as_u64).filter(|size| *size <= LAYER) else {
        return no(format!("a size in {place} is not a number of bytes up to 10 GiB"));
    };
    if let Some(data) = map.get("data") {
        let bytes = data.as_str().and_then(|text| data_encoding::BASE64.decode(text.as_bytes()).ok());
        if bytes.is_none_or(|bytes| Digest::of(&bytes) != digest || bytes.len() as u64 != size) {
            return no(format!("data in {place} is not what its digest says"));
        }
    }
    Ok(Descriptor { media_type: media_type.to_owned(), digest, size })
}

/// JSON without two keys that are equal but for case, at any depth (serde_json itself bounds the
/// depth at 128 and refuses trailing bytes).
pub fn strict(bytes: &[u8]) -> Result<Value, ManifestError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut deserializer).map_err(|error| {
        let text = error.to_string();
        ManifestError(if text.starts_with(TWICE) { TWICE.into() } else { "the manifest is not JSON".into() })
    })?;
    deserializer.end().map_err(|_| ManifestError("there is something after the manifest".into()))?;
    Ok(value)
}

const TWICE: &str = "two keys are equal (but for upper and lower case)";

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
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
        let mut list = Vec::new();
        while let Some(item) = seq.next_element_seed(Strict)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        let mut folded = std::collections::HashSet::new();
        while let Some(key) = access.next_key::<String>()? {
            if !folded.insert(key.to_lowercase()) {
                return Err(A::Error::custom(TWICE));
            }
            let value = access.next_value_seed(Strict)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let twice = image_json(|v| {
            let layer = v["layers"][0].clone();
            v["layers"].as_array_mut().unwrap().extend((0..40).map(|_| layer.clone()));
        });
        assert!(refused(&twice).contains("the same layer"));
    }
}
