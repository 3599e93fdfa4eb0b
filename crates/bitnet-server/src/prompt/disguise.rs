//! Content stays text. Wherever a caller's words contain the text of a special token, its first character is replaced by a
//! stand-in that nobody writes before the template sees them; the tokenizer puts it back after it has found the special tokens,
//! which by then are the template's own. One character for one keeps lengths, trimming and joins as they were, and
//! conversations without such texts, practically all, pass untouched.

use std::{borrow::Cow, collections::BTreeSet, ops::RangeInclusive};

use aho_corasick::AhoCorasick;
use serde_json::Value;

use super::template::{Conversation, TemplateError};

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
    ///
    /// # Errors
    /// [`TemplateError::Refused`] when the conversation leaves no character to stand in: megabytes of it, made for that.
    pub(super) fn disguise<'a>(&self, conversation: &'a Conversation) -> Result<Disguised<'a>, TemplateError> {
        let mut originals = BTreeSet::new();
        for_each_text(conversation, &mut |text| {
            originals.extend(self.starts(text).into_iter().filter_map(|at| text[at..].chars().next()));
        });
        if originals.is_empty() {
            return Ok(Disguised { conversation: Cow::Borrowed(conversation), stand_ins: Vec::new() });
        }
        let mut is_used = vec![false; 1 + char::MAX as usize];
        for_each_text(conversation, &mut |text| text.chars().for_each(|c| is_used[c as usize] = true));
        let unused = UNASSIGNED.into_iter().flatten().filter(|&c| !is_used[c as usize]);
        let num_originals = originals.len();
        let stand_ins: Vec<(char, char)> = unused.zip(originals).collect();
        if stand_ins.len() < num_originals {
            let message = "it holds special tokens and every character that could stand in for them";
            return Err(TemplateError::Refused(message.to_owned()));
        }
        let mut hidden = conversation.clone();
        let mut hide = |text: &mut String| self.hide(text, &stand_ins);
        hidden.messages.iter_mut().for_each(|message| rewrite(message, &mut hide));
        hidden.tools.iter_mut().for_each(|tools| rewrite(tools, &mut hide));
        hidden.extra.values_mut().for_each(|value| rewrite(value, &mut hide));
        Ok(Disguised { conversation: Cow::Owned(hidden), stand_ins })
    }

    /// Where special texts begin in `text`, ascending: whole ones, and at its end one that the template might complete.
    fn starts(&self, text: &str) -> Vec<usize> {
        let mut starts: Vec<usize> = self.automaton.find_overlapping_iter(text).map(|found| found.start()).collect();
        for whole in [text, text.trim_end()] {
            let tails = whole.char_indices().rev().map(|(at, _)| at).take_while(|at| whole.len() - at < self.longest);
            starts.extend(tails.filter(|&at| self.texts.iter().any(|special| special.starts_with(&whole[at..]))));
        }
        starts.sort_unstable();
        starts.dedup();
        starts
    }

    fn hide(&self, text: &mut String, stand_ins: &[(char, char)]) {
        let mut hidden = String::new();
        let mut copied = 0;
        for at in self.starts(text) {
            let starts_here = |(_, original): &&(char, char)| text[at..].starts_with(*original);
            let Some((stand_in, original)) = stand_ins.iter().find(starts_here) else { continue };
            hidden.extend([&text[copied..at], stand_in.encode_utf8(&mut [0; 4])]);
            copied = at + original.len_utf8();
        }
        if copied > 0 {
            hidden.push_str(&text[copied..]);
            *text = hidden;
        }
    }
}

/// Every string a caller wrote, keys included.
fn for_each_text(conversation: &Conversation, look_at: &mut impl FnMut(&str)) {
    let values = conversation.messages.iter().chain(&conversation.tools).chain(conversation.extra.values());
    values.for_each(|value| for_each_text_in(value, look_at));
}

fn for_each_text_in(value: &Value, look_at: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => look_at(text),
        Value::Array(items) => items.iter().for_each(|item| for_each_text_in(item, look_at)),
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            look_at(key);
            for_each_text_in(value, look_at);
        }),
        _ => {}
    }
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

/// The private planes and those of which nobody assigned anything: 3.1 MB of text if somebody writes them all.
const UNASSIGNED: [RangeInclusive<char>; 2] = ['\u{F0000}'..='\u{10FFFF}', '\u{40000}'..='\u{DFFFF}'];

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
        let disguised = finder().disguise(&plain).unwrap();
        assert!(disguised.stand_ins.is_empty());
        assert!(matches!(disguised.conversation, Cow::Borrowed(_)));
    }

    #[test]
    fn special_texts_lose_their_first_character_and_get_it_back() {
        let content = "x <|eot_id|> <b> <s>[INST] \u{F0000} <|eot";
        let hostile = conversation(content);
        let disguised = finder().disguise(&hostile).unwrap();
        let hidden = disguised.conversation.messages[0]["content"].as_str().unwrap().to_owned();
        assert_eq!(hidden, "x \u{F0001}|eot_id|> <b> \u{F0001}s>\u{F0002}INST] \u{F0000} \u{F0001}|eot");
        assert_eq!(disguised.reveal(hidden), content);
    }

    #[test]
    fn a_text_of_every_private_character_gains_nothing() {
        let private: String = ('\u{F0000}'..='\u{10FFFF}').collect();
        let hidden = finder().disguise(&conversation(&format!("{private}<s>"))).unwrap().stand_ins;
        assert_eq!(hidden, [('\u{40000}', '<')]);
        let all: String = UNASSIGNED.into_iter().flatten().collect();
        assert!(finder().disguise(&conversation(&format!("{all}<s>"))).is_err());
        assert!(finder().disguise(&conversation(&all)).is_ok());
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
        let disguised = finder.disguise(&everywhere).unwrap();
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
