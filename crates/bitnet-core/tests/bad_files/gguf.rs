//! Broken GGUF files: one row a defect, made from a valid tiny file.

use std::path::Path;

use bitnet_core::{
    TokenId,
    checkpoint::{self, Activation, LoadError, LoadOptions, Pooling, TokenizerSource},
};
use proptest::prelude::*;

use crate::{assert_refused, load, writer::*};

fn open(bytes: Vec<u8>) -> Result<checkpoint::Checkpoint, LoadError> {
    checkpoint::open_bytes("test.gguf", bytes.into(), &LoadOptions::default())
}

type Row = (&'static str, &'static str, fn(&mut GgufFile));

const Q: &str = "blk.0.attn_q.weight";
const NEAR_2_63: u64 = i64::MAX as u64;

/// What is done, what the message must say, how.
const CONTAINER: &[Row] = &[
    ("magic", "does not start with the letters GGUF", |f| f.magic = *b"GGML"),
    ("version 1", "version 1", |f| f.version = 1),
    ("version 4", "version 4", |f| f.version = 4),
    ("big endian", "big-endian", |f| f.version = 3u32.swap_bytes()),
    ("2^63 tensors", "tensors, more than", |f| f.num_tensors = Some(1 << 63)),
    ("all tensors", "tensors, more than", |f| f.num_tensors = Some(u64::MAX)),
    ("more tensors than there are", "", |f| f.num_tensors = Some(32_768)),
    ("2^63 keys", "metadata keys, more than", |f| f.num_keys = Some(1 << 63)),
    ("more keys than there are", "", |f| f.num_keys = Some(4_096)),
    ("string of 2^63", "ends inside a metadata value", |f| f.set("x", long_string(NEAR_2_63))),
    ("string of 2^64-1", "ends inside a metadata value", |f| f.set("x", long_string(u64::MAX))),
    ("array of 2^63 bytes", "ends inside a metadata array", |f| f.set("x", array_head(0, NEAR_2_63))),
    ("array of 2^61 u64, wraps to 0", "ends inside a metadata array", |f| f.set("x", array_head(10, 1 << 61))),
    ("array of 2^62 i32, wraps to 0", "ends inside a metadata array", |f| f.set("x", array_head(5, 1 << 62))),
    ("array of 2^63 strings", "ends inside a metadata array", |f| f.set("x", array_head(8, NEAR_2_63))),
    ("array of arrays", "inside an array", |f| f.set("x", array_head(9, 1))),
    ("array of unknown", "value type 77 inside", |f| f.set("x", array_head(77, 1))),
    ("unknown value type", "value type 13", |f| f.set("x", 13u32.to_le_bytes().to_vec())),
    ("boolean of 2", "boolean of value 2", |f| f.set("x", vec![7, 0, 0, 0, 2])),
    ("key not UTF-8", "a metadata key at byte", |f| f.keys.push((vec![0xff, 0xfe], u32_value(1)))),
    ("string not UTF-8", "a metadata value at byte", |f| f.set("x", raw_string(&[0xc3, 0x28]))),
    ("key of 2000 bytes", "bytes of a name", |f| f.set(&"k".repeat(2000), u32_value(1))),
    ("key twice", "`tokenizer.ggml.model` occurs twice", |f| f.keys.push(("tokenizer.ggml.model".into(), string("x")))),
    ("tensor twice", "occurs twice", |f| f.push(Q, &[HIDDEN], 0, ones(HIDDEN))),
    ("alignment 0", "general.alignment", |f| f.set("general.alignment", u32_value(0))),
    ("alignment 3", "general.alignment", |f| f.set("general.alignment", u32_value(3))),
    ("alignment 2^31", "general.alignment", |f| f.set("general.alignment", u32_value(1 << 31))),
    ("alignment 2^63", "general.alignment", |f| f.set("general.alignment", u64_value(1 << 63))),
    ("alignment as string", "general.alignment", |f| f.set("general.alignment", string("32"))),
    ("5 dimensions", "5 dimensions", |f| f.tensor(Q).dimensions = vec![2; 5]),
    ("2^32-1 dimensions", "dimensions, more than 4", |f| f.tensor(Q).num_dimensions = Some(u32::MAX)),
    ("zero dimension", "cannot have the shape", |f| f.tensor(Q).dimensions = vec![128, 0]),
    ("zero times 2^63", "cannot have the shape", |f| f.tensor(Q).dimensions = vec![0, 1 << 63]),
    ("2^32 x 2^32", "cannot have the shape", |f| f.tensor(Q).dimensions = vec![1 << 32, 1 << 32]),
    ("2^63 x 2", "cannot have the shape", |f| f.tensor(Q).dimensions = vec![1 << 63, 2]),
    ("bytes beyond 2^64", "cannot have the shape", |f| f.tensor("output_norm.weight").dimensions = vec![1 << 62]),
    ("2^62 values", "needs", |f| f.tensor(Q).dimensions = vec![1 << 31, 1 << 31]),
    ("unknown tensor type", "unknown type 99", |f| f.tensor(Q).kind = 99),
    ("removed tensor type", "unknown type 37", |f| f.tensor(Q).kind = 37),
    ("block type with odd rows", "cannot have the shape", |f| f.tensor(Q).kind = 14),
    ("offset not aligned", "not a multiple of the alignment", |f| f.tensor(Q).offset = Some(4)),
    ("offset beyond the file", "the file is cut short", |f| f.tensor(Q).offset = Some(1 << 40)),
    ("offset near 2^64", "the file is cut short", |f| f.tensor(Q).offset = Some(u64::MAX - 31)),
    ("offset near 2^63", "the file is cut short", |f| f.tensor(Q).offset = Some((1 << 63) - 32)),
    ("tensors on one offset", "overlap", |f| f.tensor(Q).offset = Some(0)),
    ("tensor inside another", "overlap", |f| f.tensor("output_norm.weight").offset = Some(64)),
];

