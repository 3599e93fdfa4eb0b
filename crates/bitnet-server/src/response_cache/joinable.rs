//! Answers that are being made now: a second request for the same one joins instead of making it again. An answer lives as
//! long as anybody reads it, so whoever came first may leave at any time.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::CacheKey;

/// Who is making which answer; knows only answers that somebody reads.
pub struct JoinableAnswers<T> {
    answers: Mutex<HashMap<CacheKey, Vec<Weak<T>>>>,
}

impl<T> JoinableAnswers<T> {
    /// Nothing under way.
    pub fn new() -> Self {
        Self { answers: Mutex::default() }
    }

    /// The parts of the answer for `key`: those under way, and `true`, or else those that `start` makes. Two callers never
    /// both start.
    ///
    /// # Errors
    /// Those of `start`.
    pub fn join_or_start<E>(
        &self,
        key: CacheKey,
        start: impl FnOnce() -> Result<Vec<Arc<T>>, E>,
    ) -> Result<(Vec<Arc<T>>, bool), E> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer of which a part has ended for everybody cannot be joined.
        let joined: Option<Vec<_>> = answers.get(&key).and_then(|parts| parts.iter().map(Weak::upgrade).collect());
        if let Some(parts) = joined {
            return Ok((parts, true));
        }
        let parts = start()?;
        answers.retain(|_, parts| parts.iter().any(|part| part.strong_count() > 0));
        answers.insert(key, parts.iter().map(Arc::downgrade).collect());
        Ok((parts, false))
    }
}

impl<T> Default for JoinableAnswers<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for JoinableAnswers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinableAnswers")
    }
}

#[cfg(test)]
mod tests {
    use super::{super::CacheKeyBuilder, *};

    #[test]
    fn an_answer_can_be_joined_while_anybody_reads_all_of_it() {
        let answers = JoinableAnswers::new();
        let key = CacheKeyBuilder::new("test").finish();
        let start = |number: i32| answers.join_or_start(key, || Ok::<_, ()>(vec![Arc::new(number), Arc::new(0)]));
        let (first, joined) = start(1).unwrap();
        assert!(!joined);
        let (mut second, joined) = start(2).unwrap();
        assert!(joined && Arc::ptr_eq(&first[0], &second[0]));
        drop(first);
        assert!(start(3).unwrap().1, "who came first may leave");
        drop(second.pop());
        assert_eq!(start(4).map(|(parts, joined)| (*parts[0], joined)), Ok((4, false)));
        assert_eq!(answers.join_or_start(key, || Err("full")).err(), Some("full"));
        let other = CacheKeyBuilder::new("other").finish();
        let (kept, _) = answers.join_or_start(other, || Ok::<_, ()>(vec![Arc::new(5)])).unwrap();
        assert_eq!(answers.answers.lock().unwrap().len(), 1, "what nobody reads is forgotten");
        drop(kept);
    }
}
