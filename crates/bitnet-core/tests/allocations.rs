//! Nothing is allocated on the token path: a step after the first takes no memory but what its `Batch` is built of.
#![allow(unsafe_code)]

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use bitnet_core::{TokenId, kv_cache::KvDtype, model::LogitRows};
use common::{Engine, Setup, Share, golden, open};

/// The system's allocator, counting.
struct Counting;

static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's; counting has no part in what it returns.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, and every block comes from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Of one worker: its interleaved activations and its unpacked panel, each for the narrow and for the wide layers.
const SCRATCH_ALLOCATIONS: usize = 4;

/// Without the test harness: its main thread allocates too, at whatever moment it begins to wait for a test.
fn main() {
    for (num_threads, batch_size) in [(1, 1), (1, 9), (2, 1), (2, 9)] {
        let num_allocations = allocations_of_later_steps(num_threads, batch_size);
        // Other workers take their scratch when they first get a product's share, which may be late: shares are stolen.
        let allowed = (num_threads - 1) * SCRATCH_ALLOCATIONS;
        assert!(num_allocations <= allowed, "{num_allocations} with {num_threads} threads, batch {batch_size}");
    }
    println!("test a_step_allocates_nothing_but_its_batch ... ok");
}

/// Of 36 steps after the prompt and the first step, which takes the caller's scratch.
fn allocations_of_later_steps(num_threads: usize, batch_size: usize) -> usize {
    const PROMPT: [TokenId; 3] = [TokenId(5); 3];
    let setup = Setup { num_threads, num_sequences: batch_size, ..Setup::default() };
    let mut engine = Engine::new(&open(&golden("p1_packed")), KvDtype::F16, setup);
    engine.all_logits(&PROMPT, PROMPT.len());
    let mut allocations_of_step = |start| {
        let share = |slot| Share { slot, tokens: &[TokenId(5)], start, logits: LogitRows::Last };
        let shares: Vec<_> = (0..batch_size).map(share).collect();
        let batch = engine.batch(&shares);
        let before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
        engine.model.forward(&batch, &mut engine.kv, &mut engine.workspace);
        engine.model.logits(0..1, &mut engine.workspace);
        NUM_ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    allocations_of_step(PROMPT.len());
    (PROMPT.len() + 1..40).map(allocations_of_step).sum()
}
