//! Rules by example, and the filter against a naive reader of the whole text: whatever the rules and wherever the text
//! is cut, no character of a match leaves and nothing else is held back or changed.

use proptest::prelude::*;

use super::{normalise::fold, scanner::normalised, *};
use crate::config::{Direction, FilterRule, MatchKind};

fn rule(id: &str, kind: MatchKind, patterns: &[&str], action: FilterAction) -> FilterRule {
    FilterRule {
        id: id.to_owned(),
        category: "test".to_owned(),
        kind,
        patterns: patterns.iter().map(|pattern| (*pattern).to_owned()).collect(),
        direction: Direction::Both,
        action,
        severity: Severity::High,
    }
}

fn filter(rules: Vec<FilterRule>) -> ContentFilter {
    ContentFilter::new(&FilterRules { rules }).expect("the rules compile")
}

/// What leaves when `pieces` are pushed one after another, and the rule that ended it.
fn stream(filter: &ContentFilter, pieces: &[&str]) -> (String, Option<String>) {
    let mut output = filter.output_filter().expect("a rule reads output");
    let mut text = String::new();
    let mut blocked = None;
    for filtered in
        pieces.iter().map(|piece| output.push(piece)).collect::<Vec<_>>().into_iter().chain([output.finish()])
    {
        text.push_str(&filtered.text);
        blocked = blocked.or(filtered.blocked.map(|hit| hit.rule_id.to_string()));
    }
    (text, blocked)
}

#[test]
fn output_ends_before_a_match_that_comes_in_pieces() {
    let filter = filter(vec![rule("r", MatchKind::Literal, &["project aurora"], FilterAction::Block)]);
    let (text, blocked) = stream(&filter, &["The Pro", "ject  Au\u{200B}", "rora starts", " now"]);
    assert_eq!((text.as_str(), blocked.as_deref()), ("The ", Some("r")));
    let (text, blocked) = stream(&filter, &["The project ", "auror", "as"]);
    assert_eq!((text.as_str(), blocked), ("The project auroras".get(..4).expect("ascii"), Some("r".to_owned())));
    let (text, blocked) = stream(&filter, &["The project ", "auditors"]);
    assert_eq!((text.as_str(), blocked), ("The project auditors", None));
}

#[test]
fn text_is_held_back_only_while_a_match_may_still_come() {
    let filter = filter(vec![rule("r", MatchKind::Literal, &["abcd"], FilterAction::Block)]);
    let mut output = filter.output_filter().expect("a rule reads output");
    let sent: Vec<(String, usize)> = ["xyz", "ab", "c", "e", "a"]
        .into_iter()
        .map(|piece| output.push(piece))
        .map(|filtered| (filtered.text, filtered.settled_bytes))
        .collect();
    let expected = [("xyz", 3), ("", 3), ("", 3), ("abce", 7), ("", 7)];
    assert_eq!(sent, expected.map(|(text, settled)| (text.to_owned(), settled)));
    assert_eq!(
        (output.finish().text, output.push("more")),
        ("a".to_owned(), Filtered { settled_bytes: 8, ..Filtered::default() })
    );
}

#[test]
fn a_block_ends_where_another_match_had_begun() {
    let rules = vec![
        rule("short", MatchKind::Literal, &["cd"], FilterAction::Block),
        rule("long", MatchKind::Literal, &["abcdef"], FilterAction::Block),
    ];
    let (text, blocked) = stream(&filter(rules), &["xabcd", "ef"]);
    assert_eq!((text.as_str(), blocked.as_deref()), ("x", Some("short")));
}

#[test]
fn words_match_between_boundaries_only() {
    let filter = filter(vec![rule("w", MatchKind::Word, &["ass"], FilterAction::Mask)]);
    let (text, _) = stream(&filter, &["An as", "s, a class, ass", "et, Ass"]);
    assert_eq!(text, "An ***, a class, asset, ***");
    assert_eq!(filter.check_input("classic bass").verdict, InputVerdict::Allow);
    assert_eq!(filter.check_input("(ÄSS)").verdict, InputVerdict::Mask("(***)".to_owned()));
}

