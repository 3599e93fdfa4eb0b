//! `bitnet run`: text on the terminal, once or as a chat, over the same engine as the server.

use std::{
    io::{self, BufRead, IsTerminal},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use bitnet_core::{TokenId, Tokenizer, sampling::SamplingParams, tokenizer::IncrementalDecoder};
use bitnet_server::{
    config::{ClientId, RawConfig, ServerConfig},
    engine::{GenerationRequest, SequenceEvent},
    load::{LoadSettings, load_model, start_service},
    metrics::{Metrics, MetricsLimits},
    prompt::{ChatMessage, ChatOptions},
    service::Service,
};

use crate::{exit::Failure, model_args::ModelArgs, output, progress::weights_bar};

/// Generates text on the terminal.
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// A GGUF file or a Hugging Face directory
    #[arg(short, long, env = "BITNET_MODEL", value_name = "PATH")]
    model: PathBuf,
    /// The prompt; without it the terminal becomes a chat
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Put the prompt through the model's chat template
    #[arg(long)]
    chat: bool,
    /// Tokens to generate at most [default: to the end of the context]
    #[arg(short = 'n', long, env = "BITNET_MAX_TOKENS", value_name = "N")]
    max_tokens: Option<usize>,
    /// 0 is greedy [default: the model's, else 1]
    #[arg(long, env = "BITNET_TEMPERATURE", value_name = "T")]
    temperature: Option<f32>,
    /// Nucleus [default: the model's, else 1]
    #[arg(long, env = "BITNET_TOP_P", value_name = "P")]
    top_p: Option<f32>,
    /// Makes the answer repeatable [default: drawn]
    #[arg(long, value_name = "SEED")]
    seed: Option<i64>,
    #[command(flatten)]
    held: ModelArgs,
    /// Longest prompt and completion together, in tokens [default: the model's context]
    #[arg(long, env = "BITNET_CTX_SIZE", value_name = "TOKENS")]
    ctx_size: Option<usize>,
}

/// Generates once, or chats until the end of the input.
///
/// # Errors
/// [`Failure`] with the exit code of the contract.
pub(crate) fn run(args: RunArgs) -> Result<(), Failure> {
    let session = Session::start(&args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|error| Failure::configuration(format!("cannot start the runtime: {error}")))?;
    match &args.prompt {
        Some(prompt) => runtime.block_on(session.once(prompt, args.chat)),
        None => runtime.block_on(session.chat()),
    }
}

/// A loaded model and the choices of the command line.
struct Session {
    service: Service,
    tokenizer: Arc<Tokenizer>,
    sampling: SamplingParams,
    max_tokens: usize,
}

impl Session {
    fn start(args: &RunArgs) -> Result<Self, Failure> {
        let config = ServerConfig::resolve(RawConfig {
            model: Some(args.model.clone()),
            ctx_size: args.ctx_size,
            temperature: args.temperature,
            top_p: args.top_p,
            max_num_seqs: Some(1),
            ..args.held.raw_config()
        })
        .map_err(Failure::configuration)?;
        let bar = weights_bar();
        let loaded = load_model(&args.model, &LoadSettings::of(&config), &|done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let loaded = loaded?;
        if loaded.pooling.is_some() {
            return Err(Failure::usage(
                "this is an embedding model and generates no text: serve it and ask /v1/embeddings",
            ));
        }
        let defaults = loaded.generation.clone();
        let tokenizer = Arc::clone(&loaded.tokenizer);
        let sampling = SamplingParams {
            temperature: args.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: args.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: defaults.top_k.unwrap_or(0),
            seed: args.seed.unwrap_or_else(rand::random),
            ..SamplingParams::default()
        };
        let sampling = sampling.validated(loaded.model.config().vocab_size).map_err(Failure::configuration)?;
        let limits = MetricsLimits { max_num_seqs: 1, max_queue: config.max_queue };
        let metrics = Arc::new(Metrics::new(&loaded.name, limits));
        let (service, _thread) = start_service(loaded, &config, None, &metrics)?;
        Ok(Self { service, tokenizer, sampling, max_tokens: args.max_tokens.unwrap_or(usize::MAX) })
    }

    async fn once(&self, prompt: &str, chat: bool) -> Result<(), Failure> {
        let ids = if chat {
            self.encode_chat(&[message("user", prompt)])?
        } else {
            self.service.prompter().encode_text(prompt, true).map_err(Failure::model)?
        };
        self.generate(ids).await?;
        Ok(())
    }

    async fn chat(&self) -> Result<(), Failure> {
        let mut messages = Vec::new();
        let interactive = io::stdin().is_terminal();
        loop {
            if interactive {
                output::write(format_args!("> "))?;
            }
            let mut line = String::new();
            if io::stdin().lock().read_line(&mut line).map_err(Failure::terminal)? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                continue;
            }
            messages.push(message("user", line.trim()));
            let answer = self.generate(self.encode_chat(&messages)?).await?;
            messages.push(message("assistant", &answer));
        }
    }

    fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<TokenId>, Failure> {
        self.service.prompter().encode_chat(messages, &ChatOptions::default()).map_err(Failure::model)
    }

    /// Writes the text as it comes and gives it back whole.
    async fn generate(&self, prompt: Vec<TokenId>) -> Result<String, Failure> {
        let max_model_len = self.service.card().max_model_len;
        let room = max_model_len.checked_sub(prompt.len()).filter(|room| *room > 0 && !prompt.is_empty());
        let Some(room) = room else {
            return Err(Failure::usage(format!(
                "the prompt has {} tokens, the context is {max_model_len}",
                prompt.len()
            )));
        };
        let request = GenerationRequest {
            prompt,
            sampling: self.sampling.clone(),
            num_choices: 1,
            max_tokens: self.max_tokens.min(room),
            min_tokens: 0,
            stop_tokens: Arc::clone(self.service.stop_tokens()),
            logprobs: None,
            prompt_logprobs: None,
            cache_prompt: true,
            priority: 0,
            client: ClientId::local(),
            constraint: None,
            pooling: None,
            prediction: Arc::new([]),
            deadline: None,
            arrival: Instant::now(),
        };
        let permit = self.service.engine().reserve().map_err(Failure::engine)?;
        let mut stream = permit.submit(request).map_err(Failure::engine)?.remove(0);
        let mut decoder = IncrementalDecoder::new(true);
        let mut whole = String::new();
        loop {
            let piece = match stream.next().await {
                SequenceEvent::Token(event) => decoder.push(&self.tokenizer, event.token),
                SequenceEvent::PromptDone { .. } => continue,
                SequenceEvent::Finished(_) => break,
                SequenceEvent::Failed(error) => return Err(Failure::engine(error)),
            };
            output::write(format_args!("{piece}"))?;
            whole.push_str(&piece);
        }
        let rest = decoder.finish();
        output::write_line(&rest)?;
        whole.push_str(&rest);
        Ok(whole)
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned(), ..ChatMessage::default() }
}
