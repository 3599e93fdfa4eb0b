//! Products of some channels on AVX-512 with VNNI: [`super::avx512_vnni`] owns the kernel, [`crate::kernels::sparse`] the layouts.
//!
//! Addresses depend on data, so the hardware cannot know what comes: every line is asked for by hand, some channels ahead.
//! Exact: a sum of products by codes that are still shifted is at most 192 * 128 * [`MAX_COLS`](super::super::packing::MAX_COLS)
//! / 64 for a row, and 192 * 128 for each of at most 65,536 columns, below 2^31.
#![allow(unsafe_code)]

use std::{
    arch::x86_64::{
        __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_epi32, _mm512_and_si512, _mm512_dpbusd_epi32,
        _mm512_loadu_si512, _mm512_reduce_add_epi32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_setzero_si512,
        _mm512_srai_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi8, _mm512_unpackhi_epi16, _mm512_unpacklo_epi8,
        _mm512_unpacklo_epi16,
    },
    ops::Range,
};

use crate::{
    kernels::{
        epilogue,
        sparse::{ActiveChannels, ChannelColumns, ChannelRows, LINE_BYTES, LINE_WEIGHTS},
    },
    quant::activation::QuantizedActivations,
};

/// Channels ahead of which rows are asked for, and columns. Measured.
const ROWS_AHEAD: usize = 16;
const COLUMNS_AHEAD: usize = 128;

/// Planes are masked in place.
const MASKS: [u8; 4] = [0x03, 0x0c, 0x30, 0xc0];

/// As [`crate::kernels::TernaryKernel::gemv_channels`], whose shapes are checked here.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn gemv_channels(
    w: &ChannelRows,
    channels: &[u32],
    first: usize,
    x: &QuantizedActivations<'_>,
    out: &mut [f32],
) {
    let x_lines = x.codes(0).len() / LINE_WEIGHTS;
    assert!(x_lines >= w.cols() / LINE_WEIGHTS, "codes for every line of a row");
    let mut ahead = channels.iter().skip(ROWS_AHEAD);
    let (fours, rest) = channels.as_chunks::<4>();
    for four in fours {
        let next = std::array::from_fn(|i| *ahead.next().unwrap_or(&four[i]));
        write(w, four, first, &dot_rows(w, four, &next, x.codes(0)), x, out);
    }
    for &channel in rest {
        write(w, &[channel], first, &dot_rows(w, &[channel], &[channel], x.codes(0)), x, out);
    }
}

#[inline(always)]
fn write(w: &ChannelRows, channels: &[u32], first: usize, sums: &[i32], x: &QuantizedActivations<'_>, out: &mut [f32]) {
    for (&channel, sum) in channels.iter().zip(sums) {
        out[channel as usize - first] = epilogue(sum - x.sums()[0], x.scales()[0], w.scale());
    }
}

/// The sums of some rows, whose activations are loaded once, while the rows `next` are asked for.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn dot_rows<const N: usize>(w: &ChannelRows, channels: &[u32; N], next: &[u32; N], x: &[i8]) -> [i32; N] {
    let row_bytes = w.cols() / 4;
    let rows = channels.map(|channel| &w.codes()[channel as usize * row_bytes..][..row_bytes]);
    let next = next.map(|channel| w.codes().as_ptr().wrapping_add(channel as usize * row_bytes));
    let masks = MASKS.map(|mask| _mm512_set1_epi8(mask.cast_signed()));
    let mut sums = [[_mm512_setzero_si512(); 4]; N];
    for (line, x) in x.as_chunks::<LINE_WEIGHTS>().0.iter().take(row_bytes / LINE_BYTES).enumerate() {
        for next in next {
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(line * LINE_BYTES).cast());
        }
        // SAFETY: a row has `row_bytes`, of which `line` counts whole lines.
        let weights = rows.map(|row| unsafe { _mm512_loadu_si512(row.as_ptr().add(line * LINE_BYTES).cast()) });
        for (plane, x) in x.as_chunks::<LINE_BYTES>().0.iter().enumerate() {
            // SAFETY: 64 bytes.
            let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
            for row in 0..N {
                let codes = _mm512_and_si512(weights[row], masks[plane]);
                sums[row][plane] = _mm512_dpbusd_epi32(sums[row][plane], codes, x);
            }
        }
    }
    sums.map(|[p0, p1, p2, p3]| {
        let low = _mm512_add_epi32(p0, _mm512_srai_epi32::<2>(p1));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(p2), _mm512_srai_epi32::<6>(p3));
        _mm512_reduce_add_epi32(_mm512_add_epi32(low, high))
    })
}

