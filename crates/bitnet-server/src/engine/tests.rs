//! The engine without a model: a seeded simulation of the whole loop, and the handle from the async side.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use bitnet_core::{BlockId, TokenId, kv_cache::KvDtype};

use super::{
    Engine, EngineConfig, EngineEnd, EngineError, EngineHandle, EngineThread, FinishReason, GenerationRequest,
    SequenceEvent, SequenceStream, StartError, SubmitError,
    handle::Shared,
    scheduler::{Scheduler, SchedulerLimits},
    sequence::{Sequence, SequenceId},
    testing::{DRAWN_IDS, FakeExecutor, PANIC, POISON, hashed_token, metrics, request, score},
    thread::EngineLoop,
};
use crate::config::{ClientId, PrefixSharing};

/// SplitMix64: the simulation's only source of chance.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }
}

/// Everything one choice has to say if it is left alone.
fn expected(request: &GenerationRequest, choice: u32, max_model_len: usize) -> Vec<SequenceEvent> {
    let mut tokens = request.prompt.clone();
    let scored = (1..tokens.len()).map(|position| Some(score(&tokens[..=position])));
    let logprobs = request.prompt_logprobs.map(|_| std::iter::once(None).chain(scored).collect());
    if request.prompt.contains(&POISON) {
        return vec![SequenceEvent::Failed(EngineError::NotFinite)];
    }
    let mut events = vec![SequenceEvent::PromptDone { cached_tokens: 0, logprobs }];
    for _ in 0..request.max_tokens {
        let token = hashed_token(&tokens, &request.sampling, choice);
        tokens.push(token);
        events.push(SequenceEvent::Token(super::TokenEvent { token, logprobs: None }));
        if request.stop_tokens.contains(&token) {
            events.push(SequenceEvent::Finished(FinishReason::Stop));
            return events;
        }
        if tokens.len() == max_model_len {
            break;
        }
    }
    events.push(SequenceEvent::Finished(FinishReason::Length));
    events
}

/// Takes out of `events` what depends on the neighbours, after a look at it: how much of the prompt was cached.
fn take_cached_tokens(events: &mut [SequenceEvent], request: &GenerationRequest) -> usize {
    let Some(SequenceEvent::PromptDone { cached_tokens, .. }) = events.first_mut() else { return 0 };
    let cached = std::mem::take(cached_tokens);
    assert!(cached < request.prompt.len() && cached.is_multiple_of(16), "whole blocks, and never the last token");
    assert!(cached == 0 || request.prompt_logprobs.is_none(), "a prompt that is scored is computed");
    cached
}

fn client(number: u8) -> ClientId {
    ClientId::from_address([10, 0, 0, number].into())
}

