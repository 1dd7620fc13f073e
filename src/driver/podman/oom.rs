//! Instances that the kernel killed for memory, read from its log. The engine's flag is always false, and the
//! cgroup of an instance is gone once the instance has ended. The log names the cgroup and stays.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};

/// Maximum number of containers that are remembered.
const MOST: usize = 4096;

/// The kernel's log, and the killed containers that were read from it.
#[derive(Debug)]
pub struct OutOfMemory {
    state: Mutex<OomState>,
}

#[derive(Debug, Default)]
struct OomState {
    log: Option<File>,
    known: HashSet<String>,
    order: VecDeque<String>,
}

impl OutOfMemory {
    /// Opens the log. If it cannot be read, no instance is ever reported as killed for memory.
    #[must_use]
    pub fn open() -> Self {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = match rustix::fs::open("/dev/kmsg", flags, Mode::empty()) {
            Ok(log) => Some(File::from(log)),
            Err(error) => {
                tracing::warn!(%error, "the kernel's log cannot be read: instances that ran out of memory are reported as killed");
                None
            }
        };
        Self { state: Mutex::new(OomState { log, ..OomState::default() }) }
    }

    /// Whether the kernel killed a process of this container for its memory.
    #[must_use]
    pub fn killed(&self, container: &str) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.advance();
        state.known.contains(container)
    }

    /// Reads new records, before the kernel overwrites them.
    pub fn advance(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).advance();
    }
}

impl OomState {
    fn advance(&mut self) {
        let Some(mut log) = self.log.as_ref() else { return };
        // One read is one record (Documentation/ABI/testing/dev-kmsg).
        let mut record = [0_u8; 8192];
        let mut found = Vec::new();
        loop {
            match log.read(&mut record) {
                Ok(0) => break,
                Ok(length) => found.extend(container_of(&String::from_utf8_lossy(&record[..length]))),
                // Records were overwritten before they were read, or the read was interrupted.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        for container in found {
            if self.known.insert(container.clone()) {
                self.order.push_back(container);
            }
            if self.order.len() > MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }
}

/// Returns the container of a record such as `3,1,2,-;oom-kill:constraint=CONSTRAINT_MEMCG,...,
/// oom_memcg=/x/libpod-ID,task_memcg=/x/libpod-ID,task=java,pid=7,uid=1`. The text after `task=` is chosen by the
/// process and is ignored. Only the kernel's own records count (facility 0).
fn container_of(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    if priority >> 3 != 0 {
        return None;
    }
    let fields = text.strip_prefix("oom-kill:")?.split(",task=").next()?;
    let cgroup = fields.split(',').find_map(|field| field.strip_prefix("task_memcg="))?;
    cgroup.split('/').find_map(|part| {
        let id = part.strip_prefix("libpod-")?.trim_end_matches(".scope");
        (id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_word_counts() {
        let id = "ab".repeat(32);
        let text = format!(
            "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/bulkhead-x/libpod-{id},\
             task_memcg=/bulkhead-x/libpod-{id}/container,task=a,pid=7,uid=1\n SUBSYSTEM=x"
        );
        assert_eq!(container_of(&format!("6,12,99,-;{text}")), Some(id.clone()));
        // A user's record (facility 1 and above), and a process with a misleading name.
        assert_eq!(container_of(&format!("14,12,99,-;{text}")), None);
        let named =
            format!("6,1,2,-;oom-kill:constraint=x,oom_memcg=/y,task=b,task_memcg=/libpod-{id},pid=1,uid=1");
        assert_eq!(container_of(&named), None);
        assert_eq!(container_of("6,1,2,-;Memory cgroup out of memory: Killed process 7 (a)"), None);
        assert_eq!(container_of("garbage"), None);
    }
}
