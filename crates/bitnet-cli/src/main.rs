//! The one binary, `bitnet`: flags in, library calls out.

mod batch;
mod bench;
mod exit;
mod inspect;
mod model_args;
mod output;
mod progress;
mod run;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand, error::ErrorKind};

use exit::Failure;

/// Serves 1-bit language models (BitNet b1.58) on ordinary CPUs, with the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves a model over HTTP (also without this word)
    Serve(Box<serve::ServeArgs>),
    /// Generates text on the terminal: once with -p, else as a chat
    Run(run::RunArgs),
    /// Answers the requests of a JSONL file into another one
    Batch(batch::BatchArgs),
    /// Measures how fast a model runs here
    Bench(bench::BenchArgs),
    /// Shows what a model file holds
    Inspect(inspect::InspectArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            // A closed stdout is no failure.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return usage(&error).report(),
    };
    let result = match cli.command {
        None => serve::serve(cli.serve),
        Some(Command::Serve(args)) => serve::serve(*args),
        Some(Command::Run(args)) => run::run(args),
        Some(Command::Batch(args)) => batch::batch(args),
        Some(Command::Bench(args)) => bench::bench(args),
        Some(Command::Inspect(args)) => inspect::inspect(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// clap's message as one line: its first paragraph, without the `error:` before it.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    Failure::usage(format!("{}; try `bitnet --help`", first.trim_start_matches("error: ").trim_end_matches('.')))
}
