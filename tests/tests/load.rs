//! Small forms of the load programs: what they assert is never a time.

use std::{sync::Arc, time::Duration};

use bitnet_tests::{
    golden,
    load::{cached, cancel, client::Outcome, fairness, gap, overload, soak, speculation, streams},
    server::{Server, scratch},
};

const PLAN: overload::Plan = overload::Plan {
    capacity: 16,
    peak_for: Duration::from_secs(2),
    overload_for: Duration::from_secs(8),
    factor: 5.0,
    prompt_len: 40,
    num_tokens: 200,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_requests_leave_nothing_behind() {
    // All pages of a small cache are touched before memory is first looked at, on however busy a machine.
    let server = serve(&["--max-queue", "1000", "--kv-cache-mb", "8"]);
    let plan = cancel::Plan { requests: 2000, concurrency: 48, longest: Duration::from_millis(120), prompt_len: 1500 };
    let report = cancel::run(&server, plan).await;
    println!("{report}");
    assert!(report.cancelled > plan.requests / 4, "{report}");
    assert!(report.settled.is_some(), "{report}");
    assert_eq!([report.running, report.waiting, report.used_blocks], [0.0; 3], "{report}");
    // The client that asks keeps one or two.
    assert!(report.connections <= 2.0, "{report}");
    assert_eq!(report.failed, [] as [String; 0], "{report}");
    assert!(report.after.0.abs_diff(report.before.0) <= 2 && report.after.1 == report.before.1, "{report}");
    // The allocator's arenas fill up in the first seconds; a leak of one request would be seen all the same.
    assert!(report.growth() < 0.10, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_refuses_and_loses_nothing() {
    let server = Arc::new(serve(&["--response-cache-mb", "0", "--max-queue", "16"]));
    let report = overload::run(&server, PLAN).await;
    println!("{report}");
    assert_eq!(report.lost, [] as [Outcome; 0], "{report}");
    assert_eq!((report.odd_refusals, report.false_failures), (0, 0), "{report}");
    assert_eq!(report.done + report.refusals.len(), report.sent, "{report}");
    assert!(!report.refusals.is_empty() && report.done > 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_minutes_at_four_fifths_of_the_load() {
    // Small caches are full before the second half begins.
    let server = Arc::new(serve(&["--response-cache-mb", "2", "--kv-cache-mb", "8"]));
    let report = soak::run(&server, PLAN, Duration::from_secs(120)).await;
    println!("{report}");
    assert_eq!(report.failed, [] as [Outcome; 0], "{report}");
    assert!(report.descriptors.0.abs_diff(report.descriptors.1) <= 2, "{report}");
    // The allocator keeps some room; a leak of 2 KiB a request would be seen.
    assert!(report.memory.1 - report.memory.0 < 12 << 20, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_prompt_computes_its_last_token_alone() {
    let server = serve(&["--response-cache-mb", "0"]);
    for (prompt_len, cached_tokens) in [(2000, 1999), (2001, 2000), (2010, 2000)] {
        let report = cached::run(&server, prompt_len, 3).await;
        assert_eq!(report.cached_tokens, cached_tokens, "whole blocks of 16, and the last token: {report}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_keep_coming_beside_a_long_prompt() {
    let report = gap::run(&serve(&["--response-cache-mb", "0"]), 4, 3000, 2000).await;
    println!("{report}");
    assert!(report.beside.len() > 4, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_times_the_requests_get_no_more() {
    let keys = scratch("fairness").join("keys");
    std::fs::write(&keys, "heavy:heavy-secret\nlight:light-secret\n").expect("scratch is writable");
    let keys = keys.to_str().expect("UTF-8");
    let server =
        serve(&["--api-key-file", keys, "--response-cache-mb", "0", "--max-num-seqs", "4", "--max-queue", "200"]);
    let plan = fairness::Plan {
        keys: ["heavy-secret", "light-secret"],
        light: 6,
        lasts: Duration::from_secs(6),
        prompt_len: 40,
        num_tokens: 100,
    };
    let report = fairness::run(&server, plan).await;
    let [heavy, light] = report.served.map(|tokens| tokens as f64);
    assert!(light / (heavy + light) > 0.4, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_output_follows_a_prediction_made_of_itself() {
    let settings = |speculation| ["--response-cache-mb", "0", "--speculation", speculation];
    let (off, auto) = (serve(&settings("off")), serve(&settings("auto")));
    let plan = speculation::Plan { pairs: 4, prompt_len: 40, num_tokens: 200 };
    let report = speculation::run(&off, &auto, plan).await;
    println!("{report}");
    // The text of random tokens is read back as other tokens here and there.
    assert!(report.foreseen.quantile(0.5) > 0.0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stream_gets_every_token() {
    let server = serve(&["--response-cache-mb", "0"]);
    let plan = streams::Plan { concurrency: 32, rounds: 1, prompt_len: 55, num_tokens: 64, warm: false };
    let report = streams::run(&server, plan).await;
    assert!(report.exchanges.iter().all(|exchange| exchange.completion_tokens == 64), "{report}");
}

fn serve(args: &[&str]) -> Server {
    Server::start(&[&["-m", &golden::arg("p1_packed")], args].concat())
}
