//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned codes {0, 1, 2} by 64 signed activations and adds fours of products
//! to 16 sums of 32 bits. Exact: a sum is at most 128 * 128 * [`MAX_COLS`](super::super::packing::MAX_COLS) / 4 < 2^31, for
//! codes that are shifted up to 128, of every fourth column, and of all columns that are not.
//!
//! Weights of 2 bits here; those of 1.6 bits, for CPUs with VBMI, in [`super::avx512_vbmi`].
#![allow(unsafe_code)]

use std::{
    arch::asm,
    arch::x86_64::{
        __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_epi32, _mm512_and_si512, _mm512_dpbusd_epi32,
        _mm512_loadu_si512, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_epi64, _mm512_setzero_si512,
        _mm512_srai_epi32, _mm512_srli_epi16, _mm512_storeu_si512,
    },
    ops::Range,
};

use super::{
    PanelSums,
    ahead::{Ahead, Lines, RUNS},
    avx512_sparse, avx512_vbmi, by_tokens, equal_blocks, gemm_by_blocks, gemv_by_panels, num_tiles, screen_by_blocks,
};
use crate::{
    kernels::{
        Isa, Output, TernaryKernel, check_active, check_channels, check_gemm, check_gemv, check_screen,
        packing::{PackedLayout, PackedRows, TILE_BYTES},
        screen::{ActivationBits, ScreenRows, ScreensMut, SplitActivations},
        sparse::{ActiveChannels, ChannelColumns, ChannelRows},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// Tokens multiplied at once: 2 x 12 accumulators leave eight registers for weights, masks and activations.
pub(super) const BLOCK: usize = 12;

/// Tokens of a screen from which multiplying halves takes so much longer than memory that more rows may be scored exactly.
const BYTES_FROM: usize = 16;

/// Pairs of steps that pass between asking for activations and multiplying them: some 200 cycles.
const PAIRS_AHEAD: usize = 8;

/// Proof that this CPU has AVX-512 F, BW, DQ, VL and VNNI: only [`Avx512Vnni::detect`] makes one.
#[derive(Debug)]
struct Avx512Vnni {
    isa: Isa,
    /// Holds the layout of 1.6 bits only where the CPU has VBMI too.
    layouts: &'static [PackedLayout],
    gfni: Option<Gfni>,
}

/// Proof that this CPU has GFNI too: only [`Avx512Vnni::detect`] makes one.
#[derive(Clone, Copy, Debug)]
struct Gfni(());

/// The kernel, on a CPU that has its instructions.
pub(super) fn detect() -> Option<&'static dyn TernaryKernel> {
    static KERNEL: std::sync::OnceLock<Option<Avx512Vnni>> = std::sync::OnceLock::new();
    KERNEL.get_or_init(Avx512Vnni::detect).as_ref().map(|kernel| kernel as &dyn TernaryKernel)
}

/// The kernel as it is on a CPU without GFNI.
#[cfg(test)]
pub(in crate::kernels) fn without_gfni() -> Option<&'static dyn TernaryKernel> {
    static KERNEL: std::sync::OnceLock<Option<Avx512Vnni>> = std::sync::OnceLock::new();
    let kernel = KERNEL.get_or_init(|| Some(Avx512Vnni { gfni: None, ..Avx512Vnni::detect()? }));
    kernel.as_ref().map(|kernel| kernel as &dyn TernaryKernel)
}

impl Avx512Vnni {
    fn detect() -> Option<Self> {
        let isa = Isa::avx512()?;
        let layouts: &[PackedLayout] =
            if is_x86_feature_detected!("avx512vbmi") { &PackedLayout::ALL } else { &[PackedLayout::T32x2Bit] };
        let gfni = is_x86_feature_detected!("gfni").then_some(Gfni(()));
        is_x86_feature_detected!("avx512vnni").then_some(Self { isa, layouts, gfni })
    }
}

