//! Ids one after another -> text, whole characters only. The bytes come from the tokenizer; this file knows UTF-8 alone.

use super::Tokenizer;
use crate::ids::TokenId;

/// Turns a stream of ids into text, holding back bytes until they are whole characters; what can never become one is
/// U+FFFD. The concatenation of all pushes and the finish equals [`Tokenizer::decode`] of all ids.
#[derive(Clone, Debug)]
pub struct IncrementalDecoder {
    skip_special: bool,
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
    /// Nothing was emitted yet.
    at_start: bool,
}

impl IncrementalDecoder {
    /// A decoder at the start of an output.
    pub fn new(skip_special: bool) -> Self {
        Self { skip_special, pending: Vec::new(), at_start: true }
    }

    /// The text that token `id` completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        if self.skip_special && tokenizer.is_special(id) {
            return String::new();
        }
        self.pending.extend_from_slice(tokenizer.token_bytes(id));
        let mut text = self.take_whole_characters();
        if self.at_start && !text.is_empty() {
            self.at_start = false;
            if tokenizer.drops_leading_space() && text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }

    /// What is left at the end: U+FFFD for an incomplete character, else nothing.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// Everything that later bytes cannot change, by the rule of [`String::from_utf8_lossy`].
    fn take_whole_characters(&mut self) -> String {
        let bytes = std::mem::take(&mut self.pending);
        let mut text = String::with_capacity(bytes.len());
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            match std::str::from_utf8(chunk.invalid()) {
                // The bytes end within a character: more may complete it.
                Err(error) if error.error_len().is_none() && chunks.peek().is_none() => {
                    self.pending = chunk.invalid().to_vec();
                }
                Err(_) => text.push(char::REPLACEMENT_CHARACTER),
                Ok(_) => {}
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{gguf, parts::tests::byte_vocabulary};
    use proptest::prelude::*;

    /// A tokenizer whose ids 0..256 are the bytes themselves.
    fn bytes_only() -> Tokenizer {
        Tokenizer::from_parts(gguf::build(&byte_vocabulary()).unwrap()).unwrap()
    }

    #[test]
    fn a_character_leaves_when_its_last_byte_arrives() {
        let tokenizer = bytes_only();
        let mut decoder = IncrementalDecoder::new(false);
        let steps: Vec<String> = "a🙂é".bytes().map(|b| decoder.push(&tokenizer, TokenId(u32::from(b)))).collect();
        assert_eq!(steps, ["a", "", "", "", "🙂", "", "é"]);
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn hopeless_bytes_leave_at_once_and_a_cut_character_at_the_end() {
        let tokenizer = bytes_only();
        let mut decoder = IncrementalDecoder::new(false);
        let mut push = |b: u8| decoder.push(&tokenizer, TokenId(u32::from(b)));
        assert_eq!(push(0xFF), "\u{FFFD}");
        assert_eq!(push(0xE4), "");
        assert_eq!(push(0xB8), "");
        assert_eq!(push(b'x'), "\u{FFFD}x");
        assert_eq!(push(0xF0), "");
        assert_eq!(push(0x9F), "");
        assert_eq!(decoder.finish(), "\u{FFFD}");
    }

    proptest! {
        #[test]
        fn increments_add_up_to_the_whole(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0x80u8..=0xF4], 0..64)) {
            let tokenizer = bytes_only();
            let ids: Vec<TokenId> = bytes.iter().map(|&b| TokenId(u32::from(b))).collect();
            let mut decoder = IncrementalDecoder::new(false);
            let mut text: String = ids.iter().map(|&id| decoder.push(&tokenizer, id)).collect();
            text += &decoder.finish();
            prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
            prop_assert_eq!(text, tokenizer.decode(&ids, false));
        }
    }
}
