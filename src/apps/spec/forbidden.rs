//! Field names of other platforms, each with an explanation. Spellings are folded: `hostNetwork`,
//! `host_network` and `host-network` are the same name. The list follows the Pod Security Standards with their
//! Compose, Marathon, Nomad and Kubernetes spellings.

use crate::fault::Code;
use crate::fault::catalogue as code;

/// The explanation of a forbidden name.
pub(super) struct Forbidden {
    pub(super) code: Code,
    pub(super) reason: &'static str,
    pub(super) instead: &'static str,
}

struct Class {
    code: Code,
    reason: &'static str,
    instead: &'static str,
    names: &'static [&'static str],
}

const CLASSES: &[Class] = &[
    Class {
        code: code::PRIVILEGE,
        reason: "privileges would let one tenant reach another; no app has any",
        instead: "leave it out: the app runs without capabilities, with system calls filtered and read-only files",
        names: &[
            "privileged",
            "capadd",
            "capdrop",
            "capabilities",
            "securitycontext",
            "podsecuritycontext",
            "securityopt",
            "allowprivilegeescalation",
            "nonewprivileges",
            "seccomp",
            "seccompprofile",
            "apparmor",
            "apparmorprofile",
            "selinux",
            "selinuxoptions",
            "procmount",
            "sysctl",
            "sysctls",
            "unmask",
            "readonly",
            "readonlyrootfilesystem",
            "ulimits",
            "runtime",
            "runtimeclass",
            "runtimeclassname",
            "oomkilldisable",
            "oomscoreadj",
            "cgroupparent",
            "cgroup",
            "usernsmode",
            "userns",
            "hostusers",
            "credentialspec",
            "isolation",
            "windowsoptions",
            "hostprocess",
            "kernelargs",
            "customdockerrunoptions",
            "parameters",
            "useapisocket",
            "shmsize",
            "storageopt",
            "devicecgrouprules",
            "cpurtperiod",
            "cpurtruntime",
            "memswappiness",
            "memswaplimit",
        ],
    },
    Class {
        code: code::HOST,
        reason: "no app can access the host",
        instead: "leave it out; list the destinations that the app needs under connects",
        names: &[
            "hostnetwork",
            "hostpid",
            "hostipc",
            "hostuts",
            "pid",
            "ipc",
            "uts",
            "pidmode",
            "ipcmode",
            "utsmode",
            "networkmode",
            "hostpath",
            "hostport",
            "hostip",
            "hostports",
            "devices",
            "device",
            "gpus",
            "deviceplugin",
            "hostaliases",
            "extrahosts",
            "shareprocessnamespace",
            "nodename",
            "bind",
            "binds",
        ],
    },
    Class {
        code: code::IDENTITY,
        reason: "the platform assigns host ids: each app has its own block, which is never reused",
        instead: "set USER in the Dockerfile: inside, the app runs as that user",
        names: &[
            "user",
            "uid",
            "gid",
            "group",
            "groups",
            "groupadd",
            "runasuser",
            "runasgroup",
            "runasnonroot",
            "fsgroup",
            "fsgroupchangepolicy",
            "supplementalgroups",
            "supplementalgroupspolicy",
            "serviceaccount",
            "serviceaccountname",
            "automountserviceaccounttoken",
            "needstoken",
        ],
    },
    Class {
        code: code::NETWORK,
        reason: "the platform assigns names and addresses and allows only the connections that a spec lists",
        instead: "use port for the one port that the app serves on, and connects for its destinations",
        names: &[
            "ports",
            "exposedports",
            "publish",
            "networks",
            "network",
            "dns",
            "dnspolicy",
            "dnsconfig",
            "dnssearch",
            "dnsopt",
            "hostname",
            "domainname",
            "subdomain",
            "macaddress",
            "ipaddress",
            "ipv4address",
            "links",
            "externallinks",
            "externalips",
            "externalname",
            "nodeport",
            "loadbalancer",
            "loadbalancerip",
            "service",
            "services_",
            "ingress",
            "host",
            "headers",
            "httpheaders",
            "vhost",
            "containerport",
            "targetport",
            "serviceport",
            "sethostnameasfqdn",
            "hostnameoverride",
        ],
    },
    Class {
        code: code::STORAGE,
        reason: "a spec cannot mount files of the host or of other tenants",
        instead: "use scratch: {/path: 64Mi} for files that may be lost when the instance ends",
        names: &[
            "volumemounts",
            "mounts",
            "mount",
            "tmpfs",
            "volumesfrom",
            "configs",
            "configmap",
            "configmaps",
            "emptydir",
            "persistentvolumeclaim",
            "subpath",
            "volumedevices",
            "disk",
            "diskquota",
            "envfile",
            "envfrom",
            "files",
            "labelfile",
            "projected",
            "csi",
            "downwardapi",
        ],
    },
    Class {
        code: code::ORCHESTRATOR,
        reason: "the platform decides this, and treats every app the same",
        instead: "leave it out",
        names: &[
            "restart",
            "restartpolicy",
            "labels",
            "annotations",
            "metadata",
            "apiversion",
            "kind",
            "initcontainers",
            "sidecars",
            "sidecar",
            "containers",
            "ephemeralcontainers",
            "lifecycle",
            "poststart",
            "prestop",
            "hooks",
            "exec",
            "imagepullpolicy",
            "pullpolicy",
            "imagepullsecrets",
            "nodeselector",
            "nodefeatures",
            "affinity",
            "tolerations",
            "constraints",
            "placement",
            "schedulername",
            "priorityclassname",
            "priority",
            "logging",
            "logdriver",
            "containername",
            "build",
            "develop",
            "dependson",
            "extends",
            "include",
            "profiles",
            "platform",
            "stdin",
            "stdinopen",
            "tty",
            "workingdir",
            "init",
            "terminationmessagepath",
            "topologyspreadconstraints",
            "finalizers",
            "ownerreferences",
            "deploy",
            "strategy",
            "updateconfig",
            "upgradestrategy",
            "provider",
        ],
    },
    Class {
        code: code::NETWORK,
        reason: "the destinations of an app are listed under connects",
        instead: "use connects: {services: [...], apps: [...], egress: [...]}",
        names: &["services", "egress", "networkpolicy", "allowedhosts"],
    },
    Class {
        code: code::NOT_YET,
        reason: "this version does not support it yet",
        instead: "leave it out for now",
        names: &[
            "secrets",
            "expose",
            "metrics",
            "volumes",
            "spread",
            "spreadgroup",
            "topics",
            "autoscaling",
            "jobs",
            "schedule",
            "cron",
            "gpu",
        ],
    },
];

