//! Kernel dispatch: the [`TernaryKernel`] trait, what this CPU offers, and the choice. No arithmetic lives here but the one
//! line of floating point that follows every integer product.
//!
//! A kernel is single-threaded: the caller splits the rows of a [`packing::PackedTernary`] among workers. All kernels give
//! the same bits: the products are exact integers, and the epilogue is the same for all.

pub mod aligned;
pub mod arena;
mod autotune;
mod interleave;
mod isa;
pub mod limits;
pub mod math;
pub mod packing;
pub mod prefetch;
mod scalar;
pub mod screen;
mod self_test;
pub mod sparse;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::{ops::Range, sync::LazyLock};

pub use autotune::autotune;
pub use interleave::interleave;
pub use isa::{FloatOp, Isa, RUN, Widen, WideningOp};
use packing::{PackedLayout, PackedRows, ROW_TILE};
use screen::{ActivationBits, ScreenRows, ScreensMut, SplitActivations};
pub use self_test::{SelfTestFailure, self_test};
use sparse::{ActiveChannels, ChannelColumns, ChannelRows, LINE_WEIGHTS, MultiplyColumns, MultiplyRows};

use crate::{quant::activation::QuantizedActivations, threads::ColumnsMut};

/// What a product does with what it finds in its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Writes over it.
    Replace,
    /// Adds to it, each value rounded before: `out += product`.
    Add,
}

/// One implementation of the ternary matrix product, of 1 to any number of tokens.
pub trait TernaryKernel: Send + Sync + 'static {
    /// `scalar`, `x86_64-avx2`, `x86_64-avxvnni`, `x86_64-avx512vnni`, `aarch64-neon`, ...
    fn name(&self) -> &'static str;

    /// How weights may be packed, the layout to take when nothing was measured first.
    fn layouts(&self) -> &'static [PackedLayout];

    /// The first of [`Self::layouts`].
    fn layout(&self) -> PackedLayout {
        self.layouts()[0]
    }

    /// The instruction set for the floating-point work around the products.
    fn isa(&self) -> Isa;

    /// `out[row] = (w . x as f32) / s * scale`, for one token.
    ///
    /// # Panics
    /// When `x` is not one token of `w.cols()` values, `out` is not `w.rows()` long or the layout is none of this kernel's.
    fn gemv(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]);

    /// `out[token][row] = (w . x[token] as f32) / s[token] * scale`, or `+=`. `out: [x.num_tokens(), w.rows()]`
    ///
    /// # Panics
    /// When the shapes do not agree or the layout is none of this kernel's.
    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output);

    /// [`Self::gemm`], or [`Self::gemv`] where it does the same.
    ///
    /// # Panics
    /// As there.
    fn multiply(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
        if x.num_tokens() == 1 && output == Output::Replace {
            self.gemv(w, x, out.row_mut(0));
        } else {
            self.gemm(w, x, out, output);
        }
    }

    /// How many of `num_tokens` [`Self::gemm`] multiplies at once, and takes [in blocks](QuantizedActivations::blocks) if it can,
    /// rather than make blocks of its own. 1 when it takes rows.
    fn block_tokens(&self, _num_tokens: usize) -> usize {
        1
    }

    /// The fewest tiles of weights that a call of [`Self::gemm`] should get: what it prepares of the tokens, every call does.
    fn min_tiles(&self, _num_tokens: usize) -> usize {
        1
    }

    /// The bits of a screen's activations that are the fastest for so many tokens.
    fn screen_bits(&self, _num_tokens: usize) -> ActivationBits {
        ActivationBits::Fourteen
    }

    /// Estimates of the product of every row and token, and how far from the exact values they can be.
    ///
    /// # Panics
    /// When the shapes do not agree, or `x` has bits that [`Self::screen_bits`] never names.
    fn screen(&self, w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>);

    /// `out[channel - first] = (w[channel] . x as f32) / s * scale` for the `channels` alone, ascending, of one token.
    ///
    /// # Panics
    /// When the shapes do not agree or a channel is outside `first..first + out.len()`.
    fn gemv_channels(
        &self,
        w: &ChannelRows,
        channels: &[u32],
        first: usize,
        x: &QuantizedActivations<'_>,
        out: &mut [f32],
    ) {
        check_channels(w, x);
        self.isa().run(MultiplyRows { w, channels, first, x, out });
    }

    /// `out = (w . x as f32) / s * scale` for the outputs of `lines` of [`LINE_WEIGHTS`] each, where `active` lists the
    /// codes of `x` that are not zero, of one token.
    ///
    /// # Panics
    /// When the shapes do not agree.
    fn gemv_active(
        &self,
        w: &ChannelColumns,
        active: &ActiveChannels,
        lines: Range<usize>,
        x: &QuantizedActivations<'_>,
        out: &mut [f32],
    ) {
        check_active(w, &lines, x, out);
        self.isa().run(MultiplyColumns { w, active, lines, x, out });
    }

    /// Runs the kernel's dot product of bytes `rounds` times on operands in registers, as fast as independent sums allow,
    /// and returns the multiply-accumulates done: the speed no product passes that multiplies. (AVX2's tables of sums do not.)
    fn multiply_registers(&self, rounds: u32) -> u64;
}

