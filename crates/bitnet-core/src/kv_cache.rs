//! Paged K/V storage: [`BlockId`] -> the keys and values of [`BLOCK_TOKENS`] positions in every layer.
//!
//! Mechanism only. Reference counts, hashes, LRU and the choice of blocks are policy and live in the server's engine.
//!
//! Layout: `[block][layer][kv head]{ keys [head_dim][16 tokens], values [16 tokens][head_dim] }`, both tiles padded to a
//! head width of a multiple of 16. Keys lie dimension by dimension so that attention scores 16 positions side by side,
//! each by a plain sequential sum; values lie token by token so that a visible prefix is contiguous.

use memmap2::{MmapMut, MmapOptions};

use crate::{checkpoint::ModelConfig, ids::BlockId, kernels::math, model::Model};

/// Positions in one block.
pub const BLOCK_TOKENS: usize = 16;

/// Element type of stored K and V. Values are rounded to it when written and always read back from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// IEEE single: for comparison with transformers.
    F32,
    /// IEEE half: the default.
    #[default]
    F16,
}

/// Storage of `num_blocks` blocks. Pages are zero and untouched until written.
#[derive(Debug)]
pub struct KvCache {
    storage: MmapMut,
    geometry: Geometry,
    num_blocks: usize,
}

impl KvCache {
    /// Room for `num_blocks` blocks of `model`'s geometry.
    ///
    /// # Errors
    /// When the operating system refuses the address space.
    pub fn new(model: &Model, num_blocks: usize, dtype: KvDtype) -> std::io::Result<Self> {
        Self::with_geometry(Geometry::new(model.config(), dtype), num_blocks)
    }

    /// Bytes of one block in a cache for `model`.
    pub fn block_bytes(model: &Model, dtype: KvDtype) -> usize {
        Geometry::new(model.config(), dtype).block_bytes()
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Bytes of one block of this cache.
    pub fn bytes_per_block(&self) -> usize {
        self.geometry.block_bytes()
    }

    /// Copies the whole of block `from` to `to` (copy on fork).
    ///
    /// # Panics
    /// When a block is outside the cache.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        assert!(from.index() < self.num_blocks && to.index() < self.num_blocks, "block outside the cache");
        let bytes = self.geometry.block_bytes();
        let start = from.index() * bytes;
        self.storage.copy_within(start..start + bytes, to.index() * bytes);
    }

    pub(crate) fn with_geometry(geometry: Geometry, num_blocks: usize) -> std::io::Result<Self> {
        let bytes = geometry.block_bytes().checked_mul(num_blocks).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let storage = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?;
        Ok(Self { storage, geometry, num_blocks })
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Keys of `block`, decoded by [`KvTile::decode`] to `[head_dim][16]`.
    #[inline]
    pub(crate) fn keys(&self, block: BlockId, layer: usize, head: usize) -> KvTile<'_> {
        self.tile(self.geometry.tile_offset(block, layer, head))
    }

    /// Values of `block`, decoded by [`KvTile::decode`] to `[16][padded head_dim]`.
    #[inline]
    pub(crate) fn values(&self, block: BlockId, layer: usize, head: usize) -> KvTile<'_> {
        self.tile(self.geometry.tile_offset(block, layer, head) + self.geometry.tile_bytes())
    }

    fn tile(&self, offset: usize) -> KvTile<'_> {
        KvTile { bytes: &self.storage[offset..offset + self.geometry.tile_bytes()], dtype: self.geometry.dtype }
    }

    /// Rounds and stores one position's `k` and `v` (`[num_kv_heads, head_dim]`) of one layer.
    #[inline(always)]
    pub(crate) fn write(&mut self, block: BlockId, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let Geometry { head_dim, dtype, .. } = self.geometry;
        let (slot, tile_bytes) = (position % BLOCK_TOKENS, self.geometry.tile_bytes());
        for (head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let offset = self.geometry.tile_offset(block, layer, head);
            let (keys, values) = self.storage[offset..offset + 2 * tile_bytes].split_at_mut(tile_bytes);
            let values = &mut values[slot * tile_bytes / BLOCK_TOKENS..];
            match dtype {
                KvDtype::F32 => store(keys, values, slot, k, v, f32_bytes),
                KvDtype::F16 => store(keys, values, slot, k, v, f16_bytes),
            }
        }
    }
}

