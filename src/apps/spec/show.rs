//! Faults on a terminal: the line of the source, a caret under the place, what, why, what instead.

use std::fmt::Write as _;

use crate::fault::{Fault, Kind};

/// Whether to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// Plain text.
    Never,
    /// ANSI colours.
    Always,
}

/// Renders faults with the lines that they are in. What stands in the source cannot steer the
/// terminal: control characters are replaced.
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
        let path = if fault.path.is_empty() { String::new() } else { format!("{}: ", fault.path) };
        let _ = writeln!(
            out,
            "{}: {}{}",
            paint(code, &format!("{word}[{}]", fault.code)),
            path,
            paint("1", &fault.message)
        );
        if fault.line > 0 {
            let _ = writeln!(out, "  --> {file}:{}:{}", fault.line, fault.column);
            if let Some(line) = lines.get(fault.line as usize - 1) {
                let number = fault.line.to_string();
                let before: String =
                    line.chars().take(fault.column.saturating_sub(1) as usize).map(visible).collect();
                let line: String = line.chars().take(200).map(visible).collect();
                let gap: String = before.chars().map(|c| if width(c) == 2 { "  " } else { " " }).collect();
                let _ = writeln!(out, "   {number} | {line}");
                let _ = writeln!(out, "   {} | {gap}{}", " ".repeat(number.len()), paint(code, "^"));
            }
        }
        if let Some(reason) = &fault.reason {
            let _ = writeln!(out, "  why: {reason}");
        }
        if let Some(suggestion) = &fault.suggestion {
            let _ = writeln!(out, "  instead: {suggestion}");
        }
        out.push('\n');
    }
    out
}

fn visible(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
        {
            '\u{fffd}'
        }
        c => c,
    }
}

/// Columns that a character takes: the wide blocks of East Asian scripts and emoji take two.
fn width(c: char) -> usize {
    let wide = matches!(c, '\u{1100}'..='\u{115f}' | '\u{2e80}'..='\u{a4cf}' | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}' | '\u{fe30}'..='\u{fe6f}' | '\u{ff00}'..='\u{ff60}' | '\u{1f300}'..='\u{1faff}');
    if wide { 2 } else { 1 }
}
