//! Answers of deterministic requests, kept by a 256-bit key until they are old or their bytes are needed for newer ones, and
//! [`JoinableAnswers`], those that are being made.
//! What an answer is, and which requests are deterministic, the layer above knows.

mod joinable;

pub use joinable::JoinableAnswers;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use sha2::{Digest, Sha256};

/// Bytes the cache itself spends on an entry: key, pointers, list and table.
const ENTRY_BYTES: usize = 128;

/// What the cache may hold: a value that knows its size.
pub trait Weighted {
    /// Bytes on the heap and inline, roughly.
    fn weight_bytes(&self) -> usize;
}

/// A least-recently-used cache bounded by bytes and by the age of what it holds; of size 0 it holds nothing. Shared by reference.
pub struct ResponseCache<V> {
    state: Mutex<State<V>>,
    max_bytes: usize,
    time_to_live: Duration,
}

struct State<V> {
    entries: LruCache<CacheKey, Entry<V>>,
    bytes: usize,
    evictions: u64,
}

struct Entry<V> {
    value: Arc<V>,
    bytes: usize,
    since: Instant,
}

/// A 256-bit hash over everything that can change an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheKey([u8; 32]);

/// Builds a [`CacheKey`] from named fields. Names and lengths are hashed too, so two different lists of fields never
/// meet by concatenation.
#[derive(Clone)]
pub struct CacheKeyBuilder {
    hasher: Sha256,
}

impl<V: Weighted> ResponseCache<V> {
    /// A cache of at most `max_bytes` that gives nothing out after `time_to_live`.
    pub fn new(max_bytes: usize, time_to_live: Duration) -> Self {
        let state = State { entries: LruCache::unbounded(), bytes: 0, evictions: 0 };
        Self { state: Mutex::new(state), max_bytes, time_to_live }
    }

    /// Whether it can hold anything.
    pub fn is_enabled(&self) -> bool {
        self.max_bytes > 0
    }

    /// The answer for `key`, now the most recently used.
    pub fn get(&self, key: &CacheKey, now: Instant) -> Option<Arc<V>> {
        let mut state = self.locked();
        let entry = state.entries.get(key)?;
        if now.saturating_duration_since(entry.since) < self.time_to_live {
            return Some(Arc::clone(&entry.value));
        }
        state.bytes -= state.entries.pop(key).map_or(0, |old| old.bytes);
        None
    }

    /// Keeps `value`, dropping the least recently used ones until it fits; a value larger than the cache is not kept.
    pub fn insert(&self, key: CacheKey, value: Arc<V>, now: Instant) {
        let bytes = value.weight_bytes().saturating_add(ENTRY_BYTES);
        if bytes > self.max_bytes {
            return;
        }
        let mut state = self.locked();
        if let Some(replaced) = state.entries.put(key, Entry { value, bytes, since: now }) {
            state.bytes -= replaced.bytes;
        }
        state.bytes += bytes;
        while state.bytes > self.max_bytes {
            let Some((_, dropped)) = state.entries.pop_lru() else { break };
            state.bytes -= dropped.bytes;
            state.evictions += 1;
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.locked().bytes
    }

    /// Answers dropped to make room, since the start.
    pub fn evictions(&self) -> u64 {
        self.locked().evictions
    }

    fn locked(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> fmt::Debug for ResponseCache<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseCache").field("max_bytes", &self.max_bytes).finish_non_exhaustive()
    }
}

impl CacheKeyBuilder {
    /// Starts a key; `domain` names what is cached and by which version of the rules.
    pub fn new(domain: &str) -> Self {
        Self { hasher: Sha256::new() }.bytes("domain", domain.as_bytes())
    }

