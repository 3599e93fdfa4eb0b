//! The feed-forward block of a single row, through the channels that matter: `relu(gate)^2` is zero for about half of them or
//! more, and many a product that is not becomes a code of zero. Rows of `up` and columns of `down` that meet a zero
//! need not be read. Their dense copies serve every larger step, so this costs memory, and is off unless asked for.
//!
//! Skipping changes no bit: what is skipped is exactly zero. See [`is_tame`] for why `0 * up` is.

use std::time::Instant;

use super::{
    bit_linear::{Residual, project, project_and_add},
    phases::Phases,
    weights::Layer,
};
use crate::{
    checkpoint::{Activation, LayerTensors, LoadError, ModelConfig, TernaryTensor},
    kernels::{
        TernaryKernel,
        packing::ROW_TILE,
        sparse::{ActiveChannels, ChannelColumns, ChannelRows, LINE_WEIGHTS, is_whole_lines},
    },
    quant::activation::{ActivationBuffer, QuantizedActivations},
    threads::{SharedColumns, SharedRows, WorkerPool},
};

/// Whether a single row's feed-forward block may skip channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SparseFfn {
    /// No copies are made.
    #[default]
    Off,
    /// Where so few channels are active that it is faster, by a measurement at load.
    Auto,
    /// Always, for measurements and tests.
    On,
}

impl SparseFfn {
    /// `off`, `auto` and `on`, as `--sparse-ffn` has them.
    pub const NAMES: [(&'static str, Self); 3] = [("off", Self::Off), ("auto", Self::Auto), ("on", Self::On)];
}

/// Copies of two matrices of a layer by channel.
pub(super) struct SparseLayer {
    up: ChannelRows,
    down: ChannelColumns,
}

/// The most active channels for which skipping the others is the faster way.
#[derive(Clone, Copy, Debug)]
pub(super) struct SparseLimits {
    up: usize,
    down: usize,
}

impl SparseLimits {
    /// Never.
    pub(super) const NONE: Self = Self { up: 0, down: 0 };
}

/// Lists of active channels, allocated once.
#[derive(Debug)]
pub(super) struct SparseScratch {
    /// `[intermediate_size]`, padded to tiles: each worker its own channels from the start of its share.
    rows: Vec<u32>,
    columns: ActiveChannels,
}

impl SparseScratch {
    /// For `channels`, 0 where nothing is skipped.
    pub(super) fn new(channels: usize) -> Self {
        Self { rows: vec![0; channels.next_multiple_of(ROW_TILE)], columns: ActiveChannels::new(channels) }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.rows.as_slice()) + self.columns.bytes()
    }
}

impl SparseLayer {
    /// The copies of a layer, `None` where they would not be exact or do not fill cache lines.
    pub(super) fn pack(
        config: &ModelConfig,
        layer: &LayerTensors,
        pool: &mut WorkerPool,
    ) -> Result<Option<Self>, LoadError> {
        let is_exact = config.activation == Activation::Relu2 && is_tame(&layer.ffn_norm, layer.up.reader()?.scale());
        if !is_exact || !is_whole_lines(config.hidden_size) {
            return Ok(None);
        }
        let TernaryTensor { rows, cols, .. } = layer.up;
        let reader = layer.up.reader()?;
        let up = ChannelRows::pack((rows, cols), reader.scale(), pool, &|row, out| reader.decode_row(row, out))?;
        let TernaryTensor { rows, cols, .. } = layer.down;
        let reader = layer.down.reader()?;
        let down = ChannelColumns::pack((rows, cols), reader.scale(), pool, &|row, out| reader.decode_row(row, out))?;
        Ok(Some(Self { up, down }))
    }

