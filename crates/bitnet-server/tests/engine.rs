//! The engine over a real (small) model: an answer is the same to the bit alone and in a crowd, whatever the budget, the
//! number of threads, however often a sequence is preempted, and whatever of its prompt was in the prefix cache.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_core::{
    LoadOptions, Model, TokenId, checkpoint,
    checkpoint::Pooling,
    kernels,
    kv_cache::KvDtype,
    model::ModelOptions,
    sampling::{SamplingParams, TokenMask},
    threads::WorkerPool,
};
use bitnet_server::{
    config::{ClientId, PrefixSharing, Speculation},
    engine::{
        ConstraintFailed, Draft, Engine, EngineConfig, EngineError, EngineHandle, FinishReason, GenerationRequest,
        MAX_DRAFT, OutputRule, SequenceEvent, SequenceStream, TokenConstraint,
    },
    metrics::{Metrics, MetricsLimits},
};

const VOCAB_SIZE: usize = 512;

fn start(num_threads: usize, config: &EngineConfig) -> EngineHandle {
    start_measured(num_threads, config).0
}

fn start_measured(num_threads: usize, config: &EngineConfig) -> (EngineHandle, Arc<Metrics>) {
    start_model(num_threads, config, &ModelOptions::default())
}

fn start_model(num_threads: usize, config: &EngineConfig, options: &ModelOptions) -> (EngineHandle, Arc<Metrics>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/public/p1_packed");
    let checkpoint = checkpoint::open(&path, &LoadOptions::default()).expect("a golden checkpoint");
    let mut pool = WorkerPool::new(num_threads);
    let kernel = kernels::select("auto").expect("there is always one");
    let model = Model::load_with(&checkpoint, kernel, options, &mut pool, &|_, _| {}).expect("a good checkpoint");
    let metrics = Arc::new(Metrics::new("p1", MetricsLimits { max_num_seqs: 8, max_queue: 64 }));
    (Engine::start(model, pool, config, Arc::clone(&metrics)).expect("a small engine").0, metrics)
}

fn roomy() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_queue: 64,
        max_queue_tokens: usize::MAX,
        max_model_len: 128,
        num_kv_blocks: 64,
        kv_dtype: KvDtype::F16,
        prefix_sharing: PrefixSharing::PerClient,
        speculation: Speculation::Auto,
    }
}

/// Greedy, sampled, filtered, penalised, scored: one of each, of different lengths.
fn requests() -> Vec<GenerationRequest> {
    let sampled = |seed| SamplingParams { seed, ..SamplingParams::default() };
    let sampling = [
        SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        sampled(1),
        SamplingParams { top_p: 0.8, temperature: 1.3, ..sampled(2) },
        SamplingParams { top_k: 5, min_p: 0.01, ..sampled(3) },
        SamplingParams { frequency_penalty: 1.0, repetition_penalty: 1.2, ..sampled(4) },
        SamplingParams { logit_bias: vec![(TokenId(7), 5.0)], ..sampled(-5) },
    ];
    let now = Instant::now();
    (1_u32..)
        .zip(sampling)
        .map(|(number, sampling)| GenerationRequest {
            prompt: (0..number * 11).map(|i| TokenId((i * 37 + number * 101) % 500)).collect(),
            sampling: sampling.validated(VOCAB_SIZE).expect("inside every range"),
            num_choices: 1 + number % 2,
            max_tokens: if number == 6 { 0 } else { 60 },
            min_tokens: number as usize,
            stop_tokens: Arc::new([TokenId(501), TokenId(509)]),
            logprobs: (number % 2 == 0).then_some(3),
            prompt_logprobs: (number % 3 == 0).then_some(2),
            cache_prompt: true,
            priority: 0,
            client: ClientId::local(),
            constraint: None,
            pooling: None,
            prediction: Arc::new([]),
            deadline: Some(now + Duration::from_secs(600)),
            arrival: now,
        })
        .collect()
}

