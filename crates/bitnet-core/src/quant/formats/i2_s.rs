//! I2_S (bitnet.cpp): four 2-bit codes a byte, then a tail whose first `f32` is the scale of the tensor.
//!
//! Three physical layouts exist and no file tells which it has. In A and B the tensor is one flat run of blocks that
//! need not end where rows end; in C four rows share their bytes.

use super::{InvalidCode, code_three, decode_plane};

/// Bytes after the codes; only the first four, the scale, mean anything.
pub const TAIL_BYTES: usize = 32;

/// Values of one block of layout A.
pub const BLOCK_A: usize = 128;

/// Values of one block of layout B.
pub const BLOCK_B: usize = 64;

/// Rows that share their bytes in layout C.
pub const ROWS_C: usize = 4;

/// Layout A: decodes the `out.len()` values from `first` on. Value j of a block of 128 is in byte `j % 32`, at bit
/// `6 - 2 * (j / 32)`.
///
/// # Errors
/// [`InvalidCode`] when a block touched holds code 3.
///
/// # Panics
/// When `codes` ends before the last block touched.
pub fn decode_a(codes: &[u8], first: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    decode_blocks::<32>(codes, first, out)
}

/// Layout B: the same in blocks of 64 values and 16 bytes.
///
/// # Errors
/// [`InvalidCode`] when a block touched holds code 3.
///
/// # Panics
/// When `codes` ends before the last block touched.
pub fn decode_b(codes: &[u8], first: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    decode_blocks::<16>(codes, first, out)
}

/// Layout C: decodes row `row` of `out.len()` columns. Byte `[row / 4][column]` holds four rows, the first one highest.
///
/// # Errors
/// [`InvalidCode`] when the row holds code 3.
///
/// # Panics
/// When `codes` ends before the row does.
pub fn decode_c(codes: &[u8], row: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    let bytes = &codes[row / ROWS_C * out.len()..][..out.len()];
    decode_plane(bytes, 6 - 2 * (row % ROWS_C) as u32, out)
}

/// Walks the blocks of `BYTES` bytes that hold values `first..first + out.len()`. Only a block that begins or ends
/// inside another row goes through a buffer.
fn decode_blocks<const BYTES: usize>(codes: &[u8], first: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    let block_len = 4 * BYTES;
    let (blocks, _) = codes.as_chunks::<BYTES>();
    let mut position = first;
    let mut rest = out;
    let mut invalid = 0;
    while !rest.is_empty() {
        let block = &blocks[position / block_len];
        let offset = position % block_len;
        let count = rest.len().min(block_len - offset);
        let (now, later) = rest.split_at_mut(count);
        if count == block_len {
            invalid |= decode_block(block, now);
        } else {
            let mut whole = [0; BLOCK_A];
            invalid |= decode_block(block, &mut whole[..block_len]);
            now.copy_from_slice(&whole[offset..offset + count]);
        }
        position += count;
        rest = later;
    }
    if invalid == 0 { Ok(()) } else { Err(InvalidCode) }
}

/// Decodes one whole block; what it returns is non-zero when a code is 3.
fn decode_block<const BYTES: usize>(bytes: &[u8; BYTES], out: &mut [i8]) -> u8 {
    let (planes, _) = out.as_chunks_mut::<BYTES>();
    for (plane, shift) in planes.iter_mut().zip([6, 4, 2, 0]) {
        for (value, byte) in plane.iter_mut().zip(bytes) {
            *value = ((byte >> shift) & 3) as i8 - 1;
        }
    }
    bytes.iter().fold(0, |invalid, &byte| invalid | code_three(byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The encoder as the format's definition reads, value by value.
    fn encode(values: &[i8], bytes_per_block: usize) -> Vec<u8> {
        let mut codes = vec![0; values.len() / 4];
        for (i, &value) in values.iter().enumerate() {
            let (block, j) = (i / (4 * bytes_per_block), i % (4 * bytes_per_block));
            codes[block * bytes_per_block + j % bytes_per_block] |=
                ((value + 1) as u8) << (6 - 2 * (j / bytes_per_block));
        }
        codes
    }

    fn encode_c(values: &[i8], cols: usize) -> Vec<u8> {
        let mut codes = vec![0; values.len() / 4];
        for (i, &value) in values.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            codes[row / 4 * cols + col] |= ((value + 1) as u8) << (6 - 2 * (row % 4));
        }
        codes
    }

    proptest! {
        // Rows of 24, 32, ... 384 values: most of them end inside a block.
        #[test]
        fn rows_come_back_in_every_layout(eighths in 3usize..48, seed in prop::collection::vec(-1i8..=1, 997)) {
            let (rows, cols) = (16, 8 * eighths);
            let values: Vec<i8> = (0..rows * cols).map(|i| seed[i % seed.len()]).collect();
            let (a, b, c) = (encode(&values, 32), encode(&values, 16), encode_c(&values, cols));
            let mut out = vec![0; cols];
            for (row, expected) in values.chunks(cols).enumerate() {
                decode_a(&a, row * cols, &mut out).unwrap();
                prop_assert_eq!(&out[..], expected);
                decode_b(&b, row * cols, &mut out).unwrap();
                prop_assert_eq!(&out[..], expected);
                decode_c(&c, row, &mut out).unwrap();
                prop_assert_eq!(&out[..], expected);
            }
        }
    }

    #[test]
    fn code_three_is_refused_wherever_it_stands() {
        let mut out = vec![0; 128];
        for position in 0..128 {
            let mut codes = vec![0x55; 32];
            codes[position % 32] |= 3 << (6 - 2 * (position / 32));
            assert_eq!(decode_a(&codes, 0, &mut out), Err(InvalidCode));
            assert_eq!(decode_b(&codes, 0, &mut out), Err(InvalidCode));
        }
        assert_eq!(decode_c(&[0x55, 0xd5], 0, &mut [0; 2]), Err(InvalidCode));
        assert_eq!(decode_c(&[0x55, 0xd5], 1, &mut [0; 2]), Ok(()));
    }
}
