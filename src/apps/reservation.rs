//! The quota that an app reserves. A rolling update runs one extra instance at a time. The reservation for it
//! stays, so a rollback or a repair never fails for lack of quota. During a change, old and new instances count
//! together, each with its own size.

use serde::ser::{Serialize, SerializeStruct as _, Serializer};

use super::spec::AppSpec;
use crate::fault::{Code, Fault, Kind};
use crate::quotas::{Amount, Quota, Resource, print_cpu};

/// The largest demand among the releases that still run and the desired one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peak {
    /// Instances without the extra one for updates.
    pub instances: i64,
    /// Extra instances for rolling updates: 1, or 0 for `singleton` and for 0 instances.
    pub surge: i64,
    /// Thousandths of a core of one instance.
    pub cpu_millis: i64,
    /// Bytes of one instance.
    pub memory: i64,
}

/// Amounts reserved in the quota. Answers contain cpu in the form of a spec and in thousandths.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Thousandths of a core.
    pub cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Instances.
    pub instances: i64,
}

impl Serialize for Reserved {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Reserved", 4)?;
        fields.serialize_field("cpu", &print_cpu(self.cpu))?;
        fields.serialize_field("cpu_millis", &self.cpu)?;
        fields.serialize_field("memory", &self.memory)?;
        fields.serialize_field("instances", &self.instances)?;
        fields.end()
    }
}

impl Peak {
    /// Returns the demand of one spec.
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

    /// Returns the larger value of each field, for the time in which both run.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            instances: self.instances.max(other.instances),
            surge: self.surge.max(other.surge),
            cpu_millis: self.cpu_millis.max(other.cpu_millis),
            memory: self.memory.max(other.memory),
        }
    }

    /// Returns the quota that this demand reserves.
    #[must_use]
    pub fn reserved(self) -> Reserved {
        let instances = self.instances + self.surge;
        Reserved {
            cpu: instances.saturating_mul(self.cpu_millis),
            memory: instances.saturating_mul(self.memory),
            instances,
        }
    }

    /// Describes the instances, such as "1 running + 1 for updates".
    #[must_use]
    pub fn words(self) -> String {
        match (self.instances, self.surge) {
            (0, _) => "stopped: nothing is reserved".to_owned(),
            (n, 0) => format!("{n} running"),
            (n, s) => format!("{n} running + {s} for updates"),
        }
    }
}

/// Returns the largest sum of sizes when at most `places` instances run, old and new ones together.
fn together(places: i64, (old, old_size): (i64, i64), (new, new_size): (i64, i64)) -> i64 {
    let (first, then) = if new_size >= old_size {
        ((new, new_size), (old, old_size))
    } else {
        ((old, old_size), (new, new_size))
    };
    let many = first.0.min(places);
    let rest = then.0.min(places - many);
    many.saturating_mul(first.1).saturating_add(rest.saturating_mul(then.1))
}

/// Returns the largest demand while an app changes from `known` to `wanted`. `known` holds the largest number
/// and size of the running instances, and their reservation.
fn moving((known, reserved): (Peak, Reserved), wanted: Peak) -> Reserved {
    let places = known.max(wanted).reserved().instances;
    let alone = wanted.reserved();
    let sum = |held: i64, after: i64, old_size: i64, new_size: i64| {
        // A singleton's old instance ends before the new one starts.
        let most = if wanted.surge == 0 {
            held
        } else {
            let old = (known.reserved().instances, old_size);
            let both = together(places, old, (wanted.instances, new_size));
            both.min(held.saturating_add(wanted.instances.saturating_mul(new_size)))
        };
        most.max(after)
    };
    Reserved {
        cpu: sum(reserved.cpu, alone.cpu, known.cpu_millis, wanted.cpu_millis),
        memory: sum(reserved.memory, alone.memory, known.memory, wanted.memory),
        instances: places,
    }
}

/// A change's demand beyond the app's current reservation.
#[derive(Debug, Clone, Copy)]
pub struct ReservationChange {
    /// Current reservation; none for a new app.
    before: Option<Reserved>,
    /// Reservation until the change is complete.
    after: Reserved,
    /// Demand after the change.
    wanted: Peak,
}

impl ReservationChange {
    /// Builds the demand of a change to `wanted`. `known` is the app's current demand and reservation; none for
    /// a new app.
    #[must_use]
    pub fn new(known: Option<(Peak, Reserved)>, wanted: Peak) -> Self {
        Self {
            before: known.map(|(_, reserved)| reserved),
            after: known.map_or_else(|| wanted.reserved(), |known| moving(known, wanted)),
            wanted,
        }
    }

    /// Returns the reservation until the change is complete.
    #[must_use]
    pub fn after(self) -> Reserved {
        self.after
    }
}

