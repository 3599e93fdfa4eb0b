//! Instruction sets as values: an [`Isa`] other than the baseline exists only on a CPU that has it, so running code compiled
//! for it is safe.
//!
//! [`Isa::run`] is how everything that is no ternary product (norms, attention, activations, the head) reaches the CPU's
//! vector width from plain Rust: the operation is inlined into a function compiled for the instruction set, where its loops
//! over `[f32; 16]` and `f32::mul_add` become vector code. Rust neither reorders nor contracts floating point, so the bits
//! are the same in every instruction set.
//!
//! Where plain Rust cannot name the instruction ([`Widen`]) there is one function an instruction set, and a test that they
//! agree.
#![allow(unsafe_code)]

use super::math;

/// Values that [`Widen`] takes at once.
pub const RUN: usize = 16;

/// An instruction set this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2Fma,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A computation to run under an [`Isa`]. Implementors mark `call`, and everything hot below it, `#[inline(always)]`:
/// what is not inlined is compiled for the baseline.
pub trait FloatOp {
    /// What the computation gives.
    type Output;

    /// Does it.
    fn call(self) -> Self::Output;
}

/// As [`FloatOp`], for what reads half-precision values.
pub trait WideningOp {
    /// What the computation gives.
    type Output;

    /// Does it.
    fn call<W: Widen>(self, widen: W) -> Self::Output;
}

/// An instruction set to what is compiled for it: its registers, and its way to the values of half-precision bits.
pub trait Widen: Copy {
    /// Whether there are 32 registers of 16 floats, rather than 16 of at most 8: how large tiles of sums may be. A constant, so
    /// that what is for others is not compiled.
    const IS_WIDE: bool;

    /// The values, exactly. (Of a NaN only that it is one is certain.)
    fn widen(self, halves: &[[u8; 2]; RUN]) -> [f32; RUN];
}

impl Isa {
    /// What every CPU of this architecture has.
    pub const BASELINE: Self = Self(Level::Baseline);

    /// AVX2 with FMA and F16C, when this CPU has them.
    #[cfg(target_arch = "x86_64")]
    pub fn avx2_fma() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Self(Level::Avx2Fma))
    }

    /// AVX-512 F, BW, DQ and VL over [`Isa::avx2_fma`], when this CPU has them.
    #[cfg(target_arch = "x86_64")]
    pub fn avx512() -> Option<Self> {
        Self::avx2_fma()?;
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        has.then_some(Self(Level::Avx512))
    }

    /// Every instruction set of this CPU, the baseline first, the widest last.
    pub fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let detected = [Self::avx2_fma(), Self::avx512()];
        #[cfg(not(target_arch = "x86_64"))]
        let detected: [Option<Self>; 0] = [];
        std::iter::once(Self::BASELINE).chain(detected.into_iter().flatten()).collect()
    }

    /// The values of half-precision bits, exactly. (Of a NaN only that it is one is certain.)
    ///
    /// # Panics
    /// When there are not as many of the ones as of the others.
    pub fn widen_f16(self, runs: &[[[u8; 2]; RUN]], out: &mut [[f32; RUN]]) {
        assert_eq!(runs.len(), out.len(), "a place for every run");
        self.run_widening(WidenAll { runs, out });
    }

    /// Runs `operation` compiled for this instruction set.
    #[inline]
    pub fn run<O: FloatOp>(self, operation: O) -> O::Output {
        self.run_widening(WidensNothing(operation))
    }

    /// As [`Isa::run`].
    #[inline]
    pub fn run_widening<O: WideningOp>(self, operation: O) -> O::Output {
        match self.0 {
            Level::Baseline => operation.call(ByIntegers),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level comes out of `avx2_fma` alone, which checked every feature enabled there.
            Level::Avx2Fma => unsafe { run_avx2_fma(operation) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level comes out of `avx512` alone, which checked every feature enabled there.
            Level::Avx512 => unsafe { run_avx512(operation) },
        }
    }
}

struct WidensNothing<O>(O);

impl<O: FloatOp> WideningOp for WidensNothing<O> {
    type Output = O::Output;

    #[inline(always)]
    fn call<W: Widen>(self, _: W) -> O::Output {
        self.0.call()
    }
}

struct WidenAll<'a> {
    runs: &'a [[[u8; 2]; RUN]],
    out: &'a mut [[f32; RUN]],
}

impl WideningOp for WidenAll<'_> {
    type Output = ();

    #[inline(always)]
    fn call<W: Widen>(self, widen: W) {
        for (run, out) in self.runs.iter().zip(self.out) {
            *out = widen.widen(run);
        }
    }
}

#[derive(Clone, Copy)]
struct ByIntegers;

impl Widen for ByIntegers {
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn widen(self, halves: &[[u8; 2]; RUN]) -> [f32; RUN] {
        let mut values = [0.0; RUN];
        for (value, half) in values.iter_mut().zip(halves) {
            *value = math::f16_to_f32(u16::from_ne_bytes(*half));
        }
        values
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2_fma<O: WideningOp>(operation: O) -> O::Output {
    operation.call(ByF16c(()))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<O: WideningOp>(operation: O) -> O::Output {
    operation.call(ByAvx512(()))
}

/// Proof that this CPU has F16C: only [`run_avx2_fma`] makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct ByF16c(());

#[cfg(target_arch = "x86_64")]
impl Widen for ByF16c {
    const IS_WIDE: bool = false;

    #[inline(always)]
    fn widen(self, halves: &[[u8; 2]; RUN]) -> [f32; RUN] {
        // SAFETY: as its type says.
        unsafe { widen_by_f16c(halves) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
#[inline]
fn widen_by_f16c(halves: &[[u8; 2]; RUN]) -> [f32; RUN] {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let mut values = [0.0; RUN];
    for (halves, values) in halves.as_chunks::<8>().0.iter().zip(values.as_chunks_mut::<8>().0) {
        // SAFETY: 8 halves are 128 bits, and 8 floats 256; neither need be aligned.
        unsafe { _mm256_storeu_ps(values.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()))) };
    }
    values
}

/// Proof that this CPU has AVX-512 F: only [`run_avx512`] makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct ByAvx512(());

#[cfg(target_arch = "x86_64")]
impl Widen for ByAvx512 {
    const IS_WIDE: bool = true;

    #[inline(always)]
    fn widen(self, halves: &[[u8; 2]; RUN]) -> [f32; RUN] {
        // SAFETY: as its type says.
        unsafe { widen_by_avx512(halves) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn widen_by_avx512(halves: &[[u8; 2]; RUN]) -> [f32; RUN] {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
    let mut values = [0.0; RUN];
    // SAFETY: 16 halves are 256 bits, and 16 floats 512; neither need be aligned.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()))) };
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_widens_every_half_alike() {
        let halves: Vec<_> = (0..=u16::MAX).map(u16::to_ne_bytes).collect();
        for isa in Isa::available() {
            let mut out = vec![[0.0; RUN]; halves.len() / RUN];
            isa.widen_f16(halves.as_chunks().0, &mut out);
            for (half, &out) in halves.iter().zip(out.as_flattened()) {
                let exact = half::f16::from_ne_bytes(*half).to_f32();
                assert!(out.to_bits() == exact.to_bits() || out.is_nan() && exact.is_nan(), "{isa:?} {half:?}");
            }
        }
    }
}
