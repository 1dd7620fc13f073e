//! Every code of the platform's errors. `/docs/errors/BH-nnn` explains each: 100 and up are faults of a spec,
//! 200 and up of an image, 400 and up of a request.

use super::{Code, Explanation};

/// Returns the explanation of a code such as `BH-106`.
#[must_use]
pub fn explanation(code: &str) -> Option<&'static Explanation> {
    all().find(|entry| entry.code.to_string() == code)
}

/// Returns all explanations, by number.
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
    TOO_LARGE = 100, "The spec is too large", "A spec has at most 64 KiB. Put large values into the image.";
    NOT_UTF8 = 101, "The spec is not UTF-8", "Save the file as UTF-8. The fault gives the position of the first invalid byte.";
    SYNTAX = 102, "The spec cannot be read", "The document is not valid YAML or JSON (its Content-Type or file name decides which). The fault gives the position of the error.";
    YAML_FEATURE = 103, "This feature of YAML is not available", "Anchors, aliases, merge keys, tags and second documents hide the values that a file sets. Write the values out.";
    TOO_DEEP = 104, "Too deep or too many values", "A spec has at most 16 levels and 2000 values.";
    DUPLICATE = 105, "A name is used twice", "Of two values, one would be dropped silently. Remove one.";
    UNKNOWN = 106, "Unknown field", "The fault suggests the nearest field. The published schema (GET /api/v1/schemas/app-spec) gives editors completion.";
    PRIVILEGE = 107, "Privileges are not available", "An app runs without capabilities and cannot gain any. No field of a spec changes that: it isolates tenants from each other.";
    HOST = 108, "The host is not available", "Host networks, process lists, paths, devices and ports of the host are not available to apps.";
    IDENTITY = 109, "The platform chooses user ids", "Each app has its own block of host ids. Inside the container, it runs as the USER of its image.";
    NETWORK = 110, "The platform configures the network", "An app has one port and lists its destinations under connects. The platform assigns names and addresses.";
    STORAGE = 111, "Storage is the image or scratch", "The root file system is read-only. scratch provides writable, memory-backed paths.";
    ORCHESTRATOR = 112, "The platform decides this", "Restarts, placement, labels, hooks and helper containers are not part of a spec. The platform restarts instances that exit, with backoff.";
    NOT_YET = 113, "Not available in this version", "The field is planned for a later version. Remove it.";
    WRONG_TYPE = 114, "The value has the wrong type", "The fault names the type of the field. In YAML, quote a string that looks like a number.";
    MISSING = 115, "A required field is missing", "spec, name, image, cpu and memory are required.";
    VERSION = 116, "Unknown version of the format", "This version of the platform reads spec: v1.";
    NAME = 117, "A name has the wrong form", "Names are DNS labels: a to z, 0 to 9 and -, starting with a letter, not ending with -, at most 45 characters.";
    IMAGE = 118, "The image has the wrong form", "repository:tag or repository@sha256:..., without a host and without a tenant: only the tenant's own registry project is used. The tag latest is not implied.";
    CPU = 119, "Cpu has the wrong form or size", "250m or 0.25; at least 10m, at most 1000 cores.";
    MEMORY = 120, "A size has the wrong form or value", "A whole number with Ki, Mi or Gi, such as 256Mi; memory is at least 8Mi and at most 1024Gi.";
    RANGE = 121, "A number is out of range", "The fault names the allowed range.";
    COMMAND = 122, "Command or args are too large", "At most 64 strings, each of at most 8 KiB, 32 KiB together, without the character NUL.";
    ENV_KEY = 123, "The name of a variable has the wrong form", "Letters, digits, _ . and -, starting with a letter or _; at most 128 characters; names that start with BULKHEAD_ are reserved.";
    ENV_SIZE = 124, "The environment is too large", "At most 128 variables and 32 KiB together, without the character NUL.";
    PORT = 125, "The port is out of range", "1024 to 65535: ports below 1024 need a privilege that no app has.";
    HEALTH = 126, "The health check has the wrong form", "health: {http: {path: /healthz}} or health: {tcp: {}}, with an optional port (the app's port without it) and grace in seconds.";
    SCRATCH_PATH = 127, "The scratch path is not allowed", "An absolute path without . and .., not / itself, not in /dev, /proc, /sys, /run or /etc, and not in another scratch path.";
    SCRATCH_SIZE = 128, "Scratch exceeds the memory", "Scratch uses the app's memory: memory must hold all scratch sizes (16Mi for /tmp by default) and at least 8Mi for the process.";
    SINGLETON = 129, "A singleton has at most one instance", "With singleton: true the old instance stops before the new one starts, so instances must be 0 or 1.";
    CONNECTS = 130, "connects is not valid", "services, apps and egress are lists of names, each once, at most 64 in each. An app cannot list itself; write another tenant's app as TENANT/APP.";
    MANY = 131, "More faults than are listed", "The first 200 are listed. Correct them and check again.";
}

