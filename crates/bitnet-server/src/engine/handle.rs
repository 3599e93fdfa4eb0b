//! The async side of the engine: [`EngineHandle::reserve`] a place, then submit, then read one receiver a choice.
//! One bounded channel down (and a slot past it for health probes), one bounded channel a sequence up, nothing else. Dropping a [`SequenceStream`] cancels its
//! sequence. No model, scheduler or block lives here.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use bitnet_core::{
    TokenId,
    checkpoint::Pooling,
    sampling::{SamplingParams, TokenLogprobs},
};
use tokio::sync::mpsc;

use super::{EngineConfig, OutputRule};
use crate::{config::ClientId, metrics::Metrics};

/// A validated request in token ids: the only thing the engine understands.
#[derive(Clone, Debug)]
pub struct GenerationRequest {
    /// Prompt, at least one token, shorter than the context.
    pub prompt: Vec<TokenId>,
    /// Sampling parameters, validated.
    pub sampling: SamplingParams,
    /// Choices to generate, at least one; choice `i` draws with key `(seed, i, position)`.
    pub num_choices: u32,
    /// Tokens to generate a choice at most; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Stop tokens are not drawn before this many tokens.
    pub min_tokens: usize,
    /// Tokens that end a choice (empty with `ignore_eos`). A stop token is the last [`TokenEvent`] of its choice.
    pub stop_tokens: Arc<[TokenId]>,
    /// Alternatives wanted with each token's log-probability; `None`: no log-probabilities.
    pub logprobs: Option<usize>,
    /// Alternatives wanted with each prompt token's log-probability (echo); `None`: none.
    pub prompt_logprobs: Option<usize>,
    /// Whether it may use and fill the prefix cache.
    pub cache_prompt: bool,
    /// Orders the client's own waiting requests, lower first; between clients it means nothing.
    pub priority: i64,
    /// For whom it is.
    pub client: ClientId,
    /// What the output has to look like.
    pub constraint: Option<Arc<dyn OutputRule>>,
    /// What a vector is made of instead of text: the prompt's hidden states. `max_tokens` is 0 then.
    pub pooling: Option<Pooling>,
    /// What the output is expected to follow: it may come sooner, and is the same; empty for none.
    pub prediction: Arc<[TokenId]>,
    /// When the request's time is up; `None`: it lives as long as somebody reads it.
    pub deadline: Option<Instant>,
    /// Arrival, for queue-time metrics.
    pub arrival: Instant,
}

/// What a sequence says, in order: prompt log-probabilities if asked, tokens, one terminal event.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceEvent {
    /// The prompt has been computed; `cached_tokens` of it came from the prefix cache.
    PromptDone {
        /// Prompt tokens that needed no computing.
        cached_tokens: usize,
        /// One entry for each prompt token when asked for; the first has none.
        logprobs: Option<PromptLogprobs>,
        /// The prompt's vector when asked for.
        embedding: Option<Vec<f32>>,
    },
    /// One generated token.
    Token(TokenEvent),
    /// The end; nothing follows.
    Finished(FinishReason),
    /// The end by an error; nothing follows.
    Failed(EngineError),
}

/// Log-probabilities of a prompt; `[0]` is `None`, entry `i` is that of token `i` given those before.
pub type PromptLogprobs = Vec<Option<TokenLogprobs>>;

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// The token.
    pub token: TokenId,
    /// Present when log-probabilities were asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a sequence ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// Why a sequence ended badly. None of them takes the process down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A logit was NaN or infinite: the weights or activations hold one.
    #[error("the model produced a value that is not finite")]
    NotFinite,
    /// The request does not fit the model (empty, longer than the context, an id outside the vocabulary); usually one that
    /// was not validated.
    #[error("the request does not fit the model")]
    Invalid,
    /// The constraint on the output failed; usually a schema or grammar that is too ambiguous.
    #[error("the output constraint of the request could not be computed")]
    Constraint,
    /// The deadline passed.
    #[error("the request ran into its time limit")]
    Timeout,
    /// The server is shutting down and the drain time is over.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// Why a request was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests wait as may.
    #[error("the queue is full")]
    QueueFull,
    /// As many prompt tokens wait as may.
    #[error("the queue holds as many prompt tokens as it may")]
    QueueTokens,
    /// The engine no longer takes requests.
    #[error("the engine has stopped")]
    Stopped,
}