struct Simulation {
    chance: Chance,
    config: EngineConfig,
    longest_prompt: usize,
    engine: EngineLoop<FakeExecutor>,
    handle: EngineHandle,
    began: Instant,
    round: u64,
    streams: Vec<(Arc<GenerationRequest>, u32, SequenceStream)>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut chance = Chance(seed);
        let num_kv_blocks = 1 + chance.below(10);
        let config = EngineConfig {
            max_num_seqs: 1 + chance.below(6),
            max_num_batched_tokens: 1 + chance.below(40),
            max_queue: 1 + chance.below(8),
            max_queue_tokens: if chance.below(2) == 0 { usize::MAX } else { 1 + chance.below(200) },
            max_model_len: 2 + chance.below(num_kv_blocks * 16 - 1),
            num_kv_blocks,
            kv_dtype: KvDtype::F16,
            prefix_sharing: [PrefixSharing::Off, PrefixSharing::PerClient, PrefixSharing::Everyone][chance.below(3)],
        };
        let shared = Arc::new(Shared::new(&config, metrics()));
        let (handle, commands) = EngineHandle::new(Arc::clone(&shared));
        let engine = EngineLoop::new(FakeExecutor::new(&config), &config, commands, shared, metrics());
        let longest_prompt = 1 + chance.below(config.max_model_len);
        Self { chance, config, longest_prompt, engine, handle, began: Instant::now(), round: 0, streams: Vec::new() }
    }

    /// Time is a second a round.
    fn now(&self) -> Instant {
        self.began + Duration::from_secs(self.round)
    }

    fn arrive(&mut self) {
        let Ok(permit) = self.handle.reserve() else {
            assert_eq!(self.handle.status().waiting, self.config.max_queue, "only a full queue refuses");
            return;
        };
        let chance = &mut self.chance;
        let max_tokens = chance.below(self.config.max_model_len);
        let longest_prompt = (self.config.max_model_len - max_tokens.min(1)).min(self.longest_prompt);
        // Half a prompt is one of two texts that many start with.
        let (len, text) = (1 + chance.below(longest_prompt), chance.below(2) as u32);
        let own = chance.below(len + 1);
        let mut prompt: Vec<u32> = (0..len as u32).map(|at| (at * (7 + text)) % DRAWN_IDS).collect();
        prompt[own..].fill_with(|| chance.below(DRAWN_IDS as usize) as u32);
        if chance.below(20) == 0 {
            prompt[0] = POISON.0;
        }
        let stop_tokens = (0..chance.below(3)).map(|_| TokenId(chance.below(DRAWN_IDS as usize) as u32)).collect();
        let lifetime = if chance.below(10) == 0 { chance.below(20) as u64 } else { 1_000_000 };
        let mut request = request(&prompt, max_tokens);
        request.sampling.seed = chance.below(1000) as i64;
        request.cache_prompt = chance.below(4) != 0;
        request.client = client(chance.below(3) as u8);
        request.num_choices = 1 + chance.below(3) as u32;
        request.prompt_logprobs = (chance.below(3) == 0).then_some(0);
        request.stop_tokens = stop_tokens;
        request.deadline = self.began + Duration::from_secs(self.round + lifetime);
        request.priority = chance.below(3) as i64;
        let probes = chance.below(10) == 0;
        let submitted = permit.submit(request.clone());
        if probes {
            self.probe();
        }
        let Ok(streams) = submitted else {
            assert_eq!(submitted.err(), Some(SubmitError::QueueTokens));
            assert!(self.config.max_queue_tokens < usize::MAX);
            return;
        };
        let request = Arc::new(request);
        self.streams.extend((0..).zip(streams).map(|(choice, stream)| (Arc::clone(&request), choice, stream)));
    }

    fn probe(&mut self) {
        let request = super::testing::request(&[1], 1);
        if let Ok(mut streams) = self.handle.probe(request.clone()) {
            self.streams.push((Arc::new(request), 0, streams.remove(0)));
        }
    }

    /// One round of the engine thread's loop, and what must hold after each.
    fn turn(&mut self) {
        self.round += 1;
        self.engine.drain();
        if self.engine.has_work() {
            self.engine.turn(self.now());
        }
        let scheduler = self.engine.scheduler();
        let blocks = scheduler.blocks();
        let mut counts = vec![0; blocks.num_blocks()];
        let tables = scheduler.running().iter().flat_map(|sequence| &sequence.block_table);
        tables.for_each(|block: &BlockId| counts[block.index()] += 1);
        let used = counts.iter().filter(|&&count| count > 0).count();
        assert!(blocks.reference_counts().eq(counts), "each holder is a running sequence");
        assert_eq!(blocks.num_free() + used + blocks.num_cached(), self.config.num_kv_blocks);
        assert!(scheduler.waiting().all(|sequence| sequence.block_table.is_empty()));
        let users = scheduler.running().iter().filter(|sequence| !sequence.is_probe).count();
        assert!(users <= self.config.max_num_seqs + 1);
        // The last request's choices, a probe, and the preempted.
        let most_waiting = self.config.max_queue + 2 + 1 + self.config.max_num_seqs + 1;
        assert!(scheduler.waiting().len() <= most_waiting, "the queue is bounded");
        assert!(self.handle.status().waiting <= self.config.max_queue);
    }

    /// How often somebody was preempted, and how many tokens of prompts came from the cache.
    fn run(mut self) -> (u64, usize) {
        for _ in 0..60 {
            while self.chance.below(3) == 0 {
                self.arrive();
            }
            if self.chance.below(8) == 0 && !self.streams.is_empty() {
                let gone = self.chance.below(self.streams.len());
                self.streams.swap_remove(gone);
            }
            self.turn();
        }
        // A token at least is computed in every round, and one that was preempted starts again at most once for each older.
        let work: usize = self.streams.iter().map(|(request, ..)| request.prompt.len() + request.max_tokens).sum();
        let bound = self.round + 100 + 2 * (work * (1 + self.config.max_num_seqs)) as u64;
        while self.engine.has_work() || self.handle.status().waiting > 0 {
            self.turn();
            assert!(self.round < bound, "somebody starves");
        }
        let blocks = self.engine.scheduler().blocks();
        assert_eq!(blocks.num_available(), self.config.num_kv_blocks);
        assert!(self.config.prefix_sharing != PrefixSharing::Off || blocks.num_cached() == 0, "off keeps nothing");
        let mut cached = 0;
        for (request, choice, stream) in self.streams {
            let (mut said, ended) = stream.said();
            cached += take_cached_tokens(&mut said, &request);
            let whole = expected(&request, choice, self.config.max_model_len);
            assert!(ended, "nothing follows the terminal event");
            if said.last() == Some(&SequenceEvent::Failed(EngineError::Timeout)) {
                assert_eq!(said[..said.len() - 1], whole[..said.len() - 1]);
            } else {
                assert_eq!(said, whole);
            }
        }
        (self.engine.scheduler().num_preemptions(), cached)
    }
}

