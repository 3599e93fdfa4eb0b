//! Attention against its specification, and the sharing of work.

use std::ops::Range;

use super::*;
use crate::{
    ids::{BlockId, TokenId},
    kernels::{self, math},
    kv_cache::{Geometry, KvDtype},
    model::{
        batch::{BatchSequence, Limits, LogitRows},
        test_config,
    },
    threads::WorkerPool,
};

const NUM_BLOCKS: usize = 40;

/// Three query heads a K/V head, heads of 20: neither fills a tile.
fn config() -> ModelConfig {
    ModelConfig { num_layers: 2, num_heads: 6, num_kv_heads: 2, head_dim: 20, ..test_config() }
}

/// A value in -1..1 that depends on everything given, and is a half.
fn value(kind: usize, position: usize, i: usize) -> f32 {
    ((kind * 7919 + position * 104_729 + i * 1299) % 2000) as f32 / 1024.0 - 1.0
}

fn rows(kind: usize, positions: Range<usize>, width: usize) -> Vec<f32> {
    positions.flat_map(|position| (0..width).map(move |i| value(kind, position, i))).collect()
}

/// Attention of one query as the text at the top says it, position by position.
fn specification(q: &[f32], position: usize, kv_head: usize, config: &ModelConfig) -> Vec<f32> {
    let hd = config.head_dim;
    let key = |p: usize, d: usize| value(1, p, kv_head * hd + d);
    let (mut m, mut l, mut acc) = (f32::NEG_INFINITY, 0.0, vec![0.0; hd]);
    for first in (0..=position).step_by(PARTITION) {
        let visible = first..(position + 1).min(first + PARTITION);
        let dot = |p| (0..hd).fold(0.0f32, |sum, d| q[d].mul_add(key(p, d), sum));
        let scores: Vec<f32> = visible.clone().map(|p| dot(p) * (1.0 / (hd as f32).sqrt())).collect();
        let m_i = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|score| math::exp(score - m_i)).collect();
        let mut lanes = [0.0; 16];
        weights.iter().enumerate().for_each(|(p, weight)| lanes[p % 16] += weight);
        let (a, b) = (math::exp(m - m.max(m_i)), math::exp(m_i - m.max(m_i)));
        l = l * a + math::lane_tree(&lanes) * b;
        for (d, acc) in acc.iter_mut().enumerate() {
            let v = |p| value(2, p, kv_head * hd + d);
            let sum = visible.clone().zip(&weights).fold(0.0f32, |sum, (p, weight)| weight.mul_add(v(p), sum));
            *acc = *acc * a + sum * b;
        }
        m = m.max(m_i);
    }
    acc.iter().map(|acc| acc / l).collect()
}

#[test]
fn every_kernel_follows_the_specification_to_the_bit() {
    let config = config();
    let (q_width, kv_width) = (6 * 20, 2 * 20);
    let table: Vec<_> = (0..NUM_BLOCKS).rev().map(|block| BlockId(block as u32)).collect();
    let limits = Limits { vocab_size: 9, num_blocks: NUM_BLOCKS, max_rows: 400, max_context: 600 };
    let dtypes = [KvDtype::F32, KvDtype::F16];
    for (kernel, dtype) in kernels::available().iter().flat_map(|kernel| dtypes.map(|dtype| (kernel, dtype))) {
        let mut kv = KvCache::with_geometry(Geometry::new(&config, dtype), NUM_BLOCKS).expect("small");
        // Three workers cut units of one partition and of two, and take pieces of the last ones.
        let mut pool = WorkerPool::new(3);
        let edges = [0, 1, 33, 84, 148, 212, 250, 270, 271, 600];
        for &[start, end] in edges.array_windows() {
            let tokens = vec![TokenId(1); end - start];
            let sequence =
                BatchSequence { tokens: &tokens, start, stored: 0, block_table: &table, logits: LogitRows::None };
            let batch = Batch::checked(&limits, &[sequence]).expect("valid");
            assert_eq!(num_pieces(batch.spans(), 2, 3).is_some(), end == 600);
            let phases = &mut Phases { pool: &mut pool, kernel: *kernel, num_rows: end - start };
            let (k, v) = (rows(1, start..end, kv_width), rows(2, start..end, kv_width));
            store(phases, &mut kv, 1, batch.rows(), &k, &v);
            let q = rows(0, start..end, q_width);
            let mut out = vec![0.0; q.len()];
            let mut scratch = vec![f32::NAN; 3 * scratch_len(&config)];
            let mut partials = vec![f32::NAN; partials_len(&config, 600, 3)];
            attend(phases, &kv, 1, &batch, &q, &mut out, &mut scratch, &mut partials);
            for (i, (q, out)) in q.chunks_exact(20).zip(out.chunks_exact(20)).enumerate() {
                let expected = specification(q, start + i / 6, i % 6 / 3, &config);
                assert_eq!(out, expected, "{} {dtype:?} row {} head {}", kernel.name(), start + i / 6, i % 6);
            }
        }
    }
}

