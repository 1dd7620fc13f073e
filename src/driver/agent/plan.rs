//! Plans the next steps of one app: a pure function of the desired and the observed state.

use crate::driver::workload::{Update, Workload};

/// The parts of an instance that the plan needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlannedInstance {
    /// Number.
    pub(super) number: u32,
    /// Revision of its release.
    pub(super) revision: i64,
    /// Whether it runs and is healthy.
    pub(super) well: bool,
    /// Whether it is already being stopped.
    pub(super) stopping: bool,
    /// Index of its address among the app's addresses.
    pub(super) slot: usize,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InstanceStep {
    /// Create an instance of the desired revision at this address.
    Create(usize),
    /// Stop and remove an instance.
    Stop(u32),
}

/// Returns the next steps. Each round takes the steps that are safe now; the next round plans again.
#[must_use]
pub(super) fn plan(workload: &Workload, parts: &[PlannedInstance]) -> Vec<InstanceStep> {
    let wanted = workload.instances as usize;
    let current = |part: &&PlannedInstance| part.revision == workload.revision && !part.stopping;
    let old = |part: &&PlannedInstance| part.revision != workload.revision && !part.stopping;
    let new_count = parts.iter().filter(current).count();
    let new_well = parts.iter().filter(current).filter(|part| part.well).count();
    let old_count = parts.iter().filter(old).count();
    let old_well = parts.iter().filter(old).filter(|part| part.well).count();
    let free = |taken: &[usize]| {
        (0..workload.addresses.len())
            .find(|slot| !taken.contains(slot) && !parts.iter().any(|part| part.slot == *slot))
    };
    let mut steps = Vec::new();
    // Too many instances of the desired revision: unhealthy ones stop first, then the youngest.
    if new_count > wanted {
        let mut excess: Vec<&PlannedInstance> = parts.iter().filter(current).collect();
        excess.sort_by_key(|part| (part.well, std::cmp::Reverse(part.number)));
        steps.extend(excess.iter().take(new_count - wanted).map(|part| InstanceStep::Stop(part.number)));
    }
    // Old instances: unhealthy ones stop at once, healthy ones when enough others are healthy.
    let replace = workload.update == Update::Replace || wanted == 0;
    let mut well_left = old_well;
    let mut olds: Vec<&PlannedInstance> = parts.iter().filter(old).collect();
    olds.sort_by_key(|part| (part.well, part.number));
    for part in olds {
        let spare = if part.well { new_well + well_left > wanted } else { new_count > 0 || old_count > 1 };
        if replace || spare || wanted == 0 {
            steps.push(InstanceStep::Stop(part.number));
            if part.well {
                well_left -= 1;
            }
        }
    }
    // New instances: while old ones exist, one at a time, and only when the last new one is healthy.
    let busy = parts.iter().any(|part| part.stopping && part.revision != workload.revision);
    let held = match workload.update {
        Update::Replace => old_count > 0 || parts.iter().any(|part| part.stopping),
        Update::Rolling => (old_count > 0 || busy) && new_count > new_well,
    };
    if new_count < wanted && !held {
        let at_once = if old_count > 0 || busy { 1 } else { wanted - new_count };
        let mut taken = Vec::new();
        for _ in 0..at_once {
            if let Some(slot) = free(&taken) {
                taken.push(slot);
                steps.push(InstanceStep::Create(slot));
            } else if steps.is_empty() && !parts.iter().any(|part| part.stopping) {
                // No address is free, and none becomes free: an old instance must stop, an unhealthy one first.
                if let Some(part) = parts.iter().filter(old).min_by_key(|part| (part.well, part.number)) {
                    steps.push(InstanceStep::Stop(part.number));
                }
                break;
            }
        }
    }
    steps
}

/// Returns the instance whose stop the next one waits for: a singleton's old one, or one that has the last free
/// address.
#[must_use]
pub(super) fn waits_for(workload: &Workload, parts: &[PlannedInstance]) -> Option<u32> {
    let count = parts.iter().filter(|part| part.revision == workload.revision && !part.stopping).count();
    let taken = |slot: usize| parts.iter().any(|part| part.slot == slot);
    let place = (0..workload.addresses.len()).any(|slot| !taken(slot));
    if count >= workload.instances as usize || (place && workload.update == Update::Rolling) {
        return None;
    }
    parts.iter().filter(|part| part.stopping).map(|part| part.number).min()
}

