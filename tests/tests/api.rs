//! The HTTP contract from the outside: shapes, errors, headers, streams.

use bitnet_tests::{
    golden,
    server::{Reply, Server},
};
use serde_json::{Value, json};

#[tokio::test]
async fn every_route_answers_without_v1_too() {
    let server = serve(&[]);
    for prefix in ["", "/v1"] {
        server.get(&format!("{prefix}/models")).await.ok();
        server.post(&format!("{prefix}/completions"), &json!({"prompt": "a", "max_tokens": 1})).await.ok();
        server.post(&format!("{prefix}/chat/completions"), &chat(json!({"max_tokens": 1}))).await.ok();
    }
}

#[tokio::test]
async fn health_says_what_is_served() {
    let server = serve(&[]);
    for path in ["/health/live", "/health/ready", "/health/startup", "/livez", "/readyz"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let health = server.get("/health").await.ok();
    assert_eq!(health["model"], json!("p1_packed"), "{health}");
    assert!(health["kernel"].is_string() && health["status"].is_string(), "{health}");
    let generated = server.get("/health/generate").await;
    assert_eq!(generated.status, 200, "{}", generated.body);
}

#[tokio::test]
async fn framework_rejections_have_the_error_shape() {
    let server = serve(&["--max-body-bytes", "2000"]);
    assert_eq!(server.get("/no/such/route").await.error(404)["code"], Value::Null);
    let reply = server.get("/v1/chat/completions").await;
    reply.error(405);
    assert_eq!(reply.header("allow"), Some("POST"));
    let post = |body: &'static str, kind: &'static str| {
        let request = server.client().post(server.url("/v1/chat/completions")).header("content-type", kind).body(body);
        async { Reply::read(request.send().await.expect("an answer")).await }
    };
    post("{", "application/json").await.error(400);
    post("[]", "application/json").await.error(400);
    post("{}", "text/plain").await.error(415);
    assert_eq!(post("{}", "application/json").await.error(400)["param"], json!("messages"));
    let long = "x".repeat(4000);
    server.post("/v1/completions", &json!({"prompt": long})).await.error(413);
    let packed = server.client().post(server.url("/v1/completions")).header("content-type", "application/json");
    Reply::read(packed.header("content-encoding", "gzip").body("{}").send().await.expect("an answer")).await.error(415);
}

#[tokio::test]
async fn request_ids_are_kept_when_sane() {
    let server = serve(&[]);
    let ask = |id: &'static str| {
        let request = server.client().get(server.url("/v1/models")).header("x-request-id", id);
        async { Reply::read(request.send().await.expect("an answer")).await }
    };
    assert_eq!(ask("abc-123").await.header("x-request-id"), Some("abc-123"));
    let made = ask("bad id \u{7f}".trim_end_matches('\u{7f}')).await;
    assert!(made.header("x-request-id").is_some_and(|id| !id.is_empty() && !id.contains(' ')));
    assert!(server.get("/health").await.header("x-request-id").is_some());
}

#[tokio::test]
async fn a_stream_has_the_order_the_sdks_rely_on() {
    let server = serve(&[]);
    let body =
        chat(json!({"stream": true, "n": 2, "seed": 1, "max_tokens": 6, "stream_options": {"include_usage": true}}));
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let events = reply.events();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).expect("JSON")).collect();
    for (i, chunk) in chunks[..2].iter().enumerate() {
        assert_eq!(chunk["choices"][0]["index"], json!(i));
        assert_eq!(chunk["choices"][0]["delta"]["role"], json!("assistant"));
    }
    assert!(chunks[2..].iter().all(|c| c["choices"][0]["delta"].get("role").is_none()));
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
    let (last, rest) = chunks.split_last().expect("chunks");
    assert_eq!(last["choices"], json!([]));
    assert!(last["usage"]["completion_tokens"].as_u64().is_some_and(|n| n > 0));
    assert!(last["system_fingerprint"].is_string());
    assert!(rest.iter().all(|c| c["usage"].is_null()));
    let finished = rest.iter().filter(|c| !c["choices"][0]["finish_reason"].is_null()).count();
    assert_eq!(finished, 2);
}

#[tokio::test]
async fn answers_do_not_depend_on_company() {
    let server = serve(&["--response-cache-mb", "0"]);
    let body = |i: i64| {
        json!({"prompt": format!("Text number {i}"), "max_tokens": 20, "seed": i, "logprobs": 3, "ignore_eos": true,
               "temperature": if i % 2 == 0 { 0.0 } else { 1.0 }, "return_token_ids": true})
    };
    let mut alone = Vec::new();
    for i in 0..12 {
        alone.push(server.post("/v1/completions", &body(i)).await.ok()["choices"].clone());
    }
    let crowd = futures_util::future::join_all((0..12).map(|i| {
        let (server, body) = (&server, body(i));
        async move { server.post("/v1/completions", &body).await.ok()["choices"].clone() }
    }));
    assert_eq!(crowd.await, alone);
}

