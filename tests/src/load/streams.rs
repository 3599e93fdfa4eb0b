//! So many streams at once: throughput, time to the first token and between tokens, with cold and with warm prefixes.

use std::{fmt, time::Instant};

use futures_util::future::join_all;

use super::{
    client::{Exchange, completion, gaps, prompt, stream, ttfts},
    figures::Sorted,
};
use crate::server::Server;

/// The requests of one row.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Streams at once.
    pub concurrency: usize,
    /// How often.
    pub rounds: u64,
    /// Tokens of a prompt.
    pub prompt_len: usize,
    /// Tokens generated.
    pub num_tokens: u64,
    /// Whether every prompt was computed before.
    pub warm: bool,
}

/// One row.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was asked.
    pub plan: Plan,
    /// Tokens per second in all, prompts included in the time: the median of the rounds.
    pub tokens_per_s: f64,
    /// Tokens per second of one stream after its first token, the median.
    pub stream_tokens_per_s: f64,
    /// Seconds to the first token.
    pub ttft: Sorted,
    /// Seconds between tokens.
    pub itl: Sorted,
    /// Every exchange, to look closer.
    pub exchanges: Vec<Exchange>,
}

/// Runs all rounds one after the other.
///
/// # Panics
/// When a request does not end as it should.
pub async fn run(server: &Server, plan: Plan) -> Report {
    let body = |round: u64, index: u64| {
        let index = if plan.warm { index } else { (round + 1) * 1000 + index };
        completion(&prompt(index, plan.prompt_len), plan.num_tokens)
    };
    let mut exchanges = Vec::new();
    let mut speeds = Vec::new();
    // The first round warms caches and counts only there.
    for round in 0..=plan.rounds {
        let start = Instant::now();
        let bodies: Vec<_> = (0..plan.concurrency as u64).map(|index| body(round, index)).collect();
        let answers = join_all(bodies.iter().map(|body| stream(server, body))).await;
        let seconds = start.elapsed().as_secs_f64();
        for answer in &answers {
            assert!(answer.is_done(), "{:?}", answer.outcome);
        }
        if round > 0 {
            speeds.push(answers.iter().map(|answer| answer.completion_tokens).sum::<u64>() as f64 / seconds);
            exchanges.extend(answers);
        }
    }
    Report {
        plan,
        tokens_per_s: speeds.into_iter().collect::<Sorted>().quantile(0.5),
        stream_tokens_per_s: exchanges.iter().filter_map(Exchange::tokens_per_s).collect::<Sorted>().quantile(0.5),
        ttft: ttfts(&exchanges),
        itl: gaps(&exchanges),
        exchanges,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { concurrency, warm, .. } = self.plan;
        let prefix = if warm { "warm" } else { "cold" };
        write!(
            f,
            "{concurrency:3} streams, {prefix}: {:6.1} tokens/s, each {:5.1}; TTFT {}; ITL {}",
            self.tokens_per_s, self.stream_tokens_per_s, self.ttft, self.itl
        )
    }
}
