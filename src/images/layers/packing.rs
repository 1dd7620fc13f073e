//! The compression of a layer, detected by its first bytes. The engine uses the same bytes. A layer that one
//! reader treats as a plain archive and another one decompresses would contain two file trees. Therefore every
//! format that the engine knows is listed here, and a plain archive must carry the tar magic.

use serde::{Deserialize, Serialize};

use super::Stop;

/// Bytes used for the detection: one block of an archive.
pub(super) const HEAD: usize = 512;

/// The compression of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// An uncompressed tar archive.
    Plain,
    /// gzip.
    Gzip,
}

impl Packing {
    /// Detects the compression from the first bytes.
    pub(super) fn of(head: &[u8]) -> Result<Self, Stop> {
        let refuse = |what: &str| {
            Err(Stop::Refused(format!(
                "it is packed with {what}, which is not supported: push it packed with gzip"
            )))
        };
        match head {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => refuse("zstd"),
            // A frame that zstd readers skip.
            [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50 => refuse("zstd"),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => refuse("xz"),
            [b'B', b'Z', b'h', ..] => refuse("bzip2"),
            // The end of an archive without entries, or an empty layer.
            head if head.iter().all(|byte| *byte == 0) => Ok(Self::Plain),
            head if head.len() == HEAD && &head[257..262] == b"ustar" => Ok(Self::Plain),
            _ => Err(Stop::Refused("it is not a tar archive, plain or packed with gzip".into())),
        }
    }

    /// Describes the contradiction between this compression and a media type; none if they agree.
    #[must_use]
    pub fn against(self, media_type: &str) -> Option<String> {
        let says = match media_type.rsplit(['.', '+']).next() {
            Some("gzip") => "gzip",
            Some("zstd") => "zstd",
            _ => "a plain archive",
        };
        let is = match self {
            Self::Gzip => "gzip",
            Self::Plain => "a plain archive",
        };
        (says != is).then(|| format!("its mediaType ({media_type}) means {says}, but the layer is {is}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(start: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        head[257..262].copy_from_slice(b"ustar");
        head[..start.len()].copy_from_slice(start);
        head
    }

    #[test]
    fn what_the_engine_would_unpack_is_never_a_plain_archive() {
        // Each of these is a valid name of a file in an archive.
        for start in [
            &b"\xfd7zXZ\0"[..],
            b"BZh9",
            b"BZh",
            b"\x28\xb5\x2f\xfd",
            b"\x50\x2a\x4d\x18",
            b"\x5f\x2a\x4d\x18",
            b"\x1f\x8b\x08",
        ] {
            assert_ne!(Packing::of(&archive(start)).ok(), Some(Packing::Plain), "{start:?}");
        }
        assert_eq!(Packing::of(&archive(b"etc/")).unwrap(), Packing::Plain);
        assert_eq!(Packing::of(&[0; HEAD]).unwrap(), Packing::Plain);
        assert_eq!(Packing::of(b"").unwrap(), Packing::Plain);
        assert_eq!(Packing::of(b"\x1f\x8b").unwrap(), Packing::Gzip);
        // The oldest tar format has no magic; no builder writes it.
        for start in [&b"name"[..], b"\x1f", b"PK\x03\x04"] {
            let mut head = archive(start);
            head[257..262].fill(0);
            assert!(Packing::of(&head).is_err(), "{start:?}");
        }
        assert!(Packing::of(&archive(b"short")[..300]).is_err());
    }

    #[test]
    fn a_media_type_is_held_against_the_bytes() {
        for (media_type, good) in [
            ("application/vnd.oci.image.layer.v1.tar", Packing::Plain),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Packing::Gzip),
            ("application/vnd.docker.image.rootfs.diff.tar", Packing::Plain),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Packing::Gzip),
        ] {
            for packing in [Packing::Plain, Packing::Gzip] {
                assert_eq!(
                    packing.against(media_type).is_none(),
                    packing == good,
                    "{media_type} {packing:?}"
                );
            }
        }
        assert!(Packing::Gzip.against("application/vnd.oci.image.layer.v1.tar+zstd").is_some());
    }
}
