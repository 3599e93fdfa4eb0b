//! The pinned worker pool: `num_threads - 1` threads and the caller, spinning between phases of a step and parked when
//! idle. Kernels stay single-threaded; what a share of a phase gives does not depend on who computes it, so results never
//! depend on the number of threads.
//!
//! A phase is one [`WorkerPool::run`]: what it writes is exclusive during the call ([`SharedRows`], [`SharedColumns`]) and
//! free to read after it. There is no barrier inside a phase; a call costs less than a microsecond while workers spin.
//!
//! Cores are not equally fast: on a virtual machine each shares its caches and its instructions with a neighbour, or not, by
//! the second. So long phases are [`WorkerPool::run_chunks`]: who has finished early steals from the others.
#![allow(unsafe_code)]

mod chunks;
mod cpus;
mod shared;
#[cfg(test)]
mod tests;

use std::{
    any::Any,
    cell::UnsafeCell,
    fmt, iter,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use chunks::Chunks;
pub use cpus::default_num_threads;
pub use shared::{ColumnsMut, SharedColumns, SharedRows};

/// Polls before a waiting thread starts to yield: some tens of microseconds, longer than the gap between two phases.
const SPINS: u32 = 2000;
/// Yields before an idle worker parks.
const YIELDS: u32 = 20;

/// A fixed set of pinned workers. The caller of [`WorkerPool::run`] is worker 0.
pub struct WorkerPool {
    inner: Arc<Inner>,
    handles: Vec<JoinHandle<()>>,
    /// Where the caller belongs, when workers are pinned.
    first_cpu: Option<usize>,
}

/// What a worker does with the chunks it can take.
pub type ChunksTask<'a> = dyn Fn(&Worker, &mut dyn Iterator<Item = Range<usize>>) + Sync + 'a;

/// One worker's view of a phase.
#[derive(Debug)]
pub struct Worker {
    index: usize,
    num_threads: usize,
}

impl WorkerPool {
    /// A pool of `num_threads` workers (at least 1), the caller included. When the system refuses a thread the pool is
    /// smaller, and says so in the log.
    pub fn new(num_threads: usize) -> Self {
        let inner = Arc::new(Inner { chunks: Chunks::new(num_threads.max(1)), ..Inner::default() });
        let cpus = cpus::own(num_threads);
        let mut handles = Vec::with_capacity(num_threads.saturating_sub(1));
        for index in 1..num_threads {
            let inner = Arc::clone(&inner);
            let cpu = cpus.get(index).copied();
            let body = move || {
                if let Some(cpu) = cpu {
                    cpus::pin_current_thread(cpu);
                }
                inner.work(index);
            };
            match thread::Builder::new().name(format!("bitnet-worker-{index}")).spawn(body) {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    tracing::warn!(%error, wanted = num_threads, got = index, "cannot start every worker thread");
                    break;
                }
            }
        }
        Self { inner, handles, first_cpu: cpus.first().copied() }
    }

    /// Pins the calling thread beside the workers, for a thread that will do nothing but [`run`](Self::run): unpinned, it
    /// is often put on a worker's CPU, and both then take turns.
    pub fn pin_caller(&self) {
        if let Some(cpu) = self.first_cpu {
            cpus::pin_current_thread(cpu);
        }
    }

    /// Workers, the caller included.
    pub fn num_threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Runs `task` once on every worker and returns when all have ended. What the workers wrote is visible afterwards.
    ///
    /// # Panics
    /// When the task panicked on any worker: with the panic of one of them, after all have ended.
    pub fn run(&mut self, task: &(dyn Fn(&Worker) + Sync)) {
        let num_threads = self.num_threads();
        self.start(task, num_threads);
        let own = catch_unwind(AssertUnwindSafe(|| task(&Worker { index: 0, num_threads })));
        self.inner.wait_until_done();
        let theirs = self.inner.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// Calls `task` for chunks of `0..len` that together are all of it, each once: every worker takes chunks from the start of a
    /// share of its own, and then from the end of those of others. A chunk is at least `min` long, or the last of a share.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_chunks(&mut self, len: usize, min: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
        self.run_with_chunks(len, min, &|_, chunks| chunks.for_each(task));
    }

    /// [`Self::run_chunks`] for workers that need something of their own: `task` is called once on each, and takes chunks until
    /// there are none left.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_with_chunks(&mut self, len: usize, min: usize, task: &ChunksTask<'_>) {
        let inner = Arc::clone(&self.inner);
        let num_threads = self.num_threads();
        inner.chunks.share_out(len, num_threads);
        self.run(&|worker| {
            let take = || inner.chunks.take(worker.index(), num_threads, min);
            task(worker, &mut iter::from_fn(take));
        });
    }

    /// Publishes `task` to the other workers and wakes the parked ones.
    fn start(&mut self, task: &(dyn Fn(&Worker) + Sync), num_threads: usize) {
        if self.handles.is_empty() {
            return;
        }
        let task: *const (dyn Fn(&Worker) + Sync + '_) = task;
        // SAFETY: only the lifetime changes. Workers call the task between the epoch's step and their decrement of
        // `num_running`, and `run` does not return, not even by unwinding, before that counter is zero.
        let task: *const (dyn Fn(&Worker) + Sync + 'static) = unsafe { std::mem::transmute(task) };
        // SAFETY: no worker reads the cell now: `&mut self` excludes a second caller, and the last run waited for all.
        unsafe { *self.inner.job.get() = Some(Job { task, num_threads }) };
        self.inner.num_running.0.store(self.handles.len(), Ordering::Relaxed);
        self.wake();
    }

    /// Steps the epoch. Sequentially consistent with the workers' "announce parking, then look again", so that one of the
    /// two sides always sees the other.
    fn wake(&self) {
        self.inner.epoch.0.fetch_add(1, Ordering::SeqCst);
        if self.inner.num_parked.0.load(Ordering::SeqCst) > 0 {
            self.handles.iter().for_each(|handle| handle.thread().unpark());
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        self.wake();
        for handle in self.handles.drain(..) {
            // A worker catches the panics of its tasks, so there is nothing to learn from the result.
            let _ = handle.join();
        }
    }
}

impl fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerPool").field("num_threads", &self.num_threads()).finish_non_exhaustive()
    }
}

