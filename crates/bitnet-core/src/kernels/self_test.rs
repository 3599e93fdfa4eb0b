//! The test every kernel passes before it serves: products whose results are known from their definition, on the very CPU
//! that will compute them. An untested CPU, emulator or compiler otherwise shows as fluent nonsense.

use std::convert::Infallible;

use super::{
    Output, TernaryKernel, available,
    packing::{PackedLayout, PackedTernary, ROW_TILE},
    screen::{ScreenBuffer, ScreenInputs, ScreenMatrix, Screened},
    sparse::{ActiveChannels, ChannelColumns, ChannelRows, LINE_WEIGHTS},
};
use crate::{
    quant::activation::ActivationBuffer,
    threads::{ColumnsMut, WorkerPool},
};

/// A kernel gave a wrong result: the CPU, its emulation or the compiler is at fault, and the kernel must not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("wrong {operation} of {rows} x {cols} weights and {num_tokens} tokens")]
pub struct SelfTestFailure {
    /// What was computed: `2bit product`, `1.6bit product`, `screen` or `sparse product`.
    pub operation: String,
    /// Rows of the weights.
    pub rows: usize,
    /// Columns of the weights.
    pub cols: usize,
    /// Tokens of the activations.
    pub num_tokens: usize,
}

/// Tests every kernel of this CPU, in some milliseconds. In the order of [`available`].
pub fn self_test() -> Vec<(&'static str, Result<(), SelfTestFailure>)> {
    available().iter().map(|kernel| (kernel.name(), test(*kernel))).collect()
}

/// Tests one kernel.
///
/// # Errors
/// The first product that was not what its definition says.
pub(super) fn test(kernel: &dyn TernaryKernel) -> Result<(), SelfTestFailure> {
    let mut pool = WorkerPool::new(1);
    // Every number of tokens that has code of its own, enough of them for panels to be unpacked, and a block for tables.
    for num_tokens in (1..=26).chain([32]) {
        test_case(&Case::mixed(45, 180, num_tokens), kernel, &mut pool)?;
    }
    for (weight, x) in [(1, 1.0), (1, -1.0), (-1, 1.0), (-1, -1.0)] {
        test_case(&Case::constant(33, 2560, 2, weight, x), kernel, &mut pool)?;
        test_case(&Case::constant(33, 600, 32, weight, x), kernel, &mut pool)?;
    }
    test_case(&Case::mixed(33, 8640, 1), kernel, &mut pool)?;
    let case = Case::mixed(LINE_WEIGHTS, 2 * LINE_WEIGHTS, 1);
    if is_sparse_right(&case, kernel, &mut pool) { Ok(()) } else { Err(case.failure("sparse product".to_owned())) }
}

/// `weights: [rows, cols]`, `x: [num_tokens, cols]`.
struct Case {
    rows: usize,
    cols: usize,
    num_tokens: usize,
    weights: Vec<i8>,
    x: Vec<f32>,
}

impl Case {
    /// All weights and all codes, in an order without a period.
    fn mixed(rows: usize, cols: usize, num_tokens: usize) -> Self {
        let mut state = 1_u32;
        let mut next = move |bound: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % bound
        };
        let weights = (0..rows * cols).map(|_| next(3) as i8 - 1).collect();
        let x = (0..num_tokens * cols).map(|_| next(255) as f32 - 127.0).collect();
        Self { rows, cols, num_tokens, weights, x }
    }

    /// The largest sums there are.
    fn constant(rows: usize, cols: usize, num_tokens: usize, weight: i8, x: f32) -> Self {
        Self { rows, cols, num_tokens, weights: vec![weight; rows * cols], x: vec![x; num_tokens * cols] }
    }

    fn failure(&self, operation: String) -> SelfTestFailure {
        SelfTestFailure { operation, rows: self.rows, cols: self.cols, num_tokens: self.num_tokens }
    }

    fn decode(&self, row: usize, out: &mut [i8]) -> Result<(), Infallible> {
        out.copy_from_slice(&self.weights[row * self.cols..][..self.cols]);
        Ok(())
    }
}

