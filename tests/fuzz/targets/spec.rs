//! A spec in YAML or JSON gives faults, or a spec that prints and parses to the same value. It never panics.
#![no_main]

use bulkhead::apps::spec::{AppSpec, Colour, Format, show};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for format in [Format::Yaml, Format::Json] {
        match AppSpec::parse(bytes, format) {
            Ok(spec) => {
                let printed = spec.to_json().to_string();
                let again = AppSpec::parse(printed.as_bytes(), Format::Json).expect("a printed spec parses");
                assert_eq!(again, spec);
                let tenant = "acme".parse().expect("a name");
                bulkhead::apps::render_example(&spec, tenant).expect("an accepted spec compiles");
            }
            Err(faults) => {
                assert!(!faults.is_empty());
                let text = String::from_utf8_lossy(bytes);
                let shown = show(&text, "fuzz", &faults, Colour::Never);
                assert!(
                    !shown.chars().any(|c| c.is_control() && c != '\n'),
                    "a terminal would interpret this"
                );
            }
        }
    }
});
