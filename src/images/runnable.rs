//! Decides which stored manifests can run: images whose parts are all known and checked. A refusal names the
//! type, key and position.

use std::collections::HashSet;

use super::manifest::{Child, Descriptor, Manifest, ManifestContent, ManifestError, no, shown};
use crate::driver::podman::render::is_harmless_annotation;
use crate::ids::Digest;

/// Maximum layers of a runnable image.
const LAYERS: usize = 127;
/// Maximum repetitions of layers in an image. Builders repeat the empty layer; more repetitions would only
/// force repeated reads.
const REPEATED: usize = 32;

const CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const LAYER_TYPES: [&str; 4] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
];

impl Manifest {
    /// Returns the layers to measure on push: those of an image. Artifacts have none.
    #[must_use]
    pub fn measured_layers(&self) -> Option<&[Descriptor]> {
        self.runnable().ok().map(|(_, layers)| layers)
    }

    /// Returns the config and layers of a runnable image.
    pub fn runnable(&self) -> Result<(&Descriptor, &[Descriptor]), ManifestError> {
        let ManifestContent::Image { config, layers } = &self.parts else {
            return no("an index within an index cannot run; deploy the image by its own tag or digest");
        };
        if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
            let kind = self.artifact_type.as_deref().unwrap_or(&config.media_type);
            return no(format!(
                "it is an artifact of the type {}, not a container image: config.mediaType is {}",
                shown(kind),
                shown(&config.media_type)
            ));
        }
        for (n, layer) in layers.iter().enumerate() {
            if !LAYER_TYPES.contains(&layer.media_type.as_str()) {
                return no(format!(
                    "layers[{n}].mediaType is {}; a layer that runs is tar or tar+gzip (docker buildx build --output \
                     type=image,push=true,compression=gzip,force-compression=true, or podman push --compression-format gzip)",
                    shown(&layer.media_type)
                ));
            }
        }
        if config.size > super::config::LIMIT as u64 {
            return no("config.size: the config is larger than 1 MiB");
        }
        if layers.is_empty() || layers.len() > LAYERS {
            return no(format!(
                "layers: an image that runs has 1 to {LAYERS} layers; it has {}",
                layers.len()
            ));
        }
        let different: HashSet<&Digest> = layers.iter().map(|layer| &layer.digest).collect();
        if layers.len() - different.len() > REPEATED {
            return no("layers: the same layer is repeated too often");
        }
        // The engine copies annotations to the container, and a runtime may interpret some of them.
        if let Some(key) = self.annotations.keys().find(|key| !is_harmless_annotation(key)) {
            return no(format!(
                "annotations: {} would reach the container runtime; an image that runs has only \
                 org.opencontainers.image.*, com.docker.* and vnd.docker.* (on the index or as a label it may stay)",
                shown(key)
            ));
        }
        Ok((config, layers))
    }
}

/// Returns the only image of an index for linux/amd64.
pub fn for_this_platform(children: &[Child]) -> Result<&Child, ManifestError> {
    let mut fitting = children.iter().filter(|child| child.os == "linux" && child.architecture == "amd64");
    match (fitting.next(), fitting.next()) {
        (Some(child), None) => Ok(child),
        (Some(_), Some(_)) => no("the index has more than one image for linux/amd64"),
        (None, _) if children.is_empty() => no("the index is empty"),
        (None, _) => {
            let mut there: Vec<String> =
                children.iter().map(|child| shown(&format!("{}/{}", child.os, child.architecture))).collect();
            there.sort();
            there.dedup();
            there.truncate(8);
            no(format!("the index has no image for linux/amd64; it has {}", there.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

    fn manifest(edit: impl Fn(&mut Value)) -> Manifest {
        let digest = Digest::of(b"x");
        let mut value = json!({
            "schemaVersion": 2, "mediaType": OCI,
            "config": {"mediaType": CONFIG_TYPES[0], "digest": digest, "size": 1},
            "layers": [{"mediaType": LAYER_TYPES[1], "digest": digest, "size": 1}],
        });
        edit(&mut value);
        Manifest::parse(value.to_string().as_bytes(), OCI).unwrap()
    }

    fn why(edit: impl Fn(&mut Value)) -> String {
        let manifest = manifest(edit);
        assert!(manifest.measured_layers().is_none());
        manifest.runnable().unwrap_err().0
    }

    #[test]
    fn an_image_runs_and_all_else_is_refused_by_name() {
        assert_eq!(manifest(|_| ()).runnable().unwrap().1.len(), 1);
        for kind in LAYER_TYPES {
            assert!(manifest(|v| v["layers"][0]["mediaType"] = kind.into()).measured_layers().is_some());
        }
        let chart = why(|v| v["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into());
        assert!(chart.contains("application/vnd.cncf.helm.config.v1+json"), "{chart}");
        let typed = why(|v| {
            v["config"]["mediaType"] = "application/vnd.oci.empty.v1+json".into();
            v["artifactType"] = "application/vnd.example+json".into();
        });
        assert!(typed.contains("application/vnd.example+json"), "{typed}");
        let zstd =
            why(|v| v["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd".into());
        assert!(zstd.contains("tar+zstd; a layer that runs") && zstd.contains("compression=gzip"), "{zstd}");
        let attestation = why(|v| v["layers"][0]["mediaType"] = "application/vnd.in-toto+json".into());
        assert!(attestation.contains("layers[0].mediaType is application/vnd.in-toto+json"), "{attestation}");
        assert!(why(|v| v["layers"] = json!([])).contains("1 to 127"));
        let layer = |n: usize| json!({"mediaType": LAYER_TYPES[1], "digest": Digest::of(&n.to_le_bytes()), "size": 1});
        assert!(why(|v| v["layers"] = (0..200).map(layer).collect()).contains("1 to 127"));
        assert!(why(|v| v["layers"] = (0..40).map(|_| layer(1)).collect()).contains("too often"));
        assert!(why(|v| v["config"]["size"] = (5 << 20).into()).contains("1 MiB"));
        for key in ["run.oci.hooks.stdout", "io.podman.annotations.privileged", "team", ""] {
            let text = why(|v| v["annotations"] = json!({key: "x"}));
            assert!(text.contains(&shown(key)) && text.contains("annotations"), "{text}");
        }
        let fine = manifest(|v| v["annotations"] = json!({"org.opencontainers.image.created": "x"}));
        assert!(fine.runnable().is_ok());
    }

    #[test]
    fn the_image_of_an_index_is_the_one_for_this_platform() {
        let child = |os: &str, architecture: &str| Child {
            descriptor: Descriptor { media_type: OCI.into(), digest: Digest::of(os.as_bytes()), size: 1 },
            os: os.into(),
            architecture: architecture.into(),
        };
        let both = [child("unknown", "unknown"), child("linux", "amd64")];
        assert_eq!(for_this_platform(&both).unwrap(), &both[1]);
        let text = for_this_platform(&[child("linux", "arm64"), child("unknown", "unknown")]).unwrap_err().0;
        assert!(text.contains("linux/arm64, unknown/unknown"), "{text}");
        assert!(for_this_platform(&[]).unwrap_err().0.contains("empty"));
        let twice = [child("linux", "amd64"), child("linux", "amd64")];
        assert!(for_this_platform(&twice).unwrap_err().0.contains("more than one"));
    }
}
