//! Manifests as they are stored: all forms of OCI (image specification 1.1) and Docker's schema 2, parsed
//! strictly. The registry's parser takes the last of two equal keys and folds case. This parser refuses both,
//! so every other reader sees what was checked. Whether a manifest is a runnable image is checked at deploy
//! time.

use std::collections::BTreeMap;

use serde::de::DeserializeSeed;

use super::seeds::{Annotations, ObjectSeed, RawDescriptor, RawManifest};
use super::strict::{Atom, read};
use crate::ids::Digest;

/// Maximum size of a manifest, in bytes: the size that the specification asks registries to accept.
pub const LIMIT: usize = 4 << 20;
/// Maximum number of layers, and of manifests, in one manifest.
pub(super) const PARTS: usize = 256;
/// Maximum size of a layer, in bytes.
const LAYER: u64 = 10 << 30;
/// Maximum bytes of annotations of a manifest with a subject: referrer lists contain them.
const LISTED: usize = 64 << 10;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI index, also used for referrer lists.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// `Accept` header for fetching a manifest.
pub const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// A reference to a blob or a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Type.
    pub media_type: String,
    /// Digest.
    pub digest: Digest,
    /// Size in bytes, as declared.
    pub size: u64,
}

/// A manifest of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// Its manifest.
    pub descriptor: Descriptor,
    /// Operating system.
    pub os: String,
    /// Architecture.
    pub architecture: String,
}

/// The content of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestContent {
    /// One image, or an artifact with the structure of an image.
    Image {
        /// Its config.
        config: Descriptor,
        /// Its layers, from the bottom up.
        layers: Vec<Descriptor>,
    },
    /// A list of manifests, for several platforms or of several kinds.
    Index {
        /// The manifests.
        children: Vec<Child>,
    },
}

/// A manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its content.
    pub parts: ManifestContent,
    /// Its declared artifact type.
    pub artifact_type: Option<String>,
    /// The manifest that it is attached to; it may be missing.
    pub subject: Option<Descriptor>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// The reason for refusing a manifest. Quotes little of the manifest, and only printable ASCII.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ManifestError(pub String);

pub(super) fn no<T>(why: impl Into<String>) -> Result<T, ManifestError> {
    Err(ManifestError(why.into()))
}

/// Returns external text in a form that is safe in a message.
#[must_use]
pub fn shown(text: &str) -> String {
    let plain: String =
        text.chars().take(120).map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect();
    if plain.is_empty() { "(empty)".to_owned() } else { plain }
}

/// Maximum number of values in a manifest, and their maximum depth.
const BOUNDS: (usize, usize) = (20_000, 16);

impl Manifest {
    /// Parses a manifest that was sent as `content_type`.
    pub fn parse(bytes: &[u8], content_type: &str) -> Result<Self, ManifestError> {
        if bytes.len() > LIMIT {
            return no("the manifest is larger than 4 MiB");
        }
        if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
            return no("the manifest is not a JSON object");
        }
        let raw = read(bytes, BOUNDS, |budget, deserializer| {
            ObjectSeed::<RawManifest>::new(budget).deserialize(deserializer)
        })?;
        let Some(mut raw) = raw else { return no("the manifest is not a JSON object") };
        if raw.schema_version != Some(Atom::Number(2)) {
            return no("schemaVersion is not 2");
        }
        // OCI lets a manifest omit its own type, and clients do; Docker's always has it.
        match &raw.media_type {
            Some(Atom::Text(own)) if own == content_type => {}
            None if content_type.starts_with("application/vnd.oci.") => {}
            _ => return no("mediaType in the manifest differs from the Content-Type"),
        }
        let artifact_type = artifact_type(raw.artifact_type.take())?;
        let subject = match raw.subject.take() {
            Some(subject) => Some(descriptor(subject, "subject")?),
            None => None,
        };
        let annotations = annotations(raw.annotations.take())?;
        // Measure the printed form: a control character takes six bytes in JSON.
        let listed = serde_json::to_string(&annotations).map_or(usize::MAX, |text| text.len());
        if subject.is_some() && listed > LISTED {
            return no("the annotations of a manifest with a subject are larger than 64 KiB");
        }
        let parts = match content_type {
            OCI_MANIFEST | DOCKER_MANIFEST => image(raw)?,
            OCI_INDEX | DOCKER_INDEX => index(raw)?,
            other => {
                return no(format!(
                    "manifests of the type {} are not supported; push an OCI or Docker (schema 2) manifest or index",
                    shown(other)
                ));
            }
        };
        Ok(Self { parts, artifact_type, subject, annotations })
    }

    /// Returns the artifact type for referrer lists: its own, otherwise its config's media type.
    #[must_use]
    pub fn kind(&self) -> &str {
        match (&self.artifact_type, &self.parts) {
            (Some(own), _) => own,
            (None, ManifestContent::Image { config, .. }) => &config.media_type,
            (None, ManifestContent::Index { .. }) => "",
        }
    }
}

