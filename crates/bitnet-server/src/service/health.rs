//! How the service is: a summary from atomics, and a probe that really generates a token and waits behind nobody.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_core::{TokenId, sampling::SamplingParams};
use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::Mutex;

use super::{Service, unix_seconds};
use crate::{
    config::ClientId,
    engine::{GenerationRequest, SequenceEvent, SubmitError},
    metrics::HealthResult,
};

/// How long a probe's result stands for the next callers.
const FRESH: Duration = Duration::from_secs(5);
/// A probe that takes longer has failed, unless the engine is visibly at work.
const PATIENCE: Duration = Duration::from_secs(30);
/// A probe that takes longer is slow.
const PROMPT_ANSWER: Duration = Duration::from_secs(5);
/// An engine with work and without a completed step for so long is stalled: no new requests. Steps are planned to take two
/// seconds at most.
const STALLED_SECONDS: f64 = 8.0;
/// ... and for so long: a restart is the cure.
const DEAD_SECONDS: f64 = 50.0;

/// What `/health` says.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Health {
    /// `ok`, `loading`, `draining` or `failed`.
    pub status: &'static str,
    /// The served model.
    pub model: Option<String>,
    /// The kernel in use.
    pub kernel: Option<String>,
    /// Kernels of this CPU that failed their self-test at start and are not used.
    pub failed_kernels: Vec<String>,
    /// Work at hand.
    pub queue: Option<QueueHealth>,
    /// The newest `/health/generate`.
    pub last_generation: Option<ProbeReport>,
}

/// Work at hand.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct QueueHealth {
    /// Sequences being computed.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// Most requests that may wait.
    pub max_waiting: usize,
}

/// What a probe found.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ProbeReport {
    /// `ok`, `slow` (busy included: busy is never down) or `failed`.
    pub status: &'static str,
    /// Tokens that were generated.
    pub tokens: usize,
    /// How long it took.
    pub seconds: f64,
    /// When, seconds since 1970.
    pub at: u64,
}

/// The newest probe; whoever holds the lock probes, the others wait for his result.
#[derive(Debug)]
pub(super) struct Probe {
    last: Mutex<Option<(Instant, ProbeReport)>>,
}

impl Probe {
    pub(super) fn new() -> Self {
        Self { last: Mutex::new(None) }
    }
}

impl Health {
    /// Of a server that has no model yet.
    pub fn without_model(status: &'static str) -> Self {
        Self { status, model: None, kernel: None, failed_kernels: Vec::new(), queue: None, last_generation: None }
    }
}

impl Service {
    /// The summary, `status` given by the process's phase.
    pub fn health(&self, status: &'static str) -> Health {
        let engine = self.engine.status();
        let queue = QueueHealth { running: engine.running, waiting: engine.waiting, max_waiting: engine.max_waiting };
        let last = self.probe.last.try_lock().ok().and_then(|last| last.as_ref().map(|(_, report)| report.clone()));
        Health {
            status: if self.is_responsive() { status } else { "failed" },
            model: Some(self.card.names.id().to_owned()),
            kernel: Some(self.card.kernel.clone()),
            failed_kernels: self.card.failed_kernels.clone(),
            queue: Some(queue),
            last_generation: last,
        }
    }

    /// Whether new requests have a chance: the engine lives and moves. Busy is never down.
    pub fn is_responsive(&self) -> bool {
        let status = self.engine.status();
        status.alive && status.stalled_seconds < STALLED_SECONDS
    }

    /// Whether only a restart can help.
    pub fn is_beyond_help(&self) -> bool {
        let status = self.engine.status();
        !status.alive || status.stalled_seconds >= DEAD_SECONDS
    }

    /// Generates one token, at most once in five seconds whoever asks; `false` when nothing came.
    pub async fn probe(&self) -> (bool, ProbeReport) {
        let mut last = self.probe.last.lock().await;
        if let Some((at, report)) = &*last
            && at.elapsed() < FRESH
        {
            return (report.status != HealthResult::Failed.as_str(), report.clone());
        }
        let start = Instant::now();
        let tokens = tokio::time::timeout(PATIENCE, self.generate_one(start)).await;
        let elapsed = start.elapsed();
        let (result, tokens) = match tokens {
            Ok(Ok(tokens)) if elapsed <= PROMPT_ANSWER => (HealthResult::Ok, tokens),
            Ok(Ok(tokens)) => (HealthResult::Slow, tokens),
            Ok(Err(SubmitError::QueueFull)) | Err(_) if self.is_responsive() => (HealthResult::Slow, 0),
            _ => (HealthResult::Failed, 0),
        };
        self.metrics.record_health_check(result, elapsed.as_secs_f64());
        let report =
            ProbeReport { status: result.as_str(), tokens, seconds: elapsed.as_secs_f64(), at: unix_seconds() };
        *last = Some((Instant::now(), report.clone()));
        (result != HealthResult::Failed, report)
    }

    async fn generate_one(&self, arrival: Instant) -> Result<usize, SubmitError> {
        let start = self.tokenizer().bos().or(self.stop_tokens.first().copied()).unwrap_or(TokenId(0));
        let mut streams = self.engine.probe(GenerationRequest {
            prompt: vec![start],
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            num_choices: 1,
            max_tokens: 1,
            min_tokens: 0,
            stop_tokens: Arc::new([]),
            logprobs: None,
            prompt_logprobs: None,
            cache_prompt: false,
            priority: 0,
            client: ClientId::local(),
            constraint: None,
            pooling: None,
            prediction: Arc::new([]),
            deadline: Some(arrival + PATIENCE),
            arrival,
        })?;
        let mut tokens = 0;
        for stream in &mut streams {
            loop {
                match stream.next().await {
                    SequenceEvent::PromptDone { .. } => {}
                    SequenceEvent::Token(_) => tokens += 1,
                    SequenceEvent::Finished(_) => break,
                    SequenceEvent::Failed(_) => return Err(SubmitError::Stopped),
                }
            }
        }
        Ok(tokens)
    }
}