const OF_IMAGE: &[Explanation] = &[
    Explanation {
        code: Code(200),
        title: "The image does not exist",
        text: "The tenant's registry project does not have the repository, tag or digest in the message. The suggestion names the nearest one. Push the image first; GET .../repositories lists the repositories.",
    },
    Explanation {
        code: Code(201),
        title: "The image is for another platform",
        text: "Apps run on linux/amd64. Build with --platform linux/amd64, or push an index that contains it.",
    },
    Explanation {
        code: Code(202),
        title: "The image has no command",
        text: "Neither the image (ENTRYPOINT, CMD) nor the spec (command, args) names a program. Set one of them.",
    },
    Explanation {
        code: Code(203),
        title: "The image cannot be read",
        text: "Its manifest or config is malformed; the detail names the error. Build and push it again with an up-to-date client.",
    },
    Explanation {
        code: Code(204),
        title: "A layer of the image is not accepted",
        text: "The fault names the reason: /etc/passwd or /etc/group is not a regular file of at most 256 KiB, the layer cannot be unpacked (a path occurs twice, the parent of a file is not a directory), it unpacks to more than 200 times its size, or its compression is not gzip. Change the build of the layer and push the image again.",
    },
    Explanation {
        code: Code(205),
        title: "The config of the image is not accepted",
        text: "ENV entries must be NAME=VALUE: the container engine would take any other value from its own environment. WORKDIR must be an absolute path without .. and outside /proc, /sys and /dev. STOPSIGNAL must be a signal such as SIGTERM or 15.",
    },
    Explanation {
        code: Code(210),
        title: "The image is set to run as root",
        text: "USER is missing or root. The app runs as user 1000 instead, without privileges. Set USER to a number from 1 to 1023 (or 1000) in the Dockerfile and make its files readable for that user.",
    },
    Explanation {
        code: Code(211),
        title: "The image's user id is too high",
        text: "Inside the container, only ids 0 to 1023 exist. Set USER to a number from 1 to 1023 in the Dockerfile.",
    },
    Explanation {
        code: Code(212),
        title: "The image's user is not found",
        text: "USER is a name that the image's /etc/passwd does not contain (or that file cannot be read). The app runs as user 1000 instead. Write a number in the Dockerfile.",
    },
    Explanation {
        code: Code(213),
        title: "The image declares volumes",
        text: "The root file system is read-only, and VOLUME has no effect. Name the paths under scratch if the app writes to them.",
    },
    Explanation {
        code: Code(214),
        title: "The image exposes another port",
        text: "EXPOSE does not list the port of the spec. Check which of the two is wrong.",
    },
    Explanation {
        code: Code(215),
        title: "Some groups of the image are dropped",
        text: "Inside the container, only groups 0 to 1023 exist. The app runs with the group of USER (or of its line in /etc/passwd) and with the groups of /etc/group that list it as a member. The groups in the warning are dropped. Give them numbers from 0 to 1023 in the Dockerfile.",
    },
    Explanation {
        code: Code(216),
        title: "The image's own health check is not used",
        text: "HEALTHCHECK would run a program next to the app; the platform checks over the network instead. Set health to http or tcp in the spec, or to none for no check.",
    },
    Explanation {
        code: Code(220),
        title: "The image starts with the tenant's name",
        text: "Images come from the tenant's own registry project, so the spec omits the tenant: an image pushed as HOST/acme/web:1 is web:1 in the spec.",
    },
];

