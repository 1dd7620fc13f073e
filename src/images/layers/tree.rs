//! The file tree that the engine creates from a layer, without the files. The engine (containers/storage)
//! unpacks each layer separately into its own root and stops at entries that it cannot create. This code
//! refuses the same entries, and knows the final `etc`, `etc/passwd` and `etc/group`.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use super::Stop;
use super::archive::{ArchiveEntry, PATH, Type};

/// Maximum entries of a layer, including folders that no entry names.
pub(super) const ENTRIES: usize = 500_000;
/// Maximum symbolic links on one path (the kernel's limit).
const LINKS: usize = 40;
/// Maximum steps of all paths of a layer together.
const STEPS: usize = 50_000_000;
/// Maximum bytes of a layer's links and name lists that are held together.
const TEXT: usize = 8 << 20;

/// A file of a layer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LayerNode {
    Directory {
        opaque: bool,
    },
    /// Its size, and its text if it may be a name list.
    File(u64, Option<Box<str>>),
    SymbolicLink(Box<[u8]>),
    Fifo,
    Device,
    /// Hides the lower layers' file.
    Whiteout,
}

/// A tree. Names are stored as keyed hashes, so long file names take no memory.
pub(super) struct Tree {
    nodes: Vec<LayerNode>,
    links: HashMap<(u32, u64), u32>,
    seen: HashSet<u64>,
    hasher: RandomState,
    steps: usize,
    /// Number of files and directories; each name of a hard link counts.
    made: usize,
    /// Bytes of text that the nodes hold.
    held: usize,
    /// Number of folders that no entry names.
    implied: u64,
}

const ROOT: u32 = 0;

fn refuse<T>(why: &str) -> Result<T, Stop> {
    Err(Stop::Refused(format!("it cannot be unpacked: {why}")))
}

/// Splits a path relative to the root; `..` never leads out of it.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts
}

/// Normalizes a path like Go's `filepath.Clean`: the engine compares paths in this form.
fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.first() == Some(&b'/');
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| *last != b"..") => {
                parts.pop();
            }
            b".." if rooted => {}
            part => parts.push(part),
        }
    }
    let mut out = if rooted { b"/".to_vec() } else { Vec::new() };
    out.extend_from_slice(&parts.join(&b'/'));
    out
}

