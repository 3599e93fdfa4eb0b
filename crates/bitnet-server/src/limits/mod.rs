//! Who may ask how often: one bucket a client in a bounded table, and the numbers of honest answers.
//! The layer above turns a [`LimitDecision`] into headers and a status; nothing here knows HTTP or reads addresses.

use std::{num::NonZeroU32, time::Duration};

pub use crate::config::{ClientId, KeySet};

/// Limits the requests of each client to so many a minute.
#[derive(Debug)]
pub struct RateLimiter {}

/// Whether a request may go on, and what to tell the client either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitDecision {
    /// Whether the request is within the limit; it is counted then.
    pub allowed: bool,
    /// How long to wait until a request is within the limit; zero when allowed.
    pub retry_after: Duration,
    /// The client's account.
    pub headers: RateLimitHeaders,
}

/// The client's account, for `x-ratelimit-{limit,remaining,reset}-requests`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimitHeaders {
    /// Requests a minute, and at once after a pause.
    pub limit: u32,
    /// Requests that would be allowed now.
    pub remaining: u32,
    /// Time until `remaining` is `limit` again when nothing is sent.
    pub reset: Duration,
}

impl RateLimiter {
    /// A limiter; `None` never limits.
    pub fn new(requests_per_minute: Option<NonZeroU32>) -> Self {
        let _ = requests_per_minute;
        unimplemented!()
    }

    /// Counts a request of `client` if it is within the limit; `None` when there is no limit.
    pub fn check_request(&self, client: &ClientId) -> Option<LimitDecision> {
        let _ = client;
        unimplemented!()
    }

    /// Clients in the table.
    pub fn num_tracked_clients(&self) -> usize {
        unimplemented!()
    }
}

impl LimitDecision {
    /// `Retry-After` in whole seconds, 1..=60: waiting so long is always enough.
    pub fn retry_after_seconds(&self) -> u64 {
        unimplemented!()
    }
}

impl RateLimitHeaders {
    /// Names and values, `reset` written as OpenAI does (`1s`, `6m0s`, `120ms`).
    pub fn pairs(&self) -> [(&'static str, String); 3] {
        unimplemented!()
    }
}
