//! `bitnet batch`: the requests of a file, answered into another, over the same engine and routes as the server.

use std::{path::PathBuf, sync::Arc};

use bitnet_server::{
    batch::{OfflineError, run_offline},
    config::{RawConfig, ServerConfig},
    filter::ContentFilter,
    load::{LoadSettings, load_model, start_service},
    metrics::{Metrics, MetricsLimits},
};

use crate::{
    exit::Failure,
    model_args::ModelArgs,
    progress::{lines_bar, weights_bar},
};

/// Answers a file of batch requests.
#[derive(Debug, clap::Args)]
pub(crate) struct BatchArgs {
    /// A GGUF file or a Hugging Face directory
    #[arg(short, long, env = "BITNET_MODEL", value_name = "PATH")]
    model: PathBuf,
    /// Requests, one a line: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// Answers, one a line; a file that is there already is continued
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    held: ModelArgs,
    /// Longest prompt and completion together, in tokens [default: the model's context]
    #[arg(long, env = "BITNET_CTX_SIZE", value_name = "TOKENS")]
    ctx_size: Option<usize>,
    /// Lines answered at the same time [default: 16]
    #[arg(long, env = "BITNET_MAX_NUM_SEQS", value_name = "N")]
    max_num_seqs: Option<usize>,
    /// TOML file of content filter rules [default: none]
    #[arg(long, env = "BITNET_CONTENT_FILTER", value_name = "FILE")]
    content_filter: Option<PathBuf>,
}

/// A line may take as long as the configuration lets it: a week.
const LINE_TIMEOUT_SECONDS: f64 = 604_800.0;

/// Answers every line that has no answer yet.
///
/// # Errors
/// [`Failure`] with the exit code of the contract.
pub(crate) fn batch(args: BatchArgs) -> Result<(), Failure> {
    let BatchArgs { model, input, output, .. } = args;
    if !input.is_file() {
        return Err(Failure::not_found(format!("{}: there is no such file", input.display())));
    }
    if output.canonicalize().is_ok_and(|output| input.canonicalize().is_ok_and(|input| input == output)) {
        return Err(Failure::usage("--output must not be the file of --input"));
    }
    let config = ServerConfig::resolve(RawConfig {
        model: Some(model.clone()),
        // Files of requests are made for some server: whatever name it had, this model answers.
        model_name: Some(vec!["*".to_owned()]),
        ctx_size: args.ctx_size,
        max_num_seqs: args.max_num_seqs,
        content_filter: args.content_filter,
        request_timeout: Some(LINE_TIMEOUT_SECONDS),
        ..args.held.raw_config()
    })
    .map_err(Failure::configuration)?;
    let filter = config.content_filter.as_ref().map(ContentFilter::new).transpose().map_err(Failure::configuration)?;
    let bar = weights_bar();
    let loaded = load_model(&model, &LoadSettings::of(&config), &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let loaded = loaded?;
    let limits = MetricsLimits { max_num_seqs: config.max_num_seqs, max_queue: config.max_queue };
    let metrics = Arc::new(Metrics::new(&loaded.name, limits));
    let (service, _thread) = start_service(loaded, &config, filter, &metrics)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::configuration(format!("cannot start the runtime: {error}")))?;

    let bar = lines_bar();
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let places = config.max_num_seqs;
    let answered =
        runtime.block_on(run_offline(&service, &input, &output, config.max_body_bytes, places, &mut progress));
    bar.finish_and_clear();
    let summary = answered?;
    eprintln!(
        "{} lines: {} answered ({} with an error), {} were there already",
        summary.total, summary.answered, summary.failed, summary.skipped
    );
    Ok(())
}

impl From<OfflineError> for Failure {
    fn from(error: OfflineError) -> Self {
        match error {
            OfflineError::NoInput(..) => Self::not_found(error),
            OfflineError::BadLine { .. } => Self::model(error),
            OfflineError::Output(..) => Self::configuration(error),
            OfflineError::EngineStopped => Self::engine(error),
        }
    }
}
