//! Broken Hugging Face directories: one row a defect, made from a valid tiny one.

use std::path::Path;

use bitnet_core::{
    TokenId,
    checkpoint::{self, Activation, LoadError, LoadOptions, Pooling, safetensors},
};
use proptest::prelude::*;
use serde_json::json;

use crate::{assert_refused, load, writer::*};

fn open(path: &Path) -> Result<checkpoint::Checkpoint, LoadError> {
    checkpoint::open(path, &LoadOptions::default())
}

type Row = (&'static str, &'static str, fn(&mut HuggingFaceDir));

const Q: &str = "self_attn.q_proj.weight";

/// What is done, what the message must say, how.
const CONFIG: &[Row] = &[
    ("empty", "config.json", |d| d.files.push(("config.json", Vec::new()))),
    ("not json", "is not the JSON", |d| d.files.push(("config.json", b"{\"a\":".to_vec()))),
    ("nested too deep", "is not the JSON", |d| d.files.push(("config.json", b"[".repeat(100_000)))),
    ("too long", "longer than", |d| d.files.push(("config.json", vec![b' '; 1 << 20]))),
    ("a list", "not stated", |d| d.config = json!([1])),
    ("architecture of another kind", "architecture `GPT2LMHeadModel`", |d| {
        d.config["architectures"] = json!(["GPT2LMHeadModel"]);
    }),
    ("no hidden size", "`hidden_size` is missing", |d| d.config["hidden_size"] = json!(null)),
    ("hidden size as string", "`hidden_size` is not", |d| d.config["hidden_size"] = json!("128")),
    ("hidden size -1", "`hidden_size` is not", |d| d.config["hidden_size"] = json!(-1)),
    ("hidden size 1.5", "`hidden_size` is not", |d| d.config["hidden_size"] = json!(1.5)),
    ("hidden size 2^64-1", "hidden size", |d| d.config["hidden_size"] = json!(u64::MAX - 1)),
    ("heads 0", "number of heads", |d| d.config["num_attention_heads"] = json!(0)),
    ("layers 10^9", "number of layers", |d| d.config["num_hidden_layers"] = json!(1_000_000_000)),
    ("more layers than there are", "is missing", |d| d.config["num_hidden_layers"] = json!(2)),
    ("odd heads", "an odd number", |d| d.config["head_dim"] = json!(7)),
    ("vocabulary of another model", "the geometry asks for", |d| d.config["vocab_size"] = json!(16)),
    ("untied without a head", "`lm_head.weight` is missing", |d| d.config["tie_word_embeddings"] = json!(false)),
    ("another quantization", "quant_method `gptq`", |d| {
        d.config["quantization_config"]["quant_method"] = json!("gptq")
    }),
    ("norms inside linears", "use_rms_norm", |d| d.config["quantization_config"]["use_rms_norm"] = json!(true)),
    ("dense linears", "modules_to_not_convert", |d| {
        d.config["quantization_config"]["modules_to_not_convert"] = json!(["model.layers.0.mlp.down_proj"]);
    }),
    ("unknown activation", "hidden_act `gelu`", |d| d.config["hidden_act"] = json!("gelu")),
    ("unknown RoPE scaling", "RoPE scaling `longrope`", |d| {
        d.config["rope_scaling"] = json!({"type": "longrope", "factor": 2.0});
    }),
    ("RoPE scaling without factor", "rope_scaling.factor", |d| d.config["rope_scaling"] = json!({"type": "linear"})),
    ("RoPE factor 0", "RoPE frequency factors", |d| {
        d.config["rope_scaling"] = json!({"type": "linear", "factor": 0.0});
    }),
    ("partial rotation", "partial_rotary_factor", |d| d.config["partial_rotary_factor"] = json!(0.5)),
    ("infinite epsilon", "RMSNorm epsilon", |d| d.config["rms_norm_eps"] = json!(1e300)),
    ("modules not json", "modules.json", |d| d.files.push(("modules.json", b"[".to_vec()))),
    ("modules of another kind", "module `Dense`", |d| modules(d, &[("", "Transformer"), ("2_Dense", "Dense")])),
    ("modules with two poolings", "module `Pooling`", |d| modules(d, &[("1_a", "Pooling"), ("1_b", "Pooling")])),
    ("modules without pooling", "names no pooling", |d| modules(d, &[("", "Transformer")])),
    ("pooling outside", "no plain folder name", |d| modules(d, &[("../1_Pooling", "Pooling")])),
    ("pooling not there", "no such file", |d| modules(d, &[("1_Pooling", "Pooling")])),
    ("class without a head", "BitNetModel` without modules.json", |d| {
        d.config["architectures"] = json!(["BitNetModel"])
    }),
    ("tokenizer not json", "tokenizer.json", |d| d.files.push(("tokenizer.json", b"PK\x03\x04".to_vec()))),
    ("tokenizer of lists", "is not a tokenizer", |d| {
        d.files.push(("tokenizer.json", br#"{"added_tokens":[{"id":"x"}]}"#.to_vec()));
    }),
    ("tokenizer config not json", "tokenizer_config.json", |d| d.files.push(("tokenizer_config.json", b"}".to_vec()))),
    ("template not UTF-8", "chat_template.jinja", |d| d.files.push(("chat_template.jinja", vec![0xff]))),
];

const TENSORS: &[Row] = &[
    ("no q", "q_proj.weight` is missing", |d| d.tensors.retain(|tensor| !tensor.0.ends_with(Q))),
    ("q of another shape", "the geometry asks for [32, 128]", |d| d.tensor(Q).2 = vec![64, 64]),
    ("no scale", "need a `weight_scale`", |d| d.tensors.retain(|tensor| !tensor.0.ends_with("q_proj.weight_scale"))),
    ("scale NaN", "not finite", |d| d.tensor("self_attn.q_proj.weight_scale").3 = f32::NAN.to_le_bytes().to_vec()),
    ("scale that divides by 0", "not finite", |d| {
        d.config["quantization_config"]["linear_class"] = json!("bitlinear");
        d.tensor("self_attn.q_proj.weight_scale").3 = vec![0; 4];
    }),
    ("scale of a row each", "has the shape [4]", |d| {
        let scale = d.tensor("self_attn.q_proj.weight_scale");
        (scale.2, scale.3) = (vec![4], ones(4));
    }),
    ("scale as integer", "norms and scales can be", |d| d.tensor("self_attn.q_proj.weight_scale").1 = "I32"),
    ("code 3", "none of -1, 0, +1", |d| d.tensor(Q).3[7] = 0xff),
    ("integer linear", "not a 1-bit model", |d| {
        let q = d.tensor(Q);
        (q.1, q.2, q.3) = ("I8", vec![128, 128], vec![0; 128 * 128]);
    }),
    ("floats beside a scale", "ambiguous", |d| {
        let q = d.tensor(Q);
        (q.1, q.2, q.3) = ("F32", vec![128, 128], ones(128 * 128));
    }),
    ("bias", "no bias", |d| d.tensors.push(("model.layers.0.self_attn.q_proj.bias".into(), "F32", vec![1], ones(1)))),
    ("norm inside a linear", "norms inside", |d| {
        d.tensors.push(("model.layers.0.mlp.up_proj.rms_norm.weight".into(), "F32", vec![128], ones(128)));
    }),
    ("zero dimension", "cannot have the shape", |d| d.tensor(Q).2 = vec![0, 128]),
    ("2^32 x 2^32", "cannot have the shape", |d| d.tensor(Q).2 = vec![1 << 32, 1 << 32]),
    ("2^63 x 2", "cannot have the shape", |d| d.tensor(Q).2 = vec![1 << 63, 2]),
    ("9 dimensions", "at most 8 dimensions", |d| d.tensor(Q).2 = vec![1; 9]),
    ("bytes of another shape", "between its offsets", |d| d.tensor(Q).3.truncate(100)),
    ("unknown dtype", "unknown dtype `Q4`", |d| d.tensor(Q).1 = "Q4"),
];

/// Whole weight files and indices.
const FILES: &[Row] = &[
    ("empty weights", "only 0 bytes", |d| d.files.push(("model.safetensors", Vec::new()))),
    ("seven bytes", "only 7 bytes", |d| d.files.push(("model.safetensors", vec![0; 7]))),
    ("header of 2^63", "header claims", |d| d.files.push(("model.safetensors", (1u64 << 63).to_le_bytes().to_vec()))),
    ("header of 2^64-1", "header claims", |d| d.files.push(("model.safetensors", vec![0xff; 16]))),
    ("header beyond the file", "header claims 3", |d| {
        d.files.push(("model.safetensors", vec![3, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']));
    }),
    ("header not json", "not valid", |d| raw(d, "{\"a\": nonsense}", 0)),
    ("header a list", "not valid", |d| raw(d, "[]", 0)),
    ("header not UTF-8", "not valid", |d| {
        d.files.push(("model.safetensors", [&8u64.to_le_bytes()[..], b"{\"\xff\":{}}"].concat()));
    }),
    ("header nested too deep", "not valid", |d| raw(d, &format!("{{\"__metadata__\":{}", "[".repeat(100_000)), 0)),
    ("tensor twice", "occurs twice", |d| raw(d, &format!("{{\"a\":{A},\"a\":{A}}}"), 4)),
    ("metadata twice", "occurs twice", |d| raw(d, "{\"__metadata__\":{},\"__metadata__\":{}}", 4)),
    ("no offsets", "data_offsets", |d| raw(d, "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4)),
    ("three offsets", "not valid", |d| entry(d, "[1]", "[0,4,8]")),
    ("negative dimension", "not valid", |d| entry(d, "[-1]", "[0,4]")),
    ("offsets reversed", "between its offsets", |d| entry(d, "[1]", "[4,0]")),
    ("offsets beyond the file", "cut short", |d| entry(d, "[2]", "[0,8]")),
    ("offsets near 2^64", "cut short", |d| entry(d, "[1]", "[18446744073709551611,18446744073709551615]")),
    ("offsets beyond 2^64", "not valid", |d| entry(d, "[1]", "[0,18446744073709551616]")),
    ("tensors overlap", "overlap", |d| raw(d, &format!("{{\"a\":{A},\"b\":{A}}}"), 4)),
    ("a hundred thousand tensors", "more tensors", |d| {
        let entries: Vec<String> = (0..100_000).map(|i| format!("\"{i}\":{A}")).collect();
        raw(d, &format!("{{{}}}", entries.join(",")), 4);
    }),
    ("index that climbs", "not a plain file name", |d| index(d, "../model.safetensors")),
    ("index with a path", "not a plain file name", |d| index(d, "/etc/passwd")),
    ("index with a parent only", "not a plain file name", |d| index(d, "..")),
    ("index of a missing shard", "no such file", |d| index(d, "model-00002-of-00002.safetensors")),
    ("index not json", "is not the JSON", |d| {
        index(d, "x");
        d.files.last_mut().unwrap().1 = b"[]".to_vec();
    }),
];

/// One sound entry of four bytes.
const A: &str = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";

fn raw(dir: &mut HuggingFaceDir, header: &str, data: usize) {
    dir.files.push(("model.safetensors", with_header(header, &vec![0; data])));
}

fn entry(dir: &mut HuggingFaceDir, shape: &str, offsets: &str) {
    raw(dir, &format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}"), 4);
}

/// Modules of sentence-transformers: folder and class.
fn modules(dir: &mut HuggingFaceDir, modules: &[(&str, &str)]) {
    let module =
        |(path, class): &(&str, &str)| json!({"path": path, "type": format!("sentence_transformers.models.{class}")});
    let modules: Vec<_> = modules.iter().map(module).collect();
    dir.files.push(("modules.json", json!(modules).to_string().into_bytes()));
}

/// Replaces the weights by an index that names one shard.
fn index(dir: &mut HuggingFaceDir, shard: &str) {
    let json = json!({"metadata": {"total_size": 1}, "weight_map": {"a": shard}});
    dir.files.push(("model.safetensors.index.json", json.to_string().into_bytes()));
}

#[test]
fn the_directory_they_are_made_from_is_sound() {
    let (path, _) = HuggingFaceDir::valid().write("valid");
    load(|| open(&path)).unwrap();
}

#[test]
fn what_the_directory_states_is_honoured() {
    let mut dir = HuggingFaceDir::valid();
    dir.config["quantization_config"]["linear_class"] = json!("bitlinear");
    dir.config["rope_theta"] = json!(null);
    dir.config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    dir.tensor("self_attn.q_proj.weight_scale").3 = 4f32.to_le_bytes().to_vec();
    dir.files.push(("generation_config.json", br#"{"do_sample":false,"eos_token_id":[3,99]}"#.to_vec()));
    dir.files.push(("chat_template.jinja", b"from a file".to_vec()));
    dir.files.push(("tokenizer_config.json", br#"{"chat_template":"from the config"}"#.to_vec()));
    dir.files.push(("tokenizer.model", vec![1]));
    let (path, _) = dir.write("states");
    let checkpoint = open(&path).unwrap();
    assert_eq!(checkpoint.weights.layers[0].q.reader().unwrap().scale(), 0.25);
    assert_eq!(checkpoint.config.rope_theta, 5e5);
    let factors = checkpoint.config.rope_freq_factors.unwrap();
    assert_eq!((factors.len(), factors[0], factors[31]), (32, 1.0, 8.0));
    assert_eq!(checkpoint.generation.temperature, Some(0.0));
    assert_eq!(checkpoint.generation.stop_tokens, [3, 7].map(TokenId));
    assert_eq!(checkpoint.chat_template.as_deref(), Some("from a file"));
    assert!(checkpoint.tokenizer.is_none());
    for expected in ["id 99 is outside", "only tokenizer.model"] {
        assert!(checkpoint.notes.iter().any(|note| note.contains(expected)), "{:?}", checkpoint.notes);
    }
}

#[test]
fn the_names_of_the_1bitllm_repositories_are_known() {
    let mut dir = HuggingFaceDir::valid();
    dir.config["architectures"] = json!(["BitnetForCausalLM"]);
    dir.config["model_type"] = json!("llama");
    dir.config["hidden_act"] = json!(null);
    dir.config["quantization_config"] = json!(null);
    dir.tensors.retain(|tensor| !tensor.0.ends_with("weight_scale"));
    for (name, dtype, shape, data) in &mut dir.tensors {
        *name = name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm");
        if *dtype == "U8" {
            (*dtype, shape[0]) = ("F32", shape[0] * 4);
            *data = [0.25f32, -2.0, 0.75, 0.0].iter().flat_map(|weight| weight.to_le_bytes()).collect();
            *data = data.repeat((shape[0] * shape[1] / 4) as usize);
        }
    }
    let (path, _) = dir.write("1bitllm");
    let checkpoint = open(&path).unwrap();
    assert_eq!(checkpoint.config.activation, Activation::Silu);
    let layer = &checkpoint.weights.layers[0];
    assert!(layer.attn_sub_norm.is_some() && layer.ffn_sub_norm.is_some());
    let reader = layer.gate.reader().unwrap();
    let mut codes = vec![9; 128];
    reader.decode_row(5, &mut codes).unwrap();
    assert_eq!((codes[..4].to_vec(), reader.scale()), (vec![0, -1, 1, 0], 0.75));
}

#[test]
fn embedding_models_are_known_with_and_without_a_head() {
    let mut dir = HuggingFaceDir::valid();
    modules(&mut dir, &[("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]);
    let pooling = |path: &std::path::Path, mode: &str| {
        std::fs::create_dir_all(path.join("1_Pooling")).unwrap();
        let config = json!({format!("pooling_mode_{mode}"): true, "pooling_mode_cls_token": false});
        std::fs::write(path.join("1_Pooling/config.json"), config.to_string()).unwrap();
    };
    for headless in [false, true] {
        if headless {
            dir.config["architectures"] = json!(["BitNetModel"]);
            dir.config["tie_word_embeddings"] = json!(false);
            dir.tensors.iter_mut().for_each(|tensor| tensor.0 = tensor.0.replacen("model.", "", 1));
        }
        let (path, _) = dir.write("embedding_model");
        for (mode, expected) in [("mean_tokens", Pooling::Mean), ("lasttoken", Pooling::Last)] {
            pooling(&path, mode);
            assert_eq!(open(&path).unwrap().pooling, Some(expected));
        }
        pooling(&path, "max_tokens");
        assert!(open(&path).unwrap_err().to_string().contains("pooling by max_tokens"));
    }
    assert_eq!(open(&HuggingFaceDir::valid().write("no_embedding_model").0).unwrap().pooling, None);
}

#[test]
fn each_defect_is_refused_by_name() {
    for (name, expected, damage) in CONFIG.iter().chain(TENSORS).chain(FILES) {
        let mut dir = HuggingFaceDir::valid();
        damage(&mut dir);
        let (path, bytes) = dir.write(&name.replace(['/', ' '], "_"));
        if name.starts_with("index") {
            std::fs::remove_file(path.join("model.safetensors")).unwrap();
        }
        assert_refused(name, expected, bytes as usize, || open(&path));
    }
}

#[test]
fn what_is_not_there_is_told_apart_from_what_is_broken() {
    let (path, _) = HuggingFaceDir::valid().write("not_there");
    assert!(matches!(open(&path.join("nothing.gguf")), Err(LoadError::NotFound { .. })));
    assert!(matches!(open(&path.join("config.json")), Err(LoadError::Gguf { .. })));
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    assert!(matches!(open(&path), Err(LoadError::NotFound { .. })));
    std::fs::remove_file(path.join("config.json")).unwrap();
    assert!(matches!(open(&path), Err(LoadError::NotAModel { .. })));
}

#[test]
fn shards_are_read_together_and_a_tensor_in_two_is_refused() {
    let whole = HuggingFaceDir::valid();
    let (mut first, mut second) = (whole.clone(), whole.clone());
    second.tensors = first.tensors.split_off(9);
    let mut dir = whole;
    dir.files = vec![("one.safetensors", first.safetensors()), ("two.safetensors", second.safetensors())];
    let map = json!({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}});
    dir.files.push(("model.safetensors.index.json", map.to_string().into_bytes()));
    let (path, _) = dir.write("shards");
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    load(|| open(&path)).unwrap();

    second.tensors.push(first.tensors[3].clone());
    std::fs::write(path.join("two.safetensors"), second.safetensors()).unwrap();
    assert_refused("a tensor in two shards", "second copy", 1 << 20, || open(&path));
}

#[test]
fn every_truncation_of_the_weights_is_refused() {
    let whole = HuggingFaceDir::valid().safetensors();
    let header = safetensors::parse(&whole).unwrap();
    let data_start = header.tensors.iter().map(|tensor| tensor.range.start).min().unwrap();
    let boundaries = header.tensors.iter().flat_map(|tensor| [tensor.range.start, tensor.range.end - 1]);
    for length in (0..data_start).chain(boundaries) {
        assert!(safetensors::parse(&whole[..length]).is_err(), "cut to {length} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a few bytes of the header are changed to, nothing panics and memory stays bounded.
    #[test]
    fn header_mutations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = HuggingFaceDir::valid().safetensors();
        let header_end = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        for (index, byte) in edits {
            bytes[index.index(header_end)] = byte;
        }
        let (_, peak) = crate::peak_during(|| safetensors::parse(&bytes).is_ok());
        prop_assert!(peak <= 2 * bytes.len() + crate::SLACK, "held {} bytes", peak);
    }

    /// The same for `config.json`, through the whole of `open`.
    #[test]
    fn config_mutations_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut dir = HuggingFaceDir::valid();
        let mut config = dir.config.to_string().into_bytes();
        for (index, byte) in edits {
            let at = index.index(config.len());
            config[at] = byte;
        }
        dir.files.push(("config.json", config));
        let (path, _) = dir.write("config_mutations");
        let _ = load(|| open(&path));
    }
}
