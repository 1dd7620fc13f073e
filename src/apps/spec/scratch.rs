//! The field `scratch`: writable folders in memory.

use std::collections::BTreeMap;

use super::fields;
use super::read::{SpecWalk, get};
use super::tree::{At, SpecKey, SpecNode, Value, below};
use crate::driver::scratch::{self, SHM, is_within};
use crate::driver::workload::Scratch;
use crate::fault::catalogue as code;
use crate::fault::{Fault, Kind};

/// Maximum number of folders in a spec.
const MOST: usize = 16;
/// Minimum size of a folder, in bytes.
const LEAST: u64 = 4 << 10;
/// Size of `/dev/shm` when the app's memory cannot hold the default.
const LEAST_SHM: u64 = 1 << 20;

impl SpecWalk<'_, '_> {
    pub(super) fn scratch(
        &mut self,
        node: Option<&SpecNode<'_>>,
        memory: Option<u64>,
        memory_at: At,
    ) -> Option<BTreeMap<String, Scratch>> {
        let mut all = BTreeMap::new();
        let at = node.map_or(memory_at, |node| node.at);
        if let Some(node) = node {
            let Value::Map(entries) = &node.value else {
                self.wrong(node, "scratch", "a group of PATH: size");
                return None;
            };
            for (key, value) in entries {
                let path = || below("scratch", &key.name);
                self.scratch_path(key);
                let outer = |other: &str| is_within(&key.name, other) && key.name != SHM;
                if entries.iter().any(|(other, _)| outer(&other.name)) || outer("/tmp") {
                    let message = "lies within another scratch path; /tmp and /dev/shm are always scratch";
                    self.bad(key.at, code::SCRATCH_PATH, &path(), message, "");
                }
                if let Some(scratch) = self.one_scratch(value, path) {
                    all.insert(key.name.clone().into_owned(), scratch);
                }
            }
            if entries.len() > MOST {
                self.bad(node.at, code::SCRATCH_PATH, "scratch", "has at most 16 paths", "");
            }
        }
        // If the memory is too small for the default `/tmp`, the spec must set a smaller one.
        all.entry("/tmp".to_owned()).or_insert(Scratch::of(fields::TMP));
        let sum = all.values().fold(0_u64, |sum, scratch| sum.saturating_add(scratch.size));
        if memory.is_some_and(|memory| sum.saturating_add(fields::LEAST_MEMORY) > memory) {
            let fault = Fault::new(
                code::SCRATCH_SIZE,
                Kind::Conflict,
                "scratch",
                format!(
                    "scratch takes {} of memory and at least 8Mi must be left for the process",
                    fields::print_size(sum)
                ),
            );
            self.add(
                at,
                fault
                    .because("scratch is kept in memory and counts as memory; /tmp has 16Mi by default")
                    .instead("raise memory, or use a smaller scratch such as scratch: {/tmp: 1Mi}"),
            );
        }
        all.entry(SHM.to_owned()).or_insert(Scratch::of(default_shm(memory.unwrap_or(0), sum)));
        Some(all)
    }

    fn scratch_path(&mut self, key: &SpecKey<'_>) {
        let path = || below("scratch", &key.name);
        if !scratch::is_path(&key.name) {
            let message = "is an absolute path of at most 128 bytes, without . and .. and not / itself";
            self.bad(key.at, code::SCRATCH_PATH, &path(), message, "such as /var/cache/app");
        } else if let Some(closed) = scratch::closed(&key.name) {
            let message = format!("lies in {closed}, which the platform provides");
            let instead = match closed {
                "/dev" => "use another folder; below /dev only /dev/shm may be scratch",
                "/etc" => "use a folder outside of /etc, and a copy of the configuration with that path",
                _ => "use another folder, such as /run/app",
            };
            self.bad(key.at, code::SCRATCH_PATH, &path(), &message, instead);
        }
    }

    /// Reads a size, or a group with the size and whether files in the folder may be executed.
    fn one_scratch(&mut self, node: &SpecNode<'_>, path: impl Fn() -> String) -> Option<Scratch> {
        if !matches!(node.value, Value::Map(_)) {
            return self.size(node, path, LEAST).map(Scratch::of);
        }
        let path = path();
        let entries = self.group(node, &path, fields::SCRATCH)?;
        let size = if let Some(node) = get(entries, "size") {
            self.size(node, || below(&path, "size"), LEAST)
        } else {
            let fault = Fault::new(code::MISSING, Kind::Missing, below(&path, "size"), "size is required");
            self.add(node.at, fault.instead("such as {size: 64Mi, exec: true}"));
            None
        };
        let exec = get(entries, "exec").map_or(Some(false), |node| self.boolean(node, &below(&path, "exec")));
        Some(Scratch { size: size?, exec: exec? })
    }
}

/// Returns the size of `/dev/shm` when the spec sets none.
pub(super) fn default_shm(memory: u64, others: u64) -> u64 {
    let left = memory.saturating_sub(others).saturating_sub(fields::LEAST_MEMORY);
    // Round down to the unit that is printed.
    (left >> 20 << 20).clamp(LEAST_SHM, fields::SHM)
}