/// A place in the queue, taken before the prompt is tokenized; given back when dropped. A submitted request keeps it until
/// all its choices run or are gone.
#[derive(Debug)]
pub struct SubmitPermit {
    place: QueuePlace,
    commands: mpsc::Sender<Command>,
}

impl SubmitPermit {
    /// Submits `request`: one stream a choice, in order. What does not fit the model ends with `Failed(Invalid)`.
    ///
    /// # Errors
    /// [`SubmitError::Stopped`], [`SubmitError::QueueTokens`].
    pub fn submit(mut self, request: GenerationRequest) -> Result<Vec<SequenceStream>, SubmitError> {
        self.place.take_tokens(request.prompt.len())?;
        let (events, streams) = channels(&request, self.place.shared.max_model_len);
        let submission = Submission { request: Arc::new(request), events, place: Some(Arc::new(self.place)) };
        // The channel has room for every place and the wake-up, so only a dead engine refuses.
        self.commands.try_send(Command::Submit(submission)).map_err(|_| SubmitError::Stopped)?;
        Ok(streams)
    }
}

/// Both ends of one channel a choice. Bounded by all a sequence can ever say, so the engine never waits for a slow reader and
/// a reader never holds more than its request was allowed. The channel allocates as it fills.
fn channels(request: &GenerationRequest, max_model_len: usize) -> (Vec<EventSink>, Vec<SequenceStream>) {
    let capacity = request.max_tokens.min(max_model_len) + EVENTS_BESIDE_TOKENS;
    let channel = |_| {
        let (sender, events) = mpsc::channel(capacity);
        let left = Arc::new(OnceLock::new());
        (EventSink { events: sender, left: Arc::clone(&left) }, SequenceStream { events, left })
    };
    (0..request.num_choices).map(channel).unzip()
}

/// Events of one sequence. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct SequenceStream {
    events: mpsc::Receiver<SequenceEvent>,
    /// Set when the reader goes.
    left: Arc<OnceLock<Instant>>,
}

/// The engine's end of a sequence's channel.
#[derive(Debug)]
pub(super) struct EventSink {
    events: mpsc::Sender<SequenceEvent>,
    left: Arc<OnceLock<Instant>>,
}

impl EventSink {
    /// The channel holds all a sequence can say, so this never waits; a client that left is noticed by the next round.
    pub(super) fn say(&self, event: SequenceEvent) {
        let _ = self.events.try_send(event);
    }

    /// When the reader went, if it did.
    pub(super) fn reader_left(&self) -> Option<Instant> {
        self.left.get().copied()
    }
}

impl Drop for SequenceStream {
    fn drop(&mut self) {
        // Nobody else sets it.
        let _ = self.left.set(Instant::now());
    }
}

impl SequenceStream {
    /// The next event; after a terminal one, or when the engine died, `Failed(Stopped)`. Cancel-safe.
    pub async fn next(&mut self) -> SequenceEvent {
        self.events.recv().await.unwrap_or(SequenceEvent::Failed(EngineError::Stopped))
    }

    /// Everything said so far, and whether nothing can follow.
    #[cfg(test)]
    pub(super) fn said(mut self) -> (Vec<SequenceEvent>, bool) {
        let said = std::iter::from_fn(|| self.events.try_recv().ok()).collect();
        (said, self.events.is_closed())
    }
}

