//! One character -> what matching sees of it: compatibility forms, case, accents and invisible characters do not count.
//! No character's result depends on its neighbours, so text can be cut anywhere; the text that is sent stays untouched.

use unicode_normalization::char::{canonical_combining_class, decompose_compatible};

/// Appends what is left of `c`, nothing for accents and invisible characters. Every space is `' '`.
pub(super) fn fold(c: char, folded: &mut Vec<char>) {
    if c.is_ascii_graphic() {
        folded.push(c.to_ascii_lowercase());
        return;
    }
    decompose_compatible(c, |part| {
        if part.is_whitespace() {
            folded.push(' ');
        } else if !is_dropped(part) {
            for lower in part.to_lowercase() {
                match lower {
                    'ß' => folded.extend(['s', 's']),
                    'ς' => folded.push('σ'),
                    'ı' => folded.push('i'),
                    other => folded.push(other),
                }
            }
        }
    });
}

/// Accents (marks that combine in place; the vowel signs of Indic scripts are letters here), controls and
/// Default_Ignorable_Code_Point.
fn is_dropped(c: char) -> bool {
    c.is_control()
        || canonical_combining_class(c) != 0
        || matches!(c,
            '\u{AD}' | '\u{34F}' | '\u{61C}' | '\u{115F}'..='\u{1160}' | '\u{17B4}'..='\u{17B5}'
            | '\u{180B}'..='\u{180F}' | '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{206F}'
            | '\u{20DD}'..='\u{20E4}' | '\u{3164}' | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}' | '\u{FFA0}'
            | '\u{FFF0}'..='\u{FFF8}' | '\u{1BCA0}'..='\u{1BCA3}' | '\u{1D173}'..='\u{1D17A}'
            | '\u{E0000}'..='\u{E0FFF}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> String {
        let mut chars = Vec::new();
        text.chars().for_each(|c| fold(c, &mut chars));
        chars.into_iter().collect()
    }

    #[test]
    fn spellings_of_one_word_are_one() {
        for spelling in [
            "Aurora",
            "ＡＵＲＯＲＡ",
            "a\u{200B}u\u{AD}rora",
            "áurörà",
            "a\u{301}urora",
            "𝒜urora",
            "auro\u{E0041}ra",
            "aur⓪ra",
        ] {
            assert_eq!(folded(spelling).replace('0', "o"), "aurora", "{spelling}");
        }
        assert_eq!(folded("STRASSE"), folded("straße"));
        assert_eq!(folded("ΣΊΣΥΦΟΣ"), folded("σίσυφος"));
        assert_eq!(folded("ofﬁce\u{A0}\t№"), "office  no");
        assert_eq!(folded("İstanbul ıt"), "istanbul it");
    }

    #[test]
    fn different_words_stay_different() {
        assert_ne!(folded("की"), folded("का"));
        assert_ne!(folded("한"), folded("할"));
        assert_eq!(folded("a-b_c!"), "a-b_c!");
    }
}
