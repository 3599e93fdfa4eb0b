//! Which blocks a sequence can take over instead of computing them, and under which names it offers its own. The names are
//! chained: a block's covers every token before it, the secret of this process, and whose cache it is in.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use bitnet_core::{BlockId, kv_cache::BLOCK_TOKENS};

use super::{
    block_pool::{BlockHash, BlockPool, BlockTokens},
    sequence::Sequence,
};
use crate::config::PrefixSharing;

/// Names blocks.
#[derive(Debug)]
pub struct PrefixCache {
    sharing: PrefixSharing,
    secret: RandomState,
}

impl PrefixCache {
    /// With a secret of its own.
    pub fn new(sharing: PrefixSharing) -> Self {
        Self { sharing, secret: RandomState::new() }
    }

    /// The blocks that hold the start of `sequence`.
    pub fn find(&self, blocks: &BlockPool, sequence: &mut Sequence) -> Vec<BlockId> {
        if sequence.needs_every_row() {
            return Vec::new();
        }
        let most = sequence.tokens.len() / BLOCK_TOKENS;
        self.extend_names(sequence, most);
        let contents = sequence.tokens.chunks_exact(BLOCK_TOKENS).take(most);
        sequence.block_names.iter().zip(contents).map_while(|(name, tokens)| blocks.find(*name, tokens)).collect()
    }

    /// Makes the blocks that `sequence` has filled since it had computed `before` tokens findable.
    pub fn publish(&self, blocks: &mut BlockPool, sequence: &mut Sequence, before: usize) {
        let filled = before / BLOCK_TOKENS..sequence.num_computed_tokens / BLOCK_TOKENS;
        self.extend_names(sequence, filled.end);
        let (contents, _) = sequence.tokens.as_chunks::<BLOCK_TOKENS>();
        let keep = self.is_kept(sequence);
        for at in filled {
            blocks.publish(sequence.block_table[at], sequence.block_names[at], contents[at], keep);
        }
    }

    fn is_kept(&self, sequence: &Sequence) -> bool {
        self.sharing != PrefixSharing::Off && sequence.request.cache_prompt
    }

    fn extend_names(&self, sequence: &mut Sequence, num_blocks: usize) {
        let (contents, _) = sequence.tokens.as_chunks::<BLOCK_TOKENS>();
        for tokens in contents.iter().take(num_blocks).skip(sequence.block_names.len()) {
            let parent = sequence.block_names.last().copied();
            let parent = parent.unwrap_or_else(|| self.root(sequence));
            sequence.block_names.push(self.name(parent, tokens));
        }
    }

    /// What stands before the first block.
    fn root(&self, sequence: &Sequence) -> BlockHash {
        match self.sharing {
            _ if !self.is_kept(sequence) => self.hash(&(0_u8, sequence.first_choice())),
            PrefixSharing::Off | PrefixSharing::PerClient => self.hash(&(1_u8, sequence.request.client)),
            PrefixSharing::Everyone => self.hash(&2_u8),
        }
    }

    fn name(&self, parent: BlockHash, tokens: &BlockTokens) -> BlockHash {
        self.hash(&(parent, tokens))
    }

    /// 128 bits of a keyed hash: 64 of each of two continuations of the same state.
    fn hash(&self, value: &impl Hash) -> BlockHash {
        let mut low = self.secret.build_hasher();
        value.hash(&mut low);
        let mut high = low.clone();
        low.write_u8(0);
        high.write_u8(1);
        u128::from(high.finish()) << 64 | u128::from(low.finish())
    }
}
