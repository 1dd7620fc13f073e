//! The OCI distribution conformance suite against the registry proxy, with a registry credential.

use std::process::Command;

use crate::support::Machine;

/// Tests that are switched off: non-distributable layers would be stored elsewhere, and the registry stores
/// only sha256. The other three are off by default: sparse indexes and tags as parameters are not in version
/// 1.1.
const OFF: [&str; 6] = [
    "Blobs sha512",
    "Non-distributable Layers",
    "Digest Algorithm sha512",
    "Sparse Manifests",
    "Tag Param",
    "Tag Param sha512",
];

/// Returns the number or word after the dots of a line such as `  Pass....: 700`.
fn after<'t>(text: &'t str, label: &str) -> &'t str {
    let line = text
        .lines()
        .find(|line| line.trim_start().strip_prefix(label).is_some_and(|rest| rest.starts_with(['.', ':'])));
    line.and_then(|line| line.rsplit(':').next()).unwrap_or_else(|| panic!("{label}:\n{text}")).trim()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_conforms_to_the_specification() {
    let suite = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/conformance/lib/conformance");
    assert!(std::path::Path::new(suite).exists(), "run tests/conformance/fetch (deploy/test does)");
    let machine = Machine::start().await;
    let acme = machine.tenant("acme").await;
    let results = tempfile::tempdir().unwrap();
    let done = Command::new(suite)
        .current_dir(results.path())
        .env_clear()
        .env("OCI_REGISTRY", format!("127.0.0.1:{}", machine.port))
        .env("OCI_TLS", "disabled")
        .env("OCI_VERSION", "1.1")
        .env("OCI_REPO1", "acme/one")
        .env("OCI_REPO2", "acme/two")
        .env("OCI_USERNAME", &acme.0)
        .env("OCI_PASSWORD", &acme.1)
        .env("OCI_API_BLOBS_UPLOAD_CANCEL", "true")
        .env("OCI_API_BLOBS_DIGEST_HEADER", "true")
        .env("OCI_API_MANIFESTS_DIGEST_HEADER", "true")
        .env("OCI_DATA_SHA512", "false")
        .env("OCI_DATA_NONDISTRIBUTABLE", "false")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    let count = |label: &str| after(&text, label).parse::<u32>().unwrap();
    assert_eq!((count("FAIL"), count("Error"), count("Skip")), (0, 0, 0), "{text}");
    assert!(count("Pass") >= 700, "{text}");
    let off: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.starts_with("Data conformance:"))
        .filter(|line| line.trim_end().ends_with("Disabled"))
        .map(|line| line.split("..").next().unwrap_or_default().trim().trim_end_matches('.'))
        .collect();
    assert_eq!(off, OFF, "{text}");
    println!("{} checks passed", count("Pass"));
    // Blobs that the suite deleted free their bytes; only its remaining objects count.
    let count = machine.sql("SELECT count(*) FROM manifest WHERE doomed_at IS NOT NULL");
    assert_eq!(count, "0", "deleted manifests are gone");
}
