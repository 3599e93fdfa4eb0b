//! The screen: every kernel gives the bits of the scalar one, no exact value is ever outside its bounds, and the rows that
//! count are always among the candidates.

use std::convert::Infallible;

use super::Random;
use crate::{
    kernels::{
        FloatOp, Isa, TernaryKernel, available, math,
        packing::{ROW_TILE, rows_of_tiles},
        screen::{
            ActivationBits::{self, Eight, Fourteen},
            ScreenBuffer, ScreenInputs, ScreenMatrix, Screened, Selection, maxima_of,
        },
        select,
    },
    quant::screen::MAX_OUTLIERS,
    threads::WorkerPool,
};

/// `weights: [rows, cols]`, `x: [num_tokens, cols]`.
struct Case {
    rows: usize,
    cols: usize,
    weights: Vec<f32>,
    x: Vec<f32>,
}

impl Case {
    fn random(rows: usize, cols: usize, num_tokens: usize) -> Self {
        let mut random = Random((rows * 7919 + cols * 31 + num_tokens) as u64);
        Self { rows, cols, weights: random.floats(rows * cols), x: random.floats(num_tokens * cols) }
    }

    fn num_tokens(&self) -> usize {
        self.x.len() / self.cols
    }

    fn pack(&self, isa: Isa) -> ScreenMatrix {
        let decode = |row: usize, out: &mut [f32]| {
            out.copy_from_slice(&self.weights[row * self.cols..][..self.cols]);
            Ok::<(), Infallible>(())
        };
        let Ok(matrix) = ScreenMatrix::pack(self.rows, self.cols, isa, &mut WorkerPool::new(2), &decode);
        matrix
    }

    /// What the kernel called `name` says.
    fn screen(&self, name: &str, bits: ActivationBits) -> ScreenBuffer {
        let kernel = select(name).unwrap();
        let matrix = self.pack(kernel.isa());
        let mut inputs = ScreenInputs::new(self.num_tokens(), self.cols);
        inputs.fill(&self.x, bits, kernel.isa());
        let mut buffer = ScreenBuffer::new(self.num_tokens(), self.rows);
        let mut out = buffer.shared(self.num_tokens()).claim(0..self.rows.div_ceil(ROW_TILE));
        kernel.screen(&matrix.slice(0..self.rows), &inputs.view(self.num_tokens()), &mut out);
        buffer
    }

    /// Checks the bits of every kernel, and every bound against the product in `f64` and in 16-lane `f32`.
    fn check(&self, label: &str) {
        self.check_bits(Fourteen, label);
        self.check_bits(Eight, label);
    }

    fn check_bits(&self, bits: ActivationBits, label: &str) {
        let expected = self.screen("scalar", bits);
        for kernel in available().iter().filter(|kernel| takes(**kernel, bits)) {
            let ours = self.screen(kernel.name(), bits);
            for token in 0..self.num_tokens() {
                let same = bits_of(&ours.screened(token)) == bits_of(&expected.screened(token));
                assert!(same, "{} {label}", kernel.name());
            }
        }
        for (token, x) in self.x.chunks_exact(self.cols).enumerate() {
            let Screened { estimates, maxima, radii } = expected.screened(token);
            assert!(estimates.iter().all(|estimate| !estimate.is_nan()), "{label}");
            let max_of = |tile: &[f32]| tile.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(estimates.chunks(ROW_TILE).map(max_of).eq(maxima.iter().copied()), "{label}");
            for (row, weights) in self.weights.chunks_exact(self.cols).enumerate() {
                let (estimate, radius) = (estimates[row], radii[row / ROW_TILE]);
                let exact: f64 = weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let off = |value: f64| (value - f64::from(estimate)).abs();
                let worst = off(exact).max(off(f64::from(math::dot_16(weights, x))));
                // An infinite radius holds whatever there is, even what is not a number.
                assert!(radius == f32::INFINITY || worst <= f64::from(radius), "{label}: {worst} > {radius}");
            }
        }
    }
}

fn bits_of(screened: &Screened<'_>) -> [Vec<u32>; 3] {
    [screened.estimates, screened.maxima, screened.radii].map(super::bits)
}

