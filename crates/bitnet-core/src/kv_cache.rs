//! Paged K/V storage: [`BlockId`] -> the keys and values of [`BLOCK_TOKENS`] positions in every layer.
//!
//! Mechanism only. Reference counts, hashes, LRU and the choice of blocks are policy and live in the server's engine.
//!
//! Layout: `[block][layer][kv head]{ keys [head_dim][16 tokens], values [head_dim / 16][16 tokens][16] }`, both tiles padded to
//! a head width of a multiple of 16, and of int8 followed by one scale a token. Keys lie dimension by dimension so that
//! attention scores 16 positions side by side, each by a plain sequential sum; values lie 16 dimensions side by side, of which
//! it adds up those of all tokens before it turns to the next.

mod element;
#[cfg(test)]
mod tests;

use element::{Code, Encode, Half, Single};
use memmap2::{MmapMut, MmapOptions};

use crate::{
    checkpoint::ModelConfig,
    ids::BlockId,
    kernels::{self, RUN, Widen},
    model::Model,
    threads::SharedRows,
};

/// Positions in one block.
pub const BLOCK_TOKENS: usize = 16;

/// Bytes of a block from which the cache asks for huge pages: a quarter of one.
#[cfg(target_os = "linux")]
const HUGE_BLOCK: usize = 512 << 10;

/// Element type of stored K and V. Values are rounded to it when written and always read back from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// IEEE single: for comparison with transformers.
    F32,
    /// IEEE half: the default.
    #[default]
    F16,
    /// Bytes and a scale for each position and head, by the rule of activations: half the memory of F16, and other results.
    Int8,
}

impl KvDtype {
    /// Of one element.
    fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<u16>(),
            Self::Int8 => size_of::<i8>(),
        }
    }
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
        // Tiles of one sequence are far apart, and each would miss in the translation tables. Where blocks are small a huge
        // page would hold many that nobody uses.
        #[cfg(target_os = "linux")]
        if geometry.block_bytes() >= HUGE_BLOCK
            && let Err(error) = storage.advise(memmap2::Advice::HugePage)
        {
            tracing::debug!(%error, "no huge pages for the cache");
        }
        Ok(Self { storage, geometry, num_blocks })
    }

    pub(crate) fn dtype(&self) -> KvDtype {
        self.geometry.dtype
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Keys of `block`, decoded by [`KvTile::decode`] to `[head_dim][16]`.
    #[inline(always)]
    pub(crate) fn keys(&self, block: BlockId, layer: usize, head: usize) -> KvTile<'_> {
        self.tile(block, layer, head, TileKind::Keys)
    }

    /// Values of `block`, decoded by [`KvTile::decode`] to `[padded head_dim / 16][16 tokens][16]`.
    #[inline(always)]
    pub(crate) fn values(&self, block: BlockId, layer: usize, head: usize) -> KvTile<'_> {
        self.tile(block, layer, head, TileKind::Values)
    }

    #[inline(always)]
    fn tile(&self, block: BlockId, layer: usize, head: usize, kind: TileKind) -> KvTile<'_> {
        let (geometry, tile_bytes) = (&self.geometry, self.geometry.tile_bytes());
        let tiles_before = geometry.num_tiles_before(layer, head) + usize::from(kind == TileKind::Values);
        let start = block.index() * geometry.block_bytes() + tiles_before * tile_bytes;
        let (codes, scales) = self.storage[start..start + tile_bytes].split_at(geometry.code_bytes());
        let codes = match kind {
            // The last rows may be padding.
            TileKind::Keys => &codes[..codes.len() / geometry.padded_head_dim() * geometry.head_dim],
            TileKind::Values => codes,
        };
        KvTile { codes, scales, dtype: geometry.dtype, kind }
    }

    /// Lets several workers write in one phase, each into blocks of its own.
    pub(crate) fn shared(&mut self) -> SharedBlocks<'_> {
        let geometry = &self.geometry;
        SharedBlocks { blocks: SharedRows::new(&mut self.storage[..], geometry.block_bytes()), geometry }
    }
}

/// All blocks, to be claimed.
pub(crate) struct SharedBlocks<'a> {
    blocks: SharedRows<'a, u8>,
    geometry: &'a Geometry,
}

impl<'a> SharedBlocks<'a> {
    /// Block `block`, exclusively.
    ///
    /// # Panics
    /// When it is outside the cache or was claimed before.
    pub(crate) fn claim(&self, block: BlockId) -> BlockMut<'a> {
        BlockMut { bytes: self.blocks.claim(block.index()..block.index() + 1), geometry: self.geometry }
    }
}

/// Exclusive access to one block.
pub(crate) struct BlockMut<'a> {
    bytes: &'a mut [u8],
    geometry: &'a Geometry,
}

impl BlockMut<'_> {
    /// Rounds and stores one position's `k` and `v` (`[num_kv_heads, head_dim]`) of one layer.
    #[inline(always)]
    pub(crate) fn write(&mut self, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let Geometry { head_dim, dtype, .. } = *self.geometry;
        let (slot, tile_bytes) = (position % BLOCK_TOKENS, self.geometry.tile_bytes());
        for (head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let start = self.geometry.num_tiles_before(layer, head) * tile_bytes;
            let (keys, values) = self.bytes[start..start + 2 * tile_bytes].split_at_mut(tile_bytes);
            match dtype {
                KvDtype::F32 => {
                    store_key(keys, slot, k, Single);
                    store_value(values, slot, v, Single);
                }
                KvDtype::F16 => {
                    store_key(keys, slot, k, Half);
                    store_value(values, slot, v, Half);
                }
                KvDtype::Int8 => {
                    let (key, value) = (Code::of(k), Code::of(v));
                    let (keys, key_scales) = keys.split_at_mut(self.geometry.code_bytes());
                    let (values, value_scales) = values.split_at_mut(self.geometry.code_bytes());
                    store_key(keys, slot, k, key);
                    store_value(values, slot, v, value);
                    key_scales.as_chunks_mut().0[slot] = key.scale().to_ne_bytes();
                    value_scales.as_chunks_mut().0[slot] = value.scale().to_ne_bytes();
                }
            }
        }
    }
}

