//! The book of `docs/`: one source for the repository, the package and the console, which serves it at `/docs`. The
//! program contains the files. The first request renders them, which keeps the start of `serve` fast.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

mod render;

pub use render::{Html, anchors, links};

macro_rules! book {
    ($($name:literal)*) => {
        &[$(($name, include_str!(concat!("../../docs/", $name)))),*]
    };
}

/// The files of the book by their path in `docs/`, except those of [`LIVE`]. A test compares the list with the folder.
pub const FILES: &[(&str, &str)] = book! {
    "README.md"
    "tenant/deploy.md"
    "tenant/spec.md"
    "tenant/images.md"
    "tenant/network.md"
    "tenant/logs.md"
    "tenant/troubleshooting.md"
    "admin/onboard.md"
    "admin/quotas.md"
    "admin/user-ids.md"
    "admin/access.md"
    "admin/services.md"
    "admin/network.md"
    "admin/audit.md"
    "operator/install.md"
    "operator/settings.md"
    "operator/production.md"
    "operator/upgrade.md"
    "operator/uninstall.md"
    "operator/monitoring.md"
    "operator/backup.md"
    "operator/troubleshooting.md"
    "api.md"
    "security.md"
    "architecture.md"
    "limits.md"
    "measures.md"
    "reference/spec.md"
    "reference/api.md"
    "reference/settings.md"
    "recipes/README.md"
    "recipes/caddy/Caddyfile"
    "recipes/caddy/Dockerfile"
    "recipes/caddy/app.yaml"
    "recipes/go/Dockerfile"
    "recipes/go/app.yaml"
    "recipes/go/go.mod"
    "recipes/go/main.go"
    "recipes/gunicorn/Dockerfile"
    "recipes/gunicorn/app.py"
    "recipes/gunicorn/app.yaml"
    "recipes/haproxy/Dockerfile"
    "recipes/haproxy/app.yaml"
    "recipes/haproxy/haproxy.cfg"
    "recipes/java/Dockerfile"
    "recipes/java/app.yaml"
    "recipes/java/server.bsh"
    "recipes/memcached/Dockerfile"
    "recipes/memcached/app.yaml"
    "recipes/mosquitto/Dockerfile"
    "recipes/mosquitto/app.yaml"
    "recipes/mosquitto/mosquitto.conf"
    "recipes/nginx/Dockerfile"
    "recipes/nginx/app.yaml"
    "recipes/node/Dockerfile"
    "recipes/node/app.yaml"
    "recipes/node/server.js"
    "recipes/postgres/Dockerfile"
    "recipes/postgres/app.yaml"
    "recipes/postgres/start"
    "recipes/redis/Dockerfile"
    "recipes/redis/app.yaml"
    "recipes/supervisor/Dockerfile"
    "recipes/supervisor/app.yaml"
    "recipes/supervisor/supervisord.conf"
};

/// Files whose pages the console renders from the tables of the code, with the addresses of these pages.
pub const LIVE: &[(&str, &str)] =
    &[("reference/errors.md", "/docs/errors"), ("reference/permissions.md", "/docs/permissions")];

/// The security policy. It is at the top of the repository, where readers look for it.
const POLICY: (&str, &str) = ("../SECURITY.md", include_str!("../../SECURITY.md"));

/// A page of the book.
#[derive(Debug)]
pub struct Chapter {
    /// Address, such as `/docs/tenant/spec`.
    pub href: String,
    /// Text of the first heading.
    pub title: String,
    /// The page, first heading included.
    pub html: Html,
    /// Ids of its headings.
    pub anchors: Vec<String>,
}

/// Links of the contents under one heading.
#[derive(Debug, Clone)]
pub struct ChapterGroup {
    /// Heading.
    pub title: &'static str,
    /// Links.
    pub links: Vec<Entry>,
}

/// A link of the contents.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Text.
    pub label: &'static str,
    /// Address.
    pub href: &'static str,
    /// Whether this is the current page.
    pub here: bool,
}

struct Book {
    chapters: BTreeMap<String, Chapter>,
    /// Headings, each with the text and address of its links.
    contents: Vec<(String, Vec<(String, String)>)>,
}

static BOOK: LazyLock<Book> = LazyLock::new(Book::read);

/// Returns all chapters, ordered by address.
pub fn chapters() -> impl Iterator<Item = &'static Chapter> {
    BOOK.chapters.values()
}

/// Returns the chapter at an address.
#[must_use]
pub fn chapter(href: &str) -> Option<&'static Chapter> {
    BOOK.chapters.get(href)
}

/// Returns the contents of the book. `here` is the address of the current page.
#[must_use]
pub fn contents(here: &str) -> Vec<ChapterGroup> {
    let entry = |(label, href): &'static (String, String)| Entry { label, href, here: href == here };
    BOOK.contents
        .iter()
        .map(|(title, links)| ChapterGroup { title, links: links.iter().map(entry).collect() })
        .collect()
}

/// Returns the entry of the contents that follows this address.
#[must_use]
pub fn next(href: &str) -> Option<Entry> {
    let mut rest = contents(href).into_iter().flat_map(|group| group.links).skip_while(|entry| !entry.here);
    rest.next().and_then(|_| rest.next())
}

