//! One property suite, run for every kernel and every instruction set of this CPU: bits against a naive reference.

use std::convert::Infallible;

use super::{
    math,
    packing::{PackedTernary, ROW_TILE},
    *,
};
use crate::{
    quant::activation::ActivationBuffer,
    threads::{SharedColumns, WorkerPool},
};

/// A small generator: the tests need many values, none of them secret.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 32);
        x.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
    }

    fn weights(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| (self.next() % 3) as i8 - 1).collect()
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() % 20_001) as f32 / 1000.0 - 10.0).collect()
    }
}

/// A product to compute: `weights: [rows, cols]`, `x: [num_tokens, cols]`.
struct Case {
    rows: usize,
    cols: usize,
    weights: Vec<i8>,
    x: Vec<f32>,
}

impl Case {
    fn random(rows: usize, cols: usize, num_tokens: usize) -> Self {
        let mut random = Random((rows * 1_000_003 + cols * 1009 + num_tokens) as u64);
        Self { rows, cols, weights: random.weights(rows * cols), x: random.floats(num_tokens * cols) }
    }

    fn num_tokens(&self) -> usize {
        self.x.len() / self.cols
    }

    fn pack(&self, kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> PackedTernary {
        let decode = |row: usize, codes: &mut [i8]| {
            codes.copy_from_slice(&self.weights[row * self.cols..][..self.cols]);
            Ok::<(), Infallible>(())
        };
        let Ok(packed) = PackedTernary::pack(self.rows, self.cols, SCALE, kernel.layout(), pool, &decode);
        packed
    }

    fn quantize(&self) -> ActivationBuffer {
        let mut buffer = ActivationBuffer::new(self.num_tokens(), self.cols);
        for (token, values) in self.x.chunks_exact(self.cols).enumerate() {
            buffer.quantize_row(token, values);
        }
        buffer
    }

    /// The definition, computed without packing or padding.
    fn expected(&self, buffer: &ActivationBuffer) -> Vec<u32> {
        let view = buffer.view(self.num_tokens(), self.cols);
        let mut out = Vec::new();
        for token in 0..self.num_tokens() {
            for weights in self.weights.chunks_exact(self.cols) {
                let products = weights.iter().zip(view.codes(token)).map(|(&w, &q)| i32::from(w) * i32::from(q));
                let sum: i32 = products.sum();
                out.push((sum as f32 / view.scales()[token] * SCALE).to_bits());
            }
        }
        out
    }

    /// Compares every kernel with the definition: the batched product, and each token alone.
    fn check(&self, label: &str) {
        let mut pool = WorkerPool::new(1);
        let buffer = self.quantize();
        let expected = self.expected(&buffer);
        for kernel in available() {
            let packed = self.pack(*kernel, &mut pool);
            let name = kernel.name();
            let mut out = vec![f32::NAN; self.num_tokens() * self.rows];
            let x = buffer.view(self.num_tokens(), self.cols);
            kernel.gemm(&packed.slice(0..self.rows), &x, &mut ColumnsMut::new(&mut out, self.rows));
            assert_eq!(bits(&out), expected, "{name} gemm {label}");
            for token in 0..self.num_tokens().min(2) {
                let mut alone = ActivationBuffer::new(1, self.cols);
                alone.quantize_row(0, &self.x[token * self.cols..][..self.cols]);
                let mut out = vec![f32::NAN; self.rows];
                kernel.gemv(&packed.slice(0..self.rows), &alone.view(1, self.cols), &mut out);
                assert_eq!(bits(&out), expected[token * self.rows..][..self.rows], "{name} gemv {label}");
            }
        }
    }
}

const SCALE: f32 = 0.812_5;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn shapes_around_tile_edges() {
    for rows in [1, 15, 16, 17, 31, 32, 33, 64, 95] {
        for cols in [1, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129, 240, 256, 1000] {
            Case::random(rows, cols, 2).check(&format!("{rows} x {cols}"));
        }
    }
}

#[test]
fn columns_of_real_models() {
    for (rows, cols) in [(33, 2560), (32, 6912), (40, 8640), (1, 14336)] {
        Case::random(rows, cols, 3).check(&format!("{rows} x {cols}"));
    }
}

#[test]
fn every_number_of_tokens_up_to_two_blocks() {
    for num_tokens in (1..=26).chain([36, 37, 50]) {
        Case::random(70, 150, num_tokens).check(&format!("{num_tokens} tokens"));
    }
}

#[test]
fn extremes_do_not_overflow() {
    for cols in [240, 8640, 65_536] {
        for weight in [-1, 0, 1] {
            for x in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                let x: Vec<f32> = x.iter().cycle().take(2 * cols).copied().collect();
                Case { rows: 33, cols, weights: vec![weight; 33 * cols], x }.check(&format!("{cols} of {weight}"));
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_gives_nan_and_spares_the_others() {
    let mut case = Case::random(40, 100, 3);
    case.x[150] = f32::INFINITY;
    let buffer = case.quantize();
    let mut pool = WorkerPool::new(1);
    let clean = case.expected(&buffer);
    for kernel in available() {
        let packed = case.pack(*kernel, &mut pool);
        let mut out = vec![0.0; 3 * 40];
        kernel.gemm(&packed.slice(0..40), &buffer.view(3, 100), &mut ColumnsMut::new(&mut out, 40));
        assert!(out[40..80].iter().all(|value| value.is_nan()), "{}", kernel.name());
        assert_eq!(bits(&out[..40]), clean[..40]);
        assert_eq!(bits(&out[80..]), clean[80..]);
    }
}

#[test]
fn splitting_rows_among_workers_changes_nothing() {
    let case = Case::random(200, 300, 5);
    let buffer = case.quantize();
    let expected = case.expected(&buffer);
    for num_threads in [1, 2, 3, 5] {
        let mut pool = WorkerPool::new(num_threads);
        for kernel in available() {
            let packed = case.pack(*kernel, &mut pool);
            let mut out = vec![f32::NAN; 5 * 200];
            let shared = SharedColumns::new(&mut out, 200, ROW_TILE);
            pool.run(&|worker| {
                let share = worker.share(200, ROW_TILE);
                kernel.gemm(&packed.slice(share.clone()), &buffer.view(5, 300), &mut shared.claim(share));
            });
            assert_eq!(bits(&out), expected, "{} on {num_threads} threads", kernel.name());
        }
    }
}

#[test]
fn packing_reports_the_lowest_row_that_fails() {
    let mut pool = WorkerPool::new(3);
    let layout = PackedLayout::T32x2Bit;
    let decode = |row: usize, _: &mut [i8]| if row == 40 || row >= 70 { Err(row) } else { Ok(()) };
    assert_eq!(PackedTernary::pack(300, 20, 1.0, layout, &mut pool, &decode).unwrap_err(), 40);
}

#[test]
fn kernels_are_chosen_by_name() {
    let names: Vec<_> = available().iter().map(|kernel| kernel.name()).collect();
    assert_eq!(names[0], "scalar");
    assert_eq!(select("auto").unwrap().name(), *names.last().unwrap());
    for name in &names {
        assert!(NAMES.contains(name));
        assert_eq!(select(name).unwrap().name(), *name);
    }
    assert!(matches!(select("avx9"), Err(KernelError::Unknown { .. })));
    for missing in NAMES.iter().filter(|name| !names.contains(name)) {
        assert!(matches!(select(missing), Err(KernelError::Unsupported { .. })));
    }
}
