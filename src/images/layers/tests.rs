//! Tests of the measurement, with archives built byte by byte.

use std::time::Duration;

use super::*;

type Given<'a> = (&'a str, u8, &'a str, &'a [u8]);

fn header(path: &[u8], kind: u8, link: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    if kind == b'3' {
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
    }
    header.set_cksum();
    header
}

fn layer(entries: &[Given<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, kind, link, bytes) in entries {
        out.extend_from_slice(header(path.as_bytes(), *kind, link, bytes.len() as u64).as_bytes());
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut packed, bytes).unwrap();
    packed.finish().unwrap()
}

fn bounds(stored: usize) -> LayerLimits {
    LayerLimits { stored: stored as u64, budget: u64::MAX, until: Instant::now() + Duration::from_secs(60) }
}

fn report(bytes: &[u8]) -> LayerReport {
    measure(bytes, &Digest::of(bytes), bounds(bytes.len())).unwrap()
}

fn why(bytes: &[u8]) -> String {
    match measure(bytes, &Digest::of(bytes), bounds(bytes.len())) {
        Err(Stop::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

fn merged(layers: &[&[Given<'_>]]) -> Merged {
    merge(&layers.iter().map(|entries| report(&layer(entries))).collect::<Vec<_>>())
}

const APP: &[u8] = b"app:x:7:8::/:/bin/sh\n";

#[test]
fn a_layer_is_measured_as_it_lies_on_the_disk() {
    let plain = layer(&[("a", b'0', "", &[1; 5000]), ("b/c/d", b'0', "", b""), ("e", b'2', "a", b"")]);
    let found = report(&plain);
    // a: two blocks; b, c, d, e: one each.
    assert_eq!((found.files, found.bytes), (5, 6 * 4096));
    assert_eq!(found.diff_id, Digest::of(&plain));
    let packed = report(&gzip(&plain));
    assert_eq!(packed, LayerReport { packing: Some(Packing::Gzip), ..found.clone() });
    // The members of gzip form one stream.
    let (first, second) = plain.split_at(700);
    assert_eq!(report(&[gzip(first), gzip(second)].concat()), packed);
    let many: Vec<u8> =
        (0..2000_u32).flat_map(|n| layer(&[(&format!("f{n}"), b'0', "", b"")])[..512].to_vec()).collect();
    assert_eq!(report(&many).bytes, 2000 * 4096);
}

/// Cases that Podman 4.3.1 was observed to refuse or accept.
#[test]
fn what_the_engine_cannot_unpack_is_refused_and_nothing_else() {
    let f = |path: &'static str| (path, b'0', "", &b"x"[..]);
    let s = |path: &'static str, link: &'static str| (path, b'2', link, &b""[..]);
    let h = |path: &'static str, link: &'static str| (path, b'1', link, &b""[..]);
    let d = |path: &'static str| (path, b'5', "", &b""[..]);
    let cases: &[(&[Given<'_>], bool)] = &[
        (&[f("a"), f("a")], false),
        (&[f("a"), f("./a")], false),
        (&[f("a"), f("b/../a")], false),
        (&[f("a"), f("/a")], true),
        (&[d("a"), d("a/")], false),
        (&[d("a"), f("a")], false),
        (&[s("a", "nowhere"), f("a/b")], false),
        (&[d("d"), s("a", "d"), f("a/b")], true),
        (&[d("d"), s("a", "/d"), f("a/b")], true),
        (&[d("d"), s("a", "../../../d"), f("a/b")], true),
        (&[s("a", "a"), f("a/b")], false),
        (&[f("a"), f("a/b")], false),
        (&[f("a/b"), s("a", "c")], true),
        (&[h("a", "bin/sh")], false),
        (&[h("a", "b"), f("b")], false),
        (&[d("d"), h("a", "d")], false),
        (&[f("a"), h("b", "../a")], true),
        (&[s("s", "bin"), h("a", "s")], true),
        (&[f("../a")], true),
        (&[f(".wh.nothing")], true),
        (&[f(".wh..wh..opq")], true),
        (&[f(".wh..wh.plnk/x")], true),
        (&[f("etc/.wh.")], false),
        (&[f("etc/.wh...")], false),
        (&[f("a"), f(".wh.a")], false),
        (&[f(".wh.a"), f("a")], true),
        (&[s("a", "")], false),
        (&[("a", b'7', "", b"")], false),
        (&[("a", b'Z', "", b"")], false),
        (&[("a", b'S', "", b"")], false),
        (&[f("")], true),
        (&[f(".")], true),
        (&[d("/")], true),
        (&[f("/")], false),
        (&[("a/", b'0', "", b"x")], true),
    ];
    for (entries, good) in cases {
        let bytes = layer(entries);
        let outcome = measure(&bytes[..], &Digest::of(&bytes[..]), bounds(bytes.len()));
        assert_eq!(outcome.is_ok(), *good, "{entries:?}: {outcome:?}");
    }
}

#[test]
fn names_of_users_are_regular_files_however_they_are_spelled() {
    let refused = |layers: &[&[Given<'_>]]| merged(layers).refused.unwrap_or_else(|| panic!("{layers:?}"));
    let dir = ("etc/", b'5', "", &b""[..]);
    for path in ["etc/passwd", "./etc/passwd", "/etc/passwd", "etc//passwd", "etc/../etc/passwd", "etc/group"]
    {
        for kind in [b'6', b'3', b'2', b'5'] {
            assert!(refused(&[&[(path, kind, "x", b"")]]).contains("not a regular file"), "{path}");
        }
    }
    assert!(refused(&[&[("etc", b'2', "usr", b"")]]).contains("not a directory"));
    assert!(refused(&[&[("etc", b'0', "", b"")]]).contains("not a directory"));
    assert!(refused(&[&[("etc/passwd", b'0', "", &vec![b'\n'; 300 << 10])]]).contains("256 KiB"));
    assert!(refused(&[&[("p", b'6', "", b""), ("etc/passwd", b'1', "p", b"")]]).contains("FIFO"));
    assert!(refused(&[&[dir, ("x", b'2', "etc", b""), ("x/passwd", b'6', "", b"")]]).contains("FIFO"));
    // The upper layer wins; whiteouts and opaque folders hide lower files.
    let good: &[Given<'_>] = &[dir, ("etc/passwd", b'0', "", APP)];
    let bad: &[Given<'_>] = &[dir, ("etc/passwd", b'6', "", b"")];
    assert_eq!(merged(&[bad, good]).passwd.as_bytes(), APP);
    assert!(merged(&[good, bad]).refused.is_some());
    assert!(merged(&[good, bad, &[("other", b'0', "", b"")]]).refused.is_some());
    for hidden in ["etc/.wh.passwd", "etc/.wh..wh..opq", ".wh.etc", ".wh..wh..opq"] {
        assert_eq!(merged(&[bad, &[(hidden, b'0', "", b"")]]), Merged::default(), "{hidden}");
    }
    // A folder in an upper layer hides a link and everything behind it.
    assert_eq!(merged(&[&[("etc", b'2', "x", b"")], good]).refused, None);
    // Device 0, 0 is the kernel's own whiteout.
    let mut device = header(b"etc/passwd", b'3', "", 0);
    device.set_device_major(0).unwrap();
    device.set_device_minor(0).unwrap();
    device.set_cksum();
    let hidden = report(device.as_bytes());
    assert_eq!(merge(&[report(&layer(bad)), hidden]), Merged::default());
}

fn extended(kind: u8, extension: &[u8], entry: &tar::Header) -> Vec<u8> {
    let mut out = header(b"x", kind, "", extension.len() as u64).as_bytes().to_vec();
    out.extend_from_slice(extension);
    out.resize(out.len().next_multiple_of(512), 0);
    out.extend_from_slice(entry.as_bytes());
    out
}

#[test]
fn long_names_and_records_of_every_form_are_heard() {
    let fifo = header(b"harmless", b'6', "", 0);
    for (kind, extension) in
        [(b'x', &b"19 path=etc/passwd\n"[..]), (b'L', b"etc/passwd\0"), (b'L', b"./etc/passwd\0rest")]
    {
        let found = report(&extended(kind, extension, &fifo));
        assert_eq!(found.passwd, There::Refused("etc/passwd is a FIFO, not a regular file".into()));
    }
    let file = header(b"a", b'0', "", 0);
    for record in ["SCHILY.xattr.trusted.overlay.redirect=/evil", "SCHILY.xattr.trusted.overlay.opaque=y"] {
        let line = format!("{} {record}\n", record.len() + 4);
        assert!(why(&extended(b'x', line.as_bytes(), &file)).contains("trusted"));
    }
    let sparse = b"33 GNU.sparse.realsize=1000000000\n";
    assert!(why(&extended(b'x', &[b"34", &sparse[2..]].concat(), &file)).contains("sparse"));
    // A record of 2 GiB is refused by its header, without reading it.
    let bomb = header(b"x", b'x', "", 2 << 30);
    assert!(why(bomb.as_bytes()).contains("1 MiB"));
    assert!(why(&extended(b'x', b"99 path=a\n", &file)).contains("extended header"));
    assert!(why(&extended(b'g', b"19 path=etc/passwd\n", &file)).contains("all entries"));
    let not_utf8 = header(b"a\xff\xfe", b'0', "", 0);
    assert_eq!(report(not_utf8.as_bytes()).files, 1);
}

struct Away;
impl Read for Away {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::UnexpectedEof.into())
    }
}

#[test]
fn bombs_cost_what_their_bounds_say() {
    let zeros = layer(&[("a", b'0', "", &vec![0; 8 << 20])]);
    assert!(why(&gzip(&zeros)).contains("200 times"));
    // Small layers may compress at any ratio.
    assert_eq!(report(&gzip(&layer(&[("a", b'0', "", &vec![0; 900 << 10])]))).files, 1);
    // A claimed size of 2 GiB without content.
    assert!(why(header(b"a", b'0', "", 2 << 30).as_bytes()).contains("cut off"));
    let quota = LayerLimits { budget: 1 << 20, ..bounds(8 << 20) };
    assert!(matches!(measure(&zeros[..], &Digest::of(&zeros[..]), quota), Err(Stop::Quota)));
    let late = LayerLimits { until: Instant::now(), ..bounds(zeros.len()) };
    assert!(matches!(measure(&zeros[..], &Digest::of(&zeros[..]), late), Err(Stop::Late)));
    // The engine holds the bytes after the archive's end in memory.
    let mut behind = layer(&[("a", b'0', "", b"")]);
    behind.resize(behind.len() + (2 << 20), 1);
    assert!(why(&behind).contains("follows its end"));
    assert!(why(b"\x28\xb5\x2f\xfd....").contains("zstd"));
    assert!(why(b"\xfd7zXZ\0 and so on").contains("xz"));
    assert!(why(&[b'x'; 2048]).contains("not a tar archive"));
    let packed = gzip(&layer(&[("a", b'0', "", b"")]));
    assert!(why(&packed[..packed.len() - 4]).contains("damaged"));
    assert!(why(&[&packed[..], b"rest"].concat()).contains("damaged"));
    assert!(
        matches!(measure(Away, &Digest::of(b""), bounds(1)), Err(Stop::Broken(_))),
        "the registry's fault is not the layer's"
    );
    // Deep paths and link loops terminate.
    let deep = "d/".repeat(49) + "x";
    let many: Vec<Given<'_>> = vec![("l", b'2', "l/l/l/l", b""), (&deep, b'0', "", b"")];
    assert_eq!(report(&layer(&many)).files, 51);
}

/// Returns one byte at a time.
struct Slow<'a>(&'a [u8]);
impl Read for Slow<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = into.len().min(1);
        self.0.read(&mut into[..most])
    }
}

/// One reader sees an archive, the engine sees compressed data: two file trees in one layer.
#[test]
fn a_layer_of_two_forms_is_refused() {
    let inner = b"what the engine would find";
    for magic in [&b"\xfd7zXZ\0\0\x01"[..], b"BZh91AY&SY", b"\x28\xb5\x2f\xfd", b"\x53\x2a\x4d\x18"] {
        let mut bytes = header(magic, b'0', "", inner.len() as u64).as_bytes().to_vec();
        bytes.extend_from_slice(inner);
        bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
        assert_eq!(tar::Archive::new(&bytes[..]).entries().unwrap().count(), 1, "a plain archive to others");
        assert!(why(&bytes).contains("is packed with"), "{magic:?}");
    }
    // Even if the first bytes arrive one by one, all of them decide the format.
    let packed = gzip(&layer(&[("a", b'0', "", b"x")]));
    let found = measure(Slow(&packed), &Digest::of(&packed), bounds(packed.len())).unwrap();
    assert_eq!((found.files, found.packing), (1, Some(Packing::Gzip)));
    assert_eq!(report(&layer(&[("a", b'0', "", b"x")])).packing, Some(Packing::Plain));
}

#[test]
fn a_verdict_is_only_given_on_the_bytes_of_the_digest() {
    let good = layer(&[("a", b'0', "", b"x")]);
    let bad = layer(&[("a", b'0', "", b"x"), ("a", b'0', "", b"x")]);
    for bytes in [&good, &bad, &gzip(&good)] {
        let other = measure(&bytes[..], &Digest::of(b"other"), bounds(bytes.len()));
        assert!(matches!(other, Err(Stop::Altered)), "{other:?}");
        for size in [bytes.len() - 1, bytes.len() + 1] {
            let other = measure(&bytes[..], &Digest::of(bytes), bounds(size));
            assert!(matches!(other, Err(Stop::Altered)), "{other:?}");
        }
        // Cut off in transit, before and after the point of the verdict.
        for cut in [1, 600, bytes.len() - 1] {
            let other = measure(&bytes[..cut.min(bytes.len() - 1)], &Digest::of(bytes), bounds(bytes.len()));
            assert!(matches!(other, Err(Stop::Altered)), "{cut}: {other:?}");
        }
    }
}

#[test]
fn what_becomes_no_file_counts_as_it_is_read() {
    let global = extended(b'g', b"13 comment=x\n", &header(b"a", b'0', "", 0));
    let globals = |count: usize| [&global[..1024].repeat(count), &global[1024..]].concat();
    assert_eq!(report(&globals(900)).files, 1);
    assert!(why(&globals(2_100)).contains("1 MiB"));
    // Headers without content, before one entry.
    let empty = header(b"x", b'x', "", 0).as_bytes().repeat(3_000);
    assert!(why(&empty).contains("1 MiB"));
    // Headers of entries: each within its limit, but all of them count.
    let comment = format!("{} comment={}\n", 100_000 + 16, "x".repeat(100_000));
    assert_eq!(comment.len(), 100_016);
    let fat: Vec<u8> = (0..20)
        .flat_map(|n| extended(b'x', comment.as_bytes(), &header(format!("d{n}").as_bytes(), b'5', "", 0)))
        .collect();
    assert!(report(&fat).bytes >= fat.len() as u64, "{}", report(&fat).bytes);
    let small = LayerLimits { budget: 1 << 20, ..bounds(fat.len()) };
    assert!(matches!(measure(&fat[..], &Digest::of(&fat), small), Err(Stop::Quota)));
}

#[test]
fn text_that_is_kept_is_bounded_after_it_was_read_as_text() {
    let bytes = [&[0xff; 200][..], b"\n"].concat().repeat(1_000);
    let found = report(&layer(&[("etc", b'5', "", b""), ("etc/passwd", b'0', "", &bytes)]));
    let There::File(text) = found.passwd else { panic!("{:?}", found.passwd) };
    assert!(text.len() <= KEPT && text.ends_with('\n'), "{}", text.len());
}