    pub(super) fn bytes(&self) -> usize {
        self.up.bytes() + self.down.bytes()
    }
}

/// Whether every product of `up` is finite, so that `0 * up` is 0: no value of the normed input exceeds
/// `sqrt(width) * weight`, and no sum of a row exceeds `width` of these. Inputs that are not finite make every channel NaN,
/// `gate` included, and NaN counts as active.
fn is_tame(norm: &[f32], scale: f32) -> bool {
    is_bounded(norm, scale, 1e30)
}

/// Whether no output of a linear layer behind `norm` exceeds `bound`, for inputs that are finite.
pub(super) fn is_bounded(norm: &[f32], scale: f32, bound: f32) -> bool {
    let width = norm.len() as f32;
    norm.iter().all(|weight| (weight.abs().max(1.0) * width.sqrt() * width * scale.abs()) < bound)
}

/// `gate(x)` and `up(x)`, of `up` only the channels whose gate is not zero where that is faster: the others are 0.
pub(super) fn gate_and_up(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    layer: &Layer,
    limits: SparseLimits,
    (gate, up): (&mut [f32], &mut [f32]),
    scratch: &mut SparseScratch,
) {
    let Some(sparse) = layer.sparse.as_ref().filter(|_| phases.num_rows == 1) else {
        project(phases, x, [(&layer.gate, gate), (&layer.up, up)]);
        return;
    };
    project(phases, x, [(&layer.gate, &mut *gate)]);
    up_of_active(phases, x, (layer, sparse), limits, (gate, up), scratch);
}

/// `up(x)` of a single row, where `gate` is known.
fn up_of_active(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    (layer, sparse): (&Layer, &SparseLayer),
    limits: SparseLimits,
    (gate, up): (&[f32], &mut [f32]),
    scratch: &mut SparseScratch,
) {
    if gate.iter().filter(|&&gate| is_active(gate)).count() > limits.up {
        project(phases, x, [(&layer.up, up)]);
        return;
    }
    let (kernel, channels) = (phases.kernel, gate.len());
    let (up, rows) = (SharedColumns::new(up, channels, ROW_TILE), SharedRows::new(&mut scratch.rows, ROW_TILE));
    phases.pool.run(&|worker| {
        let share = worker.share(channels, ROW_TILE);
        let mut up = up.claim(share.clone());
        let rows = rows.claim(share.start.div_ceil(ROW_TILE)..share.end.div_ceil(ROW_TILE));
        let up = up.row_mut(0);
        up.fill(0.0);
        let mut len = 0;
        // Without a branch: every channel is written and the next overwrites those that are not active.
        for (channel, &gate) in share.clone().zip(&gate[share.clone()]) {
            rows[len] = channel as u32;
            len += usize::from(is_active(gate));
        }
        kernel.gemv_channels(&sparse.up, &rows[..len], share.start, &x, up);
    });
}

/// `residual += down(x)`, by the columns whose code is not zero where that is faster.
pub(super) fn down_and_add(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    layer: &Layer,
    limits: SparseLimits,
    residual: Residual<'_>,
    scratch: &mut SparseScratch,
) {
    let sparse = layer.sparse.as_ref().filter(|_| phases.num_rows == 1);
    let is_few = |sparse: &&SparseLayer| {
        x.codes(0)[..sparse.down.channels()].iter().filter(|&&code| code != 0).count() <= limits.down
    };
    let Some(sparse) = sparse.filter(is_few) else {
        project_and_add(phases, x, &layer.down, residual);
        return;
    };
    scratch.columns.set(&x.codes(0)[..sparse.down.channels()]);
    let (kernel, active) = (phases.kernel, &scratch.columns);
    let width = residual.x.len();
    let projected = SharedColumns::new(residual.term, width, LINE_WEIGHTS);
    let residual = SharedColumns::new(residual.x, width, LINE_WEIGHTS);
    phases.pool.run(&|worker| {
        let share = worker.share(width, LINE_WEIGHTS);
        let (mut projected, mut residual) = (projected.claim(share.clone()), residual.claim(share.clone()));
        let (projected, residual) = (projected.row_mut(0), residual.row_mut(0));
        let lines = share.start / LINE_WEIGHTS..share.end / LINE_WEIGHTS;
        kernel.gemv_active(&sparse.down, active, lines, &x, projected);
        for (sum, term) in residual.iter_mut().zip(projected) {
            *sum += *term;
        }
    });
}

#[inline(always)]
fn is_active(gate: f32) -> bool {
    gate > 0.0 || gate.is_nan()
}

/// Passes over all layers, of which the fastest counts.
const ROUNDS: u32 = 3;
/// What listing the channels costs beside the products, and a measurement's error: skipping has to gain so much.
const MARGIN: f64 = 0.9;

/// Times both ways through `layers`, with half of the channels active, and returns where they break even.
pub(super) fn measure(
    mode: SparseFfn,
    layers: &[Layer],
    kernel: &'static dyn TernaryKernel,
    pool: &mut WorkerPool,
) -> SparseLimits {
    let Some(first) = layers.iter().find(|layer| layer.sparse.is_some()) else {
        return SparseLimits::NONE;
    };
    let (hidden_size, channels) = (first.up.cols(), first.up.rows());
    if mode == SparseFfn::On {
        return SparseLimits { up: channels, down: channels };
    }
    let mut half = Half::new(hidden_size, channels);
    let phases = &mut Phases { pool, kernel, num_rows: 1 };
    let everything = SparseLimits { up: channels, down: channels };
    let [dense, sparse] = [SparseLimits::NONE, everything].map(|limits| half.time(phases, layers, limits));
    let break_even = |dense: f64, sparse: f64| ((dense / sparse * MARGIN * 0.5).min(1.0) * channels as f64) as usize;
    let limits = SparseLimits { up: break_even(dense[0], sparse[0]), down: break_even(dense[1], sparse[1]) };
    tracing::debug!(?limits, channels, ?dense, ?sparse, "timed the sparse feed-forward block");
    limits
}

/// A row with half of the gates positive, in no order, and half of the codes not zero.
struct Half {
    gate: Vec<f32>,
    up: Vec<f32>,
    x: ActivationBuffer,
    activated: ActivationBuffer,
    projected: Vec<f32>,
    residual: Vec<f32>,
    scratch: SparseScratch,
}

impl Half {
    fn new(hidden_size: usize, channels: usize) -> Self {
        let values: Vec<_> =
            (0..channels as u32).map(|i| f32::from(i.wrapping_mul(2_654_435_761) >> 31 == 0)).collect();
        let (mut x, mut activated) = (ActivationBuffer::new(1, hidden_size), ActivationBuffer::new(1, channels));
        x.quantize_row(0, &vec![1.0; hidden_size]);
        activated.quantize_row(0, &values);
        let (projected, residual) = (vec![0.0; hidden_size], vec![0.0; hidden_size]);
        let scratch = SparseScratch::new(channels);
        Self { up: vec![0.0; channels], gate: values, x, activated, projected, residual, scratch }
    }

    /// Seconds of `up` and of `down` of all layers.
    fn time(&mut self, phases: &mut Phases<'_>, layers: &[Layer], limits: SparseLimits) -> [f64; 2] {
        let (x, activated) = (self.x.view(1, self.projected.len()), self.activated.view(1, self.gate.len()));
        let mut best = [f64::INFINITY; 2];
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for (layer, sparse) in layers.iter().filter_map(|layer| Some((layer, layer.sparse.as_ref()?))) {
                up_of_active(phases, x, (layer, sparse), limits, (&self.gate, &mut self.up), &mut self.scratch);
            }
            let middle = Instant::now();
            for layer in layers {
                let residual = Residual { x: &mut self.residual, term: &mut self.projected, is_traced: false };
                down_and_add(phases, activated, layer, limits, residual, &mut self.scratch);
            }
            let seconds = [(middle - start).as_secs_f64(), middle.elapsed().as_secs_f64()];
            best = [best[0].min(seconds[0]), best[1].min(seconds[1])];
        }
        best
    }
}