impl TernaryKernel for Avx512Vnni {
    fn name(&self) -> &'static str {
        "x86_64-avx512vnni"
    }

    fn layouts(&self) -> &'static [PackedLayout] {
        self.layouts
    }

    fn isa(&self) -> Isa {
        self.isa
    }

    fn gemv(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
        check_gemv(self, w, x, out);
        match w.layout() {
            // SAFETY: `self` exists only where `detect` saw every feature that is enabled there.
            PackedLayout::T32x2Bit => unsafe { gemv(w, x, out) },
            // SAFETY: as above, and `check_gemv` found the layout in `layouts`, so `detect` saw VBMI.
            PackedLayout::T32x5Trit => unsafe { avx512_vbmi::gemv(w, x, out) },
        }
    }

    fn screen_bits(&self, num_tokens: usize) -> ActivationBits {
        if num_tokens < BYTES_FROM { ActivationBits::Fourteen } else { ActivationBits::Eight }
    }

    fn screen(&self, w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
        check_screen(w, x, out);
        // SAFETY: as in `gemv`.
        unsafe { screen(w, x, out) }
    }

    fn gemv_channels(
        &self,
        w: &ChannelRows,
        channels: &[u32],
        first: usize,
        x: &QuantizedActivations<'_>,
        out: &mut [f32],
    ) {
        check_channels(w, x);
        // SAFETY: as in `gemv`.
        unsafe { avx512_sparse::gemv_channels(w, channels, first, x, out) }
    }

    fn gemv_active(
        &self,
        w: &ChannelColumns,
        active: &ActiveChannels,
        lines: Range<usize>,
        x: &QuantizedActivations<'_>,
        out: &mut [f32],
    ) {
        check_active(w, &lines, x, out);
        // SAFETY: as in `gemv`.
        unsafe { avx512_sparse::gemv_active(w, active, lines, x, out) }
    }

    fn multiply_registers(&self, rounds: u32) -> u64 {
        // SAFETY: as in `gemv`.
        unsafe { multiply_registers(rounds) }
    }

    fn block_tokens(&self, num_tokens: usize) -> usize {
        block_tokens(num_tokens)
    }

    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
        check_gemm(self, w, x, out);
        match w.layout() {
            PackedLayout::T32x2Bit => match self.gfni {
                // SAFETY: as in `gemv`.
                Some(gfni) => unsafe { gemm(gfni, w, x, out, output) },
                // SAFETY: as in `gemv`.
                None => unsafe { gemm(ShiftAndMask, w, x, out, output) },
            },
            // SAFETY: as in `gemv`.
            PackedLayout::T32x5Trit => unsafe { avx512_vbmi::gemm(w, x, out, output) },
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    // One token's interleaved codes are its codes. Its sums leave them where they lie in their bytes: there is nothing to shift.
    gemv_by_panels(w, x, out, |panel, ahead, codes, sums| panel_gemm::<1, _>(ShiftAndMask, panel, ahead, codes, sums));
}

