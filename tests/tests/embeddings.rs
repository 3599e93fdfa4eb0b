//! Embeddings through the real binary: the vectors are to the bit those that the library's own hidden states give, whatever
//! they are computed beside, and close to those of the reference.

use std::path::{Path, PathBuf};

use bitnet_core::{
    Batch, BlockId, LoadOptions, Model, TokenId, checkpoint, kernels,
    kv_cache::{BLOCK_TOKENS, KvCache, KvDtype},
    model::{BatchSequence, LogitRows, TracePoint, Workspace},
    threads::WorkerPool,
};
use bitnet_tests::{
    golden::{self, MODELS},
    server::{Server, scratch},
};
use serde_json::{Value, json};

/// A golden checkpoint as an embedding model that takes `mode`, for one test.
fn embedding_model(test: &str, name: &str, mode: &str) -> PathBuf {
    let dir = scratch(&format!("embeddings-{test}-{name}-{mode}"));
    for file in std::fs::read_dir(golden::path(name)).expect("a directory") {
        let file = file.expect("an entry");
        std::fs::copy(file.path(), dir.join(file.file_name())).expect("the copy");
    }
    let module = |index: usize, path: &str, class: &str| json!({"idx": index, "name": index.to_string(), "path": path, "type": class});
    let modules = json!([
        module(0, "", "sentence_transformers.models.Transformer"),
        module(1, "1_Pooling", "sentence_transformers.models.Pooling"),
        module(2, "2_Normalize", "sentence_transformers.models.Normalize"),
    ]);
    let pooling = json!({"pooling_mode_mean_tokens": mode == "mean", "pooling_mode_lasttoken": mode == "last"});
    std::fs::create_dir(dir.join("1_Pooling")).expect("a directory");
    std::fs::write(dir.join("modules.json"), modules.to_string()).expect("a file");
    std::fs::write(dir.join("1_Pooling/config.json"), pooling.to_string()).expect("a file");
    dir
}

fn serve(dir: &Path, args: &[&str]) -> Server {
    let model = dir.to_str().expect("UTF-8");
    Server::start(&[&["-m", model, "--model-name", "vectors", "--kv-cache-type", "f32"], args].concat())
}

async fn embed(server: &Server, input: Value) -> Vec<Vec<f32>> {
    let answer = server.post("/v1/embeddings", &json!({"input": input})).await.ok();
    let vector = |(index, data): (usize, &Value)| {
        assert_eq!((&data["object"], &data["index"]), (&json!("embedding"), &json!(index)));
        serde_json::from_value(data["embedding"].clone()).expect("numbers")
    };
    answer["data"].as_array().expect("a list").iter().enumerate().map(vector).collect()
}

/// The final hidden states of `ids`, by the library, all in one step.
fn hidden_states(dir: &Path, ids: &[u32]) -> Vec<Vec<f32>> {
    let checkpoint = checkpoint::open(dir, &LoadOptions::default()).expect("an embedding model");
    let mut pool = WorkerPool::new(1);
    let model = Model::load(&checkpoint, kernels::select("auto").expect("a kernel"), &mut pool, &|_, _| {})
        .expect("a good checkpoint");
    let num_blocks = ids.len().div_ceil(BLOCK_TOKENS);
    let mut kv = KvCache::new(&model, num_blocks, KvDtype::F32).expect("a small cache");
    let mut workspace = Workspace::new(&model, ids.len(), ids.len(), pool);
    let tokens: Vec<_> = ids.iter().copied().map(TokenId).collect();
    let block_table: Vec<_> = (0..num_blocks as u32).map(BlockId).collect();
    let sequence =
        BatchSequence { tokens: &tokens, start: 0, stored: 0, block_table: &block_table, logits: LogitRows::All };
    let batch = Batch::new(&model, &kv, &workspace, &[sequence]).expect("a valid batch");
    let mut rows = Vec::new();
    model.forward_traced(&batch, &mut kv, &mut workspace, &mut |point, _, values| {
        if point == TracePoint::OutputNorm {
            rows = values.chunks_exact(model.config().hidden_size).map(<[f32]>::to_vec).collect();
        }
    });
    rows
}

/// The mean of `rows`, position after position, at length 1.
fn mean_vector(rows: &[Vec<f32>]) -> Vec<f32> {
    let sum = |d: usize| rows[1..].iter().fold(rows[0][d], |sum, row| sum + row[d]);
    unit((0..rows[0].len()).map(|d| sum(d) / rows.len() as f32).collect())
}

/// The lanes and their tree, written out.
fn unit(vector: Vec<f32>) -> Vec<f32> {
    let mut lanes = [0.0_f32; 16];
    vector.iter().enumerate().for_each(|(i, value)| lanes[i % 16] = value.mul_add(*value, lanes[i % 16]));
    for half in [8, 4, 2, 1] {
        (0..half).for_each(|lane| lanes[lane] += lanes[lane + half]);
    }
    vector.iter().map(|value| value / lanes[0].sqrt()).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[tokio::test]
async fn vectors_are_those_of_the_library_whatever_is_computed_beside_them() {
    let prompts: Vec<Vec<u32>> = golden::load("p1_packed").prompts.into_iter().map(|prompt| prompt.ids).collect();
    for mode in ["mean", "last"] {
        let dir = embedding_model("library", "p1_packed", mode);
        let expected: Vec<_> = prompts
            .iter()
            .map(|ids| hidden_states(&dir, ids))
            .map(|rows| if mode == "mean" { mean_vector(&rows) } else { unit(rows[rows.len() - 1].clone()) })
            .collect();
        for args in [
            ["--threads", "1", "--max-num-batched-tokens", "512"],
            ["--threads", "2", "--max-num-batched-tokens", "16"],
        ] {
            let server = serve(&dir, &args);
            // All at once and again, when there are prefixes to find, then each alone.
            for _ in 0..2 {
                assert_eq!(embed(&server, json!(prompts)).await, expected, "{mode} {args:?}");
            }
            for (ids, expected) in prompts.iter().zip(&expected) {
                assert_eq!(embed(&server, json!(ids)).await[0], *expected, "{mode} {args:?}");
            }
        }
    }
}

#[tokio::test]
async fn vectors_are_close_to_the_reference() {
    for name in MODELS {
        let golden = golden::load(name);
        let ids = &golden.prompts.iter().find(|prompt| prompt.category == "short").expect("a short prompt").ids;
        let states = golden::array(&format!("{name}.golden.safetensors"), "short.internal.final_norm");
        let rows: Vec<_> = states.chunks_exact(states.len() / ids.len()).map(<[f32]>::to_vec).collect();
        let server = serve(&embedding_model("reference", name, "mean"), &[]);
        let cosine = cosine(&embed(&server, json!(ids)).await[0], &mean_vector(&rows));
        assert!(cosine > 0.9999, "{name}: {cosine}");
    }
}

/// More inputs than the queue has places, beside another caller.
#[tokio::test]
async fn many_inputs_take_turns() {
    let server = serve(&embedding_model("turns", "p1_packed", "mean"), &["--max-queue", "3", "--max-num-seqs", "2"]);
    let texts: Vec<String> = (0..150).map(|i| format!("text number {i}")).collect();
    let (all, one) = tokio::join!(embed(&server, json!(texts)), embed(&server, json!("text number 149")));
    assert_eq!((all.len(), &all[149]), (150, &one[0]));
    assert_eq!(server.metric("bitnet_requests_waiting").await, 0.0);
}
