//! Quotas: how much of each shared resource one tenant may use. A resource is defined once, here: its name in
//! SQL and JSON, its label on a page, its unit, and how its use is measured. Rows hold tenant, resource, limit
//! and use.
//!
//! How to use it, within the caller's own transaction:
//! - an amount that is reserved and released (bytes, cores): [`reserve`] and [`release`];
//! - objects with rows of their own: [`take_place`], then insert. A caller that counts itself uses [`lock`] first,
//!   counts, then [`LockedResource::require_place`], so that two requests never take the same last place;
//! - a bound without a count (a rate, a retention): [`limit`].
//!
//! A transaction that locks several resources locks [`GATE`] first, to prevent deadlocks.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Error;
use crate::fault::{Code, Fault, Kind};

pub mod bounds;
mod input;
mod store;

pub use input::{QuotaInput, QuotaLimit, QuotaLimits, Size, print_cpu};
pub use store::{
    add_used, check_count, check_day, declare, enter, insert_rows, limit, lock, lock_platform, prune, read,
    read_counted, release, reserve, set_limits, take_place, take_platform_place,
};

/// The resource that a transaction locks first when it locks several.
pub const GATE: Resource = Resource::RegistryBytes;

/// How the use of a resource is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Reserved and released; the row stores the sum.
    Stored,
    /// The number of live rows of another table.
    Counted,
    /// Counts up and restarts each day (UTC).
    Daily,
    /// Not measured: a rate, a retention, or a bound that the kernel enforces.
    Bound,
    /// Counted rows that belong to no tenant.
    Platform,
}

/// The unit of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Thousandths of a core.
    Cpu,
    /// Bytes.
    Bytes,
    /// A number of objects.
    Count,
}

/// The definition of a resource.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// Name in SQL, in JSON and in the settings.
    pub name: &'static str,
    /// Label on pages.
    pub label: &'static str,
    /// Unit of amounts.
    pub unit: Unit,
    /// How the use is measured.
    pub how: How,
    /// Minimum and maximum limit that an admin may set.
    pub range: (i64, i64),
}

macro_rules! resources {
    ($($variant:ident $name:literal $label:literal $unit:ident $how:ident $least:expr, $most:expr;)*) => {
        /// A shared resource with a limit per tenant.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Resource { $(#[doc = $label] $variant,)* }

        impl Resource {
            /// Every resource, in the order of pages and faults.
            pub const ALL: &[Resource] = &[$(Resource::$variant,)*];

            /// Returns the definition.
            #[must_use]
            pub const fn definition(self) -> Definition {
                match self {
                    $(Self::$variant => Definition {
                        name: $name, label: $label, unit: Unit::$unit, how: How::$how, range: ($least, $most),
                    },)*
                }
            }
        }
    };
}

resources! {
    Cpu "cpu" "Cpu (cores)" Cpu Stored 10, 10_000_000;
    Memory "memory" "Memory" Bytes Stored 8 << 20, 1 << 50;
    Pids "pids" "Processes of all instances" Count Bound 64, 4_000_000;
    Apps "apps" "Apps" Count Stored 0, 1_000;
    Instances "instances" "Instances" Count Stored 0, 1_000;
    RegistryBytes "registry_bytes" "Images" Bytes Stored 0, 1 << 50;
    ImageBytes "image_bytes" "Images, unpacked" Bytes Stored 0, 1 << 52;
    Repositories "repositories" "Repositories" Count Counted 0, 100_000;
    Tags "tags" "Tags" Count Counted 0, 1_000_000;
    Manifests "manifests" "Manifests" Count Counted 0, 1_000_000;
    OpenUploads "open_uploads" "Open uploads" Count Counted 1, 10_000;
    RegistryCredentials "registry_credentials" "Registry credentials" Count Counted 0, 10_000;
    ServiceAccounts "service_accounts" "Service accounts" Count Counted 0, 10_000;
    ApiTokens "api_tokens" "API tokens" Count Counted 0, 10_000;
    Invitations "invitations" "Open invitations" Count Counted 0, 10_000;
    Members "members" "Members" Count Counted 1, 100_000;
    Grants "grants" "Grants" Count Counted 0, 10_000;
    EgressTargets "egress_targets" "Egress targets" Count Counted 0, 10_000;
    ReleasesKept "releases_kept" "Releases kept of each app" Count Bound 2, 10_000;
    RequestsPerSecond "requests_per_second" "Requests a second" Count Bound 1, 100_000;
    RequestBurst "request_burst" "Requests at once" Count Bound 1, 1_000_000;
    ChangesPerDay "changes_per_day" "Changes a day" Count Daily 100, 10_000_000;
    PlatformTokens "platform_tokens" "API tokens of the platform" Count Platform 1, 10_000;
    PlatformInvitations "platform_invitations" "Open invitations of the platform" Count Platform 1, 10_000;
}