/// As [`crate::kernels::TernaryKernel::gemv_active`], whose shapes are checked there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn gemv_active(
    w: &ChannelColumns,
    active: &ActiveChannels,
    lines: Range<usize>,
    x: &QuantizedActivations<'_>,
    out: &mut [f32],
) {
    for (line, out) in lines.zip(out.as_chunks_mut::<LINE_WEIGHTS>().0) {
        let sums = sum_columns(w, active, line);
        let values = sums.map(|sum| epilogue(sum - x.sums()[0], x.scales()[0], w.scale()));
        *out = values;
    }
}

/// The sums of the outputs of a line: the bytes of four columns are interleaved, so that one multiplication adds four
/// products to each of 16 outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn sum_columns(w: &ChannelColumns, active: &ActiveChannels, line: usize) -> [i32; LINE_WEIGHTS] {
    let masks = MASKS.map(|mask| _mm512_set1_epi8(mask.cast_signed()));
    let column_bytes = w.rows() / 4;
    let start = |channel: u32| channel as usize * column_bytes + line * LINE_BYTES;
    let (channels, codes) = active.quads();
    let mut sums = [[_mm512_setzero_si512(); 4]; 4];
    for (index, (channels_of, codes)) in channels.iter().zip(codes).enumerate() {
        for &channel in channels.get(index + COLUMNS_AHEAD / 4).unwrap_or(channels_of) {
            _mm_prefetch::<_MM_HINT_T0>(w.codes().as_ptr().wrapping_add(start(channel)).cast());
        }
        let [a, b, c, d] = channels_of.map(|channel| {
            let line = &w.codes()[start(channel)..][..LINE_BYTES];
            // SAFETY: 64 bytes.
            unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
        });
        let x = _mm512_set1_epi32(i32::from_le_bytes(codes.map(i8::cast_unsigned)));
        for (k, words) in interleave(a, b, c, d).into_iter().enumerate() {
            for plane in 0..4 {
                let codes = _mm512_and_si512(words, masks[plane]);
                sums[plane][k] = _mm512_dpbusd_epi32(sums[plane][k], codes, x);
            }
        }
    }
    let [p0, p1, p2, p3] = sums;
    let planes = [
        p0,
        p1.map(|sum| _mm512_srai_epi32::<2>(sum)),
        p2.map(|sum| _mm512_srai_epi32::<4>(sum)),
        p3.map(|sum| _mm512_srai_epi32::<6>(sum)),
    ];
    let mut out = [0; LINE_WEIGHTS];
    for (out, sums) in out.as_chunks_mut::<16>().0.iter_mut().zip(planes.as_flattened()) {
        // SAFETY: 16 sums of 4 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *sums) };
    }
    out
}

/// Words of the bytes of `a`, `b`, `c` and `d` at one place.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn interleave(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> [__m512i; 4] {
    let low = [_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)];
    let high = [_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)];
    [
        _mm512_unpacklo_epi16(low[0], low[1]),
        _mm512_unpackhi_epi16(low[0], low[1]),
        _mm512_unpacklo_epi16(high[0], high[1]),
        _mm512_unpackhi_epi16(high[0], high[1]),
    ]
}
