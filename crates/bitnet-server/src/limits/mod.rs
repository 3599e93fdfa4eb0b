//! Who may ask how often: one bucket a client in a bounded table, and the numbers of honest answers.
//! The layer above turns a [`LimitDecision`] into headers and a status; nothing here knows HTTP or reads addresses.

mod table;

use std::{num::NonZeroU32, time::Duration};

use governor::{
    Quota,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
};

pub use crate::config::{ClientId, KeySet};

use table::ClientTable;

/// Limits the requests of each client to so many a minute: a bucket of that size which refills evenly, so a client may
/// send a minute's worth at once and then one each `60 / limit` seconds.
#[derive(Debug)]
pub struct RateLimiter<C: Clock = DefaultClock> {
    buckets: Option<Buckets<C>>,
}

#[derive(Debug)]
struct Buckets<C: Clock> {
    limiter: governor::RateLimiter<ClientId, ClientTable, C, StateInformationMiddleware>,
    clock: C,
    limit: NonZeroU32,
    /// Time in which one request refills.
    period: Duration,
}

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
        Self::with_clock(requests_per_minute, DefaultClock::default())
    }
}

impl<C: Clock + Clone> RateLimiter<C> {
    fn with_clock(requests_per_minute: Option<NonZeroU32>, clock: C) -> Self {
        let buckets = requests_per_minute.map(|limit| {
            let quota = Quota::per_minute(limit);
            let period = quota.replenish_interval();
            let limiter = governor::RateLimiter::new(quota, ClientTable::new(period), clock.clone());
            Buckets { limiter, clock, limit, period }
        });
        Self { buckets }
    }

    /// Counts a request of `client` if it is within the limit; `None` when there is no limit.
    pub fn check_request(&self, client: &ClientId) -> Option<LimitDecision> {
        self.buckets.as_ref().map(|buckets| buckets.check(client))
    }

    /// Clients in the table.
    pub fn num_tracked_clients(&self) -> usize {
        self.buckets.as_ref().map_or(0, |buckets| buckets.limiter.len())
    }
}

impl<C: Clock> Buckets<C> {
    fn check(&self, client: &ClientId) -> LimitDecision {
        // Read before the decision, so that a wait counted from here can only be too long.
        let now = self.clock.now();
        let limit = self.limit.get();
        let headers = |remaining, reset| RateLimitHeaders { limit, remaining, reset };
        match self.limiter.check_key(client) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                let reset = self.period * limit.saturating_sub(remaining);
                LimitDecision { allowed: true, retry_after: Duration::ZERO, headers: headers(remaining, reset) }
            }
            Err(not_until) => {
                let retry_after = not_until.wait_time_from(now);
                let reset = retry_after + self.period * (limit - 1);
                LimitDecision { allowed: false, retry_after, headers: headers(0, reset) }
            }
        }
    }
}

impl LimitDecision {
    /// `Retry-After` in whole seconds, 1..=60: waiting so long is always enough.
    pub fn retry_after_seconds(&self) -> u64 {
        // A bucket refills one request in a minute at most, so the upper bound never cuts a wait short.
        round_up(self.retry_after, 1000).clamp(1, 60)
    }

    /// `retry-after-ms`: the same in whole milliseconds.
    pub fn retry_after_millis(&self) -> u64 {
        round_up(self.retry_after, 1).clamp(1, 60_000)
    }
}