impl Resource {
    /// Returns the name in SQL and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.definition().name
    }

    /// Returns the resource of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|resource| resource.name() == name)
    }

    /// Iterates over the resources that each tenant has a row of.
    pub fn of_tenants() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|resource| resource.definition().how != How::Platform)
    }

    /// Whether a tenant has its own limit from onboarding on. Other limits follow the settings until an admin
    /// sets one.
    #[must_use]
    pub fn is_own(self) -> bool {
        self.definition().how == How::Stored || self == Self::Pids
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Resource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One limit and its use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// The effective limit.
    pub limit: i64,
    /// The reserved, stored or counted use.
    pub used: i64,
}

impl Amount {
    /// Returns the remaining amount. Returns 0 if the limit was lowered below the use.
    #[must_use]
    pub fn left(self) -> i64 {
        self.limit.saturating_sub(self.used).max(0)
    }
}

/// Limits and use of one tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quota(BTreeMap<Resource, Amount>);

impl Quota {
    /// Returns limit and use of one resource. Both are 0 if the tenant has no row of it.
    #[must_use]
    pub fn of(&self, resource: Resource) -> Amount {
        self.0.get(&resource).copied().unwrap_or_default()
    }

    /// Sets the use of a counted resource.
    pub fn count(&mut self, resource: Resource, used: i64) {
        self.0.entry(resource).or_default().used = used;
    }

    /// Iterates over the resources, in the order of pages.
    pub fn iter(&self) -> impl Iterator<Item = (Resource, Amount)> {
        self.0.iter().map(|(resource, amount)| (*resource, *amount))
    }
}

impl FromIterator<(Resource, Amount)> for Quota {
    fn from_iter<T: IntoIterator<Item = (Resource, Amount)>>(rows: T) -> Self {
        Self(rows.into_iter().collect())
    }
}

impl Serialize for Quota {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(resource, amount)| (resource, shown(*resource, *amount))))
    }
}

/// Formats an amount for the API. Cpu uses the format of a spec, so that clients can send it back, and
/// thousandths under names of their own.
fn shown(resource: Resource, amount: Amount) -> serde_json::Value {
    let Definition { unit, how, .. } = resource.definition();
    let mut shown = if unit == Unit::Cpu {
        serde_json::json!({
            "limit": print_cpu(amount.limit), "used": print_cpu(amount.used),
            "limit_millis": amount.limit, "used_millis": amount.used,
        })
    } else {
        serde_json::json!({"limit": amount.limit, "used": amount.used})
    };
    if how == How::Bound
        && let Some(shown) = shown.as_object_mut()
    {
        shown.remove("used");
    }
    shown
}

impl<'de> Deserialize<'de> for Quota {
    /// Skips names that this version does not know: a newer replica may have added them.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let rows = BTreeMap::<String, Amount>::deserialize(deserializer)?;
        Ok(rows.into_iter().filter_map(|(name, amount)| Some((Resource::by_name(&name)?, amount))).collect())
    }
}

/// A resource whose row is locked until the transaction ends.
#[derive(Debug, Clone, Copy)]
#[must_use = "count the rows under this lock"]
pub struct LockedResource {
    /// The resource.
    pub resource: Resource,
    /// The effective limit and the stored use.
    pub amount: Amount,
}

