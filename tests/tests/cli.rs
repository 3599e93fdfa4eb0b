//! The command line: exit codes, one-line errors, `inspect`, `run`, the first run without a model.

use std::{
    fs, io,
    process::{Child, Command, Output, Stdio},
};

use bitnet_tests::{
    golden,
    server::{Server, binary, bitnet, scratch},
};
use serde_json::{Value, json};

#[test]
fn wrong_usage_is_64() {
    assert_one_line(&bitnet(&["serve", "--no-such-flag"]), 64, "--no-such-flag");
    assert_one_line(&bitnet(&["run"]), 64, "--model");
    assert_one_line(&bitnet(&["frobnicate"]), 64, "frobnicate");
}

#[test]
fn a_missing_model_is_66() {
    for command in ["serve", "inspect", "run"] {
        assert_one_line(&bitnet(&[command, "-m", "/no/such/model.gguf"]), 66, "/no/such/model.gguf");
    }
    let batch = ["batch", "-m", "/no/such/model.gguf", "-i", "/dev/null", "-o", "/no/such/out"];
    assert_one_line(&bitnet(&batch), 66, "/dev/null");
}

#[test]
fn a_broken_model_is_65_and_one_line() {
    let whole = fs::read(golden::path("p1_packed.i2_s.gguf")).expect("the golden file is there");
    let folder = scratch("broken");
    let cut = folder.join("cut.gguf");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("scratch is writable");
    let noise = folder.join("noise.gguf");
    fs::write(&noise, b"this is no model").expect("scratch is writable");
    let empty = folder.join("empty.gguf");
    fs::write(&empty, b"").expect("scratch is writable");
    for path in [cut, noise, empty, folder.clone()] {
        let path = path.to_str().expect("UTF-8");
        assert_one_line(&bitnet(&["serve", "--port", "0", "-m", path]), 65, path);
        assert_one_line(&bitnet(&["inspect", "-m", path]), 65, path);
    }
}

#[test]
fn a_wrong_configuration_is_78() {
    let model = golden::arg("p1_packed");
    for (args, word) in [
        (&["--kernel", "x86_64-avx9000"][..], "x86_64-avx9000"),
        (&["--host", "0.0.0.0"], "--insecure"),
        (&["--api-key-file", "/no/such/keys"], "/no/such/keys"),
        (&["--max-num-seqs", "0"], "max-num-seqs"),
        (&["--memory-limit", "1MB"], "memory"),
        (&["--data-dir", "/proc/no/such"], "--data-dir"),
        (&["--max-file-bytes", "many"], "max-file-bytes"),
    ] {
        let args = [&["serve", "--port", "0", "-m", &model], args].concat();
        assert_one_line(&bitnet(&args), 78, word);
    }
    let folder = scratch("config");
    let file = folder.join("bitnet.toml");
    fs::write(&file, "max-num-seqs = 4\nno-such-key = 1\n").expect("scratch is writable");
    assert_one_line(&bitnet(&["serve", "--config", file.to_str().expect("UTF-8")]), 78, "no-such-key");
}

