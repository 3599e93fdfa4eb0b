//! The engine thread: drain, drop cancelled, schedule, execute, update, emit.

use bitnet_core::{Model, kv_cache::KvDtype, threads::WorkerPool};

use super::EngineHandle;

/// What the engine may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences computed in one step.
    pub max_num_seqs: usize,
    /// Most rows computed in one step, prompt chunks and generated tokens together.
    pub max_num_batched_tokens: usize,
    /// Most requests that may wait.
    pub max_queue: usize,
    /// Most tokens of a sequence, prompt and output together.
    pub max_model_len: usize,
    /// Blocks of the KV cache; one full context has to fit.
    pub num_kv_blocks: usize,
    /// Type of the KV cache.
    pub kv_dtype: KvDtype,
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
        config: EngineConfig,
    ) -> Result<(EngineHandle, EngineThread), StartError> {
        let _ = (model, pool, config);
        unimplemented!()
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
}

/// The engine thread as the binary sees it: something to wait for.
#[derive(Debug)]
pub struct EngineThread {}

impl EngineThread {
    /// Waits until the thread has ended. Cancel-safe.
    pub async fn stopped(&mut self) -> EngineEnd {
        unimplemented!()
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
