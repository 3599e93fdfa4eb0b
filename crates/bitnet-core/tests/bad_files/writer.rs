//! A writer of GGUF and safetensors bytes that can be told to write nonsense: every count, offset and length may be
//! overridden, and what it writes by default is a valid tiny model.

use std::path::{Path, PathBuf};

pub(crate) const HIDDEN: u64 = 128;
pub(crate) const VOCABULARY: u64 = 8;

/// A GGUF file about to be written.
#[derive(Clone)]
pub(crate) struct GgufFile {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// Key bytes (not always UTF-8), and type id with payload.
    pub(crate) keys: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) tensors: Vec<GgufTensor>,
    pub(crate) num_tensors: Option<u64>,
    pub(crate) num_keys: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    /// Contiguous dimension first.
    pub(crate) dimensions: Vec<u64>,
    pub(crate) num_dimensions: Option<u32>,
    pub(crate) kind: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) data: Vec<u8>,
}

impl GgufFile {
    /// One layer of bitnet-b1.58 with I2_S linears and a vocabulary of eight tokens.
    pub(crate) fn valid() -> Self {
        let arch = "bitnet-b1.58";
        let mut file = Self {
            magic: *b"GGUF",
            version: 3,
            keys: Vec::new(),
            tensors: Vec::new(),
            num_tensors: None,
            num_keys: None,
        };
        file.set("general.architecture", string(arch));
        for (key, value) in [
            ("embedding_length", HIDDEN as u32),
            ("block_count", 1),
            ("feed_forward_length", HIDDEN as u32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("context_length", 64),
            ("vocab_size", VOCABULARY as u32),
        ] {
            file.set(&format!("{arch}.{key}"), u32_value(value));
        }
        file.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), f32_value(1e-5));
        file.set(&format!("{arch}.rope.freq_base"), f32_value(1e4));
        file.set("tokenizer.ggml.model", string("gpt2"));
        let tokens = ["a", "b", "ab", "c", "abc", "d", "<s>", "</s>"];
        file.set("tokenizer.ggml.tokens", string_array(&tokens));
        file.set("tokenizer.ggml.token_type", array(5, &[1i32.to_le_bytes(); 8]));
        file.set("tokenizer.ggml.scores", array(6, &[0f32.to_le_bytes(); 8]));
        file.set("tokenizer.ggml.merges", string_array(&["a b", "ab c"]));
        file.set("tokenizer.ggml.bos_token_id", u32_value(6));
        file.set("tokenizer.ggml.eos_token_id", u32_value(7));
        file.push("token_embd.weight", &[HIDDEN, VOCABULARY], 1, vec![0; 2 * (HIDDEN * VOCABULARY) as usize]);
        file.push("output_norm.weight", &[HIDDEN], 0, ones(HIDDEN));
        for norm in ["attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"] {
            file.push(&format!("blk.0.{norm}.weight"), &[HIDDEN], 0, ones(HIDDEN));
        }
        for linear in ["attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
            file.push(&format!("blk.0.{linear}.weight"), &[HIDDEN, HIDDEN], 36, i2_s(HIDDEN * HIDDEN));
        }
        for linear in ["attn_k", "attn_v"] {
            file.push(&format!("blk.0.{linear}.weight"), &[HIDDEN, HIDDEN / 2], 36, i2_s(HIDDEN * HIDDEN / 2));
        }
        file
    }

    /// Sets or replaces a key.
    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) {
        self.unset(key);
        self.keys.push((key.into(), value));
    }

    pub(crate) fn unset(&mut self, key: &str) {
        self.keys.retain(|(existing, _)| existing != key.as_bytes());
    }

    pub(crate) fn push(&mut self, name: &str, dimensions: &[u64], kind: u32, data: Vec<u8>) {
        let (name, dimensions) = (name.into(), dimensions.to_vec());
        self.tensors.push(GgufTensor { name, dimensions, num_dimensions: None, kind, offset: None, data });
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the valid file")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.magic);
        out.extend(self.version.to_le_bytes());
        out.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend((key.len() as u64).to_le_bytes());
            out.extend(key);
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend((tensor.name.len() as u64).to_le_bytes());
            out.extend(tensor.name.as_bytes());
            out.extend(tensor.num_dimensions.unwrap_or(tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|dimension| out.extend(dimension.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// `n` codes of 0 and a scale of 1.
pub(crate) fn i2_s(n: u64) -> Vec<u8> {
    let mut data = vec![0x55; n as usize / 4];
    data.extend(1f32.to_le_bytes());
    data.resize(data.len() + 28, 0);
    data
}

pub(crate) fn ones(n: u64) -> Vec<u8> {
    1f32.to_le_bytes().repeat(n as usize)
}

pub(crate) fn string(value: &str) -> Vec<u8> {
    raw_string(value.as_bytes())
}

pub(crate) fn raw_string(value: &[u8]) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &(value.len() as u64).to_le_bytes(), value].concat()
}

pub(crate) fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(crate) fn u64_value(value: u64) -> Vec<u8> {
    [&10u32.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

pub(crate) fn i32_value(value: i32) -> Vec<u8> {
    [5u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(crate) fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(crate) fn bool_value(value: bool) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[u8::from(value)]].concat()
}

pub(crate) fn array<const N: usize>(element: u32, items: &[[u8; N]]) -> Vec<u8> {
    [&array_head(element, items.len() as u64)[..], &items.concat()].concat()
}

pub(crate) fn array_head(element: u32, len: u64) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &element.to_le_bytes(), &len.to_le_bytes()].concat()
}

pub(crate) fn string_array(items: &[&str]) -> Vec<u8> {
    let items: Vec<u8> =
        items.iter().flat_map(|item| [&(item.len() as u64).to_le_bytes()[..], item.as_bytes()].concat()).collect();
    [array_head(8, 0)[..8].to_vec(), (items_len(&items)).to_le_bytes().to_vec(), items].concat()
}

/// How many length-prefixed strings `items` holds.
fn items_len(mut items: &[u8]) -> u64 {
    let mut count = 0;
    while let Some((length, rest)) = items.split_first_chunk() {
        items = &rest[u64::from_le_bytes(*length) as usize..];
        count += 1;
    }
    count
}

/// A Hugging Face directory about to be written.
#[derive(Clone)]
pub(crate) struct HuggingFaceDir {
    pub(crate) config: serde_json::Value,
    /// Name, dtype, shape, data.
    pub(crate) tensors: Vec<(String, &'static str, Vec<u64>, Vec<u8>)>,
    /// Other files, or replacements of the usual ones.
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
}

impl HuggingFaceDir {
    /// One packed layer of BitNetForCausalLM.
    pub(crate) fn valid() -> Self {
        let config = serde_json::json!({
            "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "hidden_act": "relu2",
            "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 1e4, "tie_word_embeddings": true, "bos_token_id": 6, "eos_token_id": 7,
            "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
        });
        let mut dir = Self { config, tensors: Vec::new(), files: Vec::new() };
        let norm = |name: &str| (name.to_string(), "F32", vec![HIDDEN], ones(HIDDEN));
        let embedding = vec![0; 2 * (HIDDEN * VOCABULARY) as usize];
        dir.tensors.push(("model.embed_tokens.weight".into(), "BF16", vec![VOCABULARY, HIDDEN], embedding));
        dir.tensors.push(norm("model.norm.weight"));
        for name in ["input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm", "mlp.ffn_sub_norm"] {
            dir.tensors.push(norm(&format!("model.layers.0.{name}.weight")));
        }
        for (name, rows) in [
            ("self_attn.q_proj", HIDDEN),
            ("self_attn.k_proj", HIDDEN / 2),
            ("self_attn.v_proj", HIDDEN / 2),
            ("self_attn.o_proj", HIDDEN),
            ("mlp.gate_proj", HIDDEN),
            ("mlp.up_proj", HIDDEN),
            ("mlp.down_proj", HIDDEN),
        ] {
            let module = format!("model.layers.0.{name}");
            let codes = vec![0x55; (rows / 4 * HIDDEN) as usize];
            dir.tensors.push((format!("{module}.weight"), "U8", vec![rows / 4, HIDDEN], codes));
            dir.tensors.push((format!("{module}.weight_scale"), "F32", vec![1], ones(1)));
        }
        dir
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut (String, &'static str, Vec<u64>, Vec<u8>) {
        let name = format!("model.layers.0.{name}");
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).expect("a tensor of the valid directory")
    }

    /// The bytes of `model.safetensors`.
    pub(crate) fn safetensors(&self) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), entry);
            data.extend(bytes);
        }
        with_header(&serde_json::Value::Object(header).to_string(), &data)
    }

    /// Writes the directory and returns its bytes and path; `name` must be unique in this test binary.
    pub(crate) fn write(&self, name: &str) -> (PathBuf, u64) {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bad_files").join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let usual = [("config.json", self.config.to_string().into_bytes()), ("model.safetensors", self.safetensors())];
        let mut bytes = 0;
        for (file, contents) in usual.iter().chain(&self.files) {
            std::fs::write(dir.join(file), contents).unwrap();
        }
        for entry in std::fs::read_dir(&dir).unwrap() {
            bytes += entry.unwrap().metadata().unwrap().len();
        }
        (dir, bytes)
    }
}

/// A safetensors file of this header and data.
pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}
