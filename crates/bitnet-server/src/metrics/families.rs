//! Every metric family: its name, labels, buckets and help, registered once. The only place where names are written.

use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, core::Collector,
};

use super::labels::{
    CacheResult, CancelCause, FilterDirection, FinishLabel, HealthResult, MemoryKind, RejectReason, SecurityEvent,
    StepPhase,
};

/// Arrival to something a user sees.
const FIRST_TOKEN_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0];
/// Single steps, and what lasts as long as one: gaps between tokens, the end of a sequence whose reader has left.
const STEP_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0,
    2.5, 5.0, 10.0,
];
/// Whole requests.
const REQUEST_BUCKETS: &[f64] =
    &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0];
/// Tokens of a prompt or an answer.
const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
/// Sequences of one step.
const SEQUENCE_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
/// The content filter on one text.
const FILTER_BUCKETS: &[f64] = &[0.000_01, 0.000_1, 0.001, 0.01, 0.1];

/// One field for each family.
#[derive(Debug)]
pub(super) struct Families {
    pub(super) http_requests: IntCounterVec,
    pub(super) http_request_duration: HistogramVec,
    pub(super) http_connections: IntGauge,
    pub(super) finished: IntCounterVec,
    pub(super) rejected: IntCounterVec,
    pub(super) running: IntGauge,
    pub(super) waiting: IntGauge,
    pub(super) running_limit: IntGauge,
    pub(super) waiting_limit: IntGauge,
    pub(super) queued_prompt_tokens: IntGauge,
    pub(super) queue_duration: Histogram,
    pub(super) time_to_first_token: Histogram,
    pub(super) inter_token_latency: Histogram,
    pub(super) prefill_duration: Histogram,
    pub(super) decode_duration: Histogram,
    pub(super) e2e_duration: Histogram,
    pub(super) prompt_tokens: IntCounter,
    pub(super) prompt_tokens_cached: IntCounter,
    pub(super) generation_tokens: IntCounter,
    pub(super) request_prompt_tokens: Histogram,
    pub(super) request_generation_tokens: Histogram,
    pub(super) step_duration: HistogramVec,
    pub(super) step_sequences: HistogramVec,
    pub(super) busy_seconds: Counter,
    pub(super) last_step: Gauge,
    pub(super) preemptions: IntCounter,
    pub(super) kv_blocks: IntGaugeVec,
    pub(super) kv_usage: Gauge,
    pub(super) kv_config: IntGaugeVec,
    pub(super) prefix_cache_queried: IntCounter,
    pub(super) prefix_cache_hit: IntCounter,
    pub(super) speculation_forced: IntCounter,
    pub(super) speculation_drafted: IntCounter,
    pub(super) speculation_accepted: IntCounter,
    pub(super) response_cache_lookups: IntCounterVec,
    pub(super) response_cache_bytes: IntGauge,
    pub(super) response_cache_evictions: IntCounter,
    pub(super) cancellations: IntCounterVec,
    pub(super) cancel_duration: Histogram,
    pub(super) security_events: IntCounterVec,
    pub(super) filter_matches: IntCounterVec,
    pub(super) filter_duration: HistogramVec,
    pub(super) tracked_clients: IntGauge,
    pub(super) memory: IntGaugeVec,
    pub(super) memory_limit: IntGauge,
    pub(super) model_info: IntGaugeVec,
    pub(super) build_info: IntGaugeVec,
    pub(super) kernel_self_test_failed: IntGaugeVec,
    pub(super) model_load: Gauge,
    pub(super) ready: IntGauge,
    pub(super) health_checks: IntCounterVec,
    pub(super) health_check_duration: Histogram,
    pub(super) anonymous_memory: IntGauge,
    pub(super) swapped_memory: IntGauge,
}