fn artifact_type(raw: Option<Atom>) -> Result<Option<String>, ManifestError> {
    match raw {
        None => Ok(None),
        Some(Atom::Text(text)) if text.is_empty() => Ok(None),
        Some(Atom::Text(text)) if is_media_type(&text) => Ok(Some(text)),
        Some(_) => no("artifactType is not a media type"),
    }
}

/// Checks the form of a media type (RFC 6838).
fn is_media_type(text: &str) -> bool {
    (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) && text.contains('/')
}

fn annotations(raw: Option<Option<Annotations>>) -> Result<BTreeMap<String, String>, ManifestError> {
    match raw {
        None => Ok(BTreeMap::new()),
        Some(None) => no("annotations is not an object"),
        Some(Some(Annotations(map))) => map
            .into_iter()
            .map(|(key, value)| match value {
                Some(value) => Ok((key, value)),
                None => no(format!("annotations: the value of {} is not a text", shown(&key))),
            })
            .collect(),
    }
}

fn image(raw: RawManifest) -> Result<ManifestContent, ManifestError> {
    if raw.manifests.is_some() {
        return no("a manifest of an image has no manifests");
    }
    let config = descriptor(raw.config.flatten(), "config")?;
    let Some(Some(list)) = raw.layers else { return no("layers is missing") };
    let layers = list
        .into_iter()
        .enumerate()
        .map(|(n, layer)| descriptor(layer, &format!("layers[{n}]")))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(ManifestContent::Image { config, layers })
}

fn index(raw: RawManifest) -> Result<ManifestContent, ManifestError> {
    if raw.config.is_some() || raw.layers.is_some() {
        return no("an index has no config and no layers");
    }
    let Some(Some(list)) = raw.manifests else { return no("manifests is missing") };
    let mut children = Vec::with_capacity(list.len());
    for (n, mut child) in list.into_iter().enumerate() {
        let platform = child.as_mut().and_then(|child| child.platform.take()).unwrap_or_default();
        let descriptor = descriptor(child, &format!("manifests[{n}]"))?;
        let known = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
        let (os, architecture) = (known(platform.os), known(platform.architecture));
        children.push(Child { descriptor, os, architecture });
    }
    Ok(ManifestContent::Index { children })
}

