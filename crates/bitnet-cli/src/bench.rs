//! `bitnet bench`: prefill and decode speed of a model, beside the limits of this machine taken in the same run. What is
//! measured is the engine: no HTTP, no tokenizer, no speculation, no caches.

mod cases;
mod measure;

use std::{path::PathBuf, time::Instant};

use bitnet_core::{
    Checkpoint, Model,
    checkpoint::{self, LoadOptions, SYNTHETIC_NAMES},
    kernels::{self, TernaryKernel, limits::Limits},
    model::ModelOptions,
    threads::WorkerPool,
};
use bitnet_server::{
    config::ServerConfig,
    load::{default_model_name, supported},
};
use serde_json::{Value, json};

use crate::{exit::Failure, model_args::ModelArgs, output, progress::weights_bar};
use cases::Case;
use measure::{Bench, Measured};

/// Measures how fast a model runs here, and how fast it could.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// A GGUF file or a Hugging Face directory
    #[arg(short, long, env = "BITNET_MODEL", value_name = "PATH")]
    model: Option<PathBuf>,
    /// A geometry with random weights made in memory, instead of a file
    #[arg(long, value_name = "2b4t|700m|3b|8b", conflicts_with = "model")]
    synthetic: Option<String>,
    /// Print one JSON object, and nothing else, to stdout
    #[arg(long)]
    json: bool,
    /// Cases to measure: prefill:TOKENS and decode:BATCH[@CONTEXT], separated by commas [default: a table of both]
    #[arg(long, value_name = "CASES", value_delimiter = ',')]
    only: Vec<Case>,
    #[command(flatten)]
    held: ModelArgs,
}

/// Measures and prints.
///
/// # Errors
/// [`Failure`] with the exit code of the contract.
pub(crate) fn bench(args: BenchArgs) -> Result<(), Failure> {
    let config = ServerConfig::resolve(args.held.raw_config()).map_err(Failure::configuration)?;
    let kernel = kernels::select(config.kernel.as_deref().unwrap_or("auto"))?;
    let packing = supported(config.packing, kernel).map_err(Failure::configuration)?;
    let start = Instant::now();
    let (name, checkpoint) = open(&args, &LoadOptions { i2s_layout: config.i2s_layout })?;
    // A model made in memory was not loaded: its time starts here.
    let start = if args.synthetic.is_some() { Instant::now() } else { start };
    let mut pool = WorkerPool::new(config.threads);
    let options = ModelOptions { packing, sparse_ffn: config.sparse_ffn, ..ModelOptions::default() };
    let model = load(&checkpoint, kernel, &options, &mut pool)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let file_bytes = checkpoint.summary.file_bytes;
    drop(checkpoint);

    let cases = if args.only.is_empty() { cases::all() } else { args.only };
    let header = Header { name, threads: pool.num_threads(), file_bytes, load_seconds };
    let mut bench = Bench::new(model, kernel, pool, config.kv_dtype, &cases).map_err(Failure::configuration)?;
    if !args.json {
        print_header(&header, bench.model())?;
    }
    let mut results = Vec::with_capacity(cases.len());
    for case in &cases {
        let measured = bench.measure(case);
        // A whole table takes minutes: each row is printed when it is known.
        if !args.json {
            print_row(case, &measured)?;
        }
        results.push((case, measured));
    }
    let machine = Machine::of(&results);
    if args.json {
        output::write_line(format_args!("{:#}", report(&header, bench.model(), &machine, &results)))
    } else {
        machine.print()
    }
}

fn open(args: &BenchArgs, options: &LoadOptions) -> Result<(String, Checkpoint), Failure> {
    match (&args.model, &args.synthetic) {
        (_, Some(name)) => {
            let unknown =
                || Failure::usage(format!("--synthetic {name}: must be one of {}", SYNTHETIC_NAMES.join(", ")));
            Ok((name.clone(), checkpoint::synthetic(name).ok_or_else(unknown)?))
        }
        (Some(path), None) => Ok((default_model_name(path), checkpoint::open(path, options)?)),
        (None, None) => Err(Failure::usage("bench needs --model PATH or --synthetic NAME; try `bitnet bench --help`")),
    }
}