/// Whether `kernel` screens activations of `bits`.
fn takes(kernel: &dyn TernaryKernel, bits: ActivationBits) -> bool {
    bits == Fourteen || kernel.name() == "scalar" || kernel.screen_bits(usize::MAX) == bits
}

#[test]
fn bounds_hold_and_kernels_agree_on_random_values() {
    for rows in [1, 31, 32, 33, 70] {
        for cols in [1, 3, 4, 5, 64, 130] {
            Case::random(rows, cols, 3).check(&format!("{rows} x {cols}"));
        }
    }
    for num_tokens in 1..=13 {
        Case::random(40, 50, num_tokens).check(&format!("{num_tokens} tokens"));
    }
    Case::random(33, 2560, 2).check("a real width");
}

#[test]
fn bounds_hold_for_adversarial_values() {
    let cols = 67;
    let patterns: [fn(usize) -> f32; 12] = [
        |_| 0.0,
        |_| 1.0,
        |i| if i % 2 == 0 { 1.0 } else { -1.0 },
        |i| if i == 5 { 1e4 } else { 0.49 },
        |i| if i == 66 { -127.0 } else { 0.5 },
        |i| 63.5 + i as f32,
        |i| f32::from_bits(i as u32 + 1),
        |i| 1e-36 * i as f32,
        |i| 1e18 * (i as f32 - 30.0),
        |_| 3e38,
        |i| if i == 3 { f32::NAN } else { 1.0 },
        |i| if i == 40 { f32::NEG_INFINITY } else { 1.0 },
    ];
    let all: Vec<f32> = patterns.iter().flat_map(|pattern| (0..cols).map(pattern)).collect();
    Case { rows: patterns.len(), cols, weights: all.clone(), x: all }.check("patterns against patterns");
}

#[test]
fn sums_at_the_widest_do_not_overflow() {
    for sign in [1.0, -1.0] {
        Case { rows: 1, cols: 65_536, weights: vec![1.0; 65_536], x: vec![sign; 65_536] }.check("all at the limit");
    }
}

#[test]
fn radii_are_small_enough_to_be_useful() {
    let mut case = Case::random(64, 2560, 1);
    let norm = |values: &[f32]| math::sum_squares_16(values).sqrt();
    let check = |case: &Case, bits, limit: f32| {
        let buffer = case.screen("scalar", bits);
        for (weights, row) in case.weights.chunks_exact(2560).zip(0..) {
            let radius = buffer.screened(0).radii[row / ROW_TILE];
            assert!(radius < limit * norm(weights) * norm(&case.x), "{bits:?}");
        }
    };
    check(&case, Fourteen, 0.01);
    check(&case, Eight, 0.02);
    // A few outliers are no reason for a coarse step.
    (0..MAX_OUTLIERS).for_each(|index| case.x[index * 100 + 3] = 20.0 - 3.0 * index as f32);
    check(&case, Eight, 0.02);
}

#[test]
fn outliers_keep_all_of_their_bits() {
    // In steps of 1/127 times three root mean squares or more, which all others are below.
    let mut x = [1.0; 200];
    (x[2], x[77], x[199]) = (300.0, -60.0, 31.0);
    let mut inputs = ScreenInputs::new(1, 200);
    inputs.fill(&x, Eight, Isa::BASELINE);
    let x = inputs.view(1);
    for (column, value) in [(2, 300.0), (77, -60.0), (199, 31.0), (5, 1.0)] {
        let mut panel = [0; 50 * 128];
        panel[column / 4 * 128 + column % 4] = 1;
        let low = i32::from(x.codes(0)[column].cast_unsigned()) - 128;
        let code = 256 * x.outlier_sums(0, &panel)[0] + low;
        assert!((code as f32 * x.row(0).step - value).abs() <= 0.5 * x.row(0).step, "{value}");
    }
}