/// With either layout.
pub(super) fn block_tokens(num_tokens: usize) -> usize {
    equal_blocks(num_tokens, BLOCK)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemm(
    decode: impl Decode,
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    out: &mut ColumnsMut<'_>,
    output: Output,
) {
    let block_tokens = block_tokens(x.num_tokens());
    if x.num_tokens() <= BLOCK {
        gemm_by_blocks(w, x, (out, output), block_tokens, None, |panel, ahead, block, sums| {
            by_tokens!(sums.len(), [1 2 3 4 5 6 7 8 9 10 11 12], panel_gemm::<N, _>(decode, panel, ahead, block, sums));
        });
    } else {
        // The first of two or more blocks of equal size has at least half of 13 tokens.
        let unpack = |panel: &[u8], unpacked: &mut [u8], ahead: Ahead, block: &[i8], sums: &mut [PanelSums]| {
            by_tokens!(
                sums.len(),
                [7 8 9 10 11 12],
                panel_gemm_and_unpack::<N, _>(decode, panel, unpacked, ahead, block, sums)
            );
        };
        gemm_by_blocks(w, x, (out, output), block_tokens, Some(&unpack), |panel, ahead, block, sums| {
            multiply_unpacked(panel, ahead, block, sums);
        });
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn screen(w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
    screen_by_blocks(w, x, out, BLOCK, None, |panel, ahead, block, sums| {
        by_tokens!(sums.len(), [1 2 3 4 5 6 7 8 9 10 11 12], unpacked_gemm::<N, true>(panel, ahead, block, sums));
    });
}

/// ```text
/// for tile of 16 columns, plane of 4 columns, token, half of 16 rows:
///     sums[token][half] += plane of codes[tile][half] * activations[tile][plane][token]
/// ```
/// 1. The planes are written out one by one: in a loop the compiler keeps the sums in memory.
/// 2. Few tokens have several sets of sums. Codes of as many planes are multiplied where they lie in their bytes, times 1, 4, 16
///    and 64, and only the sums are shifted; and one set of them would wait for itself.
/// 3. Where it pays ([`Prefetch`](crate::kernels::prefetch::Prefetch)) the next panel is asked for.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel_gemm<const N: usize, D: Decode>(decode: D, panel: &[u8], ahead: Ahead, block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 4, N);
    let ahead = ahead.in_runs(num_tiles);
    let mut sums = [[[_mm512_setzero_si512(); 2]; N]; 4];
    for tile in 0..num_tiles {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let halves = unsafe { load_tile(panel, ahead, tile) };
        // SAFETY: 16 codes a tile and token, checked by `num_tiles`.
        unsafe {
            let block = block.as_ptr().add(16 * N * tile);
            multiply_plane::<N, 0, D>(decode, halves, block, &mut sums);
            multiply_plane::<N, 1, D>(decode, halves, block, &mut sums);
            multiply_plane::<N, 2, D>(decode, halves, block, &mut sums);
            multiply_plane::<N, 3, D>(decode, halves, block, &mut sums);
        }
    }
    shift_down::<2>(&mut sums[1]);
    shift_down::<4>(&mut sums[2]);
    shift_down::<6>(&mut sums[3]);
    write_sums(&sums, out);
}

/// Sums of codes that lie `BITS` bits too high.
#[target_feature(enable = "avx512f")]
#[inline]
fn shift_down<const BITS: u32>(sums: &mut [[__m512i; 2]]) {
    for sum in sums.as_flattened_mut() {
        *sum = _mm512_srai_epi32::<BITS>(*sum);
    }
}

/// Adds the products of plane `P` of a tile to the sums of its set: in the set of index `i` codes lie `2 i` bits too high.
///
/// # Safety
/// As [`multiply_step`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn multiply_plane<const N: usize, const P: usize, D: Decode>(
    decode: D,
    halves: [__m512i; 2],
    block: *const i8,
    sums: &mut [[[__m512i; 2]; N]; 4],
) {
    let set = P % num_sets(N);
    let codes = match (set, P - set) {
        (0, 0) => decode.plane::<0, 0>(halves),
        (0, 1) => decode.plane::<2, 0>(halves),
        (0, 2) => decode.plane::<4, 0>(halves),
        (0, _) => decode.plane::<6, 0>(halves),
        (1, 0) => decode.plane::<0, 2>(halves),
        (1, _) => decode.plane::<4, 2>(halves),
        (2, _) => decode.plane::<0, 4>(halves),
        _ => decode.plane::<0, 6>(halves),
    };
    // SAFETY: the caller's promise.
    unsafe { multiply_step::<N, P, false>(codes, block, &mut sums[set]) };
}

/// [`panel_gemm`] of a block that is followed by others, for which it leaves the codes as bytes: `[columns / 4, 32 rows, 4]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel_gemm_and_unpack<const N: usize, D: Decode>(
    decode: D,
    panel: &[u8],
    unpacked: &mut [u8],
    ahead: Ahead,
    block: &[i8],
    out: &mut [PanelSums],
) {
    let num_tiles = num_tiles(panel, block, 4, N);
    let ahead = ahead.in_order(num_tiles);
    let tiles = unpacked.as_chunks_mut::<{ 4 * TILE_BYTES }>().0;
    assert_eq!(tiles.len(), num_tiles, "tiles of an unpacked panel");
    let mut sums = [[_mm512_setzero_si512(); 2]; N];
    for (tile, unpacked) in tiles.iter_mut().enumerate() {
        ahead.prefetch::<1>(tile);
        let [first, second, third, fourth] = unpacked.as_chunks_mut().0 else {
            unreachable!("a tile has four planes");
        };
        // SAFETY: the tile's 128 bytes lie inside the panel, and there are 16 codes a tile and token, checked by `num_tiles`.
        unsafe {
            let (halves, block) = (load(panel, tile), block.as_ptr().add(16 * N * tile));
            multiply_and_store::<N, 0>(decode.plane::<0, 0>(halves), block, &mut sums, first);
            multiply_and_store::<N, 1>(decode.plane::<2, 0>(halves), block, &mut sums, second);
            multiply_and_store::<N, 2>(decode.plane::<4, 0>(halves), block, &mut sums, third);
            multiply_and_store::<N, 3>(decode.plane::<6, 0>(halves), block, &mut sums, fourth);
        }
    }
    write_sums(&[sums], out);
}

/// [`multiply_step`], and the codes into `out`.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn multiply_and_store<const N: usize, const P: usize>(
    codes: [__m512i; 2],
    block: *const i8,
    sums: &mut [[__m512i; 2]; N],
    out: &mut [u8; TILE_BYTES],
) {
    store_bytes(codes, out);
    // SAFETY: the caller's promise.
    unsafe { multiply_step::<N, P, false>(codes, block, sums) };
}

