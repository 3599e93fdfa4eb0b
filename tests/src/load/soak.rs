//! Four fifths of the peak for a long time, of every kind of request: nothing fails, nothing hangs, nothing grows.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant as TokioInstant};

use super::{
    client::{Exchange, Outcome, completion, prompt, stream, ttfts},
    figures::{Sorted, mixed},
    overload,
    process::Process,
};
use crate::server::Server;

/// Share of the peak's requests that arrive.
const LOAD: f64 = 0.8;

/// What was seen.
#[derive(Clone, Debug)]
pub struct Report {
    /// Requests sent, and those that ended otherwise than with `[DONE]`.
    pub sent: usize,
    /// Of these, the ones that ended otherwise than with `[DONE]`.
    pub failed: Vec<Outcome>,
    /// Anonymous memory in the second half: least squares, bytes an hour.
    pub bytes_per_hour: f64,
    /// The smallest and the largest of the second half.
    pub memory: (u64, u64),
    /// Descriptors while idle, before and after.
    pub descriptors: (usize, usize),
    /// Seconds to the first token in the first and in the second half.
    pub ttft: [Sorted; 2],
}

/// Sends requests for `lasts` at `LOAD` of the peak that `plan` measures.
///
/// # Panics
/// When the server is gone.
pub async fn run(server: &Arc<Server>, plan: overload::Plan, lasts: Duration) -> Report {
    let process = Process(server.pid());
    let (_, rate) = overload::peak(server, plan).await;
    let before = idle_descriptors(server, process).await;
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    let (mut next, mut sent, mut samples) = (TokioInstant::now(), 0_u64, Vec::new());
    while start.elapsed() < lasts {
        let (server, body) = (Arc::clone(server), body(sent, plan));
        tasks.spawn(async move { stream(&server, &body).await });
        sent += 1;
        if start.elapsed() > lasts / 2 {
            samples.push((start.elapsed().as_secs_f64(), process.anonymous_bytes()));
        }
        next += Duration::from_secs_f64(1.0 / (rate * LOAD));
        tokio::time::sleep_until(next).await;
    }
    let exchanges = tasks.join_all().await;
    let middle = start + lasts / 2;
    let (early, late): (Vec<Exchange>, Vec<Exchange>) =
        exchanges.iter().cloned().partition(|exchange| exchange.sent < middle);
    let memory = samples.iter().map(|sample| sample.1);
    Report {
        sent: exchanges.len(),
        failed: exchanges.into_iter().map(|exchange| exchange.outcome).filter(|end| *end != Outcome::Done).collect(),
        bytes_per_hour: 3600.0 * slope(&samples),
        memory: (memory.clone().min().unwrap_or(0), memory.max().unwrap_or(0)),
        descriptors: (before, idle_descriptors(server, process).await),
        ttft: [ttfts(&early), ttfts(&late)],
    }
}

/// Mixed lengths, samplers and prefixes, on average half of what the peak was measured with.
fn body(index: u64, plan: overload::Plan) -> Value {
    let len = 1 + mixed(index) as usize % plan.prompt_len;
    // A third of the prompts come again.
    let which = if index.is_multiple_of(3) { index % 30 } else { 100 + index };
    let mut body = completion(&prompt(which, len), 1 + mixed(index ^ 1) % plan.num_tokens);
    for (of, name, value) in [(2, "temperature", json!(0.8)), (5, "top_p", json!(0.9)), (7, "logprobs", json!(2))] {
        if index.is_multiple_of(of) {
            body[name] = value;
        }
    }
    body
}

/// Descriptors once every connection has come to rest.
async fn idle_descriptors(server: &Server, process: Process) -> usize {
    for _ in 0..100 {
        if server.metric("bitnet_requests_running{").await == 0.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Connections that the client keeps for later are no leak.
    let kept = server.metric("bitnet_http_connections_open").await as usize;
    process.num_descriptors() - kept
}

fn slope(samples: &[(f64, u64)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: fn(&(f64, u64)) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, bytes) = (mean(|sample| sample.0), mean(|sample| sample.1 as f64));
    let covariance: f64 = samples.iter().map(|sample| (sample.0 - time) * (sample.1 as f64 - bytes)).sum();
    covariance / samples.iter().map(|sample| (sample.0 - time).powi(2)).sum::<f64>()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} sent, {} failed", self.sent, self.failed.len())?;
        let (least, most) = self.memory;
        let growth = self.bytes_per_hour / f64::from(1 << 20);
        writeln!(f, "anonymous memory {least} to {most} bytes in the second half, {growth:+.2} MiB/h")?;
        writeln!(f, "descriptors {} before, {} after", self.descriptors.0, self.descriptors.1)?;
        write!(f, "TTFT {} in the first half, {} in the second", self.ttft[0], self.ttft[1])
    }
}
