//! What every answer has in common: an identity, and two ways to read it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::{ModelCard, ServiceError};

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
            id: format!("{prefix}-{:032x}", rand::random::<u128>()),
            created: unix_seconds(),
            model: card.names.id().to_owned(),
            fingerprint: card.fingerprint.clone(),
        }
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
