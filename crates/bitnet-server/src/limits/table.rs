//! The limiter's memory: one number a client, bounded. A client whose bucket is full again is forgotten, which changes
//! nothing for it; should the table still be full, all further newcomers share one bucket until there is room. So nobody
//! gets more than the limit, however many names an attacker invents, and known clients never notice.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use governor::{
    nanos::Nanos,
    state::{StateStore, keyed::ShrinkableKeyedStateStore},
};

use crate::config::ClientId;

/// Most clients in the table: 24 bytes each in a hash table, 13 MiB when full.
const MAX_CLIENTS: usize = (1 << 19) / 8 * 7;
/// Least time between two searches for forgettable clients in a full table.
const SWEEP_INTERVAL_NANOS: u64 = 1_000_000_000;

/// State of every client: the time at which its bucket is full again. Clones are the same table: the limiter keeps its own to
/// itself, and accounts are read beside it.
#[derive(Clone, Debug)]
pub(super) struct ClientTable {
    state: Arc<Mutex<State>>,
    /// Time in which the most that is ever taken at once refills.
    largest_nanos: u64,
    max_clients: usize,
}

#[derive(Debug, Default)]
struct State {
    clients: HashMap<ClientId, Nanos>,
    /// The bucket of newcomers who found the table full.
    overflow: Option<Nanos>,
    next_sweep_nanos: u64,
}

impl ClientTable {
    /// Of buckets from which at most what refills in `largest` is taken at once.
    pub(super) fn new(largest: Duration) -> Self {
        Self::with_capacity(largest, MAX_CLIENTS)
    }

    fn with_capacity(largest: Duration, max_clients: usize) -> Self {
        Self { state: Arc::default(), largest_nanos: Nanos::from(largest).as_u64(), max_clients }
    }

    /// When the bucket of `client` is full again; `None`: it is.
    pub(super) fn full_at(&self, client: &ClientId) -> Option<Nanos> {
        self.locked(|state| {
            let newcomer = || state.overflow.filter(|_| state.clients.len() >= self.max_clients);
            state.clients.get(client).copied().or_else(newcomer)
        })
    }

    /// Undoes a taking that refills in `time`. Those who share a bucket get nothing back: whose it was is not known.
    pub(super) fn give_back(&self, client: &ClientId, time: Duration) {
        self.locked(|state| {
            if let Some(full_at) = state.clients.get_mut(client) {
                *full_at = full_at.saturating_sub(time.into());
            }
        });
    }

    fn locked<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl StateStore for ClientTable {
    type Key = ClientId;

    fn measure_and_replace<T, F, E>(&self, client: &ClientId, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        self.locked(|state| {
            if let Some(full_at) = state.clients.get_mut(client) {
                let (outcome, next) = measure(Some(*full_at))?;
                *full_at = next;
                return Ok(outcome);
            }
            // A newcomer's bucket is full now and will be again when what it takes has refilled: now is not before that time less
            // the longest.
            let (outcome, next) = measure(None)?;
            let now_nanos = next.as_u64().saturating_sub(self.largest_nanos);
            if state.clients.len() >= self.max_clients && now_nanos >= state.next_sweep_nanos {
                state.next_sweep_nanos = now_nanos + SWEEP_INTERVAL_NANOS;
                state.clients.retain(|_, full_at| full_at.as_u64() > now_nanos);
            }
            if state.clients.len() < self.max_clients {
                state.clients.insert(*client, next);
                return Ok(outcome);
            }
            let (outcome, next) = measure(state.overflow)?;
            state.overflow = Some(next);
            Ok(outcome)
        })
    }
}

impl ShrinkableKeyedStateStore<ClientId> for ClientTable {
    fn retain_recent(&self, drop_below: Nanos) {
        self.locked(|state| state.clients.retain(|_, full_at| *full_at > drop_below));
    }

    fn shrink_to_fit(&self) {
        self.locked(|state| state.clients.shrink_to_fit());
    }

    fn len(&self) -> usize {
        self.locked(|state| state.clients.len())
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use governor::{Quota, RateLimiter, clock::FakeRelativeClock, middleware::NoOpMiddleware};

    use super::*;

    #[test]
    fn a_full_table_admits_newcomers_by_one_shared_bucket_and_forgets_the_idle() {
        let quota = Quota::per_minute(NonZeroU32::new(2).expect("not 0"));
        let clock = FakeRelativeClock::default();
        let table = ClientTable::with_capacity(quota.replenish_interval(), 100);
        let limiter = RateLimiter::<_, _, _, NoOpMiddleware<_>>::new(quota, table, clock.clone());
        let client = |number: u32| ClientId::from_address(std::net::Ipv4Addr::from(number).into());

        let admitted = (0..1000).filter(|number| limiter.check_key(&client(*number)).is_ok()).count();
        assert_eq!((admitted, limiter.len()), (102, 100), "100 of their own, 2 of the shared bucket");
        assert!(limiter.check_key(&client(5)).is_ok() && limiter.check_key(&client(5)).is_err(), "known clients go on");

        clock.advance(Duration::from_secs(30));
        let admitted = (1000..2000).filter(|number| limiter.check_key(&client(*number)).is_ok()).count();
        assert_eq!(limiter.len(), 100, "all but client 5 had a full bucket and were forgotten");
        assert_eq!(admitted, 99 + 1, "the shared bucket has refilled by one");
        assert!(limiter.check_key(&client(5)).is_ok() && limiter.check_key(&client(5)).is_err());
    }
}