impl Worker {
    /// `0..num_threads`; 0 is the thread that called [`WorkerPool::run`].
    pub fn index(&self) -> usize {
        self.index
    }

    /// Workers in this phase.
    pub fn num_threads(&self) -> usize {
        self.num_threads
    }

    /// This worker's contiguous share of `0..len`: whole tiles of `tile` elements, the last tile possibly short. The
    /// shares of all workers cover the range once, and differ by at most one tile.
    pub fn share(&self, len: usize, tile: usize) -> Range<usize> {
        let tiles = share(len.div_ceil(tile), self.index, self.num_threads);
        (tiles.start * tile).min(len)..(tiles.end * tile).min(len)
    }
}

/// The share of worker `index` in `0..len`.
fn share(len: usize, index: usize, num_threads: usize) -> Range<usize> {
    len * index / num_threads..len * (index + 1) / num_threads
}

/// What the caller and the workers share. Each counter has its own cache line pair, or polling one would slow another.
#[derive(Default)]
struct Inner {
    epoch: CacheLine<AtomicU64>,
    num_running: CacheLine<AtomicUsize>,
    num_parked: CacheLine<AtomicUsize>,
    chunks: Chunks,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(&Worker) + Sync + 'static),
    num_threads: usize,
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct CacheLine<T>(T);

// SAFETY: `job` is the one field that is not `Sync`. It is written by the caller before it steps `epoch` and read by
// workers after they saw that step (an acquire load), before their decrement of `num_running`, for which the next writer
// waits. The task it points to is `Sync`.
unsafe impl Sync for Inner {}
// SAFETY: as above; the pointer is followed only while the caller of `run` keeps its target alive.
unsafe impl Send for Inner {}

impl Inner {
    /// A worker's life: wait for a step of the epoch, run the task, report, until the pool is dropped.
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_step(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: the epoch moved, so the caller has written the job and will not touch it before this worker's
            // decrement below.
            let job = unsafe { *self.job.get() }.expect("a job is published before the epoch moves");
            let worker = Worker { index, num_threads: job.num_threads };
            // SAFETY: the caller keeps the task alive until `num_running` is zero.
            let task = unsafe { &*job.task };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(&worker))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
            self.num_running.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// Returns the epoch once it differs from `seen`: spinning, then yielding, then parked.
    fn wait_for_step(&self, seen: u64) -> u64 {
        for attempt in 0..SPINS + YIELDS {
            let epoch = self.epoch.0.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            relax(attempt);
        }
        self.num_parked.0.fetch_add(1, Ordering::SeqCst);
        let epoch = loop {
            let epoch = self.epoch.0.load(Ordering::SeqCst);
            if epoch != seen {
                break epoch;
            }
            thread::park();
        };
        self.num_parked.0.fetch_sub(1, Ordering::SeqCst);
        epoch
    }

    fn wait_until_done(&self) {
        let mut attempt = 0;
        while self.num_running.0.load(Ordering::Acquire) > 0 {
            relax(attempt);
            attempt = attempt.saturating_add(1);
        }
    }
}

/// One step of waiting: a pause at first, then the CPU is offered to others (there may be more workers than CPUs).
fn relax(attempt: u32) {
    if attempt < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
}