#[test]
fn simulation_keeps_every_promise() {
    let (mut preemptions, mut cached) = (0, 0);
    for seed in 0..10_000 {
        let run = std::panic::catch_unwind(|| Simulation::new(seed).run());
        let run = run.unwrap_or_else(|_| panic!("seed {seed}"));
        preemptions += run.0;
        cached += run.1;
    }
    assert!(preemptions > 2500, "{preemptions} preemptions prove little about recomputation");
    assert!(cached > 50_000, "{cached} cached tokens prove little about the prefix cache");
}

/// Steps of a bare scheduler: `keep` says before each step what is submitted; tokens given to each of two clients come back.
fn served(steps: usize, limits: SchedulerLimits, mut keep: impl FnMut(&mut Scheduler, usize)) -> [usize; 2] {
    let mut scheduler = Scheduler::new(limits);
    let mut served = [0; 2];
    for step in 0..steps {
        keep(&mut scheduler, step);
        let shares = scheduler.schedule(usize::MAX).shares;
        let shares: Vec<_> = shares.iter().map(|share| (share.sequence.id, share.num_tokens)).collect();
        for (id, num_tokens) in shares {
            let sequence = scheduler.running().iter().find(|sequence| sequence.id == id).expect("it runs");
            served[usize::from(sequence.request.client == client(1))] += num_tokens;
            let draws = sequence.num_tokens_to_compute() == num_tokens;
            let sequence = scheduler.advance(id, num_tokens, draws.then_some(TokenId(1)));
            if sequence.generated().len() >= sequence.request.max_tokens {
                scheduler.remove(id);
            }
        }
    }
    served
}

fn limits(max_num_seqs: usize) -> SchedulerLimits {
    SchedulerLimits {
        max_num_seqs,
        max_num_batched_tokens: 64,
        num_blocks: 1000,
        max_waiting: 1000,
        prefix_sharing: PrefixSharing::Off,
    }
}

fn sequence(id: usize, client: ClientId, priority: i64, prompt_len: u32, max_tokens: usize) -> Sequence {
    let prompt: Vec<u32> = (0..prompt_len).collect();
    let request = GenerationRequest { client, priority, ..request(&prompt, max_tokens) };
    Sequence::new(SequenceId(id as u64), Arc::new(request), 0)
}

