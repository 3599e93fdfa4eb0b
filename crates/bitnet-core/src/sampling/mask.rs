//! Which tokens may come next at all: one bit an id. It is laid over a row of logits before the sampler sees it.

use crate::ids::TokenId;

/// A set of token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `id % 32` of word `id / 32`.
    words: Vec<u32>,
}

impl TokenMask {
    /// The set whose bits are `words`: bit `id % 32` of word `id / 32`.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// The set of `id` alone.
    pub fn only(id: TokenId) -> Self {
        let mut words = vec![0; id.index() / 32 + 1];
        words[id.index() / 32] = 1 << (id.index() % 32);
        Self { words }
    }

    /// Whether `id` is in the set.
    pub fn contains(&self, id: TokenId) -> bool {
        self.words.get(id.index() / 32).is_some_and(|word| word >> (id.index() % 32) & 1 == 1)
    }

    /// Whether no id is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many ids are in the set.
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The id that is in the set when no other is.
    pub fn single(&self) -> Option<TokenId> {
        let (at, word) = self.words.iter().enumerate().find(|(_, word)| **word != 0)?;
        let id = TokenId(at as u32 * 32 + word.trailing_zeros());
        (self.len() == 1).then_some(id)
    }

    /// The ids in the set, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let words = self.words.iter().zip((0..).step_by(32)).filter(|(word, _)| **word != 0);
        words.flat_map(|(&word, first)| (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit))
    }

    /// `logits` with every id outside the set excluded (-infinity). A value no logit may have stays, for the sampler to find.
    pub fn apply(&self, logits: &[f32], masked: &mut Vec<f32>) {
        let excluded = |logit: f32| if logit < f32::INFINITY { f32::NEG_INFINITY } else { logit };
        masked.clear();
        masked.extend((0_u32..).zip(logits).map(
            |(id, &logit)| {
                if self.contains(TokenId(id)) { logit } else { excluded(logit) }
            },
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_set_keeps_its_logits_and_bad_values_stay_visible() {
        let mask = TokenMask::from_words(vec![0b101, 1]);
        let mut row = vec![1.0; 40];
        row[5] = f32::NAN;
        let mut masked = Vec::new();
        mask.apply(&row, &mut masked);
        let kept: Vec<_> = (0..40).filter(|&id| masked[id] == 1.0).collect();
        assert_eq!(kept, [0, 2, 32]);
        assert!(masked[5].is_nan());
        assert!(!mask.contains(TokenId(64)) && !mask.is_empty() && TokenMask::default().is_empty());
        assert_eq!(mask.ids().collect::<Vec<_>>(), [0, 2, 32]);
        assert_eq!((mask.len(), mask.single(), TokenMask::default().single()), (3, None, None));
        for id in [0, 31, 32, 77].map(TokenId) {
            let only = TokenMask::only(id);
            assert_eq!((only.len(), only.single(), only.contains(id)), (1, Some(id), true));
        }
    }
}
