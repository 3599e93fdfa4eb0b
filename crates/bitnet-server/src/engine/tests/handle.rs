//! The engine thread from the async side: queue, cancellation, failures, shutdown and death.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use bitnet_core::kv_cache::KvDtype;

use super::{
    super::{
        Engine, EngineConfig, EngineEnd, EngineError, EngineHandle, EngineThread, FinishReason, GenerationRequest,
        SequenceEvent, SequenceStream, StartError, SubmitError,
        testing::{FakeExecutor, PANIC, POISON, hashed_token, metrics, request},
    },
    expected,
};
use crate::config::{PrefixSharing, Speculation};

fn config(max_num_seqs: usize, max_queue: usize) -> EngineConfig {
    EngineConfig {
        max_num_seqs,
        max_num_batched_tokens: 16,
        max_queue,
        max_queue_tokens: usize::MAX,
        max_model_len: 64,
        num_kv_blocks: 16,
        kv_dtype: KvDtype::F16,
        prefix_sharing: PrefixSharing::PerClient,
        speculation: Speculation::Auto,
    }
}

fn start(config: &EngineConfig) -> (EngineHandle, EngineThread) {
    Engine::start_with(FakeExecutor::new(config), config, metrics()).expect("the fake starts")
}

/// An engine that waits for a message before each token, after saying that it is about to.
fn start_gated(config: &EngineConfig) -> (EngineHandle, EngineThread, mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (open, gate) = mpsc::channel();
    let (say_reached, reached) = mpsc::channel();
    open.send(()).expect("the warm-up passes");
    let executor = FakeExecutor::choosing(config, move |sequence, tokens| {
        let _ = say_reached.send(());
        let _ = gate.recv();
        hashed_token(tokens, &sequence.request.sampling, sequence.choice)
    });
    let (handle, thread) = Engine::start_with(executor, config, metrics()).expect("the fake starts");
    reached.recv().expect("the warm-up");
    (handle, thread, open, reached)
}

fn submit(handle: &EngineHandle, request: GenerationRequest) -> SequenceStream {
    handle.reserve().expect("a place").submit(request).expect("alive").remove(0)
}

async fn read_all(mut stream: SequenceStream) -> Vec<SequenceEvent> {
    let mut events = Vec::new();
    loop {
        let event = stream.next().await;
        let ended = matches!(event, SequenceEvent::Finished(_) | SequenceEvent::Failed(_));
        events.push(event);
        if ended {
            return events;
        }
    }
}

async fn last(stream: SequenceStream) -> Option<SequenceEvent> {
    read_all(stream).await.pop()
}

#[tokio::test]
async fn choices_answer_for_themselves_and_a_slow_reader_stops_nobody() {
    let config = config(4, 4);
    let (handle, mut thread) = start(&config);
    let request = GenerationRequest { num_choices: 3, ..request(&[1, 2, 3], 20) };
    let unread = submit(&handle, request.clone());
    let streams = handle.reserve().expect("a place").submit(request.clone()).expect("alive");
    for (choice, stream) in (0..).zip(streams) {
        assert_eq!(read_all(stream).await, expected(&request, choice, 64));
    }
    assert_eq!(read_all(unread).await, expected(&request, 0, 64));
    drop(handle);
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown, "without handles there is nothing to wait for");
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown);
}

#[tokio::test]
async fn the_queue_is_full_at_exactly_its_size_and_a_place_comes_back() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 3));
    let running = submit(&handle, request(&[1], 1));
    reached.recv().expect("it runs");
    let waiting = submit(&handle, request(&[2], 1));
    let permits = [handle.reserve(), handle.reserve()];
    assert!(permits.iter().all(Result::is_ok));
    assert_eq!(handle.reserve().err(), Some(SubmitError::QueueFull));
    let status = handle.status();
    assert_eq!((status.running, status.waiting, status.max_waiting, status.alive), (1, 3, 3, true));
    drop(permits);
    assert_eq!(handle.status().waiting, 1, "a permit that is dropped gives its place back");
    open.send(()).expect("the engine waits");
    assert_eq!(last(running).await, Some(SequenceEvent::Finished(FinishReason::Length)));
    reached.recv().expect("the next one runs");
    assert_eq!(handle.status().waiting, 0, "what runs does not wait");
    open.send(()).expect("the engine waits");
    assert_eq!(last(waiting).await, Some(SequenceEvent::Finished(FinishReason::Length)));
}

#[tokio::test]
async fn a_stream_that_is_dropped_while_it_waits_gives_its_place_back() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 2));
    let running = submit(&handle, request(&[1], 2));
    reached.recv().expect("it runs");
    drop([submit(&handle, request(&[2], 1)), submit(&handle, request(&[3], 1))]);
    open.send(()).expect("the engine waits");
    reached.recv().expect("the second step, so the round between them is over");
    assert_eq!(handle.status().waiting, 0);
    open.send(()).expect("the engine waits");
    assert_eq!(last(running).await, Some(SequenceEvent::Finished(FinishReason::Length)));
}