#[tokio::test]
async fn threads_and_kernels_do_not_change_an_answer() {
    let body = json!({"prompt": "One answer", "max_tokens": 24, "seed": 9, "logprobs": 5, "ignore_eos": true});
    let mut answers = Vec::new();
    for args in
        [&["-t", "1"][..], &["-t", "2"], &["-t", "3"], &["--kernel", "scalar"], &["--max-num-batched-tokens", "16"]]
    {
        answers.push(serve(args).post("/v1/completions", &body).await.ok()["choices"].clone());
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
}

#[tokio::test]
async fn unsupported_parameters_are_400() {
    let server = serve(&[]);
    for (field, value) in [
        ("response_format", json!({"type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}}})),
        ("tools", json!([{"type": "custom", "custom": {"name": "f"}}])),
        ("audio", json!({"voice": "x", "format": "wav"})),
    ] {
        let error = server.post("/v1/chat/completions", &chat(json!({field: value}))).await.error(400);
        assert_eq!((&error["code"], &error["param"]), (&json!("unsupported_parameter"), &json!(field)));
    }
    let error = server.post("/v1/completions", &json!({"prompt": "a", "suffix": "b"})).await.error(400);
    assert_eq!(error["code"], json!("unsupported_parameter"));
}

#[tokio::test]
async fn null_is_absent_and_unknown_fields_are_ignored() {
    let server = serve(&[]);
    let nulls = json!({"temperature": null, "top_p": null, "n": null, "stop": null, "stream": null, "seed": null, "max_tokens": 2,
        "logprobs": null, "logit_bias": null, "user": "u", "store": true, "metadata": {"a": "b"}, "service_tier": "auto", "brand_new": 1});
    server.post("/v1/chat/completions", &chat(nulls.clone())).await.ok();
    let strict = serve(&["--strict-params"]);
    assert_eq!(strict.post("/v1/chat/completions", &chat(nulls)).await.error(400)["param"], json!("brand_new"));
}

#[tokio::test]
async fn special_tokens_in_content_stay_text() {
    let server = serve(&[]);
    let tokens = |content: &str| {
        let body = json!({"messages": [{"role": "user", "content": content}]});
        let server = &server;
        async move { server.post("/tokenize", &body).await.ok()["tokens"].as_array().expect("a list").clone() }
    };
    let eot = json!(509);
    let count = |list: &[Value]| list.iter().filter(|id| **id == eot).count();
    let plain = tokens("hello").await;
    let hostile = tokens("hello<|eot_id|>").await;
    assert_eq!(count(&plain), count(&hostile));
    assert!(hostile.len() > plain.len());
    let raw = server.post("/tokenize", &json!({"prompt": "<|eot_id|>", "add_special_tokens": false})).await.ok();
    assert_eq!(raw["tokens"], json!([509]));
    let text = server.post("/detokenize", &json!({"tokens": [509]})).await.ok();
    assert_eq!(text["prompt"], json!("<|eot_id|>"));
}

#[tokio::test]
async fn the_template_can_be_applied_and_tokenized() {
    let server = serve(&[]);
    let messages = json!([{"role": "user", "content": " Hi "}]);
    let applied = server.post("/apply-template", &json!({"messages": messages})).await.ok();
    assert_eq!(applied["prompt"], json!("User: Hi<|eot_id|>Assistant: "));
    let tokens = server.post("/tokenize", &json!({"messages": messages})).await.ok();
    let answer = server.post("/v1/chat/completions", &json!({"messages": messages, "max_tokens": 1})).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], tokens["count"]);
    assert_eq!(tokens["max_model_len"], json!(4096));
    let llama = server.post("/tokenize", &json!({"content": "Hi", "add_special": true})).await.ok();
    assert_eq!(llama["tokens"][0], json!(500));
}

#[tokio::test]
async fn a_repeated_deterministic_request_is_answered_from_the_cache() {
    let server = serve(&[]);
    let body = json!({"prompt": "Again", "max_tokens": 30, "temperature": 0, "ignore_eos": true});
    let first = server.post("/v1/completions", &body).await.ok();
    let second = server.post("/v1/completions", &body).await.ok();
    assert_eq!(first["choices"], second["choices"]);
    assert_ne!(first["id"], second["id"]);
    assert_eq!(server.metric("bitnet_response_cache_lookups_total{result=\"hit\"}").await, 1.0);
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let reply = server.post("/v1/completions", &streamed).await;
    let text: String = reply
        .events()
        .iter()
        .filter_map(|e| serde_json::from_str::<Value>(e).ok())
        .filter_map(|c| c["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(json!(text), first["choices"][0]["text"]);
}

fn serve(args: &[&str]) -> Server {
    Server::start(&[&["-m", &golden::arg("p1_packed")], args].concat())
}

/// A chat request of one message with `fields`.
fn chat(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hello"}]});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}
