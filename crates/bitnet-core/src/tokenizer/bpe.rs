//! Byte pair encoding of one piece of text -> ids, in time linear in the piece.
//!
//! The result is that of the `tokenizers` crate's model, which is the oracle of the tests here. That model keeps all pairs of
//! a piece in one heap; a megabyte of one letter is one piece, and costs it 100 MB and a third of a second. It also panics
//! on merges that its vocabulary does not hold.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use tokenizers::models::bpe::{MergeMap, Vocab};

use super::TokenizerError;

/// A vocabulary, its merges, and what happens to characters without a token.
pub(super) struct Bpe {
    vocab: Vocab,
    /// (left, right) -> (rank, merged): the lowest rank goes first.
    merges: MergeMap,
    /// A piece that is a token is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// The tokens `<0x00>` to `<0xFF>`, if all are there and asked for.
    byte_tokens: Option<Box<[u32; 256]>>,
    unknown: Option<u32>,
    fuse_unknown: bool,
}

/// Switches of a BPE model.
#[derive(Clone, Debug, Default)]
pub(super) struct BpeOptions {
    /// A piece that is a token is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Characters without a token become `<0xNN>` tokens.
    pub(super) byte_fallback: bool,
    /// The token of last resort; without it such characters vanish.
    pub(super) unknown: Option<String>,
    /// A run of unknown characters is one token.
    pub(super) fuse_unknown: bool,
}

impl Bpe {
    /// The model of `vocab` and `merges`, the earlier merge first.
    pub(super) fn new<'a>(
        vocab: Vocab,
        merges: impl IntoIterator<Item = (&'a str, &'a str)>,
        options: &BpeOptions,
    ) -> Result<Self, TokenizerError> {
        let mut map = MergeMap::new();
        let mut merged = String::new();
        for (rank, (left, right)) in (0u32..).zip(merges) {
            merged.clear();
            merged.push_str(left);
            merged.push_str(right);
            let id = |token: &str| vocab.get(token).copied().ok_or_else(|| no_token(rank, token));
            map.insert((id(left)?, id(right)?), (rank, id(&merged)?));
        }
        map.shrink_to_fit();
        let unknown = options.unknown.as_ref().map(|token| {
            let what = || TokenizerError::Invalid(format!("the unknown token {token:?} is not in the vocabulary"));
            vocab.get(token).copied().ok_or_else(what)
        });
        Ok(Self {
            byte_tokens: if options.byte_fallback { byte_tokens(&vocab) } else { None },
            unknown: unknown.transpose()?,
            vocab,
            merges: map,
            ignore_merges: options.ignore_merges,
            fuse_unknown: options.fuse_unknown,
        })
    }

    /// The id of `token`, as the vocabulary spells it.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.vocab.get(token).copied()
    }

    /// The ids of one piece.
    pub(super) fn encode(&self, piece: &str) -> Vec<u32> {
        if self.ignore_merges
            && let Some(id) = self.id(piece)
        {
            return vec![id];
        }
        let ids = self.characters(piece);
        if ids.len() <= SHORT_PIECE { self.merge_short(ids) } else { self.merge_long(ids) }
    }

    /// The rule itself: as long as there is one, merge the first of the pairs with the lowest rank.
    fn merge_short(&self, mut ids: Vec<u32>) -> Vec<u32> {
        let rank = |left: u32, right: u32| self.merges.get(&(left, right)).map_or(NO_MERGE, |(rank, _)| *rank);
        let mut ranks: Vec<u32> = ids.windows(2).map(|pair| rank(pair[0], pair[1])).collect();
        while let Some((at, &lowest)) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank) {
            if lowest == NO_MERGE {
                break;
            }
            ids[at] = self.merges[&(ids[at], ids[at + 1])].1;
            ids.remove(at + 1);
            ranks.remove(at);
            if at < ranks.len() {
                ranks[at] = rank(ids[at], ids[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = rank(ids[at - 1], ids[at]);
            }
        }
        ids
    }

    /// The same, linear where the rule is quadratic:
    /// 1. symbols form a linked list, so that a merge moves nothing;
    /// 2. pairs wait under their rank, so that the lowest need not be searched for;
    /// 3. a pair that has changed since is recognized by its rank and skipped.
    fn merge_long(&self, ids: Vec<u32>) -> Vec<u32> {
        let mut symbols = Symbols::new(ids);
        let mut candidates = Candidates::default();
        for at in 0..symbols.ids.len() as u32 {
            self.offer(&symbols, at, &mut candidates);
        }
        while let Some((rank, at)) = candidates.pop() {
            if let Some((_, merged)) = self.pair(&symbols, at).filter(|(current, _)| *current == rank) {
                symbols.merge(at, merged);
                self.offer(&symbols, at, &mut candidates);
                if let Some(before) = symbols.before(at) {
                    self.offer(&symbols, before, &mut candidates);
                }
            }
        }
        symbols.ids.retain(|&id| id != GONE);
        symbols.ids
    }

    /// One symbol a character, before any merge.
    fn characters(&self, piece: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(piece.len());
        let mut after_unknown = false;
        for c in piece.chars() {
            let mut buffer = [0; 4];
            let text = c.encode_utf8(&mut buffer);
            let known = self.vocab.get(&*text);
            let is_unknown = known.is_none() && self.byte_tokens.is_none();
            match (known, &self.byte_tokens, self.unknown) {
                (Some(&id), ..) => ids.push(id),
                (None, Some(tokens), _) => ids.extend(text.bytes().map(|byte| tokens[usize::from(byte)])),
                (None, None, Some(unknown)) if !(after_unknown && self.fuse_unknown) => ids.push(unknown),
                (None, None, _) => {}
            }
            after_unknown = is_unknown;
        }
        ids
    }

    /// Rank and result of merging the symbol at `at` with the next.
    fn pair(&self, symbols: &Symbols, at: u32) -> Option<(u32, u32)> {
        let left = symbols.ids[at as usize];
        let right = symbols.ids[symbols.after(at)? as usize];
        self.merges.get(&(left, right)).copied()
    }

    fn offer(&self, symbols: &Symbols, at: u32, candidates: &mut Candidates) {
        if let Some((rank, _)) = self.pair(symbols, at) {
            candidates.push(rank, at);
        }
    }
}