impl Tree {
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![LayerNode::Directory { opaque: false }],
            links: HashMap::new(),
            seen: HashSet::new(),
            hasher: RandomState::new(),
            steps: 0,
            made: 0,
            held: 0,
            implied: 0,
        }
    }

    /// Returns the number of files without the root.
    pub(super) fn len(&self) -> usize {
        self.made
    }

    /// Returns the number of folders that no entry names.
    pub(super) fn implied(&self) -> u64 {
        self.implied
    }

    fn child(&self, of: u32, name: &[u8]) -> Option<u32> {
        self.links.get(&(of, self.hasher.hash_one(name))).copied()
    }

    fn put(&mut self, parent: u32, name: &[u8], node: LayerNode) -> Result<u32, Stop> {
        self.held += match &node {
            LayerNode::SymbolicLink(target) => target.len(),
            LayerNode::File(_, Some(text)) => text.len(),
            _ => 0,
        };
        if self.held > TEXT {
            return Err(Stop::Refused("its symbolic links are longer than 8 MiB together".into()));
        }
        let id =
            u32::try_from(self.nodes.len()).map_err(|_| Stop::Refused("it has too many files".into()))?;
        self.name(parent, name, id)?;
        self.nodes.push(node);
        Ok(id)
    }

    /// Names a node; a hard link adds another name to the same node.
    fn name(&mut self, parent: u32, name: &[u8], id: u32) -> Result<(), Stop> {
        if self.made >= ENTRIES {
            return Err(Stop::Refused(format!("it has more than {ENTRIES} files")));
        }
        if name.len() > 255 {
            return refuse("a name is longer than 255 bytes");
        }
        self.made += 1;
        self.links.insert((parent, self.hasher.hash_one(name)), id);
        Ok(())
    }

    fn step(&mut self, steps: usize) -> Result<(), Stop> {
        self.steps += steps;
        if self.steps > STEPS {
            return Err(Stop::Refused("its paths are too long together".into()));
        }
        Ok(())
    }

    fn is_directory(&self, id: u32) -> bool {
        matches!(self.nodes[id as usize], LayerNode::Directory { .. })
    }

    /// Returns the folder at a path, following links. With `make`, creates missing folders, except behind a
    /// dangling link.
    fn folder(&mut self, path: &[&[u8]], make: bool) -> Result<Option<u32>, Stop> {
        let mut here = ROOT;
        let straight = path.iter().take_while(|part| match self.child(here, part) {
            Some(next) if self.is_directory(next) => {
                here = next;
                true
            }
            _ => false,
        });
        let known = straight.count();
        self.step(known)?;
        if known == path.len() {
            return Ok(Some(here));
        }
        let mut open: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
        // Number of open parts that come from a link; only other parts are created.
        let mut linked = 0_usize;
        let mut way = vec![ROOT];
        let mut links = 0;
        while let Some(part) = open.pop() {
            let from_link = linked > 0;
            linked = linked.saturating_sub(1);
            self.step(1)?;
            let here = way.last().copied().unwrap_or(ROOT);
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if way.len() > 1 {
                        way.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let Some(next) = self.child(here, &part) else {
                if !make || from_link {
                    return Ok(None);
                }
                let fresh = self.put(here, &part, LayerNode::Directory { opaque: false })?;
                self.implied += 1;
                way.push(fresh);
                continue;
            };
            match &self.nodes[next as usize] {
                LayerNode::Directory { .. } => way.push(next),
                LayerNode::SymbolicLink(target) => {
                    links += 1;
                    if links > LINKS {
                        return Ok(None);
                    }
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    let more: Vec<Vec<u8>> = target.split(|b| *b == b'/').rev().map(<[u8]>::to_vec).collect();
                    linked += more.len();
                    if open.len() + more.len() > PATH {
                        return Ok(None);
                    }
                    open.extend(more);
                }
                _ => return Ok(None),
            }
        }
        Ok(way.last().copied())
    }

    /// Unpacks one entry. `text` is its content if it may be a name list.
    pub(super) fn add(&mut self, entry: &ArchiveEntry, text: Option<Box<str>>) -> Result<(), Stop> {
        if !self.seen.insert(self.hasher.hash_one(clean(&entry.path))) {
            return refuse("it names a path twice");
        }
        if self.seen.len() > ENTRIES {
            return Err(Stop::Refused(format!("it has more than {ENTRIES} files")));
        }
        let path = parts(&entry.path);
        let Some((name, above)) = path.split_last() else {
            // The root itself: an entry can only set its attributes.
            let plain = entry.kind == Type::Directory || !entry.path.starts_with(b"/");
            return if plain { Ok(()) } else { refuse("a file replaces its root") };
        };
        if entry.path.len() > PATH {
            return refuse("a path is too long");
        }
        let Some(parent) = self.folder(above, true)? else {
            return refuse("a file lies below something that is not a directory");
        };
        let there = self.child(parent, name);
        let merged = there.is_some_and(|id| self.is_directory(id)) && entry.kind == Type::Directory;
        if there.is_some() && !merged {
            self.links.remove(&(parent, self.hasher.hash_one(name)));
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(parent, hidden);
        }
        if merged {
            return Ok(());
        }
        let node = match entry.kind {
            Type::Directory => LayerNode::Directory { opaque: false },
            Type::File => LayerNode::File(entry.size, text),
            Type::Fifo => LayerNode::Fifo,
            Type::Device { whiteout: true } => LayerNode::Whiteout,
            Type::Device { whiteout: false } => LayerNode::Device,
            Type::SymbolicLink if entry.link.is_empty() => return refuse("a symbolic link has no target"),
            Type::SymbolicLink => LayerNode::SymbolicLink(entry.link.clone().into()),
            Type::HardLink => return self.hard_link(parent, name, &entry.link),
        };
        self.put(parent, name, node).map(drop)
    }

    fn whiteout(&mut self, parent: u32, hidden: &[u8]) -> Result<(), Stop> {
        if hidden == b".wh..opq" {
            // An opaque root hides the lower layers, like any opaque folder.
            self.nodes[parent as usize] = LayerNode::Directory { opaque: true };
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") || self.child(parent, hidden).is_some() {
            return refuse("it hides a file of its own");
        }
        self.put(parent, hidden, LayerNode::Whiteout).map(drop)
    }

    fn hard_link(&mut self, parent: u32, name: &[u8], link: &[u8]) -> Result<(), Stop> {
        let target = parts(link);
        let found = match target.split_last() {
            Some((last, above)) => self.folder(above, false)?.and_then(|folder| self.child(folder, last)),
            None => None,
        };
        let Some(found) = found.filter(|id| !self.is_directory(*id)) else {
            return refuse("a hard link leads to a file that is not in the same layer, or to a directory");
        };
        // Same node: an entry that replaces one name leaves the others.
        self.name(parent, name, found)
    }

    /// Returns the node at a path of one or two names, if any.
    pub(super) fn at(&self, path: &[&str]) -> Option<&LayerNode> {
        let mut here = ROOT;
        for (n, name) in path.iter().enumerate() {
            if n > 0 && !self.is_directory(here) {
                return None;
            }
            here = self.child(here, name.as_bytes())?;
        }
        Some(&self.nodes[here as usize])
    }

    /// Returns whether the layer hides all lower layers.
    pub(super) fn is_opaque(&self) -> bool {
        self.nodes[ROOT as usize] == LayerNode::Directory { opaque: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Type, link: &str) -> ArchiveEntry {
        ArchiveEntry { path: path.as_bytes().to_vec(), link: link.as_bytes().to_vec(), kind, size: 1 }
    }

    #[test]
    fn names_of_one_file_hold_its_text_once() {
        let mut tree = Tree::new();
        let text = "a:x:1:1::/:\n".repeat(2_000);
        tree.add(&entry("etc/passwd", Type::File, ""), Some(text.clone().into())).unwrap();
        for n in 0..50_000 {
            tree.add(&entry(&format!("h{n}"), Type::HardLink, "etc/passwd"), None).unwrap();
        }
        assert_eq!((tree.len(), tree.nodes.len(), tree.held), (50_002, 3, text.len()));
        // Replacing one name leaves the others.
        tree.add(&entry("/h0", Type::Fifo, ""), None).unwrap();
        assert_eq!(tree.at(&["h0"]), Some(&LayerNode::Fifo));
        assert!(matches!(tree.at(&["h1"]), Some(LayerNode::File(1, Some(kept))) if **kept == *text));
    }

    #[test]
    fn links_and_steps_have_a_bound_together() {
        let mut tree = Tree::new();
        let long = "x/".repeat(2_000);
        let outcome =
            (0..5_000).try_for_each(|n| tree.add(&entry(&format!("s{n}"), Type::SymbolicLink, &long), None));
        assert!(matches!(outcome, Err(Stop::Refused(why)) if why.contains("8 MiB")));
        assert!(tree.held <= TEXT + long.len() && tree.len() > 2_000, "{} {}", tree.held, tree.len());
        // Paths of existing folders count like others.
        let mut tree = Tree::new();
        tree.add(&entry("a/b/c", Type::File, ""), None).unwrap();
        tree.steps = STEPS - 1;
        let outcome = tree.add(&entry("a/b/d", Type::File, ""), None);
        assert!(matches!(outcome, Err(Stop::Refused(why)) if why.contains("too long")));
    }
}