fn descriptor(raw: Option<RawDescriptor>, place: &str) -> Result<Descriptor, ManifestError> {
    let Some(raw) = raw else { return no(format!("{place} is not a descriptor")) };
    if raw.urls {
        return no(format!(
            "{place}.urls: external content (non-distributable layers) is not supported; push the content itself"
        ));
    }
    let Some(media_type) = raw.media_type.and_then(Atom::text).filter(|text| is_media_type(text)) else {
        return no(format!("{place}.mediaType is not a media type"));
    };
    let text = raw.digest.and_then(Atom::text).unwrap_or_default();
    let Ok(digest) = text.parse::<Digest>() else {
        return no(format!("{place}.digest is {}; digests are sha256: and 64 hex digits here", shown(&text)));
    };
    let size = match raw.size {
        Some(Atom::Number(size)) if size <= LAYER => size,
        _ => return no(format!("{place}.size is not a number of bytes up to 10 GiB")),
    };
    if let Some(data) = raw.data {
        let bytes = data.text().and_then(|text| data_encoding::BASE64.decode(text.as_bytes()).ok());
        if bytes.is_none_or(|bytes| Digest::of(&bytes) != digest || bytes.len() as u64 != size) {
            return no(format!("{place}.data does not match its digest and size"));
        }
    }
    Ok(Descriptor { media_type, digest, size })
}

#[cfg(test)]
mod tests {
    use super::super::strict::TWICE;
    use super::*;
    use serde_json::{Value, json};

