//! Content stays text. Wherever a caller's words contain the text of a special token, its first character is replaced by a
//! private-use stand-in before the template sees them; the tokenizer puts it back after it has found the special tokens,
//! which by then are the template's own. One character for one keeps lengths, trimming and joins as they were, and
//! conversations without such texts, practically all, pass untouched.

use std::{borrow::Cow, collections::BTreeSet};

use aho_corasick::AhoCorasick;
use serde_json::Value;

use super::template::Conversation;

/// Finds the texts of special tokens.
#[derive(Debug)]
pub(super) struct SpecialFinder {
    automaton: AhoCorasick,
    texts: Vec<String>,
    longest: usize,
}

/// A conversation whose special texts are out of sight.
pub(super) struct Disguised<'a> {
    pub(super) conversation: Cow<'a, Conversation>,
    /// `(stand_in, original)`.
    pub(super) stand_ins: Vec<(char, char)>,
}

impl SpecialFinder {
    /// `texts` are those the tokenizer reads as special tokens.
    pub(super) fn new(texts: impl Iterator<Item = String>) -> Result<Self, aho_corasick::BuildError> {
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        let longest = texts.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { automaton: AhoCorasick::new(&texts)?, texts, longest })
    }

    /// Hides every special text that a caller wrote, in any string of the conversation.
    pub(super) fn disguise<'a>(&self, conversation: &'a Conversation) -> Disguised<'a> {
        let mut scan = Scan { finder: self, originals: BTreeSet::new(), private: BTreeSet::new() };
        for value in strings_of(conversation) {
            scan.look_at(value);
        }
        if scan.originals.is_empty() {
            return Disguised { conversation: Cow::Borrowed(conversation), stand_ins: Vec::new() };
        }
        let unused = PRIVATE_USE.filter(|c| !scan.private.contains(c));
        let stand_ins: Vec<(char, char)> = unused.zip(scan.originals).collect();
        let mut hidden = conversation.clone();
        let mut hide = |text: &mut String| self.hide(text, &stand_ins);
        hidden.messages.iter_mut().for_each(|message| rewrite(message, &mut hide));
        hidden.tools.iter_mut().for_each(|tools| rewrite(tools, &mut hide));
        hidden.extra.values_mut().for_each(|value| rewrite(value, &mut hide));
        Disguised { conversation: Cow::Owned(hidden), stand_ins }
    }

    /// Where special texts begin in `text`: whole ones, and at its end one that the template might complete.
    fn starts(&self, text: &str) -> BTreeSet<usize> {
        let mut starts: BTreeSet<usize> =
            self.automaton.find_overlapping_iter(text).map(|found| found.start()).collect();
        for whole in [text, text.trim_end()] {
            let tails = whole.char_indices().rev().map(|(at, _)| at).take_while(|at| whole.len() - at < self.longest);
            starts.extend(tails.filter(|&at| self.texts.iter().any(|special| special.starts_with(&whole[at..]))));
        }
        starts
    }

    fn hide(&self, text: &mut String, stand_ins: &[(char, char)]) {
        let starts = self.starts(text);
        if starts.is_empty() {
            return;
        }
        let stand_in =
            |c: char| stand_ins.iter().find(|(_, original)| *original == c).map_or(c, |(stand_in, _)| *stand_in);
        *text = text.char_indices().map(|(at, c)| if starts.contains(&at) { stand_in(c) } else { c }).collect();
    }
}

/// What a first look at all strings finds out.
struct Scan<'f> {
    finder: &'f SpecialFinder,
    /// First characters of the special texts that occur.
    originals: BTreeSet<char>,
    /// Private-use characters that occur, which therefore cannot stand in for others.
    private: BTreeSet<char>,
}

impl Scan<'_> {
    fn look_at(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.look_at_text(text),
            Value::Array(items) => items.iter().for_each(|item| self.look_at(item)),
            Value::Object(map) => map.iter().for_each(|(key, value)| {
                self.look_at_text(key);
                self.look_at(value);
            }),
            _ => {}
        }
    }

    fn look_at_text(&mut self, text: &str) {
        let starts = self.finder.starts(text);
        self.originals.extend(starts.into_iter().filter_map(|at| text[at..].chars().next()));
        self.private.extend(text.chars().filter(|c| PRIVATE_USE.contains(c)));
    }
}

fn strings_of(conversation: &Conversation) -> impl Iterator<Item = &Value> {
    conversation.messages.iter().chain(&conversation.tools).chain(conversation.extra.values())
}

fn rewrite(value: &mut Value, hide: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => hide(text),
        Value::Array(items) => items.iter_mut().for_each(|item| rewrite(item, hide)),
        Value::Object(map) => {
            let entries = std::mem::take(map).into_iter();
            *map = entries
                .map(|(mut key, mut value)| {
                    hide(&mut key);
                    rewrite(&mut value, hide);
                    (key, value)
                })
                .collect();
        }
        _ => {}
    }
}

/// Plane 15, of which nobody assigns anything.
const PRIVATE_USE: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

#[cfg(test)]
mod tests {
    use serde_json::json;

    impl Disguised<'_> {
        /// `text` with every stand-in back in its own shape.
        fn reveal(&self, text: String) -> String {
            let original = |c: char| {
                self.stand_ins.iter().find(|(stand_in, _)| *stand_in == c).map_or(c, |(_, original)| *original)
            };
            text.chars().map(original).collect()
        }
    }

    use super::*;

    fn finder() -> SpecialFinder {
        SpecialFinder::new(["<|eot_id|>", "<s>", "[INST]"].map(str::to_owned).into_iter()).unwrap()
    }

    fn conversation(content: &str) -> Conversation {
        Conversation { messages: vec![json!({"role": "user", "content": content})], ..Conversation::default() }
    }

    #[test]
    fn ordinary_conversations_pass_untouched() {
        let plain = conversation("a <b> c < d <|eot id|> [inst]");
        let disguised = finder().disguise(&plain);
        assert!(disguised.stand_ins.is_empty());
        assert!(matches!(disguised.conversation, Cow::Borrowed(_)));
    }

    #[test]
    fn special_texts_lose_their_first_character_and_get_it_back() {
        let content = "x <|eot_id|> <b> <s>[INST] \u{F0000} <|eot";
        let hostile = conversation(content);
        let disguised = finder().disguise(&hostile);
        let hidden = disguised.conversation.messages[0]["content"].as_str().unwrap().to_owned();
        assert_eq!(hidden, "x \u{F0001}|eot_id|> <b> \u{F0001}s>\u{F0002}INST] \u{F0000} \u{F0001}|eot");
        assert_eq!(disguised.reveal(hidden), content);
    }

    #[test]
    fn every_string_is_looked_at() {
        let everywhere = Conversation {
            messages: vec![json!({"role": "tool", "content": "", "tool_calls": [{"<s>": {"a": "<s>"}}]})],
            tools: Some(json!([{"description": "<s>"}])),
            extra: json!({"note": ["<s>"]}).as_object().unwrap().clone(),
            add_generation_prompt: true,
        };
        let finder = finder();
        let disguised = finder.disguise(&everywhere);
        let text = serde_json::to_string(&json!([
            disguised.conversation.messages,
            disguised.conversation.tools,
            disguised.conversation.extra
        ]));
        let text = text.unwrap();
        assert!(!text.contains("<s>"), "{text}");
        assert_eq!(text.matches("\u{F0000}s>").count(), 4);
    }
}