/// The symbols of a piece as a linked list in place: a merge keeps the left slot and empties the right one.
struct Symbols {
    ids: Vec<u32>,
    previous: Vec<u32>,
    next: Vec<u32>,
}

impl Symbols {
    fn new(ids: Vec<u32>) -> Self {
        let len = ids.len() as u32;
        let previous = (0..len).map(|at| at.wrapping_sub(1)).collect();
        let next = (1..=len).map(|at| if at == len { GONE } else { at }).collect();
        Self { ids, previous, next }
    }

    /// The slot after `at`; none after the last, nor after a slot that is empty.
    fn after(&self, at: u32) -> Option<u32> {
        Some(self.next[at as usize]).filter(|&next| next != GONE)
    }

    fn before(&self, at: u32) -> Option<u32> {
        Some(self.previous[at as usize]).filter(|&previous| previous != GONE)
    }

    fn merge(&mut self, at: u32, merged: u32) {
        let right = self.next[at as usize] as usize;
        let after = self.next[right];
        self.ids[at as usize] = merged;
        self.ids[right] = GONE;
        self.next[right] = GONE;
        self.next[at as usize] = after;
        if after != GONE {
            self.previous[after as usize] = at;
        }
    }
}

/// Pairs that may be merged, by rank and then from left to right.
#[derive(Default)]
struct Candidates {
    by_rank: BTreeMap<u32, Positions>,
}

impl Candidates {
    fn push(&mut self, rank: u32, at: u32) {
        self.by_rank.entry(rank).or_default().push(at);
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        loop {
            let mut lowest = self.by_rank.first_entry()?;
            match lowest.get_mut().pop() {
                Some(at) => return Some((*lowest.key(), at)),
                None => drop(lowest.remove()),
            }
        }
    }
}

/// Positions in ascending order. They practically always arrive so, since a rank is worked off from left to right; this is
/// what makes the whole linear. Those that do not wait in a heap.
#[derive(Default)]
struct Positions {
    ascending: Vec<u32>,
    taken: usize,
    late: BinaryHeap<Reverse<u32>>,
}

