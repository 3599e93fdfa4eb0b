//! The packed `uint8` of Hugging Face checkpoints: byte `[r][c]` of a `[ceil(rows / 4), cols]` tensor holds, at bits
//! 0, 2, 4 and 6, column c of row r of each quarter of the rows.

use super::{InvalidCode, decode_plane};

/// Rows of the packed tensor for `rows` rows of weights.
pub fn packed_rows(rows: usize) -> usize {
    rows.div_ceil(4)
}

/// Decodes row `row` of a matrix of `rows` rows and `out.len()` columns.
///
/// # Errors
/// [`InvalidCode`] when the row holds code 3.
///
/// # Panics
/// When `row >= rows`, or `packed` is shorter than the shape says.
pub fn decode_row(packed: &[u8], rows: usize, row: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    assert!(row < rows, "row {row} of {rows}");
    let quarter = packed_rows(rows);
    let bytes = &packed[row % quarter * out.len()..][..out.len()];
    decode_plane(bytes, 2 * (row / quarter) as u32, out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_come_back(rows in 1usize..20, cols in 1usize..70, seed in prop::collection::vec(-1i8..=1, 211)) {
            let values: Vec<i8> = (0..rows * cols).map(|i| seed[i % seed.len()]).collect();
            let quarter = rows.div_ceil(4);
            let mut packed = vec![0; quarter * cols];
            for (i, &value) in values.iter().enumerate() {
                let (row, col) = (i / cols, i % cols);
                packed[row % quarter * cols + col] |= ((value + 1) as u8) << (2 * (row / quarter));
            }
            let mut out = vec![0; cols];
            for (row, expected) in values.chunks(cols).enumerate() {
                decode_row(&packed, rows, row, &mut out).unwrap();
                prop_assert_eq!(&out[..], expected);
            }
        }
    }

    #[test]
    fn code_three_is_refused_in_its_own_row_only() {
        let packed = [0b00_11_01_10];
        assert_eq!(decode_row(&packed, 4, 2, &mut [0]), Err(InvalidCode));
        let mut out = [9];
        decode_row(&packed, 4, 0, &mut out).unwrap();
        assert_eq!(out, [1]);
    }
}
