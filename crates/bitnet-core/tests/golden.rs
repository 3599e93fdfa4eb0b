//! The golden references: four small checkpoints and their GGUF files against transformers in float32, by rules 1 to 6
//! of `tests/golden/README.md`, with the KV cache in float32. `-- --nocapture` prints the figures reached.

mod common;

use std::{collections::HashMap, fs, path::PathBuf};

use bitnet_core::{
    TokenId,
    checkpoint::{LayerTensors, TernaryTensor},
    kv_cache::KvDtype,
    model::{LogitRows, TracePoint},
};
use common::{Engine, Setup, Share, golden, open};
use serde_json::Value;

const MODELS: [&str; 4] = ["p1_packed", "p2_master", "p3_llama", "p4_silu"];
const GGUF_FORMATS: [&str; 4] = ["f16", "i2_s", "tq1_0", "tq2_0"];
const CHUNK: usize = 64;
const GREEDY_TOKENS: usize = 64;

/// Where greedy generation leaves the reference although transformers' own variants agree: (model, prompt, step).
///
/// At this step the two best logits are 0.031 apart, on logits of standard deviation 3. An activation code of position 18
/// lies 1e-5 from a rounding boundary; sequential sums over the head (attention scores of 22) land on its other side.
const NEAR_TIES: [(&str, &str, usize); 1] = [("p1_packed", "one_word", 48)];

#[test]
fn rule_1_clean_prompts() {
    for file in exact_files() {
        let clean = file.json("clean");
        let arrays = file.arrays("clean");
        let mut engine = file.engine();
        let mut worst_by_prompt = Vec::new();
        let mut num_sharp = 0;
        for (i, prompt) in items(&clean["prompts"]).iter().enumerate() {
            let logits = engine.all_logits(&ids(&prompt["ids"]), CHUNK);
            let worst = max_difference(&logits.concat(), &arrays[&format!("clean{i}.logits.f32")]);
            let same_argmax = logits.iter().map(|row| argmax(row)).eq(ids(&prompt["argmax"]));
            num_sharp += usize::from(worst <= 1e-3 && same_argmax);
            worst_by_prompt.push(worst);
        }
        worst_by_prompt.sort_by(f32::total_cmp);
        let (median, worst) = (worst_by_prompt[worst_by_prompt.len() / 2], worst_by_prompt[worst_by_prompt.len() - 1]);
        println!("rule 1  {file:<16} median {median:.1e}  within 1e-3 {num_sharp}/16  worst {worst:.1e}");
        assert_eq!(worst_by_prompt.len(), 16);
        assert!(median <= 1e-4 && num_sharp >= 12 && worst <= 1.0, "{file}");
    }
}

#[test]
fn rule_2_modules_of_layer_0() {
    for file in exact_files() {
        let reference = file.arrays("golden");
        let json = file.json("golden");
        let short = &json["prompts"][json["all_positions_prompt"].as_u64().expect("an index") as usize];
        let tokens = ids(&short["ids"]);
        let mut engine = file.engine();
        let batch = engine.batch(&[Share { slot: 0, tokens: &tokens, start: 0, logits: LogitRows::All }]);
        let mut modules = Vec::new();
        engine.model.forward_traced(&batch, &mut engine.kv, &mut engine.workspace, &mut |point, layer, values| {
            modules.push((module_name(point, layer), values.to_vec()));
        });
        let (mut worst, mut num_compared) = (0.0f32, 0);
        for (module, values) in &modules {
            let Some(expected) = reference.get(&format!("short.internal.{module}")) else { continue };
            let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let relative = max_difference(values, expected) / largest;
            assert!(relative <= 1e-5, "{file}: {module} differs by {relative:e}, the first that does");
            worst = worst.max(relative);
            num_compared += 1;
        }
        println!("rule 2  {file:<16} {num_compared} modules, worst relative {worst:.1e}");
        assert_eq!(num_compared, reference.keys().filter(|name| name.starts_with("short.internal.")).count(), "{file}");
    }
}