#[test]
fn units_of_work_are_all_done_once_whatever_the_number_of_workers() {
    let table: Vec<_> = (0..NUM_BLOCKS as u32).map(BlockId).collect();
    let limits = Limits { vocab_size: 9, num_blocks: NUM_BLOCKS, max_rows: 128, max_context: 600 };
    let tokens = [TokenId(0); 108];
    let sequence = |len: usize, start, block| BatchSequence {
        tokens: &tokens[..len],
        start,
        stored: 0,
        block_table: &table[block..],
        logits: LogitRows::None,
    };
    let batch =
        Batch::checked(&limits, &[sequence(108, 0, 0), sequence(1, 300, 10), sequence(2, 17, 35)]).expect("valid");
    for num_threads in [1, 2, 3, 5, 16] {
        let placed: Vec<_> = place(batch.spans(), 3, num_threads).collect();
        let units: Vec<_> = placed.iter().map(|placed| (placed.span.rows.start, placed.head)).collect();
        let sequences = [&[0, 96][..], &[108], &[109]];
        let heads = sequences.iter().flat_map(|spans| (0..3).map(move |head| (spans, head)));
        let expected: Vec<_> = heads.flat_map(|(spans, head)| spans.iter().map(move |&row| (row, head))).collect();
        assert_eq!(units, expected);
        let mut slots = 0..num_threads - 1;
        for placed in &placed {
            let mut partitions: Vec<_> = (placed.first..=placed.last).flat_map(|w| placed.partitions_of(w)).collect();
            partitions.sort_unstable();
            assert_eq!(partitions, (0..num_partitions(placed.span)).collect::<Vec<_>>());
            assert!(placed.first <= placed.last && placed.last < num_threads);
            assert_eq!(placed.slot, if placed.first == placed.last { None } else { slots.next() });
        }
    }
    // Rows 0..96, 96..108, 108, and 109..111, each of three heads.
    let num_pieces = 3 * (6 + 1 + 1 + 1);
    for chunk_len in [1, 2, 5, num_pieces] {
        let chunks = (0..num_pieces).step_by(chunk_len).map(|first| first..num_pieces.min(first + chunk_len));
        let units: Vec<_> = chunks.flat_map(|chunk| units_of(batch.spans(), 3, chunk)).collect();
        assert!(units.iter().all(|(span, _)| batch.rows()[span.rows.start].position == span.start), "{units:?}");
        let mut rows: Vec<_> =
            units.iter().flat_map(|(span, head)| span.rows.clone().map(|row| (*head, row))).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..3).flat_map(|head| (0..111).map(move |row| (head, row))).collect::<Vec<_>>());
    }
}

#[test]
fn workers_take_pieces_where_none_is_large() {
    let table: Vec<_> = (0..NUM_BLOCKS as u32).map(BlockId).collect();
    let limits = Limits { vocab_size: 9, num_blocks: NUM_BLOCKS, max_rows: 400, max_context: 640 };
    let tokens = [TokenId(0); 320];
    let sequence = |len: usize, start| BatchSequence {
        tokens: &tokens[..len],
        start,
        stored: 0,
        block_table: &table,
        logits: LogitRows::None,
    };
    let num_pieces = |len, start, num_threads| {
        let batch = Batch::checked(&limits, &[sequence(len, start)]).expect("valid");
        num_pieces(batch.spans(), 4, num_threads)
    };
    assert_eq!([1, 2, 4].map(|num_threads| num_pieces(320, 0, num_threads)), [None, Some(80), Some(80)]);
    assert_eq!([num_pieces(320, 0, 8), num_pieces(1, 500, 2), num_pieces(33, 100, 2)], [None; 3]);
}
