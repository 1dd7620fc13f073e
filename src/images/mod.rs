//! Images: manifests and configs, parsed strictly, and their requirements for running.

use crate::driver::podman::dangers;
use crate::driver::workload::InsideUser;
use crate::fault::{Code, Fault, Kind};

pub mod config;
pub mod layers;
pub mod manifest;
pub mod names;
pub mod runnable;
mod seeds;
mod strict;

pub use config::ImageConfig;
pub use names::ImageAccounts;

/// User and group for an image without a usable user.
const FALLBACK: InsideUser = InsideUser { uid: 1000, gid: 1000 };

/// Maximum supplementary groups of an app.
const GROUPS: usize = 32;

/// The result of the preflight.
#[derive(Debug)]
pub struct Preflight {
    /// User inside the container.
    pub user: InsideUser,
    /// Its supplementary groups inside the container.
    pub groups: Vec<u16>,
    /// Warnings.
    pub warnings: Vec<Fault>,
}

/// The fields of a spec that the image is checked against.
#[derive(Debug, Clone, Copy)]
pub struct ImageRequirements {
    /// The port that it serves on.
    pub port: Option<u16>,
    /// Whether the spec has a command.
    pub command: SpecCommand,
    /// Whether the spec sets `health`, including `none`.
    pub health: bool,
}

/// Whether the spec has a command of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecCommand {
    /// The spec has `command` or `args`.
    Given,
    /// The image's command runs.
    Absent,
}

/// Creates the fault of an image with a refused layer.
#[must_use]
pub fn refused(why: &str) -> Fault {
    Fault::new(Code(204), Kind::Invalid, "image", format!("the image is refused: {why}"))
        .instead("fix the build of the layer, and push the image again")
}

fn warning(code: u16, message: &str) -> Fault {
    Fault::new(Code(code), Kind::Warning, "image", message)
}

