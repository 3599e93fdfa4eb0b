//! What the machine can do at most: how fast memory delivers and how fast a kernel's dot-product instruction multiplies.
//! Every speed is judged as a share of these, taken in the same process.

use std::time::{Duration, Instant};

use super::{FloatOp, TernaryKernel, packing::huge_pages, prefetch};
use crate::threads::{SharedRows, WorkerPool};

/// Larger than the last-level cache of most machines, so that hardly any of it is still there in the next round.
const READ_BYTES: usize = 256 << 20;
/// Timed at once: long against the start of a phase, short against whatever else runs on the machine.
const WINDOW_BYTES: usize = 32 << 20;
/// The granularity of shares.
const BLOCK_BYTES: usize = 4096;
/// How far ahead the blocks are asked for, as by the kernels.
const AHEAD_BYTES: usize = 8192;
/// Rounds of which the best one counts: everything that disturbs a measurement makes it slower.
const ROUNDS: u32 = 5;

/// What memory is filled with: codes of weights in every layout.
const FILL: u8 = 0x55;

/// Bytes a second that all workers of `pool` read together from memory.
///
/// # Panics
/// When memory is exhausted.
pub fn read_bytes_per_s(pool: &mut WorkerPool) -> f64 {
    let mut memory = huge_pages(READ_BYTES);
    touch(&mut memory, pool);
    let isa = super::available().last().expect("the scalar kernel is always there").isa();
    let mut windows = memory.chunks_exact(WINDOW_BYTES).cycle();
    let seconds = best_of(ROUNDS * (READ_BYTES / WINDOW_BYTES) as u32, || {
        let window = windows.next().expect("a cycle has no end");
        pool.run(&|worker| {
            let share = worker.share(WINDOW_BYTES, BLOCK_BYTES);
            std::hint::black_box(isa.run(Sum(&window[share])));
        });
    });
    WINDOW_BYTES as f64 / seconds
}

/// Multiply-accumulates a second that all workers of `pool` reach together with `kernel`'s dot product of bytes, operands
/// and sums in registers.
pub fn int8_macs_per_s(kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> f64 {
    // Rounds enough that starting and ending a phase, a microsecond, do not show.
    let start = Instant::now();
    kernel.multiply_registers(1000);
    let rounds = 1000 * (10_000_000 / start.elapsed().as_nanos().max(1)).clamp(1, 1000) as u32;
    let macs = kernel.multiply_registers(1) * u64::from(rounds) * pool.num_threads() as u64;
    let seconds = best_of(ROUNDS, || {
        pool.run(&|_| {
            std::hint::black_box(kernel.multiply_registers(rounds));
        });
    });
    macs as f64 / seconds
}

/// Writes every page, in parallel: memory never written is one page of zeros that stays in the cache.
pub(super) fn touch(memory: &mut [u8], pool: &mut WorkerPool) {
    // In blocks: shared memory keeps a bit for each of its rows.
    let (blocks, rest) = memory.as_chunks_mut::<BLOCK_BYTES>();
    rest.fill(FILL);
    let num_blocks = blocks.len();
    let shared = SharedRows::new(blocks, 1);
    pool.run(&|worker| shared.claim(worker.share(num_blocks, 1)).as_flattened_mut().fill(FILL));
}

/// The shortest time of `rounds` calls in seconds.
pub(super) fn best_of(rounds: u32, mut task: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        task();
        start.elapsed()
    };
    (0..rounds).map(time).min().unwrap_or(Duration::MAX).max(Duration::from_nanos(1)).as_secs_f64()
}

/// Reads a slice once and asks for what follows.
struct Sum<'a>(&'a [u8]);

impl FloatOp for Sum<'_> {
    type Output = u64;

    #[inline(always)]
    fn call(self) -> u64 {
        let mut lanes = [0_u64; 32];
        for chunk in self.0.as_chunks::<256>().0 {
            for line in 0..4 {
                prefetch(chunk.as_ptr().wrapping_add(AHEAD_BYTES + 64 * line));
            }
            for (lane, bytes) in lanes.iter_mut().zip(chunk.as_chunks().0) {
                *lane = lane.wrapping_add(u64::from_ne_bytes(*bytes));
            }
        }
        lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
    }
}