impl Positions {
    fn push(&mut self, at: u32) {
        if self.ascending.last().is_none_or(|&last| last <= at) {
            self.ascending.push(at);
        } else {
            self.late.push(Reverse(at));
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let next = self.ascending.get(self.taken).copied();
        match (next, self.late.peek().copied()) {
            (next, Some(Reverse(late))) if next.is_none_or(|next| late < next) => {
                self.late.pop();
                Some(late)
            }
            (next, _) => {
                self.taken += usize::from(next.is_some());
                next
            }
        }
    }
}

fn byte_tokens(vocab: &Vocab) -> Option<Box<[u32; 256]>> {
    let tokens: Option<Vec<u32>> = (0..=255u8).map(|byte| vocab.get(&format!("<0x{byte:02X}>")).copied()).collect();
    tokens?.into_boxed_slice().try_into().ok()
}

fn no_token(rank: u32, token: &str) -> TokenizerError {
    let token: String = token.chars().take(64).collect();
    TokenizerError::Invalid(format!("merge {rank} names {token:?}, which is no token"))
}

/// Up to here, the plain rule is the faster way.
const SHORT_PIECE: usize = 48;

/// Ranks count merges, of which a file cannot hold so many.
const NO_MERGE: u32 = u32::MAX;

/// No symbol: an empty slot, or no neighbour.
const GONE: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::{Model as _, models::bpe::BPE};

    use super::*;

    fn vocab(tokens: &[&str]) -> Vocab {
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id as u32)).collect()
    }

    #[test]
    fn merges_must_be_between_tokens_and_into_a_token() {
        let new = |merge| Bpe::new(vocab(&["a", "aa", "bb"]), [merge], &BpeOptions::default());
        for merge in [("aa", "bb"), ("a", "x"), ("x", "a")] {
            assert!(new(merge).is_err());
        }
        assert_eq!(new(("a", "a")).ok().map(|bpe| bpe.encode("aaa")), Some(vec![1, 0]));
        let unknown = BpeOptions { unknown: Some("?".to_owned()), ..BpeOptions::default() };
        assert!(Bpe::new(vocab(&["a"]), [], &unknown).is_err());
    }

    #[test]
    fn unknown_characters_are_fused_or_not_or_vanish() {
        let encode = |unknown: Option<&str>, fuse_unknown| {
            let options = BpeOptions { unknown: unknown.map(str::to_owned), fuse_unknown, ..BpeOptions::default() };
            Bpe::new(vocab(&["a", "?"]), [], &options).unwrap().encode("xyax")
        };
        assert_eq!(encode(None, false), [0]);
        assert_eq!(encode(Some("?"), false), [1, 1, 0, 1]);
        assert_eq!(encode(Some("?"), true), [1, 0, 1]);
    }

    /// The letters, then every merge of two earlier tokens that `choices` names, ranked in an order of its own.
    fn grammar(choices: &[(usize, usize, u32)]) -> (Vocab, Vec<(String, String)>) {
        let mut tokens: Vec<String> = ["a", "b", "é"].map(str::to_owned).to_vec();
        let mut merges = Vec::new();
        for &(left, right, order) in choices {
            let (left, right) = (tokens[left % tokens.len()].clone(), tokens[right % tokens.len()].clone());
            if left.len() + right.len() <= 12 {
                let merged = format!("{left}{right}");
                if !tokens.contains(&merged) {
                    tokens.push(merged);
                }
                merges.push((order, left, right));
            }
        }
        merges.sort();
        let vocab = (0u32..).zip(tokens).map(|(id, token)| (token, id)).collect();
        (vocab, merges.into_iter().map(|(_, left, right)| (left, right)).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn encodes_as_the_crates_own_model_does(
            choices in proptest::collection::vec((0usize..16, 0usize..16, any::<u32>()), 0..16),
            text in "[abé]{0,48}|[aéx]{0,24}|a{0,200}|(ab){0,60}",
            fuse_unknown: bool,
        ) {
            let (mut vocab, merges) = grammar(&choices);
            let next = vocab.len() as u32;
            vocab.insert("?".to_owned(), next);
            let oracle = BPE::builder()
                .vocab_and_merges(vocab.clone(), merges.clone())
                .unk_token("?".to_owned())
                .fuse_unk(fuse_unknown)
                .build()
                .unwrap();
            let options = BpeOptions { unknown: Some("?".to_owned()), fuse_unknown, ..BpeOptions::default() };
            let merges = merges.iter().map(|(left, right)| (left.as_str(), right.as_str()));
            let bpe = Bpe::new(vocab, merges, &options).unwrap();
            let expected: Vec<u32> = oracle.tokenize(&text).unwrap().into_iter().map(|token| token.id).collect();
            prop_assert_eq!(&bpe.encode(&text), &expected);
            prop_assert_eq!(&bpe.merge_long(bpe.characters(&text)), &expected);
            prop_assert_eq!(&bpe.merge_short(bpe.characters(&text)), &expected);
        }
    }
}
