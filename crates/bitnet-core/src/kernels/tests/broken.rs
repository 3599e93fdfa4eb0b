//! A kernel that computes wrong results, for the tests of the tests at boot.

use crate::{
    kernels::{
        Isa, Output, TernaryKernel,
        packing::{PackedLayout, PackedRows, ROW_TILE},
        screen::{ScreenRows, ScreensMut, SplitActivations},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// A kernel whose results for the last token are off by a little where `is_wrong` says so.
pub(crate) struct Broken {
    pub(crate) kernel: &'static dyn TernaryKernel,
    pub(crate) is_wrong: IsWrong,
}

pub(crate) type IsWrong = fn(Shape) -> bool;

/// What a kernel is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) is_screen: bool,
    pub(crate) cols: usize,
    pub(crate) num_tokens: usize,
}

impl TernaryKernel for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn layouts(&self) -> &'static [PackedLayout] {
        self.kernel.layouts()
    }

    fn isa(&self) -> Isa {
        self.kernel.isa()
    }

    fn gemv(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
        self.kernel.gemv(w, x, out);
        if (self.is_wrong)(Shape { is_screen: false, cols: w.cols(), num_tokens: 1 }) {
            out.iter_mut().for_each(|out| *out = out.next_up());
        }
    }

    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
        self.kernel.gemm(w, x, out, output);
        let num_tokens = x.num_tokens();
        if (self.is_wrong)(Shape { is_screen: false, cols: w.cols(), num_tokens }) {
            out.row_mut(num_tokens - 1).iter_mut().for_each(|out| *out = out.next_up());
        }
    }

    fn screen(&self, w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
        self.kernel.screen(w, x, out);
        let num_tokens = x.num_tokens();
        if (self.is_wrong)(Shape { is_screen: true, cols: w.cols(), num_tokens }) {
            let (estimates, radii) = (out.estimates.row_mut(num_tokens - 1), out.radii.row_mut(num_tokens - 1));
            for (estimates, radius) in estimates.chunks_mut(ROW_TILE).zip(radii) {
                estimates.iter_mut().for_each(|estimate| *estimate += 3.0 * *radius);
            }
        }
    }

    fn multiply_registers(&self, rounds: u32) -> u64 {
        self.kernel.multiply_registers(rounds)
    }
}
