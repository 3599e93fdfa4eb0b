//! Tokens taken from a caller's minute before anything is computed.

use crate::limits::{ClientId, RateLimiter};

/// Tokens of a request. Given back when dropped, for then it came to nothing.
#[must_use]
pub(super) struct Charge<'s> {
    pub(super) limiter: &'s RateLimiter,
    pub(super) client: ClientId,
    pub(super) tokens: u32,
}

impl Charge<'_> {
    /// The request has begun.
    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        self.limiter.give_back(&self.client, self.tokens);
    }
}
