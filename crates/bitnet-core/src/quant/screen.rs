//! Rows of a dense matrix in 8 bits with proven error bounds, and activations in 14 bits, or in 8 but for a few: a cheap first
//! look at a product that says which rows deserve the exact one.
//!
//! A row `w` becomes `s q + e`, with int8 codes `q`, and an input `x` becomes `t p + d`, with codes `p`. So
//!
//! ```text
//! w.x = s t q.p  +  s q.d  +  e.x
//! |w.x - s t q.p|  <=  s |q| |d|  +  |e| |x|            (Cauchy-Schwarz, twice)
//! ```
//!
//! The norms are computed in `f64` from what is really stored and rounded up. What is compared in the end is not `w.x` but
//! the 16-lane `f32` sum of `cols / 16 + 5` roundings a lane, off by at most that many times 2^-24 of `sum |w_i x_i|
//! <= (s |q| + |e|) |x|`; [`SplitRow::radius`] adds this, the rounding of the estimate and its own.

/// Codes of weights are at most this.
pub const MAX_WEIGHT_CODE: i32 = 127;

/// Codes of activations are at most this.
pub const MAX_ACTIVATION_CODE: i32 = 8191;

/// Added to activation codes so that both halves, of 7 bits, are unsigned: instructions multiply unsigned by signed bytes,
/// and those without VNNI add two products in 16 bits.
pub const ACTIVATION_BIAS: i32 = 1 << 13;

/// Added to activation codes of 8 bits, for the same reason.
pub const BYTE_BIAS: i32 = 1 << 7;

/// What an outlier's high part counts: the low one has 8 bits.
const OUTLIER_WEIGHT: i32 = 1 << 8;

/// The most values of an input that 8 bits do not hold.
pub const MAX_OUTLIERS: usize = 16;

/// The root mean squares that 8 bits hold, unless more than [`MAX_OUTLIERS`] are beyond: of values that are distributed
/// normally, three in a thousand are.
const OUTLIERS_FROM: f32 = 3.0;

/// What is known of a row of weights beside its codes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WeightRow {
    /// `s`.
    pub scale: f32,
    /// Sum of the codes: takes the bias of the activations off again.
    pub code_sum: i32,
    /// Its norms.
    pub norms: Norms,
}

/// Bounds of the norms of a row, or of each of several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Norms {
    /// At least `|e|`; infinite when a weight is not finite, so that the row is never ruled out.
    pub residual: f32,
    /// At least `s |q|`.
    pub code: f32,
}

impl Norms {
    /// Of both.
    pub fn max(self, other: Self) -> Self {
        Self { residual: self.residual.max(other.residual), code: self.code.max(other.code) }
    }
}

/// What is known of an input beside its codes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SplitRow {
    /// What the products with the high parts of the codes count, beside those with the low ones.
    pub high_weight: i32,
    /// What was added to every code.
    pub bias: i32,
    /// `t`.
    pub step: f32,
    /// At least `|x|`; infinite when a value is not finite.
    pub norm: f32,
    /// At least `|d|`.
    pub residual_norm: f32,
    /// Relative error of the exact product's additions.
    pub rounding: f32,
}

/// Writes the codes of a row of weights; absmax, ties to even.
#[inline(always)]
pub fn quantize_weights(weights: &[f32], codes: &mut [i8]) -> WeightRow {
    let absmax = absmax(weights);
    if !absmax.is_finite() {
        codes.fill(0);
        let norms = Norms { residual: f32::INFINITY, code: f32::MIN_POSITIVE };
        return WeightRow { scale: 0.0, code_sum: 0, norms };
    }
    let scale = absmax.max(TINY) / MAX_WEIGHT_CODE as f32;
    let inverse = MAX_WEIGHT_CODE as f32 / absmax.max(TINY);
    let code_of = |weight: f32| round(weight * inverse).clamp(-MAX_WEIGHT_CODE, MAX_WEIGHT_CODE);
    let mut code_sum = 0;
    let mut code_square = 0;
    for (code, &weight) in codes.iter_mut().zip(weights) {
        let q = code_of(weight);
        *code = q as i8;
        code_sum += q;
        code_square += q * q;
    }
    let residual = norm(weights, |weight| f64::from(weight) - f64::from(scale) * f64::from(code_of(weight)));
    let code_norm = f64::from(scale) * f64::from(code_square).sqrt();
    WeightRow { scale, code_sum, norms: Norms { residual: round_up(residual), code: round_up(code_norm) } }
}

