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

// One test in this file: another one's thread would be counted too.
#[test]
fn a_step_allocates_nothing_but_its_batch() {
    const PROMPT: [TokenId; 3] = [TokenId(5); 3];
    let checkpoint = open(&golden("p1_packed"));
    for batch_size in [1, 9] {
        let setup = Setup { num_threads: 2, num_sequences: batch_size, ..Setup::default() };
        let mut engine = Engine::new(&checkpoint, KvDtype::F16, setup);
        engine.all_logits(&PROMPT, PROMPT.len());
        for start in PROMPT.len()..40 {
            let share = |slot| Share { slot, tokens: &[TokenId(5)], start, logits: LogitRows::Last };
            let shares: Vec<_> = (0..batch_size).map(share).collect();
            let batch = engine.batch(&shares);
            let before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
            engine.model.forward(&batch, &mut engine.kv, &mut engine.workspace);
            engine.model.logits(0..1, &mut engine.workspace);
            let num_allocations = NUM_ALLOCATIONS.load(Ordering::Relaxed) - before;
            // The first step of so many rows takes its scratch.
            let is_first = start == PROMPT.len();
            assert!(is_first || num_allocations == 0, "{num_allocations} at {start}, batch {batch_size}");
        }
    }
}