#[test]
fn splitting_rows_among_workers_changes_nothing() {
    let case = Case::random(200, 60, 3);
    let expected = case.screen("scalar", Fourteen);
    let kernel = select("auto").unwrap();
    let matrix = case.pack(kernel.isa());
    let mut inputs = ScreenInputs::new(3, 60);
    inputs.fill(&case.x, Fourteen, kernel.isa());
    let mut buffer = ScreenBuffer::new(3, 200);
    let shared = buffer.shared(3);
    WorkerPool::new(3).run(&|worker| {
        let tiles = worker.share(200_usize.div_ceil(ROW_TILE), 1);
        let rows = rows_of_tiles(tiles.clone(), 200);
        kernel.screen(&matrix.slice(rows), &inputs.view(3), &mut shared.claim(tiles));
    });
    (0..3).for_each(|token| assert_eq!(bits_of(&buffer.screened(token)), bits_of(&expected.screened(token))));
}

#[test]
fn packing_reports_the_lowest_row_that_fails() {
    let decode = |row: usize, _: &mut [f32]| if row == 40 || row >= 70 { Err(row) } else { Ok(()) };
    let result = ScreenMatrix::pack(300, 20, Isa::BASELINE, &mut WorkerPool::new(3), &decode);
    assert_eq!(result.unwrap_err(), 40);
}

/// Exact logits, as the head computes them.
struct Exact<'a>(&'a Case, &'a [f32]);

impl FloatOp for Exact<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn call(self) -> Vec<f32> {
        self.0.weights.chunks_exact(self.0.cols).map(|weights| math::dot_16(weights, self.1)).collect()
    }
}

#[test]
fn the_largest_are_always_candidates_and_few_others() {
    check_candidates("auto", Fourteen, 4);
    check_candidates("scalar", Eight, 6);
}

fn check_candidates(name: &str, bits: ActivationBits, limit: usize) {
    const STATES: usize = 10_000;
    let (rows, cols) = (300, 48);
    let mut case = Case::random(rows, cols, STATES);
    // Ties: some rows come twice.
    for row in (0..60).step_by(3) {
        case.weights.copy_within(row * cols..(row + 1) * cols, (row + 150) * cols);
    }
    let buffer = case.screen(name, bits);
    let isa = *Isa::available().last().unwrap();
    let mut selection = Selection::default();
    let mut num_candidates = 0;
    for state in 0..STATES {
        let exact = isa.run(Exact(&case, &case.x[state * cols..][..cols]));
        let mut sorted = exact.clone();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        for k in [1, 2, 40] {
            let promising = selection.promising(&buffer.screened(state), k);
            let least = promising.iter().map(|&id| exact[id as usize]).fold(f32::INFINITY, f32::min);
            let least = if promising.len() < k { f32::NEG_INFINITY } else { least };
            let found = selection.reaching(&buffer.screened(state), least);
            assert!(found.is_sorted());
            let needed = (0..rows as u32).filter(|id| exact[*id as usize] >= sorted[k - 1]);
            assert!(needed.clone().count() >= k);
            needed.for_each(|id| assert!(found.binary_search(&id).is_ok(), "{id} of state {state}, k = {k}"));
            if k == 1 {
                num_candidates += found.len();
            }
        }
    }
    assert!(num_candidates < limit * STATES, "{num_candidates} candidates for {STATES} states");
}

#[test]
fn candidates_are_never_lost_to_values_that_are_not_numbers() {
    let mut selection = Selection::default();
    let mut estimates = vec![0.0; 1000];
    let mut radii = vec![0.5; 32];
    (estimates[700], estimates[4], radii[31]) = (10.0, 9.5, f32::INFINITY);
    // The last tile has eight rows of which nothing is known, one of them minus infinity.
    estimates[999] = f32::NEG_INFINITY;
    for isa in Isa::available() {
        let mut maxima = Vec::new();
        maxima_of(&estimates, &mut maxima, isa);
        let screened = Screened { estimates: &estimates, maxima: &maxima, radii: &radii };
        assert_eq!(selection.promising(&screened, 1), [700]);
        let last: Vec<u32> = [4, 700].into_iter().chain(992..1000).collect();
        assert_eq!(selection.reaching(&screened, 10.0), last);
        assert_eq!(selection.reaching(&screened, f32::NAN).len(), 1000);
        assert_eq!(selection.promising(&screened, 50).len(), 32);
    }
}
