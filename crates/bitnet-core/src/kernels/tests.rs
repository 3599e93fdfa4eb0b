//! One property suite, run for every kernel and every instruction set of this CPU: bits against a naive reference.
#![allow(clippy::unwrap_used)]

mod broken;
mod screen;
mod sparse;

use std::convert::Infallible;

pub(crate) use broken::{Broken, IsWrong};

use super::{
    arena::Arena,
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

    fn pack(&self, layout: PackedLayout, pool: &mut WorkerPool) -> PackedTernary {
        let decode = |row: usize, codes: &mut [i8]| {
            codes.copy_from_slice(&self.weights[row * self.cols..][..self.cols]);
            Ok::<(), Infallible>(())
        };
        let Ok(packed) = PackedTernary::pack(self.rows, self.cols, SCALE, layout, pool, &decode);
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
        let mut buffer = self.quantize();
        let expected = self.expected(&buffer);
        for (kernel, layout) in combinations() {
            let packed = self.pack(layout, &mut pool);
            let name = format!("{} {}", kernel.name(), layout.name());
            let mut out = vec![f32::NAN; self.num_tokens() * self.rows];
            let x = buffer.view(self.num_tokens(), self.cols);
            kernel.gemm(&packed.slice(0..self.rows), &x, &mut ColumnsMut::new(&mut out, self.rows), Output::Replace);
            assert_eq!(bits(&out), expected, "{name} gemm {label}");
            let mut sums: Vec<_> = (0..out.len()).map(|index| index as f32 * 0.37).collect();
            let sum = |(term, expected): (&f32, &u32)| (term + f32::from_bits(*expected)).to_bits();
            let expected_sums: Vec<_> = sums.iter().zip(&expected).map(sum).collect();
            let x = in_blocks(&mut buffer, kernel, self.num_tokens(), self.cols);
            kernel.gemm(&packed.slice(0..self.rows), &x, &mut ColumnsMut::new(&mut sums, self.rows), Output::Add);
            assert_eq!(bits(&sums), expected_sums, "{name} gemm that adds {label}");
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

/// The first `num_tokens` rows as the model hands them over.
fn in_blocks<'a>(
    buffer: &'a mut ActivationBuffer,
    kernel: &dyn TernaryKernel,
    num_tokens: usize,
    cols: usize,
) -> QuantizedActivations<'a> {
    let block_tokens = kernel.block_tokens(num_tokens);
    let x = buffer.view_in_blocks(num_tokens, cols, block_tokens, |x, blocks| {
        interleave(block_tokens, x.codes(0).len(), |row| x.codes(row), blocks);
    });
    assert!(x.blocks(block_tokens).is_some() && x.blocks(block_tokens + 1).is_none());
    x
}

/// Every kernel, also as it is on CPUs that have less, with every layout it can read.
fn combinations() -> impl Iterator<Item = (&'static dyn TernaryKernel, PackedLayout)> {
    let kernels = available().iter().copied();
    #[cfg(target_arch = "x86_64")]
    let kernels = kernels.chain(x86_64::without_gfni());
    kernels.flat_map(|kernel| kernel.layouts().iter().map(move |layout| (kernel, *layout)))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn shapes_around_tile_edges() {
    for rows in [1, 15, 16, 17, 31, 32, 33, 64, 95] {
        for cols in [1, 4, 15, 16, 17, 19, 20, 21, 63, 64, 65, 127, 128, 129, 240, 256, 300, 1000] {
            Case::random(rows, cols, 2).check(&format!("{rows} x {cols}"));
        }
    }
}

/// Where products of many tokens take more rows and columns at once than a tile has.
#[test]
fn shapes_around_the_edges_of_tables() {
    for (rows, num_tokens) in [(1, 32), (33, 27), (95, 71)] {
        for cols in [1, 4, 16, 35, 36, 37, 48, 63, 64, 65, 80, 144, 252, 300, 1000] {
            Case::random(rows, cols, num_tokens).check(&format!("{rows} x {cols}, {num_tokens} tokens"));
        }
    }
    Case::random(1100, 50, 30).check("1100 x 50");
}

#[test]
fn columns_of_real_models() {
    for (rows, cols) in [(33, 2560), (32, 6912), (40, 8640), (1, 14336)] {
        Case::random(rows, cols, 3).check(&format!("{rows} x {cols}"));
    }
}

#[test]
fn every_number_of_tokens_up_to_two_blocks() {
    for num_tokens in (1..=37).chain([50, 60, 96]) {
        Case::random(70, 150, num_tokens).check(&format!("{num_tokens} tokens"));
    }
}

#[test]
fn extremes_do_not_overflow() {
    for (cols, num_tokens) in [(240, 2), (8640, 2), (65_536, 2), (8640, 32)] {
        for weight in [-1, 0, 1] {
            for x in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                let x: Vec<f32> = x.iter().cycle().take(num_tokens * cols).copied().collect();
                let case = Case { rows: 33, cols, weights: vec![weight; 33 * cols], x };
                case.check(&format!("{cols} of {weight}, {num_tokens} tokens"));
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
    for (kernel, layout) in combinations() {
        let packed = case.pack(layout, &mut pool);
        let mut out = vec![0.0; 3 * 40];
        kernel.gemm(&packed.slice(0..40), &buffer.view(3, 100), &mut ColumnsMut::new(&mut out, 40), Output::Replace);
        assert!(out[40..80].iter().all(|value| value.is_nan()), "{}", kernel.name());
        assert_eq!(bits(&out[..40]), clean[..40]);
        assert_eq!(bits(&out[80..]), clean[80..]);
    }
}

#[test]
fn what_was_kept_of_other_activations_is_never_used() {
    let first = Case::random(64, 300, 14);
    let (weights, x) = (first.weights.clone(), first.x.iter().map(|x| 1.0 - x).collect());
    let second = Case { weights, x, ..first };
    let mut buffer = first.quantize();
    for (kernel, layout) in combinations() {
        let packed = first.pack(layout, &mut WorkerPool::new(1));
        let product = |buffer: &mut ActivationBuffer, num_tokens, is_in_blocks| {
            let mut out = vec![f32::NAN; num_tokens * 64];
            let x = match is_in_blocks {
                true => in_blocks(buffer, kernel, num_tokens, 300),
                false => buffer.view(num_tokens, 300),
            };
            kernel.gemm(&packed.slice(0..64), &x, &mut ColumnsMut::new(&mut out, 64), Output::Replace);
            bits(&out)
        };
        // The same rows of the same memory, with other values; and fewer of them.
        for case in [&first, &second] {
            (0..14).for_each(|token| buffer.quantize_row(token, &case.x[token * 300..][..300]));
            let expected = case.expected(&buffer);
            for (num_tokens, is_in_blocks) in [(14, false), (2, true), (14, false), (7, false), (14, true), (7, false)]
            {
                let product = product(&mut buffer, num_tokens, is_in_blocks);
                assert_eq!(product, expected[..num_tokens * 64], "{}", kernel.name());
            }
        }
    }
}

#[test]
fn splitting_rows_among_workers_changes_nothing() {
    let case = Case::random(200, 300, 5);
    let buffer = case.quantize();
    let expected = case.expected(&buffer);
    for num_threads in [1, 2, 3, 5] {
        let mut pool = WorkerPool::new(num_threads);
        for (kernel, layout) in combinations() {
            let packed = case.pack(layout, &mut pool);
            let mut out = vec![f32::NAN; 5 * 200];
            let shared = SharedColumns::new(&mut out, 200, ROW_TILE);
            pool.run(&|worker| {
                let share = worker.share(200, ROW_TILE);
                kernel.gemm(
                    &packed.slice(share.clone()),
                    &buffer.view(5, 300),
                    &mut shared.claim(share),
                    Output::Replace,
                );
            });
            assert_eq!(bits(&out), expected, "{} on {num_threads} threads", kernel.name());
        }
    }
}

#[test]
fn every_combination_of_five_trits_comes_back() {
    // Row r holds the digits of r in the first columns of the five planes; token p looks at plane p alone.
    let mut case = Case { rows: 243, cols: 20, weights: vec![0; 243 * 20], x: vec![0.0; 5 * 20] };
    for (plane, weight) in [81, 27, 9, 3, 1].into_iter().enumerate() {
        case.x[20 * plane + 4 * plane] = 1.0;
        for row in 0..243 {
            case.weights[20 * row + 4 * plane] = (row / weight % 3) as i8 - 1;
        }
    }
    case.check("all bytes");
}

#[test]
fn the_self_test_passes_here_and_sees_a_broken_kernel() {
    let results = self_test();
    assert_eq!(results.len(), available().len());
    for (name, result) in results {
        assert_eq!(result, Ok(()), "{name}");
    }
    for kernel in available() {
        let failure = self_test::test(&Broken { kernel: *kernel, is_wrong: |shape| !shape.is_screen }).unwrap_err();
        assert_eq!((failure.operation.as_str(), failure.num_tokens), ("2bit product", 1));
        let failure = self_test::test(&Broken { kernel: *kernel, is_wrong: |shape| shape.is_screen }).unwrap_err();
        assert_eq!(failure.operation, "screen");
    }
}

#[test]
fn a_tested_kernel_knows_what_every_kernel_gave() {
    let tested = select_tested("auto").unwrap();
    let names: Vec<_> = tested.results.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, available().iter().map(|kernel| kernel.name()).collect::<Vec<_>>());
    assert!(format!("{tested:?}").contains(tested.kernel.name()));
}

/// Any shape, weights of any density and activations of any kind: what no table of shapes thinks of.
#[test]
fn thousands_of_random_products() {
    let mut random = Random(2026);
    for round in 0..2000 {
        let mut below = |bound: u64| (random.next() % bound) as usize;
        let (rows, cols, num_tokens) = (1 + below(70), 1 + below(400), 1 + below(9));
        let (zeros, extremes) = (below(4), below(3) == 0);
        let mut case = Case { rows, cols, weights: random.weights(rows * cols), x: random.floats(num_tokens * cols) };
        for weight in &mut case.weights {
            if random.next() % 4 < zeros as u64 {
                *weight = 0;
            }
        }
        if extremes {
            case.x.iter_mut().for_each(|x| *x = if *x < 0.0 { -1.0 } else { 1.0 });
        }
        case.check(&format!("round {round}: {rows} x {cols}, {num_tokens} tokens"));
    }
}

#[test]
fn autotuning_picks_a_layout_the_kernel_has() {
    let mut pool = WorkerPool::new(2);
    for kernel in available() {
        for bytes in [0, 1, 1 << 20] {
            let arena = Arena::new(bytes);
            let layout = autotune(*kernel, &mut pool, &arena, None).layout;
            assert!(kernel.layouts().contains(&layout), "{}", kernel.name());
            assert_eq!(arena.take(bytes).len(), bytes, "nothing is left in it");
        }
    }
}

#[test]
fn limits_are_measured_and_bound_speeds_by_the_slower_of_both() {
    let mut pool = WorkerPool::new(2);
    for kernel in available() {
        let limits = limits::Ruler::new(*kernel, &mut pool).sample(*kernel, &mut pool);
        assert!(limits.read_bytes_per_s > 1e6 && limits.int8_macs_per_s > 1e6, "{}", kernel.name());
    }
    let limits = limits::Limits { read_bytes_per_s: 100.0, int8_macs_per_s: 1000.0 };
    assert_eq!([limits.tokens_per_s(10.0, 10.0), limits.tokens_per_s(1.0, 500.0)], [10.0, 2.0]);
}

#[test]
fn a_worker_without_rows_computes_nothing() {
    let case = Case::random(40, 100, 1);
    let buffer = case.quantize();
    for (kernel, layout) in combinations() {
        let packed = case.pack(layout, &mut WorkerPool::new(1));
        kernel.gemv(&packed.slice(32..32), &buffer.view(1, 100), &mut []);
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

/// Every primitive over the same values: the bits under each instruction set must be those of the baseline.
#[derive(Clone, Copy)]
struct Primitives<'a> {
    a: &'a [f32],
    b: &'a [f32],
    halves: &'a [u16],
    brains: &'a [u16],
}

impl FloatOp for Primitives<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn call(self) -> Vec<u32> {
        let Self { a, b, halves, brains } = self;
        let mut results = vec![
            math::dot_16(a, b).to_bits(),
            math::sum_squares_16(a).to_bits(),
            math::dot_f16_16(halves, b).to_bits(),
            math::dot_bf16_16(brains, b).to_bits(),
        ];
        for value in a {
            results.extend([math::exp(*value).to_bits(), math::ln(value.abs()).to_bits()]);
        }
        let mut buffer = ActivationBuffer::new(1, a.len());
        buffer.quantize_row(0, a);
        let view = buffer.view(1, a.len());
        results.extend([view.scales()[0].to_bits(), view.sums()[0].cast_unsigned()]);
        results.extend(view.codes(0).iter().map(|&code| u32::from(code.cast_unsigned())));
        results
    }
}

/// The largest error of `ours` in units in the last place of the true value, over `inputs`.
fn worst_ulps(inputs: impl Iterator<Item = f32>, ours: impl Fn(f32) -> f32, truth: impl Fn(f64) -> f64) -> f64 {
    let error = |x: f32| {
        let exact = truth(f64::from(x));
        let ulp = f64::from(((exact as f32).abs().max(f32::MIN_POSITIVE)).next_up()) - f64::from((exact as f32).abs());
        (f64::from(ours(x)) - exact).abs() / ulp
    };
    inputs.map(error).fold(0.0, f64::max)
}

#[test]
fn exp_is_accurate_and_has_the_right_ends() {
    let inputs = || (0..400_000).map(|i| -87.3 + i as f32 * (176.0 / 400_000.0));
    let worst = worst_ulps(inputs(), math::exp, libm::exp);
    assert!(worst < 1.0, "{worst} ulp");
    for (x, value) in [(0.0, 1.0), (-0.0, 1.0), (f32::NEG_INFINITY, 0.0), (-88.0, 0.0), (-1e30, 0.0)] {
        assert_eq!(math::exp(x).to_bits(), f32::to_bits(value), "exp({x})");
    }
    assert_eq!(math::exp(89.0), f32::INFINITY);
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert!(math::exp(88.72).is_finite());
    assert!(math::exp(f32::NAN).is_nan());
    let non_positive =
        inputs().filter(|x| *x <= 0.0).chain([-87.336_54, -87.336_55, -0.0, f32::NEG_INFINITY, f32::MIN]);
    for x in non_positive {
        assert_eq!(math::exp_non_positive(x).to_bits(), math::exp(x).to_bits(), "{x}");
    }
    assert!(math::exp_non_positive(f32::NAN).is_nan());
}

#[test]
fn ln_is_accurate_and_has_the_right_ends() {
    let inputs =
        || (0..200_000u32).map(|i| f32::from_bits(1 + i * 10_695)).chain((1..100_000).map(|i| i as f32 * 2e-5));
    let worst = worst_ulps(inputs(), math::ln, libm::log);
    assert!(worst < 1.0, "{worst} ulp");
    assert_eq!(math::ln(1.0).to_bits(), 0);
    assert_eq!((math::ln(0.0), math::ln(-0.0)), (f32::NEG_INFINITY, f32::NEG_INFINITY));
    assert_eq!(math::ln(f32::INFINITY), f32::INFINITY);
    assert!(math::ln(-1.0).is_nan() && math::ln(f32::NAN).is_nan() && math::ln(f32::NEG_INFINITY).is_nan());
}

#[test]
fn sixteen_bit_floats_widen_exactly() {
    for bits in 0..=u16::MAX {
        let (ours, truth) = (math::f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
        assert!(
            ours.to_bits() == truth.to_bits() || (ours.is_nan() && truth.is_nan()),
            "{bits:#x}: {ours} not {truth}"
        );
        let (ours, truth) = (math::bf16_to_f32(bits), half::bf16::from_bits(bits).to_f32());
        assert!(
            ours.to_bits() == truth.to_bits() || (ours.is_nan() && truth.is_nan()),
            "{bits:#x}: {ours} not {truth}"
        );
    }
}

#[test]
fn primitives_give_the_same_bits_on_every_instruction_set() {
    let mut random = Random(7);
    for len in [0, 1, 15, 16, 17, 100, 2560, 2567] {
        let (mut a, b) = (random.floats(len), random.floats(len));
        // Magnitudes from the denormals up, not only around 1.
        a.iter_mut().step_by(3).for_each(|value| *value *= f32::from_bits((random.next() % (140 << 23)) as u32));
        let halves: Vec<u16> = a.iter().map(|&value| half::f16::from_f32(value).to_bits()).collect();
        let brains: Vec<u16> = a.iter().map(|&value| half::bf16::from_f32(value).to_bits()).collect();
        let primitives = Primitives { a: &a, b: &b, halves: &halves, brains: &brains };
        let expected = Isa::BASELINE.run(primitives);
        for isa in Isa::available() {
            assert_eq!(isa.run(primitives), expected, "{isa:?}, {len} values");
        }
    }
}

#[test]
fn sums_follow_the_order_of_the_lanes() {
    let mut random = Random(8);
    for len in [0, 1, 15, 16, 17, 100, 2567] {
        let (a, b) = (random.floats(len), random.floats(len));
        let halves: Vec<u16> = a.iter().map(|&value| half::f16::from_f32(value).to_bits()).collect();
        let brains: Vec<u16> = a.iter().map(|&value| half::bf16::from_f32(value).to_bits()).collect();
        assert_eq!(math::dot_16(&a, &b), lane_by_lane(&a, &b));
        assert_eq!(math::sum_squares_16(&a), lane_by_lane(&a, &a));
        let widened: Vec<f32> = halves.iter().map(|&bits| half::f16::from_bits(bits).to_f32()).collect();
        assert_eq!(math::dot_f16_16(&halves, &b), lane_by_lane(&widened, &b));
        let widened: Vec<f32> = brains.iter().map(|&bits| half::bf16::from_bits(bits).to_f32()).collect();
        assert_eq!(math::dot_bf16_16(&brains, &b), lane_by_lane(&widened, &b));
    }
}

/// The rule for sums, in its own words.
fn lane_by_lane(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for i in 0..a.len() {
        lanes[i % 16] = a[i].mul_add(b[i], lanes[i % 16]);
    }
    let eight: Vec<f32> = (0..8).map(|lane| lanes[lane] + lanes[lane + 8]).collect();
    let four: Vec<f32> = (0..4).map(|lane| eight[lane] + eight[lane + 4]).collect();
    (four[0] + four[2]) + (four[1] + four[3])
}

#[test]
fn a_kernel_that_fails_its_self_test_is_not_chosen() {
    let failure = SelfTestFailure { operation: "2bit product".to_owned(), rows: 1, cols: 1, num_tokens: 1 };
    let names: Vec<_> = available().iter().map(|kernel| kernel.name()).collect();
    let fastest = names[names.len() - 1];
    let mut results: Vec<_> = names.iter().map(|name| (*name, Ok(()))).collect();
    assert_eq!(fastest_sound("auto", &results).unwrap().name(), fastest);
    results.last_mut().unwrap().1 = Err(failure.clone());
    let refused = KernelError::Unsound { name: fastest.to_owned(), failure };
    assert_eq!(fastest_sound(fastest, &results).err(), Some(refused.clone()));
    if names.len() > 1 {
        assert_eq!(fastest_sound("auto", &results).unwrap().name(), names[names.len() - 2]);
        assert_eq!(fastest_sound("scalar", &results).unwrap().name(), "scalar");
    } else {
        assert_eq!(fastest_sound("auto", &results).err(), Some(refused));
    }
}