const MEANING: &[Row] = &[
    ("no architecture", "`general.architecture` is missing", |f| f.unset("general.architecture")),
    ("architecture of another kind", "architecture `mamba`", |f| f.set("general.architecture", string("mamba"))),
    ("architecture as number", "is an integer, not a string", |f| f.set("general.architecture", u32_value(1))),
    ("a split file", "split GGUF", |f| f.set("split.count", u32_value(2))),
    ("no hidden size", "embedding_length` is missing", |f| f.unset("bitnet-b1.58.embedding_length")),
    ("hidden size 0", "hidden size", |f| f.set("bitnet-b1.58.embedding_length", u32_value(0))),
    ("hidden size 2^64-1", "hidden size", |f| f.set("bitnet-b1.58.embedding_length", u64_value(u64::MAX - 1))),
    ("hidden size of another model", "the geometry asks for", |f| {
        f.set("bitnet-b1.58.embedding_length", u32_value(256))
    }),
    ("hidden size as string", "not an integer", |f| f.set("bitnet-b1.58.embedding_length", string("128"))),
    ("layers 0", "number of layers", |f| f.set("bitnet-b1.58.block_count", u32_value(0))),
    ("layers 1025", "number of layers", |f| f.set("bitnet-b1.58.block_count", u32_value(1025))),
    ("layers 2^32-1", "number of layers", |f| f.set("bitnet-b1.58.block_count", u32_value(u32::MAX))),
    ("layers -1", "negative", |f| f.set("bitnet-b1.58.block_count", i32_value(-1))),
    ("more layers than there are", "`blk.1.", |f| f.set("bitnet-b1.58.block_count", u32_value(2))),
    ("more layers than it says", "not part of this architecture", |f| {
        f.push("blk.1.attn_norm.weight", &[1], 0, ones(1))
    }),
    ("heads 0", "number of heads", |f| f.set("bitnet-b1.58.attention.head_count", u32_value(0))),
    ("heads that do not divide", "does not divide", |f| f.set("bitnet-b1.58.attention.head_count", u32_value(3))),
    ("heads as array", "not an integer", |f| f.set("bitnet-b1.58.attention.head_count", array_head(4, 0))),
    ("key/value heads 0", "key/value heads", |f| f.set("bitnet-b1.58.attention.head_count_kv", u32_value(0))),
    ("key/value heads beyond heads", "key/value heads", |f| {
        f.set("bitnet-b1.58.attention.head_count_kv", u32_value(4))
    }),
    ("odd heads", "an odd number", |f| f.set("bitnet-b1.58.attention.key_length", u32_value(63))),
    ("heads that overflow", "head dimension", |f| f.set("bitnet-b1.58.attention.key_length", u64_value(1 << 62))),
    ("rotation of half a head", "rope.dimension_count", |f| f.set("bitnet-b1.58.rope.dimension_count", u32_value(32))),
    ("context 0", "context length", |f| f.set("bitnet-b1.58.context_length", u32_value(0))),
    ("context 2^32-1", "context length", |f| f.set("bitnet-b1.58.context_length", u32_value(u32::MAX))),
    ("epsilon NaN", "RMSNorm epsilon", |f| f.set("bitnet-b1.58.attention.layer_norm_rms_epsilon", f32_value(f32::NAN))),
    ("infinite RoPE base", "RoPE base", |f| f.set("bitnet-b1.58.rope.freq_base", f32_value(f32::INFINITY))),
    ("unknown RoPE scaling", "RoPE scaling `yarn`", |f| f.set("bitnet-b1.58.rope.scaling.type", string("yarn"))),
    ("unknown activation", "activation `gelu`", |f| f.set("bitnet-b1.58.hidden_activation", string("gelu"))),
    ("experts", "expert_count", |f| f.set("bitnet-b1.58.expert_count", u32_value(8))),
    ("attention to what follows", "attention.causal` false", |f| {
        f.set("bitnet-b1.58.attention.causal", bool_value(false))
    }),
    ("pooling by the first token", "pooling_type` 2", |f| f.set("bitnet-b1.58.pooling_type", u32_value(2))),
    ("a ranking model", "pooling_type` 4", |f| f.set("bitnet-b1.58.pooling_type", u32_value(4))),
    ("unknown pooling", "pooling_type` 4294967295", |f| f.set("bitnet-b1.58.pooling_type", u32_value(u32::MAX))),
    ("pooling as text", "pooling_type` is a string", |f| f.set("bitnet-b1.58.pooling_type", string("mean"))),
    ("vocabulary 0", "vocabulary size", |f| f.set("bitnet-b1.58.vocab_size", u32_value(0))),
    ("vocabulary beyond the embedding", "the geometry asks for", |f| f.set("bitnet-b1.58.vocab_size", u32_value(9))),
    ("tokens as bytes", "not an array of strings", |f| f.set("tokenizer.ggml.tokens", array(0, &[[0u8]; 8]))),
    ("tokens as one string", "not an array", |f| f.set("tokenizer.ggml.tokens", string("abc"))),
    ("no token", "has 0 tokens", |f| f.set("tokenizer.ggml.tokens", string_array(&[]))),
    ("more tokens than rows", "has 9 tokens", |f| f.set("tokenizer.ggml.tokens", string_array(&["x"; 9]))),
    ("a million empty tokens", "has 1000000 tokens", |f| {
        f.set("tokenizer.ggml.tokens", string_array(&[""; 1_000_000]))
    }),
    ("token not UTF-8", "holds bad strings", |f| {
        f.set("tokenizer.ggml.tokens", [array_head(8, 8), [1, 0, 0, 0, 0, 0, 0, 0, 0xff].repeat(8)].concat())
    }),
    ("scores as strings", "not an array of 32-bit numbers", |f| {
        f.set("tokenizer.ggml.scores", string_array(&["0"; 8]))
    }),
    ("scores of another vocabulary", "has 7 elements", |f| f.set("tokenizer.ggml.scores", array(6, &[[0; 4]; 7]))),
    ("token types as floats", "32-bit numbers", |f| f.set("tokenizer.ggml.token_type", array(6, &[[0; 4]; 8]))),
    ("merges as numbers", "not an array of strings", |f| f.set("tokenizer.ggml.merges", array(4, &[[0; 4]; 2]))),
    ("a million merges", "far more merges", |f| f.set("tokenizer.ggml.merges", string_array(&[""; 1_000_000]))),
    ("BOS as string", "bos_token_id` is a string", |f| f.set("tokenizer.ggml.bos_token_id", string("<s>"))),
    ("template as number", "not a string", |f| f.set("tokenizer.chat_template", u32_value(1))),
];

