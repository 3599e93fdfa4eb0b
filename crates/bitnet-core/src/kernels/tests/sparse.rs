//! Products of some channels, against the definition.

use super::*;
use crate::kernels::sparse::is_whole_lines;

/// Weights `[outputs, inputs]` of a case by channel, and whether a channel takes part.
fn check(case: &Case, is_active: &dyn Fn(usize) -> bool, label: &str) {
    let mut pool = WorkerPool::new(2);
    let buffer = case.quantize();
    let x = buffer.view(1, case.cols);
    let expected = case.expected(&buffer);
    let decode = |row: usize, out: &mut [i8]| {
        out.copy_from_slice(&case.weights[row * case.cols..][..case.cols]);
        Ok::<(), Infallible>(())
    };
    for kernel in available() {
        let name = kernel.name();
        if is_whole_lines(case.cols) {
            let Ok(rows) = ChannelRows::pack((case.rows, case.cols), SCALE, &mut pool, &decode);
            for first in [0, case.rows / 3] {
                let channels: Vec<u32> =
                    (first..case.rows).filter(|&row| is_active(row)).map(|row| row as u32).collect();
                let mut out = vec![7.0; case.rows - first];
                kernel.gemv_channels(&rows, &channels, first, &x, &mut out);
                for (row, out) in (first..).zip(out) {
                    let wanted = if is_active(row) { expected[row] } else { f32::to_bits(7.0) };
                    assert_eq!(out.to_bits(), wanted, "{name} row {row} {label}");
                }
            }
        }
        if is_whole_lines(case.rows) {
            let Ok(columns) = ChannelColumns::pack((case.rows, case.cols), SCALE, &mut pool, &decode);
            let mut active = ActiveChannels::new(case.cols);
            active.set(&x.codes(0)[..case.cols]);
            let num_lines = case.rows / LINE_WEIGHTS;
            for lines in [0..num_lines, num_lines / 2..num_lines, 0..0] {
                let outputs = lines.start * LINE_WEIGHTS..lines.end * LINE_WEIGHTS;
                let mut out = vec![f32::NAN; outputs.len()];
                kernel.gemv_active(&columns, &active, lines, &x, &mut out);
                assert_eq!(bits(&out), expected[outputs], "{name} {label}");
            }
        }
    }
}

#[test]
fn some_rows_give_the_bits_of_all() {
    for cols in [256, 512, 768, 2560] {
        for rows in [1, 3, 4, 5, 33, 100] {
            let case = Case::random(rows, cols, 1);
            check(&case, &|row| !(row * 7).is_multiple_of(3), &format!("two thirds of {rows} x {cols}"));
            check(&case, &|_| true, &format!("all of {rows} x {cols}"));
            check(&case, &|_| false, &format!("none of {rows} x {cols}"));
        }
    }
}

#[test]
fn some_columns_give_the_bits_of_all() {
    for rows in [256, 512, 1280] {
        for cols in [1, 3, 4, 5, 127, 128, 129, 700] {
            let mut case = Case::random(rows, cols, 1);
            check(&case, &|_| true, &format!("{rows} x {cols}"));
            case.x.iter_mut().filter(|x| **x < 5.0).for_each(|x| *x = 0.0);
            check(&case, &|_| true, &format!("{rows} x {cols}, a quarter not zero"));
            case.x.fill(0.0);
            check(&case, &|_| true, &format!("{rows} x {cols}, all zero"));
        }
    }
}

#[test]
fn extremes_of_some_channels_do_not_overflow() {
    for weight in [-1, 0, 1] {
        for x in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
            for (rows, cols) in [(256, 65_536), (256, 6912), (5, 65_536)] {
                let x = x.iter().cycle().take(cols).copied().collect();
                let case = Case { rows, cols, weights: vec![weight; rows * cols], x };
                check(&case, &|_| true, &format!("{rows} x {cols} of {weight}"));
            }
        }
    }
}

#[test]
fn a_list_of_channels_ends_with_codes_of_zero() {
    let mut active = ActiveChannels::new(6);
    active.set(&[1, 2, 3, 4, 5, 6]);
    active.set(&[0, 7, 0, 0, -8, 0]);
    assert_eq!(active.quads(), (&[[1, 4, 0, 0]][..], &[[7, -8, 0, 0]][..]));
}