impl Families {
    /// Registers every family in `registry`; those about the model carry its name.
    pub(super) fn register(registry: &Registry, model: &str) -> Self {
        let server = Scope { registry, model: None };
        let model = Scope { registry, model: Some(model) };
        let families = Self {
            http_requests: server.counters(
                "http_requests_total",
                "HTTP responses by route template, method and status code.",
                &["route", "method", "code"],
            ),
            http_request_duration: server.histograms(
                "http_request_duration_seconds",
                "Time from a request's first byte to its response's last.",
                REQUEST_BUCKETS,
                &["route"],
            ),
            http_connections: server.gauge("http_connections_open", "Open client connections."),
            finished: model.counters("requests_finished_total", "Requests ended, by how.", &["finish_reason"]),
            rejected: server.counters("requests_rejected_total", "Requests turned away, by reason.", &["reason"]),
            running: model.gauge("requests_running", "Sequences being computed."),
            waiting: model.gauge("requests_waiting", "Requests waiting for the engine."),
            running_limit: model.gauge("requests_running_limit", "Sequences that may be computed at the same time."),
            waiting_limit: model.gauge("requests_waiting_limit", "Requests that may wait."),
            queued_prompt_tokens: model.gauge("queued_prompt_tokens", "Prompt tokens of waiting requests."),
            queue_duration: model.histogram(
                "request_queue_duration_seconds",
                "Time from arrival to the first engine step.",
                FIRST_TOKEN_BUCKETS,
            ),
            time_to_first_token: model.histogram(
                "time_to_first_token_seconds",
                "Time from arrival to the first bytes handed to the socket.",
                FIRST_TOKEN_BUCKETS,
            ),
            inter_token_latency: model.histogram(
                "inter_token_latency_seconds",
                "Gap between two generated tokens of a sequence.",
                STEP_BUCKETS,
            ),
            prefill_duration: model.histogram(
                "request_prefill_duration_seconds",
                "Time from the first engine step to the last prompt token.",
                FIRST_TOKEN_BUCKETS,
            ),
            decode_duration: model.histogram(
                "request_decode_duration_seconds",
                "Time from the last prompt token to the end.",
                REQUEST_BUCKETS,
            ),
            e2e_duration: model.histogram(
                "e2e_request_duration_seconds",
                "Time from arrival to the last byte.",
                REQUEST_BUCKETS,
            ),
            prompt_tokens: model.counter("prompt_tokens_total", "Prompt tokens of finished requests."),
            prompt_tokens_cached: model
                .counter("prompt_tokens_cached_total", "Prompt tokens of finished requests that needed no computing."),
            generation_tokens: model.counter("generation_tokens_total", "Generated tokens of finished requests."),
            request_prompt_tokens: model.histogram(
                "request_prompt_tokens",
                "Prompt tokens of a request.",
                TOKEN_BUCKETS,
            ),
            request_generation_tokens: model.histogram(
                "request_generation_tokens",
                "Generated tokens of a request.",
                TOKEN_BUCKETS,
            ),
            step_duration: model.histograms(
                "engine_step_duration_seconds",
                "Duration of an engine step.",
                STEP_BUCKETS,
                &["phase"],
            ),
            step_sequences: model.histograms(
                "engine_step_sequences",
                "Sequences computed in an engine step.",
                SEQUENCE_BUCKETS,
                &["phase"],
            ),
            busy_seconds: model.float_counter("engine_busy_seconds_total", "Time spent in engine steps."),
            last_step: model
                .float_gauge("engine_last_step_timestamp_seconds", "Unix time at which the last engine step ended."),
            preemptions: model
                .counter("preemptions_total", "Sequences that gave their KV blocks up and were computed again."),
            kv_blocks: model.gauges("kv_cache_blocks", "Blocks of the KV cache, by state.", &["state"]),
            kv_usage: model.float_gauge("kv_cache_usage_ratio", "Share of KV blocks held by live sequences, 0 to 1."),
            kv_config: model.gauges(
                "kv_cache_config_info",
                "Geometry of the KV cache.",
                &["block_size", "num_blocks", "dtype"],
            ),
            prefix_cache_queried: model
                .counter("prefix_cache_queried_tokens_total", "Prompt tokens looked for in the prefix cache."),
            prefix_cache_hit: model
                .counter("prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache."),
            speculation_forced: model.counter(
                "speculation_forced_tokens_total",
                "Tokens that a step computed ahead because an output rule allowed nothing else.",
            ),
            speculation_drafted: model
                .counter("speculation_drafted_tokens_total", "Tokens guessed and computed to be verified."),
            speculation_accepted: model.counter("speculation_accepted_tokens_total", "Guessed tokens that came true."),
            response_cache_lookups: server.counters(
                "response_cache_lookups_total",
                "Looks into the response cache, by result.",
                &["result"],
            ),
            response_cache_bytes: server.gauge("response_cache_bytes", "Bytes held by the response cache."),
            response_cache_evictions: server
                .counter("response_cache_evictions_total", "Answers dropped from the response cache to make room."),
            cancellations: server.counters(
                "stream_cancellations_total",
                "Generations stopped from outside, by cause.",
                &["cause"],
            ),
            cancel_duration: server.histogram(
                "cancel_duration_seconds",
                "Time from when a reader went to when the blocks of its sequence were free.",
                STEP_BUCKETS,
            ),
            security_events: server.counters("security_events_total", "Lines of the security log.", &["event"]),
            filter_matches: server.counters(
                "content_filter_matches_total",
                "Content filter matches, by direction, rule and action.",
                &["direction", "rule", "action"],
            ),
            filter_duration: server.histograms(
                "content_filter_duration_seconds",
                "Time the content filter took for one text.",
                FILTER_BUCKETS,
                &["direction"],
            ),
            tracked_clients: server.gauge("rate_limit_tracked_clients", "Clients in the rate limiter's table."),
            memory: server.gauges("memory_bytes", "Memory in use, by kind.", &["kind"]),
            memory_limit: server.gauge("memory_limit_bytes", "Memory that may be used; 0 when no limit is known."),
            model_info: model.gauges(
                "model_info",
                "What is served.",
                &["architecture", "format", "quantization", "sha256"],
            ),
            build_info: server.gauges(
                "build_info",
                "Version of the program and the kernel in use.",
                &["version", "revision", "kernel"],
            ),
            kernel_self_test_failed: server.gauges(
                "kernel_self_test_failed",
                "1 for a kernel that computed something wrong on this CPU at start and is not used.",
                &["kernel"],
            ),
            model_load: model.float_gauge("model_load_duration_seconds", "How long the model took to load."),
            ready: server.gauge("ready", "1 while requests are taken."),
            health_checks: server.counters("health_checks_total", "Real generations for health checks.", &["result"]),
            health_check_duration: server.histogram(
                "health_check_duration_seconds",
                "Duration of a real generation for a health check.",
                FIRST_TOKEN_BUCKETS,
            ),
            anonymous_memory: process(
                registry,
                "process_anonymous_memory_bytes",
                "Resident memory not backed by files.",
            ),
            swapped_memory: process(registry, "process_swapped_memory_bytes", "Memory moved to swap."),
        };
        families.initialise();
        families
    }