#[test]
fn twenty_requests_get_nobody_more_than_one() {
    let count = |scheduler: &Scheduler, who| {
        scheduler.waiting().chain(scheduler.running()).filter(|sequence| sequence.request.client == who).count()
    };
    // Twenty against five, so that both always want every place.
    let mut id = 0;
    let shares = served(5000, limits(4), |scheduler, _| {
        for (who, wanted) in [(client(0), 20), (client(1), 5)] {
            while count(scheduler, who) < wanted {
                id += 1;
                scheduler.add(sequence(id, who, 0, 30, 20));
            }
        }
    });
    let share = shares[1] as f64 / (shares[0] + shares[1]) as f64;
    assert!((0.45..=0.55).contains(&share), "{shares:?}");
    // Somebody who asks for little never waits for the answers of somebody who asks for much.
    let mut id = 0;
    let mut lone = None;
    served(2000, limits(4), |scheduler, step| {
        while count(scheduler, client(0)) < 20 {
            id += 1;
            scheduler.add(sequence(id, client(0), 0, 30, 200));
        }
        if let Some((lone_id, since)) = lone {
            let first_token = scheduler.running().iter().any(|s| s.id == lone_id && !s.generated().is_empty());
            assert!(first_token || step <= since + 1, "two steps at most: one for the places, one for the prompt");
        }
        if step % 50 == 10 {
            id += 1;
            lone = Some((SequenceId(id as u64), step));
            scheduler.add(sequence(id, client(1), 0, 30, 1000));
        } else if step % 50 == 20 {
            let (id, _) = lone.take().expect("it came");
            scheduler.remove(id);
        }
    });
}

#[test]
fn priority_orders_the_own_requests_only() {
    let mut scheduler = Scheduler::new(limits(1));
    scheduler.add(sequence(1, client(0), 5, 4, 4));
    scheduler.add(sequence(2, client(0), -5, 4, 4));
    assert_eq!(scheduler.schedule(64).shares[0].sequence.id, SequenceId(2));
    scheduler.add(sequence(3, client(0), -9, 4, 4));
    scheduler.add(sequence(4, client(1), 9, 4, 4));
    scheduler.advance(SequenceId(2), 4, Some(TokenId(1)));
    scheduler.remove(SequenceId(2));
    let ids: Vec<_> = scheduler.schedule(64).shares.iter().map(|share| share.sequence.id).collect();
    assert_eq!(ids, [SequenceId(4), SequenceId(3)], "a priority says nothing to others");
}

#[test]
fn prompts_beside_generating_sequences_are_cut_and_a_probe_waits_for_nobody() {
    let mut scheduler = Scheduler::new(SchedulerLimits { num_blocks: 5, ..limits(1) });
    scheduler.add(sequence(1, client(0), 0, 10, 30));
    assert_eq!(scheduler.schedule(3).shares[0].num_tokens, 10, "alone, a prompt takes what it needs");
    scheduler.advance(SequenceId(1), 10, Some(TokenId(1)));
    scheduler.add(sequence(2, client(1), 0, 30, 30));
    let shares: Vec<_> = scheduler.schedule(3).shares.iter().map(|share| share.num_tokens).collect();
    assert_eq!(shares, [1, 3]);
    scheduler.add(Sequence { is_probe: true, ..sequence(3, client(2), 0, 1, 1) });
    scheduler.add(Sequence { is_probe: true, ..sequence(4, client(2), 0, 20, 1) });
    let ids: Vec<_> = scheduler.schedule(3).shares.iter().map(|share| share.sequence.id).collect();
    assert_eq!(ids[..2], [SequenceId(4), SequenceId(3)], "without places or blocks");
}

fn config(max_num_seqs: usize, max_queue: usize) -> EngineConfig {
    EngineConfig {
        max_num_seqs,
        max_num_batched_tokens: 16,
        max_queue,
        max_queue_tokens: usize::MAX,
        max_model_len: 64,
        num_kv_blocks: 16,
        kv_dtype: KvDtype::F16,
        prefix_sharing: PrefixSharing::PerClient,
    }
}

fn start(config: &EngineConfig) -> (EngineHandle, EngineThread) {
    Engine::start_with(FakeExecutor::new(config), config, metrics()).expect("the fake starts")
}

