//! Who fetches weights ahead of the multiplications that need them.

use super::{Isa, TernaryKernel, packing::PackedLayout};

/// For a single token, which does little else than read, which is faster is a property of the machine, to be measured: on an
/// Emerald Rapids core the hardware alone leaves a third of the bandwidth unused, on a Zen 4 core asking for every line
/// costs a tenth to a half. Products of several tokens multiply for long between two lines, and asking is faster on both (8 tokens on Zen 4:
/// a tenth).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefetch {
    /// The hardware, by itself, where there is one token.
    Hardware,
    /// The kernel, which asks for the next panel while it multiplies one.
    #[default]
    Software,
}

impl Prefetch {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Software, Self::Hardware];

    /// Whether a product of `num_tokens` asks.
    pub(super) const fn asks_ahead(self, num_tokens: usize) -> bool {
        matches!(self, Self::Software) || num_tokens > 1
    }
}

/// How a model's weights lie and are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streaming {
    /// How they lie.
    pub layout: PackedLayout,
    /// Who fetches them.
    pub prefetch: Prefetch,
}

impl Streaming {
    /// What it comes to for so many tokens: others may come to the same.
    pub(super) fn for_tokens(self, num_tokens: usize) -> (PackedLayout, bool) {
        (self.layout, self.prefetch.asks_ahead(num_tokens))
    }

    /// What can be chosen from, the default first: all of `kernel`'s layouts unless it is `layout`.
    pub(super) fn choices(kernel: &dyn TernaryKernel, layout: Option<PackedLayout>) -> Vec<Self> {
        let layouts = layout.map_or_else(|| kernel.layouts().to_vec(), |layout| vec![layout]);
        // The baseline asks for nothing.
        let prefetches = if kernel.isa() == Isa::BASELINE { &[Prefetch::Hardware][..] } else { &Prefetch::ALL };
        let with = |layout| prefetches.iter().map(move |&prefetch| Self { layout, prefetch });
        layouts.into_iter().flat_map(with).collect()
    }
}
