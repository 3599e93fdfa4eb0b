//! The pool: every worker once per run, panics passed on, idle workers parked; and claims that cannot overlap.
#![allow(clippy::unwrap_used)]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::{cpus::cgroup_quota, *};

const POOL_SIZES: [usize; 4] = [1, 2, 3, 5];

#[test]
fn every_worker_runs_every_task_once() {
    for num_threads in POOL_SIZES {
        let mut pool = WorkerPool::new(num_threads);
        assert_eq!(pool.num_threads(), num_threads);
        let counts: Vec<AtomicUsize> = (0..num_threads).map(|_| AtomicUsize::new(0)).collect();
        for round in 1..=300 {
            pool.run(&|worker| {
                assert_eq!(worker.num_threads(), num_threads);
                counts[worker.index()].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == round));
        }
    }
}

#[test]
fn shares_cover_the_range_once_in_whole_tiles() {
    for num_threads in POOL_SIZES {
        for (len, tile) in [(0, 32), (1, 32), (31, 32), (32, 32), (33, 32), (640, 32), (6912, 32), (7, 1), (100, 7)] {
            let shares: Vec<_> = (0..num_threads).map(|index| Worker { index, num_threads }.share(len, tile)).collect();
            let mut next = 0;
            for share in &shares {
                assert_eq!(share.start, next);
                assert!(share.start.is_multiple_of(tile) || share.start == len);
                next = share.end;
            }
            assert_eq!(next, len);
            let tiles = shares.iter().map(|share| share.len().div_ceil(tile));
            assert!(tiles.clone().max().unwrap() - tiles.min().unwrap() <= 1);
        }
    }
}

#[test]
fn chunks_cover_the_range_once_also_when_one_worker_hardly_works() {
    for num_threads in POOL_SIZES {
        let mut pool = WorkerPool::new(num_threads);
        for len in [0, 1, 2, 5, 64, 333, 4008] {
            for slow in [None, Some(0), Some(num_threads - 1)] {
                let counts: Vec<AtomicUsize> = (0..len).map(|_| AtomicUsize::new(0)).collect();
                let first_of_slow = slow.map(|index| share(len, index, num_threads).start);
                pool.run_chunks(len, 1 + len % 3, &|chunk| {
                    if Some(chunk.start) == first_of_slow {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    chunk.for_each(|index| {
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{len} on {num_threads}");
            }
        }
    }
}

#[test]
fn a_pool_of_no_threads_has_the_caller() {
    let mut pool = WorkerPool::new(0);
    let count = AtomicUsize::new(0);
    pool.run_chunks(7, 1, &|chunk| {
        count.fetch_add(chunk.len(), Ordering::Relaxed);
    });
    assert_eq!((pool.num_threads(), count.into_inner()), (1, 7));
}

#[test]
fn a_panic_on_any_worker_reaches_the_caller_and_the_pool_lives_on() {
    let mut pool = WorkerPool::new(3);
    for culprit in 0..3 {
        let finished = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|worker| {
                assert!(worker.index() != culprit, "worker {culprit} fails");
                finished.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let payload = outcome.unwrap_err();
        assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("worker {culprit} fails"));
        assert_eq!(finished.load(Ordering::Relaxed), 2);
    }
    let count = AtomicUsize::new(0);
    pool.run(&|_| _ = count.fetch_add(1, Ordering::Relaxed));
    assert_eq!(count.load(Ordering::Relaxed), 3);
}

#[test]
fn idle_workers_park_and_wake() {
    let mut pool = WorkerPool::new(3);
    for _ in 0..5 {
        let deadline = Instant::now() + Duration::from_secs(60);
        while pool.inner.num_parked.0.load(Ordering::SeqCst) < 2 {
            assert!(Instant::now() < deadline, "idle workers never parked");
            thread::sleep(Duration::from_millis(1));
        }
        let count = AtomicUsize::new(0);
        pool.run(&|_| _ = count.fetch_add(1, Ordering::Relaxed));
        assert_eq!(count.load(Ordering::Relaxed), 3);
    }
}

#[test]
fn workers_fill_disjoint_rows_and_columns() {
    let mut pool = WorkerPool::new(3);
    let mut rows = vec![0; 10 * 4];
    let shared = SharedRows::new(&mut rows, 4);
    pool.run(&|worker| {
        let share = worker.share(shared.num_rows(), 1);
        for (row, values) in share.clone().zip(shared.claim(share).chunks_exact_mut(4)) {
            values.fill(row);
        }
    });
    assert!(rows.iter().enumerate().all(|(index, &value)| value == index / 4));

    let mut matrix = vec![0.0; 3 * 100];
    let shared = SharedColumns::new(&mut matrix, 100, 32);
    pool.run(&|worker| {
        let share = worker.share(100, 32);
        let mut columns = shared.claim(share.clone());
        for row in 0..columns.num_rows() {
            for (value, column) in columns.row_mut(row).iter_mut().zip(share.clone()) {
                *value = (row * 1000 + column) as f32;
            }
        }
    });
    assert!(matrix.iter().enumerate().all(|(index, &value)| value == (index / 100 * 1000 + index % 100) as f32));
}

#[test]
fn a_second_claim_panics() {
    let mut data = vec![0; 200];
    let shared = SharedRows::new(&mut data, 1);
    let first = shared.claim(10..150);
    let refused = |range: Range<usize>| catch_unwind(AssertUnwindSafe(|| _ = shared.claim(range))).is_err();
    assert!(refused(149..151));
    assert!(refused(0..11));
    assert!(refused(64..65));
    assert!(refused(150..201), "outside");
    assert!(!refused(0..0) && !refused(10..10), "nothing overlaps with nothing");
    assert_eq!(shared.claim(155..200).len(), 45);
    assert_eq!(first.len(), 140);

    let mut matrix = vec![0.0; 2 * 70];
    let shared = SharedColumns::new(&mut matrix, 70, 32);
    let refused = |range: Range<usize>| catch_unwind(AssertUnwindSafe(|| _ = shared.claim(range))).is_err();
    assert!(refused(1..32) && refused(0..33) && refused(64..71), "not whole tiles");
    assert_eq!(shared.claim(32..70).num_columns(), 38);
    assert!(refused(64..70));
    assert_eq!(shared.claim(0..32).window(3..5).row_mut(1).len(), 2);
}

#[test]
fn quotas_of_both_cgroup_versions_are_rounded_up() {
    let root = std::env::temp_dir().join(format!("bitnet-cgroup-{}", std::process::id()));
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("pod/cpu.max", "250000 100000\n");
    write("pod/box/cpu.max", "max 100000\n");
    write("cpu,cpuacct/cpu.cfs_quota_us", "100000\n");
    write("cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    write("cpu,cpuacct/free/cpu.cfs_quota_us", "-1\n");
    write("cpu,cpuacct/free/cpu.cfs_period_us", "100000\n");
    assert_eq!(cgroup_quota("0::/pod/box\n", &root), Some(3), "the tightest on the way up");
    assert_eq!(cgroup_quota("0::/elsewhere\n", &root), None);
    assert_eq!(cgroup_quota("5:memory:/pod\n4:cpu,cpuacct:/free\n", &root), Some(1));
    assert_eq!(cgroup_quota("nonsense", &root), None);
    std::fs::remove_dir_all(&root).unwrap();
    assert!(default_num_threads() >= 1);
}
