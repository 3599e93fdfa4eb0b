//! Instruction sets as values: an [`Isa`] other than the baseline exists only on a CPU that has it, so running code compiled
//! for it is safe.
//!
//! [`Isa::run`] is how everything that is no ternary product (norms, attention, activations, the head) reaches the CPU's
//! vector width from plain Rust: the operation is inlined into a function compiled for the instruction set, where its loops
//! over `[f32; 16]` and `f32::mul_add` become vector code. Rust neither reorders nor contracts floating point, so the bits
//! are the same in every instruction set.
#![allow(unsafe_code)]

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

    /// Runs `operation` compiled for this instruction set.
    #[inline]
    pub fn run<O: FloatOp>(self, operation: O) -> O::Output {
        match self.0 {
            Level::Baseline => operation.call(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level comes out of `avx2_fma` alone, which checked every feature enabled there.
            Level::Avx2Fma => unsafe { run_avx2_fma(operation) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level comes out of `avx512` alone, which checked every feature enabled there.
            Level::Avx512 => unsafe { run_avx512(operation) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2_fma<O: FloatOp>(operation: O) -> O::Output {
    operation.call()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<O: FloatOp>(operation: O) -> O::Output {
    operation.call()
}