/// An engine that waits for a message before each token, after saying that it is about to.
fn start_gated(config: &EngineConfig) -> (EngineHandle, EngineThread, mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (open, gate) = mpsc::channel();
    let (say_reached, reached) = mpsc::channel();
    open.send(()).expect("the warm-up passes");
    let executor = FakeExecutor::choosing(config, move |sequence| {
        let _ = say_reached.send(());
        let _ = gate.recv();
        hashed_token(&sequence.tokens, &sequence.request.sampling, sequence.choice)
    });
    let (handle, thread) = Engine::start_with(executor, config, metrics()).expect("the fake starts");
    reached.recv().expect("the warm-up");
    (handle, thread, open, reached)
}

fn submit(handle: &EngineHandle, request: GenerationRequest) -> SequenceStream {
    handle.reserve().expect("a place").submit(request).expect("alive").remove(0)
}

async fn read_all(mut stream: SequenceStream) -> Vec<SequenceEvent> {
    let mut events = Vec::new();
    loop {
        let event = stream.next().await;
        let ended = matches!(event, SequenceEvent::Finished(_) | SequenceEvent::Failed(_));
        events.push(event);
        if ended {
            return events;
        }
    }
}

async fn last(stream: SequenceStream) -> Option<SequenceEvent> {
    read_all(stream).await.pop()
}

#[tokio::test]
async fn choices_answer_for_themselves_and_a_slow_reader_stops_nobody() {
    let config = config(4, 4);
    let (handle, mut thread) = start(&config);
    let request = GenerationRequest { num_choices: 3, ..request(&[1, 2, 3], 20) };
    let unread = submit(&handle, request.clone());
    let streams = handle.reserve().expect("a place").submit(request.clone()).expect("alive");
    for (choice, stream) in (0..).zip(streams) {
        assert_eq!(read_all(stream).await, expected(&request, choice, 64));
    }
    assert_eq!(read_all(unread).await, expected(&request, 0, 64));
    drop(handle);
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown, "without handles there is nothing to wait for");
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown);
}

#[tokio::test]
async fn the_queue_is_full_at_exactly_its_size_and_a_place_comes_back() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 3));
    let running = submit(&handle, request(&[1], 1));
    reached.recv().expect("it runs");
    let waiting = submit(&handle, request(&[2], 1));
    let permits = [handle.reserve(), handle.reserve()];
    assert!(permits.iter().all(Result::is_ok));
    assert_eq!(handle.reserve().err(), Some(SubmitError::QueueFull));
    let status = handle.status();
    assert_eq!((status.running, status.waiting, status.max_waiting, status.alive), (1, 3, 3, true));
    drop(permits);
    assert_eq!(handle.status().waiting, 1, "a permit that is dropped gives its place back");
    open.send(()).expect("the engine waits");
    assert_eq!(last(running).await, Some(SequenceEvent::Finished(FinishReason::Length)));
    reached.recv().expect("the next one runs");
    assert_eq!(handle.status().waiting, 0, "what runs does not wait");
    open.send(()).expect("the engine waits");
    assert_eq!(last(waiting).await, Some(SequenceEvent::Finished(FinishReason::Length)));
}

#[tokio::test]
async fn a_stream_that_is_dropped_while_it_waits_gives_its_place_back() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 2));
    let running = submit(&handle, request(&[1], 2));
    reached.recv().expect("it runs");
    drop([submit(&handle, request(&[2], 1)), submit(&handle, request(&[3], 1))]);
    open.send(()).expect("the engine waits");
    reached.recv().expect("the second step, so the round between them is over");
    assert_eq!(handle.status().waiting, 0);
    open.send(()).expect("the engine waits");
    assert_eq!(last(running).await, Some(SequenceEvent::Finished(FinishReason::Length)));
}