/// A snapshot for `/health` and `/stats`, read from atomics.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineStatus {
    /// Sequences being computed.
    pub running: usize,
    /// Requests waiting, from the moment their place is reserved.
    pub waiting: usize,
    /// Most requests that may wait.
    pub max_waiting: usize,
    /// Whether the engine thread lives.
    pub alive: bool,
    /// Seconds since the engine last completed a step, while there is work; 0 when idle.
    pub stalled_seconds: f64,
    /// Seconds until a place is likely to be free, from the measured speed (for `Retry-After`), 1..=60.
    pub retry_after_seconds: u32,
}

/// The way to the engine thread; cheap to clone. When the last one is dropped the engine finishes its work and ends.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    probes: mpsc::Sender<Submission>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// The handle, and the receivers that go to the engine thread.
    pub(super) fn new(shared: Arc<Shared>) -> (Self, Receivers) {
        // One slot a place, so a submission always fits, and one for the wake-up of a shutdown.
        let (commands, receiver) = mpsc::channel(shared.max_waiting + 1);
        // Probes come one at a time.
        let (probes, probe_receiver) = mpsc::channel(1);
        (Self { commands, probes, shared }, (receiver, probe_receiver))
    }

    /// Takes a place in the queue, before any work is done for the request.
    ///
    /// # Errors
    /// [`SubmitError::QueueFull`], [`SubmitError::Stopped`].
    pub fn reserve(&self) -> Result<SubmitPermit, SubmitError> {
        if !self.shared.alive.load(Ordering::Acquire) || self.shared.stopping() {
            return Err(SubmitError::Stopped);
        }
        let place = QueuePlace::take(&self.shared).ok_or(SubmitError::QueueFull)?;
        Ok(SubmitPermit { place, commands: self.commands.clone() })
    }

    /// Submits a request that waits behind nobody, one at a time: what a health check generates.
    ///
    /// # Errors
    /// [`SubmitError::QueueFull`] while another probe is on its way, [`SubmitError::Stopped`].
    pub fn probe(&self, request: GenerationRequest) -> Result<Vec<SequenceStream>, SubmitError> {
        let (events, streams) = channels(&request, self.shared.max_model_len);
        let submission = Submission { request: Arc::new(request), events, place: None };
        self.probes.try_send(submission).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SubmitError::QueueFull,
            mpsc::error::TrySendError::Closed(_) => SubmitError::Stopped,
        })?;
        self.wake();
        Ok(streams)
    }

    /// What the engine is doing.
    pub fn status(&self) -> EngineStatus {
        let shared = &self.shared;
        let waiting = shared.waiting.load(Ordering::Acquire); // first: a request waits until after it counts as running
        EngineStatus {
            running: shared.running.load(Ordering::Relaxed),
            waiting,
            max_waiting: shared.max_waiting,
            alive: shared.alive.load(Ordering::Acquire),
            stalled_seconds: shared.stalled_seconds(),
            retry_after_seconds: shared.retry_after_seconds.load(Ordering::Relaxed),
        }
    }

    /// Ends the engine now: sequences that are left fail with [`EngineError::ShuttingDown`], then the thread ends. To drain
    /// first, stop submitting and wait until [`EngineHandle::status`] shows nothing running or waiting.
    pub fn shutdown(&self) {
        if !self.shared.stopping.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Makes an idle engine look around. One such message is in the channel at most; a dead engine needs none.
    fn wake(&self) {
        if !self.shared.wake_sent.swap(true, Ordering::AcqRel) {
            let _ = self.commands.try_send(Command::Wake);
        }
    }
}

/// The engine thread's ends of the channels: requests, and probes past them.
pub(super) type Receivers = (mpsc::Receiver<Command>, mpsc::Receiver<Submission>);

/// What goes down the channel.
#[derive(Debug)]
pub(super) enum Command {
    /// A request with its place.
    Submit(Submission),
    /// Look at the shutdown flag and for a probe.
    Wake,
}

