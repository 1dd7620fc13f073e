//! Images: what a manifest and a config say, read strictly, and what that means for running it.

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
pub use names::Names;

/// User and group for an image that names none that is possible.
const FALLBACK: InsideUser = InsideUser { uid: 1000, gid: 1000 };

/// Most supplementary groups that an app has.
const GROUPS: usize = 32;

/// What the preflight found.
#[derive(Debug)]
pub struct Preflight {
    /// User inside.
    pub user: InsideUser,
    /// Its supplementary groups inside.
    pub groups: Vec<u16>,
    /// Warnings.
    pub warnings: Vec<Fault>,
}

/// What a spec says that the image is held against.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The port that it serves on.
    pub port: Option<u16>,
    /// Whether it says what to run.
    pub command: SpecCommand,
    /// Whether it says how it is checked, or that it is not.
    pub health: bool,
}

/// Whether the spec itself says what to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecCommand {
    /// It gives command or args.
    Given,
    /// It leaves it to the image.
    Absent,
}

/// The fault of an image whose layers are not taken.
#[must_use]
pub fn refused(why: &str) -> Fault {
    Fault::new(Code(204), Kind::Invalid, "image", format!("the image is refused: {why}"))
        .instead("change what builds the layer, and push the image again")
}

fn warning(code: u16, message: &str) -> Fault {
    Fault::new(Code(code), Kind::Warning, "image", message)
}

/// Holds an image against what will be done with it. Faults refuse the release, warnings go with it.
pub fn preflight(config: &ImageConfig, names: &Names, asked: Asked) -> Result<Preflight, Vec<Fault>> {
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
                "neither the image nor the spec says what to run",
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
            warning(213, "the image declares volumes, which give nothing here")
                .instead("name the paths under scratch if the app writes to them"),
        );
    }
    if config.healthcheck && !asked.health {
        warnings.push(
            warning(216, "the image's HEALTHCHECK is not used")
                .because("the platform asks over the network and runs no program beside the app")
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

/// User, group and supplementary groups, as an engine without limits would give them: a user that the image does not
/// know has group 0, and a group in `USER` stands for all.
fn user(config: &ImageConfig, names: &Names, warnings: &mut Vec<Fault>) -> (InsideUser, Vec<u16>) {
    let (user, group) = config.user.split_once(':').unwrap_or((&config.user, ""));
    let root = || {
        warning(210, "the image wants to run as root; it runs as user 1000 inside")
            .because("inside its block an app is never root")
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
            warning(
                212,
                "the image's user is a name that its /etc/passwd does not have; it runs as user 1000 inside",
            )
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
            warning(211, "the image's user is beyond the ids of its block; it runs as user 1000 inside")
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
                .because("an app's block holds the groups 0 to 1023, and a group without a number in /etc/group is none")
                .instead("give the groups numbers from 0 to 1023 in the Dockerfile"),
        );
    }
    (InsideUser { uid, gid: gid.unwrap_or(uid) }, groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked = Asked { port: None, command: SpecCommand::Absent, health: false };

    #[test]
    fn a_health_check_of_the_image_that_is_not_used_is_said() {
        let image = ImageConfig { healthcheck: true, ..config("1") };
        let codes = |asked| {
            let flight = preflight(&image, &Names::default(), asked).unwrap();
            flight.warnings.iter().map(|w| w.code.0).collect::<Vec<_>>()
        };
        assert_eq!(codes(ASKED), [216]);
        assert!(codes(Asked { health: true, ..ASKED }).is_empty());
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

    fn run(user: &str, names: &Names) -> (u16, u16, Vec<u16>) {
        let flight = preflight(&config(user), names, ASKED).unwrap();
        (flight.user.uid, flight.user.gid, flight.warnings.iter().map(|w| w.code.0).collect())
    }

    #[test]
    fn the_images_own_user_is_kept_where_the_block_holds_it() {
        let names = Names::parse("root:x:0:0\napp:x:101:102\nbig:x:5000:5000\n", "app:x:102:\nweb:x:33:\n");
        let none = Names::default();
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
        let names = Names::parse(
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
        let faults = preflight(&other, &Names::default(), ASKED).unwrap_err();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), [201, 202]);
        let danger = ImageConfig { working_dir: "/proc/self/fd/8".into(), ..config("1") };
        let faults = preflight(&danger, &Names::default(), ASKED).unwrap_err();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), [205]);
        assert!(
            preflight(&config("1"), &Names::default(), Asked { command: SpecCommand::Given, ..ASKED })
                .is_ok()
        );
    }
}
