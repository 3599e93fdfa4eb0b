//! The forward pass on one page, in the paper's order: BitNet b1.58, and Llama with ternary linears (no sub-norms).
//!
//! Every line is one phase over all rows of the step; what a phase writes, the next one reads. Where the phases are
//! computed, and how, is in the files they are named after.

use super::{
    Batch, Model, Workspace, attention,
    bit_linear::{Residual, project, project_and_add},
    feed_forward::activate,
    lm_head,
    norm::{RmsNorm, normalize, normalize_in_place},
    phases::Phases,
    rope, sparse,
    workspace::StepBuffers,
};
use crate::kv_cache::KvCache;

/// A point of the forward pass whose values a [`Trace`] sees, for comparing with a reference module by module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TracePoint {
    /// Rows of the embedding.
    Embedding,
    /// Norm before attention.
    AttnNorm,
    /// Query projection, before the rotation.
    Query,
    /// Key projection, before the rotation.
    Key,
    /// Value projection.
    Value,
    /// Norm of the attention's result, where the model has one.
    AttnSubNorm,
    /// What attention adds to the residual stream.
    AttnOutput,
    /// Norm before the feed-forward block.
    FfnNorm,
    /// Gate projection. Here and up to the norm: of the channels that are not dead, in the order they lie in.
    Gate,
    /// Up projection.
    Up,
    /// Norm of the gated product, where the model has one.
    FfnSubNorm,
    /// What the feed-forward block adds to the residual stream.
    FfnOutput,
    /// The residual stream after a layer.
    LayerOutput,
    /// Final norm, of the rows that want logits.
    OutputNorm,
}

/// Called with a point, the layer's index (0 outside layers) and `[num_rows, width]` values.
pub type Trace<'a> = dyn FnMut(TracePoint, usize, &[f32]) + 'a;

impl Model {
    /// Runs the transformer over `batch`: writes K and V of every row into `kv`, leaves the final hidden states of the rows
    /// that want logits in `workspace`. Cannot fail: `Batch` was checked when built.
    ///
    /// # Panics
    /// When `kv` or `workspace` were made for another model.
    pub fn forward(&self, batch: &Batch, kv: &mut KvCache, workspace: &mut Workspace) {
        self.run(batch, kv, workspace, &|| true, None);
    }

    /// [`Model::forward`] as long as `is_wanted`, which is asked before each layer. When it is not, false: then no row has
    /// logits, and what `kv` holds of the batch's positions that were not stored before is nothing to rely on.
    ///
    /// # Panics
    /// When `kv` or `workspace` were made for another model.
    pub fn forward_while(
        &self,
        batch: &Batch,
        kv: &mut KvCache,
        workspace: &mut Workspace,
        is_wanted: &dyn Fn() -> bool,
    ) -> bool {
        self.run(batch, kv, workspace, is_wanted, None)
    }

    /// [`Model::forward`], showing `trace` the values of every module on the way.
    ///
    /// # Panics
    /// When `kv` or `workspace` were made for another model.
    pub fn forward_traced(&self, batch: &Batch, kv: &mut KvCache, workspace: &mut Workspace, trace: &mut Trace<'_>) {
        self.run(batch, kv, workspace, &|| true, Some(trace));
    }