/// Every kernel this CPU can run, `scalar` first, the fastest last.
pub fn available() -> &'static [&'static dyn TernaryKernel] {
    static AVAILABLE: LazyLock<Vec<&'static dyn TernaryKernel>> = LazyLock::new(detect);
    &AVAILABLE
}

/// The kernel called `name`, or the fastest when `name` is `auto`.
///
/// # Errors
/// When no kernel has that name or this CPU lacks what it needs; never a silent fallback.
pub fn select(name: &str) -> Result<&'static dyn TernaryKernel, KernelError> {
    let fits = |kernel: &&&dyn TernaryKernel| name == "auto" || kernel.name() == name;
    if let Some(kernel) = available().iter().rev().find(fits) {
        return Ok(*kernel);
    }
    let names: Vec<_> = available().iter().map(|kernel| kernel.name()).collect();
    let (name, available) = (name.to_owned(), names.join(", "));
    if NAMES.contains(&name.as_str()) {
        Err(KernelError::Unsupported { name, available })
    } else {
        Err(KernelError::Unknown { name, available })
    }
}

/// A kernel that passed its self-test on this CPU.
#[derive(Clone)]
pub struct TestedKernel {
    /// The choice.
    pub kernel: &'static dyn TernaryKernel,
    /// What every kernel of this CPU gave, in the order of [`available`].
    pub results: Vec<(&'static str, Result<(), SelfTestFailure>)>,
}

/// As [`select`], but only a kernel that passes its self-test on this CPU. `auto` passes over those that fail, each with a
/// log line; takes some milliseconds.
///
/// # Errors
/// As [`select`], and when the kernel asked for, or every kernel, fails.
pub fn select_tested(name: &str) -> Result<TestedKernel, KernelError> {
    select(name)?;
    let results = self_test();
    for (kernel, result) in &results {
        if let Err(failure) = result {
            tracing::error!(kernel, %failure, "a kernel fails its self-test on this CPU and is not used");
        }
    }
    Ok(TestedKernel { kernel: fastest_sound(name, &results)?, results })
}

impl std::fmt::Debug for TestedKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestedKernel").field("kernel", &self.kernel.name()).field("results", &self.results).finish()
    }
}

