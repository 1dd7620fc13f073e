//! Checks of the platform's surroundings on the machine: other firewalls, and host sockets that tenants can
//! reach.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::doctor::{Finding, failed, good, program, warning};
use crate::driver::podman::firewall::kernel;
use crate::driver::podman::foreign::{self, Author, BlockingChain};
use crate::driver::podman::host;

/// Checks the firewalls of other programs: their accepts open none of our denials, and their drops close what
/// we open.
pub(super) fn firewalls() -> Finding {
    let check = "other firewalls";
    let Some(nft) = program("nft") else {
        return warning(
            check,
            "nft is not installed, so other firewalls are unknown",
            "apt-get install nftables",
        );
    };
    let ask = |args: &[&str]| {
        let done = Command::new(&nft).arg("-j").arg("list").args(args).stderr(Stdio::null()).output();
        done.map(|done| done.stdout).unwrap_or_default()
    };
    let tables = host::foreign_tables(&ask(&["tables"]));
    let listings: Vec<Vec<u8>> = tables.iter().map(|(family, name)| ask(&["table", family, name])).collect();
    let walls = foreign::walls(listings.iter().map(Vec::as_slice));
    if !walls.is_empty() {
        return blocked(check, &walls);
    }
    let flushes = fs::read_to_string("/etc/nftables.conf").is_ok_and(|text| text.contains("flush ruleset"));
    let enabled = Path::new("/etc/systemd/system/sysinit.target.wants/nftables.service").exists();
    if flushes && enabled {
        return warning(
            check,
            "nftables.service flushes all tables whenever it starts or reloads",
            "nothing breaks: the agent is notified and reloads its table within milliseconds; to avoid even that, \
             replace `flush ruleset` in /etc/nftables.conf by deleting that file's own tables",
        );
    }
    good(check, "none blocks traffic of apps")
}

/// Reports each blocking rule with the traffic that it stops, and the commands that allow it.
fn blocked(check: &'static str, walls: &[BlockingChain]) -> Finding {
    let list: Vec<String> =
        walls.iter().map(|wall| format!("{} stops {}", wall.chain, wall.stops.join(", "))).collect();
    let mut authors: Vec<Author> = Vec::new();
    for wall in walls {
        if !authors.contains(&wall.author) {
            authors.push(wall.author);
        }
    }
    let remedies: Vec<&str> = authors.into_iter().map(remedy).collect();
    warning(
        check,
        list.join("; "),
        format!(
            "{}. Bulkhead's own table still blocks everything that apps may not reach",
            remedies.join("; ")
        ),
    )
}

/// Returns the command that opens a firewall for the bridges of apps.
fn remedy(author: Author) -> &'static str {
    match author {
        Author::Firewalld => {
            "firewall-cmd --permanent --new-zone=bulkhead && firewall-cmd --permanent --zone=bulkhead \
             --set-target=ACCEPT && firewall-cmd --permanent --zone=bulkhead --add-interface=bk+ && firewall-cmd --reload"
        }
        Author::Ufw => {
            "ufw route allow in on bk+ && ufw route allow out on bk+ && ufw allow in on bk+ to any port 53"
        }
        Author::Docker => {
            "iptables -I DOCKER-USER -i bk+ -j ACCEPT && iptables -I DOCKER-USER -o bk+ -j ACCEPT, at each start of Docker"
        }
        Author::Other => {
            "accept traffic from and to the interfaces bk* in the forward chain, before the rule or policy that \
             drops it, and port 53 from bk* in the input chain"
        }
    }
}

/// Checks how full the machine's connection tracking table is.
pub(super) fn connections() -> Finding {
    crowding(kernel::tracked_of())
}

fn crowding(seen: Option<(u64, u64)>) -> Finding {
    let check = "connections";
    match seen {
        None => good(check, "no connection is tracked yet"),
        Some((count, most)) if kernel::is_crowded((count, most)) => warning(
            check,
            format!(
                "{count} of the {most} that the kernel can track are in use; once all are, no new connection can start"
            ),
            "the events at /network name the tenant that opened the most: suspend that tenant, or raise \
             net.netfilter.nf_conntrack_max",
        ),
        Some((count, most)) => good(check, format!("{count} of the {most} that the kernel can track")),
    }
}

/// Checks which host sockets answer to tenants. None should, except the one for names.
pub(super) fn host_from_within(data: &Path) -> Finding {
    let check = "host from within";
    let mut listeners = host::listeners();
    let instance = fs::read_dir(data.join("agent/apps"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| serde_json::from_slice::<serde_json::Value>(&fs::read(entry.path()).ok()?).ok())
        .flat_map(|kept| kept["instances"].as_array().cloned().unwrap_or_default())
        .filter_map(|instance| instance["sandbox"].as_str().map(str::to_owned))
        .find(|sandbox| !sandbox.is_empty() && Path::new(sandbox).exists());
    let count = listeners.len();
    let Some(sandbox) = instance else {
        return good(
            check,
            format!(
                "{count} socket(s) listen beyond loopback; the plan blocks tenants from all, which is tested once an app runs"
            ),
        );
    };
    let targets = host::targets(&sandbox, &mut listeners);
    host::try_from_within(&sandbox, &targets, &mut listeners);
    let open: Vec<_> =
        listeners.iter().filter(|listener| listener.answers == Some(true) && !listener.names).collect();
    if open.is_empty() {
        return good(
            check,
            format!(
                "{count} socket(s) listen beyond loopback; only the one for names answers from within an app"
            ),
        );
    }
    let list: Vec<String> =
        open.iter().map(|l| format!("{} port {} ({})", l.address, l.port, l.program)).collect();
    let units: Vec<&str> = open.iter().map(|l| l.unit.as_str()).filter(|unit| !unit.is_empty()).collect();
    let remedy = if units.is_empty() {
        "start the platform, whose table blocks all of them, or stop these programs".to_owned()
    } else {
        format!(
            "start the platform, whose table blocks all of them, or: systemctl disable --now {}",
            units.join(" ")
        )
    };
    failed(check, format!("answers to tenants: {}", list.join(", ")), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standalone::doctor::Status;

    #[test]
    fn each_firewall_is_named_once_with_what_opens_it() {
        let wall = |chain: &str, author| BlockingChain {
            chain: chain.into(),
            stops: vec!["traffic between apps"],
            author,
        };
        let finding = blocked(
            "other firewalls",
            &[wall("ip filter INPUT", Author::Ufw), wall("ip filter FORWARD", Author::Ufw)],
        );
        assert_eq!(finding.status, Status::Warning);
        assert!(finding.finding.contains("ip filter FORWARD stops traffic between apps"), "{finding:?}");
        assert_eq!(finding.remedy.matches("ufw route allow in on bk+").count(), 1, "{finding:?}");
        assert!(!finding.remedy.contains("firewall-cmd"), "{finding:?}");
    }

    #[test]
    fn a_table_of_connections_that_is_nearly_full_is_said() {
        assert_eq!(crowding(None).status, Status::Ok);
        assert_eq!(crowding(Some((196_608, 262_144))).status, Status::Ok);
        let finding = crowding(Some((196_609, 262_144)));
        assert!(
            finding.status == Status::Warning && finding.remedy.contains("nf_conntrack_max"),
            "{finding:?}"
        );
        assert_eq!(crowding(Some((5, 0))).status, Status::Ok, "no limit");
    }
}
