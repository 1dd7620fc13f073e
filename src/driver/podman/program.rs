//! Finds the reason why the program of an image cannot run here in the image's files, before the engine tries. The
//! engine's own messages for it are few and alike.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{FileType, Mode, OFlags, Stat, getxattr, open};
use serde::{Deserialize, Serialize};

use super::tree::{Person, ResolvedPath, follow};

/// `PATH` when neither spec nor image sets it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of the head of a file that are read, as the kernel does.
const HEAD: usize = 256;
/// Maximum number of program headers that are read.
const HEADERS: usize = 64;
/// Machines whose programs run here (elf(5): x86-64 and i386).
const MACHINES: [u16; 2] = [62, 3];
/// Maximum number of folders in PATH.
const FOLDERS: usize = 64;
/// Maximum depth of interpreters of interpreters.
const DEPTH: u8 = 4;

/// The program of an instance, and its user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The first word of the command.
    pub word: String,
    /// `PATH` in the program's environment.
    pub path: Option<String>,
    /// The working directory.
    pub working_dir: String,
    /// User that runs it.
    pub person: Person,
    /// Writable folders, without links; each belongs to the person.
    pub scratch: Vec<String>,
    /// Folders, with links resolved, in which no file may be executed.
    pub closed: Vec<String>,
}

/// Checks a program. The error is a sentence that says why it cannot run and what to change.
pub fn check(root: BorrowedFd<'_>, program: &Program) -> Result<(), String> {
    check_working_dir(root, program)?;
    let word = program.word.as_str();
    if word.is_empty() {
        return Ok(());
    }
    let shown = show(word);
    let Some(found) = find(root, program)? else {
        return Err(if word.contains('/') {
            format!(
                "its command {shown} is not in the image; correct command, or ENTRYPOINT and CMD in the Dockerfile"
            )
        } else {
            let path = show(program.path.as_deref().unwrap_or(PATH));
            let shell = if matches!(word, "sh" | "bash") {
                "; an image without a shell needs command or ENTRYPOINT as a list of words"
            } else {
                "; write its whole path, or install it in the Dockerfile"
            };
            format!("its command {shown} is in none of the folders of PATH ({path}){shell}")
        });
    };
    examine(root, program, &shown, &found, 0)
}

fn show(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(120).collect()
}

/// The folder exists by now: the engine creates it if the image does not have it.
fn check_working_dir(root: BorrowedFd<'_>, program: &Program) -> Result<(), String> {
    let dir = program.working_dir.as_str();
    let Ok(place) = follow(root, dir) else { return Ok(()) };
    let Some((_, stat)) = &place.there else { return Ok(()) };
    // A scratch folder belongs to the person, so only the image's folders above it count.
    let is_covered = |folder: &&String| place.path == **folder || lies_in(&place.path, folder);
    let own = program.scratch.iter().find(is_covered).map(|folder| folder.matches('/').count());
    let folders = place.passed.iter().chain([stat]).take(own.unwrap_or(usize::MAX));
    if folders.into_iter().any(|stat| !program.person.may(stat, 1)) {
        let (uid, mode) = (program.person.uid, stat.st_mode & 0o7777);
        return Err(format!(
            "user {uid} may not enter its working directory {} (owner {}:{}, mode {mode:04o}); chmod or chown it in the \
             Dockerfile",
            show(dir),
            stat.st_uid,
            stat.st_gid
        ));
    }
    Ok(())
}

/// Returns the file that the command's first word stands for; none when it does not exist.
fn find(root: BorrowedFd<'_>, program: &Program) -> Result<Option<ResolvedPath>, String> {
    let word = program.word.as_str();
    if word.contains('/') {
        let path =
            if word.starts_with('/') { word.to_owned() } else { format!("{}/{word}", program.working_dir) };
        return match follow(root, &path) {
            Ok(place) if place.is_kernels() || place.there.is_some() => Ok(Some(place)),
            Ok(_) => Ok(None),
            Err(why) => Err(format!("its command {} {why}", show(word))),
        };
    }
    let mut denied = None;
    let folders: Vec<&str> = program.path.as_deref().unwrap_or(PATH).split(':').collect();
    if folders.len() > FOLDERS {
        return Err(format!("its PATH names {} folders; the maximum is {FOLDERS}", folders.len()));
    }
    for folder in folders {
        let folder = if folder.is_empty() { program.working_dir.as_str() } else { folder };
        let Ok(place) = follow(root, &format!("{folder}/{word}")) else { continue };
        if place.is_kernels() {
            return Ok(Some(place));
        }
        let Some((_, stat)) = &place.there else { continue };
        if place.kind() != Some(FileType::RegularFile) {
            continue;
        }
        if stat.st_mode & 0o111 != 0 {
            return Ok(Some(place));
        }
        denied.get_or_insert(place);
    }
    Ok(denied)
}