#[test]
fn prompts_are_masked_flagged_or_blocked_by_direction() {
    let mut only_output = rule("out", MatchKind::Literal, &["delta"], FilterAction::Block);
    only_output.direction = Direction::Output;
    let filter = filter(vec![
        rule("flag", MatchKind::Literal, &["alpha"], FilterAction::Flag),
        rule("mask", MatchKind::Literal, &["beta"], FilterAction::Mask),
        rule("block", MatchKind::Literal, &["gamma"], FilterAction::Block),
        only_output,
    ]);
    let report = |text: &str| {
        let report = filter.check_input(text);
        (report.verdict, report.matches.iter().map(|hit| hit.rule_id.to_string()).collect::<Vec<_>>())
    };
    assert_eq!(report("nothing, delta"), (InputVerdict::Allow, vec![]));
    assert_eq!(report("ALPHA alpha"), (InputVerdict::Allow, vec!["flag".to_owned()]));
    assert_eq!(
        report("a Beta, alpha"),
        (InputVerdict::Mask("a ****, alpha".to_owned()), vec!["flag".to_owned(), "mask".to_owned()])
    );
    let (verdict, matches) = report("gamma beta");
    assert!(matches!(verdict, InputVerdict::Block(hit) if &*hit.rule_id == "block"));
    assert_eq!(matches, ["mask", "block"]);
    assert_eq!(stream(&filter, &["no del", "ta"]), ("no ".to_owned(), Some("out".to_owned())));
}

#[test]
fn what_cannot_be_compiled_is_refused_by_name() {
    let compile = |kind, pattern: &str| {
        ContentFilter::new(&FilterRules { rules: vec![rule("r", kind, &[pattern], FilterAction::Block)] }).err()
    };
    let empty = FilterError::EmptyPattern { rule: "r".to_owned(), pattern: "\u{200B}\u{301}".to_owned() };
    assert_eq!(compile(MatchKind::Literal, "\u{200B}\u{301}"), Some(empty));
    assert_eq!(compile(MatchKind::Regex, "a+"), Some(FilterError::UnsupportedMatch { rule: "r".to_owned() }));
    assert!(filter(Vec::new()).output_filter().is_none());
}

/// Few characters, so that matches and near misses are common: case, an accent (whole and combining), an invisible
/// character, one that becomes two, spaces, a boundary.
const ALPHABET: [char; 13] = ['a', 'a', 'b', 'b', 'B', 'c', 'á', '\u{301}', '\u{200B}', 'ß', 's', ' ', '-'];

fn text(max_chars: usize) -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(&ALPHABET[..]), 1..=max_chars).prop_map(String::from_iter)
}

fn rules() -> impl Strategy<Value = Vec<FilterRule>> {
    let action = prop::sample::select(&[FilterAction::Block, FilterAction::Mask, FilterAction::Flag][..]);
    let kind = prop::sample::select(&[MatchKind::Literal, MatchKind::Literal, MatchKind::Word][..]);
    let pattern = text(6).prop_filter("something is left", |pattern| !normalised(pattern).is_empty());
    let one = (kind, prop::collection::vec(pattern, 1..4), action);
    prop::collection::vec(one, 1..4).prop_map(|rules| {
        let build = |(index, (kind, patterns, action)): (usize, (_, Vec<String>, _))| {
            let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
            rule(&format!("rule-{index}"), kind, &patterns, action)
        };
        rules.into_iter().enumerate().map(build).collect()
    })
}

/// The whole text as matching sees it: normalised characters and the source character each comes from.
fn whole(text: &str) -> Vec<(char, usize)> {
    let mut normal: Vec<(char, usize)> = Vec::new();
    for (source, c) in text.chars().enumerate() {
        let mut folded = Vec::new();
        fold(c, &mut folded);
        for folded in folded {
            if folded != ' ' || normal.last().is_none_or(|(last, _)| *last != ' ') {
                normal.push((folded, source));
            }
        }
    }
    normal
}

