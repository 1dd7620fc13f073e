//! The codes of a spec's faults, each explained at `/docs/errors/BH-nnn`.

use crate::fault::{Code, Explanation};

macro_rules! codes {
    ($($name:ident = $code:literal, $title:literal, $text:literal;)*) => {
        $(pub(super) const $name: Code = Code($code);)*
        /// Every code of a spec.
        pub const CATALOGUE: &[Explanation] = &[
            $(Explanation { code: Code($code), title: $title, text: $text },)*
        ];
    };
}

codes! {
    TOO_LARGE = 100, "The spec is too large", "A spec has at most 64 KiB. Large values belong into the image.";
    NOT_UTF8 = 101, "The spec is not UTF-8", "Save the file as UTF-8. The fault says where the first wrong byte is.";
    SYNTAX = 102, "The spec cannot be read", "It is not YAML, or not JSON, as its Content-Type or file name says. The fault says where reading stopped.";
    YAML_FEATURE = 103, "This feature of YAML is not available", "Anchors, aliases, merge keys, tags and second documents make a file mean something else than it says. Write the values out.";
    TOO_DEEP = 104, "Too deep or too many values", "A spec has at most 16 levels and 2000 values.";
    DUPLICATE = 105, "A name stands twice", "Of two values, one would be dropped silently. Remove one.";
    UNKNOWN = 106, "There is no such field", "The fault names the field that was probably meant. The published schema (GET /api/v1/schemas/app-spec) gives editors completion.";
    PRIVILEGE = 107, "Privileges are not available", "An app runs without any capability and cannot gain one. Nothing in a spec can change that: it is what keeps tenants apart.";
    HOST = 108, "The host is out of reach", "Host networks, process lists, paths, devices and ports of the host are closed to every app.";
    IDENTITY = 109, "User ids are chosen by the platform", "Each app has a block of host ids of its own. Inside, it runs as the USER of its image.";
    NETWORK = 110, "The network is the platform's", "An app has one port and names what it reaches under connects. Names and addresses are given by the platform.";
    STORAGE = 111, "Files are the image's or scratch", "The root file system is read-only. scratch gives writable, memory-backed paths.";
    ORCHESTRATOR = 112, "This is decided by the platform", "Restarts, placement, labels, hooks and helpers are the platform's. It restarts what ends, with backoff.";
    NOT_YET = 113, "Not available in this version", "The field is planned and does not exist until it works.";
    WRONG_TYPE = 114, "The value has the wrong type", "The fault says which type the field takes. In YAML, put a text that looks like a number into quotes.";
    MISSING = 115, "A required field is missing", "spec, name, image, cpu and memory are required.";
    VERSION = 116, "Unknown version of the format", "This version of the platform reads spec: v1.";
    NAME = 117, "A name has the wrong form", "Names are DNS labels: a to z, 0 to 9 and -, starting with a letter, not ending with -, at most 45 characters.";
    IMAGE = 118, "The image has the wrong form", "repository:tag or repository@sha256:..., without a host and without a tenant: only the tenant's own registry project is used. The tag latest is not implied.";
    CPU = 119, "Cpu has the wrong form or size", "250m or 0.25; at least 10m, at most 1000 cores.";
    MEMORY = 120, "A size has the wrong form or value", "A whole number with Ki, Mi or Gi, such as 256Mi; memory is at least 8Mi and at most 1024Gi.";
    RANGE = 121, "A number is out of its bounds", "The fault says which bounds.";
    COMMAND = 122, "Command or args out of bounds", "At most 64 texts, each of at most 8 KiB, 32 KiB together, without the character NUL.";
    ENV_KEY = 123, "The name of a variable has the wrong form", "Letters, digits, _ . and -, starting with a letter or _; at most 128 characters; names that start with BULKHEAD_ are the platform's.";
    ENV_SIZE = 124, "The environment is too large", "At most 128 variables and 32 KiB together, without the character NUL.";
    PORT = 125, "The port is out of its bounds", "1024 to 65535: below 1024 a process needs a privilege that no app has.";
    HEALTH = 126, "The health check has the wrong form", "health: {http: {path: /healthz}} or health: {tcp: {}}, with an optional port (the app's port without it) and grace in seconds.";
    SCRATCH_PATH = 127, "A scratch path is not possible", "An absolute path without . and .., not /, /dev, /proc, /sys, /run, /etc or below, and not within another scratch path.";
    SCRATCH_SIZE = 128, "Scratch leaves no room", "Scratch lives in memory: its sizes (16Mi for /tmp unless given) and at least 8Mi for the process fit into memory.";
    SINGLETON = 129, "A singleton has at most one instance", "With singleton: true the old instance stops before the new one starts, so instances is 0 or 1.";
    CONNECTS = 130, "connects.apps is not possible", "Names of other apps of the own tenant, each once, at most 64.";
}
