//! Shows faults on a terminal: the source line, a caret below the position, the message, reason and suggestion.

use std::fmt::Write as _;

use crate::fault::{Fault, Kind, plain};

/// Maximum characters of a source line that are shown.
const WINDOW: usize = 160;

/// Whether to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// Plain text.
    Never,
    /// ANSI colours.
    Always,
}

/// Renders faults with their source lines. Control characters of the source are replaced, so it cannot control
/// the terminal.
#[must_use]
pub fn show(source: &str, file: &str, faults: &[Fault], colour: Colour) -> String {
    let paint = |code: &str, text: &str| match colour {
        Colour::Never => text.to_owned(),
        Colour::Always => format!("\x1b[{code}m{text}\x1b[0m"),
    };
    let lines: Vec<&str> = source.lines().collect();
    let mut out = String::new();
    for fault in faults {
        let (word, code) = if fault.kind == Kind::Warning { ("warning", "33") } else { ("error", "31") };
        let path = if fault.path.is_empty() { String::new() } else { format!("{}: ", visible(&fault.path)) };
        let _ = writeln!(
            out,
            "{}: {}{}",
            paint(code, &format!("{word}[{}]", fault.code)),
            path,
            paint("1", &visible(&fault.message))
        );
        if fault.line > 0 {
            let _ = writeln!(out, "  --> {}:{}:{}", visible(file), fault.line, fault.column);
            if let Some(line) = lines.get(fault.line as usize - 1) {
                let number = fault.line.to_string();
                let (line, at) = window(line, fault.column as usize);
                let gap = " ".repeat(line.chars().take(at).map(width).sum());
                let _ = writeln!(out, "   {number} | {line}");
                let _ = writeln!(out, "   {} | {gap}{}", " ".repeat(number.len()), paint(code, "^"));
            }
        }
        if let Some(reason) = &fault.reason {
            let _ = writeln!(out, "  why: {}", visible(reason));
        }
        if let Some(suggestion) = &fault.suggestion {
            let _ = writeln!(out, "  instead: {}", visible(suggestion));
        }
        out.push('\n');
    }
    out
}

fn visible(text: &str) -> String {
    text.chars().map(|c| if c == '\t' { ' ' } else { plain(c) }).collect()
}

/// Returns the part of a line around a column (from 1), and the column's position in that part. Cuts a long
/// line on both sides.
fn window(line: &str, column: usize) -> (String, usize) {
    let at = column.saturating_sub(1).min(line.chars().count());
    let from = if at > WINDOW * 3 / 4 { at - WINDOW / 2 } else { 0 };
    let mut part = visible(&line.chars().skip(from).take(WINDOW).collect::<String>());
    if line.chars().count() > from + WINDOW {
        part.push('…');
    }
    if from > 0 { (format!("…{part}"), at - from + 1) } else { (part, at) }
}

/// Returns the columns that a character takes. Wide East Asian characters and emoji take two.
fn width(c: char) -> usize {
    let wide = matches!(c, '\u{1100}'..='\u{115f}' | '\u{2e80}'..='\u{a4cf}' | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}' | '\u{fe30}'..='\u{fe6f}' | '\u{ff00}'..='\u{ff60}' | '\u{1f300}'..='\u{1faff}');
    if wide { 2 } else { 1 }
}
