//! The figures of one generation, recorded where they happen; what its `Drop` finds unfinished was cancelled.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    metrics::{CancelCause, FinishLabel, Metrics},
    openai::{FinishReason, Usage},
    service::ServiceError,
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
    last_read: LastRead,
    /// A connection is cut off when nothing of it was read for so long.
    patience: Duration,
}

/// Since when nobody waits for the next event.
#[derive(Clone, Debug)]
struct LastRead(Arc<Mutex<Instant>>);

/// Somebody waits for the next event, until this is dropped.
#[derive(Debug)]
pub(super) struct Reading(LastRead);

impl Drop for Reading {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

impl Meter {
    pub(super) fn new(
        metrics: Arc<Metrics>,
        arrival: Instant,
        num_choices: usize,
        measure_gaps: bool,
        patience: Duration,
    ) -> Self {
        let last_tokens = vec![None; num_choices];
        let last_read = LastRead(Arc::new(Mutex::new(Instant::now())));
        Self {
            metrics,
            arrival,
            last_tokens,
            measure_gaps,
            first_token_seen: false,
            finished: false,
            last_read,
            patience,
        }
    }

    /// To be held while somebody waits for the next event.
    pub(super) fn reading(&self) -> Reading {
        Reading(self.last_read.clone())
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
            let last_read = *self.last_read.0.lock().unwrap_or_else(PoisonError::into_inner);
            // The connection's buffer takes some more before nobody asks; whoever reads at all asks far more often.
            let stalled = last_read.elapsed() >= self.patience / 2;
            let cause = if stalled { CancelCause::SlowReader } else { CancelCause::ClientDisconnect };
            self.metrics.record_cancelled(cause);
            self.end(FinishLabel::Cancelled);
        }
    }
}