/// Every match of `rules` with `action` in `text`, by comparing at each place: source characters `first..end`.
fn naive_matches(rules: &[FilterRule], action: FilterAction, text: &str) -> Vec<(usize, usize)> {
    let normal = whole(text);
    let mut found = Vec::new();
    for rule in rules.iter().filter(|rule| rule.action == action) {
        for pattern in &rule.patterns {
            let wanted: Vec<char> = normalised(pattern).chars().collect();
            for (at, window) in normal.windows(wanted.len()).enumerate() {
                let is_letter = |index: Option<usize>| {
                    index.and_then(|index| normal.get(index)).is_some_and(|(c, _)| c.is_alphanumeric())
                };
                let inside = is_letter(at.checked_sub(1)) || is_letter(Some(at + wanted.len()));
                let equal = window.iter().map(|(c, _)| c).eq(&wanted);
                if equal && !(rule.kind == MatchKind::Word && inside) {
                    found.push((window[0].1, window[window.len() - 1].1 + 1));
                }
            }
        }
    }
    found
}

/// The first source character of `text` from where a match may have begun or may just be complete.
fn naive_first_live(rules: &[FilterRule], text: &str) -> usize {
    let normal = whole(text);
    let begins = |suffix: &[(char, usize)]| {
        rules.iter().flat_map(|rule| &rule.patterns).any(|pattern| {
            let pattern = normalised(pattern);
            suffix.len() <= pattern.chars().count()
                && suffix.iter().map(|(c, _)| *c).eq(pattern.chars().take(suffix.len()))
        })
    };
    let live = (0..normal.len()).find(|at| begins(&normal[*at..]));
    live.map_or(text.chars().count(), |at| normal[at].1)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) })]

    #[test]
    fn no_character_of_a_match_leaves_and_all_others_do(
        rules in rules(),
        text in text(30),
        cuts in prop::collection::vec(1_usize..6, 30),
    ) {
        let filter = filter(rules.clone());
        let mut output = filter.output_filter().expect("every rule reads output");
        let source: Vec<char> = text.chars().collect();
        let mut sent = String::new();
        let mut blocked = false;
        let mut pushed = 0;
        for cut in cuts {
            let piece: String = source[pushed..source.len().min(pushed + cut)].iter().collect();
            pushed += piece.chars().count();
            let filtered = output.push(&piece);
            sent.push_str(&filtered.text);
            blocked |= filtered.blocked.is_some();
            let so_far: String = source[..pushed].iter().collect();
            let settled = so_far.get(..filtered.settled_bytes).expect("whole characters settle").chars().count();
            prop_assert_eq!(settled, sent.chars().count());
            prop_assert!(blocked || settled == naive_first_live(&rules, &so_far), "held back: {settled} of {so_far:?}");
        }
        let filtered = output.finish();
        sent.push_str(&filtered.text);
        blocked |= filtered.blocked.is_some();

        let mut expected = source.clone();
        for (first, end) in naive_matches(&rules, FilterAction::Mask, &text) {
            expected[first..end].fill(MASK);
        }
        let blocks = naive_matches(&rules, FilterAction::Block, &text);
        let sent: Vec<char> = sent.chars().collect();
        prop_assert_eq!(&sent[..], &expected[..sent.len()]);
        prop_assert_eq!(blocked, !blocks.is_empty());
        let first_block = blocks.iter().map(|(first, _)| *first).min();
        prop_assert!(first_block.is_none_or(|first| sent.len() <= first), "leaked {sent:?}");
        prop_assert!(blocked || sent.len() == source.len());

        let whole: Vec<String> = vec![text.clone()];
        let pieces: Vec<&str> = whole.iter().map(String::as_str).collect();
        prop_assert_eq!(stream(&filter, &pieces).0.chars().collect::<Vec<_>>(), sent);
        match filter.check_input(&text).verdict {
            InputVerdict::Block(_) => prop_assert!(blocked),
            InputVerdict::Mask(masked) => prop_assert_eq!(masked.chars().collect::<Vec<_>>(), expected),
            InputVerdict::Allow => prop_assert!(!blocked && expected == source),
        }
    }
}