fn examine(
    root: BorrowedFd<'_>,
    program: &Program,
    shown: &str,
    found: &ResolvedPath,
    depth: u8,
) -> Result<(), String> {
    // A path that the kernel fills is not in the image; only the start shows its contents.
    let Some((_, stat)) = &found.there else { return Ok(()) };
    if found.kind() != Some(FileType::RegularFile) {
        return Err(format!("its command {shown} is a folder or another thing that is not a file"));
    }
    if let Some(folder) = program.closed.iter().find(|folder| lies_in(&found.path, folder)) {
        return Err(format!(
            "its command {shown} lies in the scratch {folder}, where nothing may be executed; move it, or write \
             {folder}: {{size: 64Mi, exec: true}} under scratch"
        ));
    }
    may_execute(program, shown, found, stat)?;
    if let Some(names) = capabilities(found) {
        return Err(format!(
            "{shown} has file capabilities ({names}), which no app has here, so that the kernel refuses to run it: write \
             RUN setcap -r {shown} in the Dockerfile, and let it listen on a port above 1023"
        ));
    }
    let Some(file) = read_only(found) else { return Ok(()) };
    let mut head = Vec::new();
    if (&file).take(HEAD as u64).read_to_end(&mut head).is_err() {
        return Ok(());
    }
    if let Some(line) = head.strip_prefix(b"#!") {
        return script(root, program, shown, line, depth);
    }
    if !head.starts_with(b"\x7fELF") {
        return Err(format!(
            "its command {shown} is not a program: it starts neither as an ELF file nor with #! and an interpreter"
        ));
    }
    if let Some(machine) = foreign_machine(&head) {
        return Err(format!(
            "its command {shown} is a program for {machine}, and this machine runs x86-64; build it with --platform \
             linux/amd64"
        ));
    }
    if let Some(loader) = loader(&file, &head)
        && follow(root, &loader).is_ok_and(|place| place.there.is_none() && !place.is_kernels())
    {
        return Err(format!(
            "its command {shown} needs the loader {}, which is not in the image: link it statically, or use a base image \
             with the C library that it was built for",
            show(&loader)
        ));
    }
    Ok(())
}

