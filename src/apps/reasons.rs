//! Explains why an app is not in its desired state: what it waits for, what is wrong with an instance, and
//! which lines of its log name the error.

use super::sight::clock;
use crate::driver::{Cause, Ending, Fetching, InstanceObserved, InstanceState};

/// Describes the progress of a deploy. Instances of earlier releases do not count.
pub(super) fn progress(instances: &[InstanceObserved], revision: i64, wanted: u32) -> String {
    let well = |i: &&InstanceObserved| i.state == InstanceState::Running;
    let new = instances.iter().filter(well).filter(|i| i.revision == revision).count();
    match instances.iter().filter(well).count() - new {
        0 => format!("{new} of {wanted} running."),
        old => format!("{new} of {wanted} running of release {revision}; {old} of an earlier one."),
    }
}

/// Describes what an app waits for while nothing is wrong. `taken` tells whether the machine knows the desired
/// release.
pub(super) fn waiting(
    instances: &[InstanceObserved],
    (revision, wanted): (i64, u32),
    taken: bool,
    fetching: Option<&Fetching>,
) -> String {
    if let Some(fetching) = fetching {
        return fetch(fetching);
    }
    if !taken {
        return format!("Release {revision} is being sent to the machine.");
    }
    let of = |state: InstanceState| move |i: &&InstanceObserved| i.revision == revision && i.state == state;
    let first = |state| instances.iter().find(of(state));
    if let Some(why) = instances.iter().filter(|i| i.revision == revision).find_map(unready) {
        return why;
    }
    if let Some(i) = first(InstanceState::Unhealthy) {
        return format!(
            "Instance {} is unhealthy since {}: its health check fails.",
            i.number,
            clock(i.since)
        );
    }
    if let Some(i) = first(InstanceState::Waiting) {
        return match i.next_start {
            Some(at) => format!("Instance {} starts again at {}.", i.number, clock(at)),
            None => format!("Instance {} waits for its next start.", i.number),
        };
    }
    if let Some(i) = first(InstanceState::Starting) {
        let since = i.started.unwrap_or(i.since);
        return format!("Instance {} is starting since {}: it is not ready yet.", i.number, clock(since));
    }
    if let Some(i) = first(InstanceState::Preparing) {
        return format!("Instance {} is being created since {}.", i.number, clock(i.since));
    }
    if let Some(i) = instances.iter().find(|i| i.state == InstanceState::Stopping) {
        let until = "until it ends or its stop_grace is over";
        return format!(
            "Waiting for instance {} of release {} to stop, since {} and {until}.",
            i.number,
            i.revision,
            clock(i.since)
        );
    }
    let there = instances.iter().filter(|i| i.revision == revision).count();
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    if there < wanted {
        "The next instance is about to be created.".to_owned()
    } else if instances.iter().any(|i| i.revision != revision) {
        "An instance of an earlier release is about to be stopped.".to_owned()
    } else {
        "The last step is being checked.".to_owned()
    }
}

/// Describes the progress of an image pull.
fn fetch(fetching: &Fetching) -> String {
    let release = fetching.revision;
    let since = clock(fetching.since);
    if fetching.waits {
        return format!(
            "The image of release {release} waits for its turn since {since}: other images are being fetched."
        );
    }
    let here = fetching.bytes >> 20;
    let of = match fetching.unpacked >> 20 {
        0 => String::new(),
        of => format!(" of an image of {of} MiB unpacked"),
    };
    format!("Pulling the image of release {release} since {since}: {here} MiB so far{of}.")
}

/// Consecutive ends from which a running instance counts as flapping.
const FLAPS: u32 = 3;

/// Describes an instance that runs now but ended repeatedly before.
pub(super) fn flapping(instance: &InstanceObserved) -> Option<String> {
    let ending = instance.last_end.as_ref().filter(|_| instance.failures >= FLAPS)?;
    let (number, times) = (instance.number, instance.failures);
    Some(format!("Instance {number} has ended {times} times in a row and runs again. {}", ended(ending)))
}

/// Explains why a running instance is not ready.
fn unready(instance: &InstanceObserved) -> Option<String> {
    let why = instance.why.as_ref()?;
    let word = if instance.state == InstanceState::Starting { "is starting" } else { "is not ready" };
    Some(format!("Instance {} {word}: {why}.", instance.number))
}

/// Describes the problem of an instance, with the reason of its last end.
pub(super) fn trouble(instance: &InstanceObserved) -> Option<String> {
    // An instance that starts again still counts as troubled until it runs: the same cause may end it again.
    let bad = !matches!(instance.state, InstanceState::Running | InstanceState::Stopping);
    let ending = instance.last_end.as_ref()?;
    bad.then(|| ended(ending))
}