const OF_REQUEST: &[Explanation] = &[
    Explanation {
        code: Code(400),
        title: "The request cannot be read",
        text: "The body does not match its Content-Type (JSON or YAML), a parameter has the wrong form, or a header is missing. The detail names the cause. Nothing was changed.",
    },
    Explanation {
        code: Code(401),
        title: "Not signed in",
        text: "Send an API token as `Authorization: Bearer bhk_...`, or sign in at the console. Expired and revoked tokens get the same answer.",
    },
    Explanation {
        code: Code(403),
        title: "Not allowed",
        text: "You are signed in, but your role does not allow this. The detail names the role that does.",
    },
    Explanation {
        code: Code(404),
        title: "Not found",
        text: "The object does not exist, or it belongs to a tenant in which you have no role. Both cases get the same answer on purpose.",
    },
    Explanation {
        code: Code(407),
        title: "Confirm that it is you",
        text: "Changes to passwords, second factors, tokens and roles need a recent confirmation: the password, the second factor or the provider, within the last ten minutes. In the console, open /confirm, then repeat the change. API tokens need no confirmation.",
    },
    Explanation {
        code: Code(409),
        title: "Already taken",
        text: "The name is in use, or was in use once: tenant names are never reused.",
    },
    Explanation {
        code: Code(410),
        title: "Not possible in this state",
        text: "The object is in a state that does not allow this, such as a deploy to a suspended tenant. The detail names the state and the action that is needed first.",
    },
    Explanation {
        code: Code(412),
        title: "The object has changed",
        text: "The generation in `If-Match` is not the current one. Read the object again, check the differences, and send your change with the new ETag.",
    },
    Explanation {
        code: Code(413),
        title: "Too large",
        text: "The body exceeds the limit that the detail names. An app spec may have at most 64 KiB.",
    },
    Explanation {
        code: Code(422),
        title: "The input is not valid",
        text: "`faults` lists every fault with its code, path, reason and suggestion. Nothing was changed.",
    },
    Explanation {
        code: Code(423),
        title: "The quota is exceeded",
        text: "`faults` has one entry for each resource, with the used, the requested and the free amount. Make the app smaller, stop or delete another one, or ask the admin for a larger quota. An app with `singleton: true` needs no reserve for rolling updates.",
    },
    Explanation {
        code: Code(424),
        title: "No user ids are left",
        text: "Every range of the pool is allocated, and ranges are never reused. The admin must set up another installation with its own pool.",
    },
    Explanation {
        code: Code(425),
        title: "No networks are left",
        text: "Every subnet of the pool is allocated, and subnets are never reused. The admin must set up another installation with its own pool.",
    },
    Explanation {
        code: Code(426),
        title: "A field of the request is not valid",
        text: "A name, a number or a duration is out of range; the fault names the allowed range.",
    },
    Explanation {
        code: Code(427),
        title: "A destination in connects is not available",
        text: "connects lists an app of your tenant that does not exist, another tenant's app without a grant (an owner there offers it, an owner here accepts it), a service that your tenant may not use (the admin decides), or an egress target that is not approved.",
    },
    Explanation {
        code: Code(428),
        title: "The name in the spec differs from the name in the URL",
        text: "PUT .../apps/NAME needs a spec with `name: NAME`.",
    },
    Explanation {
        code: Code(429),
        title: "Too many attempts",
        text: "Attempts with passwords, codes and links are rate limited. Accounts are never locked: wait the seconds in Retry-After and try again. Other users' attempts do not slow you down in a place where you have signed in before.",
    },
    Explanation {
        code: Code(500),
        title: "Internal error",
        text: "The log has the details under the request id. The change was made completely or not at all; repeating the request with the same Idempotency-Key is safe.",
    },
    Explanation {
        code: Code(503),
        title: "A part of the platform is not available",
        text: "The database, the registry or the engine does not answer. Running apps continue. Try again after the seconds in Retry-After.",
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
