//! TQ1_0 and TQ2_0 (llama.cpp): blocks of 256 ternary values of one row, each with its own `f16` scale.
//!
//! A real 1-bit model has one scale a tensor, so [`common_scale`] collapses the scales of all blocks. A block whose
//! scale is zero holds zeros, whatever its codes.

use super::{InvalidCode, code_three, dense::f16_to_f32};

/// Values of one block.
pub const BLOCK: usize = 256;

/// Bytes of one TQ1_0 block: 48 + 4 bytes of base-3 digits, then the scale.
pub const TQ1_0_BYTES: usize = 54;

/// Bytes of one TQ2_0 block: 64 bytes of 2-bit codes, then the scale.
pub const TQ2_0_BYTES: usize = 66;

/// The one scale of all `blocks`, each `block_bytes` long, blocks of zeros aside; 0 when all are zeros, `None` when they differ.
pub fn common_scale(blocks: &[u8], block_bytes: usize) -> Option<f32> {
    let mut scales = blocks.chunks_exact(block_bytes).map(scale_bits).filter(|&bits| bits & 0x7fff != 0);
    let first = scales.next().unwrap_or(0);
    scales.all(|bits| bits == first).then(|| f16_to_f32(first))
}

/// Decodes a row of TQ1_0 blocks. A byte holds five digits of base 3, the first value the most significant, as
/// `ceil(number * 256 / 243)`: 32 bytes hold values `32 * k + i`, 16 hold `160 + 16 * k + i`, four `240 + 4 * k + i`.
///
/// # Errors
/// [`InvalidCode`] when a byte is none of the 243 that encode five digits.
///
/// # Panics
/// When `out` is not whole blocks or `row` holds fewer.
pub fn decode_tq1_0(row: &[u8], out: &mut [i8]) -> Result<(), InvalidCode> {
    let mut invalid = false;
    decode_blocks::<TQ1_0_BYTES>(row, out, |block, out| {
        let (wide, rest) = block.split_at(32);
        let (narrow, rest) = rest.split_at(16);
        let last = &rest[..4];
        let (wide_out, rest) = out.split_at_mut(160);
        let (narrow_out, last_out) = rest.split_at_mut(80);
        for (bytes, out) in [(wide, wide_out), (narrow, narrow_out), (last, last_out)] {
            for (values, power) in out.chunks_exact_mut(bytes.len()).zip([1u8, 3, 9, 27, 81]) {
                for (value, byte) in values.iter_mut().zip(bytes) {
                    *value = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as i8 - 1;
                }
            }
        }
        invalid |= block[..TQ1_0_BYTES - 2].iter().any(|&byte| !IS_FIVE_DIGITS[usize::from(byte)]);
    });
    if invalid { Err(InvalidCode) } else { Ok(()) }
}

/// Decodes a row of TQ2_0 blocks: value j of each half is in byte `j % 32`, at bit `2 * (j / 32)`.
///
/// # Errors
/// [`InvalidCode`] when a code is 3.
///
/// # Panics
/// When `out` is not whole blocks or `row` holds fewer.
pub fn decode_tq2_0(row: &[u8], out: &mut [i8]) -> Result<(), InvalidCode> {
    let mut invalid = 0;
    decode_blocks::<TQ2_0_BYTES>(row, out, |block, out| {
        for (bytes, out) in block.chunks_exact(32).zip(out.chunks_exact_mut(128)) {
            for (values, shift) in out.chunks_exact_mut(32).zip([0, 2, 4, 6]) {
                for (value, byte) in values.iter_mut().zip(bytes) {
                    *value = ((byte >> shift) & 3) as i8 - 1;
                }
            }
            invalid |= bytes.iter().fold(0, |invalid, &byte| invalid | code_three(byte));
        }
    });
    if invalid == 0 { Ok(()) } else { Err(InvalidCode) }
}

/// Hands each block of `row` with its part of `out` to `decode`; blocks of scale zero become zeros.
fn decode_blocks<const BYTES: usize>(
    row: &[u8],
    out: &mut [i8],
    mut decode: impl FnMut(&[u8; BYTES], &mut [i8; BLOCK]),
) {
    let (blocks, _) = row.as_chunks::<BYTES>();
    let (outs, partial) = out.as_chunks_mut::<BLOCK>();
    assert!(partial.is_empty() && outs.len() <= blocks.len(), "a row of whole blocks");
    for (block, out) in blocks.iter().zip(outs) {
        if scale_bits(block) & 0x7fff == 0 {
            out.fill(0);
        } else {
            decode(block, out);
        }
    }
}