/// Writes the high and low halves of the biased codes of an input; absmax, ties to even.
#[inline(always)]
pub fn split_activations(x: &[f32], high: &mut [i8], low: &mut [i8]) -> SplitRow {
    let absmax = absmax(x);
    if !absmax.is_finite() {
        high.fill(0);
        low.fill(0);
        return SplitRow::UNBOUNDED;
    }
    let step = absmax.max(TINY) / MAX_ACTIVATION_CODE as f32;
    let inverse = MAX_ACTIVATION_CODE as f32 / absmax.max(TINY);
    let code_of = |value: f32| round(value * inverse).clamp(-MAX_ACTIVATION_CODE, MAX_ACTIVATION_CODE);
    for ((high, low), &value) in high.iter_mut().zip(low).zip(x) {
        let biased = code_of(value) + ACTIVATION_BIAS;
        *high = (biased >> 7) as i8;
        *low = (biased & 127) as i8;
    }
    let residual = norm(x, |value| f64::from(value) - f64::from(step) * f64::from(code_of(value)));
    SplitRow {
        high_weight: 1 << 7,
        bias: ACTIVATION_BIAS,
        step,
        norm: round_up(norm(x, f64::from)),
        residual_norm: round_up(residual),
        rounding: rounding(x.len()),
    }
}

/// The high parts of the few codes that need more than 8 bits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outliers {
    columns: [u32; MAX_OUTLIERS],
    high: [i32; MAX_OUTLIERS],
    len: usize,
}

impl Outliers {
    /// `(column, high part)` of each.
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = (usize, i32)> {
        let columns = self.columns[..self.len].iter().map(|&column| column as usize);
        columns.zip(self.high[..self.len].iter().copied())
    }

    /// # Panics
    /// When there are [`MAX_OUTLIERS`] already.
    #[inline(always)]
    fn push(&mut self, column: usize, high: i32) {
        self.columns[self.len] = column as u32;
        self.high[self.len] = high;
        self.len += 1;
    }
}

/// Writes the biased low bytes of the codes of an input; ties to even. What they do not hold goes to `outliers`.
#[inline(always)]
pub fn quantize_activations(x: &[f32], codes: &mut [i8], outliers: &mut Outliers) -> SplitRow {
    const LARGEST: f32 = 127.0;
    /// No code is so large that its low byte and high part lose anything.
    const MOST: i32 = 127 * OUTLIER_WEIGHT;
    outliers.len = 0;
    let absmax = absmax(x);
    if !absmax.is_finite() {
        codes.fill(0);
        return SplitRow::UNBOUNDED;
    }
    let length = norm(x, f64::from);
    let mut most = (length / (x.len() as f64).sqrt()) as f32 * OUTLIERS_FROM;
    while most < absmax && num_beyond(x, most) > MAX_OUTLIERS {
        most = most.max(TINY) * 1.25;
    }
    let most = most.min(absmax).max(TINY);
    let (step, inverse) = (most / LARGEST, LARGEST / most);
    let code_of = |value: f32| round((value * inverse).clamp(-(MOST as f32), MOST as f32));
    for (code, &value) in codes.iter_mut().zip(x) {
        *code = (code_of(value) + BYTE_BIAS) as i8;
    }
    if most < absmax {
        for (column, &value) in x.iter().enumerate() {
            let high = (code_of(value) + BYTE_BIAS) >> 8;
            if high != 0 {
                outliers.push(column, high);
            }
        }
    }
    let residual = norm(x, |value| f64::from(value) - f64::from(step) * f64::from(code_of(value)));
    SplitRow {
        high_weight: OUTLIER_WEIGHT,
        bias: BYTE_BIAS,
        step,
        norm: round_up(length),
        residual_norm: round_up(residual),
        rounding: rounding(x.len()),
    }
}

