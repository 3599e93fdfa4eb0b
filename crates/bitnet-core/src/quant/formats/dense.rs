//! Real numbers: F32, F16, BF16 and the block formats that community files use for embeddings and heads.
//!
//! Every function decodes as many values as `out` has room for, from bytes that hold at least those.

use super::tq;

/// Values of one Q8_0 or Q4_0 block.
pub const SMALL_BLOCK: usize = 32;

/// Bytes of one Q8_0 block: `f16` scale, 32 `i8`.
pub const Q8_0_BYTES: usize = 34;

/// Bytes of one Q4_0 block: `f16` scale, 16 bytes of two 4-bit codes each.
pub const Q4_0_BYTES: usize = 18;

/// Values of one Q6_K block.
pub const Q6_K_BLOCK: usize = tq::BLOCK;

/// Bytes of one Q6_K block: 128 bytes of low and 64 of high bits, 16 `i8` sub-scales, `f16` scale.
pub const Q6_K_BYTES: usize = 210;

/// Little-endian IEEE singles.
pub fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}

/// Little-endian IEEE halves.
pub fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *value = f16_to_f32(u16::from_le_bytes(*bytes));
    }
}

/// Little-endian bfloat16.
pub fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

/// Q8_0 blocks: `scale * code`.
pub fn decode_q8_0(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<Q8_0_BYTES>().0.iter().zip(out.chunks_exact_mut(SMALL_BLOCK)) {
        let scale = half_at(block, 0);
        for (value, &code) in out.iter_mut().zip(&block[2..]) {
            *value = scale * f32::from(code as i8);
        }
    }
}

/// Q4_0 blocks: `scale * (code - 8)`, the first 16 values in the low halves of the bytes.
pub fn decode_q4_0(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<Q4_0_BYTES>().0.iter().zip(out.chunks_exact_mut(SMALL_BLOCK)) {
        let scale = half_at(block, 0);
        let (low, high) = out.split_at_mut(SMALL_BLOCK / 2);
        for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
            *low = scale * f32::from((byte & 15) as i8 - 8);
            *high = scale * f32::from((byte >> 4) as i8 - 8);
        }
    }
}

/// Q6_K blocks: `scale * sub-scale * (code - 32)`, one sub-scale for 16 values. Each half of a block has 64 bytes of
/// low bits (two values a byte) and 32 of high bits (four values a byte).
pub fn decode_q6_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<Q6_K_BYTES>().0.iter().zip(out.chunks_exact_mut(Q6_K_BLOCK)) {
        let (low, rest) = block.split_at(128);
        let (high, rest) = rest.split_at(64);
        let scale = half_at(rest, 16);
        for (half, out) in out.chunks_exact_mut(128).enumerate() {
            let (low, high) = (&low[64 * half..], &high[32 * half..]);
            for (j, value) in out.iter_mut().enumerate() {
                let low_bits = (low[j % 64] >> (4 * (j / 64))) & 15;
                let high_bits = (high[j % 32] >> (2 * (j / 32))) & 3;
                let sub_scale = f32::from(rest[8 * half + j / 16] as i8);
                *value = scale * sub_scale * f32::from((low_bits | high_bits << 4) as i8 - 32);
            }
        }
    }
}

/// An IEEE half, exactly. Shifted into place, the bits are the value times 2^-112, subnormals included; infinities and
/// NaN only lack exponent bits. Unlike a call that asks the CPU for its abilities, this vectorises.
pub fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let sign = u32::from(bits & 0x8000) << 16;
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = 0x7f80_0000 | magnitude << 13;
    f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { special })
}

fn half_at(bytes: &[u8], offset: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[offset], bytes[offset + 1]]))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn every_half_and_bfloat_is_exact() {
        for bits in 0..=u16::MAX {
            let expected = f16::from_bits(bits).to_f32();
            let found = f16_to_f32(bits);
            assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{bits:#x}");
            let mut out = [0.0];
            decode_bf16(&bits.to_le_bytes(), &mut out);
            let expected = bf16::from_bits(bits).to_f32();
            assert!(out[0].to_bits() == expected.to_bits() || (out[0].is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn q8_0_is_scale_times_code() {
        let codes: Vec<i8> = (0..32).map(|i| i * 8 - 128).map(|code: i32| code as i8).collect();
        let block: Vec<u8> =
            f16::from_f32(0.25).to_le_bytes().into_iter().chain(codes.iter().map(|&code| code as u8)).collect();
        let mut out = [0.0; 32];
        decode_q8_0(&block, &mut out);
        assert_eq!(out.to_vec(), codes.iter().map(|&code| 0.25 * f32::from(code)).collect::<Vec<_>>());
    }

    #[test]
    fn q4_0_puts_the_first_half_in_the_low_bits() {
        let codes: Vec<u8> = (0..32).map(|i| (i * 7) % 16).collect();
        let block: Vec<u8> = f16::from_f32(0.5)
            .to_le_bytes()
            .into_iter()
            .chain((0..16).map(|i| codes[i] | codes[16 + i] << 4))
            .collect();
        let mut out = [0.0; 32];
        decode_q4_0(&block, &mut out);
        assert_eq!(out.to_vec(), codes.iter().map(|&code| 0.5 * (f32::from(code) - 8.0)).collect::<Vec<_>>());
    }

    #[test]
    fn q6_k_round_trips_through_a_plain_encoder() {
        let codes: Vec<u8> = (0..256).map(|i| ((i * 37 + i / 64) % 64) as u8).collect();
        let sub_scales: Vec<i8> = (0..16).map(|i| i * 5 - 40).collect();
        let mut block = [0; Q6_K_BYTES];
        for (i, &code) in codes.iter().enumerate() {
            let (half, j) = (i / 128, i % 128);
            block[64 * half + j % 64] |= (code & 15) << (4 * (j / 64));
            block[128 + 32 * half + j % 32] |= (code >> 4) << (2 * (j / 32));
        }
        for (i, &sub_scale) in sub_scales.iter().enumerate() {
            block[192 + i] = sub_scale as u8;
        }
        block[208..].copy_from_slice(&f16::from_f32(0.125).to_le_bytes());
        let mut out = [0.0; 256];
        decode_q6_k(&block, &mut out);
        for (i, (&code, value)) in codes.iter().zip(out).enumerate() {
            assert_eq!(value, 0.125 * f32::from(sub_scales[i / 16]) * (f32::from(code) - 32.0), "value {i}");
        }
    }
}
