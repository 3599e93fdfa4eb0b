//! The engine thread: drain, drop cancelled, schedule, execute, update, emit. One owner of model, cache and scheduler; what
//! it knows of the clients is one event channel each. The policy is the scheduler's, the arithmetic the executor's.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use bitnet_core::{TokenId, sampling::TokenLogprobs};
use tokio::sync::mpsc::{self, error::TryRecvError};

use super::{
    Draft, EngineConfig, EngineError, FinishReason, GenerationRequest, Prediction, PromptLogprobs, SequenceEvent,
    TokenEvent,
    executor::{Executor, StepOutput},
    handle::{Command, EventSink, QueuePlace, Receivers, Shared, Submission},
    pace::Pace,
    scheduler::{Scheduler, SchedulerLimits, Share},
    sequence::{Sequence, SequenceId},
    speculation::{Guesses, StepCosts},
};
use crate::metrics::{Metrics, StepPhase};

/// The loop's state: everything the engine thread owns.
pub(super) struct EngineLoop<E> {
    executor: E,
    scheduler: Scheduler,
    /// One for each sequence in the scheduler.
    clients: HashMap<SequenceId, Client>,
    commands: mpsc::Receiver<Command>,
    probes: mpsc::Receiver<Submission>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    max_model_len: usize,
    next_id: u64,
    pace: Pace,
    /// `None`: nothing is guessed.
    step_costs: Option<StepCosts>,
}

/// Whom a sequence answers to, and how far it has come.
struct Client {
    events: EventSink,
    request: Arc<GenerationRequest>,
    /// Held until the sequence starts.
    place: Option<Arc<QueuePlace>>,
    /// When the first step of the sequence began.
    started: Option<Instant>,
    /// When the last token of the prompt was computed.
    prompt_done: Option<Instant>,
    prompt_logprobs: PromptLogprobs,
    guesses: Guesses,
}

/// What came out of one share, free of the scheduler's borrows.
struct Progress {
    id: SequenceId,
    start: usize,
    num_tokens: usize,
    num_forced: usize,
    num_guessed: usize,
    output: Result<StepOutput, EngineError>,
}

