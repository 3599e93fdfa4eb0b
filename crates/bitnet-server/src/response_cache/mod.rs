//! Answers of deterministic requests, kept by a 256-bit key until their bytes are needed for newer ones.
//! What an answer is, and which requests are deterministic, the layer above knows.

use std::sync::Arc;

/// What the cache may hold: a value that knows its size.
pub trait Weighted {
    /// Bytes on the heap and inline, roughly.
    fn weight_bytes(&self) -> usize;
}

/// A least-recently-used cache bounded by bytes; of size 0 it holds nothing. Shared by reference.
#[derive(Debug)]
pub struct ResponseCache<V> {
    marker: std::marker::PhantomData<V>,
}

/// A 256-bit hash over everything that can change an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheKey([u8; 32]);

/// Builds a [`CacheKey`] from labelled fields. Lengths are hashed too, so no two lists of fields collide by
/// concatenation.
#[derive(Clone, Debug)]
pub struct CacheKeyBuilder {}

impl<V: Weighted> ResponseCache<V> {
    /// A cache of at most `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        let _ = max_bytes;
        unimplemented!()
    }

    /// Whether it can hold anything.
    pub fn is_enabled(&self) -> bool {
        unimplemented!()
    }

    /// The answer for `key`, now the most recently used.
    pub fn get(&self, key: &CacheKey) -> Option<Arc<V>> {
        let _ = key;
        unimplemented!()
    }

    /// Keeps `value`, dropping the least recently used ones until it fits; a value larger than the cache is not kept.
    pub fn insert(&self, key: CacheKey, value: Arc<V>) {
        let _ = (key, value);
        unimplemented!()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        unimplemented!()
    }

    /// Answers dropped to make room, since the start.
    pub fn evictions(&self) -> u64 {
        unimplemented!()
    }
}

impl CacheKeyBuilder {
    /// Starts a key; `domain` names what is cached and by which version of the rules.
    pub fn new(domain: &str) -> Self {
        let _ = domain;
        unimplemented!()
    }

    /// Adds a field of bytes.
    #[must_use]
    pub fn bytes(self, name: &str, value: &[u8]) -> Self {
        let _ = (name, value);
        unimplemented!()
    }

    /// Adds a list of numbers (token ids, bits of floats).
    #[must_use]
    pub fn numbers(self, name: &str, values: impl IntoIterator<Item = u64>) -> Self {
        let _ = (name, values.into_iter());
        unimplemented!()
    }

    /// The key.
    pub fn finish(self) -> CacheKey {
        unimplemented!()
    }
}
