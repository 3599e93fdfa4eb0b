//! Checkpoints of well-known geometries with random weights, made in memory: what a model costs can be measured before its
//! file is there, for random weights cost what real ones cost. Nothing it says means anything.
#![expect(clippy::arithmetic_side_effects, reason = "sizes come from the table below")]

use super::{
    Activation, Checkpoint, DenseEncoding, DenseMatrix, FileSummary, GenerationDefaults, I2sLayout, LayerTensors,
    MappedBytes, ModelConfig, TernaryTensor, WeightTensors,
    tensors::{RowOrder, TernaryEncoding},
};
use crate::quant::formats::i2_s;

/// Names that [`synthetic`] knows.
pub const SYNTHETIC_NAMES: [&str; 4] = ["2b4t", "700m", "3b", "8b"];

/// The geometry called `name` with random weights, `None` when no geometry has that name.
pub fn synthetic(name: &str) -> Option<Checkpoint> {
    let shape = match name {
        "2b4t" => Shape { hidden: 2560, ffn: 6912, layers: 30, heads: (20, 5), head_dim: 128, vocab: 128_256 },
        "700m" => Shape { hidden: 1536, ffn: 4096, layers: 24, heads: (16, 16), head_dim: 96, vocab: 32_002 },
        "3b" => Shape { hidden: 3200, ffn: 8640, layers: 26, heads: (32, 32), head_dim: 100, vocab: 32_002 },
        "8b" => Shape { hidden: 4096, ffn: 14_336, layers: 32, heads: (32, 8), head_dim: 128, vocab: 128_256 },
        _ => return None,
    };
    // The 8B model is a Llama: no sub-norms, SiLU, a head of its own.
    Some(shape.checkpoint(name, name == "8b"))
}

struct Shape {
    hidden: usize,
    ffn: usize,
    layers: usize,
    /// Of queries, of keys and values.
    heads: (usize, usize),
    head_dim: usize,
    vocab: usize,
}

impl Shape {
    fn checkpoint(&self, name: &str, is_llama: bool) -> Checkpoint {
        let (embedding, layer) = (self.embedding(), self.layer(is_llama));
        let config = ModelConfig {
            architecture: if is_llama { "llama".into() } else { "bitnet-b1.58".into() },
            name: Some(format!("synthetic {name}")),
            hidden_size: self.hidden,
            intermediate_size: self.ffn,
            num_layers: self.layers,
            num_heads: self.heads.0,
            num_kv_heads: self.heads.1,
            head_dim: self.head_dim,
            vocab_size: self.vocab,
            max_context: 4096,
            rope_theta: 500_000.0,
            rope_freq_factors: None,
            rms_norm_eps: 1e-5,
            activation: if is_llama { Activation::Silu } else { Activation::Relu2 },
        };
        let weights = WeightTensors {
            lm_head: is_llama.then(|| embedding.clone()),
            token_embedding: embedding,
            layers: vec![layer; self.layers],
            output_norm: vec![1.0; self.hidden],
        };
        Checkpoint {
            config,
            weights,
            tokenizer: None,
            chat_template: None,
            generation: GenerationDefaults::default(),
            pooling: None,
            summary: FileSummary { format: "synthetic".into(), ..FileSummary::default() },
            notes: Vec::new(),
        }
    }

    /// All layers are this one: each is repacked into memory of its own, so they cost what different ones cost.
    fn layer(&self, is_llama: bool) -> LayerTensors {
        let (q_width, kv_width) = (self.heads.0 * self.head_dim, self.heads.1 * self.head_dim);
        let sub_norm = |width| (!is_llama).then(|| vec![1.0; width]);
        LayerTensors {
            attn_norm: vec![1.0; self.hidden],
            attn_sub_norm: sub_norm(q_width),
            ffn_norm: vec![1.0; self.hidden],
            ffn_sub_norm: sub_norm(self.ffn),
            q: ternary("q", q_width, self.hidden),
            k: ternary("k", kv_width, self.hidden),
            v: ternary("v", kv_width, self.hidden),
            o: ternary("o", self.hidden, q_width),
            gate: ternary("gate", self.ffn, self.hidden),
            up: ternary("up", self.ffn, self.hidden),
            down: ternary("down", self.hidden, self.ffn),
        }
    }

    /// Halves of either sign between 2^-11 and 2^-3, whose largest magnitude is some three times their root mean square.
    fn embedding(&self) -> DenseMatrix {
        let mut random = Random::new(1);
        let mut bytes = Vec::with_capacity(2 * self.vocab * self.hidden);
        for _ in 0..self.vocab * self.hidden / 4 {
            let four = random.next();
            for bits in [0, 16, 32, 48].map(|shift| (four >> shift) as u16) {
                let half = bits & 0x83ff | ((bits >> 10 & 7) + 4) << 10;
                bytes.extend_from_slice(&half.to_le_bytes());
            }
        }
        let data = MappedBytes::from_memory(bytes.into());
        DenseMatrix { rows: self.vocab, cols: self.hidden, encoding: DenseEncoding::F16, data }
    }
}

/// Codes -1, 0 and +1 alike often; the scale keeps the width of what comes in.
fn ternary(name: &str, rows: usize, cols: usize) -> TernaryTensor {
    let mut random = Random::new((rows * cols) as u64);
    let scale = (1.5 / cols as f32).sqrt();
    let mut bytes: Vec<u8> = (0..rows * cols / 4).map(|_| four_trits(random.next())).collect();
    bytes.extend(scale.to_le_bytes());
    bytes.resize(rows * cols / 4 + i2_s::TAIL_BYTES, 0);
    TernaryTensor {
        name: name.to_owned(),
        rows,
        cols,
        encoding: TernaryEncoding::I2S(I2sLayout::A),
        row_order: RowOrder::AsStored,
        multiplier: 1.0,
        data: MappedBytes::from_memory(bytes.into()),
    }
}

fn four_trits(random: u64) -> u8 {
    let trits = random.to_le_bytes();
    (0..4).fold(0, |byte, i| 4 * byte + trits[2 * i] % 3)
}

/// An xorshift generator.
struct Random(u64);

impl Random {
    /// Spread over all bits: from a few set ones it takes long to look random.
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_geometry_can_be_read_and_no_other_name_is_known() {
        let shape = Shape { hidden: 64, ffn: 128, layers: 2, heads: (4, 2), head_dim: 16, vocab: 40 };
        for is_llama in [false, true] {
            let checkpoint = shape.checkpoint("test", is_llama);
            assert_eq!(checkpoint.weights.lm_head.is_some(), is_llama);
            let down = &checkpoint.weights.layers[1].down;
            let (mut row, mut counts) = (vec![0; 128], [0; 3]);
            let reader = down.reader().expect("a good scale");
            for index in 0..down.rows {
                reader.decode_row(index, &mut row).expect("no code three");
                row.iter().for_each(|&trit| counts[(trit + 1) as usize] += 1);
            }
            assert!(counts.iter().all(|&count| count > 64 * 128 / 4), "{counts:?}");
            let mut values = vec![0.0; 64];
            checkpoint.weights.token_embedding.decode_row(39, &mut values);
            assert!(values.iter().all(|value: &f32| (1.0 / 2048.0..1.0 / 8.0).contains(&value.abs())), "{values:?}");
        }
        assert!(synthetic("2b").is_none());
    }
}