/// Formats an amount.
fn tell(resource: Resource, amount: i64) -> String {
    match resource {
        Resource::Cpu => print_cpu(amount),
        Resource::Memory if amount % (1 << 20) == 0 => format!("{}Mi", amount >> 20),
        _ => amount.to_string(),
    }
}

/// Suggests changes to the exceeded resource that would fit the quota.
fn advice(resource: Resource, wanted: Peak, left: i64) -> String {
    let left = left.max(0);
    let mut ways = Vec::new();
    let (size, least) = match resource {
        Resource::Cpu => (wanted.cpu_millis, 10),
        Resource::Memory => (wanted.memory, i64::try_from(super::spec::LEAST_MEMORY).unwrap_or(i64::MAX)),
        _ => (1, i64::MAX),
    };
    let places = wanted.instances + wanted.surge;
    // Users write whole numbers of Mi.
    let fits = left / places.max(1);
    let fits = if resource == Resource::Memory { fits >> 20 << 20 } else { fits };
    if fits >= least {
        ways.push(format!("{resource}: {} or less for each of {places}", tell(resource, fits)));
    }
    let number = left / size.max(1) - wanted.surge;
    if resource != Resource::Apps && (1..wanted.instances).contains(&number) {
        ways.push(format!("instances: {number} or less"));
    }
    if resource != Resource::Apps && (wanted.instances, wanted.surge) == (1, 1) && size <= left {
        ways.push("singleton: true (no extra instance for updates)".to_owned());
    }
    let other = if resource == Resource::Apps { "delete an app" } else { "stop or delete another app" };
    ways.push(other.to_owned());
    let name = resource.name();
    format!(
        "{}, or ask an admin for more {name}: PATCH /api/v1/tenants/TENANT {{\"quota\": {{\"{name}\": ...}}}}",
        ways.join(", ")
    )
}

