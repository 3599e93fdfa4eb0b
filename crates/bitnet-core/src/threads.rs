//! The pinned worker pool: `num_threads - 1` threads and the caller, spinning between phases of a step and parked when
//! idle. Kernels stay single-threaded; callers split rows statically, so results never depend on the number of threads.

/// A fixed set of pinned workers. The caller of [`WorkerPool::run`] is worker 0.
#[derive(Debug)]
pub struct WorkerPool {}

impl WorkerPool {
    /// A pool of `num_threads` workers (at least 1), the caller included.
    pub fn new(num_threads: usize) -> Self {
        let _ = num_threads;
        unimplemented!()
    }

    /// Workers, the caller included.
    pub fn num_threads(&self) -> usize {
        unimplemented!()
    }

    /// Runs `task(worker_index)` once on every worker and returns when all have ended.
    ///
    /// # Panics
    /// When the task panicked on any worker.
    pub fn run(&mut self, task: &(dyn Fn(usize) + Sync)) {
        let _ = task;
        unimplemented!()
    }
}

/// Physical cores this process may use: affinity mask and cgroup quota respected, at least 1.
pub fn default_num_threads() -> usize {
    unimplemented!()
}