#[test]
fn rule_3_long_prompts_teacher_forced() {
    for file in all_files() {
        let reference = file.arrays("golden");
        let json = file.json("golden");
        let mut engine = file.engine();
        let (mut differences, mut agreement, mut agreement_everywhere) =
            (Vec::new(), Agreement::default(), Agreement::default());
        for (i, prompt) in items(&json["prompts"]).iter().enumerate() {
            let forced = Forced::run(&mut engine, prompt);
            agreement_everywhere.add(forced.num_equal(), GREEDY_TOKENS);
            differences.extend(differences_of(forced.greedy_row(0), &reference[&format!("prompt{i}.last_logits.f32")]));
            differences
                .extend(differences_of(&forced.top_5(), &reference[&format!("prompt{i}.greedy_logits_top5.f32")]));
            if prompt["category"] == "long" {
                agreement.add(forced.num_equal(), GREEDY_TOKENS);
            }
            if json["all_positions_prompt"] == i {
                let all = &reference["short.teacher_forced_logits.f32"];
                differences.extend(differences_of(&forced.logits.concat(), all));
                let expected = all.chunks_exact(forced.logits[0].len()).map(argmax);
                let num_equal = forced.logits.iter().zip(expected).filter(|(row, best)| argmax(row) == *best).count();
                agreement.add(num_equal, forced.logits.len());
            }
        }
        let rms = root_mean_square(&differences);
        println!(
            "rule 3  {file:<16} rms {rms:.1e}  argmax agreement {:.3}  of all prompts' greedy tokens {:.3}",
            agreement.value(),
            agreement_everywhere.value()
        );
        assert!(rms <= 0.15 && agreement.value() >= 0.93, "{file}");
        // A file with rounded scales is a slightly different model: 0.927 where this was measured.
        let least = if is_exact(file.model, file.format) { 0.97 } else { 0.92 };
        assert!(agreement_everywhere.value() >= least, "{file}");
    }
}

#[test]
fn rule_4_greedy_tokens() {
    for file in exact_files() {
        let mut engine = file.engine();
        let (mut num_whole, mut agreement, mut near_ties) = (0, Agreement::default(), Vec::new());
        for prompt in items(&file.json("golden")["prompts"]) {
            let reference = ids(&prompt["greedy_f32"]);
            let category = prompt["category"].as_str().expect("a name");
            let variants = prompt["greedy_variants_agree"].as_object().expect("an object");
            let stable = variants.values().all(|agrees| agrees == true);
            if stable || ["p3_llama", "p4_silu"].contains(&file.model) {
                let tokens = generate(&mut engine, &ids(&prompt["ids"]));
                match tokens.iter().zip(&reference).position(|(ours, theirs)| ours != theirs) {
                    None => num_whole += 1,
                    Some(step) => near_ties.push((file.model, category.to_owned(), step)),
                }
                continue;
            }
            let forced = Forced::run(&mut engine, prompt);
            agreement.add(forced.num_equal(), GREEDY_TOKENS);
            for (step, margin) in items(&prompt["greedy_margins"]).iter().enumerate() {
                let equal = argmax(forced.greedy_row(step)) == reference[step];
                assert!(equal || number(margin) <= 1.0, "{file}: {category} step {step}");
            }
        }
        println!("rule 4  {file:<16} {num_whole} prompts exact, near ties {near_ties:?}, forced {agreement:?}");
        assert!(agreement.value() >= 0.93, "{file}");
        assert!(
            near_ties.iter().all(|(model, category, step)| NEAR_TIES.contains(&(model, category, *step))),
            "{file}"
        );
    }
}

#[test]
fn rule_5_fixed_text() {
    for file in exact_files() {
        let json = file.json("golden");
        let tokens = ids(&json["fixed_text"]["ids"]);
        let logits = file.engine().all_logits(&tokens, CHUNK);
        let logprobs: Vec<f32> = logits.iter().zip(&tokens[1..]).map(|(row, &next)| logprob(row, next)).collect();
        let reference = &file.arrays("golden")["text.logprobs.f32"];
        let single = max_difference(&logprobs, reference);
        let sum: f64 = differences_of(&logprobs, reference).sum::<f64>().abs();
        println!("rule 5  {file:<16} summed nll {sum:.1e}  single log-probability {single:.1e}");
        assert!(sum <= 3.0 && single <= 1.0, "{file}");
    }
}