    /// Makes every series with a known label set appear with 0: a rate over a series that appears late misses its
    /// first event.
    fn initialise(&self) {
        fn counters(family: &IntCounterVec, labels: impl IntoIterator<Item = &'static str>) {
            labels.into_iter().for_each(|label| drop(family.with_label_values(&[label])));
        }
        fn histograms(family: &HistogramVec, labels: impl IntoIterator<Item = &'static str>) {
            labels.into_iter().for_each(|label| drop(family.with_label_values(&[label])));
        }
        counters(&self.finished, FinishLabel::ALL.iter().map(|label| label.as_str()));
        counters(&self.rejected, RejectReason::ALL.iter().map(|label| label.as_str()));
        counters(&self.cancellations, CancelCause::ALL.iter().map(|label| label.as_str()));
        counters(&self.security_events, SecurityEvent::ALL.iter().map(|label| label.as_str()));
        counters(&self.response_cache_lookups, CacheResult::ALL.iter().map(|label| label.as_str()));
        counters(&self.health_checks, HealthResult::ALL.iter().map(|label| label.as_str()));
        histograms(&self.step_duration, StepPhase::ALL.iter().map(|label| label.as_str()));
        histograms(&self.step_sequences, StepPhase::ALL.iter().map(|label| label.as_str()));
        histograms(&self.filter_duration, FilterDirection::ALL.iter().map(|label| label.as_str()));
        for kind in MemoryKind::ALL {
            self.memory.with_label_values(&[kind.as_str()]).set(0);
        }
        for state in ["free", "used", "cached"] {
            self.kv_blocks.with_label_values(&[state]).set(0);
        }
    }
}

/// A registry and, for families about the model, its name as a constant label.
struct Scope<'a> {
    registry: &'a Registry,
    model: Option<&'a str>,
}

impl Scope<'_> {
    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.options(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(self.options(name, help), labels))
    }

    fn float_counter(&self, name: &str, help: &str) -> Counter {
        self.add(Counter::with_opts(self.options(name, help)))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.options(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(self.options(name, help), labels))
    }

    fn float_gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(self.options(name, help)))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(self.histogram_options(name, help, buckets)))
    }

    fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        self.add(HistogramVec::new(self.histogram_options(name, help, buckets), labels))
    }

    fn options(&self, name: &str, help: &str) -> Opts {
        let options = Opts::new(name, help).namespace("bitnet");
        match self.model {
            Some(model) => options.const_label("model", model),
            None => options,
        }
    }

    fn histogram_options(&self, name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
        HistogramOpts { common_opts: self.options(name, help), buckets: buckets.to_vec() }
    }

    fn add<F: Collector + Clone + 'static>(&self, family: prometheus::Result<F>) -> F {
        register(self.registry, family)
    }
}

/// A gauge beside the standard `process_*` ones.
fn process(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

fn register<F: Collector + Clone + 'static>(registry: &Registry, family: prometheus::Result<F>) -> F {
    let family = family.expect("names, labels and buckets are constants of this file");
    registry.register(Box::new(family.clone())).expect("every name is registered once");
    family
}
