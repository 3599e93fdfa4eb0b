//! Kernel dispatch: the [`TernaryKernel`] trait, what this CPU offers, and the choice. No arithmetic lives here.

/// One implementation of the ternary matrix product. Stub.
pub trait TernaryKernel: Send + Sync + 'static {
    /// `scalar`, `x86_64-avx2`, `x86_64-avxvnni`, `x86_64-avx512vnni`, `aarch64-neon`, ...
    fn name(&self) -> &'static str;
}

/// Every kernel this CPU can run, `scalar` first, the fastest last.
pub fn available() -> &'static [&'static dyn TernaryKernel] {
    unimplemented!()
}

/// The kernel called `name`, or the fastest when `name` is `auto`.
///
/// # Errors
/// When no kernel has that name or this CPU lacks what it needs; never a silent fallback.
pub fn select(name: &str) -> Result<&'static dyn TernaryKernel, KernelError> {
    let _ = name;
    unimplemented!()
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
}