#[test]
fn rule_6_gguf_codes_and_scales() {
    for model in MODELS {
        let reference = open(&golden(model));
        for format in GGUF_FORMATS {
            let file = open(&golden(&format!("{model}.{format}.gguf")));
            let mut worst_scale = 0.0f32;
            assert_eq!(file.weights.layers.len(), reference.weights.layers.len());
            for (ours, theirs) in file.weights.layers.iter().zip(&reference.weights.layers) {
                for (ours, theirs) in linears(ours).into_iter().zip(linears(theirs)) {
                    let ((codes, scale), (expected, expected_scale)) = (decode(ours), decode(theirs));
                    assert!(codes == expected, "{model}.{format}: codes differ");
                    worst_scale = worst_scale.max((scale - expected_scale).abs() / expected_scale);
                }
            }
            println!("rule 6  {model}.{format}: codes equal, scales within {worst_scale:.1e}");
            // Masters get their scale from a mean, whose last bits depend on the order torch sums in.
            let exact = if model == "p2_master" { 2f32.powi(-22) } else { 0.0 };
            assert!(worst_scale <= if is_exact(model, format) { exact } else { 2f32.powi(-11) }, "{model}.{format}");
        }
    }
}

/// One file of a golden model.
struct GoldenFile {
    model: &'static str,
    format: &'static str,
    path: PathBuf,
}

impl std::fmt::Display for GoldenFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{}.{}", self.model, self.format))
    }
}

impl GoldenFile {
    fn engine(&self) -> Engine {
        Engine::new(&open(&self.path), KvDtype::F32, Setup::default())
    }

    fn json(&self, kind: &str) -> Value {
        let path = golden(&format!("{}.{kind}.json", self.model));
        serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON")
    }

    /// The float32 arrays of a safetensors file.
    fn arrays(&self, kind: &str) -> HashMap<String, Vec<f32>> {
        let bytes = fs::read(golden(&format!("{}.{kind}.safetensors", self.model))).expect("readable");
        let (length, rest) = bytes.split_first_chunk().expect("a header");
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let header: HashMap<String, Value> = serde_json::from_slice(header).expect("JSON");
        let offset = |entry: &Value, i: usize| entry["data_offsets"][i].as_u64().map(|offset| offset as usize);
        let array = |entry: &Value| {
            let bytes = &data[offset(entry, 0)?..offset(entry, 1)?];
            Some(bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect())
        };
        header.iter().filter_map(|(name, entry)| Some((name.clone(), array(entry)?))).collect()
    }
}

/// Every model as a Hugging Face directory and in every GGUF format.
fn all_files() -> Vec<GoldenFile> {
    let directory = |model| GoldenFile { model, format: "hf", path: golden(model) };
    let gguf = |model, format| GoldenFile { model, format, path: golden(&format!("{model}.{format}.gguf")) };
    MODELS
        .into_iter()
        .flat_map(|model| [directory(model)].into_iter().chain(GGUF_FORMATS.map(|format| gguf(model, format))))
        .collect()
}

/// The files that hold the reference's scales exactly; the others are held to rule 3 alone.
fn exact_files() -> Vec<GoldenFile> {
    all_files().into_iter().filter(|file| is_exact(file.model, file.format)).collect()
}

/// F16, TQ1_0 and TQ2_0 round the scales to f16: without loss only where they were bf16.
fn is_exact(model: &str, format: &str) -> bool {
    ["hf", "i2_s"].contains(&format) || ["p1_packed", "p4_silu"].contains(&model)
}

/// Logits of a prompt and its reference continuation, in one pass.
struct Forced {
    logits: Vec<Vec<f32>>,
    prompt_len: usize,
    greedy: Vec<TokenId>,
}

