//! Nothing is allocated on the token path: a step after the first takes no memory but what its `Batch` is built of.

mod common;

use std::alloc::System;

use bitnet_core::{TokenId, kv_cache::KvDtype, model::LogitRows};
use common::{Engine, Setup, Share, golden, open};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

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
        let region = Region::new(ALLOCATOR);
        engine.model.forward(&batch, &mut engine.kv, &mut engine.workspace);
        engine.model.logits(0..1, &mut engine.workspace);
        let change = region.change();
        change.allocations + change.reallocations
    };
    allocations_of_step(PROMPT.len());
    (PROMPT.len() + 1..40).map(allocations_of_step).sum()
}
