//! Floating-point primitives with one definition for every instruction set: the elementary functions, and the 16-lane
//! reductions that fix the order of every sum.
//!
//! All of it is plain Rust, always inlined and free of branches where it matters, to be used inside a
//! [`FloatOp`](super::FloatOp). Nothing here may call the system's mathematics library, whose bits differ between systems.

/// Lanes of every floating-point sum: lane `l` takes the elements `i = l mod 16` in ascending order.
pub const LANES: usize = 16;

/// `e^x` within about one unit in the last place. Results below the smallest normal number are 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const HIGHEST: f32 = 88.722_84; // ln of the largest number
    let (e, n) = reduced_exp(x);
    // 2^n in two factors, for 2^128 is not a number; the halves keep both inside the exponent's range
    let half = n >> 1;
    let value = e * power_of_two(half) * power_of_two(n.wrapping_sub(half));
    let value = if x < LN_SMALLEST { 0.0 } else { value };
    if x > HIGHEST { f32::INFINITY } else { value }
}

/// [`exp`] of what is not positive, to the bit, in fewer steps: most of a softmax.
#[inline(always)]
pub fn exp_non_positive(x: f32) -> f32 {
    let (e, n) = reduced_exp(x);
    if x < LN_SMALLEST { 0.0 } else { e * power_of_two(n) }
}

/// `(e, n)` with `e^x = e 2^n`, `e` between the roots of 1/2 and 2.
#[inline(always)]
fn reduced_exp(x: f32) -> (f32, i32) {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // x = n ln 2 + r with |r| <= ln 2 / 2
    let shifted = x.mul_add(LOG2_E, ROUND_MAGIC);
    let n = shifted.to_bits().wrapping_sub(ROUND_MAGIC.to_bits()).cast_signed();
    let whole = shifted - ROUND_MAGIC;
    let r = whole.mul_add(-LN2_LOW, whole.mul_add(-LN2_HIGH, x));
    // e^r = 1 + r + r^2 P(r); P interpolates at the Chebyshev nodes, relative error 8e-10
    let p = 0.000_198_910_8_f32;
    let p = p.mul_add(r, 0.001_393_373_1);
    let p = p.mul_add(r, 0.008_333_31);
    let p = p.mul_add(r, 0.041_666_463);
    let p = p.mul_add(r, 0.166_666_67);
    let p = p.mul_add(r, 0.5);
    ((p * r).mul_add(r, r) + 1.0, n)
}

/// Natural logarithm within about one unit in the last place: `ln(0)` is -inf, of a negative number NaN.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    const TWO_POW_23: f32 = 8_388_608.0;
    let denormal = x < f32::MIN_POSITIVE;
    let normal = if denormal { x * TWO_POW_23 } else { x };
    let bias = if denormal { -23.0 } else { 0.0 };
    // x = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2)
    let offset = normal.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let n = (offset.cast_signed() >> 23) as f32 + bias;
    let f = f32::from_bits((offset & 0x007f_ffff).wrapping_add(SQRT_HALF_BITS)) - 1.0;
    // ln(1 + f) = f - f^2 / 2 + f^3 P(f); P interpolates at the Chebyshev nodes, relative error 4e-9
    let p = 0.069_716_11_f32;
    let p = p.mul_add(f, -0.114_797_34);
    let p = p.mul_add(f, 0.116_854_2);
    let p = p.mul_add(f, -0.124_256_87);
    let p = p.mul_add(f, 0.142_490_58);
    let p = p.mul_add(f, -0.166_678_03);
    let p = p.mul_add(f, 0.200_007_16);
    let p = p.mul_add(f, -0.249_999_97);
    let p = p.mul_add(f, 0.333_333_3);
    let square = f * f;
    let tail = (p * f).mul_add(square, square.mul_add(-0.5, n * LN2_LOW));
    let value = n.mul_add(LN2_HIGH, tail + f);
    let value = if x == f32::INFINITY { x } else { value };
    let value = if x >= 0.0 { value } else { f32::NAN };
    if x == 0.0 { f32::NEG_INFINITY } else { value }
}

/// Sine and cosine of an angle in radians, in double precision: for tables that are rounded once.
pub fn sin_cos(angle: f64) -> (f64, f64) {
    libm::sincos(angle)
}

/// Sum of squares in the order of [`LANES`].
#[inline(always)]
pub fn sum_squares_16(values: &[f32]) -> f32 {
    dot_by(values, values, |value| value)
}

/// `a . b` in the order of [`LANES`].
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn dot_16(a: &[f32], b: &[f32]) -> f32 {
    dot_by(a, b, |value| value)
}

/// `row . x` of a row of half-precision bits, in the order of [`LANES`].
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn dot_f16_16(row: &[u16], x: &[f32]) -> f32 {
    dot_by(row, x, f16_to_f32)
}

/// `row . x` of a row of bfloat16 bits, in the order of [`LANES`].
///
/// # Panics
/// When the lengths differ.
#[inline(always)]
pub fn dot_bf16_16(row: &[u16], x: &[f32]) -> f32 {
    dot_by(row, x, bf16_to_f32)
}

/// The value of half-precision bits, exactly, without a branch.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    // Exponent and mantissa moved into place are the value times 2^-112, denormals included, so one exact product mends
    // both; only infinity and NaN need their exponent set by hand.
    const TWO_POW_112: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * TWO_POW_112).to_bits();
    let magnitude = if bits & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(magnitude | u32::from(bits & 0x8000) << 16)
}

/// The value of bfloat16 bits.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Adds 16 lanes as the tree `l + 8`, `l + 4`, `l + 2`, `l + 1`.
#[inline(always)]
pub fn lane_tree(lanes: &[f32; LANES]) -> f32 {
    let mut lanes = *lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The largest of `N` values, a power of two, as the tree of [`lane_tree`]; NaN after a number is left out.
#[inline(always)]
pub fn largest<const N: usize>(values: &[f32; N]) -> f32 {
    let mut max = *values;
    let mut half = N / 2;
    while half > 0 {
        for lane in 0..half {
            max[lane] = larger(max[lane], max[lane + half]);
        }
        half /= 2;
    }
    max[0]
}

/// `value` where it is larger than `max`, which NaN never is.
#[inline(always)]
pub fn larger(max: f32, value: f32) -> f32 {
    if value > max { value } else { max }
}

const ROUND_MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
const LN_SMALLEST: f32 = -87.336_54; // of the smallest normal number
const LN2_HIGH: f32 = 0.693_145_75; // its low 9 bits are zero, so n * LN2_HIGH is exact
const LN2_LOW: f32 = 1.428_606_8e-6;

#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(exponent.wrapping_add(127).cast_unsigned() << 23)
}

#[inline(always)]
fn dot_by<W: Copy>(a: &[W], b: &[f32], widen: impl Fn(W) -> f32 + Copy) -> f32 {
    assert_eq!(a.len(), b.len(), "a dot product of different lengths");
    let mut lanes = [0.0; LANES];
    let (a_steps, a_tail) = a.as_chunks::<LANES>();
    let (b_steps, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_steps.iter().zip(b_steps) {
        for lane in 0..LANES {
            lanes[lane] = widen(a[lane]).mul_add(b[lane], lanes[lane]);
        }
    }
    for (lane, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
        lanes[lane] = widen(a).mul_add(b, lanes[lane]);
    }
    lane_tree(&lanes)
}
