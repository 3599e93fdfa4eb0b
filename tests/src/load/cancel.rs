//! Streams cancelled at random points: while they wait, in their prompt, while they generate, with two choices, and without
//! streaming. Nothing may stay behind.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    client::{prompt, unpooled},
    figures::mixed,
    process::Process,
};
use crate::server::Server;

/// How much is cancelled.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Requests in all.
    pub requests: u64,
    /// Requests at once; more than the server runs, so that some wait.
    pub concurrency: usize,
    /// Longest time before a request is cancelled.
    pub longest: Duration,
    /// Longest prompt, in tokens.
    pub prompt_len: usize,
}

/// What was left.
#[derive(Clone, Debug)]
pub struct Report {
    /// Sequences and blocks in use a second after the last request: both must be 0.
    pub running: f64,
    /// Blocks in use then.
    pub used_blocks: f64,
    /// Requests waiting then.
    pub waiting: f64,
    /// Connections open then, those of who asks included.
    pub connections: f64,
    /// Seconds until all of these were 0, `None` when they never were.
    pub settled: Option<f64>,
    /// Seconds within which 99 % of those who left had their blocks freed: the upper end of a bucket.
    pub freed_within: f64,
    /// Seconds that 99 % of the steps took at most, those that were given up aside: the upper end of a bucket.
    pub steps_within: f64,
    /// Requests that were really cancelled rather than answered before.
    pub cancelled: u64,
    /// Requests that were neither: refused, or broken off by the server.
    pub failed: Vec<String>,
    /// Descriptors and threads before, and after.
    pub before: (usize, u64),
    /// After.
    pub after: (usize, u64),
    /// Anonymous memory after a fifth of the requests and after the last one.
    pub memory: (u64, u64),
}

/// Sends and drops `plan.requests` requests.
///
/// # Panics
/// When the server is gone.
pub async fn run(server: &Server, plan: Plan) -> Report {
    let process = Process(server.pid());
    let client = unpooled();
    // Whatever the first requests build once is no leak.
    cancel_all(server, &client, plan, 0..plan.concurrency as u64).await;
    settle(server).await;
    let before = (process.num_descriptors(), process.num_threads());
    let fifth = plan.requests / 5;
    let mut ends = cancel_all(server, &client, plan, 0..fifth).await;
    settle(server).await;
    let early = process.anonymous_bytes();
    ends.extend(cancel_all(server, &client, plan, fifth..plan.requests).await);
    let settled = settle(server).await;
    let gauge = |name: &'static str| server.metric(name);
    Report {
        running: gauge("bitnet_requests_running{").await,
        used_blocks: gauge("bitnet_kv_cache_usage_ratio").await,
        waiting: gauge("bitnet_requests_waiting{").await,
        connections: gauge("bitnet_http_connections_open").await,
        settled,
        freed_within: quantile(server, "bitnet_cancel_duration_seconds", 0.99).await,
        steps_within: quantile(server, "bitnet_engine_step_duration_seconds", 0.99).await,
        cancelled: ends.iter().filter(|end| **end == End::Cancelled).count() as u64,
        failed: ends.into_iter().filter_map(|end| if let End::Failed(why) = end { Some(why) } else { None }).collect(),
        before,
        after: (process.num_descriptors(), process.num_threads()),
        memory: (early, process.anonymous_bytes()),
    }
}

async fn cancel_all(server: &Server, client: &reqwest::Client, plan: Plan, requests: std::ops::Range<u64>) -> Vec<End> {
    let places = Arc::new(Semaphore::new(plan.concurrency));
    let mut tasks = JoinSet::new();
    for index in requests {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore stays open");
        let request = client.post(server.url("/v1/completions")).json(&body(index, plan));
        let delay = Duration::from_micros(mixed(index ^ 0xca9ce1) % plan.longest.as_micros() as u64);
        tasks.spawn(async move {
            let end = tokio::time::timeout(delay, answer(request)).await.unwrap_or(End::Cancelled);
            drop(place);
            end
        });
    }
    tasks.join_all().await
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Cancelled,
    Answered,
    Failed(String),
}

async fn answer(request: reqwest::RequestBuilder) -> End {
    let response = match request.send().await {
        Ok(response) if response.status() == 200 => response,
        Ok(response) => return End::Failed(format!("{}", response.status())),
        Err(error) => return End::Failed(format!("{error:?}")),
    };
    match response.bytes().await {
        Ok(_) => End::Answered,
        Err(error) => End::Failed(format!("{error:?}")),
    }
}

/// Every kind in turn; the length of the prompt decides in which phase the end comes.
fn body(index: u64, plan: Plan) -> Value {
    let len = 1 + mixed(index) as usize % if index.is_multiple_of(3) { plan.prompt_len } else { 16 };
    json!({
        "prompt": prompt(index, len),
        "max_tokens": 200 + mixed(index ^ 7) % 800,
        "ignore_eos": true,
        "temperature": f64::from((index % 2) as u32),
        "stream": !index.is_multiple_of(4),
        "n": 1 + u64::from(index % 5 == 1),
    })
}

/// Seconds until nothing is in use any more.
async fn settle(server: &Server) -> Option<f64> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        let mut in_use = 0.0;
        for gauge in ["bitnet_requests_running{", "bitnet_requests_waiting{", "bitnet_kv_cache_usage_ratio"] {
            in_use += server.metric(gauge).await;
        }
        if in_use == 0.0 {
            return Some(start.elapsed().as_secs_f64());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    None
}

/// The upper end of the bucket that holds quantile `q` of the histogram `name`, over all its label values; NaN of nothing.
async fn quantile(server: &Server, name: &str, q: f64) -> f64 {
    let text = server.get("/metrics").await.body;
    let bucket = |line: &str| -> Option<(f64, f64)> {
        let (labels, count) = line.strip_prefix(name)?.strip_prefix("_bucket{")?.rsplit_once("} ")?;
        let end = labels.split_once("le=\"")?.1.split_once('"')?.0;
        Some((end.parse().ok()?, count.parse().ok()?))
    };
    let mut buckets: Vec<(f64, f64)> = text.lines().filter_map(bucket).collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let same_end = buckets.chunk_by(|a, b| a.0 == b.0);
    let ends: Vec<(f64, f64)> = same_end.map(|same| (same[0].0, same.iter().map(|bucket| bucket.1).sum())).collect();
    let all = ends.last().map_or(0.0, |(_, count)| *count);
    ends.iter().find(|(_, count)| *count > 0.0 && *count >= q * all).map_or(f64::NAN, |(end, _)| *end)
}

impl Report {
    /// Growth of memory from the first fifth of the requests to the last one.
    pub fn growth(&self) -> f64 {
        self.memory.1 as f64 / self.memory.0 as f64 - 1.0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settled = self.settled.map_or("never".into(), |seconds| format!("{seconds:.2} s"));
        writeln!(f, "{} cancelled, {} failed; all gauges 0 after {settled}", self.cancelled, self.failed.len())?;
        writeln!(
            f,
            "running {}, waiting {}, blocks used {}, connections {}",
            self.running, self.waiting, self.used_blocks, self.connections
        )?;
        let [freed, steps] = [self.freed_within, self.steps_within].map(|seconds| seconds * 1e3);
        writeln!(f, "99 % freed within {freed:.0} ms; 99 % of the steps within {steps:.0} ms")?;
        writeln!(f, "descriptors, threads: {:?} before, {:?} after", self.before, self.after)?;
        let (early, late) = self.memory;
        write!(f, "anonymous memory: {early} -> {late} bytes ({:+.2} %)", 100.0 * self.growth())
    }
}