#[cfg(test)]
pub(super) use tests::workload as example;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::workload::{IdRange, InsideUser, WorkloadImage};

    pub(in crate::driver::agent) fn workload(instances: u32, revision: i64, update: Update) -> Workload {
        let surge = u32::from(update == Update::Rolling && instances > 0);
        Workload {
            tenant: "acme".parse().unwrap(),
            app: "web".parse().unwrap(),
            app_id: crate::ids::AppId(1),
            revision,
            generation: revision,
            epoch: 1,
            image: WorkloadImage { repository: "a".parse().unwrap(), digest: crate::ids::Digest::of(b"") },
            command: None,
            args: None,
            user: InsideUser { uid: 1000, gid: 1000 },
            groups: Vec::new(),
            block: IdRange { start: 1 << 30, size: 1024 },
            cpu_millis: 10,
            memory: 64 << 20,
            instances,
            update,
            env: std::collections::BTreeMap::new(),
            port: None,
            health: None,
            scratch: std::collections::BTreeMap::new(),
            stop_grace: 1,
            addresses: (0..(instances + surge).max(4))
                .map(|n| std::net::Ipv4Addr::from(0x0a40_0002 + n))
                .collect(),
        }
    }

    /// Plays rounds until no step is left. In each round new instances become healthy or not, and stopping
    /// instances are gone in the next. Returns the lowest number of healthy instances.
    fn play(w: &Workload, mut parts: Vec<PlannedInstance>, heals: bool) -> (Vec<PlannedInstance>, usize) {
        let mut least = usize::MAX;
        let mut next = 100;
        for round in 0..50 {
            parts.retain(|part| !part.stopping);
            if heals {
                for part in parts.iter_mut().filter(|part| part.revision == w.revision) {
                    part.well = true;
                }
            }
            least = least.min(parts.iter().filter(|part| part.well).count());
            let steps = plan(w, &parts);
            if steps.is_empty() {
                return (parts, least);
            }
            for step in steps {
                match step {
                    InstanceStep::Create(slot) => {
                        assert!(!parts.iter().any(|part| part.slot == slot), "a place is taken twice");
                        next += 1;
                        parts.push(PlannedInstance {
                            number: next,
                            revision: w.revision,
                            well: false,
                            stopping: false,
                            slot,
                        });
                    }
                    InstanceStep::Stop(number) => {
                        if let Some(part) = parts.iter_mut().find(|part| part.number == number) {
                            (part.stopping, part.well) = (true, false);
                        }
                    }
                }
            }
            assert!(round < 49, "it does not settle");
        }
        unreachable!()
    }

    fn running(count: usize, revision: i64) -> Vec<PlannedInstance> {
        (0..count)
            .map(|n| PlannedInstance {
                number: u32::try_from(n).unwrap(),
                revision,
                well: true,
                stopping: false,
                slot: n,
            })
            .collect()
    }

    #[test]
    fn it_starts_scales_and_stops() {
        let (parts, _) = play(&workload(3, 1, Update::Rolling), vec![], true);
        assert_eq!(parts.len(), 3);
        let (parts, _) = play(&workload(1, 1, Update::Rolling), parts, true);
        assert_eq!(parts.len(), 1);
        let (parts, _) = play(&workload(0, 1, Update::Rolling), parts, true);
        assert!(parts.is_empty());
    }

    #[test]
    fn a_rolling_update_never_has_fewer_well_instances_than_wanted() {
        for count in 1..=3 {
            let (parts, least) = play(&workload(count, 2, Update::Rolling), running(count as usize, 1), true);
            assert_eq!(parts.len(), count as usize);
            assert!(parts.iter().all(|part| part.revision == 2));
            assert!(least >= count as usize, "{least} of {count}");
        }
    }

    #[test]
    fn a_bad_release_leaves_the_old_one_running() {
        let mut parts = running(2, 1);
        let w = workload(2, 2, Update::Rolling);
        for _ in 0..10 {
            for step in plan(&w, &parts) {
                match step {
                    InstanceStep::Create(slot) => {
                        parts.push(PlannedInstance {
                            number: 50,
                            revision: 2,
                            well: false,
                            stopping: false,
                            slot,
                        });
                    }
                    InstanceStep::Stop(number) => panic!("stopped {number}"),
                }
            }
        }
        assert_eq!(parts.len(), 3);
    }

    #[test]
    fn a_change_in_the_middle_of_a_change_takes_no_more_away() {
        // Two instances run. Release 2 has a healthy one, for which an instance of release 1 is stopping slowly.
        let mut parts = running(3, 1);
        parts[0] = PlannedInstance { stopping: true, well: false, ..parts[0] };
        parts[2].revision = 2;
        let mut w = workload(2, 3, Update::Rolling);
        w.addresses.truncate(3);
        assert_eq!(plan(&w, &parts), [], "the place of the one that stops is waited for");
        let (settled, least) = play(&w, parts, true);
        assert_eq!((settled.len(), least), (2, 2));
        assert!(settled.iter().all(|part| part.revision == 3));
    }

    #[test]
    fn a_singleton_stops_before_the_next_one_starts() {
        let w = workload(1, 2, Update::Replace);
        assert_eq!(plan(&w, &running(1, 1)), [InstanceStep::Stop(0)]);
        let stopping = PlannedInstance { stopping: true, well: false, ..running(1, 1)[0] };
        assert_eq!(plan(&w, &[stopping]), []);
        assert_eq!(plan(&w, &[]), [InstanceStep::Create(0)]);
    }

    #[test]
    fn a_rollback_waits_for_nobody_who_stops() {
        // Release 2 is bad; release 1 stops slowly, and release 3 rolls back to it.
        let parts = [
            PlannedInstance { stopping: true, well: false, ..running(1, 1)[0] },
            PlannedInstance { number: 7, revision: 2, well: false, stopping: false, slot: 1 },
        ];
        let w = workload(1, 3, Update::Rolling);
        assert_eq!(plan(&w, &parts), [InstanceStep::Create(2)]);
        assert_eq!(waits_for(&w, &parts), None);
        let mut narrow = workload(1, 3, Update::Rolling);
        narrow.addresses.truncate(2);
        assert_eq!(plan(&narrow, &parts), []);
        assert_eq!(waits_for(&narrow, &parts), Some(0), "and where no address is left, it says so");
        let single = workload(1, 3, Update::Replace);
        assert_eq!(waits_for(&single, &parts[..1]), Some(0));
        assert_eq!(waits_for(&single, &running(1, 3)), None);
    }

    #[test]
    fn what_is_settled_stays() {
        assert_eq!(plan(&workload(2, 1, Update::Rolling), &running(2, 1)), []);
    }
}
