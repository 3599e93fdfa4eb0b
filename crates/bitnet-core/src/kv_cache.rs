//! Paged K/V storage: [`BlockId`] -> the keys and values of [`BLOCK_TOKENS`] positions in every layer.
//!
//! Mechanism only. Reference counts, hashes, LRU and the choice of blocks are policy and live in the server's engine.

use crate::{ids::BlockId, model::Model};

/// Positions in one block.
pub const BLOCK_TOKENS: usize = 16;

/// Element type of stored K and V. Values are rounded to it when written and always read back from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// IEEE single: for comparison with transformers.
    F32,
    /// IEEE half: the default.
    #[default]
    F16,
}

/// Storage of `num_blocks` blocks. Pages are zero and untouched until written.
#[derive(Debug)]
pub struct KvCache {}

impl KvCache {
    /// Room for `num_blocks` blocks of `model`'s geometry.
    ///
    /// # Errors
    /// When the operating system refuses the address space.
    pub fn new(model: &Model, num_blocks: usize, dtype: KvDtype) -> std::io::Result<Self> {
        let _ = (model, num_blocks, dtype);
        unimplemented!()
    }

    /// Bytes of one block in a cache for `model`.
    pub fn block_bytes(model: &Model, dtype: KvDtype) -> usize {
        let _ = (model, dtype);
        unimplemented!()
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        unimplemented!()
    }

    /// Copies the whole of block `from` to `to` (copy on fork).
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let _ = (from, to);
        unimplemented!()
    }
}
