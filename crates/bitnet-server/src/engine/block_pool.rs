//! Which KV blocks are free, who holds the others, and what the ones nobody holds still contain: reference counts, an index
//! of contents, and a free list that *is* the LRU. Policy only: the storage is `bitnet_core::kv_cache`, and who gets a block
//! is the scheduler's decision.
//!
//! A block is used (it has holders), cached (none, but its content can be found) or free (neither). Blocks without holders
//! stand in one list: free ones first, then cached ones, the longest unused first. Allocation takes the first.

use std::collections::HashMap;

use bitnet_core::{BlockId, TokenId, kv_cache::BLOCK_TOKENS};

/// Names the content of a full block and of everything before it, under a secret of this process.
pub type BlockHash = u128;

/// The tokens of a full block.
pub type BlockTokens = [TokenId; BLOCK_TOKENS];

/// The blocks of one KV cache.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// The block that holds a content.
    index: HashMap<BlockHash, BlockId>,
    /// Neighbours in the list of blocks without holders, as a ring; the last entry is its head.
    links: Vec<Link>,
    num_free: usize,
    num_cached: usize,
}

#[derive(Clone, Debug, Default)]
struct Block {
    num_holders: u32,
    /// Set while the block can be found.
    content: Option<Content>,
}

#[derive(Clone, Debug)]
struct Content {
    hash: BlockHash,
    tokens: BlockTokens,
    /// Whether it can still be found when nobody holds the block.
    keep: bool,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: usize,
    next: usize,
}

impl BlockPool {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        let ring = num_blocks + 1;
        let link = |at: usize| Link { previous: (at + num_blocks) % ring, next: (at + 1) % ring };
        Self {
            blocks: vec![Block::default(); num_blocks],
            index: HashMap::with_capacity(num_blocks),
            links: (0..ring).map(link).collect(),
            num_free: num_blocks,
            num_cached: 0,
        }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds and nobody can find.
    pub fn num_free(&self) -> usize {
        self.num_free
    }

    /// Blocks that nobody holds and a prefix may find.
    pub fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// Blocks that [`BlockPool::allocate`] can give.
    pub fn num_available(&self) -> usize {
        self.num_free + self.num_cached
    }