fn submit(handle: &EngineHandle, request: &GenerationRequest) -> Vec<SequenceStream> {
    handle.reserve().expect("a place").submit(request.clone()).expect("the engine lives")
}

/// The answer of each choice, and how many tokens of prompts came from the prefix cache: the only thing neighbours show in.
async fn read_all(streams: Vec<SequenceStream>) -> (Vec<Vec<SequenceEvent>>, Vec<usize>) {
    let (mut answers, mut cached) = (Vec::new(), Vec::new());
    for mut stream in streams {
        let mut events = Vec::new();
        loop {
            events.push(stream.next().await);
            match events.last_mut() {
                Some(SequenceEvent::PromptDone { cached_tokens, .. }) => cached.push(std::mem::take(cached_tokens)),
                Some(SequenceEvent::Finished(_)) => break,
                Some(SequenceEvent::Failed(error)) => panic!("{error}"),
                _ => {}
            }
        }
        answers.push(events);
    }
    (answers, cached)
}

#[tokio::test]
async fn an_answer_never_depends_on_its_neighbours() {
    let handle = start(1, &roomy());
    let requests = requests();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(read_all(submit(&handle, request)).await.0);
    }
    check_shapes(&requests, &alone);

    // Eight blocks hold one context: sequences that start together outgrow them and preempt each other.
    let crowded = EngineConfig { max_num_batched_tokens: 5, num_kv_blocks: 8, ..roomy() };
    for (num_threads, config) in [(2, roomy()), (1, crowded)] {
        let handle = start(num_threads, &config);
        let streams: Vec<_> = requests.iter().rev().map(|request| submit(&handle, request)).collect();
        for (streams, alone) in streams.into_iter().rev().zip(&alone) {
            assert_eq!(&read_all(streams).await.0, alone, "{config:?}");
        }
    }
}

#[tokio::test]
async fn the_prefix_cache_changes_no_bit() {
    let cold = start(1, &EngineConfig { prefix_sharing: PrefixSharing::Off, ..roomy() });
    let warm = start(1, &roomy());
    for request in requests() {
        let (expected, computed) = read_all(submit(&cold, &request)).await;
        // The choices of one request share its prompt even then.
        let shared = if request.prompt_logprobs.is_some() { 0 } else { (request.prompt.len() - 1) / 16 * 16 };
        assert_eq!(computed[0], 0);
        assert!(computed[1..].iter().all(|cached| *cached == shared));
        for first in [0, shared] {
            let (answer, cached) = read_all(submit(&warm, &request)).await;
            assert_eq!(answer, expected);
            assert_eq!(cached[0], first);
        }
        // A conversation that goes on: the answer's own blocks are found too.
        let mut next = request.clone();
        next.prompt_logprobs = None;
        next.prompt.extend(expected[0].iter().filter_map(|event| match event {
            SequenceEvent::Token(token) => Some(token.token),
            _ => None,
        }));
        (next.max_tokens, next.min_tokens) = (2, 0);
        let (expected, _) = read_all(submit(&cold, &next)).await;
        let (answer, cached) = read_all(submit(&warm, &next)).await;
        assert_eq!(answer, expected);
        assert_eq!(cached[0], (next.prompt.len() - 1) / 16 * 16);
        let other = GenerationRequest { client: ClientId::from_address([10, 0, 0, 1].into()), ..next.clone() };
        let (answer, cached) = read_all(submit(&warm, &other)).await;
        assert_eq!((answer, cached[0]), (expected, 0), "nobody finds another's");
    }
}

/// Both kinds of vectors of each prompt.
fn vector_requests() -> Vec<GenerationRequest> {
    let vector = |pooling| {
        let of = move |request| GenerationRequest {
            pooling: Some(pooling),
            num_choices: 1,
            max_tokens: 0,
            prompt_logprobs: None,
            ..request
        };
        requests().into_iter().map(of)
    };
    vector(Pooling::Mean).chain(vector(Pooling::Last)).collect()
}