    /// Adds a field of bytes.
    #[must_use]
    pub fn bytes(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.hasher.update((part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        }
        self
    }

    /// Adds a list of numbers: token ids, settings, bits of floats.
    #[must_use]
    pub fn numbers(self, name: &str, values: impl IntoIterator<Item = u64>) -> Self {
        let bytes: Vec<u8> = values.into_iter().flat_map(u64::to_le_bytes).collect();
        self.bytes(name, &bytes)
    }

    /// The key.
    pub fn finish(self) -> CacheKey {
        CacheKey(self.hasher.finalize().into())
    }
}

impl fmt::Debug for CacheKeyBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CacheKeyBuilder")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[derive(Debug, PartialEq)]
    struct Blob(usize);

    impl Weighted for Blob {
        fn weight_bytes(&self) -> usize {
            self.0
        }
    }

    fn key(number: u64) -> CacheKey {
        CacheKeyBuilder::new("test").numbers("number", [number]).finish()
    }

    #[test]
    fn the_least_recently_used_go_first_and_bytes_stay_within() {
        let now = Instant::now();
        let cache = ResponseCache::new(3 * (ENTRY_BYTES + 100), HOUR);
        for number in 0..3 {
            cache.insert(key(number), Arc::new(Blob(100)), now);
        }
        assert_eq!(cache.get(&key(0), now).as_deref(), Some(&Blob(100)));
        cache.insert(key(3), Arc::new(Blob(100)), now);
        assert_eq!((cache.get(&key(1), now), cache.evictions()), (None, 1));
        assert!(
            cache.get(&key(0), now).is_some() && cache.get(&key(2), now).is_some() && cache.get(&key(3), now).is_some()
        );
        cache.insert(key(4), Arc::new(Blob(200)), now);
        assert_eq!((cache.bytes(), cache.evictions()), (2 * ENTRY_BYTES + 300, 3));
    }

    #[test]
    fn what_is_old_is_gone() {
        let cache = ResponseCache::new(10_000, HOUR);
        let start = Instant::now();
        cache.insert(key(1), Arc::new(Blob(100)), start);
        assert!(cache.get(&key(1), start + HOUR - Duration::from_secs(1)).is_some());
        assert!(cache.get(&key(1), start + HOUR).is_none());
        assert_eq!((cache.bytes(), cache.evictions()), (0, 0));
    }

    #[test]
    fn replacing_counts_the_new_bytes_only() {
        let now = Instant::now();
        let cache = ResponseCache::new(10_000, HOUR);
        cache.insert(key(1), Arc::new(Blob(100)), now);
        cache.insert(key(1), Arc::new(Blob(50)), now);
        assert_eq!((cache.bytes(), cache.evictions()), (ENTRY_BYTES + 50, 0));
    }

    #[test]
    fn a_value_larger_than_the_cache_drops_nothing_and_size_zero_is_off() {
        let now = Instant::now();
        let cache = ResponseCache::new(1000, HOUR);
        cache.insert(key(1), Arc::new(Blob(100)), now);
        cache.insert(key(2), Arc::new(Blob(5000)), now);
        assert!(cache.get(&key(1), now).is_some() && cache.get(&key(2), now).is_none());
        let off = ResponseCache::new(0, HOUR);
        off.insert(key(1), Arc::new(Blob(0)), now);
        assert!(!off.is_enabled() && off.get(&key(1), now).is_none());
    }

    #[test]
    fn keys_differ_by_name_by_value_and_by_where_a_field_ends() {
        let of = |fields: &[(&str, &[u8])]| {
            fields.iter().fold(CacheKeyBuilder::new("test"), |key, (name, value)| key.bytes(name, value)).finish()
        };
        let keys = [
            of(&[("a", b"bc")]),
            of(&[("ab", b"c")]),
            of(&[("a", b"b"), ("", b"c")]),
            of(&[("a", b"b"), ("c", b"")]),
            of(&[]),
        ];
        for (index, one) in keys.iter().enumerate() {
            assert!(keys[index + 1..].iter().all(|other| other != one));
        }
        assert_eq!(of(&[("a", b"bc")]), of(&[("a", b"bc")]));
        assert_ne!(CacheKeyBuilder::new("one").finish(), CacheKeyBuilder::new("two").finish());
    }
}
