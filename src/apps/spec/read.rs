//! The walk over the tree: it reads every field independently, so one fault hides no other.

use std::collections::BTreeMap;

use super::fields::{self, ImageRef};
use super::tree::{At, SpecKey, SpecNode, Value, below, clean};
use super::{AppSpec, forbidden};
use crate::fault::catalogue as code;
use crate::fault::{Code, Fault, Kind};
use crate::ids::AppName;

/// Reads the document's tree. Returns none when a required field is unreadable. A result beside faults is still
/// refused.
pub(super) fn walk(source: &str, node: &SpecNode<'_>, faults: &mut Vec<Fault>) -> Option<AppSpec> {
    SpecWalk { source, faults }.document(node)
}

/// Maximum number of listed faults.
const MANY: usize = 200;

pub(super) struct SpecWalk<'s, 'f> {
    source: &'s str,
    faults: &'f mut Vec<Fault>,
}

pub(super) type Entries<'n, 'a> = &'n [(SpecKey<'a>, SpecNode<'a>)];

pub(super) fn get<'n, 'a>(entries: Entries<'n, 'a>, name: &str) -> Option<&'n SpecNode<'a>> {
    entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
}

impl SpecWalk<'_, '_> {
    pub(super) fn add(&mut self, at: At, fault: Fault) {
        // Stop at the first faults: a document full of faults is not worth more work.
        if self.faults.len() >= MANY {
            if self.faults.len() == MANY {
                self.faults.push(Fault::new(
                    code::MANY,
                    Kind::Invalid,
                    "",
                    "there are more faults than are listed",
                ));
            }
            return;
        }
        let (line, column) = at.place(self.source);
        self.faults.push(fault.at(line, column));
    }

    pub(super) fn wrong(&mut self, node: &SpecNode<'_>, path: &str, wanted: &str) {
        let mut fault = Fault::new(
            code::WRONG_TYPE,
            Kind::Invalid,
            path,
            format!("takes {wanted}, not {}", node.value.words()),
        );
        if wanted.starts_with("a text") && matches!(node.value, Value::Number(_) | Value::Bool(_)) {
            fault = fault.instead("write it in quotes");
        }
        self.add(node.at, fault);
    }

    pub(super) fn bad(&mut self, at: At, code: Code, path: &str, message: &str, instead: &str) {
        let fault = Fault::new(code, Kind::Invalid, path, message);
        self.add(at, if instead.is_empty() { fault } else { fault.instead(instead) });
    }

    /// Returns the entries of a group. Fields outside `known` are faults.
    pub(super) fn group<'n, 'a>(
        &mut self,
        node: &'n SpecNode<'a>,
        path: &str,
        known: &[&str],
    ) -> Option<Entries<'n, 'a>> {
        let Value::Map(entries) = &node.value else {
            self.wrong(node, path, "a group of fields");
            return None;
        };
        for (key, _) in entries {
            if !known.contains(&&*key.name) {
                self.unknown(key, path, known, entries);
            }
        }
        Some(entries)
    }

    fn unknown(&mut self, key: &SpecKey<'_>, path: &str, known: &[&str], entries: Entries<'_, '_>) {
        let name = clean(&key.name);
        let full = below(path, &key.name);
        let fault = if let Some(ours) = forbidden::renamed(&name) {
            Fault::new(code::UNKNOWN, Kind::Unknown, full, format!("there is no field {name}"))
                .because("this format has another name for it")
                .instead(format!("use {ours}"))
        } else if let Some(entry) = forbidden::look_up(&name) {
            Fault::new(entry.code, Kind::Forbidden, full, format!("{name} is not available here"))
                .because(entry.reason)
                .instead(entry.instead)
        } else {
            let near = known
                .iter()
                .filter(|known| get(entries, known).is_none())
                .map(|known| (strsim::damerau_levenshtein(&name, known), *known))
                .min()
                .filter(|(distance, known)| *distance <= 2 && *distance < known.len());
            let fault = Fault::new(code::UNKNOWN, Kind::Unknown, full, format!("there is no field {name}"));
            match near {
                Some((_, near)) => fault.instead(format!("did you mean {near}?")),
                None => fault.instead(format!("there are: {}", known.join(", "))),
            }
        };
        self.add(key.at, fault);
    }