fn lies_in(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

fn may_execute(program: &Program, shown: &str, found: &ResolvedPath, stat: &Stat) -> Result<(), String> {
    // An access control list may grant what the mode does not.
    let mut none = [0_u8; 0];
    let lists =
        found.handle().is_some_and(|path| getxattr(path, "system.posix_acl_access", &mut none).is_ok());
    if lists {
        return Ok(());
    }
    let uid = program.person.uid;
    if found.passed.iter().any(|folder| !program.person.may(folder, 1)) {
        return Err(format!(
            "user {uid} may not enter a folder above its command {shown}; chmod the folders in the Dockerfile"
        ));
    }
    if !program.person.may(stat, 1) {
        return Err(format!(
            "its command {shown} is not executable for user {uid} (owner {}:{}, mode {:04o}); write RUN chmod 755 in the \
             Dockerfile",
            stat.st_uid,
            stat.st_gid,
            stat.st_mode & 0o7777
        ));
    }
    Ok(())
}

/// Returns the capabilities of the file, which the kernel would have to grant to its process, or refuse to run it
/// (capabilities(7), linux/capability.h: struct vfs_cap_data).
fn capabilities(found: &ResolvedPath) -> Option<String> {
    let mut data = [0_u8; 64];
    let length = getxattr(found.handle()?, "security.capability", &mut data).ok()?;
    parse_capabilities(data.get(..length)?)
}

fn parse_capabilities(data: &[u8]) -> Option<String> {
    const EFFECTIVE: u32 = 1;
    let word = |at: usize| {
        let bytes: [u8; 4] = data.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    let permitted = u64::from(word(4)?) | u64::from(word(12).unwrap_or(0)) << 32;
    if word(0)? & EFFECTIVE == 0 || permitted == 0 {
        return None;
    }
    let known =
        [(10, "cap_net_bind_service"), (12, "cap_net_admin"), (13, "cap_net_raw"), (14, "cap_ipc_lock")];
    let names = (0..64).filter(|bit| permitted & (1 << bit) != 0).map(|bit| {
        let name = known.iter().find(|(number, _)| *number == bit).map(|(_, name)| (*name).to_owned());
        name.unwrap_or_else(|| format!("capability {bit}"))
    });
    Some(names.collect::<Vec<_>>().join(", "))
}

/// Opens a regular file for reading. It reopens the handle that was found, so that no other file takes its place.
fn read_only(found: &ResolvedPath) -> Option<File> {
    let (file, _) = found.there.as_ref()?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok().map(File::from)
}

fn script(
    root: BorrowedFd<'_>,
    program: &Program,
    shown: &str,
    line: &[u8],
    depth: u8,
) -> Result<(), String> {
    let line = line.split(|b| *b == b'\n').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else { return Ok(()) };
    if line.ends_with('\r') {
        return Err(format!(
            "the first line of its command {shown} ends with a Windows line break; write the file with plain line feeds"
        ));
    }
    let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
    let Some(interpreter) = words.next().filter(|word| word.starts_with('/')) else { return Ok(()) };
    let name = show(interpreter);
    let missing = |what: &str| {
        format!(
            "the first line of its command {shown} names {what}, which is not in the image; install it in the Dockerfile"
        )
    };
    let place = match follow(root, interpreter) {
        Ok(place) if place.there.is_none() && !place.is_kernels() => return Err(missing(&name)),
        Ok(place) => place,
        Err(_) => return Ok(()),
    };
    if interpreter.rsplit('/').next() == Some("env")
        && let Some(word) = words.next().filter(|word| !word.starts_with('-') && !word.contains('='))
    {
        let asked = Program { word: word.to_owned(), ..program.clone() };
        if find(root, &asked).is_ok_and(|found| found.is_none()) {
            return Err(missing(&show(word)));
        }
    }
    if depth >= DEPTH {
        return Ok(());
    }
    examine(root, program, &format!("{shown} (by {name})"), &place, depth + 1)
}

/// Returns the name of the machine that an ELF file is for, unless it runs here.
fn foreign_machine(head: &[u8]) -> Option<String> {
    let machine = u16::from_le_bytes(head.get(18..20)?.try_into().ok()?);
    // Big-endian machines are not supported, whatever their number.
    if head.get(5) == Some(&1) && MACHINES.contains(&machine) {
        return None;
    }
    let names = [(183, "aarch64 (arm64)"), (40, "arm"), (243, "riscv"), (21, "powerpc"), (22, "s390")];
    let known = names.iter().find(|(number, _)| *number == machine || *number == machine.swap_bytes());
    Some(known.map_or_else(|| format!("machine {machine}"), |(_, name)| (*name).to_owned()))
}

/// Returns the loader that an ELF file names (elf(5): `PT_INTERP`).
fn loader(mut file: &File, head: &[u8]) -> Option<String> {
    const INTERP: u64 = 3;
    let wide = head.get(4) == Some(&2);
    let number = |bytes: &[u8], at: usize, length: usize| {
        let part = bytes.get(at..at + length)?;
        Some(part.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    let (table, size, count) = if wide {
        (number(head, 32, 8)?, number(head, 54, 2)?, number(head, 56, 2)?)
    } else {
        (number(head, 28, 4)?, number(head, 42, 2)?, number(head, 44, 2)?)
    };
    let size = usize::try_from(size).ok().filter(|size| (32..=256).contains(size))?;
    let count = usize::try_from(count).ok()?.min(HEADERS);
    file.seek(SeekFrom::Start(table)).ok()?;
    let mut headers = vec![0_u8; size * count];
    file.read_exact(&mut headers).ok()?;
    let header = headers.chunks(size).find(|header| number(header, 0, 4) == Some(INTERP))?;
    let (offset, length) = if wide {
        (number(header, 8, 8)?, number(header, 32, 8)?)
    } else {
        (number(header, 4, 4)?, number(header, 16, 4)?)
    };
    let length = usize::try_from(length).ok().filter(|length| (2..=512).contains(length))?;
    file.seek(SeekFrom::Start(offset)).ok()?;
    let mut name = vec![0_u8; length];
    file.read_exact(&mut name).ok()?;
    let name = name.split(|b| *b == 0).next()?;
    std::str::from_utf8(name).ok().filter(|name| name.starts_with('/')).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    fn put(root: &Path, path: &str, bytes: &[u8], mode: u32) {
        let at = root.join(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(&at, bytes).unwrap();
        fs::set_permissions(&at, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// An ELF file with a loader, or without one.
    fn elf(machine: u16, loader: &str) -> Vec<u8> {
        let mut out = vec![0_u8; 64];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        out[18..20].copy_from_slice(&machine.to_le_bytes());
        out[32] = 64;
        out[54] = 56;
        if !loader.is_empty() {
            out[56] = 1;
            let mut header = vec![0_u8; 56];
            header[0] = 3;
            header[8] = 120;
            header[32..40].copy_from_slice(&(loader.len() as u64 + 1).to_le_bytes());
            out.extend(header);
            out.extend(loader.as_bytes());
            out.push(0);
        }
        out
    }

    #[test]
    fn each_reason_has_its_own_sentence() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let root = dir.path();
        put(root, "bin/good", &elf(62, ""), 0o755);
        put(root, "bin/arm", &elf(183, ""), 0o755);
        put(root, "bin/musl", &elf(62, "/lib/ld-musl-x86_64.so.1"), 0o755);
        put(root, "bin/glibc", &elf(62, "/lib64/ld.so"), 0o755);
        put(root, "lib64/ld.so", b"x", 0o755);
        put(root, "bin/plain", &elf(62, ""), 0o644);
        put(root, "bin/mine", &elf(62, ""), 0o700);
        put(root, "bin/text", b"echo hello\n", 0o755);
        put(root, "bin/none", b"", 0o755);
        put(root, "bin/script", b"#!/bin/good -x\n", 0o755);
        put(root, "bin/lost", b"#!/bin/bash\n", 0o755);
        put(root, "bin/windows", b"#!/bin/good\r\n", 0o755);
        put(root, "bin/env", &elf(62, ""), 0o755);
        put(root, "bin/snake", b"#!/bin/env python3\n", 0o755);
        put(root, "tmp/run", &elf(62, ""), 0o755);
        fs::create_dir_all(root.join("shut")).unwrap();
        put(root, "shut/in", &elf(62, ""), 0o755);
        fs::set_permissions(root.join("shut"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("/bin/lost", root.join("bin/link")).unwrap();
        symlink("/proc/self/exe", root.join("bin/self")).unwrap();
        let top = rustix::fs::openat(rustix::fs::CWD, root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
            .unwrap();
        // The files belong to root or to the tester; the app runs as another user.
        let person = Person { uid: 1_999, gid: 1_999, groups: vec![] };
        let look = |word: &str, dir: &str| {
            let program = Program {
                word: word.into(),
                path: None,
                working_dir: dir.into(),
                person: person.clone(),
                scratch: vec!["/tmp".into(), "/srv/data".into()],
                closed: vec!["/tmp".into()],
            };
            check(top.as_fd(), &program)
        };
        for good in
            ["good", "/bin/good", "./good", "glibc", "script", "bin/../good", "/proc/self/exe", "self", ""]
        {
            let dir = if good.starts_with("bin") { "/" } else { "/bin" };
            let good = if good == "bin/../good" { "bin/../bin/good" } else { good };
            assert_eq!(look(good, dir), Ok(()), "{good}");
        }
        for (word, sign) in [
            ("/nope", "is not in the image"),
            ("sh", "none of the folders of PATH"),
            ("arm", "aarch64"),
            ("musl", "the loader /lib/ld-musl-x86_64.so.1"),
            ("plain", "mode 0644"),
            ("mine", "not executable for user 1999"),
            ("text", "neither as an ELF file"),
            ("none", "neither as an ELF file"),
            ("lost", "/bin/bash, which is not in the image"),
            ("link", "/bin/bash, which is not in the image"),
            ("windows", "Windows"),
            ("snake", "python3, which is not in the image"),
            ("/tmp/run", "exec: true"),
            ("/bin", "is a folder"),
            ("/bin/good/x", "leads through a file"),
            ("/shut/in", "enter a folder above"),
        ] {
            let why = look(word, "/").unwrap_err();
            assert!(why.contains(sign), "{word}: {why}");
        }
        assert!(look("good", "/shut").unwrap_err().contains("may not enter its working directory /shut"));
        assert_eq!(look("good", "/new"), Ok(()));
        // What a scratch folder covers belongs to the app.
        for folder in ["srv/data/own", "srv/shut/own"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for folder in ["srv/data/own", "srv/data", "srv/shut"] {
            fs::set_permissions(root.join(folder), fs::Permissions::from_mode(0o700)).unwrap();
        }
        assert_eq!(look("good", "/srv/data"), Ok(()));
        assert_eq!(look("good", "/srv/data/own"), Ok(()));
        assert!(look("good", "/srv/shut").is_err());
    }

    #[test]
    fn capabilities_of_a_file_are_read_as_the_kernel_reads_them() {
        let data = |flags: u32, low: u32| {
            let mut out = (0x0200_0000 | flags).to_le_bytes().to_vec();
            out.extend(low.to_le_bytes());
            out.extend([0; 12]);
            out
        };
        assert_eq!(parse_capabilities(&data(1, 1 << 10)).as_deref(), Some("cap_net_bind_service"));
        assert_eq!(
            parse_capabilities(&data(1, 1 << 10 | 1 << 21)).as_deref(),
            Some("cap_net_bind_service, capability 21")
        );
        assert_eq!(parse_capabilities(&data(0, 1 << 10)), None);
        assert_eq!(parse_capabilities(&data(1, 0)), None);
        assert_eq!(parse_capabilities(b"abc"), None);
    }
}