const TENSORS: &[Row] = &[
    ("no q", "`blk.0.attn_q.weight` is missing", |f| f.tensor(Q).name = "blk.7.attn_q.weight".into()),
    ("no sub-norm", "attn_sub_norm.weight` is missing", |f| f.tensors.retain(|t| !t.name.contains("attn_sub_norm"))),
    ("no embedding", "`token_embd.weight` is missing", |f| f.tensors.retain(|t| t.name != "token_embd.weight")),
    ("q of another shape", "the geometry asks for [128, 128]", |f| f.tensor(Q).dimensions = vec![128, 64]),
    ("q transposed flat", "the geometry asks for", |f| f.tensor(Q).dimensions = vec![128 * 128]),
    ("norm as a scalar", "the geometry asks for [128]", |f| f.tensor("output_norm.weight").dimensions = vec![]),
    ("norm as I2_S", "norms and scales can be", |f| {
        f.tensor("output_norm.weight").kind = 36;
    }),
    ("embedding as I2_S", "embeddings and heads can be", |f| f.tensor("token_embd.weight").kind = 36),
    ("K-quant linear", "not a 1-bit model", |f| set_q(f, 8, vec![0; 128 * 128 / 32 * 34])),
    ("integer linear", "not a 1-bit model", |f| set_q(f, 24, vec![0; 128 * 128])),
    ("MXFP4 linear", "type MXFP4", |f| set_q(f, 39, vec![0; 128 * 128 / 32 * 17])),
    ("TL1", "use the I2_S file", |f| set_q(f, 38, vec![0; 128 * 128 / 4])),
    ("TL2", "type TL2", |f| set_q(f, 39, vec![0; 128 * 128 / 5])),
    ("bias", "no bias", |f| f.push("blk.0.attn_q.bias", &[HIDDEN], 0, ones(HIDDEN))),
    ("norm inside a linear", "norms inside linear layers", |f| {
        f.push("blk.0.attn_q.rms_norm.weight", &[HIDDEN], 0, ones(HIDDEN))
    }),
    ("an unknown tensor", "not part of this architecture", |f| f.push("blk.0.attn_q_norm.weight", &[1], 0, ones(1))),
    ("scale of a row each", "has the shape [128]", |f| f.push("blk.0.attn_q.scale", &[HIDDEN], 0, ones(HIDDEN))),
    ("scale beside that is NaN", "not finite", |f| {
        f.push("blk.0.attn_q.scale", &[], 0, f32::NAN.to_le_bytes().to_vec())
    }),
    ("I2_S code 3", "none of -1, 0, +1", |f| f.tensor(Q).data[100] = 0b1101_0101),
    ("I2_S scale NaN", "not finite", |f| f.tensor(Q).data[4096..4100].copy_from_slice(&f32::NAN.to_le_bytes())),
    ("I2_S scale infinite", "not finite", |f| {
        f.tensor(Q).data[4096..4100].copy_from_slice(&f32::INFINITY.to_le_bytes())
    }),
    ("float weight NaN", "a weight that is not finite", |f| {
        set_q(f, 0, [f32::NAN.to_le_bytes().to_vec(), ones(128 * 128 - 1)].concat())
    }),
    ("half weight infinite", "a weight that is not finite", |f| set_q(f, 1, [0x00, 0x7c].repeat(128 * 128))),
    ("frequency factors of 0", "RoPE frequency factors", |f| f.push("rope_freqs.weight", &[32], 0, vec![0; 128])),
    ("frequency factors too few", "the geometry asks for [32]", |f| f.push("rope_freqs.weight", &[1], 0, ones(1))),
];