    /// Takes the block that has been without holders longest; what it held cannot be found any more.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let head = self.blocks.len();
        let first = self.links[head].next;
        if first == head {
            return None;
        }
        self.unlink(first);
        match self.blocks[first].content.take() {
            Some(content) => {
                self.index.remove(&content.hash);
                self.num_cached -= 1;
            }
            None => self.num_free -= 1,
        }
        self.blocks[first].num_holders = 1;
        Some(BlockId(first as u32))
    }

    /// The block with this content. The tokens are compared, so that two prompts never meet by their hashes alone.
    pub fn find(&self, hash: BlockHash, tokens: &[TokenId]) -> Option<BlockId> {
        let block = *self.index.get(&hash)?;
        let content = self.blocks[block.index()].content.as_ref()?;
        (content.tokens == *tokens).then_some(block)
    }

    /// Whether somebody holds the block.
    pub fn is_used(&self, block: BlockId) -> bool {
        self.blocks[block.index()].num_holders > 0
    }

    /// One more holder for a block that is held or cached.
    ///
    /// # Panics
    /// When the block is free.
    pub fn share(&mut self, block: BlockId) {
        let at = block.index();
        if self.blocks[at].num_holders == 0 {
            assert!(self.blocks[at].content.is_some(), "block {} is shared while free", block.0);
            self.unlink(at);
            self.num_cached -= 1;
        }
        self.blocks[at].num_holders += 1;
    }

    /// Makes a held, full block findable, unless its content is known from another block already. Without `keep` it can be
    /// found only while somebody holds it.
    ///
    /// # Panics
    /// When nobody holds the block.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash, tokens: BlockTokens, keep: bool) {
        assert!(self.is_used(block), "block {} is published while free", block.0);
        if self.blocks[block.index()].content.is_none() && !self.index.contains_key(&hash) {
            self.index.insert(hash, block);
            self.blocks[block.index()].content = Some(Content { hash, tokens, keep });
        }
    }

    /// One holder less. Without the last one the block is cached when its content is kept, else free.
    ///
    /// # Panics
    /// When nobody holds the block.
    pub fn release(&mut self, block: BlockId) {
        let at = block.index();
        assert!(self.blocks[at].num_holders > 0, "block {} is released while free", block.0);
        self.blocks[at].num_holders -= 1;
        if self.blocks[at].num_holders > 0 {
            return;
        }
        let head = self.blocks.len();
        if let Some(forgotten) = self.blocks[at].content.take_if(|content| !content.keep) {
            self.index.remove(&forgotten.hash);
        }
        if self.blocks[at].content.is_some() {
            self.link(at, self.links[head].previous, head);
            self.num_cached += 1;
        } else {
            self.link(at, head, self.links[head].next);
            self.num_free += 1;
        }
    }

    /// Holders of each block, by index: what tests compare with the block tables.
    pub fn reference_counts(&self) -> impl Iterator<Item = u32> {
        self.blocks.iter().map(|block| block.num_holders)
    }

    fn link(&mut self, at: usize, previous: usize, next: usize) {
        self.links[at] = Link { previous, next };
        self.links[previous].next = at;
        self.links[next].previous = at;
    }

    fn unlink(&mut self, at: usize) {
        let Link { previous, next } = self.links[at];
        self.links[previous].next = next;
        self.links[next].previous = previous;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(content: u8) -> BlockTokens {
        [TokenId(u32::from(content)); BLOCK_TOKENS]
    }

    /// The slow clear version: blocks without holders in a list, contents in another.
    #[derive(Default)]
    struct Plain {
        held: Vec<BlockId>,
        idle: Vec<BlockId>,
        contents: Vec<(BlockId, u8, bool)>,
    }

    impl Plain {
        fn find(&self, content: u8) -> Option<BlockId> {
            self.contents.iter().find(|entry| entry.1 == content).map(|entry| entry.0)
        }

        fn content_of(&self, block: BlockId) -> Option<usize> {
            self.contents.iter().position(|entry| entry.0 == block)
        }

        fn allocate(&mut self) -> Option<BlockId> {
            if self.idle.is_empty() {
                return None;
            }
            let block = self.idle.remove(0);
            self.contents.retain(|entry| entry.0 != block);
            self.held.push(block);
            Some(block)
        }

        fn release(&mut self, which: usize) -> BlockId {
            let block = self.held.swap_remove(which);
            if !self.held.contains(&block) {
                self.contents.retain(|entry| entry.0 != block || entry.2);
                let at = if self.content_of(block).is_some() { self.idle.len() } else { 0 };
                self.idle.insert(at, block);
            }
            block
        }
    }

    proptest! {
        #[test]
        fn the_pool_agrees_with_plain_lists(
            actions in prop::collection::vec((0_u8..5, any::<prop::sample::Index>(), 0_u8..6, any::<bool>()), 1..200),
        ) {
            let mut pool = BlockPool::new(8);
            let mut plain = Plain { idle: (0..8).map(BlockId).collect(), ..Plain::default() };
            for (action, which, content, keep) in actions {
                match action {
                    0 => prop_assert_eq!(pool.allocate(), plain.allocate()),
                    1 if !plain.held.is_empty() => {
                        let block = *which.get(&plain.held);
                        pool.publish(block, content.into(), tokens(content), keep);
                        if plain.find(content).is_none() && plain.content_of(block).is_none() {
                            plain.contents.push((block, content, keep));
                        }
                    }
                    2 => {
                        let found = pool.find(content.into(), &tokens(content));
                        prop_assert_eq!(found, plain.find(content));
                        if let Some(block) = found {
                            pool.share(block);
                            plain.idle.retain(|idle| *idle != block);
                            plain.held.push(block);
                        }
                    }
                    3 if !plain.held.is_empty() => pool.release(plain.release(which.index(plain.held.len()))),
                    _ => prop_assert_eq!(pool.find(content.into(), &tokens(content + 1)), None, "the hash is not enough"),
                }
                let holders = |id: u32| plain.held.iter().filter(|block| block.0 == id).count() as u32;
                prop_assert!(pool.reference_counts().eq((0..8).map(holders)));
                let cached = plain.idle.iter().filter(|block| plain.content_of(**block).is_some()).count();
                prop_assert_eq!((pool.num_cached(), pool.num_available()), (cached, plain.idle.len()));
            }
        }
    }

    #[test]
    #[should_panic(expected = "released while free")]
    fn releasing_a_free_block_is_a_defect() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().expect("one block");
        pool.release(block);
        pool.release(block);
    }
}