/// Compares a change with the remaining quota and returns a fault for each exceeded resource. Only growth is
/// refused: a tenant over a lowered limit can still shrink an app.
#[must_use]
pub fn check(quota: &Quota, asked: ReservationChange) -> Vec<Fault> {
    let mut faults = Vec::new();
    let alone = asked.wanted.reserved();
    let mut hold = |path: &str, words: &str, resource: Resource, [before, after, alone]: [i64; 3]| {
        let amount: Amount = quota.of(resource);
        let left = amount.limit - (amount.used - before);
        if after <= before || after <= left {
            return;
        }
        let (because, instead) = if alone > left {
            let because = match resource {
                Resource::Apps => "each app counts, stopped ones too",
                _ if asked.wanted.surge == 0 => "instances run at their full size",
                _ => "instances run at their full size, and one extra is kept for rolling updates",
            };
            (because, advice(resource, asked.wanted, left))
        } else {
            (
                "old and new instances run together until an update is complete, each with its own size",
                format!(
                    "first deploy the change that lowers {}; deploy the increase once that release runs",
                    resource.name()
                ),
            )
        };
        let tell = |n: i64| tell(resource, n);
        let message = format!(
            "not enough {words}: limit {}, used by other apps {}, asked {}, left {}",
            tell(amount.limit),
            tell(amount.used - before),
            tell(after),
            tell(left.max(0))
        );
        faults.push(Fault::new(Code(423), Kind::Quota, path, message).because(because).instead(instead));
    };
    let of = |amount: fn(&Reserved) -> i64| {
        [asked.before.as_ref().map_or(0, amount), amount(&asked.after), amount(&alone)]
    };
    hold("cpu", "cpu (cores)", Resource::Cpu, of(|r| r.cpu));
    hold("memory", "memory", Resource::Memory, of(|r| r.memory));
    hold("instances", "instances", Resource::Instances, of(|r| r.instances));
    hold("", "apps", Resource::Apps, [i64::from(asked.before.is_some()), 1, 1]);
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

    fn known(peak: Peak) -> (Peak, Reserved) {
        (peak, peak.reserved())
    }

    fn told(faults: &[Fault]) -> Vec<(&str, &str)> {
        faults.iter().map(|fault| (fault.path.as_str(), fault.suggestion.as_deref().unwrap())).collect()
    }

    #[test]
    fn what_does_not_fit_is_said_with_its_numbers() {
        let asked = ReservationChange::new(None, ONE);
        assert!(check(&quota(100, 0), asked).is_empty());
        let faults = check(&quota(25, 5), asked);
        let paths: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
        assert_eq!(paths, ["cpu", "memory"]);
        assert!(faults[0].message.contains("limit 25m, used by other apps 5m, asked 30m, left 20m"));
    }

    #[test]
    fn the_advice_is_about_what_is_short() {
        let roomy = |resource: Resource, limit: i64| -> Quota {
            let all = [Resource::Cpu, Resource::Memory, Resource::Apps, Resource::Instances];
            let limit = |of: Resource| if of == resource { limit } else { 1 << 40 };
            all.map(|of| (of, Amount { limit: limit(of), used: 0 })).into_iter().collect()
        };
        let wanted = Peak { instances: 3, surge: 1, cpu_millis: 500, memory: 256 << 20 };
        let asked = ReservationChange::new(None, wanted);
        let faults = check(&roomy(Resource::Cpu, 1_600), asked);
        let [("cpu", cpu)] = told(&faults)[..] else { panic!("{faults:?}") };
        assert!(cpu.starts_with("cpu: 400m or less for each of 4, instances: 2 or less,"), "{cpu}");
        assert!(!cpu.contains("memory") && !cpu.contains("singleton"), "{cpu}");
        let faults = check(&roomy(Resource::Memory, 600 << 20), asked);
        let [("memory", memory)] = told(&faults)[..] else { panic!("{faults:?}") };
        assert!(memory.starts_with("memory: 150Mi or less for each of 4, instances: 1 or less,"), "{memory}");
        let faults = check(&roomy(Resource::Instances, 3), asked);
        let [("instances", number)] = told(&faults)[..] else { panic!("{faults:?}") };
        assert!(number.starts_with("instances: 2 or less,"), "{number}");
        let faults = check(&roomy(Resource::Apps, 0), asked);
        let [("", apps)] = told(&faults)[..] else { panic!("{faults:?}") };
        assert!(apps.starts_with("delete an app, or ask an admin for more apps"), "{apps}");
        let one = Peak { instances: 1, ..wanted };
        let faults = check(&roomy(Resource::Cpu, 700), ReservationChange::new(None, one));
        assert!(
            told(&faults)[0].1.contains("cpu: 350m or less for each of 2, singleton: true"),
            "{faults:?}"
        );
        // A spec that follows the advice fits.
        let smaller = Peak { cpu_millis: 400, ..wanted };
        assert!(check(&roomy(Resource::Cpu, 1_600), ReservationChange::new(None, smaller)).is_empty());
    }

    #[test]
    fn over_a_lowered_limit_smaller_is_still_possible() {
        let smaller = Peak { instances: 1, ..ONE };
        assert!(check(&quota(1, 60), ReservationChange::new(Some(known(ONE)), smaller)).is_empty());
        assert!(!check(&quota(1, 60), ReservationChange::new(Some(known(smaller)), ONE)).is_empty());
    }

    #[test]
    fn a_change_of_number_and_size_counts_what_is_really_there() {
        let many = Peak { instances: 14, surge: 1, cpu_millis: 10, memory: 20 };
        let large = Peak { instances: 1, surge: 1, cpu_millis: 250, memory: 20 };
        // Fourteen old instances and the new one take 390m; afterwards two new ones take 500m.
        let asked = ReservationChange::new(Some(known(many)), large);
        assert_eq!(asked.after(), Reserved { cpu: 500, memory: 300, instances: 15 });
        assert!(check(&quota(1_000, 150), asked).is_empty());
        // The reverse change: at most two large instances, and small ones in the other places.
        let back = ReservationChange::new(Some(known(large)), many);
        assert_eq!(back.after().cpu, 2 * 250 + 13 * 10);
        // With the same number, the extra instance has the larger size.
        let grown = Peak { cpu_millis: 250, ..many };
        assert_eq!(ReservationChange::new(Some(known(many)), grown).after().cpu, 15 * 250);
        // Another change before the last one is complete: the current reservation plus the new instances.
        let held = (many.max(large), asked.after());
        assert_eq!(ReservationChange::new(Some(held), large).after().cpu, 500 + 250);
        // A singleton ends before its successor starts.
        let single = Peak { surge: 0, ..large };
        assert_eq!(ReservationChange::new(Some(known(many)), single).after().cpu, 250);
        assert_eq!(
            ReservationChange::new(Some(known(single)), Peak { cpu_millis: 100, ..single }).after().cpu,
            250
        );
    }

    #[test]
    fn what_only_the_way_there_is_too_large_for_is_said_so() {
        let many = Peak { instances: 14, surge: 1, cpu_millis: 100, memory: 20 };
        let large = Peak { instances: 1, surge: 1, cpu_millis: 700, memory: 20 };
        let faults = check(&quota(1_900, 1_500), ReservationChange::new(Some(known(many)), large));
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].message.contains("asked 2100m, left 1900m"), "{}", faults[0].message);
        assert!(told(&faults)[0].1.contains("change that lowers cpu"), "{faults:?}");
        // Too large even without an update.
        let faults = check(&quota(1_000, 900), ReservationChange::new(None, large));
        assert!(told(&faults)[0].1.contains("ask an admin for more cpu"), "{faults:?}");
    }
}
