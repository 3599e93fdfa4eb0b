//! The routes over a scripted engine: bytes in, bytes out, without a socket or a model.

mod embeddings;
mod files;
mod hostile;
mod hostile_table;
mod openapi;
mod responses;
mod routes;
mod wire;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, StatusCode, header},
};
use bitnet_core::{
    TokenId, Tokenizer,
    checkpoint::{GgufVocabulary, Pooling, TokenizerSource},
    kv_cache::KvDtype,
    sampling::TokenLogprobs,
};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio::sync::Mutex;
use tower::ServiceExt;

use super::{HttpState, router};
use crate::{
    config::{FilterRules, PrefixSharing, RawConfig, ServerConfig},
    engine::{
        Engine, EngineConfig, EngineError, EngineThread, TokenEvent,
        executor::{Executor, StepOutput, StepOutputs},
        scheduler::ScheduledBatch,
    },
    filter::ContentFilter,
    metrics::{Metrics, MetricsLimits},
    prompt::ChatPrompter,
    service::{Lifecycle, ModelCard, ModelNames, Parts, RequestRules, Service},
    storage::{Storage, StorageLimits},
};

/// Ids 0..256 are the bytes in the order of their values.
const BOS: u32 = 256;
const EOT: u32 = 257;
const VOCAB: usize = 258;
/// A prompt that holds this byte gets logits that are not finite.
const POISON: u32 = 1;
const CONTEXT: usize = 256;

/// A server whose model always says the same.
struct Fixture {
    router: Router,
    state: Arc<HttpState>,
    hold: Arc<Mutex<()>>,
    _engine: Option<EngineThread>,
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// What a fixture differs in.
struct Setup {
    config: ServerConfig,
    script: Vec<u32>,
    /// Set when it is an embedding model.
    pooling: Option<Pooling>,
}

/// The engine's model: token `i` of every output is `script[i]`, then end of turn.
struct Script {
    says: Vec<u32>,
    /// Who holds it holds the engine.
    hold: Arc<Mutex<()>>,
}

impl Executor for Script {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn execute(&mut self, batch: &ScheduledBatch<'_>, _is_wanted: &dyn Fn() -> bool) -> Option<StepOutputs> {
        drop(self.hold.blocking_lock());
        let compute = |share: &crate::engine::scheduler::Share<'_>| {
            let (sequence, mut output) = (share.sequence, StepOutput::default());
            if sequence.request.prompt.contains(&TokenId(POISON)) {
                return Err(EngineError::NotFinite);
            }
            let end = sequence.num_computed_tokens + share.num_tokens;
            // The vector of a prompt is its last byte's direction.
            let angle = (sequence.tokens[end - 1].0 as f32).sin_cos();
            let wants_vector = sequence.request.pooling.is_some() && end == sequence.tokens.len();
            output.embedding = wants_vector.then(|| vec![angle.0, angle.1]);
            let logprobs =
                TokenLogprobs { logprob: -0.5, top: vec![(TokenId(65), -0.25), (TokenId(66), f32::NEG_INFINITY)] };
            let first = (sequence.num_computed_tokens + 1).min(end);
            if sequence.request.prompt_logprobs.is_some() && sequence.generated().is_empty() {
                let scored = first..sequence.prompt_len().min(end + 1);
                output.prompt_logprobs = scored.map(|_| logprobs.clone()).collect();
            }
            if end == sequence.tokens.len() && sequence.request.max_tokens > 0 {
                let token = self.says.get(sequence.generated().len()).copied().unwrap_or(EOT);
                let logprobs = sequence.request.logprobs.map(|_| logprobs);
                output.tokens.push(TokenEvent { token: TokenId(token), logprobs });
            }
            Ok(output)
        };
        Some(batch.shares.iter().map(compute).collect())
    }
}

impl Setup {
    /// The model says `text`.
    fn saying(text: &str) -> Self {
        let config = ServerConfig::resolve(RawConfig { threads: Some(1), ..RawConfig::default() }).unwrap();
        Self { config, script: text.bytes().map(u32::from).collect(), pooling: None }
    }

    /// A server that is loading.
    fn loading(self) -> Fixture {
        let limits = MetricsLimits { max_num_seqs: 4, max_queue: 8 };
        let metrics = Arc::new(Metrics::new("test", limits));
        let storage = self.config.data.as_ref().map(|data| {
            let limits = StorageLimits { max_file_bytes: data.max_file_bytes, max_total_bytes: data.max_total_bytes };
            Arc::new(Storage::open(&data.dir, limits).unwrap())
        });
        let state = Arc::new(HttpState::new(&self.config, Lifecycle::new(), metrics).with_storage(storage));
        Fixture { router: router(Arc::clone(&state)), state, hold: Arc::default(), _engine: None }
    }