#[tokio::test]
async fn a_vector_never_depends_on_its_neighbours_nor_on_the_cache() {
    let handle = start(1, &EngineConfig { prefix_sharing: PrefixSharing::Off, ..roomy() });
    let requests = vector_requests();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(read_all(submit(&handle, request)).await.0);
    }
    for events in alone.iter().flatten() {
        let SequenceEvent::PromptDone { embedding: Some(vector), .. } = &events[0] else { panic!("{events:?}") };
        let length: f32 = vector.iter().map(|value| value * value).sum();
        assert!(vector.len() == 256 && (length - 1.0).abs() < 1e-5, "{length}");
        assert_eq!(events[1..], [SequenceEvent::Finished(FinishReason::Length)]);
    }
    assert_ne!(alone[0], alone[6], "the mean is not the last");

    // Beside sequences that generate, in chunks of five, on blocks that do not suffice for all.
    let crowded = EngineConfig { max_num_batched_tokens: 5, num_kv_blocks: 8, ..roomy() };
    for (num_threads, config) in [(2, roomy()), (1, crowded)] {
        let handle = start(num_threads, &config);
        let texts: Vec<_> = self::requests().iter().map(|request| submit(&handle, request)).collect();
        let streams: Vec<_> = requests.iter().rev().map(|request| submit(&handle, request)).collect();
        for (streams, alone) in streams.into_iter().rev().zip(&alone) {
            assert_eq!(&read_all(streams).await.0, alone, "{config:?}");
        }
        for streams in texts {
            read_all(streams).await;
        }
    }

    let warm = start(1, &roomy());
    for (request, alone) in requests.iter().zip(&alone) {
        read_all(submit(&warm, request)).await;
        let (answer, cached) = read_all(submit(&warm, request)).await;
        let found = if request.pooling == Some(Pooling::Last) { (request.prompt.len() - 1) / 16 * 16 } else { 0 };
        assert_eq!((&answer, cached[0]), (alone, found), "a mean needs every row, the last one only itself");
    }
}

