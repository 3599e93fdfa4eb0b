//! The whole loop over a fake model, driven by seeds: budgets, blocks, one end for everybody, and the same tokens whatever
//! happens around them.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_core::{BlockId, TokenId, checkpoint::Pooling, kv_cache::KvDtype};

use super::{
    super::{
        EngineConfig, EngineError, EngineHandle, GenerationRequest, SequenceEvent, SequenceStream, SubmitError,
        handle::Shared,
        testing::{DRAWN_IDS, FakeExecutor, POISON, metrics, request},
        thread::EngineLoop,
    },
    client, expected,
};
use crate::config::{PrefixSharing, Speculation};

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

/// Takes out of `events` what depends on the neighbours, after a look at it: how much of the prompt was cached.
fn take_cached_tokens(events: &mut [SequenceEvent], request: &GenerationRequest) -> usize {
    let Some(SequenceEvent::PromptDone { cached_tokens, .. }) = events.first_mut() else { return 0 };
    let cached = std::mem::take(cached_tokens);
    let whole = cached.is_multiple_of(16) || (cached + 1 == request.prompt.len() && (cached + 1).is_multiple_of(16));
    assert!(cached < request.prompt.len() && whole, "whole blocks, and never the last token");
    let needs_all = request.prompt_logprobs.is_some() || request.pooling == Some(Pooling::Mean);
    assert!(cached == 0 || !needs_all, "a prompt of which every row matters is computed");
    cached
}

struct Simulation {
    chance: Chance,
    config: EngineConfig,
    longest_prompt: usize,
    engine: EngineLoop<FakeExecutor>,
    handle: EngineHandle,
    began: Instant,
    round: u64,
    /// Microseconds beside the rounds.
    ticks: Cell<u64>,
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
            speculation: [Speculation::Off, Speculation::Auto, Speculation::Always][chance.below(3)],
        };
        let shared = Arc::new(Shared::new(&config, metrics()));
        let (handle, commands) = EngineHandle::new(Arc::clone(&shared));
        let engine = EngineLoop::new(FakeExecutor::new(&config), &config, commands, shared, metrics());
        let longest_prompt = 1 + chance.below(config.max_model_len);
        let (ticks, streams) = (Cell::new(0), Vec::new());
        Self { chance, config, longest_prompt, engine, handle, began: Instant::now(), round: 0, ticks, streams }
    }

    /// Time is a second a round, and a step takes some microseconds of it.
    fn now(began: Instant, round: u64, ticks: &Cell<u64>) -> Instant {
        ticks.set(ticks.get() + 10 + ticks.get() % 3);
        began + Duration::from_secs(round) + Duration::from_micros(ticks.get())
    }

    /// What somebody thinks that the first choice will say: what it would, with errors.
    fn prediction(&mut self, request: &GenerationRequest) -> Arc<[TokenId]> {
        let mut said: Vec<_> = expected(request, 0, self.config.max_model_len)
            .into_iter()
            .filter_map(|event| match event {
                SequenceEvent::Token(event) => Some(event.token),
                _ => None,
            })
            .collect();
        for _ in 0..self.chance.below(4) {
            let at = self.chance.below(said.len() + 1);
            if self.chance.below(2) == 0 {
                said.truncate(at);
            } else {
                // Now and then an id that is none.
                said.insert(at, TokenId(self.chance.below(DRAWN_IDS as usize + 10) as u32));
            }
        }
        said.into()
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
        if chance.below(8) == 0 {
            request.pooling = Some([Pooling::Mean, Pooling::Last][chance.below(2)]);
            (request.max_tokens, request.prompt_logprobs) = (0, None);
        }
        request.deadline = Some(self.began + Duration::from_secs(self.round + lifetime));
        request.priority = chance.below(3) as i64;
        let (probes, predicts) = (chance.below(10) == 0, chance.below(3) == 0);
        if predicts {
            request.prediction = self.prediction(&request);
        }
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
        let request = request(&[1], 1);
        if let Ok(mut streams) = self.handle.probe(request.clone()) {
            self.streams.push((Arc::new(request), 0, streams.remove(0)));
        }
    }

    /// One round of the engine thread's loop, and what must hold after each.
    fn turn(&mut self) {
        self.round += 1;
        self.engine.drain();
        if self.engine.has_work() {
            let Self { engine, began, round, ticks, .. } = self;
            engine.turn(&|| Self::now(*began, *round, ticks));
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

    /// How often somebody was preempted, how many tokens of prompts came from the cache, and how many guesses came true.
    fn run(mut self) -> (u64, usize, usize) {
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
        let num_true = self.engine.executor().num_true;
        assert!(self.config.speculation != Speculation::Off || num_true == 0, "off guesses nothing");
        (self.engine.scheduler().num_preemptions(), cached, num_true)
    }
}

#[test]
fn simulation_keeps_every_promise() {
    let (mut preemptions, mut cached, mut num_true) = (0, 0, 0);
    for seed in 0..10_000 {
        let run = std::panic::catch_unwind(|| Simulation::new(seed).run());
        let run = run.unwrap_or_else(|_| panic!("seed {seed}"));
        preemptions += run.0;
        cached += run.1;
        num_true += run.2;
    }
    assert!(preemptions > 2500, "{preemptions} preemptions prove little about recomputation");
    assert!(cached > 50_000, "{cached} cached tokens prove little about the prefix cache");
    assert!(num_true > 50_000, "{num_true} guesses that came true prove little about speculation");
}
