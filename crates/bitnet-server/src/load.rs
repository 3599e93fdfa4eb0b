//! Model file -> a running service: checkpoint, tokenizer, repacked weights, memory plan, engine. Blocking work for a
//! thread of its own; `bitnet run` takes the same way as `bitnet serve`.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_core::{
    Checkpoint, LoadError, LoadOptions, Model, TokenId, Tokenizer, checkpoint,
    checkpoint::{FileSummary, GenerationDefaults, I2sLayout, ModelConfig, Pooling, TokenizerSource},
    kernels::{self, KernelError, TernaryKernel, packing::PackedLayout},
    kv_cache::{BLOCK_TOKENS, KvCache},
    model::{ModelOptions, SparseFfn, Workspace},
    threads::WorkerPool,
    tokenizer::TokenizerError,
};
use sha2::{Digest, Sha256};

use crate::{
    config::{ConfigError, MemoryRequest, ServerConfig, detected_memory_limit, memory_plan},
    engine::{Engine, EngineConfig, EngineThread, StartError, lookup::MAX_GUESSES},
    filter::ContentFilter,
    metrics::{Metrics, ModelInfo},
    prompt::{ChatPrompter, PromptError},
    service::{ModelCard, ModelNames, Parts, RequestRules, Service, unix_seconds},
};

/// Name of the model that is served when none is given, unless `--model-name` says otherwise.
pub const BUILT_IN_MODEL_NAME: &str = "tiny-random";

/// What loading depends on beside the file.
#[derive(Clone, Debug)]
pub struct LoadSettings {
    /// Compute threads.
    pub threads: usize,
    /// Kernel by name; `None`: the fastest this CPU has.
    pub kernel: Option<String>,
    /// Arrangement of the weights; `None` measures which is the fastest.
    pub packing: Option<PackedLayout>,
    /// Copies of weights that let a single stream skip channels.
    pub sparse_ffn: SparseFfn,
    /// Physical layout of I2_S tensors.
    pub i2s_layout: I2sLayout,
}

impl LoadSettings {
    /// Those of `config`.
    pub fn of(config: &ServerConfig) -> Self {
        Self {
            threads: config.threads,
            kernel: config.kernel.clone(),
            packing: config.packing,
            sparse_ffn: config.sparse_ffn,
            i2s_layout: config.i2s_layout,
        }
    }
}

