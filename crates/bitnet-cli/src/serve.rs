//! `bitnet serve`: configuration, log, banner; the library does the rest.

use std::{
    borrow::Cow,
    io::{IsTerminal as _, Write as _},
};

use bitnet_core::{LoadOptions, checkpoint};
use bitnet_server::{
    App, ServeError, Serving,
    config::{LogFormat, RawConfig, ServerConfig},
    filter::ContentFilter,
    load::{BUILT_IN_MODEL_NAME, LoadFailure, LoadSettings, LoadedModel, load_checkpoint, load_model},
};
use tracing_subscriber::EnvFilter;

use crate::{exit::Failure, output, progress::weights_bar};

/// The model that is served when none is given: random weights, see `builtin/make_builtin.py`.
const BUILT_IN: &[u8] = include_bytes!("../builtin/tiny-random.gguf");

/// Serves a model over HTTP.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    settings: RawConfig,
    /// Check the configuration, say what is wrong with it, and exit
    #[arg(long)]
    check_config: bool,
}

/// Serves until a signal ends it.
///
/// # Errors
/// [`Failure`] with the exit code of the contract.
pub(crate) fn serve(args: ServeArgs) -> Result<(), Failure> {
    let config = ServerConfig::resolve(args.settings).map_err(Failure::configuration)?;
    if args.check_config {
        config.content_filter.as_ref().map(ContentFilter::new).transpose().map_err(ServeError::from)?;
        return output::write_line("the configuration is valid");
    }
    start_log(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::configuration(format!("cannot start the runtime: {error}")))?;
    let builtin = config.model.is_none();
    let loader = loader(&config);
    runtime
        .block_on(async { App::build(config).await?.run(loader, |serving| print_banner(serving, builtin)).await })?;
    Ok(())
}

fn loader(config: &ServerConfig) -> impl FnOnce() -> Result<LoadedModel, LoadFailure> + Send + 'static {
    let settings = LoadSettings::of(config);
    let path = config.model.clone();
    move || match path {
        Some(path) => {
            let bar = weights_bar();
            let loaded = load_model(&path, &settings, &|done, total| {
                bar.set_length(total);
                bar.set_position(done);
            });
            bar.finish_and_clear();
            loaded
        }
        None => load_builtin(&settings),
    }
}

fn load_builtin(settings: &LoadSettings) -> Result<LoadedModel, LoadFailure> {
    let options = LoadOptions { i2s_layout: checkpoint::I2sLayout::A };
    let checkpoint = checkpoint::open_bytes(BUILT_IN_MODEL_NAME, Cow::Borrowed(BUILT_IN), &options)?;
    let mut loaded = load_checkpoint(checkpoint, BUILT_IN_MODEL_NAME.to_owned(), settings, &|_, _| {})?;
    loaded.description = Some("built-in model with random weights; its text means nothing".to_owned());
    Ok(loaded)
}

/// What stdout gets once requests are served: nothing else ever goes there.
fn print_banner(serving: &Serving, builtin: bool) {
    let address = serving.address;
    let mut out = std::io::stdout().lock();
    let mut text = String::new();
    if builtin {
        text.push_str(
            "This is the built-in model: it has random weights and its words mean nothing.\n\
             Serve a real one with: bitnet serve --model PATH (a GGUF file or a Hugging Face directory)\n",
        );
    }
    let body = r#"{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}"#;
    text.push_str(&format!(
        "Try it:\n  curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
    ));
    if let Some(metrics) = serving.metrics_address {
        text.push_str(&format!("health and metrics also on http://{metrics}\n"));
    }
    text.push_str(&format!("listening on http://{address}\n"));
    // A closed stdout is no reason to stop serving.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("BITNET_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Or it would report a full disk to the same stderr, by a macro that panics when it cannot.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

impl From<LoadFailure> for Failure {
    fn from(failure: LoadFailure) -> Self {
        match failure {
            LoadFailure::Checkpoint(error) => error.into(),
            LoadFailure::Kernel(error) => error.into(),
            LoadFailure::Config(_) | LoadFailure::Engine(_) => Self::configuration(failure),
            LoadFailure::NoTokenizer | LoadFailure::Tokenizer(_) | LoadFailure::Template(_) => Self::model(failure),
        }
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Load(failure) => failure.into(),
            ServeError::EngineDied(_) => Self::engine(error),
            ServeError::Filter(_) | ServeError::Bind { .. } | ServeError::Data(_) | ServeError::Start(_) => {
                Self::configuration(error)
            }
        }
    }
}
