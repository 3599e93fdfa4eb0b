//! `/v1/embeddings` of an embedding model, and what else such a model says.

use bitnet_core::checkpoint::Pooling;
use serde_json::{Value, json};

use super::*;

fn serve() -> Fixture {
    Setup { pooling: Some(Pooling::Mean), ..Setup::saying("x") }.start()
}

async fn embed(server: &Fixture, body: Value) -> Value {
    let reply = server.post("/v1/embeddings", body.to_string()).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    reply.json()
}

/// The value of the first series that starts with `name`.
async fn metric(server: &Fixture, name: &str) -> f64 {
    let text = server.get("/metrics").await.text();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// What the scripted model gives for a text that ends with `byte`.
fn vector(byte: u8) -> Value {
    let (sin, cos) = f32::from(byte).sin_cos();
    // As text, which has the digits of a single number.
    serde_json::from_str(&format!("[{sin},{cos}]")).unwrap()
}

#[tokio::test]
async fn every_form_of_input_is_answered_in_order() {
    let server = serve();
    let a = [vector(b'a')];
    let both = [vector(b'a'), vector(b'b')];
    let (a, both): (&[Value], &[Value]) = (&a, &both);
    // BOS counts where the tokenizer puts it.
    let cases = [
        (json!("xa"), a, 3),
        (json!(["xa"]), a, 3),
        (json!(["a", "yb"]), both, 5),
        (json!([120, 97]), a, 2),
        (json!([[97], [97, 98]]), both, 3),
    ];
    for (input, vectors, num_tokens) in cases {
        let answer = embed(&server, json!({"model": "alias", "input": input, "user": "me"})).await;
        let data = vectors.iter().enumerate();
        let data = data.map(|(index, vector)| json!({"object": "embedding", "index": index, "embedding": vector}));
        let usage = json!({"prompt_tokens": num_tokens, "total_tokens": num_tokens});
        let expected =
            json!({"object": "list", "data": data.collect::<Vec<_>>(), "model": "org/model", "usage": usage});
        assert_eq!(answer, expected, "{input}");
    }
    let many: Vec<_> = (0..100).map(|i| if i % 2 == 0 { "a" } else { "b" }).collect();
    let answer = embed(&server, json!({"input": many})).await;
    for (index, data) in answer["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&data["index"], &data["embedding"]), (&json!(index), &both[index % 2]));
    }
    assert_eq!(metric(&server, "bitnet_prompt_tokens_total").await, 216.0);
}

#[tokio::test]
async fn base64_holds_the_same_numbers() {
    let server = serve();
    let answer = embed(&server, json!({"input": "a", "encoding_format": "base64"})).await;
    let (sin, cos) = 97_f32.sin_cos();
    let bytes = [sin.to_le_bytes(), cos.to_le_bytes()].concat();
    let expected = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, bytes);
    assert_eq!(answer["data"][0]["embedding"], expected);
    let answer = embed(&server, json!({"input": "a", "encoding_format": "float", "dimensions": null})).await;
    assert_eq!(answer["data"][0]["embedding"], vector(b'a'));
}

#[tokio::test]
async fn what_cannot_be_embedded_is_named() {
    let server = serve();
    let (long, many) = (json!({"input": "x".repeat(256)}), json!({"input": vec!["x"; 2049]}));
    let cases = [
        (json!({"input": ""}), "input", "invalid_value"),
        (json!({"input": ["x", ""]}), "input", "invalid_value"),
        (json!({"input": []}), "input", "invalid_value"),
        (json!({"input": [[]]}), "input", "invalid_value"),
        (json!({"input": [[1], []]}), "input", "invalid_value"),
        (json!({"input": [258]}), "input", "invalid_value"),
        (json!({"input": ["x", 1]}), "input", "invalid_value"),
        (json!({"input": 1}), "input", "invalid_value"),
        (many, "input", "invalid_value"),
        (json!({}), "input", "missing_required_parameter"),
        (json!({"input": "x", "encoding_format": "hex"}), "encoding_format", "invalid_value"),
        (json!({"input": "x", "dimensions": 2}), "dimensions", "unsupported_parameter"),
        (json!({"input": "x", "priority": "high"}), "priority", "invalid_value"),
        (long, "input", "context_length_exceeded"),
    ];
    for (body, param, code) in cases {
        let reply = server.post("/v1/embeddings", body.to_string()).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{body}");
        let error = reply.error();
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), Some(code)), "{body}: {error}");
    }
    // The whole context, BOS included, and the poison that makes values which are not finite.
    embed(&server, json!({"input": "x".repeat(255)})).await;
    let reply = server.post("/v1/embeddings", r#"{"input":["x","\u0001","x"]}"#).await;
    assert_eq!((reply.status, &reply.error()["type"]), (StatusCode::INTERNAL_SERVER_ERROR, &json!("server_error")));
}

#[tokio::test]
async fn an_embedding_model_generates_no_text() {
    let server = serve();
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "stream": true})),
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/responses", json!({"input": "x"})),
    ] {
        let reply = server.post(path, body.to_string()).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{path}");
        let error = reply.error();
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some("model"), Some("invalid_value")), "{path}");
        assert!(error["message"].as_str().unwrap().contains("/v1/embeddings"), "{error}");
    }
    let reply = server.post("/v1/embeddings", r#"{"model":"other","input":"x"}"#).await;
    assert_eq!((reply.status, reply.error()["code"].as_str()), (StatusCode::NOT_FOUND, Some("model_not_found")));
}

#[tokio::test]
async fn texts_pass_the_content_filter() {
    let mut setup = Setup { pooling: Some(Pooling::Last), ..Setup::saying("x") };
    setup.config.content_filter = Some(rules(
        "[[rule]]\nid = \"a\"\ncategory = \"c\"\nmatch = \"literal\"\npatterns = [\"secret\"]\n\
         direction = \"input\"\naction = \"block\"\nseverity = \"high\"\n",
    ));
    let server = setup.start();
    for input in [json!(["fine", "a secret"]), json!([115, 101, 99, 114, 101, 116])] {
        let reply = server.post("/v1/embeddings", json!({"input": input}).to_string()).await;
        let error = reply.error();
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some("input"), Some("content_filtered")));
    }
    embed(&server, json!({"input": "fine"})).await;
}

/// Whoever goes takes his inputs with him, those that wait for a place too.
#[tokio::test]
async fn leaving_ends_the_work() {
    let server = serve();
    let held = Arc::clone(&server.hold).lock_owned().await;
    let state = Arc::clone(&server.state);
    let waiting = move || state.service().unwrap().engine().status();
    let request = embed(&server, json!({"input": vec!["x"; 50]}));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(100), request).await.is_err());
    drop(held);
    while waiting().waiting + waiting().running > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    embed(&server, json!({"input": "x"})).await;
    assert_eq!(metric(&server, "bitnet_requests_finished_total{finish_reason=\"cancelled\"").await, 1.0);
}
