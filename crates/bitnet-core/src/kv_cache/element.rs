//! How one number is kept: as a single, as a half, or as a byte that a scale belongs to.

use crate::quant::activation::{absmax, round_half_even};

/// Rounds numbers to `N` bytes.
pub(super) trait Encode<const N: usize>: Copy {
    fn encode(self, x: f32) -> [u8; N];
}

#[derive(Clone, Copy)]
pub(super) struct Single;

impl Encode<4> for Single {
    #[inline(always)]
    fn encode(self, x: f32) -> [u8; 4] {
        x.to_ne_bytes()
    }
}

#[derive(Clone, Copy)]
pub(super) struct Half;

impl Encode<2> for Half {
    #[inline(always)]
    fn encode(self, x: f32) -> [u8; 2] {
        f32_to_f16(x).to_ne_bytes()
    }
}

/// Codes of one position and head, by the rule of activations: `s = 127 / max(absmax, 1e-5)`, `code = round_half_even(x * s)`,
/// read back as `code * scale`.
#[derive(Clone, Copy)]
pub(super) struct Code {
    s: f32,
    scale: f32,
}

impl Code {
    #[inline(always)]
    pub(super) fn of(values: &[f32]) -> Self {
        let absmax = absmax(values);
        let at_least = absmax.max(1e-5);
        // With a value that is not finite the whole position is NaN: nothing is read back as if all were well.
        Self { s: 127.0 / at_least, scale: if absmax.is_finite() { at_least / 127.0 } else { f32::NAN } }
    }

    /// What codes are multiplied by.
    #[inline(always)]
    pub(super) fn scale(self) -> f32 {
        self.scale
    }

    #[inline(always)]
    pub(super) fn decode(code: u8, scale: f32) -> f32 {
        f32::from(code.cast_signed()) * scale
    }
}

impl Encode<1> for Code {
    #[inline(always)]
    fn encode(self, x: f32) -> [u8; 1] {
        [(round_half_even(x * self.s).clamp(-127, 127) as i8).cast_unsigned()]
    }
}

/// Half-precision bits of `x`, rounded to nearest even, without a branch.
#[inline(always)]
pub(super) fn f32_to_f16(x: f32) -> u16 {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const TOO_LARGE: u32 = (127 + 16) << 23;
    const REBIAS: u32 = (127 - 15) << 23;
    const INFINITY: u32 = 255 << 23;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    // Half of the last place kept, less one where that place is even: a carry out of the 13 bits dropped rounds up.
    let normal = (magnitude.wrapping_sub(REBIAS).wrapping_add(0xfff).wrapping_add(magnitude >> 13 & 1)) >> 13;
    // The last place of 0.5 is the smallest half, so the addition itself rounds to a multiple of it.
    let denormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let special = if magnitude > INFINITY { 0x7e00 } else { 0x7c00 };
    let finite = if magnitude < SMALLEST_NORMAL { denormal } else { normal };
    let half = if magnitude < TOO_LARGE { finite } else { special };
    (half | (x.to_bits() >> 16 & 0x8000)) as u16
}
