//! A [`Checkpoint`]'s weights made ready: every linear layer repacked for one kernel, embedding and head still mapped.

use crate::{
    checkpoint::{Checkpoint, DenseMatrix, LayerTensors, LoadError, ModelConfig, TernaryTensor},
    kernels::{
        self, TernaryKernel,
        arena::Arena,
        packing::{DecodeRow, MAX_COLS, PackedLayout, PackedTernary},
        prefetch::{Prefetch, Streaming},
        screen::ScreenMatrix,
    },
    threads::WorkerPool,
};

use super::{
    channels,
    rope::Rope,
    screen,
    sparse::{self, SparseFfn, SparseLayer, SparseLimits},
};

/// Immutable weights, repacked for one kernel, and the geometry.
pub struct Model {
    pub(super) config: ModelConfig,
    pub(super) kernel: &'static dyn TernaryKernel,
    pub(super) rope: Rope,
    pub(super) embedding: DenseMatrix,
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Vec<f32>,
    /// `None` when the head is the embedding.
    pub(super) head: Option<DenseMatrix>,
    /// The head in 8 bits, where it is large enough to gain by a first look.
    pub(super) screen: Option<ScreenMatrix>,
    pub(super) layout: PackedLayout,
    pub(super) sparse_limits: SparseLimits,
    pub(super) num_dropped_channels: usize,
}

/// How a [`Model`] is laid out in memory. Nothing in here changes a bit of what it computes.
#[derive(Clone, Copy, Debug)]
pub struct ModelOptions {
    /// Arrangement of the ternary weights, one of the kernel's; `None` measures which is the fastest here.
    pub packing: Option<PackedLayout>,
    /// Vocabularies of at least so many tokens get an 8-bit copy of the head for [`Model::screen`].
    pub min_screened_vocab: usize,
    /// Copies of half of the feed-forward block that let a single row skip channels.
    pub sparse_ffn: SparseFfn,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { packing: None, min_screened_vocab: 8192, sparse_ffn: SparseFfn::Off }
    }
}

/// The weights of one layer; shapes as in [`LayerTensors`], without the channels that [`channels::kept`] leaves out.
pub(super) struct Layer {
    pub(super) attn_norm: Vec<f32>,
    pub(super) q: PackedTernary,
    pub(super) k: PackedTernary,
    pub(super) v: PackedTernary,
    pub(super) attn_sub_norm: Option<Vec<f32>>,
    pub(super) o: PackedTernary,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) gate: PackedTernary,
    pub(super) up: PackedTernary,
    pub(super) ffn_sub_norm: Option<Vec<f32>>,
    pub(super) down: PackedTernary,
    pub(super) sparse: Option<SparseLayer>,
}

/// What a step costs at least; the cache's part is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepCost {
    /// Bytes of all linear layers.
    pub body_bytes: usize,
    /// Multiply-accumulates of all linear layers, a token.
    pub body_macs: u64,
    /// Bytes of the head as a greedy step reads it: its 8-bit copy if there is one.
    pub head_bytes: usize,
    /// Multiply-accumulates of the head, a token that wants logits.
    pub head_macs: u64,
}

/// What the model's weights take in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Anonymous memory: repacked ternary weights, norms, tables.
    pub resident: usize,
    /// Bytes of the file mapping that stay in use (embedding and head rows).
    pub mapped: usize,
}