/// Checks an image against its intended use. Faults refuse the release; warnings are stored with it.
pub fn preflight(
    config: &ImageConfig,
    names: &ImageAccounts,
    asked: ImageRequirements,
) -> Result<Preflight, Vec<Fault>> {
    let mut faults = Vec::new();
    if let Err(why) = dangers::of_config(&config.env, &config.working_dir, &config.stop_signal) {
        faults.push(
            Fault::new(Code(205), Kind::Invalid, "image", why)
                .instead("change ENV, WORKDIR or STOPSIGNAL in the Dockerfile and push the image again"),
        );
    }
    if config.os != "linux" || config.architecture != "amd64" {
        faults.push(
            Fault::new(Code(201), Kind::Invalid, "image", "the image is not for linux/amd64")
                .instead("build it with --platform linux/amd64"),
        );
    }
    if asked.command == SpecCommand::Absent && config.entrypoint.is_empty() && config.cmd.is_empty() {
        faults.push(
            Fault::new(
                Code(202),
                Kind::Missing,
                "command",
                "neither the image nor the spec has a command to run",
            )
            .instead("give command, or set ENTRYPOINT or CMD in the Dockerfile"),
        );
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut warnings = Vec::new();
    let (user, groups) = user(config, names, &mut warnings);
    if !config.volumes.is_empty() {
        warnings.push(
            warning(213, "the image declares volumes, which have no effect here")
                .instead("name the paths under scratch if the app writes to them"),
        );
    }
    if config.healthcheck && !asked.health {
        warnings.push(
            warning(216, "the image's HEALTHCHECK is not used")
                .because("the platform checks over the network and runs no extra program in the container")
                .instead("write health: {http: {path: /healthz}} or {tcp: {}} in the spec, or health: none"),
        );
    }
    if let Some(port) = asked.port
        && !config.exposed_ports.is_empty()
        && !config.exposed_ports.contains(&port)
    {
        warnings.push(warning(214, "none of the ports that the image exposes is the port of the spec"));
    }
    Ok(Preflight { user, groups, warnings })
}

/// Returns user, group and supplementary groups, as an unrestricted engine would choose them. A user unknown to
/// the image has group 0, and a group in `USER` replaces all groups.
fn user(config: &ImageConfig, names: &ImageAccounts, warnings: &mut Vec<Fault>) -> (InsideUser, Vec<u16>) {
    let (user, group) = config.user.split_once(':').unwrap_or((&config.user, ""));
    let root = || {
        warning(210, "the image is set to run as root; it runs as user 1000 inside")
            .because("an app is never root, not even inside its container")
            .instead("set USER 1000 in the Dockerfile and make its files readable for that user")
    };
    if user.is_empty() || user == "root" {
        warnings.push(root());
        return (FALLBACK, Vec::new());
    }
    let number = |text: &str| text.parse::<u32>().ok();
    let found = match number(user) {
        Some(uid) => Some((uid, names.group_of(uid))),
        None => names.user(user).map(|(uid, gid)| (uid, Some(gid))),
    };
    let Some((uid, own_group)) = found else {
        warnings.push(
            warning(212, "the image's user is not in its /etc/passwd; the app runs as user 1000 inside")
                .instead("write a number from 1 to 1023 after USER in the Dockerfile"),
        );
        return (FALLBACK, Vec::new());
    };
    if uid == 0 {
        warnings.push(root());
        return (FALLBACK, Vec::new());
    }
    let fit = |id: u32| u16::try_from(id).ok().filter(|id| (1..=1023).contains(id));
    let Some(uid) = fit(uid) else {
        warnings.push(
            warning(211, "the image's user is outside the app's id block; the app runs as user 1000 inside")
                .instead("write a number from 1 to 1023 after USER in the Dockerfile"),
        );
        return (FALLBACK, Vec::new());
    };
    let asked = match group {
        "" => Some(own_group.unwrap_or(0)),
        group => number(group).or_else(|| names.group(group)),
    };
    let mut dropped = Vec::new();
    if asked.is_none() {
        dropped.push(group.to_owned());
    }
    let mut hold = |name: &str, gid: u32| {
        let held = u16::try_from(gid).ok().filter(|gid| *gid <= 1023);
        if held.is_none() {
            dropped.push(if name.is_empty() { gid.to_string() } else { format!("{name} ({gid})") });
        }
        held
    };
    let gid = asked.and_then(|gid| hold("", gid));
    let mut groups = Vec::new();
    if group.is_empty() {
        groups = names.groups_of(uid.into()).into_iter().filter_map(|(name, gid)| hold(name, gid)).collect();
        groups.retain(|group| Some(*group) != gid);
        groups.sort_unstable();
        groups.dedup();
        groups.truncate(GROUPS);
    }
    if !dropped.is_empty() {
        let dropped: String = dropped.join(", ").chars().filter(|c| !c.is_control()).take(200).collect();
        warnings.push(
            warning(215, &format!("the app runs without these groups of the image: {dropped}"))
                .because("an app's block holds the groups 0 to 1023, and a group without a number in /etc/group is ignored")
                .instead("give the groups numbers from 0 to 1023 in the Dockerfile"),
        );
    }
    (InsideUser { uid, gid: gid.unwrap_or(uid) }, groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: ImageRequirements =
        ImageRequirements { port: None, command: SpecCommand::Absent, health: false };

    #[test]
    fn a_health_check_of_the_image_that_is_not_used_is_said() {
        let image = ImageConfig { healthcheck: true, ..config("1") };
        let codes = |asked| {
            let flight = preflight(&image, &ImageAccounts::default(), asked).unwrap();
            flight.warnings.iter().map(|w| w.code.0).collect::<Vec<_>>()
        };
        assert_eq!(codes(ASKED), [216]);
        assert!(codes(ImageRequirements { health: true, ..ASKED }).is_empty());
    }

    fn config(user: &str) -> ImageConfig {
        ImageConfig {
            os: "linux".into(),
            architecture: "amd64".into(),
            user: user.into(),
            cmd: vec!["x".into()],
            ..ImageConfig::default()
        }
    }

    fn run(user: &str, names: &ImageAccounts) -> (u16, u16, Vec<u16>) {
        let flight = preflight(&config(user), names, ASKED).unwrap();
        (flight.user.uid, flight.user.gid, flight.warnings.iter().map(|w| w.code.0).collect())
    }

    #[test]
    fn the_images_own_user_is_kept_where_the_block_holds_it() {
        let names =
            ImageAccounts::parse("root:x:0:0\napp:x:101:102\nbig:x:5000:5000\n", "app:x:102:\nweb:x:33:\n");
        let none = ImageAccounts::default();
        assert_eq!(run("101:33", &none), (101, 33, vec![]));
        assert_eq!(run("101", &none), (101, 0, vec![]), "as everywhere, one without a line has group 0");
        assert_eq!(run("101:0", &none), (101, 0, vec![]));
        assert_eq!(run("101", &names), (101, 102, vec![]));
        assert_eq!(run("app", &names), (101, 102, vec![]));
        assert_eq!(run("app:web", &names), (101, 33, vec![]));
        assert_eq!(run("", &none), (1000, 1000, vec![210]));
        assert_eq!(run("0:5", &none), (1000, 1000, vec![210]));
        assert_eq!(run("root", &none), (1000, 1000, vec![210]));
        assert_eq!(run("2147483648", &none), (1000, 1000, vec![211]));
        assert_eq!(run("big", &names), (1000, 1000, vec![211]));
        assert_eq!(run("99999999999", &none), (1000, 1000, vec![212]));
        assert_eq!(run("who", &names), (1000, 1000, vec![212]));
    }

    #[test]
    fn groups_are_the_images_own_and_each_that_is_dropped_is_named() {
        let names = ImageAccounts::parse(
            "app:x:101:0:\nfar:x:102:70000:\n",
            "root:x:0:\ndata:x:50:app\nbig:x:65534:app,far\nmore:x:7:app\n",
        );
        let flight = |user: &str| preflight(&config(user), &names, ASKED).unwrap();
        let app = flight("app");
        assert_eq!((app.user, app.groups), (InsideUser { uid: 101, gid: 0 }, vec![7, 50]));
        assert!(app.warnings[0].message.contains("big (65534)"), "{:?}", app.warnings);
        assert_eq!(flight("101").groups, [7, 50], "by number too");
        let alone = flight("101:50");
        assert_eq!((alone.user.gid, alone.groups.len(), alone.warnings.len()), (50, 0, 0));
        let far = flight("far");
        assert_eq!((far.user.gid, far.groups.len()), (102, 0));
        assert!(far.warnings[0].message.ends_with("70000, big (65534)"), "{:?}", far.warnings);
        assert!(flight("101:crew").warnings[0].message.contains("crew"));
    }

    #[test]
    fn another_platform_and_a_missing_command_refuse_together() {
        let other =
            ImageConfig { architecture: "arm64".into(), os: "linux".into(), ..ImageConfig::default() };
        let faults = preflight(&other, &ImageAccounts::default(), ASKED).unwrap_err();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), [201, 202]);
        let danger = ImageConfig { working_dir: "/proc/self/fd/8".into(), ..config("1") };
        let faults = preflight(&danger, &ImageAccounts::default(), ASKED).unwrap_err();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), [205]);
        assert!(
            preflight(
                &config("1"),
                &ImageAccounts::default(),
                ImageRequirements { command: SpecCommand::Given, ..ASKED }
            )
            .is_ok()
        );
    }
}
