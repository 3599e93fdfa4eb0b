//! Whose turn it is: one virtual counter of computed tokens for each client with work, so that many requests get nobody more
//! than one request does. Work-conserving: it only orders those who want something now. What was computed before (a cached
//! prefix, an answer from the response cache or one that is read along) takes nothing from anybody, and its client paid when
//! it was computed: both caches are by client. Guesses are the engine's own risk: only those that come true are paid. Pure.

use std::collections::HashMap;

use crate::config::ClientId;

/// What each client was given, in tokens.
#[derive(Debug, Default)]
pub struct ServiceCounters {
    accounts: HashMap<ClientId, Account>,
}

#[derive(Debug, Default)]
struct Account {
    tokens: u64,
    /// Its sequences in the engine.
    num_sequences: usize,
}

impl ServiceCounters {
    /// A sequence of `client` came. Who was away comes back a little behind the least served of those who are here, so that
    /// a short request goes through at once: more than that is not earned by time without work, and what was overdrawn is not
    /// forgiven.
    pub fn arrive(&mut self, client: ClientId) {
        let floor = self.floor().map(|floor| floor.saturating_sub(MOST_EARNED_AWAY));
        // Accounts without work that are no higher than a newcomer's say nothing.
        self.accounts
            .retain(|_, account| account.num_sequences > 0 || floor.is_some_and(|floor| account.tokens > floor));
        let account = self.accounts.entry(client).or_default();
        if account.num_sequences == 0 {
            account.tokens = account.tokens.max(floor.unwrap_or(0));
        }
        account.num_sequences += 1;
    }

    /// A sequence of `client` has gone.
    pub fn leave(&mut self, client: ClientId) {
        if let Some(account) = self.accounts.get_mut(&client) {
            account.num_sequences = account.num_sequences.saturating_sub(1);
        }
    }

    /// `client` was given `num_tokens` computed tokens.
    pub fn charge(&mut self, client: ClientId, num_tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&client) {
            account.tokens += num_tokens as u64;
        }
    }

    /// What `client` was given: the least has the first turn.
    pub fn served(&self, client: ClientId) -> u64 {
        self.accounts.get(&client).map_or(0, |account| account.tokens)
    }

    /// The least any client with work was given.
    fn floor(&self) -> Option<u64> {
        self.accounts.values().filter(|account| account.num_sequences > 0).map(|account| account.tokens).min()
    }
}

/// Tokens by which a newcomer may be behind all others: a few short prompts, and little beside what a minute computes.
const MOST_EARNED_AWAY: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u8) -> ClientId {
        ClientId::from_address([10, 0, 0, number].into())
    }

    #[test]
    fn being_away_earns_little_and_forgives_nothing() {
        let mut counters = ServiceCounters::default();
        counters.arrive(client(1));
        counters.charge(client(1), 2000);
        counters.arrive(client(2));
        let newcomer = 2000 - MOST_EARNED_AWAY;
        assert_eq!(counters.served(client(2)), newcomer, "a little behind who is here");
        counters.charge(client(2), 50);
        counters.leave(client(2));
        counters.charge(client(1), 10);
        counters.arrive(client(2));
        assert_eq!(counters.served(client(2)), newcomer + 50, "it comes back to what it left");
        counters.leave(client(2));
        counters.charge(client(1), 90);
        counters.arrive(client(2));
        assert_eq!(counters.served(client(2)), newcomer + 100, "it was away while others were served");
    }

    #[test]
    fn accounts_are_kept_only_while_they_matter() {
        let mut counters = ServiceCounters::default();
        for number in 0..200 {
            counters.arrive(client(number));
            counters.charge(client(number), 1);
            counters.leave(client(number));
        }
        assert!(counters.accounts.len() <= 1);
    }
}
