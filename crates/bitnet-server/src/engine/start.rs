//! The life of the engine: limits checked, memory taken, thread started, one token computed, and its end made known.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::Instant,
};

use bitnet_core::{
    BlockId, Model, TokenId,
    kv_cache::{BLOCK_TOKENS, KvCache, KvDtype},
    model::Workspace,
    sampling::SamplingParams,
    threads::WorkerPool,
};
use tokio::sync::oneshot;

use super::{
    EngineHandle, GenerationRequest,
    executor::{Executor, ModelExecutor},
    handle::Shared,
    scheduler::{ScheduledBatch, Share},
    sequence::{Sequence, SequenceId},
    thread::EngineLoop,
};
use crate::{
    config::{ClientId, PrefixSharing, Speculation},
    metrics::{MemoryKind, Metrics},
};

/// What the engine may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences computed in one step.
    pub max_num_seqs: usize,
    /// Most rows computed in one step, prompt chunks and generated tokens together.
    pub max_num_batched_tokens: usize,
    /// Most requests that may wait.
    pub max_queue: usize,
    /// Most prompt tokens of waiting requests.
    pub max_queue_tokens: usize,
    /// Most tokens of a sequence, prompt and output together.
    pub max_model_len: usize,
    /// Blocks of the KV cache; one full context has to fit.
    pub num_kv_blocks: usize,
    /// Type of the KV cache.
    pub kv_dtype: KvDtype,
    /// Who finds whose prefixes.
    pub prefix_sharing: PrefixSharing,
    /// When tokens are guessed and verified together.
    pub speculation: Speculation,
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Allocates the KV cache and the workspace, starts the thread, runs one token through it and returns. Blocks for
    /// that long: call it from a thread that may wait.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        model: Model,
        pool: WorkerPool,
        config: &EngineConfig,
        metrics: Arc<Metrics>,
    ) -> Result<(EngineHandle, EngineThread), StartError> {
        config.check()?;
        let kv = KvCache::new(&model, config.num_kv_blocks, config.kv_dtype)?;
        let kv_bytes = KvCache::block_bytes(&model, config.kv_dtype) * config.num_kv_blocks;
        let workspace = Workspace::new(&model, config.max_num_batched_tokens, config.max_model_len, pool);
        let weights = model.weight_bytes();
        metrics.set_kv_cache_config(BLOCK_TOKENS, config.num_kv_blocks, dtype_name(config.kv_dtype));
        metrics.set_memory(MemoryKind::KvCache, kv_bytes as u64);
        metrics.set_memory(MemoryKind::Scratch, workspace.bytes() as u64);
        metrics.set_memory(MemoryKind::Weights, (weights.resident + weights.mapped) as u64);
        Self::start_with(ModelExecutor::new(model, kv, workspace), config, metrics)
    }

    /// As [`Engine::start`], over any executor.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start_with(
        executor: impl Executor,
        config: &EngineConfig,
        metrics: Arc<Metrics>,
    ) -> Result<(EngineHandle, EngineThread), StartError> {
        config.check()?;
        let shared = Arc::new(Shared::new(config, Arc::clone(&metrics)));
        let (handle, commands) = EngineHandle::new(Arc::clone(&shared));
        let (say_end, end) = oneshot::channel();
        let (say_ready, ready) = mpsc::channel();
        let config = config.clone();
        let life = move || {
            let mut executor = executor;
            executor.enter_thread();
            warm_up(&mut executor);
            let engine = EngineLoop::new(executor, &config, commands, shared, metrics);
            // Nobody listens when the start was given up.
            let _ = say_ready.send(());
            engine.run();
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            // The state is moved into the closure, so nothing half-changed is seen after a panic; its drop ends all streams.
            let end = match catch_unwind(AssertUnwindSafe(life)) {
                Ok(()) => EngineEnd::Shutdown,
                Err(payload) => EngineEnd::Died(panic_message(&*payload)),
            };
            let _ = say_end.send(end.clone());
            end
        })?;
        match ready.recv() {
            Ok(()) => Ok((handle, EngineThread { end, ended: None })),
            Err(_) => Err(StartError::WarmUp(thread.join().unwrap_or_else(|_| without_a_word()))),
        }
    }
}

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A limit that leaves no room for work; usually a setting of 0, or a KV cache too small for one context.
    #[error("{0}")]
    Config(String),
    /// The operating system refused the memory of the KV cache, or the thread.
    #[error("the engine could not start: {0}")]
    Io(#[from] std::io::Error),
    /// The first token brought the engine down: a defect.
    #[error("the engine died on its first token: {0:?}")]
    WarmUp(EngineEnd),
}

/// The engine thread as the binary sees it: something to wait for.
#[derive(Debug)]
pub struct EngineThread {
    end: oneshot::Receiver<EngineEnd>,
    ended: Option<EngineEnd>,
}

impl EngineThread {
    /// Waits until the thread has ended. Cancel-safe, and may be asked again.
    pub async fn stopped(&mut self) -> EngineEnd {
        if self.ended.is_none() {
            self.ended = Some((&mut self.end).await.unwrap_or_else(|_| without_a_word()));
        }
        self.ended.clone().unwrap_or_else(without_a_word)
    }
}

/// Why the engine thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEnd {
    /// A shutdown was asked for, or every handle was dropped.
    Shutdown,
    /// It panicked: the process has to exit with 70.
    Died(String),
}

impl EngineConfig {
    fn check(&self) -> Result<(), StartError> {
        for (name, value) in [
            ("max-num-seqs", self.max_num_seqs),
            ("max-num-batched-tokens", self.max_num_batched_tokens),
            ("max-queue", self.max_queue),
            ("max-queue-tokens", self.max_queue_tokens),
            ("ctx-size", self.max_model_len),
        ] {
            if value == 0 {
                return Err(StartError::Config(format!("{name} must be at least 1")));
            }
        }
        let room = self.num_kv_blocks * BLOCK_TOKENS;
        if room < self.max_model_len {
            let message = format!("the KV cache holds {room} tokens, fewer than one context of {}", self.max_model_len);
            return Err(StartError::Config(message));
        }
        Ok(())
    }
}

/// Touches every weight once, before anybody waits for it. A model that gives NaN is served all the same: each request then
/// ends with an error of its own.
fn warm_up(executor: &mut impl Executor) {
    let now = Instant::now();
    let request = GenerationRequest {
        prompt: vec![TokenId(0)],
        sampling: SamplingParams::default(),
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
        deadline: None,
        arrival: now,
    };
    let mut sequence = Sequence::new(SequenceId(0), Arc::new(request), 0);
    sequence.block_table.push(BlockId(0));
    let batch = ScheduledBatch { shares: vec![Share { sequence: &sequence, num_tokens: 1, num_drafted: 0 }] };
    if let Some(Err(error)) = executor.execute(&batch, &|| true).and_then(|mut outputs| outputs.pop()) {
        tracing::warn!(%error, "the model's first token failed");
    }
    tracing::debug!(seconds = now.elapsed().as_secs_f64(), "warmed up");
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
        .to_owned()
}

fn without_a_word() -> EngineEnd {
    EngineEnd::Died("the thread ended without a word".to_owned())
}

fn dtype_name(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "f32",
        KvDtype::F16 => "f16",
        KvDtype::Int8 => "int8",
    }
}
