//! What every answer has in common: an identity, and two ways to read it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::{ModelCard, ServiceError};
use crate::openai::ErrorObject;

/// A running answer in the words of one API.
pub trait Answer: Send + 'static {
    /// One event of the stream.
    type Chunk: Serialize + Send;
    /// The whole answer.
    type Whole: Serialize + Send;

    /// The next chunks, in order; `None` at the end. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<Option<Vec<Self::Chunk>>, ServiceError>> + Send;

    /// The same events, folded into one object.
    fn whole(self) -> impl Future<Output = Result<Self::Whole, ServiceError>> + Send;

    /// Whether the caller asked for a stream.
    fn is_stream(&self) -> bool;

    /// Whether `[DONE]` ends a stream that ended well.
    const ENDS_WITH_DONE: bool = true;

    /// The name of the event that is `chunk`, in an API whose events have names.
    fn event_name(_chunk: &Self::Chunk) -> Option<&'static str> {
        None
    }

    /// The last chunk of a stream that ends with `error`, in an API that has one; else the error itself is the last event.
    fn failed(self, _error: &ErrorObject) -> Option<Self::Chunk>
    where
        Self: Sized,
    {
        None
    }
}

/// What all chunks of an answer carry.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
}

impl Identity {
    /// A new answer of the model of `card`, its id starting with `prefix`.
    pub(super) fn new(prefix: &str, card: &ModelCard) -> Self {
        Self {
            id: random_id(prefix),
            created: unix_seconds(),
            model: card.names.id().to_owned(),
            fingerprint: card.fingerprint.clone(),
        }
    }
}

/// `prefix` and 32 random hexadecimal digits.
pub(super) fn random_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
