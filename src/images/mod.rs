//! Images: what a manifest and a config say, read strictly, and what that means for running it.

use crate::driver::podman::dangers;
use crate::driver::workload::InsideUser;
use crate::fault::{Code, Fault, Kind};

pub mod config;
pub mod layers;
pub mod manifest;
pub mod names;
mod strict;

pub use config::ImageConfig;
pub use names::Names;

/// User and group for an image that names none that is possible.
const FALLBACK: InsideUser = InsideUser { uid: 1000, gid: 1000 };

/// What the preflight found.
#[derive(Debug)]
pub struct Preflight {
    /// User inside.
    pub user: InsideUser,
    /// Warnings.
    pub warnings: Vec<Fault>,
}

/// Whether the spec itself says what to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecCommand {
    /// It gives command or args.
    Given,
    /// It leaves it to the image.
    Absent,
}

/// Whether the image's own files have to be asked who its user is.
#[must_use]
pub fn needs_passwd(config: &ImageConfig) -> bool {
    let (user, group) = config.user.split_once(':').unwrap_or((&config.user, ""));
    let is_name = |text: &str| !text.is_empty() && !text.bytes().all(|b| b.is_ascii_digit());
    is_name(user) && user != "root" || is_name(group)
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
pub fn preflight(
    config: &ImageConfig,
    names: Option<&Names>,
    port: Option<u16>,
    command: SpecCommand,
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
    if command == SpecCommand::Absent && config.entrypoint.is_empty() && config.cmd.is_empty() {
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
    let user = user(config, names, &mut warnings);
    if !config.volumes.is_empty() {
        warnings.push(
            warning(213, "the image declares volumes, which give nothing here")
                .instead("name the paths under scratch if the app writes to them"),
        );
    }
    if let Some(port) = port
        && !config.exposed_ports.is_empty()
        && !config.exposed_ports.contains(&port)
    {
        warnings.push(warning(214, "none of the ports that the image exposes is the port of the spec"));
    }
    Ok(Preflight { user, warnings })
}

fn user(config: &ImageConfig, names: Option<&Names>, warnings: &mut Vec<Fault>) -> InsideUser {
    let (user, group) = config.user.split_once(':').unwrap_or((&config.user, ""));
    let root = || {
        warning(210, "the image wants to run as root; it runs as user 1000 inside")
            .because("inside its block an app is never root")
            .instead("set USER 1000 in the Dockerfile and make its files readable for that user")
    };
    if user.is_empty() || user == "root" {
        warnings.push(root());
        return FALLBACK;
    }
    let number = |text: &str| text.parse::<u32>().ok();
    let found = match number(user) {
        Some(uid) => Some((uid, names.and_then(|names| names.group_of(uid)))),
        None => names.and_then(|names| names.user(user)).map(|(uid, gid)| (uid, Some(gid))),
    };
    let Some((uid, own_group)) = found else {
        warnings.push(
            warning(
                212,
                "the image's user is a name that its /etc/passwd does not have; it runs as user 1000 inside",
            )
            .instead("write a number from 1 to 1023 after USER in the Dockerfile"),
        );
        return FALLBACK;
    };
    let gid = match group {
        "" => own_group,
        group => number(group).or_else(|| names.and_then(|names| names.group(group))),
    };
    if uid == 0 {
        warnings.push(root());
        return FALLBACK;
    }
    let fit = |id: u32| u16::try_from(id).ok().filter(|id| (1..=1023).contains(id));
    let Some(uid) = fit(uid) else {
        warnings.push(
            warning(211, "the image's user is beyond the ids of its block; it runs as user 1000 inside")
                .instead("write a number from 1 to 1023 after USER in the Dockerfile"),
        );
        return FALLBACK;
    };
    // A group that is root's or beyond the block is not needed to run; the user's own number is one.
    InsideUser { uid, gid: gid.and_then(fit).unwrap_or(uid) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(user: &str) -> ImageConfig {
        ImageConfig {
            os: "linux".into(),
            architecture: "amd64".into(),
            user: user.into(),
            cmd: vec!["x".into()],
            ..ImageConfig::default()
        }
    }

    fn run(user: &str, names: Option<&Names>) -> (u16, u16, Vec<u16>) {
        let flight = preflight(&config(user), names, None, SpecCommand::Absent).unwrap();
        (flight.user.uid, flight.user.gid, flight.warnings.iter().map(|w| w.code.0).collect())
    }

    #[test]
    fn the_images_own_user_is_kept_where_the_block_holds_it() {
        let names = Names::parse("root:x:0:0\napp:x:101:102\nbig:x:5000:5000\n", "app:x:102:\nweb:x:33:\n");
        assert_eq!(run("101:33", None), (101, 33, vec![]));
        assert_eq!(run("101", None), (101, 101, vec![]));
        assert_eq!(run("app", Some(&names)), (101, 102, vec![]));
        assert_eq!(run("app:web", Some(&names)), (101, 33, vec![]));
        assert_eq!(run("", None), (1000, 1000, vec![210]));
        assert_eq!(run("0:5", None), (1000, 1000, vec![210]));
        assert_eq!(run("root", None), (1000, 1000, vec![210]));
        assert_eq!(run("2147483648", None), (1000, 1000, vec![211]));
        assert_eq!(run("big", Some(&names)), (1000, 1000, vec![211]));
        assert_eq!(run("99999999999", None), (1000, 1000, vec![212]));
        assert_eq!(run("who", Some(&names)), (1000, 1000, vec![212]));
    }

    #[test]
    fn another_platform_and_a_missing_command_refuse_together() {
        let other =
            ImageConfig { architecture: "arm64".into(), os: "linux".into(), ..ImageConfig::default() };
        let faults = preflight(&other, None, None, SpecCommand::Absent).unwrap_err();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), [201, 202]);
        let danger = ImageConfig { working_dir: "/proc/self/fd/8".into(), ..config("1") };
        let faults = preflight(&danger, None, None, SpecCommand::Absent).unwrap_err();
        assert_eq!(faults.iter().map(|f| f.code.0).collect::<Vec<_>>(), [205]);
        assert!(preflight(&config("1"), None, None, SpecCommand::Given).is_ok());
    }
}
