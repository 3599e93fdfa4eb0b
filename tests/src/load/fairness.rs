//! A client with twenty times the requests of another gets no more than it, and does not slow it down.

use std::{
    fmt,
    time::{Duration, Instant},
};

use futures_util::future::{join, join_all};

use super::{
    client::{Exchange, completion, prompt, stream_as},
    figures::Sorted,
};
use crate::server::Server;

/// The clients' requests.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The keys of the heavy and of the light client.
    pub keys: [&'static str; 2],
    /// Requests that the light client has under way; the heavy one has twenty times as many.
    pub light: usize,
    /// How long.
    pub lasts: Duration,
    /// Tokens of a prompt.
    pub prompt_len: usize,
    /// Tokens generated.
    pub num_tokens: u64,
}

/// What they got.
#[derive(Clone, Debug)]
pub struct Report {
    /// Tokens computed for the heavy and the light client, prompts included.
    pub served: [u64; 2],
    /// Seconds to the light client's first token with nobody else there.
    pub alone: Sorted,
    /// And beside the heavy client.
    pub beside: Sorted,
    /// Seconds between tokens beside the heavy client.
    pub itl: Sorted,
}

/// First the light client alone, then both.
///
/// # Panics
/// When a request does not end as it should.
pub async fn run(server: &Server, plan: Plan) -> Report {
    let alone = client(server, plan, 1, plan.light, plan.lasts / 4).await;
    let heavy = client(server, plan, 0, 20 * plan.light, plan.lasts);
    let (heavy, light) = join(heavy, client(server, plan, 1, plan.light, plan.lasts)).await;
    // The first requests come before the heavy client is there with all its own.
    let settled = |exchanges: &[Exchange]| exchanges.iter().skip(plan.light).filter_map(Exchange::ttft).collect();
    Report {
        served: [heavy.1, light.1],
        alone: settled(&alone.0),
        beside: settled(&light.0),
        itl: light.0.iter().flat_map(Exchange::gaps).collect(),
    }
}

/// `count` requests under way at any time; the exchanges in the order of their ends, and the tokens computed within the time.
async fn client(server: &Server, plan: Plan, which: usize, count: usize, lasts: Duration) -> (Vec<Exchange>, u64) {
    let start = Instant::now();
    let one = |place: usize| async move {
        let mut exchanges = Vec::new();
        while start.elapsed() < lasts {
            let index = ((which * 1000 + place) << 24) + exchanges.len();
            let unique = start.elapsed().as_nanos() as u64 ^ index as u64;
            let body = completion(&prompt(unique, plan.prompt_len), plan.num_tokens);
            let exchange = stream_as(server, plan.keys[which], &body).await;
            assert!(exchange.is_done(), "{:?}", exchange.outcome);
            exchanges.push(exchange);
        }
        exchanges
    };
    let mut exchanges: Vec<Exchange> = join_all((0..count).map(one)).await.into_iter().flatten().collect();
    exchanges.sort_unstable_by_key(|exchange| exchange.ended);
    let end = start + lasts;
    let within = |exchange: &Exchange| exchange.tokens.iter().filter(|at| **at <= end).count() as u64;
    let prompts = exchanges.iter().filter(|exchange| exchange.tokens.first().is_some_and(|first| *first <= end));
    let served = prompts.count() as u64 * plan.prompt_len as u64 + exchanges.iter().map(within).sum::<u64>();
    (exchanges, served)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [heavy, light] = self.served;
        let share = 100.0 * light as f64 / (heavy + light) as f64;
        writeln!(f, "tokens computed: heavy {heavy}, light {light} ({share:.1} %)")?;
        let bar = 1.5 * self.alone.quantile(0.95) + self.itl.quantile(0.5);
        write!(
            f,
            "the light client's TTFT alone {}; beside {}; 1.5 times its p95 alone and a step are {:.1} ms",
            self.alone,
            self.beside,
            bar * 1e3
        )
    }
}