impl Book {
    fn read() -> Self {
        let files = || FILES.iter().chain([&POLICY]);
        let mut chapters = BTreeMap::new();
        for (file, text) in files().filter(|(file, _)| is_chapter(file)) {
            add(&mut chapters, file, text);
        }
        for folder in recipes() {
            let text = recipe(folder);
            add(&mut chapters, &format!("recipes/{folder}/README.md"), &text);
        }
        let text = FILES.iter().find(|(file, _)| *file == "README.md").map_or("", |(_, text)| *text);
        let contents = render::contents(text)
            .into_iter()
            .map(|(title, links)| {
                let found =
                    links.into_iter().filter_map(|(label, to)| Some((label, resolve("README.md", &to)?)));
                (title, found.collect())
            })
            .collect();
        Self { chapters, contents }
    }
}

fn add(chapters: &mut BTreeMap<String, Chapter>, file: &str, text: &str) {
    let page = render::page(text, |to| resolve(file, to));
    let href = address(file);
    let chapter = Chapter { href: href.clone(), title: page.title, html: page.html, anchors: page.anchors };
    chapters.insert(href, chapter);
}

fn is_chapter(file: &str) -> bool {
    std::path::Path::new(file).extension().is_some_and(|end| end == "md")
}

/// Returns the names of the folders in `docs/recipes`.
fn recipes() -> Vec<&'static str> {
    let folder =
        |file: &'static str| file.strip_prefix("recipes/")?.split_once('/').map(|(folder, _)| folder);
    let mut found: Vec<&str> = FILES.iter().filter_map(|(file, _)| folder(file)).collect();
    found.dedup();
    found
}

/// Returns the Markdown of a recipe: its files, one after another.
fn recipe(folder: &str) -> String {
    let mut text = format!("# Recipe: {folder}\n\nOne of the [recipes](../README.md).\n");
    let start = format!("recipes/{folder}/");
    for (name, body) in FILES.iter().filter_map(|(file, body)| Some((file.strip_prefix(&start)?, body))) {
        let _ = write!(text, "\n## {name}\n````\n{}\n````\n", body.trim_end());
    }
    text
}

/// Returns the address of a file of the book, such as `/docs/tenant/spec`.
#[must_use]
pub fn address(file: &str) -> String {
    if let Some((_, live)) = LIVE.iter().find(|(name, _)| *name == file) {
        return (*live).to_owned();
    }
    if file == POLICY.0 {
        return "/docs/policy".to_owned();
    }
    let name = file.strip_suffix(".md").unwrap_or(file);
    let name = name.strip_suffix("README").map_or(name, |folder| folder.trim_end_matches('/'));
    if name.is_empty() { "/docs".to_owned() } else { format!("/docs/{name}") }
}

/// Returns the address that a link of a file has in the console, or `None` for a target outside the book and the web.
fn resolve(file: &str, to: &str) -> Option<String> {
    if to.starts_with("https://") || to.starts_with("http://") || to.starts_with('#') {
        return Some(to.to_owned());
    }
    let (path, anchor) = to.split_once('#').map_or((to, None), |(path, anchor)| (path, Some(anchor)));
    let mut parts: Vec<&str> = file.split('/').collect();
    parts.pop();
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        // The policy is the only file above the book.
        if part == ".." && !parts.is_empty() && parts != [".."] {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    let place = parts.join("/");
    let place = place.strip_prefix("../docs/").unwrap_or(&place).to_owned();
    let is_recipe = place.strip_prefix("recipes/").is_some_and(|folder| recipes().contains(&folder));
    let known = |file: &str| FILES.iter().chain([&POLICY]).chain(LIVE).any(|(name, _)| *name == file);
    if is_recipe || (known(&place) && is_chapter(&place)) {
        let anchor = anchor.map(|anchor| format!("#{anchor}")).unwrap_or_default();
        Some(address(&place) + &anchor)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_addresses_of_the_console() {
        let cases = [
            ("README.md", "tenant/spec.md", Some("/docs/tenant/spec")),
            ("tenant/spec.md", "../admin/quotas.md#limits", Some("/docs/admin/quotas#limits")),
            ("tenant/spec.md", "network.md", Some("/docs/tenant/network")),
            ("tenant/spec.md", "#fields", Some("#fields")),
            ("tenant/spec.md", "../README.md", Some("/docs")),
            ("security.md", "../SECURITY.md", Some("/docs/policy")),
            ("../SECURITY.md", "docs/security.md", Some("/docs/security")),
            ("api.md", "reference/errors.md", Some("/docs/errors")),
            ("recipes/README.md", "nginx", Some("/docs/recipes/nginx")),
            ("api.md", "https://example.org", Some("https://example.org")),
            ("api.md", "javascript:alert(1)", None),
            ("api.md", "../Cargo.toml", None),
            ("api.md", "../../SECURITY.md", None),
        ];
        for (file, to, wanted) in cases {
            assert_eq!(resolve(file, to).as_deref(), wanted, "{to} in {file}");
        }
    }

    #[test]
    fn the_contents_lead_from_chapter_to_chapter() {
        assert_eq!(chapter("/docs").unwrap().title, "Bulkhead documentation");
        assert_eq!(next("/docs/tenant/deploy").unwrap().href, "/docs/tenant/spec");
        assert!(contents("/docs/errors").iter().flat_map(|group| &group.links).any(|entry| entry.here));
        assert!(chapter("/docs/recipes/nginx").unwrap().anchors.contains(&"dockerfile".to_owned()));
    }
}