impl<E: Executor> EngineLoop<E> {
    pub(super) fn new(
        executor: E,
        config: &EngineConfig,
        (commands, probes): Receivers,
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let scheduler = Scheduler::new(SchedulerLimits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            num_blocks: config.num_kv_blocks,
            max_waiting: config.max_queue,
            prefix_sharing: config.prefix_sharing,
        });
        Self {
            executor,
            scheduler,
            clients: HashMap::new(),
            commands,
            probes,
            shared,
            metrics,
            max_model_len: config.max_model_len,
            next_id: 0,
            pace: Pace::default(),
            step_costs: StepCosts::new(config.speculation),
        }
    }

    /// Works until a shutdown, or until every handle is gone and all work is done.
    pub(super) fn run(mut self) {
        // Dropped before the loop's state: nobody sees a stream end while the engine still says that it lives.
        let _end = EndOfEngine(Arc::clone(&self.shared));
        loop {
            self.drain();
            if self.shared.stopping() {
                return self.fail_all(EngineError::ShuttingDown);
            }
            if self.has_work() {
                self.turn(&Instant::now);
                continue;
            }
            self.shared.beat(false);
            self.publish();
            match self.commands.blocking_recv() {
                Some(command) => self.take(command),
                None => return,
            }
        }
    }

    /// Whether any sequence is in the scheduler.
    pub(super) fn has_work(&self) -> bool {
        !self.clients.is_empty()
    }

    /// What runs and waits, for tests.
    #[cfg(test)]
    pub(super) fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// What computes, for tests.
    #[cfg(test)]
    pub(super) fn executor(&self) -> &E {
        &self.executor
    }

    /// Takes submissions over while the scheduler has room: what waits beyond that stays in the channel.
    pub(super) fn drain(&mut self) {
        self.take_probe();
        while self.scheduler.has_room() {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.enter(submission, false),
            // Somebody woke an idle engine: for the shutdown flag, or for a probe.
            Command::Wake => {
                // A swap, so that what was sent before the flag was set is seen.
                self.shared.wake_sent.swap(false, Ordering::AcqRel);
                self.take_probe();
            }
        }
    }

    fn take_probe(&mut self) {
        if let Ok(submission) = self.probes.try_recv() {
            self.enter(submission, true);
        }
    }

    fn enter(&mut self, submission: Submission, is_probe: bool) {
        let Submission { request, events, place } = submission;
        let fits = self.fits(&request);
        for (choice, events) in (0..).zip(events) {
            if !fits {
                events.say(SequenceEvent::Failed(EngineError::Invalid));
                continue;
            }
            let id = SequenceId(self.next_id);
            self.next_id += 1;
            let sequence = Sequence::new(id, Arc::clone(&request), choice);
            self.scheduler.add(Sequence { is_probe, ..sequence });
            let client = Client {
                events,
                request: Arc::clone(&request),
                place: place.clone(),
                started: None,
                prompt_done: None,
                prompt_logprobs: Vec::new(),
                guesses: Guesses::new(Prediction::new(Arc::clone(&request.prediction))),
            };
            self.clients.insert(id, client);
        }
    }

    /// Whether the request can be computed at all; the service checks this before, with better words.
    fn fits(&self, request: &GenerationRequest) -> bool {
        let num_tokens = request.prompt.len() + request.max_tokens.min(1);
        let in_vocabulary = |&id: &TokenId| id.index() < self.executor.vocab_size();
        !request.prompt.is_empty() && num_tokens <= self.max_model_len && request.prompt.iter().all(in_vocabulary)
    }

    /// One round with work to do. `now` tells the time.
    pub(super) fn turn(&mut self, now: &dyn Fn() -> Instant) {
        self.shared.beat(true);
        self.drop_gone(now());
        self.step(now);
    }

    /// Sequences nobody listens to any more, and those out of time.
    fn drop_gone(&mut self, now: Instant) {
        let Self { clients, scheduler, metrics, .. } = self;
        clients.retain(|&id, client| {
            let left = client.events.reader_left();
            let late = client.request.deadline.is_some_and(|deadline| deadline <= now);
            if late {
                client.events.say(SequenceEvent::Failed(EngineError::Timeout));
            }
            let stays = left.is_none() && !late;
            if !stays {
                scheduler.remove(id);
            }
            if let Some(left) = left {
                metrics.observe_cancel(left.elapsed().as_secs_f64());
            }
            stays
        });
    }

    fn step(&mut self, now: &dyn Fn() -> Instant) {
        self.propose_drafts();
        let batch = self.scheduler.schedule(self.pace.step_rows());
        if batch.shares.is_empty() {
            return;
        }
        // Before the places are given back, so that nobody sees an engine with neither waiting nor running work.
        self.shared.running.store(batch.shares.len(), Ordering::Relaxed);
        self.metrics.set_running(batch.shares.len());
        let began = now();
        let phase = phase_of(&batch.shares);
        for share in &batch.shares {
            if let Some(client) = self.clients.get_mut(&share.sequence.id) {
                client.start(began, share.sequence, &self.metrics);
            }
        }
        let is_wanted = || {
            let is_read = |share: &Share<'_>| {
                self.clients.get(&share.sequence.id).is_some_and(|client| client.events.reader_left().is_none())
            };
            !self.shared.stopping() && batch.shares.iter().any(is_read)
        };
        let Some(outputs) = self.executor.execute(&batch, &is_wanted) else { return };
        assert_eq!(outputs.len(), batch.shares.len(), "one output a share");
        let progress: Vec<Progress> = batch.shares.iter().zip(outputs).map(Progress::new).collect();

        let seconds = now().saturating_duration_since(began).as_secs_f64();
        self.metrics.record_step(phase, seconds, progress.len());
        let num_rows = progress.iter().map(Progress::num_rows).sum();
        let num_gained: usize = progress.iter().map(Progress::num_gained).sum();
        let prompts = progress.iter().map(|progress| progress.num_tokens).filter(|num_tokens| *num_tokens > 1);
        self.pace.step(num_gained, prompts.sum(), seconds);
        let mut price = 0.0;
        if let Some(costs) = &mut self.step_costs {
            if phase == StepPhase::Decode && progress.iter().all(|progress| progress.num_tokens == 1) {
                costs.record(num_rows, seconds);
            }
            price = costs.price(progress.len(), num_rows);
        }
        progress.into_iter().for_each(|progress| self.update(progress, price));
        self.publish();
    }

    /// Notes what may be said next.
    fn propose_drafts(&mut self) {
        let Some(costs) = &self.step_costs else { return };
        let running = self.scheduler.running();
        let beside_prompts = running.iter().any(|sequence| sequence.num_tokens_to_compute() > 1);
        let mut plan = costs.plan(running.len(), beside_prompts);
        let until = Instant::now() + costs.patience(running.len());
        let (clients, max_model_len, vocab_size) = (&self.clients, self.max_model_len, self.executor.vocab_size());
        self.scheduler.draft(|sequence| {
            let guesses = clients.get(&sequence.id).map(|client| &client.guesses);
            let propose = |guesses: &Guesses| guesses.propose(sequence, &mut plan, until, max_model_len, vocab_size);
            guesses.map_or_else(Draft::default, propose)
        });
    }

    /// Brings one sequence up to date and tells its client.
    fn update(&mut self, progress: Progress, price: f64) {
        let Progress { id, start, num_tokens, num_forced, num_guessed, output } = progress;
        let Some(client) = self.clients.get_mut(&id) else { return };
        let end = match output {
            Ok(StepOutput { prompt_logprobs, embedding, tokens }) => {
                let drawn: Vec<TokenId> = tokens.iter().map(|event| event.token).collect();
                let sequence = self.scheduler.advance(id, num_tokens, &drawn);
                client.guesses.settle(&drawn, num_forced, num_guessed, price);
                if num_forced + num_guessed > 0 {
                    let num_accepted = drawn.len().saturating_sub(1 + num_forced);
                    self.metrics.record_speculation(num_forced, num_guessed, num_accepted);
                }
                client.score_prompt(start, prompt_logprobs);
                client.prompt_computed(embedding, sequence, &self.metrics);
                let finish = finish_reason(sequence, tokens.last(), self.max_model_len);
                tokens.into_iter().for_each(|token| client.events.say(SequenceEvent::Token(token)));
                finish.map(SequenceEvent::Finished)
            }
            Err(error) => Some(SequenceEvent::Failed(error)),
        };
        if let Some(end) = end {
            client.events.say(end);
            if let Some(prompt_done) = client.prompt_done {
                self.metrics.observe_decode(prompt_done.elapsed().as_secs_f64());
            }
            self.clients.remove(&id);
            if let Some(sequence) = self.scheduler.remove(id) {
                self.pace.finished(sequence.tokens.len());
            }
        }
    }

    /// What others read about the engine.
    fn publish(&self) {
        let running = self.scheduler.running();
        let blocks = self.scheduler.blocks();
        self.shared.running.store(running.len(), Ordering::Relaxed);
        let tokens_left = |sequence: &Sequence| {
            let most = sequence.prompt_len().saturating_add(sequence.request.max_tokens).min(self.max_model_len);
            most.saturating_sub(sequence.num_computed_tokens)
        };
        // The running sequences share the speed, so as the first of them ends the others have come as far.
        let until_a_place = running.iter().map(tokens_left).min().unwrap_or(0) * running.len();
        self.shared.retry_after_seconds.store(self.pace.retry_after_seconds(until_a_place), Ordering::Relaxed);
        self.shared.publish_waiting();
        self.metrics.set_running(running.len());
        let used = blocks.num_blocks() - blocks.num_available();
        self.metrics.set_kv_blocks(blocks.num_free(), used, blocks.num_cached());
        self.metrics.set_preemptions(self.scheduler.num_preemptions());
    }

    /// The end of everything that is left, in the scheduler and in the channel.
    fn fail_all(&mut self, error: EngineError) {
        self.commands.close();
        self.probes.close();
        self.take_probe();
        while let Ok(command) = self.commands.try_recv() {
            self.take(command);
        }
        for (id, client) in self.clients.drain() {
            self.scheduler.remove(id);
            client.events.say(SequenceEvent::Failed(error));
        }
        self.publish();
    }
}