fn ended(ending: &Ending) -> String {
    let what = match ending.cause {
        Cause::Exited => match ending.exit_code {
            Some(code) => format!("Exits with code {code} after {}", duration(ending.ran_ms)),
            None => format!("Ends after {}", duration(ending.ran_ms)),
        },
        Cause::OutOfMemory => "Exceeds its memory limit".to_owned(),
        Cause::Killed => format!("Was killed after {}", duration(ending.ran_ms)),
        Cause::Unhealthy => "Its health check fails".to_owned(),
        Cause::ImageError => "Its image cannot be used".to_owned(),
        Cause::StartError => "It cannot be started".to_owned(),
        Cause::Removed => "It was removed from outside".to_owned(),
    };
    let detail = ending.detail.trim_start_matches("its health check fails: ");
    let detail = detail.trim_start_matches("it cannot be started: ");
    format!("{what} ({detail}){}", lines(ending))
}

fn duration(ms: u64) -> String {
    if ms < 1_000 { format!("{ms} ms") } else { format!("{} s", ms / 1_000) }
}

fn lines(ending: &Ending) -> String {
    let told = telling(&ending.last_lines);
    if told.is_empty() {
        return String::new();
    }
    format!("; its log says: {}", told.join(" ... "))
}

/// Words that mark a line as an error.
const NAMES: &[&str] = &[
    "error",
    "exception",
    "panic",
    "fatal",
    "emerg",
    "cannot",
    "can't",
    "could not",
    "failed",
    "failure",
    "denied",
    "refused",
    "not found",
    "no such",
    "not permitted",
    "unable",
    "invalid",
    "missing",
    "abort",
    "segmentation",
    "read-only",
    "in use",
    "usage:",
    "killed",
    "caused by",
];