#[tokio::test]
async fn a_step_that_nobody_waits_for_counts_for_nothing() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 2));
    // One step, and a full block.
    let prompt: Vec<u32> = (0..16).collect();
    let left = submit(&handle, request(&prompt, 5));
    reached.recv().expect("it runs");
    drop(left);
    open.send(()).expect("the engine waits");
    let again = submit(&handle, request(&prompt, 2));
    (0..2).for_each(|_| open.send(()).expect("the engine waits"));
    assert_eq!(read_all(again).await, expected(&request(&prompt, 2), 0, 64), "nothing was in the cache");
}

#[tokio::test]
async fn what_does_not_fit_or_is_not_finite_fails_alone() {
    let (handle, _thread) = start(&config(4, 8));
    let invalid = [SequenceEvent::Failed(EngineError::Invalid)];
    for bad in [request(&[], 1), request(&[0; 64], 1), request(&[64], 1)] {
        assert_eq!(read_all(submit(&handle, bad)).await, invalid);
    }
    let scored = submit(&handle, request(&[0; 64], 0));
    assert_eq!(
        last(scored).await,
        Some(SequenceEvent::Finished(FinishReason::Length)),
        "scoring a full context is fine"
    );
    let poisoned = submit(&handle, request(&[POISON.0], 5));
    let healthy = submit(&handle, request(&[1, 2], 5));
    assert_eq!(last(poisoned).await, Some(SequenceEvent::Failed(EngineError::NotFinite)));
    assert_eq!(read_all(healthy).await, expected(&request(&[1, 2], 5), 0, 64));
    let late = GenerationRequest { deadline: Some(Instant::now()), ..request(&[1], 5) };
    assert_eq!(read_all(submit(&handle, late)).await, [SequenceEvent::Failed(EngineError::Timeout)]);
}

#[tokio::test]
async fn death_is_loud() {
    let (handle, mut thread, open, reached) = start_gated(&config(1, 4));
    let running = submit(&handle, request(&[1], 2));
    reached.recv().expect("it runs");
    let fatal = submit(&handle, request(&[PANIC.0], 1));
    let waiting = submit(&handle, request(&[1], 1));
    let permit = handle.reserve().expect("a place");
    drop(open);
    assert_eq!(last(running).await, Some(SequenceEvent::Finished(FinishReason::Length)));
    let stopped = Some(SequenceEvent::Failed(EngineError::Stopped));
    assert_eq!(last(fatal).await, stopped);
    assert_eq!(last(waiting).await, stopped);
    assert!(!handle.status().alive, "nobody learns of the end before the status says so");
    assert!(matches!(thread.stopped().await, EngineEnd::Died(message) if message.contains("the fake model panics")));
    assert_eq!(permit.submit(request(&[1], 1)).err(), Some(SubmitError::Stopped));
    assert_eq!(handle.reserve().err(), Some(SubmitError::Stopped));
    assert_eq!(handle.status().waiting, 0);
}

#[tokio::test]
async fn a_shutdown_ends_what_is_left() {
    let (handle, mut thread, open, reached) = start_gated(&config(1, 4));
    let running = submit(&handle, request(&[1], 50));
    reached.recv().expect("it runs");
    let waiting = submit(&handle, request(&[1], 1));
    handle.shutdown();
    handle.shutdown();
    assert_eq!(handle.reserve().err(), Some(SubmitError::Stopped));
    open.send(()).expect("the engine waits");
    let shutting_down = Some(SequenceEvent::Failed(EngineError::ShuttingDown));
    assert_eq!(last(running).await, shutting_down);
    assert_eq!(last(waiting).await, shutting_down);
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown);
    let status = handle.status();
    assert_eq!((status.alive, status.running, status.waiting), (false, 0, 0));
}

#[tokio::test]
async fn an_idle_engine_hears_a_shutdown_and_is_never_stalled() {
    let (handle, mut thread) = start(&config(1, 1));
    assert_eq!(handle.status().stalled_seconds, 0.0);
    handle.shutdown();
    assert_eq!(thread.stopped().await, EngineEnd::Shutdown);
}

#[tokio::test]
async fn work_without_a_step_is_a_stall() {
    let (handle, _thread, open, reached) = start_gated(&config(1, 1));
    let stream = submit(&handle, request(&[1], 1));
    reached.recv().expect("it runs");
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert!(handle.status().stalled_seconds > 0.0);
    assert!((1..=60).contains(&handle.status().retry_after_seconds));
    open.send(()).expect("the engine waits");
    assert!(last(stream).await.is_some());
}

#[test]
fn limits_without_room_are_refused() {
    let good = config(1, 1);
    for bad in [
        EngineConfig { max_num_seqs: 0, ..good.clone() },
        EngineConfig { max_num_batched_tokens: 0, ..good.clone() },
        EngineConfig { max_queue: 0, ..good.clone() },
        EngineConfig { max_model_len: 0, ..good.clone() },
        EngineConfig { num_kv_blocks: 3, ..good.clone() },
    ] {
        let started = Engine::start_with(FakeExecutor::new(&good), &bad, metrics());
        assert!(matches!(started.err(), Some(StartError::Config(_))), "{bad:?}");
    }
    let dying = FakeExecutor::choosing(&good, |_, _| panic!("no first token"));
    let started = Engine::start_with(dying, &good, metrics());
    assert!(matches!(started.err(), Some(StartError::WarmUp(EngineEnd::Died(message))) if message == "no first token"));
}
