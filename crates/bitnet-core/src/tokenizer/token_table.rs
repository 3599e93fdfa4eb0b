//! What every id stands for: its exact bytes, and whether it is special. Built once, read by decoding and by log-probabilities.

use std::collections::HashMap;

use super::TokenizerError;
use crate::ids::TokenId;

/// How a vocabulary writes bytes as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: one printable character a byte.
    ByteLevel,
    /// `▁` for a space, `<0xNN>` for a byte that is no character; the encoder may put a space before the text.
    SentencePiece { drops_leading_space: bool },
    /// As it stands.
    Verbatim,
}

/// Bytes and flags by id.
#[derive(Debug)]
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    /// Where the bytes of token i end; they begin where those of i - 1 end.
    ends: Vec<u32>,
    special: Vec<bool>,
    drops_leading_space: bool,
}

/// One token on its way into the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenEntry<'a> {
    /// The text, spelled as the vocabulary does.
    pub(super) text: &'a str,
    /// Control token.
    pub(super) special: bool,
    /// Stands for one byte: the text is `<0xNN>`.
    pub(super) byte: bool,
}

impl TokenTable {
    /// The table of `entries` by id; `None` is an id nobody uses.
    pub(super) fn build(entries: &[Option<TokenEntry<'_>>], spelling: Spelling) -> Result<Self, TokenizerError> {
        let alphabet = byte_alphabet();
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(entries.len()),
            special: Vec::with_capacity(entries.len()),
            drops_leading_space: spelling == Spelling::SentencePiece { drops_leading_space: true },
        };
        for entry in entries {
            match entry {
                Some(TokenEntry { text, byte: true, .. }) => {
                    let byte = parse_byte_token(text).ok_or_else(|| {
                        TokenizerError::Invalid(format!("byte token {text:?} is not of the form <0x0A>"))
                    })?;
                    table.bytes.push(byte);
                }
                Some(entry) => spell_out(entry.text, spelling, &alphabet, &mut table.bytes),
                None => {}
            }
            let end = u32::try_from(table.bytes.len())
                .map_err(|_| TokenizerError::Invalid("the tokens together exceed 4 GiB".to_owned()))?;
            table.ends.push(end);
            table.special.push(entry.is_some_and(|entry| entry.special));
        }
        table.bytes.shrink_to_fit();
        Ok(table)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let Some(&end) = self.ends.get(id.index()) else { return &[] };
        let start = id.index().checked_sub(1).map_or(0, |previous| self.ends[previous]);
        &self.bytes[start as usize..end as usize]
    }

    /// Bytes of the longest token; `None` when some text cannot be spelled, so that its length says nothing.
    pub(super) fn longest(&self) -> Option<usize> {
        let tokens = (0..self.len() as u32).map(|id| self.bytes(TokenId(id)));
        let mut spelled = [false; 256];
        let mut longest = 0;
        for token in tokens {
            longest = longest.max(token.len());
            if let [byte] = token {
                spelled[usize::from(*byte)] = true;
            }
        }
        spelled.iter().all(|spelled| *spelled).then_some(longest)
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id.index()).copied().unwrap_or(false)
    }

    pub(super) fn drops_leading_space(&self) -> bool {
        self.drops_leading_space
    }
}

/// The byte of `<0xNN>`: exactly two upper- or lower-case hexadecimal digits.
pub(super) fn parse_byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn spell_out(text: &str, spelling: Spelling, alphabet: &HashMap<char, u8>, out: &mut Vec<u8>) {
    match spelling {
        Spelling::ByteLevel => {
            let start = out.len();
            for c in text.chars() {
                let Some(&byte) = alphabet.get(&c) else {
                    // Not spelled in the alphabet at all: an added token, which stands for its own text.
                    out.truncate(start);
                    out.extend_from_slice(text.as_bytes());
                    return;
                };
                out.push(byte);
            }
        }
        Spelling::SentencePiece { .. } => out.extend_from_slice(text.replace('\u{2581}', " ").as_bytes()),
        Spelling::Verbatim => out.extend_from_slice(text.as_bytes()),
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes, in order, for U+0100 and on.
pub(super) fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = (0x100..0x200u32).filter_map(char::from_u32);
    let spell = |byte: u8| if printable(byte) { Some(char::from(byte)) } else { others.next() };
    (0..=255).zip((0..=255).map(spell)).filter_map(|(byte, c)| Some((c?, byte))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> Option<TokenEntry<'_>> {
        Some(TokenEntry { text, special: false, byte: false })
    }

    #[test]
    fn the_alphabet_is_a_bijection_and_spells_space_as_g_with_dot() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(alphabet[&'Ġ'], b' ');
        assert_eq!(alphabet[&'Ċ'], b'\n');
        assert_eq!(alphabet[&'A'], b'A');
        assert_eq!(alphabet[&'Ń'], 0xAD);
    }

    #[test]
    fn byte_tokens_are_read_strictly() {
        assert_eq!(parse_byte_token("<0x0A>"), Some(10));
        assert_eq!(parse_byte_token("<0xff>"), Some(255));
        for bad in ["<0x-1>", "<0x+1>", "<0x1>", "<0x100>", "<0xGG>", "<0x>", "0x0A", "<0x0A", ""] {
            assert_eq!(parse_byte_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_spelling_gives_its_bytes() {
        let byte_level = TokenTable::build(&[entry("Ġthe"), None, entry("<｜a b｜>")], Spelling::ByteLevel).unwrap();
        assert_eq!(byte_level.bytes(TokenId(0)), b" the");
        assert_eq!(byte_level.bytes(TokenId(1)), b"");
        assert_eq!(byte_level.bytes(TokenId(2)), "<｜a b｜>".as_bytes());
        assert_eq!(byte_level.bytes(TokenId(3)), b"");
        let pieces = [entry("\u{2581}the"), Some(TokenEntry { text: "<0xE2>", special: false, byte: true })];
        let sentence_piece = TokenTable::build(&pieces, Spelling::SentencePiece { drops_leading_space: true }).unwrap();
        assert_eq!(sentence_piece.bytes(TokenId(0)), b" the");
        assert_eq!(sentence_piece.bytes(TokenId(1)), [0xE2]);
        assert!(sentence_piece.drops_leading_space());
    }
}