/// The fastest kernel that is called `name`, or any for `auto`, and whose result (in the order of [`available`]) is good.
fn fastest_sound(
    name: &str,
    results: &[(&'static str, Result<(), SelfTestFailure>)],
) -> Result<&'static dyn TernaryKernel, KernelError> {
    let mut failed = Ok(available()[0]);
    for (kernel, (_, result)) in available().iter().zip(results).rev() {
        if name != "auto" && kernel.name() != name {
            continue;
        }
        match result {
            Ok(()) => return Ok(*kernel),
            Err(failure) => {
                failed = Err(KernelError::Unsound { name: kernel.name().to_owned(), failure: failure.clone() });
            }
        }
    }
    failed
}

/// Why a kernel cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// Not a kernel name; usually a typing error in `--kernel` or `BITNET_KERNEL`.
    #[error("kernel `{name}` does not exist; this CPU can run: {available}")]
    Unknown {
        /// As given.
        name: String,
        /// Comma-separated names.
        available: String,
    },
    /// The kernel exists but this CPU lacks the instructions.
    #[error("this CPU cannot run kernel `{name}`; it can run: {available}")]
    Unsupported {
        /// As given.
        name: String,
        /// Comma-separated names.
        available: String,
    },
    /// The kernel computes wrong results here: a defect of the CPU, its emulation or the compiler.
    #[error("kernel `{name}` fails its self-test on this CPU ({failure}); choose another with --kernel")]
    Unsound {
        /// The kernel's name.
        name: String,
        /// What it got wrong.
        failure: SelfTestFailure,
    },
}

/// Every kernel of every architecture: what `select` can tell apart from a typing error.
const NAMES: &[&str] = &["scalar", "x86_64-avx2", "x86_64-avxvnni", "x86_64-avx512vnni"];

/// What this CPU can run, slowest first. A detector hands its kernel out only where the instructions are.
fn detect() -> Vec<&'static dyn TernaryKernel> {
    let mut kernels: Vec<&'static dyn TernaryKernel> = vec![&scalar::Scalar];
    #[cfg(target_arch = "x86_64")]
    kernels.extend(x86_64::detect());
    kernels
}

/// The frozen end of every product: three separate roundings, in this order.
#[inline(always)]
fn epilogue(sum: i32, s: f32, scale: f32) -> f32 {
    sum as f32 / s * scale
}

/// Asks for the cache line at `address`, which need not be valid, to come into the second-level cache.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) fn prefetch_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching has no effect a program can observe, whatever the address; SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// [`prefetch_line`] of all of `values`.
#[inline(always)]
pub(crate) fn prefetch_all<T>(values: &[T]) {
    for line in values.chunks(64 / size_of::<T>()) {
        prefetch_line(line.as_ptr().cast());
    }
}

/// What every kernel's pointer arithmetic relies on, checked once per product.
fn check_gemv<K: TernaryKernel>(kernel: &K, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &[f32]) {
    assert!(kernel.layouts().contains(&w.layout()), "{} cannot read {}", kernel.name(), w.layout().name());
    assert_eq!((x.num_tokens(), x.cols(), out.len()), (1, w.cols(), w.rows()), "shapes of a matrix-vector product");
}

/// As [`check_gemv`].
fn check_gemm<K: TernaryKernel>(kernel: &K, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &ColumnsMut<'_>) {
    assert!(kernel.layouts().contains(&w.layout()), "{} cannot read {}", kernel.name(), w.layout().name());
    assert_eq!(
        (x.num_tokens(), x.cols(), out.num_columns()),
        (out.num_rows(), w.cols(), w.rows()),
        "shapes of a matrix product"
    );
}

/// As [`check_gemv`].
fn check_screen(w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &ScreensMut<'_>) {
    let num_tiles = w.rows().div_ceil(ROW_TILE);
    for (out, columns) in [(&out.estimates, w.rows()), (&out.maxima, num_tiles), (&out.radii, num_tiles)] {
        assert_eq!(
            (x.num_tokens(), x.cols(), columns),
            (out.num_rows(), w.cols(), out.num_columns()),
            "shapes of a screen"
        );
    }
}

/// As [`check_gemv`].
fn check_channels(w: &ChannelRows, x: &QuantizedActivations<'_>) {
    assert_eq!((x.num_tokens(), x.cols()), (1, w.cols()), "shapes of a product of some rows");
}

/// As [`check_gemv`].
fn check_active(w: &ChannelColumns, lines: &Range<usize>, x: &QuantizedActivations<'_>, out: &[f32]) {
    assert_eq!(
        (x.num_tokens(), x.cols(), out.len()),
        (1, w.channels(), lines.len() * LINE_WEIGHTS),
        "shapes of a product of some columns"
    );
}