fn set_q(file: &mut GgufFile, kind: u32, data: Vec<u8>) {
    let q = file.tensor(Q);
    (q.kind, q.data) = (kind, data);
}

fn long_string(claimed: u64) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &claimed.to_le_bytes(), b"short"].concat()
}

#[test]
fn the_file_they_are_made_from_is_sound() {
    let checkpoint = open(GgufFile::valid().bytes()).unwrap();
    assert_eq!(checkpoint.config.vocab_size, 8);
    load(|| Ok(checkpoint)).unwrap();
}

#[test]
fn the_seed_of_the_fuzzer_is_sound() {
    let seed = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gguf/tiny.gguf");
    load(|| checkpoint::open(&seed, &LoadOptions::default())).unwrap();
}

#[test]
fn what_the_file_states_is_honoured() {
    let mut file = GgufFile::valid();
    file.set("bitnet-b1.58.rope.scaling.type", string("linear"));
    file.set("bitnet-b1.58.rope.scaling.factor", f32_value(4.0));
    file.set("general.sampling.temp", f32_value(0.5));
    file.set("general.sampling.top_k", i32_value(20));
    file.set("tokenizer.ggml.eot_token_id", u32_value(5));
    file.set("tokenizer.ggml.bos_token_id", u32_value(8));
    file.push("blk.0.attn_q.scale", &[], 0, 0.25f32.to_le_bytes().to_vec());
    file.tensor("output_norm.weight").data[..4].copy_from_slice(&1e-32f32.to_le_bytes());
    let checkpoint = open(file.bytes()).unwrap();
    assert_eq!(checkpoint.config.rope_freq_factors, Some(vec![4.0; 32]));
    assert_eq!((checkpoint.generation.temperature, checkpoint.generation.top_k), (Some(0.5), Some(20)));
    assert_eq!(checkpoint.generation.stop_tokens, [5, 7].map(TokenId));
    assert!(checkpoint.notes.iter().any(|note| note.contains("id 8 is outside")), "{:?}", checkpoint.notes);
    assert_eq!(checkpoint.weights.layers[0].q.reader().unwrap().scale(), 0.25);
    assert_eq!(checkpoint.weights.output_norm[..2], [0.0, 1.0]);

    // The same tensors under the name whose activation the file may state.
    let mut file = GgufFile::valid();
    for (key, _) in &mut file.keys {
        *key = String::from_utf8(key.clone()).unwrap().replace("bitnet-b1.58.", "bitnet.").into_bytes();
    }
    file.set("general.architecture", string("bitnet"));
    assert_eq!(open(file.bytes()).unwrap().config.activation, Activation::Silu);
    file.set("bitnet.hidden_activation", string("relu2"));
    assert_eq!(open(file.bytes()).unwrap().config.activation, Activation::Relu2);
}