impl Model {
    /// [`Model::load_with`] the default options.
    ///
    /// # Errors
    /// As there.
    pub fn load(
        checkpoint: &Checkpoint,
        kernel: &'static dyn TernaryKernel,
        pool: &mut WorkerPool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, LoadError> {
        Self::load_with(checkpoint, kernel, &ModelOptions::default(), pool, progress)
    }

    /// Repacks every ternary tensor of `checkpoint` for `kernel`, in parallel on `pool`, releasing the file's pages on the
    /// way. `progress(done, total)` is called with weights repacked so far.
    ///
    /// # Errors
    /// When the file holds an invalid code or a weight that is not finite, or a layer is wider than any kernel can sum.
    ///
    /// # Panics
    /// When `options.packing` is none of the kernel's layouts.
    pub fn load_with(
        checkpoint: &Checkpoint,
        kernel: &'static dyn TernaryKernel,
        options: &ModelOptions,
        pool: &mut WorkerPool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, LoadError> {
        let weights = &checkpoint.weights;
        let total = weights.layers.iter().flat_map(linears).map(num_weights).sum();
        let widest = weights.layers.iter().flat_map(linears).map(|tensor| tensor.cols).max().unwrap_or(0);
        if widest > MAX_COLS {
            let problem = format!("has a linear layer of {widest} inputs; the kernels' integer sums hold {MAX_COLS}");
            return Err(LoadError::Config { key: "intermediate_size".into(), problem });
        }
        if let Some(layout) = options.packing {
            assert!(kernel.layouts().contains(&layout), "{} cannot read {}", kernel.name(), layout.name());
        }
        let head = weights.lm_head.as_ref().unwrap_or(&weights.token_embedding);
        let screen = (head.rows >= options.min_screened_vocab).then(|| screen::pack(head, kernel.isa(), pool));
        // Dropping channels makes a matrix no larger.
        let capacity = |layout| weights.layers.iter().map(|layer| packed_bytes(layer, layout)).sum();
        let arena = Arena::new(PackedLayout::ALL.map(capacity).into_iter().fold(0, usize::max));
        let Streaming { layout, prefetch } = kernels::autotune(kernel, pool, &arena, options.packing);
        let config = (options.sparse_ffn != SparseFfn::Off).then_some(&checkpoint.config);
        let mut repacker = Repacker {
            layout,
            prefetch,
            arena,
            sparse: config,
            pool: &mut *pool,
            progress,
            done: 0,
            total,
            num_dropped: 0,
        };
        progress(0, total);
        let layers = weights.layers.iter().map(|layer| repacker.layer(layer)).collect::<Result<Vec<_>, _>>()?;
        let num_dropped_channels = repacker.num_dropped;
        if num_dropped_channels > 0 {
            tracing::info!(num_dropped_channels, "dropped dead channels of the feed-forward blocks");
        }
        let sparse_limits = sparse::measure(options.sparse_ffn, &layers, kernel, pool);
        Ok(Self {
            kernel,
            layout,
            sparse_limits,
            num_dropped_channels,
            rope: Rope::new(&checkpoint.config),
            embedding: weights.token_embedding.clone(),
            layers,
            output_norm: weights.output_norm.clone(),
            head: weights.lm_head.clone(),
            screen: screen.map(|screen| screen.with_prefetch(prefetch)),
            config: checkpoint.config.clone(),
        })
    }

    /// Geometry.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Name of the kernel in use.
    pub fn kernel_name(&self) -> &'static str {
        self.kernel.name()
    }

    /// How the ternary weights are arranged.
    pub fn packing(&self) -> PackedLayout {
        self.layout
    }

    /// Whether a single row's feed-forward block may skip channels in some layer.
    pub fn has_sparse_ffn(&self) -> bool {
        self.layers.iter().any(|layer| layer.sparse.is_some())
    }

    /// Channels of all feed-forward blocks that are zero for every token and were not kept.
    pub fn num_dropped_channels(&self) -> usize {
        self.num_dropped_channels
    }

    /// What one step reads of the weights, whatever its batch, and multiplies for each token.
    pub fn step_cost(&self) -> StepCost {
        let linears = || self.layers.iter().flat_map(Layer::linears);
        let body_macs: usize = linears().map(|linear| linear.rows() * linear.cols()).sum();
        StepCost {
            body_bytes: linears().map(PackedTernary::bytes).sum(),
            body_macs: body_macs as u64,
            head_bytes: self.screen.as_ref().map_or(self.head().data.bytes().len(), ScreenMatrix::bytes),
            head_macs: (self.head().rows * self.head().cols) as u64,
        }
    }

    /// Memory of the weights.
    pub fn weight_bytes(&self) -> WeightBytes {
        let layers: usize = self.layers.iter().map(Layer::bytes).sum();
        let head = self.head.as_ref().map_or(0, |head| head.data.bytes().len());
        WeightBytes {
            resident: layers
                + size_of_val(self.output_norm.as_slice())
                + self.rope.bytes()
                + self.screen.as_ref().map_or(0, ScreenMatrix::bytes),
            mapped: self.embedding.data.bytes().len() + head,
        }
    }

    /// The matrix that turns hidden states into logits.
    pub(super) fn head(&self) -> &DenseMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .field("kernel", &self.kernel.name())
            .finish_non_exhaustive()
    }
}

impl Layer {
    pub(super) fn linears(&self) -> [&PackedTernary; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    fn bytes(&self) -> usize {
        let sub_norms = self.attn_sub_norm.iter().chain(&self.ffn_sub_norm);
        let norms = [&self.attn_norm, &self.ffn_norm].into_iter().chain(sub_norms);
        self.linears().map(PackedTernary::bytes).iter().sum::<usize>()
            + norms.map(|norm| size_of_val(norm.as_slice())).sum::<usize>()
            + self.sparse.as_ref().map_or(0, SparseLayer::bytes)
    }
}

/// Repacks tensors one after the other, each by all workers, and counts.
struct Repacker<'a> {
    layout: PackedLayout,
    prefetch: Prefetch,
    arena: Arena,
    /// Where channels are to be skipped.
    sparse: Option<&'a ModelConfig>,
    pool: &'a mut WorkerPool,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    done: u64,
    total: u64,
    /// Dead channels of all layers that were dropped.
    num_dropped: usize,
}