/// Scatters `k` over column `slot` of a key tile and `v` over the start of `values`.
#[inline(always)]
fn store<const N: usize>(
    keys: &mut [u8],
    values: &mut [u8],
    slot: usize,
    k: &[f32],
    v: &[f32],
    encode: impl Fn(f32) -> [u8; N],
) {
    for (row, &k) in keys.as_chunks_mut::<N>().0.chunks_exact_mut(BLOCK_TOKENS).zip(k) {
        row[slot] = encode(k);
    }
    for (cell, &v) in values.as_chunks_mut::<N>().0.iter_mut().zip(v) {
        *cell = encode(v);
    }
}

/// The stored keys or values of one block, layer and head.
#[derive(Clone, Copy)]
pub(crate) struct KvTile<'a> {
    bytes: &'a [u8],
    dtype: KvDtype,
}

impl KvTile<'_> {
    /// Decodes the first `out.len()` elements.
    #[inline(always)]
    pub(crate) fn decode(&self, out: &mut [f32]) {
        match self.dtype {
            KvDtype::F32 => {
                for (out, &bytes) in out.iter_mut().zip(self.bytes.as_chunks().0) {
                    *out = f32::from_ne_bytes(bytes);
                }
            }
            KvDtype::F16 => {
                for (out, &bytes) in out.iter_mut().zip(self.bytes.as_chunks().0) {
                    *out = math::f16_to_f32(u16::from_ne_bytes(bytes));
                }
            }
        }
    }
}

#[inline(always)]
fn f32_bytes(x: f32) -> [u8; 4] {
    x.to_ne_bytes()
}

#[inline(always)]
fn f16_bytes(x: f32) -> [u8; 2] {
    f32_to_f16(x).to_ne_bytes()
}

/// Half-precision bits of `x`, rounded to nearest even, without a branch.
#[inline(always)]
fn f32_to_f16(x: f32) -> u16 {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const TOO_LARGE: u32 = (127 + 16) << 23;
    const REBIAS: u32 = (127 - 15) << 23;
    const INFINITY: u32 = 255 << 23;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    // Half of the last place kept, less one where that place is even: a carry out of the 13 bits dropped rounds up.
    let normal = (magnitude.wrapping_sub(REBIAS).wrapping_add(0xfff).wrapping_add(magnitude >> 13 & 1)) >> 13;
    // The last place of 0.5 is the smallest half, so the addition itself rounds to a multiple of it.
    let denormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let special = if magnitude > INFINITY { 0x7e00 } else { 0x7c00 };
    let finite = if magnitude < SMALLEST_NORMAL { denormal } else { normal };
    let half = if magnitude < TOO_LARGE { finite } else { special };
    (half | (x.to_bits() >> 16 & 0x8000)) as u16
}

/// Shape of the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) num_layers: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    dtype: KvDtype,
}

impl Geometry {
    pub(crate) fn new(config: &ModelConfig, dtype: KvDtype) -> Self {
        let ModelConfig { num_layers, num_kv_heads, head_dim, .. } = *config;
        Self { num_layers, num_kv_heads, head_dim, dtype }
    }

    /// Whether a cache of this geometry fits a model of `config`.
    pub(crate) fn fits(&self, config: &ModelConfig) -> bool {
        *self == Self::new(config, self.dtype)
    }

    /// Width of a head in storage.
    pub(crate) fn padded_head_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    fn tile_bytes(&self) -> usize {
        let element = match self.dtype {
            KvDtype::F32 => size_of::<f32>(),
            KvDtype::F16 => size_of::<u16>(),
        };
        BLOCK_TOKENS * self.padded_head_dim() * element
    }

    fn block_bytes(&self) -> usize {
        2 * self.tile_bytes() * self.num_layers * self.num_kv_heads
    }

