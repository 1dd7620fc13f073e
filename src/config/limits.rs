//! The section `limits`: the default limits of each tenant on counted resources. An admin can override them
//! for one tenant. The module `quotas` describes the resources.

use serde::{Deserialize, Serialize};

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident = $default:literal in $least:literal..=$most:literal;)*) => {
        /// Limits of each tenant, and of the platform's own rows.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Limits {
            $($(#[$doc])* pub $name: i64,)*
        }

        impl Default for Limits {
            fn default() -> Self {
                Self { $($name: $default,)* }
            }
        }

        impl Limits {
            /// Every key of the section.
            pub(super) const KEYS: &[&str] = &[$(stringify!($name),)*];

            /// Returns the limit of this name, if it is one of the settings.
            #[must_use]
            pub fn of(&self, name: &str) -> Option<i64> {
                match name {
                    $(stringify!($name) => Some(self.$name),)*
                    _ => None,
                }
            }

            pub(super) fn check(&self, faults: &mut Vec<String>) {
                $(if !($least..=$most).contains(&self.$name) {
                    faults.push(format!("limits.{} must be {} to {}", stringify!($name), $least, $most));
                })*
                if self.request_burst < self.requests_per_second {
                    faults.push("limits.request_burst must be at least limits.requests_per_second".into());
                }
            }
        }
    };
}

limits! {
    /// Repositories that have a manifest.
    repositories = 200 in 1..=100_000;
    /// Tags in all repositories together.
    tags = 10_000 in 1..=1_000_000;
    /// Manifests in all repositories together.
    manifests = 20_000 in 1..=1_000_000;
    /// Concurrent open uploads.
    open_uploads = 64 in 1..=10_000;
    /// Registry credentials that are neither revoked nor expired.
    registry_credentials = 100 in 1..=10_000;
    /// Service accounts that are not deleted.
    service_accounts = 50 in 1..=10_000;
    /// API tokens that are neither revoked nor expired.
    api_tokens = 200 in 1..=10_000;
    /// Open invitations.
    invitations = 100 in 1..=10_000;
    /// Members.
    members = 200 in 1..=100_000;
    /// Grants that are offered or accepted.
    grants = 200 in 1..=10_000;
    /// Egress targets that are requested or allowed.
    egress_targets = 100 in 1..=10_000;
    /// Releases kept for each app. Older releases are deleted unless they are in use.
    releases_kept = 100 in 2..=10_000;
    /// Requests of one tenant per second.
    requests_per_second = 200 in 1..=100_000;
    /// Requests of one tenant in a burst.
    request_burst = 600 in 1..=1_000_000;
    /// Changes of a tenant per day that the audit log keeps: creations, releases, pushes.
    changes_per_day = 20_000 in 100..=10_000_000;
    /// API tokens of platform accounts that are neither revoked nor expired.
    platform_tokens = 200 in 1..=10_000;
    /// Open invitations that belong to no tenant.
    platform_invitations = 200 in 1..=10_000;
}