    fn run(
        &self,
        batch: &Batch,
        kv: &mut KvCache,
        workspace: &mut Workspace,
        is_wanted: &dyn Fn() -> bool,
        mut trace: Option<&mut Trace<'_>>,
    ) -> bool {
        let is_traced = trace.is_some();
        let mut trace = |point, layer, values: &[f32]| {
            if let Some(trace) = &mut trace {
                trace(point, layer, values);
            }
        };
        let num_rows = batch.rows().len();
        assert!(workspace.fits(self) && kv.geometry().fits(&self.config), "made for another model");
        assert!(
            num_rows <= workspace.max_batch_tokens() && batch.num_blocks() <= kv.num_blocks(),
            "another batch's sizes"
        );
        (workspace.num_logit_rows, workspace.screened_rows) = (0, 0..0);
        let eps = self.config.rms_norm_eps;
        let norm = |weight| RmsNorm::new(weight, eps);
        let (hidden_size, intermediate_size) = (self.config.hidden_size, self.config.intermediate_size);
        let phases = &mut Phases { pool: &mut workspace.pool, kernel: self.kernel, num_rows };
        let StepBuffers {
            x,
            normed,
            quantized,
            angles,
            q,
            k,
            v,
            attended,
            projected,
            gate,
            up,
            sparse: channels,
            attention: scratch,
            partials,
        } = workspace.buffers.for_step(&self.config, num_rows);

        lm_head::embed(phases, &self.embedding, batch.rows(), x);
        rope::prepare(phases, &self.rope, batch.rows(), angles);
        trace(TracePoint::Embedding, 0, x);

        for (index, layer) in self.layers.iter().enumerate() {
            if !is_wanted() {
                return false;
            }
            // x += o(sub_norm(attention(rope(q(n)), rope(k(n)), v(n)))), n = norm(x)
            normalize(phases, norm(&layer.attn_norm), x, normed, is_traced, quantized);
            let n = phases.inputs(quantized, hidden_size);
            project(phases, n, [(&layer.q, &mut *q), (&layer.k, &mut *k), (&layer.v, &mut *v)]);
            trace(TracePoint::AttnNorm, index, normed);
            trace(TracePoint::Query, index, q);
            trace(TracePoint::Key, index, k);
            trace(TracePoint::Value, index, v);
            rope::apply(phases, angles, q, k);
            attention::store(phases, kv, index, batch.rows(), k, v);
            attention::attend(phases, kv, index, batch, q, attended, scratch, partials);
            normalize_in_place(phases, layer.attn_sub_norm.as_deref().map(norm), attended, quantized);
            let n = phases.inputs(quantized, layer.o.cols());
            project_and_add(phases, n, &layer.o, Residual { x, term: projected, is_traced });
            if layer.attn_sub_norm.is_some() {
                trace(TracePoint::AttnSubNorm, index, attended);
            }
            trace(TracePoint::AttnOutput, index, projected);

            // x += down(sub_norm(activation(gate(n)) * up(n))), n = norm(x)
            normalize(phases, norm(&layer.ffn_norm), x, normed, is_traced, quantized);
            let channels_kept = layer.gate.rows();
            let (gate, up) = (&mut gate[..num_rows * channels_kept], &mut up[..num_rows * channels_kept]);
            let sub_norm = layer.ffn_sub_norm.as_deref().map(|w| RmsNorm { count: intermediate_size, ..norm(w) });
            let n = phases.inputs(quantized, hidden_size);
            sparse::gate_and_up(phases, n, layer, self.sparse_limits, (&mut *gate, &mut *up), channels);
            trace(TracePoint::FfnNorm, index, normed);
            trace(TracePoint::Gate, index, gate);
            trace(TracePoint::Up, index, up);
            activate(phases, self.config.activation, sub_norm, gate, up, quantized);
            let n = phases.inputs(quantized, channels_kept);
            let residual = Residual { x, term: projected, is_traced };
            sparse::down_and_add(phases, n, layer, self.sparse_limits, residual, channels);
            if layer.ffn_sub_norm.is_some() {
                trace(TracePoint::FfnSubNorm, index, gate);
            }
            trace(TracePoint::FfnOutput, index, projected);
            trace(TracePoint::LayerOutput, index, x);
        }

        workspace.num_logit_rows = batch.num_logit_rows();
        lm_head::final_norm(self.kernel.isa(), norm(&self.output_norm), batch.logit_rows(), x, normed);
        trace(TracePoint::OutputNorm, 0, &normed[..batch.num_logit_rows() * hidden_size]);
        true
    }
}
