//! The specification: readable, slow, always there, the oracle of every other kernel.

use super::{
    Isa, Output, TernaryKernel,
    packing::{PackedLayout, PackedRows, ROW_TILE, TILE_BYTES},
    screen::{ActivationBits, ScreenRows, ScreensMut, SplitActivations},
};
use crate::{quant::activation::QuantizedActivations, threads::ColumnsMut};

/// Plain Rust, one weight at a time.
#[derive(Debug)]
pub(super) struct Scalar;

impl TernaryKernel for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn layouts(&self) -> &'static [PackedLayout] {
        &PackedLayout::ALL
    }

    fn isa(&self) -> Isa {
        Isa::BASELINE
    }

    fn gemv(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
        super::check_gemv(self, w, x, out);
        // A worker may have no rows, but a matrix must.
        if w.rows() > 0 {
            self.gemm(w, x, &mut ColumnsMut::new(out, w.rows()), Output::Replace);
        }
    }

    // out[token][row] = (sum over columns of weight * code as f32) / s[token] * scale
    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
        super::check_gemm(self, w, x, out);
        for (panel_index, panel) in w.panels().enumerate() {
            for row in 0..ROW_TILE.min(w.rows() - panel_index * ROW_TILE) {
                for token in 0..x.num_tokens() {
                    let codes = &x.codes(token)[..w.cols()];
                    let sum: i32 = codes
                        .iter()
                        .enumerate()
                        .map(|(col, &code)| weight(w.layout(), panel, row, col) * i32::from(code))
                        .sum();
                    let product = super::epilogue(sum, x.scales()[token], w.scale());
                    let out = &mut out.row_mut(token)[panel_index * ROW_TILE + row];
                    *out = match output {
                        Output::Replace => product,
                        Output::Add => *out + product,
                    };
                }
            }
        }
    }

    // out[token][row] = bounds of (sum over columns of weight code * activation code)
    fn screen(&self, w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
        super::check_screen(w, x, out);
        for (panel_index, (panel, bounds)) in w.panels().enumerate() {
            for token in 0..x.num_tokens() {
                let sums_of = |code_row| {
                    let codes = &x.codes(code_row)[..w.cols()];
                    std::array::from_fn(|row| {
                        let product = |(col, code): (_, &i8)| {
                            i32::from(dense_weight(panel, row, col)) * i32::from(code.cast_unsigned())
                        };
                        codes.iter().enumerate().map(product).sum()
                    })
                };
                let sums = match x.bits() {
                    ActivationBits::Eight => [x.outlier_sums(token, panel), sums_of(token)],
                    ActivationBits::Fourteen => [sums_of(2 * token), sums_of(2 * token + 1)],
                };
                out.write(token, panel_index, &sums, bounds, x.row(token));
            }
        }
    }

    fn multiply_registers(&self, rounds: u32) -> u64 {
        let mut sums = [0_i32; 16];
        for round in 0..rounds {
            let code = std::hint::black_box(round as i8);
            for (lane, sum) in (0..).zip(&mut sums) {
                *sum = sum.wrapping_add(i32::from(code) * lane);
            }
        }
        std::hint::black_box(sums);
        u64::from(rounds) * sums.len() as u64
    }
}

/// The code at `row` and `col` of a panel of a screen: `[columns / 4, 32 rows, 4]`.
fn dense_weight(panel: &[u8], row: usize, col: usize) -> i8 {
    panel[(col / 4) * TILE_BYTES + 4 * row + col % 4].cast_signed()
}

/// The weight -1, 0 or +1 at `row` and `col` of a panel.
fn weight(layout: PackedLayout, panel: &[u8], row: usize, col: usize) -> i32 {
    let (tile, col) = (col / layout.column_tile(), col % layout.column_tile());
    let (plane, byte) = (col / 4, col % 4);
    let codes = u32::from(panel[tile * TILE_BYTES + 4 * row + byte]);
    let code = match layout {
        PackedLayout::T32x2Bit => codes >> (2 * plane) & 3,
        // The fraction of 256ths that is left after `plane` codes; times 3, the next one is above the point.
        PackedLayout::T32x5Trit => (codes * 3_u32.pow(plane as u32) % 256) * 3 / 256,
    };
    code.cast_signed() - 1
}