impl Client {
    fn start(&mut self, now: Instant, sequence: &Sequence, metrics: &Metrics) {
        self.place = None;
        if self.started.is_none() {
            self.started = Some(now);
            if !sequence.needs_every_row() {
                metrics.record_prefix_cache(sequence.prompt_len(), sequence.cached_tokens.unwrap_or(0));
            }
            metrics.observe_queue(now.saturating_duration_since(self.request.arrival).as_secs_f64());
        }
    }

    /// Collects prompt log-probabilities of a share that began at `start`.
    fn score_prompt(&mut self, start: usize, scored: Vec<TokenLogprobs>) {
        if self.prompt_done.is_none() && self.request.prompt_logprobs.is_some() {
            // Entry i belongs to token i and comes from the row before it. A preempted prompt says its rows again.
            self.prompt_logprobs.truncate(start + 1);
            self.prompt_logprobs.resize(start + 1, None);
            self.prompt_logprobs.extend(scored.into_iter().map(Some));
        }
    }

    /// Says when the prompt is complete, once.
    fn prompt_computed(&mut self, embedding: Option<Vec<f32>>, sequence: &Sequence, metrics: &Metrics) {
        if self.prompt_done.is_none() && sequence.is_prompt_computed() {
            let now = Instant::now();
            self.prompt_done = Some(now);
            let seconds = self.started.map_or(0.0, |started| (now - started).as_secs_f64());
            metrics.observe_prefill(seconds);
            let wanted = self.request.prompt_logprobs.is_some();
            let logprobs = wanted.then(|| std::mem::take(&mut self.prompt_logprobs));
            let cached_tokens = sequence.cached_tokens.unwrap_or(0);
            self.events.say(SequenceEvent::PromptDone { cached_tokens, logprobs, embedding });
        }
    }
}