/// The `f16` at the end of a block.
fn scale_bits(block: &[u8]) -> u16 {
    let (_, scale) = block.split_at(block.len() - 2);
    u16::from_le_bytes([scale[0], scale[1]])
}

/// Whether a byte is `ceil(number * 256 / 243)` of some number below 243.
static IS_FIVE_DIGITS: [bool; 256] = {
    let mut valid = [false; 256];
    let mut number = 0usize;
    while number < 243 {
        valid[usize::div_ceil(number * 256, 243)] = true;
        number += 1;
    }
    valid
};

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;

    fn encode_tq1_0(values: &[i8], scale: f16) -> Vec<u8> {
        let byte = |start: usize, stride: usize, digits: usize, i: usize| {
            let number = (0..5).fold(0, |number, k| {
                let digit = if k < digits { (values[start + stride * k + i] + 1) as usize } else { 0 };
                number * 3 + digit
            });
            (number * 256).div_ceil(243) as u8
        };
        let wide = (0..32).map(|i| byte(0, 32, 5, i));
        let narrow = (0..16).map(|i| byte(160, 16, 5, i));
        let last = (0..4).map(|i| byte(240, 4, 4, i));
        wide.chain(narrow).chain(last).chain(scale.to_le_bytes()).collect()
    }

    fn encode_tq2_0(values: &[i8], scale: f16) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        for (i, &value) in values.iter().enumerate() {
            bytes[i / 128 * 32 + i % 32] |= ((value + 1) as u8) << (2 * (i % 128 / 32));
        }
        bytes.into_iter().chain(scale.to_le_bytes()).collect()
    }

    proptest! {
        #[test]
        fn blocks_come_back(values in prop::collection::vec(-1i8..=1, 2 * BLOCK), scale in 0.001f32..1000.0) {
            let scale = f16::from_f32(scale);
            let mut out = vec![0; 2 * BLOCK];
            let tq1: Vec<u8> = values.chunks(BLOCK).flat_map(|v| encode_tq1_0(v, scale)).collect();
            decode_tq1_0(&tq1, &mut out).unwrap();
            prop_assert_eq!(&out, &values);
            prop_assert_eq!(common_scale(&tq1, TQ1_0_BYTES), Some(scale.to_f32()));
            let tq2: Vec<u8> = values.chunks(BLOCK).flat_map(|v| encode_tq2_0(v, scale)).collect();
            decode_tq2_0(&tq2, &mut out).unwrap();
            prop_assert_eq!(&out, &values);
            prop_assert_eq!(common_scale(&tq2, TQ2_0_BYTES), Some(scale.to_f32()));
        }
    }

    #[test]
    fn a_block_of_scale_zero_is_zeros_and_has_no_say_in_the_scale() {
        let ones = [1; BLOCK];
        let blocks = [encode_tq2_0(&ones, f16::ZERO), encode_tq2_0(&ones, f16::ONE)].concat();
        assert_eq!(common_scale(&blocks, TQ2_0_BYTES), Some(1.0));
        let mut out = vec![7; 2 * BLOCK];
        decode_tq2_0(&blocks, &mut out).unwrap();
        assert_eq!(out, [[0; BLOCK], [1; BLOCK]].concat());
        assert_eq!(common_scale(&blocks[..TQ2_0_BYTES], TQ2_0_BYTES), Some(0.0));
        let unequal = [blocks, encode_tq2_0(&ones, f16::from_f32(2.0))].concat();
        assert_eq!(common_scale(&unequal, TQ2_0_BYTES), None);
    }

    #[test]
    fn codes_that_are_no_trits_are_refused() {
        let mut out = [0; BLOCK];
        let mut tq1 = encode_tq1_0(&[1; BLOCK], f16::ONE);
        let unused = (0..=255u8).find(|&byte| !IS_FIVE_DIGITS[usize::from(byte)]).expect("13 bytes are unused");
        tq1[40] = unused;
        assert_eq!(decode_tq1_0(&tq1, &mut out), Err(InvalidCode));
        let mut tq2 = encode_tq2_0(&[1; BLOCK], f16::ONE);
        tq2[63] |= 0xc0;
        assert_eq!(decode_tq2_0(&tq2, &mut out), Err(InvalidCode));
    }
}