fn test_case(case: &Case, kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> Result<(), SelfTestFailure> {
    for &layout in kernel.layouts() {
        if !is_product_right(case, layout, kernel, pool) {
            return Err(case.failure(format!("{} product", layout.name())));
        }
    }
    if is_screen_right(case, kernel, pool) { Ok(()) } else { Err(case.failure("screen".to_owned())) }
}

fn is_product_right(case: &Case, layout: PackedLayout, kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> bool {
    const SCALE: f32 = 0.75;
    const ADDEND: f32 = 0.3;
    let &Case { rows, cols, num_tokens, .. } = case;
    let decode = |row: usize, out: &mut [i8]| case.decode(row, out);
    let Ok(packed) = PackedTernary::pack(rows, cols, SCALE, layout, pool, &decode);
    let mut buffer = ActivationBuffer::new(num_tokens, cols);
    for (token, x) in case.x.chunks_exact(cols).enumerate() {
        buffer.quantize_row(token, x);
    }
    let x = buffer.view(num_tokens, cols);
    let (mut out, mut sum) = (vec![f32::NAN; num_tokens * rows], vec![ADDEND; num_tokens * rows]);
    kernel.multiply(&packed.slice(0..rows), &x, &mut ColumnsMut::new(&mut out, rows), Output::Replace);
    kernel.multiply(&packed.slice(0..rows), &x, &mut ColumnsMut::new(&mut sum, rows), Output::Add);
    (0..num_tokens).zip(out.chunks_exact(rows).zip(sum.chunks_exact(rows))).all(|(token, (out, sum))| {
        case.weights.chunks_exact(cols).zip(out.iter().zip(sum)).all(|(weights, (out, sum))| {
            let products = weights.iter().zip(x.codes(token)).map(|(&w, &q)| i32::from(w) * i32::from(q));
            let expected = super::epilogue(products.sum(), x.scales()[token], SCALE);
            expected.to_bits() == out.to_bits() && (ADDEND + expected).to_bits() == sum.to_bits()
        })
    })
}

/// The same product by every second row, and by the columns whose code is not zero.
fn is_sparse_right(case: &Case, kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> bool {
    let &Case { rows, cols, .. } = case;
    let decode = |row: usize, out: &mut [i8]| case.decode(row, out);
    let mut buffer = ActivationBuffer::new(1, cols);
    buffer.quantize_row(0, &case.x);
    let x = buffer.view(1, cols);
    let Ok(packed) = PackedTernary::pack(rows, cols, 0.75, kernel.layout(), pool, &decode);
    let (mut expected, mut some, mut all) = (vec![f32::NAN; rows], vec![0.0; rows], vec![f32::NAN; rows]);
    kernel.gemv(&packed.slice(0..rows), &x, &mut expected);
    let Ok(by_row) = ChannelRows::pack((rows, cols), 0.75, pool, &decode);
    let channels: Vec<_> = (0..rows as u32).step_by(2).collect();
    kernel.gemv_channels(&by_row, &channels, 0, &x, &mut some);
    let Ok(by_column) = ChannelColumns::pack((rows, cols), 0.75, pool, &decode);
    let mut active = ActiveChannels::new(cols);
    active.set(&x.codes(0)[..cols]);
    kernel.gemv_active(&by_column, &active, 0..rows / LINE_WEIGHTS, &x, &mut all);
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    some.iter().zip(&expected).step_by(2).all(same) && all.iter().zip(&expected).all(same)
}

/// The exact value of every row lies inside its bounds, and these are narrow.
fn is_screen_right(case: &Case, kernel: &dyn TernaryKernel, pool: &mut WorkerPool) -> bool {
    let &Case { rows, cols, num_tokens, .. } = case;
    let decode = |row: usize, out: &mut [f32]| {
        for (out, (&weight, x)) in out.iter_mut().zip(case.weights[row * cols..].iter().zip(&case.x)) {
            *out = f32::from(weight) + x / 128.0;
        }
        Ok::<(), Infallible>(())
    };
    let Ok(matrix) = ScreenMatrix::pack(rows, cols, kernel.isa(), pool, &decode);
    let mut inputs = ScreenInputs::new(num_tokens, cols);
    inputs.fill(&case.x, kernel.screen_bits(num_tokens), kernel.isa());
    let mut buffer = ScreenBuffer::new(num_tokens, rows);
    let mut out = buffer.shared(num_tokens).claim(0..rows.div_ceil(ROW_TILE));
    kernel.screen(&matrix.slice(0..rows), &inputs.view(num_tokens), &mut out);
    let mut weights = vec![0.0; cols];
    (0..rows).all(|row| {
        let Ok(()) = decode(row, &mut weights);
        let norm = dot(&weights, &weights).sqrt();
        case.x.chunks_exact(cols).enumerate().all(|(token, x)| {
            let Screened { estimates, maxima, radii } = buffer.screened(token);
            let (max, radius) = (maxima[row / ROW_TILE], radii[row / ROW_TILE]);
            let off = (dot(&weights, x) - f64::from(estimates[row])).abs();
            off <= f64::from(radius) && f64::from(radius) <= 0.05 * norm * dot(x, x).sqrt() && estimates[row] <= max
        })
    })
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