impl RateLimitHeaders {
    /// Names and values, `reset` written as OpenAI does (`6m0s`, `1s`, `120ms`).
    pub fn pairs(&self) -> [(&'static str, String); 3] {
        [
            ("x-ratelimit-limit-requests", self.limit.to_string()),
            ("x-ratelimit-remaining-requests", self.remaining.to_string()),
            ("x-ratelimit-reset-requests", reset_text(self.reset)),
        ]
    }
}

/// Whole units of `unit_millis`, rounded up.
fn round_up(duration: Duration, unit_millis: u64) -> u64 {
    let nanos = duration.as_nanos().div_ceil(u128::from(unit_millis) * 1_000_000);
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

fn reset_text(reset: Duration) -> String {
    let seconds = round_up(reset, 1000);
    if reset < Duration::from_secs(1) {
        format!("{}ms", round_up(reset, 1))
    } else if seconds < 60 {
        format!("{seconds}s")
    } else {
        format!("{}m{}s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;
    use proptest::prelude::*;

    use super::*;

    fn limiter(rpm: u32) -> (RateLimiter<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (RateLimiter::with_clock(NonZeroU32::new(rpm), clock.clone()), clock)
    }

    fn client(number: u32) -> ClientId {
        ClientId::from_address(std::net::Ipv4Addr::from(number).into())
    }

    #[test]
    fn no_limit_decides_nothing() {
        assert_eq!(RateLimiter::new(None).check_request(&client(1)), None);
    }

    #[test]
    fn a_minutes_worth_at_once_then_one_each_period() {
        let (limiter, clock) = limiter(3);
        let check = || limiter.check_request(&client(1)).expect("a limit is set");
        let remaining: Vec<u32> = (0..3).map(|_| check().headers.remaining).collect();
        assert_eq!(remaining, [2, 1, 0]);
        let refused = check();
        assert!(!refused.allowed);
        assert_eq!((refused.retry_after_seconds(), refused.retry_after_millis()), (20, 20_000));
        assert_eq!(refused.headers, RateLimitHeaders { limit: 3, remaining: 0, reset: Duration::from_secs(60) });
        assert!(limiter.check_request(&client(2)).expect("a limit is set").allowed, "others are not affected");
        clock.advance(Duration::from_secs(20));
        assert!(check().allowed);
        assert!(!check().allowed);
        assert_eq!(limiter.num_tracked_clients(), 2);
    }

    #[test]
    fn resets_are_written_as_openai_writes_them() {
        let cases = [(0, "0ms"), (120, "120ms"), (999, "999ms"), (1000, "1s"), (1001, "2s"), (59_999, "1m0s")];
        for (millis, text) in cases {
            assert_eq!(reset_text(Duration::from_millis(millis)), text);
        }
        assert_eq!(reset_text(Duration::from_secs(366)), "6m6s");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        /// Against an exact model of each client's bucket in whole nanoseconds; each refusal's advice is then followed
        /// on a copy of the model and must be enough.
        #[test]
        fn decisions_are_those_of_an_exact_bucket(
            rpm in 1_u32..2000,
            events in prop::collection::vec((0_u32..3, 0_u64..40_000), 1..200),
        ) {
            let (limiter, clock) = limiter(rpm);
            let period = (Duration::from_secs(60) / rpm).as_nanos() as u64;
            let mut full_at = [0_u64; 3];
            let mut now = 0_u64;
            for (who, pause_millis) in events {
                now += pause_millis * 1_000_000;
                clock.advance(Duration::from_millis(pause_millis));
                let decision = limiter.check_request(&client(who)).expect("a limit is set");
                let bucket = &mut full_at[who as usize];
                let owed = bucket.saturating_sub(now);
                let allowed = owed <= period * u64::from(rpm - 1);
                prop_assert_eq!(decision.allowed, allowed);
                if allowed {
                    *bucket = now + owed + period;
                    prop_assert_eq!(u64::from(decision.headers.remaining), (u64::from(rpm) * period - owed - period) / period);
                    prop_assert!(decision.headers.reset.as_nanos() as u64 >= owed + period);
                } else {
                    let wait = decision.retry_after_millis() * 1_000_000;
                    prop_assert!(owed.saturating_sub(wait) <= period * u64::from(rpm - 1));
                    prop_assert!(decision.retry_after_seconds() * 1000 >= decision.retry_after_millis());
                    prop_assert_eq!(decision.headers.reset.as_nanos() as u64, owed);
                }
            }
        }
    }
}