/// A request on its way to the engine.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) request: Arc<GenerationRequest>,
    /// One a choice.
    pub(super) events: Vec<EventSink>,
    /// Shared by the choices: free when the last of them runs or is gone. A probe has none.
    pub(super) place: Option<Arc<QueuePlace>>,
}

/// One of the `max_waiting` places; its `Drop` gives it back.
#[derive(Debug)]
pub(super) struct QueuePlace {
    shared: Arc<Shared>,
    /// Of its request's prompt, once that is known.
    prompt_tokens: usize,
}

impl QueuePlace {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        shared
            .waiting
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |taken| {
                (taken < shared.max_waiting).then_some(taken + 1)
            })
            .ok()?;
        shared.publish_waiting();
        Some(Self { shared: Arc::clone(shared), prompt_tokens: 0 })
    }

    /// Takes room for a prompt too. One that is larger than all there is finds room while no other waits.
    fn take_tokens(&mut self, prompt_tokens: usize) -> Result<(), SubmitError> {
        let most = self.shared.max_waiting_tokens;
        let room = |taken: usize| {
            let sum = taken.saturating_add(prompt_tokens);
            (taken == 0 || sum <= most).then_some(sum)
        };
        let waiting = &self.shared.waiting_tokens;
        waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, room).map_err(|_| SubmitError::QueueTokens)?;
        self.prompt_tokens = prompt_tokens;
        Ok(())
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        self.shared.waiting_tokens.fetch_sub(self.prompt_tokens, Ordering::AcqRel);
        self.shared.publish_waiting();
    }
}

/// What the two sides share: counters and flags, no data.
#[derive(Debug)]
pub(super) struct Shared {
    metrics: Arc<Metrics>,
    max_waiting: usize,
    max_waiting_tokens: usize,
    max_model_len: usize,
    waiting: AtomicUsize,
    /// Prompt tokens of waiting requests.
    waiting_tokens: AtomicUsize,
    pub(super) running: AtomicUsize,
    pub(super) alive: AtomicBool,
    stopping: AtomicBool,
    /// A [`Command::Wake`] is in the channel.
    pub(super) wake_sent: AtomicBool,
    pub(super) retry_after_seconds: AtomicU32,
    /// Milliseconds from `origin` to the start of the round in progress, plus one; 0 when idle.
    busy_since_ms: AtomicU64,
    origin: Instant,
}

impl Shared {
    pub(super) fn new(config: &EngineConfig, metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            max_waiting: config.max_queue,
            max_waiting_tokens: config.max_queue_tokens,
            max_model_len: config.max_model_len,
            waiting: AtomicUsize::new(0),
            waiting_tokens: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            alive: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            wake_sent: AtomicBool::new(false),
            retry_after_seconds: AtomicU32::new(1),
            busy_since_ms: AtomicU64::new(0),
            origin: Instant::now(),
        }
    }

    /// The gauge follows the places themselves: the engine may be deep in a step when they change.
    pub(super) fn publish_waiting(&self) {
        self.metrics.set_waiting(self.waiting.load(Ordering::Acquire));
        self.metrics.set_queued_prompt_tokens(self.waiting_tokens.load(Ordering::Acquire));
    }

    /// Whether a shutdown was asked for.
    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// The heartbeat: before each round, so after each step, and with `false` when there is nothing to do.
    pub(super) fn beat(&self, busy: bool) {
        let now_ms = self.origin.elapsed().as_millis() as u64;
        self.busy_since_ms.store(if busy { now_ms + 1 } else { 0 }, Ordering::Relaxed);
    }

    fn stalled_seconds(&self) -> f64 {
        match self.busy_since_ms.load(Ordering::Relaxed) {
            0 => 0.0,
            since => self.origin.elapsed().as_secs_f64() - (since - 1) as f64 / 1000.0,
        }
    }
}

/// `PromptDone` and the terminal event.
const EVENTS_BESIDE_TOKENS: usize = 2;
