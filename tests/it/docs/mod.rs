//! The book: every page answers, every link has a target, and the reference matches the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead::docs;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::support::TestApp;

mod reference;
mod settings;

/// Maximum size of README.md.
const README_BYTES: usize = 12 * 1024;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the files below a folder of the repository, by their paths in it.
fn files(folder: &str) -> BTreeSet<String> {
    let start = root().join(folder);
    let mut open = vec![start.clone()];
    let mut found = BTreeSet::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.insert(path.strip_prefix(&start).unwrap().display().to_string());
            }
        }
    }
    found
}

#[test]
fn the_program_contains_every_file_of_the_book() {
    let live = docs::LIVE.iter().map(|(file, _)| *file);
    let known: BTreeSet<String> =
        docs::FILES.iter().map(|(file, _)| *file).chain(live).map(String::from).collect();
    assert_eq!(known, files("docs"), "FILES in src/docs/mod.rs lists the files of docs/");
}

#[test]
fn every_chapter_is_in_the_contents() {
    let listed: BTreeSet<&str> =
        docs::contents("").iter().flat_map(|group| &group.links).map(|entry| entry.href).collect();
    for chapter in docs::chapters() {
        let is_listed = listed.contains(chapter.href.as_str());
        let is_recipe = chapter.href.starts_with("/docs/recipes/");
        let is_apart = ["/docs", "/docs/policy"].contains(&chapter.href.as_str());
        assert!(is_listed || is_recipe || is_apart, "{} is missing in docs/README.md", chapter.href);
    }
}

/// Resolves `..` in a path.
fn plain(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        if part.as_os_str() == ".." {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts
}

#[test]
fn every_link_of_the_files_leads_to_a_file_and_a_heading() {
    let book = files("docs").into_iter().map(|file| format!("docs/{file}"));
    let texts: BTreeMap<PathBuf, String> = ["README.md", "SECURITY.md", "CHANGELOG.md"]
        .map(String::from)
        .into_iter()
        .chain(book)
        .filter(|file| Path::new(file).extension().is_some_and(|end| end == "md"))
        .map(|file| (PathBuf::from(&file), fs::read_to_string(root().join(file)).unwrap()))
        .collect();
    let mut wrong = Vec::new();
    for (file, text) in &texts {
        for to in
            docs::links(text).iter().filter(|to| !to.starts_with("https://") && !to.starts_with("http://"))
        {
            let (path, anchor) =
                to.split_once('#').map_or((to.as_str(), None), |(path, id)| (path, Some(id)));
            let place =
                if path.is_empty() { file.clone() } else { plain(&file.parent().unwrap().join(path)) };
            let has_heading = |id: &str| {
                texts.get(&place).is_some_and(|text| docs::anchors(text).iter().any(|anchor| anchor == id))
            };
            if !root().join(&place).exists() {
                wrong.push(format!("{}: {to} is missing", file.display()));
            } else if anchor.is_some_and(|id| !has_heading(id)) {
                wrong.push(format!("{}: {to} has no such heading", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_link_of_the_pages_leads_to_a_page_and_a_heading() {
    let live = |href: &str| docs::LIVE.iter().any(|(_, address)| *address == href);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for chapter in docs::chapters() {
        for to in
            chapter.html.as_str().split("<a href=\"").skip(1).map(|rest| rest.split('"').next().unwrap())
        {
            seen += 1;
            if to.starts_with("https://") {
                continue;
            }
            let (href, anchor) = to.split_once('#').map_or((to, None), |(href, id)| (href, Some(id)));
            let page = docs::chapter(if href.is_empty() { &chapter.href } else { href });
            let has_heading =
                |id: &str| page.is_some_and(|page| page.anchors.iter().any(|anchor| anchor == id));
            if !(page.is_some() || live(href)) || anchor.is_some_and(|id| !has_heading(id)) {
                wrong.push(format!("{}: {to}", chapter.href));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 50, "{seen} links");
}

#[test]
fn no_link_is_lost_in_the_console() {
    for (file, text) in docs::FILES.iter().filter(|(file, _)| file.ends_with("md")) {
        let page = docs::chapter(&docs::address(file)).unwrap_or_else(|| panic!("{file} has no page"));
        let shown = page.html.as_str().matches("<a href=\"").count();
        assert_eq!(shown, docs::links(text).len(), "{file}: a link without a place in the console");
    }
}

#[test]
fn the_readme_is_short() {
    let bytes = fs::read(root().join("README.md")).unwrap().len();
    assert!(bytes <= README_BYTES, "README.md has {bytes} bytes: move details to docs/");
}

#[sqlx::test(migrator = "bulkhead::db::MIGRATOR")]
async fn the_book_needs_no_account(options: PgPoolOptions, connect: PgConnectOptions) {
    let app = TestApp::new(options, connect).await;
    let http = reqwest::Client::new();
    let get = async |path: &str| {
        let answer = http.get(format!("{}{path}", app.one.address)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let live = docs::LIVE.iter().map(|(_, href)| (*href).to_owned());
    for href in docs::chapters().map(|chapter| chapter.href.clone()).chain(live) {
        let (status, text) = get(&href).await;
        assert_eq!(status, 200, "{href}");
        assert_eq!(text.matches("<h1").count(), 1, "{href} has one first heading");
        assert!(!text.contains("<script"), "{href}");
        let contents =
            text.split("<nav class=\"chapters\"").nth(1).unwrap_or_else(|| panic!("{href} has no contents"));
        assert!(contents.contains("href=\"/docs/tenant/deploy\""), "{href}");
        let listed = docs::contents(&href).iter().flat_map(|group| &group.links).any(|entry| entry.here);
        assert_eq!(contents.contains("aria-current=\"page\""), listed, "{href}");
    }
    let (_, text) = get("/docs/admin/quotas").await;
    assert!(
        text.contains("<h2 id=\"limits\">") && text.contains("Next: <a href=\"/docs/admin/user-ids\">"),
        "{text}"
    );
    for path in
        ["/docs/none", "/docs/tenant", "/docs/tenant/spec.md", "/docs/..%2fCargo.toml", "/docs/errors/BH-1"]
    {
        assert_eq!(get(path).await.0, 404, "{path}");
    }
}