/// The way from bytes to a plane of codes. Its methods are always inlined, which the compiler grants only to functions without
/// target features.
trait Decode: Copy {
    /// The codes of two bits each that lie `SHIFT` bits above the bits of index `TO`, moved to those, and nothing else.
    fn plane<const SHIFT: u32, const TO: u32>(self, halves: [__m512i; 2]) -> [__m512i; 2];
}

/// Two instructions, one where there is nothing to shift.
#[derive(Clone, Copy)]
struct ShiftAndMask;

impl Decode for ShiftAndMask {
    #[inline(always)]
    fn plane<const SHIFT: u32, const TO: u32>(self, [first, second]: [__m512i; 2]) -> [__m512i; 2] {
        // SAFETY: used by the functions of this file only, on CPUs with AVX-512.
        unsafe {
            let mask = _mm512_set1_epi8((3_u8 << TO).cast_signed());
            [
                _mm512_and_si512(_mm512_srli_epi16::<SHIFT>(first), mask),
                _mm512_and_si512(_mm512_srli_epi16::<SHIFT>(second), mask),
            ]
        }
    }
}

/// One: bits of a byte times a matrix of bits. It takes the place of a multiplication, as each of the two does.
impl Decode for Gfni {
    #[inline(always)]
    fn plane<const SHIFT: u32, const TO: u32>(self, halves: [__m512i; 2]) -> [__m512i; 2] {
        if SHIFT == 0 {
            return ShiftAndMask.plane::<SHIFT, TO>(halves);
        }
        // The row of bit `i` of the result is byte `7 - i`.
        let row = |bit: u32| 1_u64 << (bit + SHIFT) << (8 * (7 - bit));
        let [first, second] = halves;
        // SAFETY: AVX-512 as above.
        unsafe {
            let matrix = _mm512_set1_epi64((row(TO) | row(TO + 1)).cast_signed());
            [self.multiply_bits(first, matrix), self.multiply_bits(second, matrix)]
        }
    }
}

impl Gfni {
    /// Each byte times a matrix of bits. As an instruction: the intrinsic asks for GFNI in all functions around it.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn multiply_bits(self, bytes: __m512i, matrix: __m512i) -> __m512i {
        let product;
        // SAFETY: `self` is the proof.
        unsafe {
            asm!(
                "vgf2p8affineqb {product}, {bytes}, {matrix}, 0",
                product = lateout(zmm_reg) product, bytes = in(zmm_reg) bytes, matrix = in(zmm_reg) matrix,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        product
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn multiply_unpacked(panel: &[u8], ahead: Ahead, block: &[i8], sums: &mut [PanelSums]) {
    by_tokens!(sums.len(), [1 2 3 4 5 6 7 8 9 10 11 12], unpacked_gemm::<N, false>(panel, ahead, block, sums));
}

/// ```text
/// for step of 4 columns, token: sums[token] += codes[step] * activations[step][token]
/// ```
/// Two steps at a time: where two hardware threads share a core each begins three instructions a cycle, and there are hardly
/// more than the multiplications to begin.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpacked_gemm<const N: usize, const SCREEN: bool>(panel: &[u8], ahead: Ahead, block: &[i8], out: &mut [PanelSums]) {
    let num_steps = num_tiles(panel, block, 1, N);
    let num_pairs = num_steps.div_ceil(2);
    let (in_runs, in_order) = (ahead.in_runs(num_pairs), ahead.in_order(num_pairs));
    let mut sums = [[_mm512_setzero_si512(); 2]; N];
    // SAFETY: 128 bytes, and 4 codes a token, for each of the steps: checked by `num_tiles`.
    unsafe {
        for pair in 0..num_steps / 2 {
            // Weights of a screen are as long in memory as here, packed ones a quarter.
            if SCREEN {
                in_runs.prefetch::<4>(pair);
            } else {
                in_order.prefetch::<1>(pair);
            }
            let block = block.as_ptr().add(8 * N * pair);
            if !SCREEN {
                // Panel and block together exceed the first-level cache. The hardware fetches the panel back, the block not always.
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(PAIRS_AHEAD * 8 * N));
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(PAIRS_AHEAD * 8 * N + 4 * N));
            }
            multiply_step::<N, 0, SCREEN>(load(panel, 2 * pair), block, &mut sums);
            multiply_step::<N, 1, SCREEN>(load(panel, 2 * pair + 1), block, &mut sums);
        }
        if num_steps % 2 == 1 {
            let block = block.as_ptr().add(4 * N * (num_steps - 1));
            multiply_step::<N, 0, SCREEN>(load(panel, num_steps - 1), block, &mut sums);
        }
    }
    write_sums(&[sums], out);
}

