// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of the house as a test: what may import what, sizes, where `unsafe` may stand, what every file begins with,
//! and that every correctness trap has a test of its name.
//!
//! The source is scanned as text in which comments and literals have been blanked; that is enough for these rules
//! and needs no parser. Rules that a compiler lint can state (no unwrap, SAFETY comments on blocks) are lints.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Each folder of `src` and what it may import. `config` is data that all may read.
const LAYERS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("config", &["core"]),
    ("wire", &["core"]),
    ("engine", &["core"]),
    ("store", &["engine", "core"]),
    ("volume", &["store", "engine", "core"]),
    ("frontend", &["volume", "engine", "core"]),
    ("peer", &["volume", "wire", "core"]),
    ("node", &["frontend", "peer", "volume", "store", "core"]),
    ("control", &["node", "core"]),
];

/// Files of `src` that may contain `unsafe`, besides tests.
const UNSAFE: &[&str] = &[
    "src/engine/uring.rs",
    "src/engine/buffer.rs",
    "src/frontend/sigbus.rs",
    "src/frontend/mapping.rs",
    "src/frontend/memory.rs",
    "src/frontend/ring_mem.rs",
    "src/frontend/dirty_log.rs",
    "src/frontend/inflight.rs",
];

/// Traps that must have a test (the design rules out the others by construction, or they are of whole systems).
const TRAPS: &[u32] =
    &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27];

const MAX_FILE: usize = 600;
const MAX_FUNCTION: usize = 70;
const SPDX: &str = "// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause";

/// A file of the tree, by its path from the root.
struct Source {
    path: String,
    text: String,
    /// The text with comments, literals and inline test modules blanked; lines stay where they are.
    code: String,
    /// As `code`, with the test modules.
    code_with_tests: String,
    /// Lines of inline test modules.
    test_lines: usize,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_symlink() || matches!(name.as_str(), "target" | ".git" | ".cache") {
            continue;
        }
        if path.is_dir() { walk(&path, found) } else { found.push(path) }
    }
}

/// All text files of the tree with their paths from the root.
fn texts() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    walk(&root(), &mut paths);
    let relative = |path: &Path| path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    paths
        .iter()
        .filter_map(|path| Some((relative(path), String::from_utf8(std::fs::read(path).ok()?).ok()?)))
        .collect()
}

fn sources() -> Vec<Source> {
    let all =
        texts().into_iter().filter(|(path, _)| Path::new(path).extension().is_some_and(|ext| ext == "rs"));
    all.map(|(path, text)| source(path, text)).collect()
}

fn source(path: String, text: String) -> Source {
    let code_with_tests = blank(&text);
    let (code, test_lines) = without_tests(&code_with_tests);
    Source { path, text, code, code_with_tests, test_lines }
}

impl Source {
    fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.contains("/tests/") || self.path.ends_with("tests.rs")
    }

    fn in_src(&self) -> bool {
        self.path.starts_with("src/")
    }

    /// The folder of `src` (or the file of that name) that this file belongs to.
    fn layer(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?;
        let top = rest.split('/').next()?;
        Some(top.strip_suffix(".rs").unwrap_or(top))
    }
}

/// Replaces comments and the contents of literals by spaces.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match (chars[at], chars.get(at + 1)) {
            ('/', Some('/')) => at + chars[at..].iter().take_while(|c| **c != '\n').count(),
            ('/', Some('*')) => block_comment_end(&chars, at),
            ('"', _) => string_end(&chars, at),
            ('r', Some('"' | '#')) if !is_word(chars.get(at.wrapping_sub(1))) => raw_string_end(&chars, at),
            ('\'', _) => char_end(&chars, at),
            _ => at,
        };
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

fn is_word(c: Option<&char>) -> bool {
    c.is_some_and(|c| c.is_alphanumeric() || *c == '_')
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// `r"..."` and `r#"..."#`; a raw identifier is left alone.
fn raw_string_end(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(start + 1 + hashes) != Some(&'"') {
        return start;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = start + 2 + hashes;
    let found = (body..chars.len()).find(|at| chars[*at..].starts_with(&close));
    found.map_or(chars.len(), |at| at + close.len())
}

/// A character literal; a lifetime is left alone.
fn char_end(chars: &[char], start: usize) -> usize {
    match (chars.get(start + 1), chars.get(start + 2)) {
        (Some('\\'), _) => {
            let rest = chars.get(start + 3..).unwrap_or_default();
            start + 4 + rest.iter().take_while(|c| **c != '\'').count()
        }
        (Some(_), Some('\'')) => start + 3,
        _ => start,
    }
}

/// Blanks inline `#[cfg(test)] mod x { .. }`; also says how many lines they have.
fn without_tests(code: &str) -> (String, usize) {
    let mut out = code.to_owned();
    let mut lines = 0;
    let mut from = 0;
    while let Some(found) = out[from..].find("#[cfg(test)]") {
        let start = from + found;
        from = start + 1;
        let mut after = out[start..].trim_start();
        while after.starts_with("#[") {
            after = after.split_once(']').map_or("", |(_, rest)| rest.trim_start());
        }
        let Some(to) =
            after.find(['{', ';']).filter(|to| after.starts_with("mod ") && after[*to..].starts_with('{'))
        else {
            continue;
        };
        let open = out.len() - after.len() + to;
        let end = matching_brace(&out, open);
        let region: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        lines += region.lines().count();
        out.replace_range(start..end, &region);
    }
    (out, lines)
}

/// The byte after the brace that closes the one at `open`.
fn matching_brace(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, c) in code[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return open + at + 1;
        }
    }
    code.len()
}