#[test]
fn embedding_models_are_known() {
    let mut file = GgufFile::valid();
    file.set("tokenizer.ggml.add_eos_token", bool_value(true));
    file.set("bitnet-b1.58.attention.causal", bool_value(true));
    let ends = |checkpoint: &checkpoint::Checkpoint| match &checkpoint.tokenizer {
        Some(TokenizerSource::Gguf(vocabulary)) => vocabulary.add_eos,
        _ => panic!("a GGUF vocabulary"),
    };
    for (value, expected) in [(0, None), (1, Some(Pooling::Mean)), (3, Some(Pooling::Last))] {
        file.set("bitnet-b1.58.pooling_type", u32_value(value));
        let checkpoint = open(file.bytes()).unwrap();
        // A prompt to be continued must not say that it has ended.
        assert_eq!((checkpoint.pooling, ends(&checkpoint)), (expected, expected.is_some()));
    }
}

#[test]
fn each_defect_is_refused_by_name() {
    for (name, expected, damage) in CONTAINER.iter().chain(MEANING).chain(TENSORS) {
        let mut file = GgufFile::valid();
        damage(&mut file);
        let bytes = file.bytes();
        assert_refused(name, expected, bytes.len(), || open(bytes));
    }
}

#[test]
fn tq_blocks_that_are_no_ternary_tensor_are_refused() {
    let mut file = GgufFile::valid();
    for key in ["embedding_length", "feed_forward_length"] {
        file.set(&format!("bitnet-b1.58.{key}"), u32_value(256));
    }
    for tensor in &mut file.tensors {
        let rows = if tensor.name.contains("attn_k") || tensor.name.contains("attn_v") { 128 } else { 256 };
        match tensor.kind {
            0 => (tensor.dimensions, tensor.data) = (vec![256], ones(256)),
            1 => (tensor.dimensions, tensor.data) = (vec![256, 8], vec![0; 4096]),
            _ => (tensor.dimensions, tensor.data) = (vec![256, rows], i2_s(256 * rows)),
        }
    }
    let tq2 = [&[0x55; 64][..], &[0x00, 0x3c]].concat();
    let tq1 = [&[0x80; 52][..], &[0x00, 0x3c]].concat();
    let damage = |kind: u32, block: &[u8], at: usize, byte: u8| {
        let mut file = file.clone();
        let mut data = block.repeat(256);
        data[at] = byte;
        set_q(&mut file, kind, data);
        file.bytes()
    };
    load(|| open(damage(35, &tq2, 0, 0x55))).unwrap();
    load(|| open(damage(34, &tq1, 0, 0x80))).unwrap();
    for (name, expected, bytes) in [
        ("TQ2_0 code 3", "none of -1, 0, +1", damage(35, &tq2, 66, 0xff)),
        ("TQ1_0 byte of no number", "none of -1, 0, +1", damage(34, &tq1, 54, 1)),
        ("TQ2_0 scales differ", "blocks of different scales", damage(35, &tq2, 65, 0x3d)),
        ("TQ1_0 scales differ", "blocks of different scales", damage(34, &tq1, 53, 0x3d)),
        ("TQ2_0 scale of NaN", "different scales", damage(35, &tq2, 65, 0x7e)),
    ] {
        assert_refused(name, expected, bytes.len(), || open(bytes));
    }
    let mut infinite = tq2;
    infinite[65] = 0x7c;
    assert_refused("TQ2_0 scale infinite", "not finite", 1 << 20, || open(damage(35, &infinite, 65, 0x7c)));
}

