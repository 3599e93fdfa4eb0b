//! The rules of generation defaults that hold for every format: which tokens end a generation, and which stated sampling
//! values can be believed.

use super::GenerationDefaults;
use crate::ids::TokenId;

/// Tokens that end a generation wherever a vocabulary has them; published files name one of them at most.
const END_TOKENS: [&str; 2] = ["<|eot_id|>", "<|end_of_text|>"];

/// Sampling values as a file states them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sampling {
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_k: Option<u32>,
}

/// Ids of those of [`END_TOKENS`] that a vocabulary has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EndOfTurn([Option<u64>; END_TOKENS.len()]);

impl EndOfTurn {
    /// Looks through `(token, id)` pairs.
    pub(super) fn find<'a>(tokens: impl Iterator<Item = (&'a str, u64)>) -> Self {
        let mut found = Self::default();
        tokens.for_each(|(token, id)| found.observe(token, id));
        found
    }

    /// Takes in one token of the vocabulary.
    pub(super) fn observe(&mut self, token: &str, id: u64) {
        if let Some(slot) = END_TOKENS.iter().zip(&mut self.0).find_map(|(name, slot)| (*name == token).then_some(slot))
        {
            slot.get_or_insert(id);
        }
    }
}

/// Puts the defaults together, noting what was added and what was dropped.
pub(super) fn defaults(
    sampling: Sampling,
    stated_ends: &[u64],
    by_name: EndOfTurn,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> GenerationDefaults {
    let mut stop_tokens = Vec::new();
    for &id in stated_ends {
        match u32::try_from(id).ok().filter(|&id| (id as usize) < vocab_size) {
            Some(id) => stop_tokens.push(TokenId(id)),
            None => notes.push(format!("dropped: end-of-sequence id {id} is outside the vocabulary")),
        }
    }
    for (name, id) in END_TOKENS.iter().zip(by_name.0) {
        let Some(id) = id.filter(|&id| id < vocab_size as u64).and_then(|id| u32::try_from(id).ok()) else { continue };
        if !stop_tokens.contains(&TokenId(id)) {
            stop_tokens.push(TokenId(id));
            notes.push(format!("repaired: {name} ({id}) ends a generation too, though the file does not say so"));
        }
    }
    stop_tokens.sort_unstable();
    stop_tokens.dedup();
    let mut believed = |what: &str, value: Option<f32>, range: std::ops::RangeInclusive<f32>| {
        let value = value?;
        let sane = range.contains(&value);
        if !sane {
            notes.push(format!("dropped: default {what} {value} is outside {range:?}"));
        }
        sane.then_some(value)
    };
    GenerationDefaults {
        temperature: believed("temperature", sampling.temperature, 0.0..=2.0),
        top_p: believed("top_p", sampling.top_p, f32::MIN_POSITIVE..=1.0),
        top_k: sampling.top_k,
        stop_tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_those_stated_and_those_named_inside_the_vocabulary() {
        let by_name = EndOfTurn::find([("a", 0), ("<|eot_id|>", 9), ("<|end_of_text|>", 3)].into_iter());
        let mut notes = Vec::new();
        let generation = defaults(Sampling::default(), &[3, 10, u64::MAX, 7], by_name, 10, &mut notes);
        assert_eq!(generation.stop_tokens, [TokenId(3), TokenId(7), TokenId(9)]);
        assert_eq!(notes.len(), 3, "{notes:?}");
    }

    #[test]
    fn values_out_of_range_are_dropped_with_a_note() {
        let mut notes = Vec::new();
        let sampling = Sampling { temperature: Some(f32::NAN), top_p: Some(0.0), top_k: Some(40) };
        let generation = defaults(sampling, &[], EndOfTurn::default(), 10, &mut notes);
        assert_eq!((generation.temperature, generation.top_p, generation.top_k), (None, None, Some(40)));
        assert_eq!(notes.len(), 2);
    }
}