/// Places where `word` stands as a word of its own.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = code[..*at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !is_word(before.as_ref()) && !is_word(after.as_ref())
    })
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

/// The top folders of the crate that this code names, with their lines.
fn imports(code: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for at in words(code, "crate") {
        let Some(rest) = code[at + 5..].strip_prefix("::") else { continue };
        let line = line_of(code, at);
        if rest.starts_with('{') {
            let group = &rest[1..matching_brace(rest, 0) - 1];
            found.extend(group_heads(group).into_iter().map(|head| (head, line)));
        } else {
            found.push((first_word(rest), line));
        }
    }
    // `super::super::x` may reach the root too; only a layer's own name is taken for that.
    for (at, _) in code.match_indices("super::super::") {
        let rest = code[at..].trim_start_matches("super::");
        let word = first_word(rest);
        if LAYERS.iter().any(|(layer, _)| *layer == word) {
            found.push((word, line_of(code, at)));
        }
    }
    found
}

fn first_word(code: &str) -> String {
    code.trim_start().chars().take_while(|c| is_word(Some(c))).collect()
}

/// The first word of each entry of a `{a, b::{c, d}}` group.
fn group_heads(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut heads = vec![String::new()];
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(String::new()),
            c if depth == 0 => heads.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    heads.iter().map(|head| first_word(head)).filter(|head| !head.is_empty()).collect()
}

/// Functions with their first line and their number of lines.
fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for at in words(code, "fn") {
        let name = first_word(&code[at + 2..]);
        let Some(open) = body_start(code, at).filter(|_| !name.is_empty()) else { continue };
        let (first, last) = (line_of(code, at), line_of(code, matching_brace(code, open)));
        found.push((name, first, last - first + 1));
    }
    found
}

/// Where the body of the function at `at` begins; `None` for one that is only declared.
fn body_start(code: &str, at: usize) -> Option<usize> {
    let mut depth = 0;
    for (offset, c) in code[at..].char_indices() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '{' if depth == 0 => return Some(at + offset),
            ';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Fails with all complaints at once.
fn settle(rule: &str, complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{rule}:\n  {}", complaints.join("\n  "));
}

#[test]
fn imports_go_down_only() {
    let mut complaints = Vec::new();
    for source in sources().iter().filter(|source| source.in_src()) {
        let Some(layer) = source.layer() else { continue };
        if matches!(layer, "lib" | "bin") {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
            complaints.push(format!("{}: {layer} is no layer of the table in tests/tidy.rs", source.path));
            continue;
        };
        for (import, line) in imports(&source.code_with_tests) {
            if import != layer && import != "config" && !allowed.contains(&import.as_str()) {
                complaints.push(format!("{}:{line}: {layer} must not import {import}", source.path));
            }
        }
    }
    settle("imports go down only", complaints);
}

#[test]
fn files_and_functions_are_short() {
    let mut complaints = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let lines = source.text.lines().count() - source.test_lines;
        if lines > MAX_FILE {
            complaints.push(format!("{}: {lines} lines without tests, at most {MAX_FILE}", source.path));
        }
        for (name, line, lines) in functions(&source.code) {
            if lines > MAX_FUNCTION {
                let path = &source.path;
                complaints
                    .push(format!("{path}:{line}: fn {name} has {lines} lines, at most {MAX_FUNCTION}"));
            }
        }
    }
    settle("files and functions are short", complaints);
}