    /// A server that is ready.
    fn start(self) -> Fixture {
        let (config, script, pooling) = (self.config.clone(), self.script.clone(), self.pooling);
        let mut fixture = self.loading();
        let tokenizer = Arc::new(Tokenizer::from_source(&TokenizerSource::Gguf(vocabulary())).unwrap());
        let engine_config = EngineConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            max_queue: 8,
            max_queue_tokens: config.max_queue_tokens,
            max_model_len: CONTEXT,
            num_kv_blocks: 64,
            kv_dtype: KvDtype::F32,
            prefix_sharing: PrefixSharing::PerClient,
            speculation: config.speculation,
        };
        let metrics = Arc::clone(&fixture.state.metrics);
        let script = Script { says: script, hold: Arc::clone(&fixture.hold) };
        let (engine, thread) = Engine::start_with(script, &engine_config, Arc::clone(&metrics)).unwrap();
        let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}assistant: ";
        let prompter = ChatPrompter::new(tokenizer, Some(template), Some(TokenId(BOS)), Some(TokenId(EOT))).unwrap();
        let service = Service::new(Parts {
            card: ModelCard {
                names: ModelNames::new(&["org/model".to_owned(), "alias".to_owned()], ""),
                created: 1,
                description: None,
                max_model_len: CONTEXT,
                vocab_size: VOCAB,
                pooling,
                kernel: "script".to_owned(),
                failed_kernels: vec!["broken".to_owned()],
                fingerprint: "fp_test".to_owned(),
            },
            prompter,
            engine,
            stop_tokens: vec![TokenId(EOT)],
            tokens_per_minute: config.rate_limit_tpm,
            rules: RequestRules {
                max_choices: config.max_n,
                vocab_size: VOCAB,
                temperature: 1.0,
                top_p: 1.0,
                top_k: 0,
                max_tokens: None,
            },
            filter: config.content_filter.as_ref().map(|rules| ContentFilter::new(rules).unwrap()),
            response_cache_bytes: 1 << 20,
            request_timeout: config.request_timeout,
            metrics,
        });
        fixture.state.install(Arc::new(service));
        fixture._engine = Some(thread);
        fixture
    }
}

fn rules(toml: &str) -> FilterRules {
    FilterRules::from_toml(toml, "test").unwrap()
}

fn vocabulary() -> GgufVocabulary {
    let mut others = (0x100_u32..).filter_map(char::from_u32);
    let byte_level = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte).to_string(),
        _ => others.next().unwrap().to_string(),
    };
    let mut tokens: Vec<String> = (0..=255).map(byte_level).collect();
    tokens.extend(["<s>", "<|eot_id|>"].map(str::to_owned));
    let token_types = [vec![1; 256], vec![3; 2]].concat();
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("llama-bpe".to_owned()),
        tokens,
        token_types,
        bos: Some(TokenId(BOS)),
        eos: Some(TokenId(EOT)),
        add_bos: true,
        ..GgufVocabulary::default()
    }
}

impl Fixture {
    async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Reply { status: parts.status, headers: parts.headers, body }
    }

    async fn post(&self, path: &str, body: impl Into<Body>) -> Reply {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json").body(body.into());
        self.send(request.unwrap()).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The error object, after checking that it has the one shape.
    fn error(&self) -> Value {
        let body = self.json();
        let error = body["error"].as_object().unwrap_or_else(|| panic!("no error: {body}"));
        assert_eq!(body.as_object().unwrap().len(), 1);
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
        assert!(error["code"].is_null() || error["code"].is_string());
        assert!(self.header("x-request-id").is_some());
        assert_eq!(self.header("content-type"), Some("application/json"));
        body["error"].clone()
    }

    /// The `data:` payloads of a stream.
    fn events(&self) -> Vec<String> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = self.text();
        let lines = text.split("\n\n").filter(|line| !line.is_empty() && !line.starts_with(':'));
        lines.map(|line| line.strip_prefix("data: ").unwrap_or_else(|| panic!("odd line {line}")).to_owned()).collect()
    }

    /// The chunks of a stream that ended well.
    fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}