#[tokio::test]
async fn what_does_not_fit_or_is_not_finite_fails_alone() {
    let (handle, _thread) = start(&config(4, 8));
    let invalid = [SequenceEvent::Failed(EngineError::Invalid)];
    for bad in [request(&[], 1), request(&[0; 64], 1), request(&[64], 1)] {
        assert_eq!(read_all(submit(&handle, bad)).await, invalid);
    }
    let scored = submit(&handle, request(&[0; 64], 0));
    assert_eq!(
        last(scored).await,
        Some(SequenceEvent::Finished(FinishReason::Length)),
        "scoring a full context is fine"
    );
    let poisoned = submit(&handle, request(&[POISON.0], 5));
    let healthy = submit(&handle, request(&[1, 2], 5));
    assert_eq!(last(poisoned).await, Some(SequenceEvent::Failed(EngineError::NotFinite)));
    assert_eq!(read_all(healthy).await, expected(&request(&[1, 2], 5), 0, 64));
    let late = GenerationRequest { deadline: Instant::now(), ..request(&[1], 5) };
    assert_eq!(read_all(submit(&handle, late)).await, [SequenceEvent::Failed(EngineError::Timeout)]);
}

#[tokio::test]
async fn death_is_loud() {
    let (handle, mut thread, open, reached) = start_gated(&config(1, 4));
    let running = submit(&handle, request(&[1], 2));
    reached.recv().expect("it runs");
    let fatal = submit(&handle, request(&[PANIC.0], 1));
    let waiting = submit(&handle, request(&[1], 1));
    let permit = handle.reserve().expect("a place");
    drop(open);
    assert_eq!(last(running).await, Some(SequenceEvent::Finished(FinishReason::Length)));
    let stopped = Some(SequenceEvent::Failed(EngineError::Stopped));
    assert_eq!(last(fatal).await, stopped);
    assert_eq!(last(waiting).await, stopped);
    assert!(!handle.status().alive, "nobody learns of the end before the status says so");
    assert!(matches!(thread.stopped().await, EngineEnd::Died(message) if message.contains("the fake model panics")));
    assert_eq!(permit.submit(request(&[1], 1)).err(), Some(SubmitError::Stopped));
    assert_eq!(handle.reserve().err(), Some(SubmitError::Stopped));
    assert_eq!(handle.status().waiting, 0);
}

#[tokio::test]
async fn a_shutdown_ends_what_is_left() {
    let (handle, mut thread, open, reached) = start_gated(&config(1, 4));
    let running = submit(&handle, request(&[1], 50));
    reached.recv().expect("it runs");
    let waiting = submit(&handle, request(&[1], 1));
    handle.shutdown();
    handle.shutdown();
    assert_eq!(handle.reserve().err(), Some(SubmitError::Stopped));
    open.send(()).expect("the engine waits");
    let shutting_down = Some(SequenceEvent::Failed(EngineError::ShuttingDown));
    assert_eq!(last(running).await, shutting_down);
    assert_eq!(last(waiting).await, shutting_down);
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown);
    let status = handle.status();
    assert_eq!((status.alive, status.running, status.waiting), (false, 0, 0));
}

#[tokio::test]
async fn an_idle_engine_hears_a_shutdown_and_is_never_stalled() {
    let (handle, mut thread) = start(&config(1, 1));
    assert_eq!(handle.status().stalled_seconds, 0.0);
    handle.shutdown();
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown);
}

#[tokio::test]
async fn work_without_a_step_is_a_stall() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 1));
    let stream = submit(&handle, request(&[1], 1));
    reached.recv().expect("it runs");
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(handle.status().stalled_seconds > 0.0);
    assert!((1..=60).contains(&handle.status().retry_after_seconds));
    open.send(()).expect("the engine waits");
    assert!(last(stream).await.is_some());
}

#[test]
fn limits_without_room_are_refused() {
    let good = config(1, 1);
    for bad in [
        EngineConfig { max_num_seqs: 0, ..good.clone() },
        EngineConfig { max_num_batched_tokens: 0, ..good.clone() },
        EngineConfig { max_queue: 0, ..good.clone() },
        EngineConfig { max_model_len: 0, ..good.clone() },
        EngineConfig { num_kv_blocks: 3, ..good.clone() },
    ] {
        let started = Engine::start_with(FakeExecutor::new(&good), &bad, metrics());
        assert!(matches!(started.err(), Some(StartError::Config(_))), "{bad:?}");
    }
    let dying = FakeExecutor::choosing(&good, |_| panic!("no first token"));
    let started = Engine::start_with(dying, &good, metrics());
    assert!(matches!(started.err(), Some(StartError::WarmUp(EngineEnd::Died(message))) if message == "no first token"));
}
