//! Checks of the running platform: processes, engine and settings files.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::doctor::{Finding, good, warning};
use super::processes::born;
use super::service;
use crate::resolver;

/// Checks that each process that `up` or the service started still runs.
pub(super) fn processes(data: &Path) -> Finding {
    if service::serves(data) {
        return active(service::not_active().map_err(|error| error.0), service::own_units().len());
    }
    let check = "processes";
    let files = fs::read_dir(data.join("run")).into_iter().flatten().flatten().map(|entry| entry.path());
    let (mut alive, mut ended) = (0, Vec::new());
    for file in files.filter(|path| path.extension().is_some_and(|extension| extension == "pid")) {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if runs(&fs::read_to_string(&file).unwrap_or_default()) { alive += 1 } else { ended.push(name) }
    }
    ended.sort();
    match (alive, ended.as_slice()) {
        (0, _) => good(check, "the platform is not running from this folder"),
        (n, []) => good(check, format!("all {n} run")),
        (_, ended) => {
            let last = |name: &String| format!("{name} ({})", last_line(data, name));
            let list: Vec<String> = ended.iter().map(last).collect();
            let log = data.join("log");
            warning(
                check,
                format!("exited, and restarted while `up` runs: {}", list.join(", ")),
                format!("{}/NAME.log says why", log.display()),
            )
        }
    }
}

/// Reports that all units are active, or lists the inactive ones.
fn active(inactive: Result<Vec<(String, String)>, String>, count: usize) -> Finding {
    let check = "processes";
    match inactive {
        Err(error) => warning(check, error, "check that systemd runs on this machine"),
        Ok(list) if list.is_empty() => good(check, format!("all {count} units are active")),
        Ok(list) if list.len() == count => {
            good(check, "the service is stopped: systemctl start bulkhead.target starts it")
        }
        Ok(list) => {
            let list: Vec<String> = list.iter().map(|(name, state)| format!("{name} is {state}")).collect();
            warning(check, list.join(", "), "journalctl -n 20 -u NAME shows why; systemd keeps restarting it")
        }
    }
}

/// Returns whether the process in a pid file (id and start time) still runs.
fn runs(note: &str) -> bool {
    let mut parts = note.split_whitespace().map(str::parse::<u64>);
    matches!((parts.next(), parts.next()), (Some(Ok(pid)), Some(Ok(own))) if born(pid) == Some(own))
}

/// Timeout for an answer of the engine.
const PATIENCE: Duration = Duration::from_secs(3);

/// Checks that the container engine answers. A running process may hang.
pub(super) fn engine(data: &Path) -> Finding {
    let check = "container engine";
    let socket = service::engine_socket(data);
    if !service::serves(data) {
        let Ok(note) = fs::read_to_string(data.join("run/engine.pid")) else {
            return good(check, "is not running from this folder");
        };
        if !runs(&note) {
            return good(check, "is not running now");
        }
    } else if !socket.exists() {
        return good(check, "is not running now");
    }
    ping(check, &socket)
}

fn ping(check: &'static str, socket: &Path) -> Finding {
    let asked = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok::<bool, std::io::Error>(head.ends_with(b"200"))
    };
    match asked() {
        Ok(true) => good(check, "answers"),
        answer => {
            let why =
                answer.map_or_else(|error| error.to_string(), |_| "an answer that is not 200".to_owned());
            warning(
                check,
                format!(
                    "does not answer: {why}. Running containers continue; none can be started or stopped"
                ),
                "the agent stops an engine that hangs, and `up` or systemd restarts it: check again in a \
                 minute; the agent's log names the app whose call hung",
            )
        }
    }
}

fn last_line(data: &Path, name: &str) -> String {
    let log = fs::read(data.join(format!("log/{name}.log"))).unwrap_or_default();
    let text = String::from_utf8_lossy(&log[log.len().saturating_sub(4_096)..]).into_owned();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("its log is empty");
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Checks that the resolver's optional settings file can be read: with an invalid file, apps cannot resolve
/// names.
pub(super) fn resolver_settings(data: &Path) -> Finding {
    match resolver::Settings::load(&service::settings_folder(data).join("resolver.toml")) {
        Ok(_) => good("resolver settings", "readable, or absent"),
        Err(error) => warning(
            "resolver settings",
            error.split_whitespace().collect::<Vec<_>>().join(" "),
            "write it as upstream = [\"10.0.0.53:53\"], or remove the file; until then apps cannot resolve names",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standalone::doctor::Status;

    #[test]
    fn an_engine_that_does_not_answer_is_told_from_one_that_does() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(engine(data.path()).status, Status::Ok, "nothing runs");
        fs::create_dir_all(data.path().join("run/engine")).unwrap();
        let own = u64::from(std::process::id());
        fs::write(data.path().join("run/engine.pid"), format!("{own} {}", born(own).unwrap())).unwrap();
        assert_eq!(engine(data.path()).status, Status::Warning, "no socket");
        let listener =
            std::os::unix::net::UnixListener::bind(data.path().join("run/engine/podman.sock")).unwrap();
        let answers = std::thread::spawn(move || {
            for answer in [&b"HTTP/1.0 200 OK\r\n\r\n"[..], b"HTTP/1.0 500 No\r\n\r\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 512]);
                stream.write_all(answer).unwrap();
            }
            // The last connection is accepted and not answered, as by an engine that hangs.
            let (_silent, _) = listener.accept().unwrap();
            std::thread::sleep(PATIENCE + Duration::from_secs(1));
        });
        assert_eq!(engine(data.path()).status, Status::Ok);
        assert_eq!(engine(data.path()).status, Status::Warning);
        assert_eq!(engine(data.path()).status, Status::Warning);
        answers.join().unwrap();
    }

    #[test]
    fn units_that_are_not_active_are_named_and_a_stopped_service_is_no_fault() {
        let one = || vec![("bulkhead-serve.service".to_owned(), "failed".to_owned())];
        assert_eq!(active(Ok(Vec::new()), 8).finding, "all 8 units are active");
        let finding = active(Ok(one()), 8);
        assert!(finding.status == Status::Warning && finding.finding.contains("serve.service is failed"));
        assert_eq!(active(Ok(one()), 1).status, Status::Ok);
        assert_eq!(active(Err("no systemctl".into()), 8).status, Status::Warning);
    }

    #[test]
    fn what_has_ended_is_said_with_the_last_line_of_its_log() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(processes(data.path()).status, Status::Ok, "nothing was started yet");
        for folder in ["run", "log"] {
            fs::create_dir(data.path().join(folder)).unwrap();
        }
        let own = u64::from(std::process::id());
        fs::write(data.path().join("run/serve.pid"), format!("{own} {}", born(own).unwrap())).unwrap();
        assert_eq!(processes(data.path()).finding, "all 1 run");
        // Another process has the id by now.
        fs::write(data.path().join("run/resolver.pid"), format!("{own} 1")).unwrap();
        fs::write(data.path().join("log/resolver.log"), "begins\nno such upstream\n\n").unwrap();
        let finding = processes(data.path());
        assert_eq!(finding.status, Status::Warning);
        assert!(finding.finding.ends_with("resolver (no such upstream)"), "{}", finding.finding);
    }

    #[test]
    fn settings_that_cannot_be_read_are_said() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(resolver_settings(data.path()).status, Status::Ok);
        fs::write(data.path().join("resolver.toml"), "upstream = [\"10.0.0.53\"]\n").unwrap();
        let finding = resolver_settings(data.path());
        assert!(finding.status == Status::Warning && finding.finding.contains("upstream"), "{finding:?}");
    }
}
