//! A long prompt beside running streams: their tokens keep coming.

use std::{fmt, time::Duration};

use futures_util::future::{join, join_all};

use super::{
    client::{Exchange, completion, prompt, stream},
    figures::Sorted,
};
use crate::server::Server;

/// What the running streams saw.
#[derive(Clone, Debug)]
pub struct Report {
    /// Seconds between their tokens before the long prompt came.
    pub usual: Sorted,
    /// Between it came and its first token.
    pub beside: Sorted,
    /// Seconds until the long prompt had its first token.
    pub ttft: f64,
}

/// `num_streams` streams of `num_tokens` each; after a second a prompt of `prompt_len` tokens joins them.
///
/// # Panics
/// When a request does not end as it should.
pub async fn run(server: &Server, num_streams: u64, num_tokens: u64, prompt_len: usize) -> Report {
    let bodies: Vec<_> = (0..num_streams).map(|i| completion(&prompt(500 + i, 20), num_tokens)).collect();
    let running = join_all(bodies.iter().map(|body| stream(server, body)));
    let long = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        stream(server, &completion(&prompt(77_777, prompt_len), 4)).await
    };
    let (running, long) = join(running, long).await;
    assert!(long.is_done() && running.iter().all(Exchange::is_done), "{:?}", long.outcome);
    let first = long.tokens.first().copied().unwrap_or(long.ended);
    let pairs = || running.iter().flat_map(|exchange| exchange.tokens.windows(2));
    let gap = |pair: &[std::time::Instant]| (pair[1] - pair[0]).as_secs_f64();
    Report {
        usual: pairs().filter(|pair| pair[1] < long.sent).map(gap).collect(),
        beside: pairs().filter(|pair| pair[1] >= long.sent && pair[0] <= first).map(gap).collect(),
        ttft: long.ttft().unwrap_or(f64::NAN),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = self.beside.max() / self.usual.quantile(0.5);
        write!(
            f,
            "between tokens usually {}; beside the prompt {} ({times:.1} times the usual); its TTFT {:.2} s",
            self.usual, self.beside, self.ttft
        )
    }
}
