//! `/etc/passwd` and `/etc/group` of an instance, written by the platform. They contain the image's own lines and
//! one for the user of the instance, so that programs find its name and home. The engine is configured to leave
//! both files alone, and reads these instead of the image's.

use super::rootfs::AccountFiles;
use crate::driver::workload::InsideUser;

/// Returns both files for a user. A user that the image does not know has `working_dir` as its home.
#[must_use]
pub fn write(image: &AccountFiles, user: InsideUser, working_dir: &str) -> AccountFiles {
    let InsideUser { uid, gid } = user;
    let plain = working_dir.starts_with('/') && !working_dir.contains([':', '\n', '\r']);
    let home = if plain { working_dir } else { "/" };
    AccountFiles {
        passwd: with_line(&image.passwd, uid, format!("{uid}:*:{uid}:{gid}:container user:{home}:/bin/sh\n")),
        group: with_line(&image.group, gid, format!("{gid}:x:{gid}:{uid}\n")),
    }
}

/// Returns the file, with this line added unless one of its lines has this id (the third field in both files).
/// Drops lines whose name is the number of another id: the engine takes ids for names first.
fn with_line(file: &[u8], id: u16, line: String) -> Vec<u8> {
    let wanted = id.to_string();
    let field = |line: &[u8], n: usize| line.split(|b| *b == b':').nth(n).unwrap_or_default().to_vec();
    let misleads = |line: &&[u8]| {
        let name = field(line, 0);
        !name.is_empty() && name.iter().all(u8::is_ascii_digit) && name != field(line, 2)
    };
    let lines: Vec<&[u8]> = file.split(|b| *b == b'\n').filter(|line| !misleads(line)).collect();
    let known = lines.iter().any(|line| field(line, 2) == wanted.as_bytes());
    let mut out = lines.join(&b'\n');
    if !known {
        if out.last().is_some_and(|last| *last != b'\n') {
            out.push(b'\n');
        }
        out.extend_from_slice(line.as_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_that_the_image_does_not_know_gets_a_line() {
        let user = InsideUser { uid: 7, gid: 8 };
        let bare = write(&AccountFiles::default(), user, "/srv");
        assert_eq!(bare.passwd, b"7:*:7:8:container user:/srv:/bin/sh\n");
        assert_eq!(bare.group, b"8:x:8:7\n");
        let image = AccountFiles { passwd: b"root:x:0:0::/:/bin/sh".to_vec(), group: b"g:x:8:\n".to_vec() };
        let added = write(&image, user, "a:b\nevil:x:0:0::/:");
        assert_eq!(added.passwd, b"root:x:0:0::/:/bin/sh\n7:*:7:8:container user:/:/bin/sh\n");
        assert_eq!(added.group, image.group);
        let known = AccountFiles { passwd: b"app:x:7:8::/home:/bin/sh\n".to_vec(), ..image };
        assert_eq!(write(&known, user, "/").passwd, known.passwd);
        let misleading = AccountFiles {
            passwd: b"7:x:0:0::/:\n".to_vec(),
            group: b"8:x:0:7\ng:x:8:\n50:x:50:\n".to_vec(),
        };
        let seen = write(&misleading, user, "/");
        assert_eq!(seen.passwd, b"7:*:7:8:container user:/:/bin/sh\n");
        assert_eq!(seen.group, b"g:x:8:\n50:x:50:\n");
    }
}
