//! The figures of the server: one own Prometheus registry, `record_*`, `observe_*` and `set_*` for those who know, and
//! three ways out: Prometheus text, JSON, and a day of one-minute snapshots. All recording is atomic and never waits;
//! a scrape reads atomics and never asks the engine.
//!
//! Label values are constants, configured names or route templates: nothing a client writes becomes one.

mod families;
mod history;
mod labels;
mod text;

#[cfg(test)]
mod tests;

pub use labels::{
    CacheResult, CancelCause, FilterActionLabel, FilterDirection, FinishLabel, HealthResult, MemoryKind, RejectReason,
    SecurityEvent, StepPhase,
};

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::{IntCounterVec, Registry, core::Collector, proto::MetricFamily};
use serde_json::{Value, json};

use families::Families;
use history::{History, HistoryPoint};

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Version of the JSON of [`Metrics::snapshot`] and [`Metrics::history`].
const SCHEMA_VERSION: u32 = 1;

/// The fixed limits that gauges are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsLimits {
    /// Sequences computed at the same time.
    pub max_num_seqs: usize,
    /// Requests that may wait.
    pub max_queue: usize,
}

/// What `bitnet_model_info` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelInfo {
    /// Architecture, as the file names it.
    pub architecture: String,
    /// `gguf`, `huggingface` or `built-in`.
    pub format: String,
    /// Weight type, such as `I2_S`.
    pub quantization: String,
    /// Hash of the file, or empty when it was not computed.
    pub sha256: String,
}

/// Every metric. Shared as `Arc<Metrics>`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    families: Families,
    history: History,
    /// Response cache evictions already counted, so that concurrent reports of a total add up once.
    evictions_counted: AtomicU64,
}

impl Metrics {
    /// Metrics of a server of `model` (its served id).
    pub fn new(model: &str, limits: MetricsLimits) -> Self {
        let registry = Registry::new();
        let families = Families::register(&registry, model);
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("the process metrics are registered once");
        families.running_limit.set(to_i64(limits.max_num_seqs));
        families.waiting_limit.set(to_i64(limits.max_queue));
        Self { registry, families, history: History::default(), evictions_counted: AtomicU64::new(0) }
    }

    /// One HTTP response, whole stream included. `route` is the matched template, or `other`.
    pub fn record_http(&self, route: &str, method: &str, code: u16, seconds: f64) {
        let method = match method {
            "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS" => method,
            _ => "other",
        };
        self.families.http_requests.with_label_values(&[route, method, code.to_string().as_str()]).inc();
        self.families.http_request_duration.with_label_values(&[route]).observe(seconds);
    }

    /// A connection was accepted.
    pub fn http_connection_opened(&self) {
        self.families.http_connections.inc();
    }

    /// A connection has ended.
    pub fn http_connection_closed(&self) {
        self.families.http_connections.dec();
    }

    /// A request was turned away.
    pub fn record_rejected(&self, reason: RejectReason) {
        self.families.rejected.with_label_values(&[reason.as_str()]).inc();
    }

    /// A request that reached the engine ended.
    pub fn record_finished(&self, finish: FinishLabel) {
        self.families.finished.with_label_values(&[finish.as_str()]).inc();
    }

    /// Generation was stopped from outside.
    pub fn record_cancelled(&self, cause: CancelCause) {
        self.families.cancellations.with_label_values(&[cause.as_str()]).inc();
    }

    /// The blocks of a sequence are free, so long after its reader went.
    pub fn observe_cancel(&self, seconds: f64) {
        self.families.cancel_duration.observe(seconds);
    }

    /// Arrival to the first bytes handed to the socket.
    pub fn observe_ttft(&self, seconds: f64) {
        self.families.time_to_first_token.observe(seconds);
    }

    /// The gap between two tokens.
    pub fn observe_inter_token(&self, seconds: f64) {
        self.families.inter_token_latency.observe(seconds);
    }

    /// Arrival to the last byte.
    pub fn observe_e2e(&self, seconds: f64) {
        self.families.e2e_duration.observe(seconds);
    }

    /// Tokens of a finished request.
    pub fn record_usage(&self, prompt: usize, cached: usize, generated: usize) {
        self.families.prompt_tokens.inc_by(prompt as u64);
        self.families.prompt_tokens_cached.inc_by(cached as u64);
        self.families.generation_tokens.inc_by(generated as u64);
        self.families.request_prompt_tokens.observe(prompt as f64);
        self.families.request_generation_tokens.observe(generated as f64);
    }

