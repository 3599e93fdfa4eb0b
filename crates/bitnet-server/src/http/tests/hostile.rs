//! Requests that must be refused: with the right status, in the one shape, and with the field at fault.

use serde_json::json;

use super::*;

const INVALID: &str = "invalid_value";
const UNSUPPORTED: &str = "unsupported_parameter";
const CONTEXT_LENGTH: &str = "context_length_exceeded";

/// Fields beside a good prompt, the field at fault, the code.
const FIELDS: &[(&str, &str, &str)] = &[
    (r#""temperature":-0.1"#, "temperature", INVALID),
    (r#""temperature":2.1"#, "temperature", INVALID),
    (r#""temperature":2.00000001"#, "temperature", INVALID),
    (r#""temperature":"hot""#, "temperature", INVALID),
    (r#""temperature":1e400"#, "temperature", INVALID),
    (r#""temperature":1e40"#, "temperature", INVALID),
    (r#""temperature":[1]"#, "temperature", INVALID),
    (r#""temperature":true"#, "temperature", INVALID),
    (r#""top_p":1.1"#, "top_p", INVALID),
    (r#""top_p":-1"#, "top_p", INVALID),
    (r#""top_k":-2"#, "top_k", INVALID),
    (r#""top_k":1.5"#, "top_k", INVALID),
    (r#""top_k":99999999999"#, "top_k", INVALID),
    (r#""min_p":1.5"#, "min_p", INVALID),
    (r#""min_p":{}"#, "min_p", INVALID),
    (r#""repetition_penalty":0"#, "repetition_penalty", INVALID),
    (r#""repetition_penalty":-3"#, "repetition_penalty", INVALID),
    (r#""frequency_penalty":2.5"#, "frequency_penalty", INVALID),
    (r#""presence_penalty":-2.5"#, "presence_penalty", INVALID),
    (r#""n":0"#, "n", INVALID),
    (r#""n":9"#, "n", INVALID),
    (r#""n":-1"#, "n", INVALID),
    (r#""n":1.5"#, "n", INVALID),
    (r#""n":18446744073709551615"#, "n", INVALID),
    (r#""n":18446744073709551616"#, "n", INVALID),
    (r#""seed":1.5"#, "seed", INVALID),
    (r#""seed":9223372036854775808"#, "seed", INVALID),
    (r#""seed":"x""#, "seed", INVALID),
    (r#""max_tokens":-1"#, "max_tokens", INVALID),
    (r#""max_tokens":1.5"#, "max_tokens", INVALID),
    (r#""max_tokens":"many""#, "max_tokens", INVALID),
    (r#""min_tokens":-1"#, "min_tokens", INVALID),
    (r#""min_tokens":9,"max_tokens":3"#, "min_tokens", INVALID),
    (r#""stop":"""#, "stop", INVALID),
    (r#""stop":["a","b","c","d","e"]"#, "stop", INVALID),
    (r#""stop":[1]"#, "stop", INVALID),
    (r#""stop":7"#, "stop", INVALID),
    (r#""stop":[""]"#, "stop", INVALID),
    (r#""logit_bias":{"258":1}"#, "logit_bias", INVALID),
    (r#""logit_bias":{"x":1}"#, "logit_bias", INVALID),
    (r#""logit_bias":{"-1":1}"#, "logit_bias", INVALID),
    (r#""logit_bias":{"1":101}"#, "logit_bias", INVALID),
    (r#""logit_bias":{"1":-100.5}"#, "logit_bias", INVALID),
    (r#""logit_bias":{"1":1,"01":2}"#, "logit_bias", INVALID),
    (r#""logit_bias":[1]"#, "logit_bias", INVALID),
    (r#""logit_bias":{"1":"x"}"#, "logit_bias", INVALID),
    (r#""stream":"yes""#, "stream", INVALID),
    (r#""stream":1"#, "stream", INVALID),
    (r#""stream_options":3"#, "stream_options", INVALID),
    (r#""stream_options":{"include_usage":"x"}"#, "stream_options", INVALID),
    (r#""ignore_eos":1"#, "ignore_eos", INVALID),
    (r#""return_token_ids":"x""#, "return_token_ids", INVALID),
    (r#""model":5"#, "model", INVALID),
    (r#""temperature":1,"temperature":1"#, "temperature", INVALID),
    (r#""prediction":{"type":"poem","content":"x"}"#, "prediction", INVALID),
    (r#""prediction":{"type":"content"}"#, "prediction", INVALID),
    (r#""metadata":{"a":1}"#, "metadata", INVALID),
    (r#""stream_options":{"include_obfuscation":1}"#, "stream_options", INVALID),
    (r#""guided_json":{"not":{}}"#, "guided_json", UNSUPPORTED),
    (r#""guided_json":[1]"#, "guided_json", UNSUPPORTED),
    (r#""guided_regex":"(a""#, "guided_regex", UNSUPPORTED),
    (r#""guided_regex":{}"#, "guided_regex", INVALID),
    (r#""guided_choice":[]"#, "guided_choice", INVALID),
    (r#""guided_choice":["a"],"guided_regex":"a""#, "guided_choice", INVALID),
    (r#""guided_grammar":"start: x""#, "guided_grammar", UNSUPPORTED),
    (r#""audio":{}"#, "audio", UNSUPPORTED),
    (r#""modalities":["text","audio"]"#, "modalities", UNSUPPORTED),
];

const CHAT_FIELDS: &[(&str, &str, &str)] = &[
    (r#""max_tokens":0"#, "max_tokens", INVALID),
    (r#""max_completion_tokens":0"#, "max_completion_tokens", INVALID),
    (r#""top_logprobs":1"#, "top_logprobs", INVALID),
    (r#""logprobs":true,"top_logprobs":21"#, "top_logprobs", INVALID),
    (r#""logprobs":true,"top_logprobs":-1"#, "top_logprobs", INVALID),
    (r#""logprobs":3"#, "logprobs", INVALID),
    (r#""max_tokens":300"#, "messages", CONTEXT_LENGTH),
    (r#""max_tokens":18446744073709551615"#, "messages", CONTEXT_LENGTH),
    (r#""tools":[{"type":"function"}]"#, "tools", INVALID),
    (r#""tools":{}"#, "tools", INVALID),
    (r#""tools":[{"type":"custom"}]"#, "tools", UNSUPPORTED),
    (r#""tools":[{"type":"function","function":{"name":"a b"}}]"#, "tools", INVALID),
    (
        r#""tools":[{"type":"function","function":{"name":"f"}},{"type":"function","function":{"name":"f"}}]"#,
        "tools",
        INVALID,
    ),
    (r#""tools":[{"type":"function","function":{"name":"f","parameters":{"type":"array"}}}]"#, "tools", UNSUPPORTED),
    (r#""tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":"maybe""#, "tool_choice", INVALID),
    (
        r#""tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":{"type":"function","function":{"name":"g"}}"#,
        "tool_choice",
        INVALID,
    ),
    (
        r#""tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":{"type":"allowed_tools"}"#,
        "tool_choice",
        UNSUPPORTED,
    ),
    (r#""functions":[{"name":"f"}]"#, "functions", UNSUPPORTED),
    (r#""tool_choice":"required""#, "tool_choice", INVALID),
    (r#""response_format":{"type":"json_schema"}"#, "response_format", INVALID),
    (r#""response_format":{"type":"json_schema","json_schema":{"name":"a b"}}"#, "response_format", INVALID),
    (
        r#""response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"not":{}}}}"#,
        "response_format",
        UNSUPPORTED,
    ),
    (r#""response_format":{"type":"poem"}"#, "response_format", INVALID),
    (r#""response_format":{}"#, "response_format", INVALID),
    (r#""chat_template":"x""#, "chat_template", UNSUPPORTED),
    (r#""chat_template_kwargs":{"messages":[]}"#, "chat_template_kwargs", UNSUPPORTED),
    (r#""chat_template_kwargs":{"thinking":[]}"#, "chat_template_kwargs", INVALID),
    (r#""continue_final_message":true,"add_generation_prompt":true"#, "continue_final_message", INVALID),
];

const TEXT_FIELDS: &[(&str, &str, &str)] = &[
    (r#""logprobs":21"#, "logprobs", INVALID),
    (r#""logprobs":true"#, "logprobs", INVALID),
    (r#""max_tokens":255"#, "prompt", CONTEXT_LENGTH),
    (r#""suffix":"x""#, "suffix", UNSUPPORTED),
    (r#""best_of":0"#, "best_of", INVALID),
    (r#""best_of":9"#, "best_of", INVALID),
    (r#""n":3,"best_of":2"#, "best_of", INVALID),
    (r#""best_of":2,"stream":true"#, "best_of", INVALID),
    (r#""echo":"x""#, "echo", INVALID),
];

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

/// Whole bodies for `/v1/chat/completions` with the field at fault.
const CHAT_BODIES: &[(&str, Option<&str>)] = &[
    ("", None),
    ("null", None),
    ("[]", None),
    ("{", None),
    ("{'a':1}", None),
    ("{\"messages\":[]}garbage", None),
    ("{}", Some("messages")),
    (r#"{"messages":null}"#, Some("messages")),
    (r#"{"messages":[]}"#, Some("messages")),
    (r#"{"messages":"hi"}"#, Some("messages")),
    (r#"{"messages":[{}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"wizard","content":"x"}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user"}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","content":null}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","content":5}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","content":[{"type":"smell"}]}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","content":"\ud800"}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"user","role":"user","content":"x"}]}"#, Some("messages")),
    (r#"{"messages":[{"role":"assistant","tool_calls":[{}]}]}"#, Some("messages")),
];

const TEXT_BODIES: &[(&str, Option<&str>)] = &[
    ("{}", Some("prompt")),
    (r#"{"prompt":null}"#, Some("prompt")),
    (r#"{"prompt":[]}"#, Some("prompt")),
    (r#"{"prompt":[[]]}"#, Some("prompt")),
    (r#"{"prompt":5}"#, Some("prompt")),
    (r#"{"prompt":{}}"#, Some("prompt")),
    (r#"{"prompt":[true]}"#, Some("prompt")),
    (r#"{"prompt":[1,"a"]}"#, Some("prompt")),
    (r#"{"prompt":["a",1]}"#, Some("prompt")),
    (r#"{"prompt":[-1]}"#, Some("prompt")),
    (r#"{"prompt":[1.5]}"#, Some("prompt")),
    (r#"{"prompt":[258]}"#, Some("prompt")),
    (r#"{"prompt":[4294967296]}"#, Some("prompt")),
    (r#"{"prompt":[[1],[258]]}"#, Some("prompt")),
    (r#"{"prompt":["a","b","c","d","e","f","g","h","i"]}"#, Some("prompt")),
];

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