struct FeedForward {
    gate: PackedTernary,
    up: PackedTernary,
    sub_norm: Option<Vec<f32>>,
    down: PackedTernary,
}

impl Repacker<'_> {
    fn layer(&mut self, layer: &LayerTensors) -> Result<Layer, LoadError> {
        self.arena.touch_next(packed_bytes(layer, self.layout), self.pool);
        let sparse = self.sparse.map(|config| SparseLayer::pack(config, layer, self.pool)).transpose()?;
        let FeedForward { gate, up, sub_norm, down } = self.feed_forward(layer)?;
        Ok(Layer {
            sparse: sparse.flatten(),
            attn_norm: layer.attn_norm.clone(),
            q: self.tensor(&layer.q)?,
            k: self.tensor(&layer.k)?,
            v: self.tensor(&layer.v)?,
            attn_sub_norm: layer.attn_sub_norm.clone(),
            o: self.tensor(&layer.o)?,
            ffn_norm: layer.ffn_norm.clone(),
            gate,
            up,
            ffn_sub_norm: sub_norm,
            down,
        })
    }

    /// The feed-forward block without its dead channels, unless they are skipped one by one.
    fn feed_forward(&mut self, layer: &LayerTensors) -> Result<FeedForward, LoadError> {
        let (mut gate, mut up) = (self.tensor(&layer.gate)?, self.tensor(&layer.up)?);
        let mut down = self.tensor(&layer.down)?;
        let mut sub_norm = layer.ffn_sub_norm.clone();
        let kept = if self.sparse.is_none() { channels::kept(layer, &gate, &up) } else { None };
        if let Some(kept) = kept {
            self.num_dropped += layer.gate.rows - kept.len();
            // The last one first, so that the arena gets its bytes back.
            drop(down);
            drop(up);
            drop(gate);
            gate = self.some_rows(&layer.gate, &kept)?;
            up = self.some_rows(&layer.up, &kept)?;
            down = self.some_columns(&layer.down, &kept)?;
            sub_norm = sub_norm.map(|norm| kept.iter().map(|&channel| norm[channel]).collect());
        }
        Ok(FeedForward { gate, up, sub_norm, down })
    }

    fn some_rows(&mut self, tensor: &TernaryTensor, rows: &[usize]) -> Result<PackedTernary, LoadError> {
        let reader = tensor.reader()?;
        let decode_row = |row: usize, codes: &mut [i8]| reader.decode_row(rows[row], codes);
        self.pack((rows.len(), tensor.cols), tensor, reader.scale(), &decode_row)
    }

    fn some_columns(&mut self, tensor: &TernaryTensor, columns: &[usize]) -> Result<PackedTernary, LoadError> {
        let reader = tensor.reader()?;
        let decode_row = |row: usize, codes: &mut [i8]| {
            let mut all = vec![0; tensor.cols];
            reader.decode_row(row, &mut all)?;
            codes.iter_mut().zip(columns).for_each(|(code, &column)| *code = all[column]);
            Ok(())
        };
        self.pack((tensor.rows, columns.len()), tensor, reader.scale(), &decode_row)
    }

    fn tensor(&mut self, tensor: &TernaryTensor) -> Result<PackedTernary, LoadError> {
        let reader = tensor.reader()?;
        let decode_row = |row: usize, codes: &mut [i8]| reader.decode_row(row, codes);
        let packed = self.pack((tensor.rows, tensor.cols), tensor, reader.scale(), &decode_row)?;
        self.done += num_weights(tensor);
        (self.progress)(self.done, self.total);
        Ok(packed)
    }

    fn pack(
        &mut self,
        shape: (usize, usize),
        tensor: &TernaryTensor,
        scale: f32,
        decode_row: &DecodeRow<'_, LoadError>,
    ) -> Result<PackedTernary, LoadError> {
        let packed = PackedTernary::pack_into(&self.arena, shape, scale, self.layout, self.pool, decode_row)?;
        tensor.release();
        Ok(packed.with_prefetch(self.prefetch))
    }
}

fn linears(layer: &LayerTensors) -> [&TernaryTensor; 7] {
    [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down]
}

fn packed_bytes(layer: &LayerTensors, layout: PackedLayout) -> usize {
    linears(layer).map(|tensor| layout.matrix_bytes(tensor.rows, tensor.cols)).iter().sum()
}

fn num_weights(tensor: &TernaryTensor) -> u64 {
    tensor.rows as u64 * tensor.cols as u64
}