    /// Arrival to the first engine step.
    pub fn observe_queue(&self, seconds: f64) {
        self.families.queue_duration.observe(seconds);
    }

    /// First engine step to the last prompt token.
    pub fn observe_prefill(&self, seconds: f64) {
        self.families.prefill_duration.observe(seconds);
    }

    /// Last prompt token to the end.
    pub fn observe_decode(&self, seconds: f64) {
        self.families.decode_duration.observe(seconds);
    }

    /// One engine step of so many sequences has ended.
    pub fn record_step(&self, phase: StepPhase, seconds: f64, sequences: usize) {
        self.families.step_duration.with_label_values(&[phase.as_str()]).observe(seconds);
        self.families.step_sequences.with_label_values(&[phase.as_str()]).observe(sequences as f64);
        self.families.busy_seconds.inc_by(seconds.max(0.0));
        self.families.last_step.set(unix_seconds());
    }

    /// Sequences being computed.
    pub fn set_running(&self, sequences: usize) {
        self.families.running.set(to_i64(sequences));
    }

    /// Requests waiting.
    pub fn set_waiting(&self, requests: usize) {
        self.families.waiting.set(to_i64(requests));
    }

    /// Prompt tokens of waiting requests.
    pub fn set_queued_prompt_tokens(&self, tokens: usize) {
        self.families.queued_prompt_tokens.set(to_i64(tokens));
    }

    /// Blocks of the KV cache: together its capacity; used are those of live sequences.
    pub fn set_kv_blocks(&self, free: usize, used: usize, cached: usize) {
        for (state, blocks) in [("free", free), ("used", used), ("cached", cached)] {
            self.families.kv_blocks.with_label_values(&[state]).set(to_i64(blocks));
        }
        let capacity = free + used + cached;
        self.families.kv_usage.set(if capacity == 0 { 0.0 } else { used as f64 / capacity as f64 });
    }

    /// A prompt was looked for in the prefix cache.
    pub fn record_prefix_cache(&self, queried_tokens: usize, hit_tokens: usize) {
        self.families.prefix_cache_queried.inc_by(queried_tokens as u64);
        self.families.prefix_cache_hit.inc_by(hit_tokens as u64);
    }

    /// A step computed so many tokens ahead for a sequence that were sure to come, and verified so many guesses, of which so many
    /// came true.
    pub fn record_speculation(&self, forced: usize, drafted: usize, accepted: usize) {
        self.families.speculation_forced.inc_by(forced as u64);
        self.families.speculation_drafted.inc_by(drafted as u64);
        self.families.speculation_accepted.inc_by(accepted as u64);
    }

    /// Preemptions since the start; only the engine says this.
    pub fn set_preemptions(&self, total: u64) {
        self.families.preemptions.inc_by(total.saturating_sub(self.families.preemptions.get()));
    }

    /// Geometry of the KV cache.
    pub fn set_kv_cache_config(&self, block_tokens: usize, num_blocks: usize, dtype: &str) {
        let labels = [block_tokens.to_string(), num_blocks.to_string(), dtype.to_owned()];
        self.families.kv_config.reset();
        self.families.kv_config.with_label_values(&labels).set(1);
    }

    /// A line of the security log.
    pub fn record_security(&self, event: SecurityEvent) {
        self.families.security_events.with_label_values(&[event.as_str()]).inc();
    }

    /// A filter rule matched. `rule_id` is a configured id.
    pub fn record_filter_match(&self, direction: FilterDirection, rule_id: &str, action: FilterActionLabel) {
        self.families.filter_matches.with_label_values(&[direction.as_str(), rule_id, action.as_str()]).inc();
    }

    /// Time the content filter took for one text.
    pub fn observe_filter(&self, direction: FilterDirection, seconds: f64) {
        self.families.filter_duration.with_label_values(&[direction.as_str()]).observe(seconds);
    }

    /// A look into the response cache.
    pub fn record_response_cache(&self, result: CacheResult) {
        self.families.response_cache_lookups.with_label_values(&[result.as_str()]).inc();
    }

    /// Size of the response cache, and its evictions since the start.
    pub fn set_response_cache(&self, bytes: usize, evictions: u64) {
        self.families.response_cache_bytes.set(to_i64(bytes));
        self.set_memory(MemoryKind::ResponseCache, bytes as u64);
        let counted = self.evictions_counted.fetch_max(evictions, Ordering::Relaxed);
        self.families.response_cache_evictions.inc_by(evictions.saturating_sub(counted));
    }

