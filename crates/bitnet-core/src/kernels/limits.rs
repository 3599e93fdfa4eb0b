//! What the machine can do at most: how fast memory delivers and how fast a kernel's dot-product instruction multiplies.
//! Every speed is judged as a share of these, taken in the same process.
//!
//! How it is measured, so that it can be trusted:
//! 1. By the very workers that run the model, pinned as they are then.
//! 2. A sample reads all of `READ_BYTES` at once, some ten milliseconds without a pause, about as long as a step of a model: a
//!    shorter one could be flattered by what caches and memory controllers still hold.
//! 3. A virtual machine's speed changes with its neighbours and with the cores it is moved to (48 and 78 GB/s were seen by
//!    turns on one machine, seconds each), so samples are taken before and after each thing that is measured: what it is
//!    compared with must be the machine of the same moment. Of the two the better one counts, for whatever disturbs a
//!    sample makes it slower, and a limit that is too low would praise us.
//! 4. Multiplications run on registers, with more independent sums than their latency times their rate.

use std::time::{Duration, Instant};

use super::{
    FloatOp, TernaryKernel,
    arena::{Arena, Piece, touch},
    prefetch_line,
};
use crate::threads::WorkerPool;

/// Many times the last-level cache of most machines, so that hardly any of it is still there in the next sample.
const READ_BYTES: usize = 512 << 20;
/// The granularity of shares.
const BLOCK_BYTES: usize = 4096;
/// Bytes.
const READ_AHEAD: usize = 8192;
/// How long multiplications are timed in a sample: starting and ending a phase, a microsecond, does not show.
const MULTIPLY_SECONDS: f64 = 0.005;
/// Rounds of them that are timed to find out how many that is.
const TRIED_ROUNDS: u32 = 1000;

/// What the machine can do at most, at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes a second that all workers read together from memory.
    pub read_bytes_per_s: f64,
    /// Multiply-accumulates a second that all workers reach together with the kernel's dot product of bytes.
    pub int8_macs_per_s: f64,
}

impl Limits {
    /// The better of each.
    pub fn better(&self, other: &Self) -> Self {
        Self {
            read_bytes_per_s: self.read_bytes_per_s.max(other.read_bytes_per_s),
            int8_macs_per_s: self.int8_macs_per_s.max(other.int8_macs_per_s),
        }
    }

    /// Tokens a second that no engine can pass that reads so many bytes and multiplies so many weights for each.
    /// (One that looks sums up instead of multiplying is not bound by it, as our products of many tokens on AVX2.)
    pub fn tokens_per_s(&self, bytes_per_token: f64, macs_per_token: f64) -> f64 {
        1.0 / (bytes_per_token / self.read_bytes_per_s).max(macs_per_token / self.int8_macs_per_s)
    }
}

/// Takes samples of the limits.
#[derive(Debug)]
pub struct Ruler {
    memory: Piece,
    /// Of `multiply_registers` in a sample.
    rounds: u32,
}

impl Ruler {
    /// Takes the memory that is read.
    ///
    /// # Panics
    /// When memory is exhausted.
    pub fn new(kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> Self {
        let mut memory = Arena::whole(READ_BYTES);
        touch(&mut memory, pool);
        // The fastest of some: whoever came between would make all samples too short.
        let tries = (0..20).map(|_| {
            seconds_of(|| {
                kernel.multiply_registers(TRIED_ROUNDS);
            })
        });
        let seconds = tries.fold(f64::INFINITY, f64::min);
        let rounds = TRIED_ROUNDS * (MULTIPLY_SECONDS / seconds).clamp(1.0, 10_000.0) as u32;
        Self { memory, rounds }
    }

    /// Measures both limits, reading with and without asking for what follows; takes some tens of milliseconds.
    pub fn sample(&self, kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> Limits {
        let isa = super::available().last().expect("the scalar kernel is always there").isa();
        let mut read = |asks_ahead| {
            seconds_of(|| {
                pool.run(&|worker| {
                    let bytes = &self.memory[worker.share(READ_BYTES, BLOCK_BYTES)];
                    std::hint::black_box(isa.run(Sum { bytes, asks_ahead }));
                });
            })
        };
        let read_seconds = [true, false].map(&mut read).into_iter().fold(f64::INFINITY, f64::min);
        let macs = kernel.multiply_registers(1) * u64::from(self.rounds) * pool.num_threads() as u64;
        let multiply_seconds = seconds_of(|| {
            pool.run(&|_| {
                std::hint::black_box(kernel.multiply_registers(self.rounds));
            });
        });
        Limits { read_bytes_per_s: READ_BYTES as f64 / read_seconds, int8_macs_per_s: macs as f64 / multiply_seconds }
    }
}

/// How long `task` takes, in seconds; more than none.
pub(super) fn seconds_of(task: impl FnOnce()) -> f64 {
    let start = Instant::now();
    task();
    start.elapsed().max(Duration::from_nanos(1)).as_secs_f64()
}

/// Reads a slice once, and may ask for what is [`READ_AHEAD`] on. (Kernels ask for lines of four runs by turns, which
/// is no faster where nothing but reading is done.)
struct Sum<'a> {
    bytes: &'a [u8],
    asks_ahead: bool,
}

impl FloatOp for Sum<'_> {
    type Output = u64;

    #[inline(always)]
    fn call(self) -> u64 {
        let mut lanes = [0_u64; 32];
        for chunk in self.bytes.as_chunks::<256>().0 {
            if self.asks_ahead {
                for line in 0..4 {
                    prefetch_line(chunk.as_ptr().wrapping_add(READ_AHEAD + 64 * line));
                }
            }
            for (lane, bytes) in lanes.iter_mut().zip(chunk.as_chunks().0) {
                *lane = lane.wrapping_add(u64::from_ne_bytes(*bytes));
            }
        }
        lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
    }
}
