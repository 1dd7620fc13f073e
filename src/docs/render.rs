//! Renders the Markdown of a chapter as HTML. Raw HTML in the source becomes text. A link without a known target
//! becomes its text.

use std::collections::HashMap;
use std::fmt;

use pulldown_cmark::{CowStr, Event, HeadingLevel, Options, Parser, Tag, TagEnd, html};

/// HTML that this module rendered. Templates do not escape it again.
#[derive(Debug, Clone)]
pub struct Html(String);

impl fmt::Display for Html {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl askama::filters::HtmlSafe for Html {}

impl Html {
    /// Returns the markup.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A rendered chapter.
pub(super) struct RenderedPage {
    pub(super) title: String,
    pub(super) html: Html,
    pub(super) anchors: Vec<String>,
}

fn parser(text: &str) -> Parser<'_> {
    Parser::new_ext(text, Options::ENABLE_TABLES)
}

/// Escapes a text for HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Returns the text of events without markup.
fn plain_text<'a>(events: impl IntoIterator<Item = &'a Event<'a>>) -> String {
    let mut text = String::new();
    for event in events {
        match event {
            Event::Text(part) | Event::Code(part) => text.push_str(part),
            Event::SoftBreak | Event::HardBreak => text.push(' '),
            _ => {}
        }
    }
    text
}

/// Ids of headings as GitHub assigns them: a repeated heading gets a number.
#[derive(Default)]
struct Slugs(HashMap<String, usize>);

impl Slugs {
    fn of(&mut self, heading: &str) -> String {
        let slug: String = heading
            .chars()
            .filter_map(|c| match c {
                ' ' => Some('-'),
                '-' | '_' => Some(c),
                c if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
                _ => None,
            })
            .collect();
        let seen = self.0.entry(slug.clone()).or_default();
        *seen += 1;
        if *seen == 1 { slug } else { format!("{slug}-{}", *seen - 1) }
    }
}

/// Returns the ids of all headings of a text.
#[must_use]
pub fn anchors(text: &str) -> Vec<String> {
    page(text, |_| None).anchors
}

/// Returns the targets of all links of a text, as written.
#[must_use]
pub fn links(text: &str) -> Vec<String> {
    let to = |event| match event {
        Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => Some(dest_url.to_string()),
        _ => None,
    };
    parser(text).filter_map(to).collect()
}

/// Returns the headings of the second level, each with the text and target of the links below it.
pub(super) fn contents(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut groups: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let events: Vec<Event<'_>> = parser(text).collect();
    for (at, event) in events.iter().enumerate() {
        let rest = &events[at + 1..];
        let until = |end: fn(&TagEnd) -> bool| {
            let length = rest.iter().position(|event| matches!(event, Event::End(tag) if end(tag)));
            plain_text(&rest[..length.unwrap_or(0)])
        };
        match event {
            Event::Start(Tag::Heading { level: HeadingLevel::H2, .. }) => {
                groups.push((until(|tag| matches!(tag, TagEnd::Heading(_))), Vec::new()));
            }
            Event::Start(Tag::Link { dest_url, .. }) => {
                if let Some((_, links)) = groups.last_mut() {
                    links.push((until(|tag| matches!(tag, TagEnd::Link)), dest_url.to_string()));
                }
            }
            _ => {}
        }
    }
    groups
}

fn raw<'a>(text: impl Into<String>) -> Event<'a> {
    Event::Html(CowStr::from(text.into()))
}

/// Longest line, in characters, of a code block that fits a phone. A wider block scrolls and takes the focus.
const SHORT: usize = 36;

struct Writer<'a, F> {
    link: F,
    out: Vec<Event<'a>>,
    slugs: Slugs,
    anchors: Vec<String>,
    title: String,
    /// For each open link: whether it has a target.
    open: Vec<bool>,
    /// Headings of the current table's columns, and the current column.
    columns: Vec<String>,
    column: usize,
    in_head: bool,
}

/// Renders a chapter. `link` returns the address of a link's target in the console.
pub(super) fn page(text: &str, link: impl Fn(&str) -> Option<String>) -> RenderedPage {
    let mut writer = Writer {
        link,
        out: Vec::new(),
        slugs: Slugs::default(),
        anchors: Vec::new(),
        title: String::new(),
        open: Vec::new(),
        columns: Vec::new(),
        column: 0,
        in_head: false,
    };
    let events: Vec<Event<'_>> = parser(text).collect();
    let mut at = 0;
    while at < events.len() {
        at += writer.take(&events[at..]);
    }
    let mut out = String::new();
    html::push_html(&mut out, writer.out.into_iter());
    RenderedPage { title: writer.title, html: Html(out), anchors: writer.anchors }
}