/// Other platforms' names for fields of this format.
const RENAMED: &[(&str, &str)] = &[
    ("replicas", "instances"),
    ("count", "instances"),
    ("scale", "instances"),
    ("environment", "env"),
    ("variables", "env"),
    ("entrypoint", "command"),
    ("cmd", "args"),
    ("cpus", "cpu"),
    ("mem", "memory"),
    ("memlimit", "memory"),
    ("limits", "cpu and memory"),
    ("requests", "cpu and memory"),
    ("resources", "cpu and memory"),
    ("healthcheck", "health"),
    ("livenessprobe", "health"),
    ("readinessprobe", "health"),
    ("startupprobe", "health"),
    ("stopgraceperiod", "stop_grace"),
    ("terminationgraceperiodseconds", "stop_grace"),
    ("killtimeout", "stop_grace"),
    ("singleinstance", "singleton"),
    ("httpget", "http"),
    ("tcpsocket", "tcp"),
    ("initialdelayseconds", "grace"),
    ("startperiod", "grace"),
    ("id", "name"),
    ("version", "spec"),
];

/// Folds all spellings of a name into one.
fn fold(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// Returns the explanation if another platform uses this name.
pub(super) fn look_up(name: &str) -> Option<Forbidden> {
    let folded = fold(name);
    CLASSES.iter().find(|class| class.names.contains(&folded.as_str())).map(|class| Forbidden {
        code: class.code,
        reason: class.reason,
        instead: class.instead,
    })
}

/// Returns the field of this format that the name stands for.
pub(super) fn renamed(name: &str) -> Option<&'static str> {
    let folded = fold(name);
    RENAMED.iter().find(|(theirs, _)| *theirs == folded).map(|(_, ours)| *ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_are_one_and_no_name_stands_twice() {
        for name in ["hostNetwork", "host_network", "host-network", "HostNetwork"] {
            assert_eq!(look_up(name).unwrap().code, code::HOST, "{name}");
        }
        let mut all: Vec<_> = CLASSES.iter().flat_map(|class| class.names).copied().collect();
        all.extend(RENAMED.iter().map(|(name, _)| *name));
        let count = all.len();
        assert!(count > 180, "{count}");
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