#[test]
fn unsafe_stands_in_few_files_and_says_why() {
    let mut complaints = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        for at in words(&source.code_with_tests, "unsafe") {
            let line = line_of(&source.code_with_tests, at);
            let place = format!("{}:{line}", source.path);
            if source.in_src() && !source.is_test() && !UNSAFE.contains(&source.path.as_str()) {
                complaints.push(format!("{place}: no unsafe in this file"));
            }
            let near = &lines[line.saturating_sub(25)..line];
            let close = &near[near.len().saturating_sub(10)..];
            let said = close.iter().any(|text| text.contains("SAFETY"))
                || near.iter().any(|text| text.contains("# Safety"));
            if !said {
                complaints.push(format!("{place}: unsafe without SAFETY near it"));
            }
        }
    }
    settle("unsafe stands in few files and says why", complaints);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut complaints = Vec::new();
    for source in sources() {
        for word in ["todo", "unimplemented", "dbg"] {
            for at in words(&source.code_with_tests, word) {
                if source.code_with_tests[at + word.len()..].starts_with('!') {
                    let line = line_of(&source.code_with_tests, at);
                    complaints.push(format!("{}:{line}: {word}!", source.path));
                }
            }
        }
    }
    // Put together here, so that this file does not contain them.
    let marks = [["TO", "DO"], ["FIX", "ME"], ["X", "XX"], ["HA", "CK"]].map(|parts| parts.concat());
    let threads = [["issue", " #"], ["Issue", " #"], ["issues", "/"]].map(|parts| parts.concat());
    for (path, text) in texts() {
        for mark in &marks {
            complaints.extend(words(&text, mark).map(|at| format!("{path}:{}: {mark}", line_of(&text, at))));
        }
        for thread in &threads {
            let found = text.match_indices(thread.as_str());
            complaints.extend(found.map(|(at, _)| format!("{path}:{}: {thread}", line_of(&text, at))));
        }
    }
    settle("nothing is left unfinished, and nothing speaks of how it was made", complaints);
}

#[test]
fn every_file_begins_with_its_licence_and_its_purpose() {
    let mut complaints = Vec::new();
    for source in sources() {
        let mut lines = source.text.lines();
        if lines.next() != Some(SPDX) {
            complaints.push(format!("{}: the first line is not {SPDX}", source.path));
        }
        let header = lines.find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
        if !header.is_some_and(|line| line.starts_with("//! ") && line.len() > 20) {
            complaints.push(format!("{}: no header that says what the file is for", source.path));
        }
    }
    settle("every file begins with its licence and its purpose", complaints);
}

#[test]
fn errors_of_the_library_are_typed() {
    let mut complaints = Vec::new();
    for source in sources().iter().filter(|source| source.in_src() && source.layer() != Some("bin")) {
        let found = words(&source.code_with_tests, "anyhow");
        complaints.extend(
            found.map(|at| format!("{}:{}: anyhow", source.path, line_of(&source.code_with_tests, at))),
        );
    }
    settle("anyhow stands in src/bin only", complaints);
}

#[test]
fn every_trap_has_a_test_of_its_name() {
    let mut tests: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for source in sources().iter().filter(|source| source.in_src() || source.is_test()) {
        for (name, line, _) in functions(&source.code_with_tests) {
            let number = name.strip_prefix('t').and_then(|rest| rest.split_once('_'));
            if let Some(number) = number.and_then(|(number, _)| number.parse().ok()) {
                tests.entry(number).or_default().push(format!("{}:{line} {name}", source.path));
            }
        }
    }
    let missing = TRAPS.iter().filter(|trap| !tests.contains_key(trap));
    settle(
        "every trap has a test of its name",
        missing.map(|trap| format!("T{trap}: no fn t{trap:02}_..")).collect(),
    );
}

/// The scanner itself: a rule that cannot fail is no rule.
mod scanner {
    use super::*;

    const SAMPLE: &str = r##"
use crate::{core::chunk, volume::{a, b}, };
use super::super::node::x;
/* unsafe /* nested */ crate::peer */
fn short(x: &'a [u8; 4]) -> char { let s = "fn no() { crate::wire }"; '{' }
fn declared(x: [u8; 2]);
fn long() {
    let raw = r#"unsafe " { "#; // crate::control
    crate::store::y();
}
#[cfg(test)]
#[allow(x)]
mod tests {
    fn inside() { '\'' }
}
#[cfg(test)]
mod outline;
"##;

    #[test]
    fn sees_code_and_only_code() {
        let source = source("src/frontend/x.rs".to_owned(), SAMPLE.to_owned());
        let heads: Vec<_> = imports(&source.code).into_iter().map(|(head, _)| head).collect();
        assert_eq!(heads, ["core", "volume", "store", "node"]);
        assert_eq!(words(&source.code, "unsafe").count(), 0);
        assert_eq!(source.layer(), Some("frontend"));
    }

    #[test]
    fn measures_functions_and_leaves_tests_out() {
        let source = source("x.rs".to_owned(), SAMPLE.to_owned());
        let of = |code: &str| {
            functions(code).into_iter().map(|(name, _, lines)| (name, lines)).collect::<Vec<_>>()
        };
        assert_eq!(of(&source.code), [("short".to_owned(), 1), ("long".to_owned(), 4)]);
        assert_eq!(of(&source.code_with_tests).len(), 3);
        assert_eq!(source.test_lines, 5);
        assert!(source.code.contains("mod outline;"));
    }
}