/// What the additions of an exact product of `len` values can be off by, relatively.
#[inline(always)]
fn rounding(len: usize) -> f32 {
    (len / 16 + 8) as f32 * (1.01 / (1 << 24) as f32)
}

/// Values whose magnitude is larger than `most`.
#[inline(always)]
fn num_beyond(x: &[f32], most: f32) -> usize {
    x.iter().fold(0_u32, |count, value| count + u32::from(value.abs() > most)) as usize
}

impl WeightRow {
    /// The estimate from the sums of the codes' products with the high and the low parts. Exact but for one rounding.
    #[inline(always)]
    pub fn estimate(&self, x: &SplitRow, high: i32, low: i32) -> f32 {
        let bias = f64::from(x.bias) * f64::from(self.code_sum);
        let product = f64::from(x.high_weight) * f64::from(high) + f64::from(low) - bias;
        (product * (f64::from(self.scale) * f64::from(x.step))) as f32
    }
}

impl SplitRow {
    /// Of an input with a value that is not finite: no row is ruled out.
    const UNBOUNDED: Self =
        Self { high_weight: 0, bias: 0, step: 0.0, norm: f32::INFINITY, residual_norm: f32::INFINITY, rounding: 0.0 };

    /// No less than the distance between the estimate of a row of these norms and its product in 16-lane `f32` arithmetic;
    /// never NaN. An estimate is `s q . t p`, and `t p` is `x - d`.
    #[inline(always)]
    pub fn radius(&self, row: &Norms) -> f32 {
        const UP: f32 = 1.0 + 1.0 / (1 << 20) as f32;
        const HALF_ULPS: f32 = 1.0 / (1 << 22) as f32;
        let magnitude = self.norm * (row.code + row.residual);
        let quantization = self.norm * row.residual + self.residual_norm * row.code;
        let estimate = row.code * (self.norm + self.residual_norm);
        let rounding = magnitude * self.rounding + estimate * HALF_ULPS + f32::MIN_POSITIVE;
        // Sums that could overflow are not bounded by anything.
        if magnitude < 1e37 { (quantization + rounding) * UP } else { f32::INFINITY }
    }
}

/// Below this a largest magnitude counts as this, so that no step is denormal.
const TINY: f32 = 1e-30;

/// The largest magnitude; not finite when any value is not. As integers, where NaN ranks above infinity.
#[inline(always)]
fn absmax(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |max, value| max.max(value.to_bits() & 0x7fff_ffff)))
}

/// Rounds `|value| < 2^22` to the nearest integer, ties to even, without a branch.
#[inline(always)]
fn round(value: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()).cast_signed()
}

/// The Euclidean norm of `part(value)`, in lanes so that it runs at vector width.
#[inline(always)]
fn norm(values: &[f32], part: impl Fn(f32) -> f64) -> f64 {
    let mut lanes = [0.0_f64; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let part = part(*value);
            *lane += part * part;
        }
    }
    let rest: f64 = rest.iter().map(|value| part(*value) * part(*value)).sum();
    (lanes.iter().sum::<f64>() + rest).sqrt()
}

/// The next `f32` above; the errors of an `f64` norm are far smaller than the step.
#[inline(always)]
fn round_up(value: f64) -> f32 {
    ((value * (1.0 + 1e-9)) as f32).next_up().max(f32::MIN_POSITIVE)
}