/// Scatters `k` over column `slot` of a key tile.
#[inline(always)]
fn store_key<const N: usize>(keys: &mut [u8], slot: usize, k: &[f32], encode: impl Encode<N>) {
    let rows = keys.as_chunks_mut::<N>().0.as_chunks_mut::<BLOCK_TOKENS>().0;
    for (rows, k) in rows.chunks_mut(16).zip(k.chunks(16)) {
        // In two steps, for the first can be done side by side.
        let mut codes = [[0; N]; 16];
        for (code, &k) in codes.iter_mut().zip(k) {
            *code = encode.encode(k);
        }
        for (row, code) in rows.iter_mut().zip(codes) {
            row[slot] = code;
        }
    }
}

/// Writes `v` to the runs of token `slot` of a value tile.
#[inline(always)]
fn store_value<const N: usize>(values: &mut [u8], slot: usize, v: &[f32], encode: impl Encode<N>) {
    let runs = values.as_chunks_mut::<N>().0.as_chunks_mut::<RUN>().0.as_chunks_mut::<BLOCK_TOKENS>().0;
    for (runs, v) in runs.iter_mut().zip(v.chunks(RUN)) {
        for (cell, &v) in runs[slot].iter_mut().zip(v) {
            *cell = encode.encode(v);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TileKind {
    Keys,
    Values,
}

/// The stored keys or values of one block, layer and head.
#[derive(Clone, Copy)]
pub(crate) struct KvTile<'a> {
    codes: &'a [u8],
    /// Of int8, one for each token.
    scales: &'a [u8],
    dtype: KvDtype,
    kind: TileKind,
}

impl<'a> KvTile<'a> {
    /// Decodes every 16 elements that lie side by side to place `v` of the next row of `out`.
    #[inline(always)]
    pub(crate) fn decode<const V: usize>(&self, widen: impl Widen, out: &mut [[[f32; RUN]; V]], v: usize) {
        match self.dtype {
            KvDtype::F32 => {
                for (run, out) in self.codes.as_chunks().0.as_chunks::<RUN>().0.iter().zip(out) {
                    for (out, bytes) in out[v].iter_mut().zip(run) {
                        *out = f32::from_ne_bytes(*bytes);
                    }
                }
            }
            KvDtype::F16 => {
                for (run, out) in self.codes.as_chunks().0.as_chunks().0.iter().zip(out) {
                    out[v] = widen.widen(run);
                }
            }
            KvDtype::Int8 => self.decode_int8(out, v),
        }
    }

    #[inline(always)]
    fn decode_int8<const V: usize>(&self, out: &mut [[[f32; RUN]; V]], v: usize) {
        let mut scales = [0.0; BLOCK_TOKENS];
        for (scale, bytes) in scales.iter_mut().zip(self.scales.as_chunks().0) {
            *scale = f32::from_ne_bytes(*bytes);
        }
        for (index, (run, out)) in self.codes.as_chunks::<RUN>().0.iter().zip(out).enumerate() {
            let scales = match self.kind {
                TileKind::Keys => scales,
                TileKind::Values => [scales[index % BLOCK_TOKENS]; RUN],
            };
            for ((out, code), scale) in out[v].iter_mut().zip(run).zip(scales) {
                *out = Code::decode(*code, scale);
            }
        }
    }

    /// Of values those of 16 dimensions, from `16 * index` on.
    #[inline(always)]
    pub(crate) fn dimensions(&self, index: usize) -> Self {
        let len = BLOCK_TOKENS * RUN * self.dtype.bytes();
        Self { codes: &self.codes[index * len..][..len], ..*self }
    }

    /// The runs as they are stored, when they are halves.
    #[inline(always)]
    pub(crate) fn halves(&self) -> Option<&'a [[[u8; 2]; RUN]]> {
        (self.dtype == KvDtype::F16).then_some(self.codes.as_chunks().0.as_chunks().0)
    }

    /// Asks for all of it to come near.
    #[inline(always)]
    pub(crate) fn prefetch(&self) {
        kernels::prefetch_all(self.codes);
    }
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

    fn code_bytes(&self) -> usize {
        BLOCK_TOKENS * self.padded_head_dim() * self.dtype.bytes()
    }

    fn tile_bytes(&self) -> usize {
        let scales = if self.dtype == KvDtype::Int8 { BLOCK_TOKENS * size_of::<f32>() } else { 0 };
        self.code_bytes() + scales
    }

    fn block_bytes(&self) -> usize {
        2 * self.tile_bytes() * self.num_layers * self.num_kv_heads
    }

    /// Tiles of a block before the keys of `layer` and `head`.
    fn num_tiles_before(&self, layer: usize, head: usize) -> usize {
        2 * (layer * self.num_kv_heads + head)
    }
}