impl LockedResource {
    /// Requires room for one more row beside `count` live rows. Count after the lock.
    pub fn require_place(self, count: i64) -> Result<(), Error> {
        self.require(count, 1)
    }

    /// Requires room for `asked` more beside `used`.
    pub fn require(self, used: i64, asked: i64) -> Result<(), Error> {
        let amount = Amount { used, ..self.amount };
        if asked <= amount.limit.saturating_sub(used) {
            Ok(())
        } else {
            Err(exceeded(self.resource, amount, asked))
        }
    }
}

/// Builds the error of an exceeded quota: resource, limit, use, requested amount, and the next step.
#[must_use]
pub fn exceeded(resource: Resource, amount: Amount, asked: i64) -> Error {
    let Definition { name, label, unit, how, .. } = resource.definition();
    let tell = |n: i64| if unit == Unit::Cpu { print_cpu(n) } else { n.to_string() };
    let unit = match unit {
        Unit::Cpu => " cores",
        Unit::Bytes => " bytes",
        Unit::Count => "",
    };
    let raise = format!(
        "ask an admin for a larger limit: PATCH /api/v1/tenants/TENANT {{\"quota\": {{\"{name}\": N}}}}"
    );
    let instead = match how {
        How::Platform => {
            format!("revoke those that are no longer used, or raise limits.{name} in the settings of serve")
        }
        How::Counted => format!("delete or revoke those that are no longer used, or {raise}"),
        How::Daily => {
            format!("wait for the next day (UTC), or {raise}; what is revoked or deleted is never refused")
        }
        How::Stored | How::Bound => format!("free some, or {raise}"),
    };
    Error::QuotaExceeded(vec![
        Fault::new(
            Code(423),
            Kind::Quota,
            name,
            format!(
                "{label}: limit {}{unit}, used {}, asked {}, left {}",
                tell(amount.limit),
                tell(amount.used),
                tell(asked),
                tell(amount.left())
            ),
        )
        .because("each tenant has a limit for every shared resource")
        .instead(instead),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_resource_has_one_name() {
        for resource in Resource::ALL {
            assert_eq!(Resource::by_name(resource.name()), Some(*resource));
            let (least, most) = resource.definition().range;
            assert!(0 <= least && least < most);
        }
        assert_eq!(Resource::by_name("nothing"), None);
        assert_eq!(Resource::of_tenants().count(), Resource::ALL.len() - 2);
    }

    #[test]
    fn the_last_place_is_a_place_and_no_sum_overflows() {
        let held =
            |limit| LockedResource { resource: Resource::ApiTokens, amount: Amount { limit, used: 0 } };
        assert!(held(3).require_place(2).is_ok());
        assert!(held(3).require_place(3).is_err());
        assert!(held(3).require_place(i64::MAX).is_err());
        assert!(held(i64::MAX).require(0, i64::MAX).is_ok());
        assert!(held(i64::MAX).require(1, i64::MAX).is_err());
        let Err(Error::QuotaExceeded(faults)) = held(3).require_place(3) else { panic!() };
        let told = serde_json::to_string(&faults).unwrap();
        for part in ["API tokens", "limit 3", "used 3", "asked 1", "PATCH /api/v1/tenants/TENANT"] {
            assert!(told.contains(part), "{part}: {told}");
        }
    }

    #[test]
    fn a_quota_reads_what_it_writes_and_passes_over_what_it_does_not_know() {
        let text = r#"{"apps": {"limit": 5, "used": 2}, "unicorns": {"limit": 1, "used": 1}, "pids": {"limit": 9, "used": 0}}"#;
        let quota: Quota = serde_json::from_str(text).unwrap();
        assert_eq!(quota.of(Resource::Apps), Amount { limit: 5, used: 2 });
        assert_eq!(
            serde_json::to_value(&quota).unwrap(),
            serde_json::json!({"apps": {"limit": 5, "used": 2}, "pids": {"limit": 9}})
        );
    }
}