impl Forced {
    fn run(engine: &mut Engine, prompt: &Value) -> Self {
        let (prompt, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_f32"]));
        let logits = engine.all_logits(&[&prompt[..], &greedy].concat(), CHUNK);
        Self { logits, prompt_len: prompt.len(), greedy }
    }

    /// The logits that predict greedy token `step`.
    fn greedy_row(&self, step: usize) -> &[f32] {
        &self.logits[self.prompt_len - 1 + step]
    }

    fn num_equal(&self) -> usize {
        (0..GREEDY_TOKENS).filter(|&step| argmax(self.greedy_row(step)) == self.greedy[step]).count()
    }

    /// The five largest logits of each greedy step, descending.
    fn top_5(&self) -> Vec<f32> {
        let top = |step| {
            let mut row = self.greedy_row(step).to_vec();
            row.sort_by(|a, b| b.total_cmp(a));
            row.truncate(5);
            row
        };
        (0..GREEDY_TOKENS).flat_map(top).collect()
    }
}

/// So many of so many.
#[derive(Clone, Copy, Debug, Default)]
struct Agreement {
    num_equal: usize,
    num_compared: usize,
}

impl Agreement {
    fn add(&mut self, num_equal: usize, num_compared: usize) {
        self.num_equal += num_equal;
        self.num_compared += num_compared;
    }

    /// 1 when nothing was compared.
    fn value(self) -> f64 {
        if self.num_compared == 0 { 1.0 } else { self.num_equal as f64 / self.num_compared as f64 }
    }
}

/// Prefills `prompt` and generates token by token.
fn generate(engine: &mut Engine, prompt: &[TokenId]) -> Vec<TokenId> {
    let mut tokens = Vec::with_capacity(GREEDY_TOKENS);
    let mut next = argmax(engine.all_logits(prompt, CHUNK).last().expect("a prompt"));
    while tokens.len() < GREEDY_TOKENS {
        tokens.push(next);
        let start = prompt.len() + tokens.len() - 1;
        let share = Share { slot: 0, tokens: &[next], start, logits: LogitRows::Last };
        engine.step(&[share], |row| next = argmax(row));
    }
    tokens
}

/// The reference's name of a traced point.
fn module_name(point: TracePoint, layer: usize) -> String {
    let module = match point {
        TracePoint::Embedding => return "embed".into(),
        TracePoint::OutputNorm => return "final_norm".into(),
        TracePoint::AttnNorm => "input_layernorm",
        TracePoint::Query => "self_attn.q_proj",
        TracePoint::Key => "self_attn.k_proj",
        TracePoint::Value => "self_attn.v_proj",
        TracePoint::AttnSubNorm => "self_attn.attn_sub_norm",
        TracePoint::AttnOutput => "self_attn.o_proj",
        TracePoint::FfnNorm => "post_attention_layernorm",
        TracePoint::Gate => "mlp.gate_proj",
        TracePoint::Up => "mlp.up_proj",
        TracePoint::FfnSubNorm => "mlp.ffn_sub_norm",
        TracePoint::FfnOutput => "mlp.down_proj",
        TracePoint::LayerOutput => "out",
    };
    format!("layer{layer}.{module}")
}

fn linears(layer: &LayerTensors) -> [&TernaryTensor; 7] {
    [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down]
}

fn decode(tensor: &TernaryTensor) -> (Vec<i8>, f32) {
    let reader = tensor.reader().expect("finite");
    let mut codes = vec![0; tensor.rows * tensor.cols];
    for (row, codes) in codes.chunks_exact_mut(tensor.cols).enumerate() {
        reader.decode_row(row, codes).expect("trits");
    }
    (codes, reader.scale())
}

fn items(value: &Value) -> &[Value] {
    value.as_array().expect("an array")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn ids(value: &Value) -> Vec<TokenId> {
    items(value).iter().map(|id| TokenId(id.as_u64().expect("an id") as u32)).collect()
}

/// The largest logit's id, the lower one of a tie.
fn argmax(row: &[f32]) -> TokenId {
    let best = row.iter().enumerate().fold(0, |best, (id, value)| if *value > row[best] { id } else { best });
    TokenId(best as u32)
}

fn logprob(row: &[f32], id: TokenId) -> f32 {
    let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
    (f64::from(row[id.index()]) - sum.ln()) as f32
}

fn differences_of(ours: &[f32], theirs: &[f32]) -> impl Iterator<Item = f64> {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b))
}

fn max_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    differences_of(ours, theirs).fold(0.0, |max: f64, d| if d.abs() <= max { max } else { d.abs() }) as f32
}

fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|d| d * d).sum::<f64>() / values.len() as f64).sqrt()
}
