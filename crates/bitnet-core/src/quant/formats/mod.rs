//! The stored formats of weights: pure functions from the bytes of a tensor to the values of one row.
//!
//! `checkpoint` checks that the bytes are as long as the shape says before it calls in here; no file, name or map is
//! known here. Ternary codes come out as `i8` in {-1, 0, +1}, dense values as `f32`. The loops have no branch a value
//! and fixed trip counts a block, so that the compiler vectorises them: a model has 10^9 of these values.

pub mod dense;
pub mod i2_s;
pub mod quarters;
pub mod tq;

/// A stored code that stands for none of -1, 0, +1: a broken file, or one that another program laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a code that is none of -1, 0, +1")]
pub struct InvalidCode;

/// Decodes the 2-bit codes at bit `shift` of each byte (0, 1, 2 mean -1, 0, +1) into `out`.
fn decode_plane(bytes: &[u8], shift: u32, out: &mut [i8]) -> Result<(), InvalidCode> {
    let mut largest = 0;
    for (value, byte) in out.iter_mut().zip(bytes) {
        let code = (byte >> shift) & 3;
        largest = largest.max(code);
        *value = code as i8 - 1;
    }
    if largest == 3 { Err(InvalidCode) } else { Ok(()) }
}

/// Non-zero when one of the four 2-bit codes of `byte` is 3.
fn code_three(byte: u8) -> u8 {
    byte & (byte >> 1) & 0x55
}