/// Returns at most three lines that name the error: the first and the last such line, each with its next line
/// if it only announces the error. Without such a line, returns the last line with text.
fn telling(lines: &[String]) -> Vec<&str> {
    let lines: Vec<&str> = lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty()).collect();
    // A stack frame is no reason: skip frames of Node, Java, Python and Go.
    let frame = |line: &str| {
        line.starts_with("at ")
            || line.starts_with("File \"")
            || line.starts_with("goroutine ")
            || line.starts_with("note: ")
    };
    let names = |line: &str| {
        let lower = line.to_ascii_lowercase();
        !frame(line) && NAMES.iter().any(|word| lower.contains(word))
    };
    let mut picked = Vec::new();
    let found: Vec<usize> = (0..lines.len()).filter(|n| names(lines[*n])).collect();
    for at in found.first().into_iter().chain(found.last()) {
        picked.push(*at);
        // "thread 'main' panicked at src/main.rs:2:5:" precedes its message.
        if lines[*at].ends_with(':') && at + 1 < lines.len() && !frame(lines[at + 1]) {
            picked.push(at + 1);
        }
    }
    if picked.is_empty() {
        picked.extend(lines.iter().rposition(|line| line.chars().any(char::is_alphanumeric) && !frame(line)));
    }
    picked.sort_unstable();
    picked.dedup();
    picked.into_iter().take(3).map(|at| lines[at]).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use time::OffsetDateTime;

    use super::*;

    pub(in crate::apps) fn instance(number: u32, revision: i64, state: InstanceState) -> InstanceObserved {
        InstanceObserved {
            number,
            revision,
            state,
            since: OffsetDateTime::UNIX_EPOCH,
            started: None,
            restarts: 0,
            failures: 0,
            why: None,
            next_start: None,
            last_end: None,
            address: std::net::Ipv4Addr::LOCALHOST,
            uid: None,
            container: String::new(),
        }
    }

    #[test]
    fn what_runs_of_an_earlier_release_does_not_count() {
        use InstanceState::{Preparing, Running, Stopping};
        let all = [instance(1, 1, Running), instance(2, 1, Running), instance(3, 2, Preparing)];
        assert_eq!(progress(&all, 2, 2), "0 of 2 running of release 2; 2 of an earlier one.");
        let half = [instance(1, 1, Stopping), instance(2, 1, Running), instance(3, 2, Running)];
        assert_eq!(progress(&half, 2, 2), "1 of 2 running of release 2; 1 of an earlier one.");
        assert_eq!(progress(&half[2..], 2, 2), "1 of 2 running.");
        assert_eq!(progress(&[], 2, 2), "0 of 2 running.");
    }

    #[test]
    fn an_instance_that_ends_again_and_again_is_no_calm_one() {
        let mut one = instance(4, 1, InstanceState::Running);
        assert_eq!(flapping(&one), None);
        one.failures = FLAPS;
        one.last_end = Some(Ending {
            cause: Cause::Exited,
            exit_code: Some(3),
            at: OffsetDateTime::UNIX_EPOCH,
            ran_ms: 2_500,
            detail: "it exited with code 3".into(),
            last_lines: vec!["no database".into()],
        });
        let why = flapping(&one).unwrap();
        assert!(
            why.contains("ended 3 times") && why.contains("code 3 after 2 s") && why.ends_with("no database"),
            "{why}"
        );
        one.failures = FLAPS - 1;
        assert_eq!(flapping(&one), None);
        one.why = Some("port 8080 takes no connection".into());
        assert!(unready(&one).unwrap().contains("not ready: port 8080"));
    }

    #[test]
    fn every_wait_has_its_reason() {
        use InstanceState::{Preparing, Running, Starting, Stopping, Unhealthy, Waiting};
        let told = |all: &[InstanceObserved]| waiting(all, (2, 2), true, None);
        let old = instance(1, 1, Running);
        for (state, words) in [
            (Preparing, "Instance 3 is being created"),
            (Starting, "Instance 3 is starting"),
            (Unhealthy, "Instance 3 is unhealthy"),
            (Waiting, "Instance 3 waits"),
        ] {
            let text = told(&[old.clone(), instance(3, 2, state)]);
            assert!(text.starts_with(words), "{text}");
        }
        // The new instances run, an old one remains.
        let new = [instance(3, 2, Running), instance(4, 2, Running)];
        let text = told(&[new[0].clone(), new[1].clone(), instance(1, 1, Stopping)]);
        assert!(text.starts_with("Waiting for instance 1 of release 1 to stop"), "{text}");
        assert!(told(&[new[0].clone()]).contains("next instance"));
        assert!(told(&[new[0].clone(), new[1].clone(), old]).contains("earlier release"));
        assert!(waiting(&new, (3, 2), false, None).contains("sent to the machine"));
        let mut fetching = Fetching {
            app: crate::ids::AppId(1),
            revision: 2,
            since: OffsetDateTime::UNIX_EPOCH,
            waits: false,
            bytes: 12 << 20,
            unpacked: 300 << 20,
        };
        let text = waiting(&[], (2, 2), false, Some(&fetching));
        assert!(text.contains("12 MiB so far of an image of 300 MiB"), "{text}");
        fetching.waits = true;
        assert!(waiting(&[], (2, 2), false, Some(&fetching)).contains("waits for its turn"));
    }

    #[test]
    fn the_lines_that_name_the_error_are_told() {
        let told = |text: &str| telling(&text.lines().map(str::to_owned).collect::<Vec<_>>()).join("|");
        let node = "node:internal/modules/cjs/loader:1143\n  throw err;\n  ^\n\nError: Cannot find module '/app/x.js'\n    \
                    at Module._load (node:1)\n  code: 'MODULE_NOT_FOUND',\n  requireStack: []\n}\n\nNode.js v18.19.0";
        assert!(told(node).starts_with("Error: Cannot find module '/app/x.js'"), "{}", told(node));
        let python = "Traceback (most recent call last):\n  File \"/app/a.py\", line 1, in <module>\n    import flask\n\
                      ModuleNotFoundError: No module named 'flask'";
        assert_eq!(told(python), "ModuleNotFoundError: No module named 'flask'");
        let rust =
            "thread 'main' panicked at src/main.rs:2:5:\nno database\nnote: run with `RUST_BACKTRACE=1`";
        assert_eq!(told(rust), "thread 'main' panicked at src/main.rs:2:5:|no database");
        let java = "Exception in thread \"main\" java.lang.IllegalStateException: x\n\tat A.main(A.java:3)\nCaused by: \
                    java.io.IOException: no room\n\t... 3 more";
        assert!(told(java).ends_with("Caused by: java.io.IOException: no room"), "{}", told(java));
        let nginx = "nginx: [emerg] bind() to 0.0.0.0:80 failed (13: Permission denied)\nbye";
        assert_eq!(told(nginx), "nginx: [emerg] bind() to 0.0.0.0:80 failed (13: Permission denied)");
        assert_eq!(told("listening\nbye\n}\n"), "bye");
        assert_eq!(told(""), "");
    }
}