fn load(
    checkpoint: &Checkpoint,
    kernel: &'static dyn TernaryKernel,
    options: &ModelOptions,
    pool: &mut WorkerPool,
) -> Result<Model, Failure> {
    let bar = weights_bar();
    let model = Model::load_with(checkpoint, kernel, options, pool, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(model?)
}

struct Header {
    name: String,
    threads: usize,
    file_bytes: u64,
    load_seconds: f64,
}

/// What the machine could do while most cases ran: medians over them.
struct Machine {
    read_bytes_per_s: f64,
    int8_macs_per_s: f64,
}

impl Machine {
    fn of(results: &[(&Case, Measured)]) -> Self {
        let median = |limit: fn(&Limits) -> f64| {
            let mut values: Vec<f64> = results.iter().map(|(_, measured)| limit(&measured.limits)).collect();
            values.sort_unstable_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Self {
            read_bytes_per_s: median(|limits| limits.read_bytes_per_s),
            int8_macs_per_s: median(|limits| limits.int8_macs_per_s),
        }
    }

    fn print(&self) -> Result<(), Failure> {
        let Self { read_bytes_per_s, int8_macs_per_s } = self;
        output::write_line(format_args!(
            "\nthis machine reads {:.1} GB/s and multiplies {:.0} G int8/s",
            read_bytes_per_s / 1e9,
            int8_macs_per_s / 1e9,
        ))
    }
}

/// The object of the contract. A share is that of the limit while its case ran, so where the machine's speed changes it is
/// not exactly the quotient with `machine`'s figures.
fn report(header: &Header, model: &Model, machine: &Machine, results: &[(&Case, Measured)]) -> Value {
    let row = |(case, measured): &(&Case, Measured)| {
        json!({
            "phase": case.phase(),
            "tokens": case.tokens(),
            "batch": case.batch(),
            "context": case.context(),
            "tokens_per_s": measured.tokens_per_s,
            "bytes_per_token": measured.bytes_per_token,
            "macs_per_token": measured.macs_per_token,
            "share_of_limit": measured.share_of_limit,
        })
    };
    json!({
        "machine": {
            "threads": header.threads,
            "kernel": model.kernel_name(),
            "packing": model.packing().name(),
            "read_bytes_per_s": machine.read_bytes_per_s,
            "int8_macs_per_s": machine.int8_macs_per_s,
        },
        "model": {
            "name": header.name,
            "file_bytes": header.file_bytes,
            "resident_bytes": model.weight_bytes().resident,
            "load_seconds": header.load_seconds,
        },
        "results": results.iter().map(row).collect::<Vec<_>>(),
    })
}

fn print_header(header: &Header, model: &Model) -> Result<(), Failure> {
    let Header { name, threads, load_seconds, .. } = header;
    output::write_line(format_args!(
        "{name} on {threads} threads, {}, {}: {:.0} MB in memory, loaded in {load_seconds:.2} s\n",
        model.kernel_name(),
        model.packing().name(),
        model.weight_bytes().resident as f64 / 1e6,
    ))?;
    output::write_line("phase    tokens  batch  context   tokens/s      limit   share")
}

fn print_row(case: &Case, measured: &Measured) -> Result<(), Failure> {
    let Measured { tokens_per_s, share_of_limit, .. } = measured;
    output::write_line(format_args!(
        "{:<8} {:>6} {:>6} {:>8} {tokens_per_s:>10.1} {:>10.1} {:>6.0}%",
        case.phase(),
        case.tokens(),
        case.batch(),
        case.context(),
        tokens_per_s / share_of_limit,
        100.0 * share_of_limit,
    ))
}
