//! More work than the machine can do: useful output must not fall, and those refused must know at once.

use std::{
    fmt,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{task::JoinSet, time::Instant as TokioInstant};

use super::{
    client::{Exchange, Outcome, completion, prompt, stream},
    figures::Sorted,
};
use crate::server::Server;

/// How much work arrives.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Requests at once that the server takes without a queue.
    pub capacity: usize,
    /// How long the peak is measured.
    pub peak_for: Duration,
    /// How long the overload lasts.
    pub overload_for: Duration,
    /// Arrivals per answer at the peak.
    pub factor: f64,
    /// Tokens of a prompt and of an answer.
    pub prompt_len: usize,
    /// Tokens generated.
    pub num_tokens: u64,
}

/// What clients saw.
#[derive(Clone, Debug)]
pub struct Report {
    /// Completed tokens per second at the peak.
    pub peak: f64,
    /// The same under overload.
    pub goodput: f64,
    /// Requests sent under overload.
    pub sent: usize,
    /// Of these, completed.
    pub done: usize,
    /// Seconds until those refused knew.
    pub refusals: Sorted,
    /// Refusals without `Retry-After`, or with another status than 503.
    pub odd_refusals: usize,
    /// Requests that ended neither way.
    pub lost: Vec<Outcome>,
    /// Seconds that `/health/live` took meanwhile.
    pub live: Sorted,
    /// How often it did not say 200.
    pub false_failures: usize,
}

/// Measures the peak and then the overload.
///
/// # Panics
/// When the server is gone.
pub async fn run(server: &std::sync::Arc<Server>, plan: Plan) -> Report {
    let (peak, peak_rate) = peak(server, plan).await;
    let start = Instant::now();
    let every = Duration::from_secs_f64(1.0 / (peak_rate * plan.factor));
    let mut tasks = JoinSet::new();
    let watch = tokio::spawn(watch_live(std::sync::Arc::clone(server), plan.overload_for));
    let mut next = TokioInstant::now();
    let mut sent = 0;
    while start.elapsed() < plan.overload_for {
        let server = std::sync::Arc::clone(server);
        let body = completion(&prompt(1_000_000 + sent as u64, plan.prompt_len), plan.num_tokens);
        tasks.spawn(async move { stream(&server, &body).await });
        sent += 1;
        next += every;
        tokio::time::sleep_until(next).await;
    }
    let exchanges = tasks.join_all().await;
    let end = start + plan.overload_for;
    let is_useful = |exchange: &&Exchange| exchange.is_done() && exchange.ended <= end;
    let tokens: u64 = exchanges.iter().filter(is_useful).map(|exchange| exchange.completion_tokens).sum();
    let (live, false_failures) = watch.await.expect("the watch does not panic");
    let is_refused = |exchange: &&Exchange| matches!(exchange.outcome, Outcome::Refused { .. });
    let is_proper = |outcome: &Outcome| *outcome == Outcome::Refused { status: 503, retry_after: true };
    let lost = |outcome: &Outcome| !matches!(outcome, Outcome::Done | Outcome::Refused { .. });
    Report {
        peak,
        goodput: tokens as f64 / plan.overload_for.as_secs_f64(),
        sent,
        done: exchanges.iter().filter(|exchange| exchange.is_done()).count(),
        refusals: exchanges.iter().filter(is_refused).map(Exchange::seconds).collect(),
        odd_refusals: exchanges.iter().filter(is_refused).filter(|exchange| !is_proper(&exchange.outcome)).count(),
        lost: exchanges.iter().map(|exchange| exchange.outcome.clone()).filter(lost).collect(),
        live,
        false_failures,
    }
}

/// Tokens and requests per second with as many clients as the server runs at once.
pub async fn peak(server: &Server, plan: Plan) -> (f64, f64) {
    let start = Instant::now();
    let clients = (0..plan.capacity as u64).map(|client| async move {
        let (mut tokens, mut requests) = (0, 0);
        while start.elapsed() < plan.peak_for {
            let index = (client << 32) + requests;
            let exchange = stream(server, &completion(&prompt(index, plan.prompt_len), plan.num_tokens)).await;
            assert!(exchange.is_done(), "{:?}", exchange.outcome);
            tokens += exchange.completion_tokens;
            requests += 1;
        }
        (tokens, requests)
    });
    let done = join_all(clients).await;
    let seconds = start.elapsed().as_secs_f64();
    let sum = |of: fn(&(u64, u64)) -> u64| done.iter().map(of).sum::<u64>() as f64 / seconds;
    (sum(|done| done.0), sum(|done| done.1))
}

async fn watch_live(server: std::sync::Arc<Server>, until: Duration) -> (Sorted, usize) {
    let start = Instant::now();
    let (mut seconds, mut failures) = (Vec::new(), 0);
    while start.elapsed() < until {
        let asked = Instant::now();
        let reply = server.client().get(server.url("/health/live")).send().await;
        seconds.push(asked.elapsed().as_secs_f64());
        failures += usize::from(!reply.is_ok_and(|reply| reply.status() == 200));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    (seconds.into_iter().collect(), failures)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = 100.0 * self.goodput / self.peak;
        writeln!(f, "peak {:.1} tokens/s, under overload {:.1} ({share:.0} %)", self.peak, self.goodput)?;
        let Self { sent, done, odd_refusals, .. } = self;
        writeln!(
            f,
            "{sent} sent, {done} done, {} refused ({odd_refusals} oddly), {} lost",
            self.refusals.len(),
            self.lost.len()
        )?;
        writeln!(f, "refused within {}", self.refusals)?;
        write!(f, "/health/live {} ({} failures)", self.live, self.false_failures)
    }
}
