//! The load programs: `load NAME -m MODEL` starts the release binary with the settings a figure needs and prints what its
//! clients saw. Nothing else should run on the machine.

use std::{process::Command, sync::Arc, time::Duration};

use bitnet_tests::{
    load::{cached, cancel, fairness, figures::Sorted, gap, overload, soak, speculation, streams},
    server::{Server, binary, scratch},
};
use clap::{Parser, ValueEnum};

/// Takes the figures of serving and reliability.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to measure
    #[arg(value_enum)]
    program: Program,
    /// The served model
    #[arg(long, short)]
    model: String,
    /// Seconds of the programs that last: overload, fairness, soak
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Requests of `cancel`
    #[arg(long, default_value_t = 10_000)]
    requests: u64,
    /// Longest delay of `cancel`, in milliseconds
    #[arg(long, default_value_t = 400)]
    longest_ms: u64,
    /// Tokens of the prompts of `overload`, `fairness` and `soak`
    #[arg(long, default_value_t = 55)]
    prompt_len: usize,
    /// Tokens of the answers
    #[arg(long, default_value_t = 64)]
    tokens: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Program {
    /// Throughput, TTFT and ITL at 1, 4, 8, 16 and 32 streams
    Streams,
    /// HTTP against `bitnet bench`, alternating
    Overhead,
    /// A cached prompt's TTFT, a cached answer's time
    Cached,
    /// A 2,000-token prompt beside running streams
    Gap,
    /// Two clients, 20:1
    Fairness,
    /// What guesses gain and cost, alternating
    Speculation,
    /// Random cancellations
    Cancel,
    /// Five times the load it can take
    Overload,
    /// Four fifths of the load it can take, for long
    Soak,
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    match arguments.program {
        Program::Streams => streams(&arguments).await,
        Program::Overhead => overhead(&arguments).await,
        Program::Cached => {
            let server = plain(&arguments, &[]);
            println!("{}", cached::run(&server, 2000, 10).await);
            drop(server);
            println!("answer cached: {}", cached::repeated(&serve(&arguments, &[]), 20).await);
        }
        Program::Gap => println!("{}", gap::run(&plain(&arguments, &[]), 4, 400, 2000).await),
        Program::Fairness => fairness(&arguments).await,
        Program::Speculation => {
            let [off, auto] = ["off", "auto"]
                .map(|setting| serve(&arguments, &["--response-cache-mb", "0", "--speculation", setting]));
            let plan = speculation::Plan { pairs: 7, prompt_len: arguments.prompt_len, num_tokens: arguments.tokens };
            println!("{}", speculation::run(&off, &auto, plan).await);
        }
        Program::Cancel => {
            let longest = Duration::from_millis(arguments.longest_ms);
            let plan = cancel::Plan { requests: arguments.requests, concurrency: 48, longest, prompt_len: 600 };
            println!("{}", cancel::run(&serve(&arguments, &["--max-queue", "1000"]), plan).await);
        }
        Program::Overload => {
            let server = Arc::new(plain(&arguments, &[]));
            println!("{}", overload::run(&server, load_plan(&arguments)).await);
        }
        Program::Soak => {
            // Small enough to be full long before the second half: what a cache may hold is no growth.
            let server = Arc::new(serve(&arguments, &["--response-cache-mb", "1"]));
            println!("{}", soak::run(&server, load_plan(&arguments), Duration::from_secs(arguments.seconds)).await);
        }
    }
}

fn serve(arguments: &Arguments, more: &[&str]) -> Server {
    Server::start(&[&["-m", &arguments.model], more].concat())
}

/// Without what would spare the work that is measured.
fn plain(arguments: &Arguments, more: &[&str]) -> Server {
    let off = ["--response-cache-mb", "0", "--speculation", "off"];
    serve(arguments, &[&off, more].concat())
}

fn load_plan(arguments: &Arguments) -> overload::Plan {
    overload::Plan {
        capacity: 16,
        peak_for: Duration::from_secs(20),
        overload_for: Duration::from_secs(arguments.seconds),
        factor: 5.0,
        prompt_len: arguments.prompt_len,
        num_tokens: arguments.tokens,
    }
}

async fn streams(arguments: &Arguments) {
    let server = plain(arguments, &["--max-num-seqs", "32"]);
    for warm in [false, true] {
        for concurrency in [1, 4, 8, 16, 32] {
            let plan = streams::Plan { concurrency, rounds: 3, prompt_len: 55, num_tokens: arguments.tokens, warm };
            println!("{}", streams::run(&server, plan).await);
        }
    }
}

/// Decoding over HTTP as a share of `bitnet bench`, rounds alternating.
async fn overhead(arguments: &Arguments) {
    let server = plain(arguments, &[]);
    let mut shares = [Vec::new(), Vec::new()];
    for round in 0..3 {
        let engine = bench(&arguments.model);
        for (index, concurrency) in [1, 8].into_iter().enumerate() {
            let plan = streams::Plan { concurrency, rounds: 2, prompt_len: 4, num_tokens: 64, warm: true };
            let http = streams::run(&server, plan).await.stream_tokens_per_s * concurrency as f64;
            println!("round {round}, batch {concurrency}: bench {:.1} tokens/s, HTTP {http:.1}", engine[index]);
            shares[index].push(http / engine[index]);
        }
    }
    for (name, shares) in ["batch 1", "batch 8"].into_iter().zip(shares) {
        println!("{name}: {:.1} % of the engine", 100.0 * shares.into_iter().collect::<Sorted>().quantile(0.5));
    }
}

fn bench(model: &str) -> [f64; 2] {
    let output = Command::new(binary())
        .args(["bench", "-m", model, "--json", "--only", "decode:1@32,decode:8@32"])
        .output()
        .expect("the binary starts");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    [0, 1].map(|row| object["results"][row]["tokens_per_s"].as_f64().expect("a number"))
}

async fn fairness(arguments: &Arguments) {
    let keys = scratch("load-keys").join("keys");
    std::fs::write(&keys, "heavy:heavy-secret\nlight:light-secret\n").expect("scratch is writable");
    let keys = keys.to_str().expect("UTF-8");
    let plan = fairness::Plan {
        keys: ["heavy-secret", "light-secret"],
        light: 1,
        lasts: Duration::from_secs(arguments.seconds),
        prompt_len: arguments.prompt_len,
        num_tokens: arguments.tokens,
    };
    let server = plain(arguments, &["--api-key-file", keys]);
    println!("20 requests beside 1, 16 places\n{}\n", fairness::run(&server, plan).await);
    drop(server);
    let server = plain(arguments, &["--api-key-file", keys, "--max-num-seqs", "4", "--max-queue", "200"]);
    let plan = fairness::Plan { light: 6, ..plan };
    println!("120 requests beside 6, 4 places: both always wait\n{}", fairness::run(&server, plan).await);
}
