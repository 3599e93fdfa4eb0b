//! Who may ask how often and how much: one bucket a client in a bounded table, and the numbers of honest answers.
//! The layers above turn them into headers and a status; nothing here knows HTTP or reads addresses.

mod table;

use std::{num::NonZeroU32, time::Duration};

use governor::{
    Quota,
    clock::{Clock, DefaultClock, Reference},
    middleware::NoOpMiddleware,
};

pub use crate::config::{ClientId, KeySet};

use table::ClientTable;

/// Limits what each client takes to so much a minute: a bucket of that size which refills evenly, so a client may take a
/// minute's worth at once and then one each `60 / limit` seconds.
#[derive(Debug)]
pub struct RateLimiter<C: Clock = DefaultClock> {
    buckets: Option<Buckets<C>>,
}

#[derive(Debug)]
struct Buckets<C: Clock> {
    limiter: governor::RateLimiter<ClientId, ClientTable, C, NoOpMiddleware<C::Instant>>,
    table: ClientTable,
    clock: C,
    /// The table counts from here.
    start: C::Instant,
    limit: NonZeroU32,
    /// Time in which one refills.
    period: Duration,
}

/// Why something is not within the limit, which is `limit` a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not now.
    Wait {
        /// What a minute allows.
        limit: u32,
        /// After this it is, if nothing else is taken.
        retry_after: Duration,
    },
    /// Never: it is more than a minute allows.
    TooMuch {
        /// What a minute allows.
        limit: u32,
    },
}

/// The state of a client's bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// What a minute allows, and a moment after a pause.
    pub limit: u32,
    /// What would be allowed now.
    pub remaining: u32,
    /// Time until `remaining` is `limit` again when nothing is taken.
    pub reset: Duration,
}

impl RateLimiter {
    /// A limiter; `None` never limits.
    pub fn new(per_minute: Option<NonZeroU32>) -> Self {
        Self::with_clock(per_minute, DefaultClock::default())
    }
}

impl<C: Clock + Clone> RateLimiter<C> {
    fn with_clock(per_minute: Option<NonZeroU32>, clock: C) -> Self {
        let buckets = per_minute.map(|limit| {
            let quota = Quota::per_minute(limit);
            let period = quota.replenish_interval();
            let table = ClientTable::new(period * limit.get());
            // Before the limiter's own, so that no account is shown fuller than it is.
            let start = clock.now();
            let limiter = governor::RateLimiter::new(quota, table.clone(), clock.clone());
            Buckets { limiter, table, clock, start, limit, period }
        });
        Self { buckets }
    }

    /// Takes `amount` for `client` if it is within the limit.
    ///
    /// # Errors
    /// [`Refused`]; nothing is taken then.
    pub fn take(&self, client: &ClientId, amount: u32) -> Result<(), Refused> {
        match (&self.buckets, NonZeroU32::new(amount)) {
            (Some(buckets), Some(amount)) => buckets.take(client, amount),
            _ => Ok(()),
        }
    }

    /// Gives back what was taken and came to nothing.
    pub fn give_back(&self, client: &ClientId, amount: u32) {
        if let Some(buckets) = &self.buckets {
            buckets.table.give_back(client, buckets.period * amount);
        }
    }

    /// What a minute allows.
    pub fn limit(&self) -> Option<u32> {
        self.buckets.as_ref().map(|buckets| buckets.limit.get())
    }

    /// The account of `client`; `None` when there is no limit.
    pub fn account(&self, client: &ClientId) -> Option<Account> {
        self.buckets.as_ref().map(|buckets| buckets.account(client))
    }

    /// Clients in the table.
    pub fn num_tracked_clients(&self) -> usize {
        self.buckets.as_ref().map_or(0, |buckets| buckets.limiter.len())
    }
}

impl<C: Clock> Buckets<C> {
    fn take(&self, client: &ClientId, amount: NonZeroU32) -> Result<(), Refused> {
        // Read before the decision, so that a wait counted from here can only be too long.
        let now = self.clock.now();
        let limit = self.limit.get();
        match self.limiter.check_key_n(client, amount) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_until)) => Err(Refused::Wait { limit, retry_after: not_until.wait_time_from(now) }),
            Err(_) => Err(Refused::TooMuch { limit }),
        }
    }

    fn account(&self, client: &ClientId) -> Account {
        let now = self.clock.now().duration_since(self.start);
        let reset = self.table.full_at(client).map_or(Duration::ZERO, |full_at| full_at.saturating_sub(now).into());
        let limit = self.limit.get();
        let taken = reset.as_nanos().div_ceil(self.period.as_nanos().max(1));
        let remaining = limit.saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX));
        Account { limit, remaining, reset }
    }
}

impl Account {
    /// What is said about it: the limit, what remains, and the time to the limit as OpenAI writes it (`6m0s`, `1s`, `120ms`).
    pub fn texts(&self) -> [String; 3] {
        [self.limit.to_string(), self.remaining.to_string(), reset_text(self.reset)]
    }
}