/// What a metric comes to over its labels.
fn counted(metrics: &Metrics, name: &str) -> f64 {
    let text = metrics.render();
    let of_name = text.lines().filter(|line| line.starts_with(name));
    of_name.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// The tokens of one choice.
fn tokens_of(events: &[SequenceEvent]) -> Vec<TokenId> {
    let token = |event: &SequenceEvent| match event {
        SequenceEvent::Token(token) => Some(token.token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[tokio::test]
async fn speculation_changes_no_bit() {
    let off = start(1, &EngineConfig { speculation: Speculation::Off, ..roomy() });
    let crowded = EngineConfig { max_num_batched_tokens: 9, num_kv_blocks: 12, ..roomy() };
    for (num_threads, config) in [(2, roomy()), (1, crowded)] {
        let (always, metrics) =
            start_measured(num_threads, &EngineConfig { speculation: Speculation::Always, ..config });
        let auto = start(num_threads, &config);
        let mut running = Vec::new();
        for mut request in requests() {
            let (expected, _) = read_all(submit(&off, &request)).await;
            // What the first choice says, with a word changed in the middle: guesses come true, and some do not.
            let mut prediction = tokens_of(&expected[0]);
            if prediction.len() > 8 {
                prediction[7] = TokenId(3);
            }
            request.prediction = prediction.into();
            running.push((submit(&always, &request), submit(&auto, &request), expected));
        }
        for (always, auto, expected) in running {
            assert_eq!(read_all(always).await.0, expected, "{config:?}");
            assert_eq!(read_all(auto).await.0, expected, "{config:?}");
        }
        let accepted = counted(&metrics, "bitnet_speculation_accepted_tokens_total");
        assert!(
            accepted > 50.0 && counted(&metrics, "bitnet_speculation_drafted_tokens_total") > accepted,
            "{accepted}"
        );
    }
}

/// A rule that leaves a choice of 64 tokens, three times in a row, then none, nineteen times.
#[derive(Debug)]
struct Pattern;

#[derive(Debug, Default)]
struct PatternState {
    position: u32,
    mask: TokenMask,
    draft: Draft,
}

impl OutputRule for Pattern {
    fn start(&self) -> Box<dyn TokenConstraint> {
        Box::new(PatternState::default())
    }

    fn identity(&self) -> &[u8] {
        b"pattern"
    }
}

impl PatternState {
    fn forced(position: u32) -> Option<TokenId> {
        (position % 22 >= 3).then_some(TokenId(position * 37 % 500))
    }
}

impl TokenConstraint for PatternState {
    fn allowed(&mut self) -> Result<&TokenMask, ConstraintFailed> {
        let any = || TokenMask::from_words(vec![0, u32::MAX, u32::MAX]);
        self.mask = Self::forced(self.position).map_or_else(any, TokenMask::only);
        Ok(&self.mask)
    }

    fn upcoming(&mut self, _until: Instant) -> Option<&Draft> {
        let forced: Vec<_> = (self.position..).map_while(Self::forced).take(MAX_DRAFT).collect();
        self.draft.num_forced = forced.len();
        self.draft.tokens = forced;
        // One that comes true now and then, and one that is not even allowed.
        self.draft.tokens.extend([40, 499].map(TokenId));
        self.draft.tokens.truncate(MAX_DRAFT);
        Some(&self.draft)
    }

    fn accept(&mut self, _token: TokenId) {
        self.position += 1;
    }
}

#[tokio::test]
async fn forced_tokens_take_fewer_steps_and_change_no_bit() {
    let mut requests = requests();
    for request in &mut requests {
        request.min_tokens = 0;
        request.constraint = Some(Arc::new(Pattern));
    }
    let steps = |metrics: &Metrics| counted(metrics, "bitnet_engine_step_duration_seconds_count");
    let forced = |metrics: &Metrics| counted(metrics, "bitnet_speculation_forced_tokens_total");
    let (off, off_metrics) = start_measured(1, &EngineConfig { speculation: Speculation::Off, ..roomy() });
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(read_all(submit(&off, request)).await.0);
    }
    let steps_off = steps(&off_metrics);
    assert_eq!(forced(&off_metrics), 0.0);

    // One after the other, then at once: with room for all, with less than a run's, and with preemption.
    let tight = EngineConfig { max_num_batched_tokens: 11, num_kv_blocks: 8, ..roomy() };
    for (num_threads, config, at_once) in [(2, roomy(), false), (1, roomy(), true), (1, tight, true)] {
        let always = EngineConfig { speculation: Speculation::Always, ..config };
        let (handle, metrics) = start_measured(num_threads, &always);
        if at_once {
            let streams: Vec<_> = requests.iter().map(|request| submit(&handle, request)).collect();
            for (streams, alone) in streams.into_iter().zip(&alone) {
                assert_eq!(&read_all(streams).await.0, alone, "{config:?}");
            }
        } else {
            for (request, alone) in requests.iter().zip(&alone) {
                assert_eq!(&read_all(submit(&handle, request)).await.0, alone);
            }
            assert!(steps(&metrics) < steps_off / 2.0, "{} steps instead of {steps_off}", steps(&metrics));
            assert!(forced(&metrics) > 100.0, "{}", forced(&metrics));
        }
    }
}

/// A rule that allows three tokens, most tokens, and all but a few, in turn.
#[derive(Debug)]
struct Widths;

#[derive(Debug, Default)]
struct WidthsState {
    position: usize,
    mask: TokenMask,
    draft: Draft,
}

impl OutputRule for Widths {
    fn start(&self) -> Box<dyn TokenConstraint> {
        Box::new(WidthsState::default())
    }

    fn identity(&self) -> &[u8] {
        b"widths"
    }
}

impl TokenConstraint for WidthsState {
    fn allowed(&mut self) -> Result<&TokenMask, ConstraintFailed> {
        let word = [1 << 9, 0x5bd1_e995, !8][self.position % 3];
        let num_words = if self.position.is_multiple_of(3) { 3 } else { VOCAB_SIZE / 32 };
        self.mask = TokenMask::from_words(vec![word; num_words]);
        Ok(&self.mask)
    }

    fn upcoming(&mut self, _until: Instant) -> Option<&Draft> {
        self.draft.tokens = [9, 41, 73].map(TokenId)[self.position % 3..].to_vec();
        Some(&self.draft)
    }

    fn accept(&mut self, _token: TokenId) {
        self.position += 1;
    }
}

#[tokio::test]
async fn the_screen_of_the_head_changes_no_bit() {
    let with_screen = ModelOptions { min_screened_vocab: 1, ..ModelOptions::default() };
    let off = EngineConfig { speculation: Speculation::Off, ..roomy() };
    let always = EngineConfig { speculation: Speculation::Always, ..roomy() };
    let plain = start(1, &off);
    let screened = [off, always].map(|config| start_model(2, &config, &with_screen).0);
    let mut all = Vec::new();
    for rule in [None, Some(Arc::new(Widths) as Arc<dyn OutputRule>)] {
        for mut request in requests() {
            request.min_tokens = 0;
            request.constraint = rule.clone();
            let (expected, _) = read_all(submit(&plain, &request)).await;
            all.push((request, expected));
        }
    }
    for screened in &screened {
        // At once, so that rows of every kind are read together.
        let running: Vec<_> = all.iter().map(|(request, _)| submit(screened, request)).collect();
        for (streams, (_, expected)) in running.into_iter().zip(&all) {
            assert_eq!(&read_all(streams).await.0, expected);
        }
    }
    // Whether somebody asks for probabilities decides which logits are read, and not which token comes.
    for (mut request, expected) in all {
        request.logprobs = request.logprobs.xor(Some(0));
        request.prompt_logprobs = None;
        let (asked, _) = read_all(submit(&screened[1], &request)).await;
        for (asked, expected) in asked.iter().zip(&expected) {
            assert_eq!(tokens_of(asked), tokens_of(expected));
        }
    }
}

/// The answers are about something: prompts scored, tokens with alternatives, choices that differ.
fn check_shapes(requests: &[GenerationRequest], answers: &[Vec<Vec<SequenceEvent>>]) {
    for (request, choices) in requests.iter().zip(answers) {
        for events in choices {
            let SequenceEvent::PromptDone { logprobs, .. } = &events[0] else { panic!("the prompt comes first") };
            assert_eq!(logprobs.as_ref().map(Vec::len), request.prompt_logprobs.map(|_| request.prompt.len()));
            if let Some(entries) = logprobs {
                assert!(entries[0].is_none());
                assert!(entries[1..].iter().flatten().all(|entry| entry.logprob < 0.0 && entry.top.len() == 2));
                assert_eq!(entries.iter().flatten().count(), request.prompt.len() - 1);
            }
            let tokens = events.iter().filter_map(|event| match event {
                SequenceEvent::Token(token) => Some(token),
                _ => None,
            });
            let tokens: Vec<_> = tokens.collect();
            assert!(tokens.len() >= request.min_tokens.min(request.max_tokens));
            assert!(
                tokens.iter().all(|token| token.logprobs.as_ref().map(|entry| entry.top.len()) == request.logprobs)
            );
        }
        if request.num_choices == 2 && request.max_tokens > 0 && request.sampling.temperature > 0.0 {
            assert_ne!(choices[0], choices[1], "each choice has its own noise");
        }
    }
}

#[tokio::test]
async fn a_token_outside_the_vocabulary_fails_its_request_alone() {
    let handle = start(1, &roomy());
    let mut bad = requests().remove(0);
    bad.prompt.push(TokenId(VOCAB_SIZE as u32));
    let mut streams = submit(&handle, &bad);
    let good = submit(&handle, &requests()[1]);
    assert_eq!(streams[0].next().await, SequenceEvent::Failed(EngineError::Invalid));
    read_all(good).await;
    assert!(handle.status().alive);
}
