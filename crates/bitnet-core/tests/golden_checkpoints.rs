//! The golden checkpoints in every format they exist in: one result, whatever the file.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use bitnet_core::{
    TokenId,
    checkpoint::{
        self, Activation, Checkpoint, DenseMatrix, LayerTensors, LoadOptions, TernaryTensor, TokenizerSource,
    },
};

const MODELS: [&str; 4] = ["p1_packed", "p2_master", "p3_llama", "p4_silu"];

fn public() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/public")
}

fn open(name: &str) -> Checkpoint {
    checkpoint::open(&public().join(name), &LoadOptions::default()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn linears(layer: &LayerTensors) -> [&TernaryTensor; 7] {
    [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down]
}

/// All codes of a tensor, and its scale.
fn decode(tensor: &TernaryTensor) -> (Vec<i8>, f32) {
    let reader = tensor.reader().unwrap();
    let mut codes = vec![0; tensor.rows * tensor.cols];
    for (row, out) in codes.chunks_exact_mut(tensor.cols).enumerate() {
        reader.decode_row(row, out).unwrap();
    }
    (codes, reader.scale())
}

fn values(matrix: &DenseMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows * matrix.cols];
    for (row, out) in values.chunks_exact_mut(matrix.cols).enumerate() {
        matrix.decode_row(row, out);
    }
    values
}

#[test]
fn every_format_holds_the_same_model() {
    for name in MODELS {
        let reference = open(name);
        for format in ["i2_s", "f16", "tq1_0", "tq2_0"] {
            let file = format!("{name}.{format}.gguf");
            let found = open(&file);
            let (a, b) = (&reference.config, &found.config);
            assert_eq!(
                (a.hidden_size, a.intermediate_size, a.num_layers, a.num_heads, a.num_kv_heads, a.head_dim),
                (b.hidden_size, b.intermediate_size, b.num_layers, b.num_heads, b.num_kv_heads, b.head_dim),
                "{file}"
            );
            assert_eq!(
                (a.vocab_size, a.max_context, a.rope_theta, &a.rope_freq_factors, a.rms_norm_eps, a.activation),
                (b.vocab_size, b.max_context, b.rope_theta, &b.rope_freq_factors, b.rms_norm_eps, b.activation),
                "{file}"
            );
            let (a, b) = (&reference.weights, &found.weights);
            assert_eq!(values(&a.token_embedding), values(&b.token_embedding), "{file}");
            assert_eq!(a.lm_head.as_ref().map(values), b.lm_head.as_ref().map(values), "{file}");
            assert_eq!(a.output_norm, b.output_norm, "{file}");
            // F16, TQ1_0 and TQ2_0 hold the scale as f16; those of p1 and p4 are bf16 values within its range.
            let exact = format == "i2_s" || matches!(name, "p1_packed" | "p4_silu");
            for (a, b) in a.layers.iter().zip(&b.layers) {
                assert_eq!((&a.attn_norm, &a.ffn_norm), (&b.attn_norm, &b.ffn_norm), "{file}");
                assert_eq!((&a.attn_sub_norm, &a.ffn_sub_norm), (&b.attn_sub_norm, &b.ffn_sub_norm), "{file}");
                for (a, b) in linears(a).into_iter().zip(linears(b)) {
                    let ((codes_a, scale_a), (codes_b, scale_b)) = (decode(a), decode(b));
                    assert!(codes_a == codes_b, "{file}: codes of {}", b.name);
                    let tolerance = match (exact, name) {
                        // The mean of masters depends on the order of the sum in its last bit.
                        (true, "p2_master") => scale_a * 1e-6,
                        (true, _) => 0.0,
                        (false, _) => scale_a / 2048.0,
                    };
                    assert!((scale_a - scale_b).abs() <= tolerance, "{file}: scale of {}: {scale_a} {scale_b}", b.name);
                }
            }
        }
    }
}

#[test]
fn masters_quantize_to_their_packed_form() {
    let (packed, masters) = (open("p1_packed"), open("p2_master"));
    for (a, b) in packed.weights.layers.iter().zip(&masters.weights.layers) {
        for (a, b) in linears(a).into_iter().zip(linears(b)) {
            let ((codes_a, scale_a), (codes_b, scale_b)) = (decode(a), decode(b));
            assert!(codes_a == codes_b, "{}", b.name);
            assert!((scale_a / scale_b - 1.0).abs() < 1.0 / 256.0, "bf16 of the same mean");
        }
    }
}

#[test]
fn graphs_are_told_apart() {
    for (name, activation, sub_norms, tied) in [
        ("p1_packed", Activation::Relu2, true, true),
        ("p1_packed.i2_s.gguf", Activation::Relu2, true, true),
        ("p3_llama", Activation::Silu, false, false),
        ("p3_llama.tq1_0.gguf", Activation::Silu, false, false),
        ("p4_silu", Activation::Silu, true, true),
        ("p4_silu.i2_s.gguf", Activation::Silu, true, true),
    ] {
        let checkpoint = open(name);
        let layer = &checkpoint.weights.layers[0];
        assert_eq!(checkpoint.config.activation, activation, "{name}");
        assert_eq!((layer.attn_sub_norm.is_some(), layer.ffn_sub_norm.is_some()), (sub_norms, sub_norms), "{name}");
        assert_eq!(checkpoint.weights.lm_head.is_none(), tied, "{name}");
    }
}

#[test]
fn the_published_defects_are_repaired_and_noted() {
    let hugging_face = open("p1_packed");
    let gguf = open("p1_packed.i2_s.gguf");
    let Some(TokenizerSource::Gguf(vocabulary)) = &gguf.tokenizer else { panic!("a GGUF vocabulary") };
    assert_eq!(vocabulary.pre.as_deref(), Some("llama-bpe"));
    assert_eq!((vocabulary.bos, vocabulary.eos, vocabulary.add_bos), (Some(TokenId(500)), Some(TokenId(501)), true));
    assert_eq!((vocabulary.tokens.len(), vocabulary.token_types.len()), (512, 512));
    assert_eq!(gguf.chat_template, hugging_face.chat_template);
    assert_eq!(gguf.generation.stop_tokens, [TokenId(501), TokenId(509)]);
    assert_eq!(gguf.notes.iter().filter(|note| note.starts_with("repaired")).count(), 3, "{:?}", gguf.notes);

    // A sound file of the same architecture is left alone, but for the stop token.
    let sound = open("p1_packed.f16.gguf");
    assert_eq!(sound.chat_template, hugging_face.chat_template);
    assert_eq!(sound.notes.iter().filter(|note| note.starts_with("repaired")).count(), 1, "{:?}", sound.notes);
}

#[test]
fn directories_state_their_defaults() {
    for name in MODELS {
        let checkpoint = open(name);
        assert_eq!(checkpoint.generation.temperature, Some(0.6));
        assert_eq!(checkpoint.generation.top_p, Some(0.9));
        assert_eq!(checkpoint.generation.top_k, None);
        assert_eq!(checkpoint.generation.stop_tokens, [TokenId(501), TokenId(509)]);
        let Some(TokenizerSource::HuggingFace { json, bos }) = &checkpoint.tokenizer else { panic!("tokenizer.json") };
        assert_eq!(*bos, Some(TokenId(500)));
        assert_eq!(*json, std::fs::read(public().join(name).join("tokenizer.json")).unwrap());
        assert_eq!(checkpoint.summary.format, "safetensors");
        let file = public().join(name).join("model.safetensors");
        assert_eq!(checkpoint.summary.file_bytes, std::fs::metadata(&file).unwrap().len());
        // The weight file itself opens its directory.
        let same = checkpoint::open(&file, &LoadOptions::default()).unwrap();
        assert_eq!(same.config, checkpoint.config);
    }
    let gguf = open("p3_llama.i2_s.gguf");
    let q = gguf.summary.tensors.iter().find(|tensor| tensor.name == "blk.0.attn_q.weight").unwrap();
    assert_eq!((q.encoding.as_str(), &q.shape[..], q.bytes), ("I2_S", &[256, 256][..], 256 * 256 / 4 + 32));
}