/// A wait as `Retry-After` tells it: whole seconds, 1..=60. Waiting so long is always enough.
pub fn retry_after_seconds(wait: Duration) -> u64 {
    // A bucket refills in a minute, so the upper bound never cuts a wait short.
    round_up(wait, 1000).clamp(1, 60)
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

    fn limiter(limit: u32) -> (RateLimiter<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (RateLimiter::with_clock(NonZeroU32::new(limit), clock.clone()), clock)
    }

    fn client(number: u32) -> ClientId {
        ClientId::from_address(std::net::Ipv4Addr::from(number).into())
    }

    #[test]
    fn no_limit_decides_nothing() {
        let limiter = RateLimiter::new(None);
        assert_eq!((limiter.take(&client(1), u32::MAX), limiter.account(&client(1))), (Ok(()), None));
    }

    #[test]
    fn a_minutes_worth_at_once_then_one_each_period() {
        let (limiter, clock) = limiter(3);
        let remaining = || limiter.account(&client(1)).expect("a limit is set").remaining;
        assert_eq!(remaining(), 3);
        for left in [2, 1, 0] {
            assert_eq!((limiter.take(&client(1), 1), remaining()), (Ok(()), left));
        }
        let refused = Err(Refused::Wait { limit: 3, retry_after: Duration::from_secs(20) });
        assert_eq!(limiter.take(&client(1), 1), refused);
        let account = Account { limit: 3, remaining: 0, reset: Duration::from_secs(60) };
        assert_eq!(limiter.account(&client(1)), Some(account));
        assert_eq!(limiter.take(&client(2), 1), Ok(()), "others are not affected");
        clock.advance(Duration::from_secs(20));
        assert_eq!((limiter.take(&client(1), 1), limiter.take(&client(1), 1)), (Ok(()), refused));
        assert_eq!(limiter.num_tracked_clients(), 2);
    }

    #[test]
    fn what_no_minute_allows_is_refused_for_good() {
        let (limiter, _) = limiter(100);
        assert_eq!(limiter.take(&client(1), 101), Err(Refused::TooMuch { limit: 100 }));
        assert_eq!(limiter.take(&client(1), 100), Ok(()), "and takes nothing");
        assert_eq!((limiter.take(&client(1), 0), limiter.limit()), (Ok(()), Some(100)));
    }

    #[test]
    fn what_is_given_back_can_be_taken_again_and_no_more() {
        let (limiter, clock) = limiter(100);
        assert_eq!(limiter.take(&client(1), 60), Ok(()));
        limiter.give_back(&client(1), 60);
        assert_eq!((limiter.take(&client(1), 100), limiter.take(&client(1), 1).is_err()), (Ok(()), true));
        clock.advance(Duration::from_secs(120));
        limiter.give_back(&client(1), 100);
        assert_eq!((limiter.take(&client(1), 100), limiter.take(&client(1), 1).is_err()), (Ok(()), true));
        limiter.give_back(&client(2), 100);
        assert_eq!((limiter.take(&client(2), 100), limiter.take(&client(2), 1).is_err()), (Ok(()), true));
    }

    #[test]
    fn waits_and_resets_are_written_as_openai_writes_them() {
        let cases = [(0, "0ms"), (120, "120ms"), (999, "999ms"), (1000, "1s"), (1001, "2s"), (59_999, "1m0s")];
        for (millis, text) in cases {
            assert_eq!(reset_text(Duration::from_millis(millis)), text);
        }
        assert_eq!(reset_text(Duration::from_secs(366)), "6m6s");
        let waits = [0, 1, 1000, 1001, 60_000].map(|millis| retry_after_seconds(Duration::from_millis(millis)));
        assert_eq!(waits, [1, 1, 1, 2, 60]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        /// Against an exact model of each client's bucket in whole nanoseconds; each refusal's advice is then followed
        /// on the model and must be enough.
        #[test]
        fn decisions_are_those_of_an_exact_bucket(
            limit in 1_u32..2000,
            events in prop::collection::vec((0_u32..3, 0_u64..40_000, 1_u32..500), 1..200),
        ) {
            let (limiter, clock) = limiter(limit);
            let period = (Duration::from_secs(60) / limit).as_nanos() as u64;
            let mut full_at = [0_u64; 3];
            let mut now = 0_u64;
            for (who, pause_millis, amount) in events {
                now += pause_millis * 1_000_000;
                clock.advance(Duration::from_millis(pause_millis));
                let bucket = &mut full_at[who as usize];
                let owed = bucket.saturating_sub(now);
                match limiter.take(&client(who), amount) {
                    Err(Refused::TooMuch { .. }) => prop_assert!(amount > limit),
                    Err(Refused::Wait { retry_after, .. }) => {
                        let room = period * u64::from(limit - amount);
                        prop_assert!(owed > room);
                        prop_assert_eq!(retry_after.as_nanos() as u64, owed - room);
                        prop_assert!(Duration::from_secs(retry_after_seconds(retry_after)) >= retry_after);
                    }
                    Ok(()) => {
                        prop_assert!(amount <= limit && owed <= period * u64::from(limit - amount));
                        *bucket = now + owed + period * u64::from(amount);
                    }
                }
                let account = limiter.account(&client(who)).expect("a limit is set");
                let owed = bucket.saturating_sub(now);
                prop_assert_eq!(account.reset.as_nanos() as u64, owed);
                prop_assert_eq!(u64::from(account.remaining), (u64::from(limit) * period - owed) / period);
            }
        }
    }
}
