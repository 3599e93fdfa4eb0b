//! The figures of one generation, recorded where they happen; what its `Drop` finds unfinished was cancelled.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use crate::{
    metrics::{CancelCause, FinishLabel, Metrics},
    openai::{FinishReason, Usage},
    service::{Caller, ServiceError},
};

/// Records one request that reached the engine (or was replayed from the response cache).
#[derive(Debug)]
pub(super) struct Meter {
    metrics: Arc<Metrics>,
    arrival: Instant,
    /// When the newest token of each choice came; gaps of replayed answers say nothing and are not measured.
    last_tokens: Vec<Option<Instant>>,
    measure_gaps: bool,
    first_token_seen: bool,
    finished: bool,
    cut_off: CutOff,
}

/// Whether a client was cut off because it read nothing. The connection says so before it drops the answers that it carries.
#[derive(Clone, Debug, Default)]
pub struct CutOff(Arc<AtomicBool>);

impl CutOff {
    /// To be called before the connection's answers are dropped.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// What the answer asks when it is dropped.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Meter {
    pub(super) fn new(metrics: Arc<Metrics>, caller: Caller, num_choices: usize, measure_gaps: bool) -> Self {
        let Caller { arrival, cut_off, .. } = caller;
        let last_tokens = vec![None; num_choices];
        Self { metrics, arrival, last_tokens, measure_gaps, first_token_seen: false, finished: false, cut_off }
    }

    /// A token of `choice` arrived.
    pub(super) fn token(&mut self, choice: usize) {
        let now = Instant::now();
        if !self.first_token_seen {
            self.first_token_seen = true;
            self.metrics.observe_ttft((now - self.arrival).as_secs_f64());
        }
        let last = self.last_tokens[choice].replace(now);
        if let (true, Some(last)) = (self.measure_gaps, last) {
            self.metrics.observe_inter_token((now - last).as_secs_f64());
        }
    }

    /// Every choice has ended, the first of them for `reason`.
    pub(super) fn finish(&mut self, reason: FinishReason, usage: &Usage) {
        let label = match reason {
            FinishReason::Stop => FinishLabel::Stop,
            FinishReason::Length => FinishLabel::Length,
            FinishReason::ToolCalls => FinishLabel::Stop,
            FinishReason::ContentFilter => FinishLabel::ContentFilter,
        };
        let cached = usage.prompt_tokens_details.cached_tokens;
        self.metrics.record_usage(usage.prompt_tokens, cached, usage.completion_tokens);
        self.end(label);
    }

    /// The generation failed.
    pub(super) fn fail(&mut self, error: &ServiceError) {
        let (label, cause) = match error {
            ServiceError::Timeout => (FinishLabel::Timeout, Some(CancelCause::Timeout)),
            ServiceError::Draining => (FinishLabel::Cancelled, Some(CancelCause::Shutdown)),
            _ => (FinishLabel::Error, None),
        };
        if let Some(cause) = cause {
            self.metrics.record_cancelled(cause);
        }
        self.end(label);
    }

    fn end(&mut self, label: FinishLabel) {
        self.finished = true;
        self.metrics.record_finished(label);
        self.metrics.observe_e2e(self.arrival.elapsed().as_secs_f64());
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if !self.finished {
            let cause = if self.cut_off.is_set() { CancelCause::SlowReader } else { CancelCause::ClientDisconnect };
            self.metrics.record_cancelled(cause);
            self.end(FinishLabel::Cancelled);
        }
    }
}