/// A model in memory, not yet running.
#[derive(Debug)]
pub struct LoadedModel {
    /// Its name where none is configured: the file's or directory's without extension.
    pub name: String,
    /// What people should know about it, for `/v1/models`.
    pub description: Option<String>,
    /// Weights.
    pub model: Model,
    /// The threads that packed them and will run them.
    pub pool: WorkerPool,
    /// Tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Jinja source, if the file has one.
    pub chat_template: Option<String>,
    /// End-of-sequence token, for the template.
    pub eos: Option<TokenId>,
    /// Sampling defaults and stop tokens.
    pub generation: GenerationDefaults,
    /// Set for an embedding model.
    pub pooling: Option<Pooling>,
    /// For the metrics.
    pub info: ModelInfo,
    /// Every kernel of this CPU, and whether it passed its self-test.
    pub kernels: Vec<(&'static str, bool)>,
    /// Bytes of all weight files.
    pub file_bytes: u64,
    /// How long it took.
    pub load_time: Duration,
}

/// Why there is no running model.
#[derive(Debug, thiserror::Error)]
pub enum LoadFailure {
    /// The file is not there, broken or not supported.
    #[error(transparent)]
    Checkpoint(#[from] LoadError),
    /// The kernel asked for does not exist or this CPU lacks it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The file has no tokenizer.
    #[error("the model has no tokenizer: put tokenizer.json beside its weights, or use a GGUF file that holds one")]
    NoTokenizer,
    /// The tokenizer is broken.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template is broken.
    #[error(transparent)]
    Template(#[from] PromptError),
    /// A setting does not fit the model, memory included.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] StartError),
}

/// Loads the model at `path`. `progress(done, total)` is called while weights are repacked.
///
/// # Errors
/// [`LoadFailure`].
pub fn load_model(
    path: &Path,
    settings: &LoadSettings,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<LoadedModel, LoadFailure> {
    let start = Instant::now();
    let checkpoint = checkpoint::open(path, &LoadOptions { i2s_layout: settings.i2s_layout })?;
    let mut loaded = load_checkpoint(checkpoint, default_model_name(path), settings, progress)?;
    loaded.load_time = start.elapsed();
    Ok(loaded)
}

/// Loads an open checkpoint under `name`.
///
/// # Errors
/// [`LoadFailure`].
pub fn load_checkpoint(
    checkpoint: Checkpoint,
    name: String,
    settings: &LoadSettings,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<LoadedModel, LoadFailure> {
    let start = Instant::now();
    for note in &checkpoint.notes {
        tracing::warn!("{note}");
    }
    let self_test = Instant::now();
    let tested = kernels::select_tested(settings.kernel.as_deref().unwrap_or("auto"))?;
    let (kernel, kernels_test) = (tested.kernel, self_test.elapsed());
    let packing = supported(settings.packing, kernel)?;
    let mut options = ModelOptions { packing, sparse_ffn: settings.sparse_ffn, ..ModelOptions::default() };
    if checkpoint.pooling.is_some() {
        // Nobody wants its logits.
        options.min_screened_vocab = usize::MAX;
    }
    let source = checkpoint.tokenizer.as_ref().ok_or(LoadFailure::NoTokenizer)?;
    let generation = checkpoint.generation.clone();
    let eos = match source {
        TokenizerSource::Gguf(vocabulary) => vocabulary.eos,
        TokenizerSource::HuggingFace { .. } => None,
    };
    let mut pool = WorkerPool::new(settings.threads);
    // The vocabulary is read beside the weights.
    let (tokenizer, model) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| Tokenizer::from_source(source));
        let model = Model::load_with(&checkpoint, kernel, &options, &mut pool, progress);
        (tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), model)
    });
    let (tokenizer, model) = (Arc::new(tokenizer?), model?);
    let self_test = Instant::now();
    model.self_test(&mut pool).map_err(|failure| KernelError::Unsound { name: kernel.name().to_owned(), failure })?;
    tracing::debug!(kernels = ?kernels_test, model = ?self_test.elapsed(), "boot self-test passed");
    let packing = model.packing().name();
    tracing::info!(kernel = kernel.name(), packing, threads = settings.threads, "model loaded");
    Ok(LoadedModel {
        name,
        description: None,
        model,
        pool,
        tokenizer,
        chat_template: checkpoint.chat_template,
        eos: eos.or(generation.stop_tokens.first().copied()),
        generation,
        pooling: checkpoint.pooling,
        info: model_info(&checkpoint.config, &checkpoint.summary),
        kernels: tested.results.iter().map(|(name, result)| (*name, result.is_ok())).collect(),
        file_bytes: checkpoint.summary.file_bytes,
        load_time: start.elapsed(),
    })
}

/// `packing`, if `kernel` can read it.
///
/// # Errors
/// [`ConfigError`] when it cannot: the fallback would be silent.
pub fn supported(
    packing: Option<PackedLayout>,
    kernel: &dyn TernaryKernel,
) -> Result<Option<PackedLayout>, ConfigError> {
    match packing {
        Some(layout) if !kernel.layouts().contains(&layout) => Err(ConfigError::Invalid {
            setting: "packing",
            value: layout.name().to_owned(),
            reason: format!("kernel {} cannot read it on this CPU", kernel.name()),
        }),
        supported => Ok(supported),
    }
}

/// The name of the model at `path`: its last part without the extension of a GGUF file.
pub fn default_model_name(path: &Path) -> String {
    let resolved = path.canonicalize();
    let path = if path.file_name().is_some() { path } else { resolved.as_deref().unwrap_or(path) };
    let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let name = if is_gguf { path.file_stem() } else { path.file_name() };
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Starts `loaded` by `config`: plans the memory, starts the engine, and puts the service together.
///
/// # Errors
/// [`LoadFailure`].
pub fn start_service(
    loaded: LoadedModel,
    config: &ServerConfig,
    filter: Option<ContentFilter>,
    metrics: &Arc<Metrics>,
) -> Result<(Service, EngineThread), LoadFailure> {
    let LoadedModel { name, description, model, pool, tokenizer, chat_template, eos, generation, kernels, .. } = loaded;
    let geometry = model.config().clone();
    let kernel = model.kernel_name();
    let limit_bytes = config.memory_limit_bytes.or_else(detected_memory_limit);
    metrics.set_memory_limit(limit_bytes.unwrap_or(0));
    let engine_config = engine_config(&model, config, limit_bytes)?;
    let max_model_len = engine_config.max_model_len;
    let prompter = ChatPrompter::new(Arc::clone(&tokenizer), chat_template.as_deref(), tokenizer.bos(), eos)?;

    metrics.set_model_info(&loaded.info);
    metrics.set_build_info(kernel);
    metrics.set_kernels(&kernels);
    metrics.set_model_load_seconds(loaded.load_time.as_secs_f64());
    let (engine, thread) = Engine::start(model, pool, &engine_config, Arc::clone(metrics))?;
    let identity = [env!("CARGO_PKG_VERSION"), &name, &geometry.architecture, &loaded.file_bytes.to_string()];
    let service = Service::new(Parts {
        card: ModelCard {
            names: ModelNames::new(&config.model_names, &name),
            created: unix_seconds(),
            description,
            max_model_len,
            vocab_size: geometry.vocab_size,
            pooling: loaded.pooling,
            kernel: kernel.to_owned(),
            failed_kernels: kernels.iter().filter(|(_, passed)| !passed).map(|(name, _)| (*name).to_owned()).collect(),
            fingerprint: fingerprint(&identity),
        },
        prompter,
        engine,
        stop_tokens: generation.stop_tokens,
        tokens_per_minute: config.rate_limit_tpm,
        rules: RequestRules {
            max_choices: config.max_n,
            vocab_size: geometry.vocab_size,
            temperature: config.sampling.temperature.or(generation.temperature).unwrap_or(1.0),
            top_p: config.sampling.top_p.or(generation.top_p).unwrap_or(1.0),
            top_k: generation.top_k.unwrap_or(0),
            max_tokens: config.sampling.max_tokens,
        },
        filter,
        response_cache_bytes: config.response_cache_bytes,
        request_timeout: config.request_timeout,
        metrics: Arc::clone(metrics),
    });
    Ok((service, thread))
}

fn engine_config(model: &Model, config: &ServerConfig, limit_bytes: Option<u64>) -> Result<EngineConfig, ConfigError> {
    let geometry = model.config();
    let max_model_len = config.ctx_size.unwrap_or(geometry.max_context);
    if max_model_len > geometry.max_context {
        return Err(ConfigError::Invalid {
            setting: "ctx-size",
            value: max_model_len.to_string(),
            reason: format!("the model's context is {} tokens", geometry.max_context),
        });
    }
    let weights = model.weight_bytes();
    let plan = memory_plan(&MemoryRequest {
        limit_bytes,
        weights_bytes: (weights.resident + weights.mapped) as u64,
        scratch_bytes: scratch_bytes(geometry, config, max_model_len),
        response_cache_bytes: config.response_cache_bytes as u64,
        block_bytes: KvCache::block_bytes(model, config.kv_dtype) as u64,
        block_tokens: BLOCK_TOKENS as u64,
        ctx_size: max_model_len as u64,
        kv_cache_bytes: config.kv_cache_bytes,
    })?;
    Ok(EngineConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_queue: config.max_queue,
        max_queue_tokens: config.max_queue_tokens,
        max_model_len,
        num_kv_blocks: usize::try_from(plan.num_kv_blocks).unwrap_or(usize::MAX),
        kv_dtype: config.kv_dtype,
        prefix_sharing: config.prefix_sharing,
        speculation: config.speculation,
    })
}

/// An estimate from above of the workspace: what a row needs between embedding and logits, and the scores of attention.
fn scratch_bytes(geometry: &ModelConfig, config: &ServerConfig, max_model_len: usize) -> u64 {
    const F32: usize = 4;
    let row = 8 * geometry.hidden_size + 4 * geometry.intermediate_size;
    let scores = config.threads * max_model_len * geometry.num_heads.div_ceil(geometry.num_kv_heads.max(1));
    let screened_rows = Workspace::MAX_SCREENED_ROWS.min(config.max_num_seqs * (1 + MAX_GUESSES));
    let logits = (Workspace::MAX_LOGIT_ROWS + 2 * screened_rows + 1) * geometry.vocab_size;
    (F32 * (config.max_num_batched_tokens * row + scores + logits)) as u64
}

fn model_info(geometry: &ModelConfig, summary: &FileSummary) -> ModelInfo {
    let ternary = ["I2_S", "TQ1_0", "TQ2_0", "U8"];
    let quantization = ternary.iter().find(|name| summary.tensors.iter().any(|tensor| tensor.encoding == **name));
    let first = || summary.tensors.first().map_or("", |tensor| tensor.encoding.as_str());
    ModelInfo {
        architecture: geometry.architecture.clone(),
        format: summary.format.clone(),
        quantization: quantization.map_or_else(first, |name| *name).to_owned(),
        sha256: String::new(),
    }
}

/// A short name for weights and version together; the kernel is no part of it, because it changes no answer.
fn fingerprint(identity: &[&str]) -> String {
    let digest = Sha256::digest(identity.join("\n").as_bytes());
    let hex: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("fp_{hex}")
}
