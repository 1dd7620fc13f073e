//! What an app takes from its tenant's quota. A rolling update runs one extra instance at a time;
//! that one stays reserved, so that a rollback or a repair never meets a full quota. While a
//! change is under way the larger of old and new counts, for number and for size.

use serde::Serialize;

use super::spec::AppSpec;
use crate::fault::{Code, Fault, Kind};
use crate::quotas::{Amount, Quota, Resource};

/// The largest of what still runs and what shall run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peak {
    /// Instances, without the extra one.
    pub instances: i64,
    /// The extra one for rolling updates: 1, or 0 for `singleton` and for 0 instances.
    pub surge: i64,
    /// Thousandths of a core of one instance.
    pub cpu_millis: i64,
    /// Bytes of one instance.
    pub memory: i64,
}

/// What is taken from the quota.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Reserved {
    /// Thousandths of a core.
    pub cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Instances.
    pub instances: i64,
}

impl Peak {
    /// Of a spec alone.
    #[must_use]
    pub fn of(spec: &AppSpec) -> Self {
        let instances = i64::from(spec.instances());
        Self {
            instances,
            surge: i64::from(!spec.singleton() && instances > 0),
            cpu_millis: i64::from(spec.cpu_millis()),
            memory: i64::try_from(spec.memory()).unwrap_or(i64::MAX),
        }
    }

    /// While one gives way to the other.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            instances: self.instances.max(other.instances),
            surge: self.surge.max(other.surge),
            cpu_millis: self.cpu_millis.max(other.cpu_millis),
            memory: self.memory.max(other.memory),
        }
    }

    /// What it takes from the quota.
    #[must_use]
    pub fn reserved(self) -> Reserved {
        let instances = self.instances + self.surge;
        Reserved {
            cpu: instances.saturating_mul(self.cpu_millis),
            memory: instances.saturating_mul(self.memory),
            instances,
        }
    }

    /// In words, as in "1 running + 1 for updates".
    #[must_use]
    pub fn words(self) -> String {
        match (self.instances, self.surge) {
            (0, _) => "stopped: nothing is reserved".to_owned(),
            (n, 0) => format!("{n} running"),
            (n, s) => format!("{n} running + {s} for updates"),
        }
    }
}

/// What a change asks for beyond what the app has already.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// What the app has reserved; nothing when it is new.
    before: Option<Reserved>,
    /// What it needs until the change is through.
    after: Reserved,
    /// What it needs from then on.
    alone: Reserved,
}

impl Asked {
    /// For an app that is to become what is wanted; `known` is what it has reserved, unless it is new.
    #[must_use]
    pub fn new(known: Option<Peak>, wanted: Peak) -> Self {
        Self {
            before: known.map(Peak::reserved),
            after: known.map_or(wanted, |known| known.max(wanted)).reserved(),
            alone: wanted.reserved(),
        }
    }
}

/// Holds what is asked against what is left: a fault for each resource that does not suffice. Only
/// what grows is refused, so that a tenant over a lowered limit can still make an app smaller.
#[must_use]
pub fn check(quota: &Quota, asked: Asked) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut hold = |path: &str, unit: &str, amount: Amount, [before, after, alone]: [i64; 3]| {
        let left = amount.limit - (amount.used - before);
        if after > before && after > left {
            let (because, instead) = if alone > left {
                (
                    "instances run at their full size, and one extra is kept for rolling updates",
                    "make it smaller, set singleton: true (no extra instance), or ask for a larger quota",
                )
            } else {
                (
                    "until an update is through, the larger number of instances and the larger size of one count, \
                     old and new together",
                    "change what becomes smaller first, and what becomes larger once that runs",
                )
            };
            faults.push(
                Fault::new(
                    Code(423),
                    Kind::Quota,
                    path,
                    format!(
                        "not enough {unit}: limit {}, used by other apps {}, asked {after}, left {}",
                        amount.limit,
                        amount.used - before,
                        left.max(0)
                    ),
                )
                .because(because)
                .instead(instead),
            );
        }
    };
    let of = |amount: fn(&Reserved) -> i64| {
        [asked.before.as_ref().map_or(0, amount), amount(&asked.after), amount(&asked.alone)]
    };
    hold("cpu", "cpu (thousandths of a core)", quota.of(Resource::Cpu), of(|r| r.cpu));
    hold("memory", "memory (bytes)", quota.of(Resource::Memory), of(|r| r.memory));
    hold("instances", "instances", quota.of(Resource::Instances), of(|r| r.instances));
    hold("", "apps", quota.of(Resource::Apps), [i64::from(asked.before.is_some()), 1, 1]);
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(limit: i64, used: i64) -> Quota {
        let amount = Amount { limit, used };
        [Resource::Cpu, Resource::Memory, Resource::Apps, Resource::Instances]
            .map(|resource| (resource, amount))
            .into_iter()
            .collect()
    }

    const ONE: Peak = Peak { instances: 2, surge: 1, cpu_millis: 10, memory: 20 };

    #[test]
    fn an_update_keeps_the_larger_of_both_and_one_more() {
        let both = ONE.max(Peak { instances: 1, surge: 1, cpu_millis: 30, memory: 5 });
        assert_eq!(both.reserved(), Reserved { cpu: 90, memory: 60, instances: 3 });
        assert_eq!(both.words(), "2 running + 1 for updates");
    }

    #[test]
    fn what_does_not_fit_is_said_with_its_numbers() {
        let asked = Asked::new(None, ONE);
        assert!(check(&quota(100, 0), asked).is_empty());
        let faults = check(&quota(25, 5), asked);
        let paths: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
        assert_eq!(paths, ["cpu", "memory"]);
        assert!(faults[0].message.contains("limit 25, used by other apps 5, asked 30, left 20"));
    }

    #[test]
    fn over_a_lowered_limit_smaller_is_still_possible() {
        let smaller = Peak { instances: 1, ..ONE };
        assert!(check(&quota(1, 60), Asked::new(Some(ONE), smaller)).is_empty());
        assert!(!check(&quota(1, 60), Asked::new(Some(smaller), ONE)).is_empty());
    }

    #[test]
    fn what_only_the_way_there_is_too_large_for_is_said_so() {
        let many = Peak { instances: 14, surge: 1, cpu_millis: 10, memory: 20 };
        let large = Peak { instances: 1, surge: 1, cpu_millis: 250, memory: 20 };
        let faults = check(&quota(1_000, 150), Asked::new(Some(many), large));
        assert_eq!(faults.len(), 1);
        assert!(faults[0].message.contains("asked 3750"), "{}", faults[0].message);
        let told = serde_json::to_string(&faults[0]).unwrap();
        assert!(told.contains("old and new together") && told.contains("becomes smaller first"), "{told}");
        // Too large in any case.
        let faults = check(&quota(400, 150), Asked::new(Some(many), large));
        let told = serde_json::to_string(&faults[0]).unwrap();
        assert!(told.contains("ask for a larger quota"), "{told}");
    }
}
