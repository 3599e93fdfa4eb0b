//! The newtypes everyone may import: a token id and a KV-cache block id are both small integers, and never each other.

use serde::{Deserialize, Serialize};

/// An index into the model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenId(pub u32);

impl TokenId {
    /// The id as an index into a row of logits.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The index of one block of [`crate::kv_cache::BLOCK_TOKENS`] positions in the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The id as an index into the cache's storage.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