#[test]
fn every_truncation_is_refused() {
    let whole = GgufFile::valid().bytes();
    let gguf = checkpoint::gguf::parse(&whole).unwrap();
    let data_start = gguf.tensors.iter().map(|tensor| tensor.range.start).min().unwrap();
    let boundaries = gguf.tensors.iter().flat_map(|tensor| {
        [tensor.range.start, tensor.range.start + 1, tensor.range.end - 1, tensor.range.end].into_iter()
    });
    let last = gguf.tensors.iter().map(|tensor| tensor.range.end).max().unwrap();
    let lengths: Vec<usize> = (0..data_start).chain(boundaries.filter(|&length| length < last)).collect();
    for length in lengths {
        let bytes = whole[..length].to_vec();
        assert_refused(&format!("cut to {length} bytes"), "", length, || open(bytes));
    }
}

#[test]
fn every_layout_of_i2_s_opens_and_odd_sizes_are_refused() {
    use checkpoint::I2sLayout::{A, B, C};
    let bytes = GgufFile::valid().bytes();
    for i2s_layout in [A, B, C] {
        load(|| checkpoint::open_bytes("x", bytes.clone().into(), &LoadOptions { i2s_layout })).unwrap();
    }
    // 128 x 66 weights are whole blocks of 64 and of 128 only for even row counts; of four rows never.
    let mut file = GgufFile::valid();
    file.set("bitnet-b1.58.feed_forward_length", u32_value(66));
    for name in ["ffn_gate", "ffn_up"] {
        let tensor = file.tensor(&format!("blk.0.{name}.weight"));
        (tensor.dimensions, tensor.data) = (vec![128, 66], i2_s(128 * 66));
    }
    let down = file.tensor("blk.0.ffn_down.weight");
    (down.dimensions, down.data) = (vec![66, 128], i2_s(128 * 66));
    let norm = file.tensor("blk.0.ffn_sub_norm.weight");
    (norm.dimensions, norm.data) = (vec![66], ones(66));
    let bytes = file.bytes();
    load(|| open(bytes.clone())).unwrap();
    assert_refused("rows of four", "no whole number of blocks", bytes.len(), || {
        checkpoint::open_bytes("x", bytes.clone().into(), &LoadOptions { i2s_layout: C })
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a few bytes are changed to, nothing panics and memory stays bounded.
    #[test]
    fn mutations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = GgufFile::valid().bytes();
        for (index, byte, anywhere) in edits {
            // Most of the file is codes; most of what can go wrong is in its first kilobyte and a half.
            let end = if anywhere { bytes.len() } else { 1536 };
            bytes[index.index(end)] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let limit = 2 * bytes.len() + crate::SLACK;
        let (_, peak) = crate::peak_during(|| load(|| open(bytes)));
        prop_assert!(peak <= limit, "held {} bytes", peak);
    }
}
