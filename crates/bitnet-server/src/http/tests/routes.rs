//! Everything around the answers: names, tokens, health, keys, limits, phases.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use serde_json::json;

use super::*;
use crate::{config::KeySet, service::Phase};

#[tokio::test]
async fn models_by_any_of_their_names() {
    let server = Setup::saying("x").start();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(
        (&model["id"], &model["object"], &model["owned_by"]),
        (&json!("org/model"), &json!("model"), &json!("bitnet"))
    );
    assert_eq!(model["max_model_len"], CONTEXT);
    for path in ["/v1/models/org%2Fmodel", "/v1/models/org/model", "/models/alias"] {
        assert_eq!(server.get(path).await.json()["id"], "org/model", "{path}");
    }
    for reply in [
        server.get("/v1/models/other").await,
        server.post("/v1/completions", r#"{"prompt":"x","model":"other"}"#).await,
    ] {
        assert_eq!(reply.status, StatusCode::NOT_FOUND);
        let error = reply.error();
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        assert!(error["message"].as_str().unwrap().contains("'org/model', 'alias'"));
    }
    for model in ["\"alias\"", "null", "\"org/model\""] {
        let reply = server.post("/v1/completions", format!("{{\"prompt\":\"x\",\"model\":{model}}}")).await;
        assert_eq!(reply.json()["model"], "org/model");
    }
}

#[tokio::test]
async fn text_to_tokens_and_back() {
    let server = Setup::saying("x").start();
    let tokens = server.post("/tokenize", r#"{"prompt":"a<|eot_id|>"}"#).await.json();
    assert_eq!((&tokens["count"], &tokens["max_model_len"]), (&json!(3), &json!(CONTEXT)));
    assert_eq!(tokens["tokens"][0], BOS);
    assert_eq!(tokens["tokens"][2], EOT);
    let bare = server.post("/tokenize", r#"{"content":"a","add_special":false}"#).await.json();
    assert_eq!(bare["count"], 1);
    let back = server.post("/detokenize", json!({"tokens": tokens["tokens"]}).to_string()).await.json();
    assert_eq!(back["prompt"], "<s>a<|eot_id|>");
    // In messages the same text is text: ten characters of content, and one end of turn by the template.
    let messages = r#"{"messages":[{"role":"user","content":"<|eot_id|>"}]}"#;
    let chat = server.post("/tokenize", messages).await.json();
    let turns = chat["tokens"].as_array().unwrap().iter().filter(|id| **id == json!(EOT)).count();
    assert_eq!(turns, 1);
    let text = server.post("/apply-template", messages).await.json();
    assert_eq!(text["prompt"], "user: <|eot_id|><|eot_id|>assistant: ");
}

#[tokio::test]
async fn health_follows_the_phase() {
    let server = Setup::saying("x").loading();
    let statuses = async |server: &Fixture| {
        let mut codes = Vec::new();
        for path in
            ["/health/live", "/livez", "/health/ready", "/readyz", "/health/startup", "/health", "/health/generate"]
        {
            codes.push(server.get(path).await.status.as_u16());
        }
        codes
    };
    assert_eq!(statuses(&server).await, [200, 200, 503, 503, 503, 503, 503]);
    let reply = server.post("/v1/completions", r#"{"prompt":"x"}"#).await;
    assert_eq!((reply.status.as_u16(), &reply.error()["code"]), (503, &json!("server_loading")));
    assert_eq!((reply.header("retry-after"), reply.header("retry-after-ms")), (Some("5"), Some("5000")));

    let server = Setup::saying("x").start();
    assert_eq!(statuses(&server).await, [200; 7]);
    let health = server.get("/health").await.json();
    assert_eq!(
        (&health["status"], &health["model"], &health["kernel"]),
        (&json!("ok"), &json!("org/model"), &json!("script"))
    );
    assert_eq!(health["failed_kernels"], json!(["broken"]));
    assert_eq!(health["queue"]["max_waiting"], 8);
    assert_eq!(health["last_generation"]["status"], "ok");

    server.state.lifecycle.enter(Phase::Draining);
    assert_eq!(statuses(&server).await, [200, 200, 503, 503, 200, 503, 503]);
    let reply = server.post("/v1/completions", r#"{"prompt":"x"}"#).await;
    assert_eq!((reply.status.as_u16(), &reply.error()["code"]), (503, &json!("server_draining")));
    assert_eq!(reply.header("connection"), Some("close"));
    server.state.lifecycle.idle().await;
}

#[tokio::test]
async fn keys_guard_what_is_not_open() {
    let mut setup = Setup::saying("x");
    setup.config.api_keys = KeySet::parse("me:hunter2\n", "test").unwrap();
    let server = setup.start();
    for path in ["/health", "/livez", "/readyz", "/metrics", "/health/ready"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    for path in ["/v1/models", "/stats", "/stats/history", "/nowhere", "/healthy"] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        assert_eq!(reply.error()["code"], "invalid_api_key");
    }
    for (value, status) in [
        ("Bearer hunter2", 200),
        ("bearer hunter2", 200),
        ("Bearer hunter3", 401),
        ("Basic hunter2", 401),
        ("hunter2", 401),
    ] {
        let request = Request::get("/v1/models").header(header::AUTHORIZATION, value).body(Body::empty()).unwrap();
        assert_eq!(server.send(request).await.status.as_u16(), status, "{value}");
    }
}

#[tokio::test]
async fn a_caller_over_his_limit() {
    let mut setup = Setup::saying("x");
    setup.config.rate_limit_rpm = NonZeroU32::new(2);
    let server = setup.start();
    let first = server.get("/v1/models").await;
    assert_eq!(
        (first.header("x-ratelimit-limit-requests"), first.header("x-ratelimit-remaining-requests")),
        (Some("2"), Some("1"))
    );
    assert!(first.header("x-ratelimit-reset-requests").is_some());
    assert_eq!(server.get("/v1/models").await.status, StatusCode::OK);
    let third = server.get("/v1/models").await;
    assert_eq!(third.status, StatusCode::TOO_MANY_REQUESTS);
    let error = third.error();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    let seconds: u64 = third.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    assert_eq!(third.header("retry-after-ms").unwrap().parse::<u64>().unwrap(), seconds * 1000);
    assert_eq!(third.header("x-ratelimit-remaining-requests"), Some("0"));
    assert_eq!(server.get("/health").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_caller_over_his_limit_of_tokens() {
    let mut setup = Setup::saying("x");
    setup.config.rate_limit_tpm = NonZeroU32::new(200);
    let server = setup.start();
    // Within some seconds, in which a few tokens come back.
    let assert_remaining = |reply: &Reply, tokens: u64| {
        let remaining: u64 = reply.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
        assert!((tokens..tokens + 15).contains(&remaining), "{remaining} instead of {tokens}");
    };
    let post = async |path: &str, body: Value| server.post(path, body.to_string()).await;
    // Eight bytes and the BOS, two answers.
    let first = post("/v1/completions", json!({"prompt": "8 bytes.", "max_tokens": 20, "n": 2})).await;
    assert_eq!(first.status, StatusCode::OK);
    assert_remaining(&first, 151);
    assert_eq!(first.header("x-ratelimit-limit-tokens"), Some("200"));
    assert!(first.header("x-ratelimit-reset-tokens").is_some() && first.header("x-ratelimit-limit-requests").is_none());

    let hello = json!([{"role": "user", "content": "hello"}]);
    let chat = post("/v1/chat/completions", json!({"messages": hello, "max_tokens": 20})).await;
    let counted = 20 + chat.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_remaining(&chat, 151 - counted);
    let response = post("/v1/responses", json!({"input": "hello", "max_output_tokens": 20})).await;
    assert_remaining(&response, 151 - 2 * counted);

    // Nobody said how long the answer may be: all that a minute allows.
    let refused = post("/v1/chat/completions", json!({"messages": hello})).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    let error = refused.error();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    assert!(error["message"].as_str().unwrap().contains("200 tokens per minute"), "{error}");
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));

    let never = post("/v1/completions", json!({"prompt": "8 bytes.", "max_tokens": 220})).await;
    assert_eq!((never.status, never.header("x-should-retry")), (StatusCode::BAD_REQUEST, Some("false")));
    let error = never.error();
    assert_eq!((&error["param"], &error["code"]), (&json!("prompt"), &json!("invalid_value")));
    assert!(error["message"].as_str().unwrap().starts_with("This request needs 229 tokens"), "{error}");
    assert!(server.get("/v1/models").await.header("x-ratelimit-remaining-tokens").is_some(), "it counts nothing");
}

#[tokio::test]
async fn tokens_of_a_request_that_the_queue_refuses_are_given_back() {
    let mut setup = Setup::saying("x");
    setup.config.rate_limit_tpm = NonZeroU32::new(1000);
    setup.config.max_queue_tokens = 10;
    let server = Arc::new(setup.start());
    let post = |prompt: &str| {
        let (server, body) = (Arc::clone(&server), json!({"prompt": prompt, "max_tokens": 20}).to_string());
        tokio::spawn(async move { server.post("/v1/completions", body).await })
    };
    let held = Arc::clone(&server.hold).lock_owned().await;
    let queue_is = async |running: u64, waiting: u64| {
        let queue = server.get("/health").await.json()["queue"].clone();
        queue["running"] == running && queue["waiting"] == waiting
    };
    let first = post("8 bytes.");
    while !queue_is(1, 0).await {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let second = post("8 bytes?");
    while !queue_is(1, 1).await {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let refused = post("8 bytes!").await.unwrap();
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    drop(held);
    for answer in [first, second] {
        assert_eq!(answer.await.unwrap().status, StatusCode::OK);
    }
    let remaining: u64 = refused.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
    // Two requests of 29 tokens, and some come back with time.
    assert!((942..971).contains(&remaining), "{remaining}");
}

#[tokio::test]
async fn inputs_of_embeddings_are_counted() {
    let mut setup = Setup { pooling: Some(Pooling::Mean), ..Setup::saying("x") };
    setup.config.rate_limit_tpm = NonZeroU32::new(20);
    let server = setup.start();
    let embed = async |texts: &[&str]| server.post("/v1/embeddings", json!({"input": texts}).to_string()).await;
    assert_eq!(embed(&["12345", "1234567"]).await.status, StatusCode::OK);
    assert_eq!(embed(&["12345", "1234567"]).await.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(embed(&["12345", "123456789012345"]).await.error()["param"], "input");
}

#[tokio::test]
async fn request_ids_are_kept_when_sane() {
    let server = Setup::saying("x").start();
    let with_id = async |id: &str| {
        let request = Request::get("/v1/models").header("x-request-id", id).body(Body::empty()).unwrap();
        server.send(request).await.header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(with_id("abc-1.2:3_4").await, "abc-1.2:3_4");
    for odd in ["", "a b", "<script>", &"x".repeat(129)] {
        let made = with_id(odd).await;
        assert!(made != odd && made.starts_with("req-"), "{made}");
    }
}

#[tokio::test]
async fn figures_have_routes_and_no_free_text() {
    let server = Setup::saying("x").start();
    server.get("/v1/models/org/model").await;
    server.get("/secret-path").await;
    let request = Request::builder().method("BREW").uri("/v1/models").body(Body::empty()).unwrap();
    server.send(request).await;
    let text = server.get("/metrics").await.text();
    assert!(text.contains("route=\"/v1/models/{*id}\""), "{text}");
    assert!(text.contains("route=\"other\""));
    assert!(!text.contains("secret-path") && !text.contains("BREW"));
    assert!(server.get("/stats").await.json().is_object());
    assert_eq!(server.get("/stats/history?since=5").await.status, StatusCode::OK);
    assert_eq!(server.get("/stats/history?since=x").await.error()["type"], "invalid_request_error");
}
