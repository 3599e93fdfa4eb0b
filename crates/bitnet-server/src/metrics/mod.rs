//! The figures of the server: one own Prometheus registry, `record_*`, `observe_*` and `set_*` for those who know, and
//! three ways out: Prometheus text, JSON, and a day of one-minute snapshots. All recording is atomic and never waits;
//! a scrape reads atomics and never asks the engine.

mod labels;

pub use labels::{
    CacheResult, CancelCause, FilterActionLabel, FilterDirection, FinishLabel, HealthResult, MemoryKind, RejectReason,
    SecurityEvent, StepPhase,
};

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

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
pub struct Metrics {}

macro_rules! stub { ($($(#[$m:meta])* fn $name:ident(&self $(, $arg:ident : $ty:ty)*) $(-> $ret:ty)?;)*) => {
    impl Metrics { $($(#[$m])* pub fn $name(&self $(, $arg: $ty)*) $(-> $ret)? { $(let _ = $arg;)* unimplemented!() })* }
} }

impl Metrics {
    /// Metrics of a server of `model` (its served id).
    pub fn new(model: &str, limits: MetricsLimits) -> Self {
        let _ = (model, limits);
        unimplemented!()
    }
}
stub! {
    /// One HTTP response, whole stream included. `route` is the matched template, or `other`.
    fn record_http(&self, route: &str, method: &str, code: u16, seconds: f64);
    /// A connection was accepted.
    fn http_connection_opened(&self);
    /// A connection has ended.
    fn http_connection_closed(&self);
    /// A request was turned away.
    fn record_rejected(&self, reason: RejectReason);
    /// A request that reached the engine ended.
    fn record_finished(&self, finish: FinishLabel);
    /// Generation was stopped from outside.
    fn record_cancelled(&self, cause: CancelCause);
    /// Arrival to the first bytes handed to the socket.
    fn observe_ttft(&self, seconds: f64);
    /// The gap between two tokens.
    fn observe_inter_token(&self, seconds: f64);
    /// Arrival to the last byte.
    fn observe_e2e(&self, seconds: f64);
    /// Tokens of a finished request.
    fn record_usage(&self, prompt: usize, cached: usize, generated: usize);
    /// Arrival to the first step.
    fn observe_queue(&self, seconds: f64);
    /// First step to the last prompt token.
    fn observe_prefill(&self, seconds: f64);
    /// Last prompt token to the end.
    fn observe_decode(&self, seconds: f64);
    /// One engine step.
    fn record_step(&self, phase: StepPhase, seconds: f64, sequences: usize);
    /// Sequences being computed.
    fn set_running(&self, sequences: usize);
    /// Requests waiting.
    fn set_waiting(&self, requests: usize);
    /// Blocks of the KV cache.
    fn set_kv_blocks(&self, free: usize, used: usize, cached: usize);
    /// Geometry of the KV cache.
    fn set_kv_cache_config(&self, block_tokens: usize, num_blocks: usize, dtype: &str);
    /// Prompt tokens waiting.
    fn set_queued_prompt_tokens(&self, tokens: usize);
    /// A line of the security log.
    fn record_security(&self, event: SecurityEvent);
    /// A filter rule matched.
    fn record_filter_match(&self, direction: FilterDirection, rule_id: &str, action: FilterActionLabel);
    /// Time the content filter took for one text.
    fn observe_filter(&self, direction: FilterDirection, seconds: f64);
    /// A look into the response cache.
    fn record_response_cache(&self, result: CacheResult);
    /// Size and total evictions of the response cache.
    fn set_response_cache(&self, bytes: usize, evictions: u64);
    /// Whether requests are taken.
    fn set_ready(&self, ready: bool);
    /// Memory in use.
    fn set_memory(&self, kind: MemoryKind, bytes: u64);
    /// Memory that may be used.
    fn set_memory_limit(&self, bytes: u64);
    /// What is served.
    fn set_model_info(&self, info: &ModelInfo);
    /// Which kernel serves it.
    fn set_build_info(&self, kernel: &str);
    /// How long the model took to load.
    fn set_model_load_seconds(&self, seconds: f64);
    /// A real generation for `/health/generate`.
    fn record_health_check(&self, result: HealthResult, seconds: f64);
    /// Clients in the rate limiter's table.
    fn set_tracked_clients(&self, clients: usize);
    /// Everything as Prometheus text 0.0.4.
    fn render(&self) -> String;
    /// Everything as JSON, for `/stats`.
    fn snapshot(&self) -> serde_json::Value;
    /// Takes the minute's snapshot; call it once a minute.
    fn record_minute(&self, unix_seconds: u64);
    /// The snapshots taken after `since`, oldest first, for `/stats/history`.
    fn history(&self, since_unix_seconds: u64) -> serde_json::Value;
}