    fn image_json(edit: impl Fn(&mut Value)) -> String {
        let digest = Digest::of(b"x");
        let mut value = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": 1},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": 1}],
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
            Ok(Manifest { parts: ManifestContent::Image { layers, .. }, .. }) if layers.len() == 1
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
        assert!(refused(&good.replacen('{', "{\"Layers\":[],", 1)).contains("differs from the field"));
        assert_eq!(refused(&good.replacen('{', "{\"layers\":[],", 1)), TWICE);
        assert!(refused(&format!("{good} x")).contains("after the manifest"));
        assert!(refused(&format!("\u{feff}{good}")).contains("not a JSON object"));
        assert!(refused(&good.replace(OCI_MANIFEST, OCI_INDEX)).contains("Content-Type"));
        assert!(refused(&image_json(|v| v["layers"][0]["urls"] = json!(["http://x"]))).contains("urls"));
        for kind in [json!(null), json!(5), json!(""), json!("x"), json!("a/b\n"), json!("a/".repeat(200))] {
            assert!(
                refused(&image_json(|v| v["layers"][0]["mediaType"] = kind.clone())).contains("mediaType")
            );
        }
        assert!(refused(&image_json(|v| v["layers"][0]["size"] = (-1).into())).contains("size"));
        assert!(refused(&image_json(|v| v["layers"][0]["size"] = 1.5.into())).contains("size"));
        assert!(refused(&image_json(|v| v["layers"][0]["digest"] = "sha512:x".into())).contains("digest"));
        assert!(refused(&image_json(|v| v["config"]["data"] = "AAAA".into())).contains("data"));
        assert!(refused(&image_json(|v| v["manifests"] = json!([]))).contains("manifests"));
        assert!(refused(&"[".repeat(100_000)).contains("not a JSON object"));
        for value in ["[[],[[]],{\"A\":[{\"b\":1,\"B\":2}]}]", "{\"x\":{\"y\":1,\"Y\":2}}"] {
            assert_eq!(refused(&good.replacen('{', &format!("{{\"unknown\":{value},"), 1)), TWICE);
        }
        for key in ["Layers", "CONFIG", "annotation\u{17f}", "Subject"] {
            let own = image_json(|v| v[key] = json!({}));
            let text = Manifest::parse(own.as_bytes(), OCI_MANIFEST).unwrap_err().0;
            assert!(text == TWICE || text.contains("differs from the field"), "{key}: {text}");
        }
        assert!(
            refused(&image_json(|v| v["layers"][0]["URLs"] = json!(["http://x"])))
                .contains("differs from the field")
        );
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
        assert_eq!(
            refused(&good.replacen('{', &format!("{{\"x\":{deep},"), 1)),
            "its values are nested too deep"
        );
        let keys: String = (0..30_000).map(|n| format!("\"k{n}\":0,")).collect();
        assert_eq!(refused(&good.replacen('{', &format!("{{{keys}"), 1)), "it holds too many values");
        assert!(refused(&format!("[{lists}[]]")).contains("not a JSON object"));
        assert!(
            refused(&image_json(|v| {
                let layer = v["layers"][0].clone();
                v["layers"] = (0..1_000).map(|_| layer.clone()).collect();
            }))
            .contains("more than 256")
        );
        assert!(refused(&" ".repeat(LIMIT + 1)).contains("4 MiB"));
    }

    #[test]
    fn values_of_another_form_are_none() {
        for form in [json!([]), json!("x"), json!(null), json!(7)] {
            assert!(
                refused(&image_json(|v| v["config"] = form.clone())).contains("not a descriptor"),
                "{form}"
            );
        }
        assert!(refused(&image_json(|v| v["layers"] = json!({"a": 1}))).contains("missing"));
        assert!(refused(&image_json(|v| v["layers"] = json!([[]]))).contains("not a descriptor"));
        assert!(refused(&image_json(|v| v["annotations"] = json!([]))).contains("annotation"));
        let null = image_json(|v| v["annotations"] = Value::Null);
        assert!(Manifest::parse(null.as_bytes(), OCI_MANIFEST).is_ok());
        assert!(refused(&image_json(|v| v["annotations"] = json!({"a": 5}))).contains("not a text"));
        assert!(refused(&image_json(|v| v["subject"] = json!("x"))).contains("subject"));
        assert!(refused(&image_json(|v| v["artifactType"] = json!(["x"]))).contains("artifactType"));
    }

    #[test]
    fn what_is_no_image_is_stored_too() {
        let digest = Digest::of(b"x");
        let read = |text: &str| Manifest::parse(text.as_bytes(), OCI_MANIFEST).unwrap();
        let signature = read(&image_json(|v| {
            v["config"] = json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": 1, "data": "eA=="});
            v["layers"] = json!([]);
            v["artifactType"] = "application/vnd.example.signature".into();
            v["subject"] =
                json!({"mediaType": OCI_INDEX, "digest": digest, "size": 7, "artifactType": "a/b"});
            v["annotations"] = json!({"team": "a", "Team": "b", "": "c"});
            v["org.example.custom"] = json!({"x": [1, 2]});
        }));
        assert_eq!(signature.kind(), "application/vnd.example.signature");
        assert_eq!(signature.subject.as_ref().unwrap().size, 7);
        assert_eq!(signature.annotations["Team"], "b");
        let image = read(&image_json(|_| ()));
        assert_eq!(image.kind(), "application/vnd.oci.image.config.v1+json");
        let twins = image_json(|v| v["layers"][0]["annotations"] = json!({"a": "1", "A": "2"}));
        assert!(Manifest::parse(twins.as_bytes(), OCI_MANIFEST).is_ok());
        let much = image_json(|v| {
            v["subject"] = v["config"].clone();
            v["annotations"] = json!({"a": "x".repeat(70_000)});
        });
        assert!(refused(&much).contains("64 KiB"));
        for children in [json!([]), json!([{"mediaType": OCI_INDEX, "digest": digest, "size": 1}])] {
            let text = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}).to_string();
            assert_eq!(Manifest::parse(text.as_bytes(), OCI_INDEX).unwrap().kind(), "");
        }
    }

    #[test]
    fn an_index_says_for_which_platform_each_image_is() {
        let digest = Digest::of(b"x");
        let child = |platform: Value| json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": 1, "platform": platform});
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            child(json!({"os": "linux", "architecture": "amd64", "variant": "v2"})), child(Value::Null)]});
        let Ok(Manifest { parts: ManifestContent::Index { children }, .. }) =
            Manifest::parse(index.to_string().as_bytes(), OCI_INDEX)
        else {
            panic!("an index is read");
        };
        assert_eq!((children[0].os.as_str(), children[0].architecture.as_str()), ("linux", "amd64"));
        assert_eq!(children[1].os, "unknown");
    }
}