/// Returns the number of events before the one that ends the first.
fn length(events: &[Event<'_>], is_end: impl Fn(&TagEnd) -> bool) -> usize {
    events.iter().position(|event| matches!(event, Event::End(tag) if is_end(tag))).unwrap_or(0)
}

impl<'a, F: Fn(&str) -> Option<String>> Writer<'a, F> {
    /// Writes the first event and the events that belong to it. Returns their number.
    fn take(&mut self, events: &[Event<'a>]) -> usize {
        match &events[0] {
            Event::Start(Tag::Heading { level, .. }) => self.heading(*level, events),
            Event::Start(Tag::CodeBlock(_)) => {
                let end = length(events, |tag| matches!(tag, TagEnd::CodeBlock));
                let text = plain_text(&events[..end]);
                let long = text.lines().any(|line| line.chars().count() > SHORT);
                let open = if long { "<pre tabindex=\"0\">" } else { "<pre>" };
                self.out.push(raw(format!("{open}<code>{}</code></pre>\n", escape(&text))));
                return end + 1;
            }
            Event::Start(Tag::Link { dest_url, .. }) => {
                let to = (self.link)(dest_url);
                self.open.push(to.is_some());
                if let Some(to) = to {
                    self.out.push(raw(format!("<a href=\"{}\">", escape(&to))));
                }
            }
            Event::End(TagEnd::Link) => {
                if self.open.pop() == Some(true) {
                    self.out.push(raw("</a>"));
                }
            }
            // The book has no images: an image becomes its text.
            Event::Start(Tag::Image { .. } | Tag::HtmlBlock)
            | Event::End(TagEnd::Image | TagEnd::HtmlBlock) => {}
            Event::Html(text) | Event::InlineHtml(text) => self.out.push(Event::Text(text.clone())),
            event if self.table(event, events) => {}
            event => self.out.push(event.clone()),
        }
        1
    }

    fn heading(&mut self, level: HeadingLevel, events: &[Event<'a>]) {
        let text = plain_text(&events[..length(events, |tag| matches!(tag, TagEnd::Heading(_)))]);
        let slug = self.slugs.of(&text);
        if level == HeadingLevel::H1 && self.title.is_empty() {
            self.title = text;
        }
        let (id, classes, attrs) = (Some(CowStr::from(slug.clone())), Vec::new(), Vec::new());
        self.out.push(Event::Start(Tag::Heading { level, id, classes, attrs }));
        self.anchors.push(slug);
    }

    /// Writes tables. Each cell has the heading of its column, because a row is a list on a phone.
    fn table(&mut self, event: &Event<'a>, events: &[Event<'a>]) -> bool {
        let text = match event {
            Event::Start(Tag::Table(_)) => {
                self.columns.clear();
                "<table>".to_owned()
            }
            Event::Start(Tag::TableHead) => {
                self.in_head = true;
                "<thead><tr>".to_owned()
            }
            Event::End(TagEnd::TableHead) => {
                self.in_head = false;
                "</tr></thead><tbody>\n".to_owned()
            }
            Event::Start(Tag::TableRow) => {
                self.column = 0;
                "<tr>".to_owned()
            }
            Event::Start(Tag::TableCell) if self.in_head => {
                let end = length(events, |tag| matches!(tag, TagEnd::TableCell));
                self.columns.push(plain_text(&events[..end]));
                "<th scope=\"col\">".to_owned()
            }
            Event::Start(Tag::TableCell) => {
                let label = escape(self.columns.get(self.column).map_or("", String::as_str));
                self.column += 1;
                let tag = if self.column == 1 { "th scope=\"row\"" } else { "td" };
                format!("<{tag} data-label=\"{label}\">")
            }
            Event::End(TagEnd::TableCell) => {
                if self.in_head || self.column == 1 { "</th>" } else { "</td>" }.to_owned()
            }
            Event::End(TagEnd::TableRow) => "</tr>\n".to_owned(),
            Event::End(TagEnd::Table) => "</tbody></table>\n".to_owned(),
            _ => return false,
        };
        self.out.push(raw(text));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn html(text: &str) -> String {
        page(text, |to| to.starts_with('/').then(|| to.to_owned())).html.0
    }

    #[test]
    fn markup_in_a_chapter_is_text() {
        for text in
            ["<script>alert(1)</script>", "a <img src=x onerror=alert(1)> b", "<div>\n\n*x*\n\n</div>"]
        {
            let html = html(text);
            for open in ["<script", "<img", "<div"] {
                assert!(!html.contains(open), "{html}");
            }
            assert!(html.contains("&lt;"), "{html}");
        }
        assert!(html("```\n<b>\n```").contains("<pre><code>&lt;b&gt;\n</code></pre>"));
    }

    #[test]
    fn a_link_without_a_place_is_its_text() {
        assert_eq!(html("[a](/b) [c](javascript:alert(1))"), "<p><a href=\"/b\">a</a> c</p>\n");
        assert_eq!(html("![a \"picture\"](/b.png)"), "<p>a \"picture\"</p>\n");
        assert!(
            !html("[a](</\"onclick=alert(1)>)").contains("\"onclick"),
            "an address cannot end its attribute"
        );
    }

    #[test]
    fn headings_have_ids_as_on_github() {
        let page = page("# Who *owns* `it`?\n## In the source\n## In the source\n### cpu_millis", |_| None);
        assert_eq!(page.title, "Who owns it?");
        assert_eq!(page.anchors, ["who-owns-it", "in-the-source", "in-the-source-1", "cpu_millis"]);
        assert!(page.html.0.contains("<h2 id=\"in-the-source-1\">"), "{}", page.html);
    }

    #[test]
    fn cells_say_the_heading_of_their_column() {
        let html = html("| key | what \"is\" |\n| --- | --- |\n| `a` | b \\| c |\n");
        assert!(html.contains("<th scope=\"col\">key</th>"), "{html}");
        assert!(html.contains("<th scope=\"row\" data-label=\"key\"><code>a</code></th>"), "{html}");
        assert!(html.contains("<td data-label=\"what &quot;is&quot;\">b | c</td>"), "{html}");
    }

    #[test]
    fn long_code_is_reached_by_keys() {
        assert!(html("```\nshort\n```").starts_with("<pre><code>"));
        assert!(html(&format!("```\n{}\n```", "x".repeat(60))).starts_with("<pre tabindex=\"0\"><code>"));
    }
}
