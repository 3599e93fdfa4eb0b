//! Which KV blocks are free and who holds the others: a free list and reference counts. Policy only: the storage is
//! `bitnet_core::kv_cache`, and who gets a block is the scheduler's decision.

use bitnet_core::BlockId;

/// The blocks of one KV cache. A block is free exactly when nobody holds it.
#[derive(Debug)]
pub struct BlockPool {
    /// Holders of each block.
    reference_counts: Vec<u32>,
    /// The block freed last is on top: its memory is the warmest.
    free: Vec<BlockId>,
}

impl BlockPool {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        let free = (0..num_blocks as u32).rev().map(BlockId).collect();
        Self { reference_counts: vec![0; num_blocks], free }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.reference_counts.len()
    }

    /// Blocks nobody holds.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Takes a free block; the caller is its only holder.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.reference_counts[block.index()] = 1;
        Some(block)
    }

    /// One more holder for a block that is held.
    ///
    /// # Panics
    /// When the block is free.
    pub fn share(&mut self, block: BlockId) {
        let count = &mut self.reference_counts[block.index()];
        assert!(*count > 0, "block {} is shared while free", block.0);
        *count += 1;
    }

    /// One holder less; the last one frees the block.
    ///
    /// # Panics
    /// When the block is free already.
    pub fn release(&mut self, block: BlockId) {
        let count = &mut self.reference_counts[block.index()];
        assert!(*count > 0, "block {} is released while free", block.0);
        *count -= 1;
        if *count == 0 {
            self.free.push(block);
        }
    }

    /// Holders of each block, by index: what tests compare with the block tables.
    pub fn reference_counts(&self) -> &[u32] {
        &self.reference_counts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_pool_agrees_with_a_list_of_holders(actions in prop::collection::vec((0_u8..3, any::<prop::sample::Index>()), 1..200)) {
            let mut pool = BlockPool::new(8);
            let mut held: Vec<BlockId> = Vec::new();
            for (action, which) in actions {
                match action {
                    0 => match pool.allocate() {
                        Some(block) => {
                            prop_assert!(!held.contains(&block), "a held block was handed out");
                            held.push(block);
                        }
                        None => prop_assert!((0..8).all(|id| held.contains(&BlockId(id)))),
                    },
                    1 if !held.is_empty() => {
                        let block = *which.get(&held);
                        pool.share(block);
                        held.push(block);
                    }
                    2 if !held.is_empty() => pool.release(held.swap_remove(which.index(held.len()))),
                    _ => {}
                }
                let holders = |id: u32| held.iter().filter(|block| block.0 == id).count() as u32;
                prop_assert!((0..8).all(|id| pool.reference_counts()[id as usize] == holders(id)));
                prop_assert_eq!(pool.num_free(), (0..8).filter(|&id| holders(id) == 0).count());
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