impl Progress {
    fn new((share, output): (&Share<'_>, Result<StepOutput, EngineError>)) -> Self {
        let sequence = share.sequence;
        let (num_forced, num_guessed) = (share.num_forced(), share.num_drafted - share.num_forced());
        let (start, num_tokens) = (sequence.num_computed_tokens, share.num_tokens);
        Self { id: sequence.id, start, num_tokens, num_forced, num_guessed, output }
    }

    fn num_rows(&self) -> usize {
        self.num_tokens + self.num_forced + self.num_guessed
    }

    /// Tokens that need no computing any more.
    fn num_gained(&self) -> usize {
        let num_drawn = self.output.as_ref().map_or(0, |output| output.tokens.len());
        self.num_tokens + num_drawn.saturating_sub(1)
    }
}

/// Whether the sequence is complete, after `token` if one was drawn.
fn finish_reason(sequence: &Sequence, token: Option<&TokenEvent>, max_model_len: usize) -> Option<FinishReason> {
    let request = &sequence.request;
    let stopped = token.is_some_and(|event| request.stop_tokens.contains(&event.token));
    let full = sequence.generated().len() >= request.max_tokens || sequence.tokens.len() >= max_model_len;
    match (stopped, full && sequence.is_prompt_computed()) {
        (true, _) => Some(FinishReason::Stop),
        (false, true) => Some(FinishReason::Length),
        (false, false) => None,
    }
}

fn phase_of(shares: &[Share<'_>]) -> StepPhase {
    let decoding = |share: &Share<'_>| share.sequence.is_prompt_computed();
    match (shares.iter().any(decoding), shares.iter().all(decoding)) {
        (_, true) => StepPhase::Decode,
        (false, _) => StepPhase::Prefill,
        (true, false) => StepPhase::Mixed,
    }
}

/// Marks the engine as dead however its thread ends.
struct EndOfEngine(Arc<Shared>);

impl Drop for EndOfEngine {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Release);
        self.0.running.store(0, Ordering::Relaxed);
        self.0.beat(false);
    }
}
