//! Requests that must be refused: with the right status, in the one shape, and with the field at fault.

use serde_json::json;

use super::{hostile_table::*, *};

/// Routes of files and batches on a server without a directory for them.
#[tokio::test]
async fn files_and_batches_are_off_without_a_directory() {
    let server = Setup::saying("x").start();
    for path in
        ["/v1/files", "/v1/files/file-1", "/v1/files/..%2f..%2fetc/content", "/v1/batches", "/v1/batches/batch_1"]
    {
        let reply = server.get(path).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{path}");
        assert!(reply.error()["message"].as_str().unwrap().contains("--data-dir"), "{path}");
    }
    for path in ["/v1/files", "/v1/batches", "/v1/batches/batch_1/cancel"] {
        assert_eq!(server.post(path, "{}").await.status, StatusCode::NOT_FOUND, "{path}");
    }
}

#[tokio::test]
async fn a_chat_model_has_no_embeddings() {
    let server = Setup::saying("x").start();
    let cases = [
        (r#"{"input":"x"}"#, "model", INVALID),
        (r#"{"input":["x","y"],"encoding_format":"base64","user":"u"}"#, "model", INVALID),
        (r#"{"input":[[1,2],[3]]}"#, "model", INVALID),
        (r#"{"input":"x","dimensions":4}"#, "dimensions", UNSUPPORTED),
        (r#"{"input":"x","encoding_format":"hex"}"#, "encoding_format", INVALID),
        (r#"{"input":[]}"#, "input", INVALID),
        (r#"{"input":{}}"#, "input", INVALID),
        (r#"{}"#, "input", "missing_required_parameter"),
    ];
    for (body, param, code) in cases {
        let reply = server.post("/v1/embeddings", body).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{body}");
        let error = reply.error();
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), Some(code)), "{body}");
    }
    let reply = server.post("/v1/embeddings", r#"{"model":"other","input":"x"}"#).await;
    assert_eq!((reply.status, reply.error()["code"].as_str()), (StatusCode::NOT_FOUND, Some("model_not_found")));
}

async fn refused(server: &Fixture, path: &str, body: &str, param: Option<&str>, code: Option<&str>) {
    let reply = server.post(path, body.to_owned()).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{body} -> {}", reply.text());
    let error = reply.error();
    assert_eq!(error["type"], "invalid_request_error", "{body}");
    assert_eq!(error["param"], json!(param), "{body} -> {error}");
    if let Some(code) = code {
        assert_eq!(error["code"], code, "{body} -> {error}");
    }
    assert_eq!(reply.header("x-should-retry"), Some("false"));
}

#[tokio::test]
async fn bad_fields_are_named() {
    let server = Setup::saying("x").start();
    let chat = |fields: &str| format!(r#"{{"messages":[{{"role":"user","content":"x"}}],{fields}}}"#);
    let text = |fields: &str| format!(r#"{{"prompt":"x",{fields}}}"#);
    for (fields, param, code) in FIELDS.iter().chain(CHAT_FIELDS) {
        refused(&server, "/v1/chat/completions", &chat(fields), Some(param), Some(code)).await;
    }
    for (fields, param, code) in FIELDS.iter().chain(TEXT_FIELDS) {
        refused(&server, "/v1/completions", &text(fields), Some(param), Some(code)).await;
    }
    let bias: Vec<String> = (0..301).map(|id| format!("\"{id}\":0")).collect();
    let bias = format!("\"logit_bias\":{{{}}}", bias.join(","));
    refused(&server, "/v1/completions", &text(&bias), Some("logit_bias"), Some(INVALID)).await;
    let long_stop = format!("\"stop\":\"{}\"", "x".repeat(257));
    refused(&server, "/v1/completions", &text(&long_stop), Some("stop"), Some(INVALID)).await;
}

#[tokio::test]
async fn bad_bodies_are_named() {
    let server = Setup::saying("x").start();
    for (body, param) in CHAT_BODIES {
        refused(&server, "/v1/chat/completions", body, *param, None).await;
    }
    for (body, param) in TEXT_BODIES {
        refused(&server, "/v1/completions", body, *param, None).await;
    }
    let more_than_may_wait = r#"{"prompt":["a","b","c","d","e","f","g","h","i"]}"#;
    refused(&server, "/v1/completions", more_than_may_wait, Some("prompt"), None).await;
    let missing = server.post("/v1/completions", "{}").await.error();
    assert_eq!(missing["code"], "missing_required_parameter");
    let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(CONTEXT));
    refused(&server, "/v1/completions", &long, Some("prompt"), Some(CONTEXT_LENGTH)).await;
    let deep = format!(r#"{{"user":{}1{},"prompt":"x"}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(server.post("/v1/completions", deep).await.status, StatusCode::OK, "what is ignored is not built");
    let deep = format!(r#"{{"messages":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    refused(&server, "/v1/chat/completions", &deep, Some("messages"), Some(INVALID)).await;
    for (path, body, param) in [
        ("/tokenize", "{}", "prompt"),
        ("/tokenize", r#"{"prompt":1}"#, "prompt"),
        ("/tokenize", r#"{"prompt":"x","messages":[]}"#, "messages"),
        ("/tokenize", r#"{"messages":[]}"#, "messages"),
        ("/detokenize", r#"{"tokens":[258]}"#, "tokens"),
        ("/detokenize", r#"{"tokens":"x"}"#, "tokens"),
        ("/detokenize", "{}", "tokens"),
        ("/apply-template", "{}", "messages"),
    ] {
        refused(&server, path, body, Some(param), None).await;
    }
}

#[tokio::test]
async fn harmless_fields_are_accepted() {
    let server = Setup::saying("x").start();
    let fields = r#""user":"u","store":true,"metadata":{"a":"b"},"service_tier":"auto","priority":3,"verbosity":"low",
        "tools":[],"tool_choice":"none","response_format":{"type":"text"},"modalities":["text"],"parallel_tool_calls":true,
        "temperature":null,"n":null,"stop":null,"stream_options":null,"logit_bias":{},"stop_token_ids":[],"mystery":1,
        "max_tokens":null,"seed":-9223372036854775808,"top_k":-1,"min_p":0,"repetition_penalty":1.1"#;
    let body = format!(
        r#"{{"messages":[{{"role":"developer","content":[{{"type":"text","text":"x"}}]}},
        {{"role":"assistant","content":null,"tool_calls":[{{"id":"c","type":"function","function":{{"name":"f","arguments":"{{}}"}}}}]}},
        {{"role":"tool","content":"r","tool_call_id":"c"}}],{fields}}}"#
    );
    let reply = server.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    let mut strict = Setup::saying("x");
    strict.config.strict_params = true;
    let error = strict.start().post("/v1/chat/completions", body).await.error();
    assert_eq!((&error["param"], &error["code"]), (&json!("mystery"), &json!(UNSUPPORTED)));
}

#[tokio::test]
async fn what_the_framework_refuses_has_the_shape_too() {
    let mut setup = Setup::saying("x");
    setup.config.max_body_bytes = 1000;
    let server = setup.start();
    let check = |reply: Reply, status: u16| {
        assert_eq!(reply.status.as_u16(), status, "{}", reply.text());
        let error = reply.error();
        assert_eq!((&error["type"], &error["code"]), (&json!("invalid_request_error"), &json!(null)));
        reply
    };
    check(server.get("/nowhere").await, 404);
    check(server.get("/v1").await, 404);
    check(server.post("/", "{}").await, 404);
    let reply = check(server.get("/v1/chat/completions").await, 405);
    assert_eq!(reply.header("allow"), Some("POST"));
    let reply = check(server.post("/health", "{}").await, 405);
    assert_eq!(reply.header("allow"), Some("GET,HEAD"));
    let with = |name: &str, value: &str| {
        Request::post("/v1/completions").header(name, value).body(Body::from(r#"{"prompt":"x"}"#)).unwrap()
    };
    check(server.send(with("content-type", "text/plain")).await, 415);
    check(server.send(with("accept", "*/*")).await, 415);
    let mut gzip = with("content-type", "application/json");
    gzip.headers_mut().insert("content-encoding", "gzip".parse().unwrap());
    check(server.send(gzip).await, 415);
    assert_eq!(server.send(with("content-type", "application/json; charset=utf-8")).await.status, StatusCode::OK);
    let large = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(1000));
    check(server.post("/v1/completions", large.clone()).await, 413);
    // The same without a length that would tell.
    let parts = futures_util::stream::iter(
        large.into_bytes().chunks(100).map(|part| Ok::<_, std::io::Error>(part.to_vec())).collect::<Vec<_>>(),
    );
    check(server.post("/v1/completions", Body::from_stream(parts)).await, 413);
    let broken = futures_util::stream::iter([Ok("{".to_owned()), Err(std::io::Error::other("gone"))]);
    assert_eq!(server.post("/v1/completions", Body::from_stream(broken)).await.status, StatusCode::BAD_REQUEST);
}
