//! Dropping dead channels changes no bit: models with some injected, against the same models that keep every channel, as
//! those do that skip channels one by one.

mod common;

use std::{fs, path::PathBuf};

use bitnet_core::{TokenId, kernels, kv_cache::KvDtype, model::SparseFfn};
use common::{Engine, Setup, golden, open};

const MODELS: [&str; 3] = ["p1_packed", "p3_llama", "p4_silu"];

#[test]
fn a_model_without_its_dead_channels_gives_the_same_bits() {
    let tokens: Vec<_> = (0..45).map(|i| TokenId(i * 37 % 500)).collect();
    for model in MODELS {
        let directory = with_dead_channels(model, "bits");
        let checkpoint = open(&directory);
        let expected =
            Engine::with_sparse_ffn(&checkpoint, KvDtype::F16, Setup::default(), SparseFfn::On).all_logits(&tokens, 64);
        for &kernel in kernels::available() {
            for &layout in kernel.layouts() {
                let setup = Setup { kernel, packing: Some(layout), num_threads: 2, ..Setup::default() };
                let mut engine = Engine::new(&checkpoint, KvDtype::F16, setup);
                let dead = engine.model.num_dropped_channels();
                let all = checkpoint.config.num_layers * checkpoint.config.intermediate_size;
                assert!((all / 4..all).contains(&dead), "{model}: {dead} of {all} channels");
                for chunk in [1, 7, 64] {
                    let logits = engine.all_logits(&tokens, chunk);
                    let name = kernel.name();
                    assert!(same_bits(&logits, &expected), "{model} {name} {} chunk {chunk}", layout.name());
                }
            }
        }
        fs::remove_dir_all(directory).expect("a directory of this test");
    }
}

/// Zero times a weight that is not finite is not zero: such a channel stays, and is seen.
#[test]
fn a_channel_whose_norm_is_not_finite_is_not_dead() {
    let directory = with_dead_channels("p1_packed", "norm");
    let mut checkpoint = open(&directory);
    checkpoint.weights.layers[1].ffn_sub_norm.as_mut().expect("a norm")[1] = f32::NAN;
    let mut engine = Engine::new(&checkpoint, KvDtype::F16, Setup::default());
    let logits = engine.all_logits(&[TokenId(3), TokenId(4)], 2);
    assert!(logits.iter().flatten().all(|logit| !logit.is_finite()));
    fs::remove_dir_all(directory).expect("a directory of this test");
}

fn same_bits(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|value| value.to_bits()).collect::<Vec<_>>();
    bits(a) == bits(b)
}

/// A copy of a packed model, with zeros in rows of `gate` and of `up`: about half of all channels, more in some lanes.
fn with_dead_channels(model: &str, test: &str) -> PathBuf {
    let copy = std::env::temp_dir().join(format!("bitnet-dead-channels-{}-{test}-{model}", std::process::id()));
    fs::create_dir_all(&copy).expect("a temporary directory");
    for entry in fs::read_dir(golden(model)).expect("a golden model") {
        let path = entry.expect("its file").path();
        fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("a copy");
    }
    let path = copy.join("model.safetensors");
    let mut file = fs::read(&path).expect("the weights");
    let header_len = u64::from_le_bytes(*file.first_chunk().expect("a length")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + header_len]).expect("a header");
    for (name, tensor) in header.as_object().expect("an object") {
        let period = match name.rsplit_once("mlp.").map(|(_, name)| name) {
            Some("gate_proj.weight") => 3,
            Some("up_proj.weight") => 4,
            _ => continue,
        };
        let number = |value: &serde_json::Value| value.as_u64().expect("a number") as usize;
        let (quarter, cols) = (number(&tensor["shape"][0]), number(&tensor["shape"][1]));
        let start = 8 + header_len + number(&tensor["data_offsets"][0]);
        for row in (0..4 * quarter).filter(|row| row % period == 1 || row % 48 == 5) {
            let (first, shift) = (start + row % quarter * cols, 2 * (row / quarter));
            file[first..first + cols].iter_mut().for_each(|byte| *byte = *byte & !(3 << shift) | 1 << shift);
        }
    }
    fs::write(path, file).expect("the weights");
    copy
}
