//! `deploy/packages` leaves no installed service enabled, however it ends. The real script runs with a fake
//! package manager, on its own folders in a mount namespace.

use std::process::Command;

/// Own folders, a fake package manager, two runs. Then prints what remains, one line each.
const STAGE: &str = r#"
set -eu
mount --make-rprivate /
mount -t tmpfs stage "$1"
mkdir "$1/bin" "$1/up" "$1/work" "$1/sbin-up" "$1/sbin-work"
mount -t overlay -o "lowerdir=/etc,upperdir=$1/up,workdir=$1/work" stage /etc
mount -t overlay -o "lowerdir=/usr/sbin,upperdir=$1/sbin-up,workdir=$1/sbin-work" stage /usr/sbin
mount -t tmpfs stage /usr/lib/systemd/system
mount -t tmpfs stage /var/lib
rm -rf /etc/systemd/system /usr/sbin/policy-rc.d /etc/postgresql-common
wants=/etc/systemd/system/multi-user.target.wants
mkdir -p "$wants"
[ "$3" = fresh ] || { touch /lib/systemd/system/docker-registry.service; ln -s x "$wants/docker-registry.service"; }
printf '#!/bin/sh\n[ ! -e "%s/installed" ] || echo installed\n' "$1" > "$1/bin/dpkg-query"
printf '#!/bin/sh\n' > "$1/bin/dpkg"
cat > "$1/bin/apt-get" <<END
#!/bin/sh
[ "\$1" = install ] || exit 0
for one in docker-registry postgresql; do
  touch /lib/systemd/system/\$one.service
  ln -sf /lib/systemd/system/\$one.service $wants/\$one.service
done
case $2 in
  good) ;;
  fails) exit 100 ;;
  *) kill -$2 \$PPID; sleep 1 ;;
esac
touch "$1/installed"
END
chmod 755 "$1"/bin/*
export PATH="$1/bin:$PATH"
left() {
  for link in "$wants"/*; do
    name=$(basename "$link")
    [ ! -L "$link" ] || [ "$(readlink "/etc/systemd/system/$name" || true)" = /dev/null ] || echo "$4 on $name"
  done
  for link in /etc/systemd/system/*.service; do [ ! -L "$link" ] || echo "$4 masked $(basename "$link")"; done
  [ ! -e /usr/sbin/policy-rc.d ] || echo "$4 policy"
  [ ! -e /var/lib/bulkhead-packages ] || echo "$4 note"
}
deploy/packages >/dev/null 2>&1 || true
left "$1" "$2" "$3" first
touch "$1/installed"
deploy/packages >/dev/null 2>&1
left "$1" "$2" "$3" second
"#;

fn play(ending: &str, machine: &str) -> Vec<String> {
    let stage = tempfile::tempdir().unwrap();
    let done = Command::new("unshare")
        .args(["--mount", "bash", "-c", STAGE, "stage"])
        .arg(stage.path())
        .args([ending, machine])
        .output()
        .unwrap();
    assert!(done.status.success(), "{ending}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn no_service_is_on_however_an_installation_ends() {
    assert_eq!(play("good", "fresh"), Vec::<String>::new());
    for ending in ["fails", "TERM", "INT", "HUP"] {
        assert_eq!(play(ending, "fresh"), ["first note"], "{ending}");
    }
    // Killed, it cannot clean up: the services it installed are masked, and the next run unmasks them.
    let left = play("KILL", "fresh");
    assert!(left.contains(&"first masked postgresql.service".to_owned()), "{left:?}");
    assert!(left.iter().all(|line| line.starts_with("first") && !line.contains(" on ")), "{left:?}");
}

#[test]
fn a_service_that_was_there_before_stays_as_it_is() {
    for ending in ["good", "fails", "KILL"] {
        let on: Vec<String> = play(ending, "used").into_iter().filter(|line| line.contains(" on ")).collect();
        assert_eq!(on, ["first on docker-registry.service", "second on docker-registry.service"], "{ending}");
    }
}

/// Returns a folder with two programs that print this version.
fn programs(version: &str) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    for name in ["bulkhead", "bulkhead-agent"] {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\necho {name} {version}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

fn run(program: &str, args: &[&str]) -> (bool, String) {
    let done = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    (done.status.success(), text)
}

#[test]
fn the_package_installs_and_upgrades_without_a_compiler() {
    let version = env!("CARGO_PKG_VERSION");
    let (built, into, machine) =
        (programs(version), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let show = |path: &std::path::Path| path.display().to_string();
    let (good, file) =
        run("deploy/package", &["--folder", &show(built.path()), "--into", &show(into.path())]);
    assert!(good, "{file}");
    let file = file.trim();
    let (_, list) = run("dpkg-deb", &["-c", file]);
    assert!(list.contains("/usr/share/doc/bulkhead/docs/operator/install.md"), "{list}");
    let root = machine.path();
    std::fs::create_dir_all(root.join("var/lib/dpkg/info")).unwrap();
    std::fs::create_dir_all(root.join("var/lib/dpkg/updates")).unwrap();
    std::fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
    let dpkg = |args: &[&str]| {
        let place = format!("--root={}", root.display());
        let mut all = vec![&*place, "--force-script-chrootless", "--force-depends", "--log=/dev/null"];
        all.extend(args);
        run("dpkg", &all)
    };
    let (good, text) = dpkg(&["-i", file]);
    assert!(good && text.contains("bulkhead install"), "{text}");
    for path in ["usr/bin/bulkhead", "usr/bin/bulkhead-agent", "usr/lib/bulkhead/packages"] {
        let meta = std::fs::metadata(root.join(path)).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o7777, 0o755, "{path}");
    }
    // Again, as an upgrade: it prints no first steps, and starts no service that was not there.
    let (good, text) = dpkg(&["-i", file]);
    assert!(good && !text.contains("next:"), "{text}");
    assert!(dpkg(&["-r", "bulkhead"]).0 && !root.join("usr/bin/bulkhead").exists());
    // Programs of another version than the source tree are not packed.
    let other = programs("9.9.9");
    let (good, text) =
        run("deploy/package", &["--folder", &show(other.path()), "--into", &show(into.path())]);
    assert!(!good && text.contains("9.9.9"), "{text}");
}

#[test]
fn only_an_installed_program_of_this_version_takes_the_place_of_a_build() {
    let look = |version: &str| {
        let built = programs(version);
        let script = ". deploy/installed && PROGRAMS=$0 installed_program";
        let (found, text) = run("bash", &["-c", script, &built.path().display().to_string()]);
        (found, text.trim() == built.path().join("bulkhead").display().to_string())
    };
    assert_eq!(look(env!("CARGO_PKG_VERSION")), (true, true));
    assert_eq!(look("0.0.1"), (false, false));
    // Without the package there is no installed program.
    let (found, text) = run("bash", &["-c", ". deploy/installed && PROGRAMS=/nowhere installed_program"]);
    assert!(!found && text.is_empty(), "{text}");
}