/// `sums[token] += weights * activations[STEP][token]`, where `block` are activations `[step, token, 4]`. A `SCREEN` has signed
/// weights and unsigned activations; else it is the other way round.
///
/// # Safety
/// The CPU must have AVX-512 VNNI, and `block` the step.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) unsafe fn multiply_step<const N: usize, const STEP: usize, const SCREEN: bool>(
    weights: [__m512i; 2],
    block: *const i8,
    sums: &mut [[__m512i; 2]; N],
) {
    macro_rules! tokens {
        ($($token:literal)*) => {$(
            if $token < N {
                // SAFETY: the caller's promise.
                unsafe { multiply_token::<N, STEP, $token, SCREEN>(weights, block, &mut sums[$token]) };
            }
        )*};
    }
    tokens!(0 1 2 3 4 5 6 7 8 9 10 11);
}

/// One token of [`multiply_step`]. Every second one gets its codes as an operand of the multiplication, which saves an
/// instruction; if all did, there would be more loads than the processor can begin.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn multiply_token<const N: usize, const STEP: usize, const TOKEN: usize, const SCREEN: bool>(
    weights: [__m512i; 2],
    block: *const i8,
    sums: &mut [__m512i; 2],
) {
    for half in 0..2 {
        let (sum, weights) = (&mut sums[half], weights[half]);
        if TOKEN % 2 == 1 && !SCREEN {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    "vpdpbusd {sum}, {weights}, dword ptr [{block} + {offset}]{{1to16}}",
                    sum = inout(zmm_reg) *sum, weights = in(zmm_reg) weights,
                    block = in(reg) block, offset = const 4 * (N * STEP + TOKEN),
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
        } else {
            // SAFETY: the caller's promise.
            let x = unsafe { block.cast::<i32>().add(N * STEP + TOKEN).read_unaligned() };
            let x = _mm512_set1_epi32(x);
            let (unsigned, signed) = if SCREEN { (x, weights) } else { (weights, x) };
            *sum = _mm512_dpbusd_epi32(*sum, unsigned, signed);
        }
    }
}

/// [`load`], and asks for the weights `ahead`.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) unsafe fn load_tile(panel: &[u8], ahead: Lines<RUNS>, tile: usize) -> [__m512i; 2] {
    ahead.prefetch::<2>(tile);
    // SAFETY: the caller's promise.
    unsafe { load(panel, tile) }
}

/// The two halves, rows 0..16 and 16..32, of a tile, or of a step of an unpacked panel.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) unsafe fn load(panel: &[u8], tile: usize) -> [__m512i; 2] {
    let bytes = panel.as_ptr().wrapping_add(tile * TILE_BYTES);
    // SAFETY: 128 bytes at `bytes`, by the caller's promise.
    unsafe { [_mm512_loadu_si512(bytes.cast()), _mm512_loadu_si512(bytes.add(64).cast())] }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) fn store_bytes(halves: [__m512i; 2], out: &mut [u8; TILE_BYTES]) {
    // SAFETY: 2 x 64 bytes.
    unsafe {
        _mm512_storeu_si512(out.as_mut_ptr().cast(), halves[0]);
        _mm512_storeu_si512(out.as_mut_ptr().add(64).cast(), halves[1]);
    }
}

/// Sets of 2 x `n` sums that stay in registers.
const fn num_sets(n: usize) -> usize {
    match n {
        0..=3 => 4,
        4..=6 => 2,
        _ => 1,
    }
}

/// Sets `out` to the sums of all sets.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
pub(super) fn write_sums<const N: usize, const SETS: usize>(sets: &[[[__m512i; 2]; N]; SETS], out: &mut [PanelSums]) {
    for (token, out) in out.iter_mut().enumerate() {
        for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let mut sum = sets[0][token][half];
            for set in &sets[1..] {
                sum = _mm512_add_epi32(sum, set[token][half]);
            }
            // SAFETY: 16 sums of 4 bytes.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum) };
        }
    }
}

/// 16 independent sums, more than the latency of the multiplication times its rate.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn multiply_registers(rounds: u32) -> u64 {
    const NUM_SUMS: usize = 16;
    let mut sums = [_mm512_setzero_si512(); NUM_SUMS];
    let (weights, x) = (std::hint::black_box(_mm512_set1_epi8(1)), std::hint::black_box(_mm512_set1_epi8(1)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, weights, x);
        }
    }
    std::hint::black_box(sums);
    u64::from(rounds) * (NUM_SUMS * 64) as u64
}
