//! Manifests, configs and layers as a tenant pushes them: accepted or refused, within bounds, without a
//! panic.
#![no_main]

use bulkhead::images::manifest::{Manifest, ManifestContent};
use bulkhead::images::{ImageAccounts, ImageConfig, names};
use libfuzzer_sys::fuzz_target;

const TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

fuzz_target!(|bytes: &[u8]| {
    for kind in TYPES {
        match Manifest::parse(bytes, kind) {
            Ok(manifest) => {
                if let Ok((config, layers)) = manifest.runnable() {
                    assert!(config.size <= 4 << 20 && (1..=127).contains(&layers.len()));
                }
                if let ManifestContent::Index { children } = &manifest.parts {
                    assert!(children.len() <= 256);
                }
            }
            Err(error) => assert!(!error.0.is_empty()),
        }
    }
    let _ = ImageConfig::parse(bytes);
    if let Ok(found) = names::search(bytes, &mut (64 << 20)) {
        let _ = ImageAccounts::parse(found.passwd.as_deref().unwrap_or(""), found.group.as_deref().unwrap_or(""));
    }
});
