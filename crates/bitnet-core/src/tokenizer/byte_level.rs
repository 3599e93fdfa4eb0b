//! Text -> ids for byte-level BPE as most models have it: added tokens, one regular expression, the byte alphabet, BPE.
//!
//! The result is that of the general way through the `tokenizers` crate, which the tests compare. That one keeps the origin of
//! every byte through every stage, 100 bytes for each byte of text; nobody here asks for origins.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior, pre_tokenizers::split::SplitPattern, utils::SysRegex};

use super::{TokenizerError, bpe::Bpe, invalid, original_of, parts::Parts, token_table::byte_alphabet};
use crate::ids::TokenId;

/// The stages before BPE.
pub(super) struct ByteLevel {
    added: AhoCorasick,
    /// Id of each added token, and whether it is special, in the automaton's order.
    added_ids: Vec<(TokenId, bool)>,
    regex: SysRegex,
    alphabet: [char; 256],
    /// No token has more bytes.
    longest: usize,
}

impl ByteLevel {
    /// The stages of `parts`, if they are of this simple kind.
    pub(super) fn of(parts: &Parts) -> Result<Option<Self>, TokenizerError> {
        let plain = |token: &tokenizers::AddedToken| !(token.single_word || token.lstrip || token.rstrip);
        let Some(pattern) = parts.pre_tokenizer.as_ref().and_then(single_pattern) else { return Ok(None) };
        if parts.normalizer.is_some() || !parts.added.iter().all(|(_, token)| plain(token)) {
            return Ok(None);
        }
        let texts = parts.added.iter().map(|(_, token)| &token.content);
        let added = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts).map_err(invalid)?;
        let mut alphabet = ['\0'; 256];
        for (c, byte) in byte_alphabet() {
            alphabet[usize::from(byte)] = c;
        }
        Ok(Some(Self {
            added,
            added_ids: parts.added.iter().map(|(id, token)| (*id, token.special)).collect(),
            regex: SysRegex::new(pattern).map_err(invalid)?,
            alphabet,
            longest: parts.table.longest().unwrap_or(usize::MAX),
        }))
    }

    /// Text -> ids; `stand_ins` and `most` as in [`super::Tokenizer::encode_with_stand_ins`].
    pub(super) fn encode(
        &self,
        model: &Bpe,
        text: &str,
        parse_special: bool,
        stand_ins: &[(char, char)],
        most: usize,
    ) -> Vec<TokenId> {
        let mut ids = Vec::new();
        let mut start = 0;
        for found in self.added.find_iter(text) {
            let (id, special) = self.added_ids[found.pattern().as_usize()];
            if parse_special || !special {
                self.encode_plain(model, &text[start..found.start()], stand_ins, most, &mut ids);
                ids.push(id);
                start = found.end();
            }
            if ids.len() > most {
                return ids;
            }
        }
        self.encode_plain(model, &text[start..], stand_ins, most, &mut ids);
        ids
    }

    fn encode_plain(&self, model: &Bpe, text: &str, stand_ins: &[(char, char)], most: usize, ids: &mut Vec<TokenId>) {
        // Tokens spell every byte, and none is longer than the longest: of a longer text this much has more than `most`. A
        // stand-in of at most four bytes may take the place of one.
        let enough = most.saturating_add(1).saturating_mul(self.longest);
        let within = |text: &str, bytes: usize| text.floor_char_boundary(bytes.saturating_add(3));
        let text: Cow<'_, str> = match stand_ins {
            [] => text.into(),
            _ => {
                let text = &text[..within(text, enough.saturating_mul(4))];
                text.chars().map(|c| original_of(c, stand_ins)).collect()
            }
        };
        let text = &text[..within(&text, enough)];
        let mut spelled = String::new();
        let mut encode = |piece: &str, ids: &mut Vec<TokenId>| {
            spelled.clear();
            spelled.extend(piece.bytes().map(|byte| self.alphabet[usize::from(byte)]));
            ids.extend(model.encode(&spelled).into_iter().map(TokenId));
            ids.len() > most
        };
        let mut start = 0;
        for (from, to) in self.regex.find_iter(text) {
            if encode(&text[start..from], ids) || encode(&text[from..to], ids) {
                return;
            }
            start = to;
        }
        encode(&text[start..], ids);
    }
}

/// The pattern, if the pre-tokenizer is one split that keeps everything, and then bytes.
fn single_pattern(pre_tokenizer: &PreTokenizerWrapper) -> Option<&str> {
    let PreTokenizerWrapper::Sequence(steps) = pre_tokenizer else { return None };
    let [PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)] = steps.as_ref() else {
        return None;
    };
    let plain = split.behavior == SplitDelimiterBehavior::Isolated
        && !split.invert
        && !bytes.add_prefix_space
        && !bytes.use_regex;
    match &split.pattern {
        SplitPattern::Regex(pattern) if plain => Some(pattern),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::tokenizer::{EncodeOptions, Tokenizer, gguf, parts::tests::byte_vocabulary};

    /// Built once: the property asks hundreds of times.
    fn both_ways() -> &'static [Tokenizer; 2] {
        static BOTH: std::sync::OnceLock<[Tokenizer; 2]> = std::sync::OnceLock::new();
        BOTH.get_or_init(build_both)
    }

    fn build_both() -> [Tokenizer; 2] {
        let mut vocabulary = byte_vocabulary();
        vocabulary.tokens.extend(["<|end|>", "<tool>", "th", "Ġth", "the", "<|"].map(str::to_owned));
        vocabulary.token_types = vec![1; 256];
        vocabulary.token_types.extend([3, 4, 1, 1, 1, 1]);
        vocabulary.merges = ["t h", "Ġ th", "< |"].map(str::to_owned).to_vec();
        let short = Tokenizer::from_parts(gguf::build(&vocabulary).unwrap()).unwrap();
        let mut general = Tokenizer::from_parts(gguf::build(&vocabulary).unwrap()).unwrap();
        assert!(short.byte_level.is_some());
        general.byte_level = None;
        [short, general]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn the_short_way_gives_what_the_general_way_gives(
            text in "([ the]|<\\|end\\|>|<tool>|\n|['<|xé1\u{F0000}]){0,24}|\\PC{0,24}",
            parse_special: bool,
        ) {
            let [short, general] = both_ways();
            let options = EncodeOptions { add_special_tokens: true, parse_special };
            prop_assert_eq!(short.encode(&text, options).unwrap(), general.encode(&text, options).unwrap());
            let stand_ins = [('\u{F0000}', '<')];
            prop_assert_eq!(
                short.encode_with_stand_ins(&text, &stand_ins, true, usize::MAX).unwrap(),
                general.encode_with_stand_ins(&text, &stand_ins, true, usize::MAX).unwrap()
            );
            let whole = short.encode_with_stand_ins(&text, &[], false, usize::MAX).unwrap();
            for most in 0..whole.len() + 2 {
                let some = short.encode_with_stand_ins(&text, &[], false, most).unwrap();
                prop_assert!(some == whole || some.len() > most, "{} of {} with {}", some.len(), whole.len(), most);
            }
        }
    }
}