    /// Whether requests are taken.
    pub fn set_ready(&self, ready: bool) {
        self.families.ready.set(i64::from(ready));
    }

    /// Memory in use.
    pub fn set_memory(&self, kind: MemoryKind, bytes: u64) {
        self.families.memory.with_label_values(&[kind.as_str()]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Memory that may be used.
    pub fn set_memory_limit(&self, bytes: u64) {
        self.families.memory_limit.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// What is served.
    pub fn set_model_info(&self, info: &ModelInfo) {
        self.families.model_info.reset();
        self.families
            .model_info
            .with_label_values(&[&info.architecture, &info.format, &info.quantization, &info.sha256])
            .set(1);
    }

    /// Which kernel serves it; version and revision are those of this build.
    pub fn set_build_info(&self, kernel: &str) {
        let revision = option_env!("BITNET_REVISION").unwrap_or("unknown");
        self.families.build_info.reset();
        self.families.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), revision, kernel]).set(1);
    }

    /// The kernels of this CPU, and whether each passed its self-test.
    pub fn set_kernels(&self, kernels: &[(&'static str, bool)]) {
        for (kernel, passed) in kernels {
            self.families.kernel_self_test_failed.with_label_values(&[kernel]).set(i64::from(!passed));
        }
    }

    /// How long the model took to load.
    pub fn set_model_load_seconds(&self, seconds: f64) {
        self.families.model_load.set(seconds);
    }

    /// A real generation for a health check.
    pub fn record_health_check(&self, result: HealthResult, seconds: f64) {
        self.families.health_checks.with_label_values(&[result.as_str()]).inc();
        self.families.health_check_duration.observe(seconds);
    }

    /// Clients in the rate limiter's table.
    pub fn set_tracked_clients(&self, clients: usize) {
        self.families.tracked_clients.set(to_i64(clients));
    }

    /// Everything as Prometheus text 0.0.4, to be sent as [`CONTENT_TYPE`].
    pub fn render(&self) -> String {
        text::write_text(&self.gather())
    }

    /// Everything as JSON, for `/stats`: the same registry, so the same figures.
    pub fn snapshot(&self) -> Value {
        json!({
            "schema_version": SCHEMA_VERSION,
            "unix_seconds": unix_seconds(),
            "metrics": text::to_json(&self.gather()),
        })
    }

    /// Takes the minute's snapshot; to be called once a minute with the Unix time.
    pub fn record_minute(&self, unix_seconds: u64) {
        self.read_process_memory();
        let families = &self.families;
        self.history.push(HistoryPoint {
            unix_seconds,
            requests_running: families.running.get(),
            requests_waiting: families.waiting.get(),
            requests_finished_total: total(&families.finished),
            requests_rejected_total: total(&families.rejected),
            prompt_tokens_total: families.prompt_tokens.get(),
            generation_tokens_total: families.generation_tokens.get(),
            engine_busy_seconds_total: families.busy_seconds.get(),
            time_to_first_token_seconds_sum: families.time_to_first_token.get_sample_sum(),
            time_to_first_token_seconds_count: families.time_to_first_token.get_sample_count(),
            kv_cache_usage_ratio: families.kv_usage.get(),
            process_anonymous_memory_bytes: families.anonymous_memory.get(),
        });
    }

    /// The snapshots taken after `since_unix_seconds`, oldest first, for `/stats/history`.
    pub fn history(&self, since_unix_seconds: u64) -> Value {
        json!({
            "schema_version": SCHEMA_VERSION,
            "interval_seconds": 60,
            "points": self.history.since(since_unix_seconds),
        })
    }

    fn gather(&self) -> Vec<MetricFamily> {
        self.read_process_memory();
        self.registry.gather()
    }

    /// Resident memory alone hides a leak that was swapped out; where the kernel does not tell, the gauges stay 0.
    fn read_process_memory(&self) {
        let Ok(status) = fs::read_to_string("/proc/self/status") else { return };
        self.families.anonymous_memory.set(status_bytes(&status, "RssAnon:"));
        self.families.swapped_memory.set(status_bytes(&status, "VmSwap:"));
    }
}

/// A field of `/proc/self/status` in bytes.
fn status_bytes(status: &str, field: &str) -> i64 {
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    let kib: Option<i64> = value.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// The sum of all series of a counter.
fn total(family: &IntCounterVec) -> u64 {
    let families = family.collect();
    families.iter().flat_map(|family| family.get_metric()).map(|metric| metric.get_counter().get_value() as u64).sum()
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