#[test]
fn check_config_validates_and_exits() {
    let model = golden::arg("p1_packed");
    let output = bitnet(&["serve", "--check-config", "-m", &model]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_one_line(&bitnet(&["serve", "--check-config", "--max-num-seqs", "0"]), 78, "max-num-seqs");
}

#[test]
fn inspect_tells_what_a_file_holds() {
    for file in ["p1_packed", "p1_packed.i2_s.gguf", "p3_llama", "p4_silu.tq1_0.gguf"] {
        let output = bitnet(&["inspect", "-m", &golden::arg(file), "--json"]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let facts: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(facts["geometry"]["hidden_size"], json!(256), "{facts}");
        assert_eq!(facts["geometry"]["vocab_size"], json!(512), "{facts}");
        assert!(facts["tensors"].as_array().is_some_and(|list| list.len() > 20), "{facts}");
        let text = bitnet(&["inspect", "-m", &golden::arg(file)]);
        assert!(String::from_utf8_lossy(&text.stdout).contains("256"));
    }
}

#[test]
fn run_generates_the_same_text_for_the_same_seed() {
    let model = golden::arg("p3_llama");
    let generate = |seed: &str| {
        let output = bitnet(&["run", "-m", &model, "-p", "The first", "-n", "12", "--seed", seed]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    assert_eq!(generate("5"), generate("5"));
    assert_ne!(generate("5"), generate("6"));
    let chat = bitnet(&["run", "-m", &model, "--chat", "-p", "Hello", "-n", "4", "--temperature", "0"]);
    assert_eq!(chat.status.code(), Some(0), "{}", String::from_utf8_lossy(&chat.stderr));
}

#[test]
fn bench_prints_one_object_of_the_contract() {
    let cases = "prefill:20,decode:2,decode:1@64";
    let output = bitnet(&["bench", "-m", &golden::arg("p1_packed"), "--threads", "2", "--json", "--only", cases]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // The whole of stdout is the object.
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(keys(&report), ["machine", "model", "results"]);
    let machine = ["threads", "kernel", "packing", "read_bytes_per_s", "int8_macs_per_s"];
    assert_eq!(keys(&report["machine"]), machine);
    assert_eq!(report["machine"]["threads"], 2);
    assert_eq!(keys(&report["model"]), ["name", "file_bytes", "resident_bytes", "load_seconds"]);
    let results = report["results"].as_array().expect("a list of results");
    let told = |row: &Value| ["phase", "tokens", "batch", "context"].map(|key| row[key].clone());
    let expected = [
        [json!("prefill"), json!(20), json!(1), json!(0)],
        [json!("decode"), json!(16), json!(2), json!(0)],
        [json!("decode"), json!(16), json!(1), json!(64)],
    ];
    assert_eq!(results.iter().map(told).collect::<Vec<_>>(), expected);
    let measured = ["tokens_per_s", "bytes_per_token", "macs_per_token", "share_of_limit"];
    for row in results {
        assert_eq!(keys(row), [&["phase", "tokens", "batch", "context"][..], &measured].concat());
        assert!(measured.iter().all(|&key| row[key].as_f64().is_some_and(|value| value > 0.0)), "{row}");
    }
}

#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let model = golden::arg("p1_packed");
    let commands: [&[&str]; 4] = [
        &["inspect", "-m", &model],
        &["inspect", "-m", &model, "--json"],
        &["run", "-m", &model, "-p", "The first", "-n", "4"],
        &["bench", "-m", &model, "--only", "decode:1"],
    ];
    for command in commands {
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        let process = Command::new(binary()).args(command).stdout(writer).stderr(Stdio::piped()).spawn();
        let output = process.and_then(Child::wait_with_output).expect("the binary runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{command:?}: {text}");
        assert!(!text.contains("panicked") && !text.contains("bitnet: "), "{command:?}: {text}");
    }
}

#[test]
fn bench_refuses_what_it_cannot_measure() {
    let model = golden::arg("p1_packed");
    for case in ["decode", "prefill:0", "prefill:1@2", "decode:1,", "encode:1"] {
        assert_one_line(&bitnet(&["bench", "-m", &model, "--only", case]), 64, "--only");
    }
    assert_one_line(&bitnet(&["bench"]), 64, "--model");
    assert_one_line(&bitnet(&["bench", "--synthetic", "9t"]), 64, "9t");
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[tokio::test]
async fn the_first_run_needs_no_model_and_its_curl_line_works() {
    let server = Server::start(&[]);
    let banner = server.banner();
    assert!(banner.contains("random weights") && banner.contains("--model"), "{banner}");
    let models = server.get("/v1/models").await.ok();
    assert!(models["data"][0].to_string().contains("random"), "{models}");
    let body = banner.split_once("-d '").and_then(|(_, rest)| rest.split_once('\'')).expect("a curl line").0;
    let body: Value = serde_json::from_str(body).expect("the curl line holds JSON");
    let path = "/v1/chat/completions";
    assert!(banner.contains(&server.url(path)), "{banner}");
    let answer = server.post(path, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(!answer.body.is_empty());
}

/// The process ended with `code` and said one line on stderr that holds `word`; no backtrace.
fn assert_one_line(output: &Output, code: i32, word: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    let errors: Vec<_> = text.lines().filter(|line| line.starts_with("bitnet: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    assert!(errors[0].contains(word), "no {word:?} in {text}");
    assert!(!text.contains("panicked"), "{text}");
}
