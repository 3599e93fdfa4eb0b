//! The specification: readable, slow, always there, the oracle of every other kernel.

use std::ops::Range;

use super::{
    Isa, Output, TernaryKernel,
    packing::{PackedLayout, PackedRows, ROW_TILE, TILE_BYTES},
    screen::{ActivationBits, ScreenRows, ScreensMut, SplitActivations},
};
use crate::{quant::activation::QuantizedActivations, threads::ColumnsMut};

/// Tokens for which a row's weights are decoded once.
const TOKENS: usize = 16;

/// The columns of a tile at most.
const MAX_COLUMN_TILE: usize = PackedLayout::T32x5Trit.column_tile();

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
                for first in (0..x.num_tokens()).step_by(TOKENS) {
                    let tokens = first..x.num_tokens().min(first + TOKENS);
                    let sums = row_sums(w.layout(), panel, row, x, tokens.clone());
                    for (token, sum) in tokens.zip(sums) {
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

/// The sum over columns of weight * code, for each of `tokens`.
fn row_sums(
    layout: PackedLayout,
    panel: &[u8],
    row: usize,
    x: &QuantizedActivations<'_>,
    tokens: Range<usize>,
) -> [i32; TOKENS] {
    let mut sums = [0; TOKENS];
    for (tile, bytes) in panel.chunks_exact(TILE_BYTES).enumerate() {
        let weights = tile_weights(layout, &bytes[4 * row..][..4]);
        for (sum, token) in sums.iter_mut().zip(tokens.clone()) {
            // The last tile's columns may be fewer.
            for (&weight, &code) in weights.iter().zip(&x.codes(token)[tile * layout.column_tile()..]) {
                *sum += i32::from(weight) * i32::from(code);
            }
        }
    }
    sums
}

/// The weights -1, 0 and +1 of a row in a tile, whose codes are `bytes`; behind those of the tile zeros.
fn tile_weights(layout: PackedLayout, bytes: &[u8]) -> [i8; MAX_COLUMN_TILE] {
    let mut weights = [0; MAX_COLUMN_TILE];
    for (byte, &codes) in bytes.iter().enumerate() {
        let mut codes = u32::from(codes);
        for plane in 0..layout.planes() {
            let code = match layout {
                PackedLayout::T32x2Bit => {
                    let lowest = codes & 3;
                    codes >>= 2;
                    lowest
                }
                // A fraction of 256ths: times 3, the next code is above the point.
                PackedLayout::T32x5Trit => {
                    codes *= 3;
                    let whole = codes / 256;
                    codes %= 256;
                    whole
                }
            };
            weights[4 * plane + byte] = code as i8 - 1;
        }
    }
    weights
}
