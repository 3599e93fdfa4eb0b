//! Single-threaded speed of every kernel of this CPU, on shapes of the 2B-4T model: products of 1 to 512 tokens, the head's
//! screen, and the floating-point primitives. `bitnet bench` measures the whole; this says which part changed.

use std::{convert::Infallible, fmt};

use bitnet_core::{
    kernels::{
        FloatOp, Isa, Output, TernaryKernel, available, math,
        packing::{PackedLayout, PackedTernary, ROW_TILE},
        screen::{ScreenBuffer, ScreenInputs, ScreenMatrix, Screened, Selection, maxima_of},
    },
    quant::activation::ActivationBuffer,
    threads::{ColumnsMut, WorkerPool},
};
use divan::{Bencher, black_box, counter::ItemsCount};

const COLS: usize = 2560;
/// 128 MB at 2 bits: a single token's product must come from memory, as in a model.
const STREAMED_ROWS: usize = 204_800;
/// A worker's share of a layer: products of many tokens read weights once and multiply for long.
const BATCH_ROWS: usize = 2560;
const HEAD_ROWS: usize = 64_128;

fn main() {
    divan::main();
}

/// A kernel and one of its layouts, by the names they are listed under.
#[derive(Clone, Copy)]
struct Choice(&'static dyn TernaryKernel, PackedLayout);

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.name(), self.1.name())
    }
}

/// All but the scalar kernel, which is not meant to be fast.
fn choices() -> impl Iterator<Item = Choice> {
    let fast = &available()[1..];
    fast.iter().flat_map(|kernel| kernel.layouts().iter().map(|layout| Choice(*kernel, *layout)))
}

fn kernels() -> impl Iterator<Item = Choice> {
    available()[1..].iter().map(|kernel| Choice(*kernel, kernel.layout()))
}

#[divan::bench(args = choices(), sample_count = 20)]
fn gemv(bencher: Bencher<'_, '_>, Choice(kernel, layout): Choice) {
    let weights = weights(STREAMED_ROWS, layout);
    let x = activations(1);
    let mut out = vec![0.0; STREAMED_ROWS];
    bencher
        .counter(ItemsCount::new(STREAMED_ROWS * COLS))
        .bench_local(|| kernel.gemv(&weights.slice(0..STREAMED_ROWS), &x.view(1, COLS), black_box(&mut out)));
}

#[divan::bench(args = choices(), consts = [2, 4, 8, 12, 16, 512], sample_count = 20)]
fn gemm<const TOKENS: usize>(bencher: Bencher<'_, '_>, Choice(kernel, layout): Choice) {
    let rows = if TOKENS <= 16 { STREAMED_ROWS / 8 } else { BATCH_ROWS };
    let weights = weights(rows, layout);
    let x = activations(TOKENS);
    let mut out = vec![0.0; TOKENS * rows];
    bencher.counter(ItemsCount::new(rows * COLS * TOKENS)).bench_local(|| {
        kernel.gemm(
            &weights.slice(0..rows),
            &x.view(TOKENS, COLS),
            &mut ColumnsMut::new(black_box(&mut out), rows),
            Output::Replace,
        );
    });
}

#[divan::bench(args = kernels(), consts = [1, 4, 8], sample_count = 20)]
fn screen<const TOKENS: usize>(bencher: Bencher<'_, '_>, Choice(kernel, _): Choice) {
    let decode = |row: usize, out: &mut [f32]| {
        out.iter_mut().zip(0..).for_each(|(value, col)| *value = pattern(row, col) - 1.0);
        Ok::<(), Infallible>(())
    };
    let Ok(matrix) = ScreenMatrix::pack(HEAD_ROWS, COLS, kernel.isa(), &mut WorkerPool::new(1), &decode);
    let mut x = ScreenInputs::new(TOKENS, COLS);
    let inputs: Vec<f32> = (0..TOKENS).flat_map(values).collect();
    x.fill(&inputs, kernel.screen_bits(TOKENS), kernel.isa());
    let mut buffer = ScreenBuffer::new(TOKENS, HEAD_ROWS);
    bencher.counter(ItemsCount::new(HEAD_ROWS * COLS)).bench_local(|| {
        let mut out = black_box(&mut buffer).shared(TOKENS).claim(0..HEAD_ROWS / ROW_TILE);
        kernel.screen(&matrix.slice(0..HEAD_ROWS), &x.view(TOKENS), &mut out);
    });
}

#[divan::bench(args = [1, 50])]
fn select_candidates(bencher: Bencher<'_, '_>, k: usize) {
    let estimates: Vec<f32> = (0..128_256).map(|row| pattern(row, 7) * 10.0 + pattern(row, 11)).collect();
    let mut maxima = Vec::new();
    maxima_of(&estimates, &mut maxima, Isa::BASELINE);
    let radii = vec![0.5; maxima.len()];
    let mut selection = Selection::default();
    let screened = Screened { estimates: &estimates, maxima: &maxima, radii: &radii };
    bencher.bench_local(|| {
        let promising = selection.promising(black_box(&screened), k);
        let least = promising.iter().map(|&id| estimates[id as usize]).fold(f32::INFINITY, f32::min);
        selection.reaching(&screened, least).len()
    });
}

#[divan::bench(args = Isa::available())]
fn exp(bencher: Bencher<'_, '_>, isa: Isa) {
    let mut row = values(1);
    bencher.counter(ItemsCount::new(COLS)).bench_local(|| isa.run(Exp(black_box(&mut row))));
}

#[divan::bench(args = Isa::available())]
fn dot_bf16(bencher: Bencher<'_, '_>, isa: Isa) {
    let weights: Vec<u16> = values(1).iter().map(|value| (value.to_bits() >> 16) as u16).collect();
    let x = values(2);
    bencher.counter(ItemsCount::new(COLS)).bench_local(|| isa.run(Dot(black_box(&weights), &x)));
}

struct Exp<'a>(&'a mut [f32]);

impl FloatOp for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.0.iter_mut().for_each(|value| *value = math::exp(-value.abs()));
    }
}

struct Dot<'a>(&'a [u16], &'a [f32]);

impl FloatOp for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        math::dot_bf16_16(self.0, self.1)
    }
}

/// Some value in 0.0..2.0.
fn pattern(row: usize, col: usize) -> f32 {
    ((row * 31 + col * 17 + row * col % 7) % 1000) as f32 / 500.0
}

fn values(token: usize) -> Vec<f32> {
    (0..COLS).map(|col| pattern(token, col) - 1.0).collect()
}

fn weights(rows: usize, layout: PackedLayout) -> PackedTernary {
    let decode = |row: usize, codes: &mut [i8]| {
        codes.iter_mut().zip(0..).for_each(|(code, col)| *code = ((row + col * 5 + row * col % 11) % 3) as i8 - 1);
        Ok::<(), Infallible>(())
    };
    let Ok(packed) = PackedTernary::pack(rows, COLS, 1.0, layout, &mut WorkerPool::new(2), &decode);
    packed
}

fn activations(num_tokens: usize) -> ActivationBuffer {
    let mut buffer = ActivationBuffer::new(num_tokens, COLS);
    (0..num_tokens).for_each(|token| buffer.quantize_row(token, &values(token)));
    buffer
}
