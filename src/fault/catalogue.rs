//! Every code that the platform answers with, each explained at `/docs/errors/BH-nnn`: 100 and up are
//! faults of a spec, 200 and up of an image, 400 and up of a request.

use super::{Code, Explanation};

/// The explanation of a code such as `BH-106`.
#[must_use]
pub fn explanation(code: &str) -> Option<&'static Explanation> {
    all().find(|entry| entry.code.to_string() == code)
}

/// All of them, by number.
pub fn all() -> impl Iterator<Item = &'static Explanation> {
    OF_SPEC.iter().chain(OF_IMAGE).chain(OF_REQUEST)
}

macro_rules! codes {
    ($($name:ident = $code:literal, $title:literal, $text:literal;)*) => {
        $(#[doc = $title] pub const $name: Code = Code($code);)*
        const OF_SPEC: &[Explanation] = &[
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
    CONNECTS = 130, "connects is not possible", "services, apps and egress are lists of names, each once, at most 64 in each. An app does not name itself; another tenant's app is TENANT/APP.";
    MANY = 131, "More faults than are listed", "The first 200 are listed. Mend them and look again.";
}

const OF_IMAGE: &[Explanation] = &[
    Explanation {
        code: Code(200),
        title: "The image is not there",
        text: "The tenant's registry project has no such repository, tag or digest: the message says which, and the suggestion names what was probably meant. Push the image first; GET .../repositories lists what is there.",
    },
    Explanation {
        code: Code(201),
        title: "The image is for another platform",
        text: "Apps run on linux/amd64. Build with --platform linux/amd64, or push an index that has it.",
    },
    Explanation {
        code: Code(202),
        title: "The image has no command",
        text: "Neither the image (ENTRYPOINT, CMD) nor the spec (command, args) says what to run.",
    },
    Explanation {
        code: Code(203),
        title: "The image cannot be read",
        text: "Its manifest or config is malformed: the detail says how. Build and push it again with an up-to-date client.",
    },
    Explanation {
        code: Code(204),
        title: "A layer of the image is refused",
        text: "The fault says why: /etc/passwd or /etc/group is not a regular file of at most 256 KiB, the layer cannot be unpacked (a path stands twice, a file lies below something that is not a directory), it unpacks to more than 200 times its size, or it is packed in another form than gzip. Change what builds the layer and push the image again.",
    },
    Explanation {
        code: Code(205),
        title: "The config of the image is refused",
        text: "ENV entries are NAME=VALUE: the container engine would fill others from its own environment. WORKDIR is an absolute path without .. that is not in /proc, /sys or /dev. STOPSIGNAL is a signal such as SIGTERM or 15.",
    },
    Explanation {
        code: Code(210),
        title: "The image wants to be root",
        text: "No USER, or root: it runs as user 1000 inside, without privileges. Set USER to a number from 1 to 1023 (or 1000) in the Dockerfile and give that user the files that it must read.",
    },
    Explanation {
        code: Code(211),
        title: "The image's user is beyond its block",
        text: "Inside, ids 0 to 1023 exist. Set USER to a number from 1 to 1023 in the Dockerfile.",
    },
    Explanation {
        code: Code(212),
        title: "The image's user is not found",
        text: "USER is a name that the image's /etc/passwd does not have (or that file cannot be read): it runs as user 1000 inside. Write a number in the Dockerfile.",
    },
    Explanation {
        code: Code(213),
        title: "The image declares volumes",
        text: "The root file system is read-only, and VOLUME gives nothing here. Name the paths under scratch if the app writes to them.",
    },
    Explanation {
        code: Code(214),
        title: "The image exposes another port",
        text: "EXPOSE names ports, none of which is the spec's port. Probably one of both is wrong.",
    },
    Explanation {
        code: Code(215),
        title: "Groups of the image are dropped",
        text: "Inside, the groups 0 to 1023 exist. The app runs with the group of USER or of its line in /etc/passwd and with the groups of /etc/group that name it as a member, without those that the warning names. Give them numbers from 0 to 1023 in the Dockerfile.",
    },
    Explanation {
        code: Code(216),
        title: "The image's own health check is not used",
        text: "HEALTHCHECK would run a program beside the app; the platform asks over the network instead. Write health with http or tcp in the spec, or health: none if no check is wanted.",
    },
    Explanation {
        code: Code(220),
        title: "The image begins with the tenant's name",
        text: "Images come from the tenant's own registry project, and the tenant is implied: what is pushed as HOST/acme/web:1 is web:1 in the spec.",
    },
];

const OF_REQUEST: &[Explanation] = &[
    Explanation {
        code: Code(400),
        title: "The request cannot be read",
        text: "The body is not the JSON or YAML that its Content-Type says, a parameter has the wrong form, or a header is missing. The detail says which. Nothing was changed.",
    },
    Explanation {
        code: Code(401),
        title: "Not signed in",
        text: "Send an API token as `Authorization: Bearer bhk_...`, or sign in at the console. A token that has expired or was revoked is answered the same way.",
    },
    Explanation {
        code: Code(403),
        title: "Not allowed",
        text: "You are known, and your role does not include this. The detail names the role that does.",
    },
    Explanation {
        code: Code(404),
        title: "Not found",
        text: "There is no such thing, or it belongs to a tenant that you have no role in: the answer is the same on purpose.",
    },
    Explanation {
        code: Code(407),
        title: "Confirm that it is you",
        text: "What matters most (passwords, second factors, tokens, people's roles) asks for the password, the second factor or the provider again when the last proof lies more than ten minutes back. In the console, open /confirm; then do it again. API tokens are not asked.",
    },
    Explanation {
        code: Code(409),
        title: "Already taken",
        text: "The name is in use, or was in use once: names of tenants are never given again.",
    },
    Explanation {
        code: Code(410),
        title: "Not possible in this state",
        text: "The object is in a state that does not allow this, such as a deploy to a suspended tenant. The detail says which state and what to do first.",
    },
    Explanation {
        code: Code(412),
        title: "The object has changed",
        text: "The generation in `If-Match` is not the current one. Read the object again, look at what changed, and send your change with its new ETag.",
    },
    Explanation {
        code: Code(413),
        title: "Too large",
        text: "The body exceeds the limit that the detail names. An app spec may have 64 KiB.",
    },
    Explanation {
        code: Code(422),
        title: "The input has faults",
        text: "`faults` lists all of them, each with its own code, place, reason and suggestion. Nothing was changed.",
    },
    Explanation {
        code: Code(423),
        title: "It does not fit into the quota",
        text: "`faults` has one entry for each resource, with what is used, what was asked and what is left. Make the app smaller, stop or delete another one, or ask the admin for a larger quota. With `singleton: true` an app needs no reserve for rolling updates.",
    },
    Explanation {
        code: Code(424),
        title: "The user ids are used up",
        text: "Every range of the pool has been given, and ranges never return. The admin has to set up another installation with a pool of its own.",
    },
    Explanation {
        code: Code(425),
        title: "The networks are used up",
        text: "Every subnet of the pool has been given, and numbers never return.",
    },
    Explanation {
        code: Code(426),
        title: "A field of the request is wrong",
        text: "A name, a number or a duration is out of its bounds; the fault says which bounds.",
    },
    Explanation {
        code: Code(427),
        title: "What connects names is not to be had",
        text: "An app of the own tenant that does not exist, another tenant's app that is not granted (its owner offers it, an owner here accepts it), a service that the tenant may not use (the admin decides), or an egress target that is not approved.",
    },
    Explanation {
        code: Code(428),
        title: "The name in the spec is not the name in the address",
        text: "PUT .../apps/NAME takes a spec with `name: NAME`.",
    },
    Explanation {
        code: Code(429),
        title: "Too many tries",
        text: "Passwords, codes and links can be tried only so fast. Nobody is locked out: wait the seconds in Retry-After and try again. Where you have signed in before, others' tries do not slow you down.",
    },
    Explanation {
        code: Code(500),
        title: "A mistake of ours",
        text: "It is logged under the request id. Nothing was changed, or all of it was; asking again with the same Idempotency-Key is safe.",
    },
    Explanation {
        code: Code(503),
        title: "A part of the platform is not there",
        text: "The database, the registry or the engine does not answer. Running apps go on. Try again after the seconds in Retry-After.",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_explained_once_and_in_order() {
        let codes: Vec<_> = all().map(|entry| entry.code.0).collect();
        assert!(codes.is_sorted_by(|a, b| a < b), "{codes:?}");
        for code in [400, 401, 403, 404, 409, 410, 412, 413, 422, 423, 500, 503] {
            assert!(explanation(&format!("BH-{code}")).is_some(), "{code}");
        }
    }
}
