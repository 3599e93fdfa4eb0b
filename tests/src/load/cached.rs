//! A long prompt a second time: only its last token is computed, so the first token comes at once. And a whole answer a
//! second time, from the response cache.

use std::fmt;

use super::{
    client::{Exchange, completion, gaps, prompt, stream},
    figures::Sorted,
};
use crate::server::Server;

/// What the second time took.
#[derive(Clone, Debug)]
pub struct Report {
    /// Seconds to the first token when nothing was cached.
    pub cold_ttft: f64,
    /// Seconds to the first token when the prompt was.
    pub warm_ttft: Sorted,
    /// Tokens of the prompt that came from the cache, the least of all rounds.
    pub cached_tokens: u64,
    /// Seconds between tokens.
    pub itl: Sorted,
}

/// A prompt of `prompt_len` tokens, then the same `rounds` times. The server's response cache must be off.
///
/// # Panics
/// When a request does not end as it should.
pub async fn run(server: &Server, prompt_len: usize, rounds: usize) -> Report {
    let body = completion(&prompt(4711, prompt_len), 16);
    let first = stream(server, &body).await;
    let mut again = Vec::new();
    for _ in 0..rounds {
        again.push(stream(server, &body).await);
    }
    assert!(first.is_done() && again.iter().all(Exchange::is_done));
    Report {
        cold_ttft: first.ttft().unwrap_or(f64::NAN),
        warm_ttft: again.iter().filter_map(Exchange::ttft).collect(),
        cached_tokens: again.iter().map(|exchange| exchange.cached_tokens).min().unwrap_or(0),
        itl: gaps(&again),
    }
}

/// Seconds to the last byte of an answer that the response cache holds.
///
/// # Panics
/// When a request does not end as it should.
pub async fn repeated(server: &Server, rounds: usize) -> Sorted {
    let body = completion(&prompt(815, 40), 64);
    assert!(stream(server, &body).await.is_done());
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        seconds.push(stream(server, &body).await.seconds());
    }
    seconds.into_iter().collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bar = 1.5 * self.itl.quantile(0.5) * 1e3 + 5.0;
        write!(
            f,
            "TTFT cold {:.1} ms, warm {} ({} tokens cached); a decode step {:.1} ms, so the bar is {bar:.1} ms",
            self.cold_ttft * 1e3,
            self.warm_ttft,
            self.cached_tokens,
            self.itl.quantile(0.5) * 1e3
        )
    }
}