    fn tile_offset(&self, block: BlockId, layer: usize, head: usize) -> usize {
        ((block.index() * self.num_layers + layer) * self.num_kv_heads + head) * 2 * self.tile_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_DIM: usize = 6;

    fn cache(dtype: KvDtype) -> KvCache {
        let geometry = Geometry { num_layers: 2, num_kv_heads: 2, head_dim: HEAD_DIM, dtype };
        KvCache::with_geometry(geometry, 3).expect("small")
    }

    fn decoded(tile: KvTile<'_>) -> Vec<f32> {
        let mut out = vec![0.0; BLOCK_TOKENS * HEAD_DIM.next_multiple_of(16)];
        tile.decode(&mut out);
        out
    }

    #[test]
    fn a_position_is_read_back_where_it_was_written_and_nowhere_else() {
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let mut cache = cache(dtype);
            let k: Vec<f32> = (0..2 * HEAD_DIM).map(|i| 1.0 + i as f32).collect();
            let v: Vec<f32> = k.iter().map(|x| -x).collect();
            cache.write(BlockId(1), 1, 16 + 5, &k, &v);
            for (block, layer, head) in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 1)] {
                let written = (block, layer) == (1, 1);
                let (keys, values) =
                    (cache.keys(BlockId(block), layer, head), cache.values(BlockId(block), layer, head));
                for (i, key) in decoded(keys).into_iter().enumerate() {
                    let is_cell = written && i % 16 == 5 && i / 16 < HEAD_DIM;
                    assert_eq!(key, if is_cell { k[head * HEAD_DIM + i / 16] } else { 0.0 });
                }
                for (i, value) in decoded(values).into_iter().enumerate() {
                    let is_cell = written && i / 16 == 5 && i % 16 < HEAD_DIM;
                    assert_eq!(value, if is_cell { v[head * HEAD_DIM + i % 16] } else { 0.0 });
                }
            }
        }
    }

    #[test]
    fn half_precision_rounds_on_write_and_keeps_what_is_not_finite() {
        let mut cache = cache(KvDtype::F16);
        let k = [1.0 + f32::EPSILON, 0.1, 65_520.0, -1e-9, f32::NAN, f32::NEG_INFINITY];
        cache.write(BlockId(0), 0, 0, &k, &k);
        let read = &decoded(cache.values(BlockId(0), 0, 0))[..HEAD_DIM];
        assert_eq!(read[..4], [1.0, 0.099_975_586, f32::INFINITY, -0.0]);
        assert!(read[4].is_nan() && read[5] == f32::NEG_INFINITY);
    }

    #[test]
    fn half_precision_is_rounded_as_the_reference_does() {
        let halves = (0..=u16::MAX).map(half::f16::from_bits).filter(|half| half.is_finite());
        for exact in halves.map(f32::from) {
            let next = exact.to_bits() + 0x1000; // halfway to the next half, where this one is normal
            for bits in [exact.to_bits(), next, next - 1, next + 1, next ^ 0x8000_0000] {
                let x = f32::from_bits(bits);
                assert_eq!(f32_to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
            }
        }
        for x in [65_519.99, 65_520.0, 1e30, f32::MIN_POSITIVE, 2.98e-8, 2.99e-8, 5.97e-8, 6.1e-5, f32::INFINITY] {
            assert_eq!(f32_to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
        }
    }

    #[test]
    fn a_copied_block_is_equal_and_independent() {
        let mut cache = cache(KvDtype::F16);
        let (ones, twos) = ([1.0; 2 * HEAD_DIM], [2.0; 2 * HEAD_DIM]);
        cache.write(BlockId(0), 1, 3, &ones, &ones);
        cache.copy_block(BlockId(0), BlockId(2));
        cache.write(BlockId(0), 1, 3, &twos, &twos);
        assert_eq!(decoded(cache.keys(BlockId(2), 1, 1))[3], 1.0);
        assert_eq!(decoded(cache.keys(BlockId(0), 1, 1))[3], 2.0);
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        let geometry = Geometry { num_layers: 2, num_kv_heads: 2, head_dim: HEAD_DIM, dtype: KvDtype::F16 };
        assert!(KvCache::with_geometry(geometry, usize::MAX / 2).is_err());
    }
}