    pub(super) fn text<'n>(
        &mut self,
        node: &'n SpecNode<'_>,
        path: impl FnOnce() -> String,
    ) -> Option<&'n str> {
        if let Value::Text(text) = &node.value {
            return Some(text);
        }
        self.wrong(node, &path(), "a text");
        None
    }

    pub(super) fn whole(
        &mut self,
        node: &SpecNode<'_>,
        path: &str,
        code: Code,
        bounds: (u32, u32),
    ) -> Option<u32> {
        let Value::Number(text) = &node.value else {
            self.wrong(node, path, "a number");
            return None;
        };
        let number = text.parse::<u32>().ok().filter(|n| (bounds.0..=bounds.1).contains(n) && digits(text));
        if number.is_none() {
            let message = format!("is a whole number from {} to {}", bounds.0, bounds.1);
            self.bad(node.at, code, path, &message, "");
        }
        number
    }

    pub(super) fn port(&mut self, node: &SpecNode<'_>, path: &str) -> Option<u16> {
        self.whole(node, path, code::PORT, (1024, 65_535)).and_then(|port| u16::try_from(port).ok())
    }

    fn document(&mut self, node: &SpecNode<'_>) -> Option<AppSpec> {
        let entries = self.group(node, "", fields::TOP)?;
        for name in fields::REQUIRED {
            if get(entries, name).is_none() {
                let fault = Fault::new(code::MISSING, Kind::Missing, *name, format!("{name} is required"));
                self.add(node.at, fault);
            }
        }
        if let Some(node) = get(entries, "spec")
            && self.text(node, || "spec".into()).is_some_and(|version| version != "v1")
        {
            self.bad(node.at, code::VERSION, "spec", "unknown version of the format", "write spec: v1");
        }
        let name = get(entries, "name").and_then(|node| self.name(node, || "name".into()));
        let image = get(entries, "image").and_then(|node| self.image(node));
        let command = get(entries, "command").and_then(|node| self.texts(node, "command", Least::One));
        let args = get(entries, "args").and_then(|node| self.texts(node, "args", Least::None));
        let cpu_millis = get(entries, "cpu").and_then(|node| self.cpu(node));
        let memory =
            get(entries, "memory").and_then(|node| self.size(node, || "memory".into(), fields::LEAST_MEMORY));
        let instances = get(entries, "instances")
            .map_or(Some(1), |node| self.whole(node, "instances", code::RANGE, (0, fields::INSTANCES)));
        let singleton = get(entries, "singleton").map_or(Some(false), |node| self.boolean(node, "singleton"));
        let env = get(entries, "env").map_or(Some(BTreeMap::new()), |node| self.env(node));
        let port = get(entries, "port").map(|node| self.serves(node));
        let health = self.health(get(entries, "health"), port.flatten(), port == Some(None));
        let scratch =
            self.scratch(get(entries, "scratch"), memory, get(entries, "memory").unwrap_or(node).at);
        let stop_grace = get(entries, "stop_grace").map_or(Some(u32::from(fields::STOP_GRACE.1)), |node| {
            self.whole(node, "stop_grace", code::RANGE, (0, fields::STOP_GRACE.0.into()))
        });
        let connects = self.connects(get(entries, "connects"), name.as_ref());
        if let (Some(true), Some(2..)) = (singleton, instances) {
            let at = get(entries, "instances").unwrap_or(node).at;
            let fault = Fault::new(
                code::SINGLETON,
                Kind::Conflict,
                "instances",
                "a singleton has at most one instance",
            );
            self.add(at, fault.instead("instances: 1, or leave singleton out"));
        }
        Some(AppSpec {
            name: name?,
            image: image?,
            command,
            args,
            cpu_millis: cpu_millis?,
            memory: memory?,
            instances: instances?,
            singleton: singleton?,
            env: env?,
            port: port.flatten(),
            health: health?,
            scratch: scratch?,
            stop_grace: u16::try_from(stop_grace?).ok()?,
            connects: connects?,
        })
    }

    /// Builds the path only when there is a fault to report.
    fn name(&mut self, node: &SpecNode<'_>, path: impl Fn() -> String) -> Option<AppName> {
        let text = self.text(node, &path)?;
        match text.parse() {
            Ok(name) => Some(name),
            Err(error) => {
                self.bad(node.at, code::NAME, &path(), &error.to_string(), "");
                None
            }
        }
    }

    fn image(&mut self, node: &SpecNode<'_>) -> Option<ImageRef> {
        let text = self.text(node, || "image".into())?;
        match ImageRef::parse(text) {
            Ok(image) => Some(image),
            Err((message, instead)) => {
                self.bad(node.at, code::IMAGE, "image", message, &instead);
                None
            }
        }
    }

    pub(super) fn boolean(&mut self, node: &SpecNode<'_>, path: &str) -> Option<bool> {
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        let instead = match &node.value {
            Value::Text(text) => meant(text),
            Value::Number(text) if text == "1" => Some("write true"),
            Value::Number(text) if text == "0" => Some("write false"),
            _ => None,
        };
        match instead {
            Some(instead) => {
                self.bad(
                    node.at,
                    code::WRONG_TYPE,
                    path,
                    "takes true or false, in exactly this spelling",
                    instead,
                );
            }
            None => self.wrong(node, path, "true or false"),
        }
        None
    }

    fn cpu(&mut self, node: &SpecNode<'_>) -> Option<u32> {
        let (Value::Text(text) | Value::Number(text)) = &node.value else {
            self.wrong(node, "cpu", "250m or a number of cores");
            return None;
        };
        let millis = fields::cpu(text);
        if millis.is_none() {
            self.bad(node.at, code::CPU, "cpu", "is 250m or 0.25: at least 10m, at most 1000 cores", "");
        }
        millis
    }

    pub(super) fn size(&mut self, node: &SpecNode<'_>, path: impl Fn() -> String, least: u64) -> Option<u64> {
        let (Value::Text(text) | Value::Number(text)) = &node.value else {
            self.wrong(node, &path(), "a size such as 256Mi");
            return None;
        };
        let size = fields::size(text).filter(|size| *size >= least);
        if size.is_none() {
            let message = format!(
                "is a whole number with Ki, Mi or Gi, at least {}, at most 1024Gi",
                fields::print_size(least)
            );
            self.bad(node.at, code::MEMORY, &path(), &message, "such as 256Mi");
        }
        size
    }

    fn texts(&mut self, node: &SpecNode<'_>, path: &str, least: Least) -> Option<Vec<String>> {
        let Value::List(items) = &node.value else {
            self.wrong(node, path, "a list of texts");
            return None;
        };
        let mut texts = Vec::with_capacity(items.len());
        let mut sum = 0;
        for (n, item) in items.iter().enumerate() {
            let at = || format!("{path}[{n}]");
            let Some(text) = self.text(item, at) else { continue };
            sum += text.len();
            if text.len() > 8 * 1024 || text.contains('\0') {
                self.bad(item.at, code::COMMAND, &at(), "is at most 8 KiB and holds no NUL", "");
            }
            texts.push(text.to_owned());
        }
        if items.len() > 64 || sum > 32 * 1024 {
            self.bad(node.at, code::COMMAND, path, "has at most 64 texts and 32 KiB together", "");
        }
        if least == Least::One && texts.first().is_none_or(String::is_empty) {
            self.bad(
                node.at,
                code::COMMAND,
                path,
                "starts with the program to run",
                "leave it out to use the image's own",
            );
        }
        Some(texts)
    }

    fn env(&mut self, node: &SpecNode<'_>) -> Option<BTreeMap<String, String>> {
        let Value::Map(entries) = &node.value else {
            self.wrong(node, "env", "a group of NAME: value");
            return None;
        };
        let mut env = BTreeMap::new();
        let mut sum = 0;
        for (key, value) in entries {
            let path = || below("env", &key.name);
            if !env_key(&key.name) {
                let message = "the name has letters, digits, _ . and -, starts with a letter or _, and not with BULKHEAD_";
                self.bad(key.at, code::ENV_KEY, &path(), message, "");
            }
            let Some(text) = self.text(value, path) else { continue };
            if text.contains('\0') {
                self.bad(value.at, code::ENV_SIZE, &path(), "holds no NUL", "");
            }
            sum += key.name.len() + text.len();
            env.insert(key.name.clone().into_owned(), text.to_owned());
        }
        if entries.len() > 128 || sum > 32 * 1024 {
            self.bad(node.at, code::ENV_SIZE, "env", "has at most 128 variables and 32 KiB together", "");
        }
        Some(env)
    }
}

/// The minimum length of a list.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Least {
    None,
    One,
}

/// Returns advice if the text was probably meant as a boolean.
fn meant(text: &str) -> Option<&'static str> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "y" => Some("write true"),
        "false" | "no" | "off" | "n" => Some("write false"),
        _ => None,
    }
}

fn digits(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit())
}

fn env_key(key: &str) -> bool {
    key.len() <= 128
        && key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
        && !key.starts_with("BULKHEAD_")
}
