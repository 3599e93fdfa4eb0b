//! Kernels for x86-64, one instruction set a file.

use super::TernaryKernel;

/// What this CPU can run, slowest first.
pub(super) fn detect() -> impl Iterator<Item = &'static dyn TernaryKernel> {
    std::iter::empty()
}
