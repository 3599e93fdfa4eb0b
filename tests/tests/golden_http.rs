//! The golden references through the real binary: what HTTP can show of rules 1, 4 and 5, and `/tokenize`.
//!
//! The same rules run on logits, sharper and for every file, in bitnet-core's own tests.

use bitnet_tests::{
    golden::{self, MODELS},
    server::Server,
};
use serde_json::{Value, json};

/// Every file of every checkpoint whose scales are exact; p2 and p3 as GGUF hold rounded ones (rule 6).
const EXACT: [&str; 13] = [
    "p1_packed",
    "p1_packed.f16.gguf",
    "p1_packed.i2_s.gguf",
    "p1_packed.tq1_0.gguf",
    "p1_packed.tq2_0.gguf",
    "p2_master",
    "p2_master.i2_s.gguf",
    "p3_llama",
    "p3_llama.i2_s.gguf",
    "p4_silu",
    "p4_silu.f16.gguf",
    "p4_silu.i2_s.gguf",
    "p4_silu.tq1_0.gguf",
];

#[tokio::test]
async fn clean_prompts_have_the_reference_log_probabilities() {
    for file in EXACT {
        let name = file.split('.').next().expect("a name");
        let server = serve(file);
        let mut worst = Vec::new();
        for (i, prompt) in golden::load_clean(name).prompts.iter().enumerate() {
            let logits = golden::array(&format!("{name}.clean.safetensors"), &format!("clean{i}.logits.f32"));
            let vocab = logits.len() / prompt.ids.len();
            let logprobs = echo_logprobs(&server, &prompt.ids).await;
            let difference = (1..prompt.ids.len())
                .map(|t| (log_softmax(&logits[(t - 1) * vocab..t * vocab], prompt.ids[t]) - logprobs[t]).abs())
                .fold(0.0, f64::max);
            worst.push(difference);
        }
        worst.sort_by(f64::total_cmp);
        assert!(worst[worst.len() / 2] <= 1e-4, "{file}: {worst:?}");
        assert!(worst[11] <= 1e-3, "{file}: {worst:?}");
        assert!(worst[15] <= 1.0, "{file}: {worst:?}");
    }
}

#[tokio::test]
async fn the_fixed_text_has_the_reference_likelihood() {
    for name in MODELS {
        let text = golden::load(name).fixed_text;
        let logprobs = echo_logprobs(&serve(name), &text.ids).await;
        let nll: f64 = -logprobs[1..].iter().sum::<f64>();
        assert!((nll - text.nll_sum_f32).abs() <= 3.0, "{name}: {nll} against {}", text.nll_sum_f32);
        for (t, (ours, reference)) in logprobs[1..].iter().zip(&text.logprobs_f32).enumerate() {
            assert!((ours - reference).abs() <= 1.0, "{name}, token {t}: {ours} against {reference}");
        }
    }
}

/// The one prompt whose greedy tokens leave the reference, and where: bitnet-core's golden test says why.
const NEAR_TIE: (&str, &str, usize) = ("p1_packed", "one_word", 48);

#[tokio::test]
async fn greedy_tokens_are_those_of_the_reference() {
    let (mut num_equal, mut num_compared) = (0, 0);
    for name in MODELS {
        let server = serve(name);
        let always = matches!(name, "p3_llama" | "p4_silu");
        for prompt in golden::load(name).prompts {
            let stable =
                prompt.greedy_variants_agree.as_object().is_some_and(|v| v.values().all(|agree| agree == true));
            if !(always || stable) {
                continue;
            }
            let body = json!({"prompt": prompt.ids, "max_tokens": 64, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
            let answer = server.post("/v1/completions", &body).await.ok();
            assert_eq!(answer["choices"][0]["prompt_token_ids"], json!(prompt.ids), "{name}, {}", prompt.category);
            let tokens = answer["choices"][0]["token_ids"].as_array().expect("a list");
            assert_eq!(tokens.len(), prompt.greedy_f32.len());
            let difference = tokens.iter().zip(&prompt.greedy_f32).position(|(ours, theirs)| *ours != json!(theirs));
            if let Some(step) = difference {
                assert_eq!((name, prompt.category.as_str(), step), NEAR_TIE, "another token");
            }
            num_equal += usize::from(difference.is_none());
            num_compared += 1;
        }
    }
    assert!(num_compared >= 18 && num_equal + 1 >= num_compared, "{num_equal} of {num_compared} prompts are equal");
}

#[tokio::test]
async fn tokenize_gives_the_reference_ids() {
    for name in MODELS {
        for file in [name.to_owned(), format!("{name}.i2_s.gguf")] {
            let server = serve(&file);
            for vector in golden::load(name).tokenizer_vectors {
                let body = json!({"prompt": vector.text, "add_special_tokens": false});
                let answer = server.post("/tokenize", &body).await.ok();
                assert_eq!(answer["tokens"], json!(vector.ids), "{file}: {:?}", vector.text);
                assert_eq!(answer["count"], json!(vector.ids.len()));
            }
        }
    }
}

fn serve(file: &str) -> Server {
    Server::start(&["-m", &golden::arg(file), "--kv-cache-type", "f32"])
}

/// Log-probability of each prompt token; the first is 0 in place of the reference's "none".
async fn echo_logprobs(server: &Server, ids: &[u32]) -> Vec<f64> {
    let body = json!({"prompt": ids, "max_tokens": 0, "echo": true, "logprobs": 0});
    let answer = server.post("/v1/completions", &body).await.ok();
    let list = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("a list").clone();
    assert_eq!(list.len(), ids.len());
    assert_eq!(list[0], Value::Null);
    list.iter().map(|v| v.as_f64().unwrap_or(0.0)).collect()
}

fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    f64::from(logits[id as usize] - max) - sum.ln()
}
