// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The deliberate mutations of `tests/mutations/list` still fit the code: each old text stands in its file exactly
//! once. `tests/mutations/run` applies them and sees that the test which each one names fails.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::Path;

/// Traps that must have a mutation.
const TRAPS: [&str; 14] =
    ["T1", "T2", "T4", "T8", "T9", "T10", "T11", "T12", "T13", "T15", "T16", "T21", "T22", "T23"];

#[test]
fn every_mutation_fits_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut traps = BTreeSet::new();
    for entry in std::fs::read_dir(root.join("tests/mutations/list")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (head, rest) = text.split_once("--- old\n").expect("an old text");
        let (old, new) = rest.split_once("\n--- new\n").expect("a new text");
        let field = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            line.unwrap_or_else(|| panic!("{}: no {name}", path.display()))
        };
        let code = std::fs::read_to_string(root.join(field("file"))).unwrap();
        assert_eq!(code.matches(old).count(), 1, "{}: its old text must occur once", path.display());
        assert_ne!(old, new.trim_end(), "{}: changes nothing", path.display());
        let kind = field("test").split(' ').next();
        assert!(
            matches!(kind, Some("model" | "sim" | "unit")),
            "{}: no kind of test {kind:?}",
            path.display()
        );
        assert!(!field("why").is_empty());
        traps.insert(field("trap").to_owned());
    }
    let missing: Vec<&str> = TRAPS.into_iter().filter(|trap| !traps.contains(*trap)).collect();
    assert!(missing.is_empty(), "no mutation for {missing:?}");
}
