//! Shapes and orders that clients rely on.

use std::time::Duration;

use serde_json::{Value, json};

use super::*;

const HELLO: &str = r#"{"messages":[{"role":"user","content":"hi"}]"#;

/// `value` with what differs from run to run made constant.
fn settled(mut value: Value) -> Value {
    let id = value["id"].as_str().unwrap().to_owned();
    let prefix = id.split('-').next().unwrap().to_owned();
    assert!(id.len() > prefix.len() + 20);
    value["id"] = prefix.into();
    assert!(value["created"].as_u64().unwrap() > 1_600_000_000);
    value["created"] = 0.into();
    value
}

#[tokio::test]
async fn a_whole_chat_answer() {
    let server = Setup::saying("Hé!").start();
    for (path, cached_tokens) in [("/v1/chat/completions", 0), ("/chat/completions", 16)] {
        let reply = server.post(path, format!("{HELLO}}}")).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        let expected = json!({
            "id": "chatcmpl", "object": "chat.completion", "created": 0, "model": "org/model",
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "Hé!", "refusal": null},
                "logprobs": null,
                "finish_reason": "stop",
            }],
            // BOS, "user: hi", the end of turn, "assistant: "; four bytes and the end of turn.
            "usage": {
                "prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 26,
                "prompt_tokens_details": {"cached_tokens": cached_tokens},
                "completion_tokens_details": {
                    "reasoning_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0
                },
            },
            "system_fingerprint": "fp_test",
        });
        assert_eq!(settled(reply.json()), expected);
    }
}

#[tokio::test]
async fn a_chat_stream_in_order() {
    let server = Setup::saying("é€").start();
    let body = format!("{HELLO},\"n\":2,\"stream\":true,\"stream_options\":{{\"include_usage\":true}}}}");
    let reply = server.post("/v1/chat/completions", body).await;
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    assert_eq!(reply.header("x-accel-buffering"), Some("no"));
    let mut chunks = reply.chunks();
    let usage = chunks.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    assert_eq!(usage["usage"]["prompt_tokens"], 21);
    assert_eq!(usage["system_fingerprint"], "fp_test");
    let role = |index: usize| json!([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}]);
    assert_eq!(chunks[0]["choices"], role(0));
    assert_eq!(chunks[1]["choices"], role(1));
    for chunk in &chunks {
        assert_eq!((&chunk["id"], &chunk["created"]), (&usage["id"], &usage["created"]));
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["usage"], Value::Null);
        assert!(chunk.as_object().unwrap().contains_key("usage"));
    }
    for index in 0..2 {
        let own: Vec<_> =
            chunks[2..].iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        let texts: Vec<_> = own.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(texts, ["é", "€"], "whole characters only");
        assert!(own.iter().all(|choice| choice["delta"].get("role").is_none()));
        let (last, before) = own.split_last().unwrap();
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
    }
}

#[tokio::test]
async fn the_best_of_several_are_told() {
    let server = Setup::saying("abc").start();
    let body = r#"{"prompt":["x","y"],"n":2,"best_of":3,"seed":1}"#;
    let answer = server.post("/v1/completions", body).await.json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| choice["text"] == "abc" && choice["logprobs"].is_null()));
    assert_eq!(answer["usage"]["completion_tokens"], 6 * 4, "what was generated counts, not what is told");
}

#[tokio::test]
async fn stop_strings_leave_nothing_behind() {
    let server = Setup::saying("one END two").start();
    for stop in ["\"END\"", "[\"two\", \" END\"]", "[\"N\", \"x\"]"] {
        let body = format!("{HELLO},\"stop\":{stop},\"logprobs\":true,\"stream\":true,\"temperature\":0}}");
        let expected = match stop {
            "\"END\"" => "one ",
            "[\"N\", \"x\"]" => "one E",
            _ => "one",
        };
        // The second time it comes from the response cache.
        for _ in 0..2 {
            let chunks = server.post("/v1/chat/completions", body.clone()).await.chunks();
            let choices: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
            let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
            assert_eq!(text, expected);
            let tokens: String = choices
                .iter()
                .filter_map(|choice| choice["logprobs"]["content"].as_array())
                .flatten()
                .map(|entry| entry["token"].as_str().unwrap())
                .collect();
            assert_eq!(tokens, expected);
            assert_eq!(choices.last().unwrap()["finish_reason"], "stop");
        }
    }
}

#[tokio::test]
async fn one_logprob_a_token_and_never_minus_infinity() {
    let server = Setup::saying("é").start();
    let body = format!("{HELLO},\"logprobs\":true,\"top_logprobs\":2,\"return_token_ids\":true}}");
    let answer = server.post("/v1/chat/completions", body).await.json();
    let choice = &answer["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 3, "two bytes and the end of turn");
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 3);
    assert_eq!(choice["prompt_token_ids"].as_array().unwrap().len(), 21);
    assert_eq!(
        entries[0],
        json!({
            "token": "\u{fffd}", "logprob": -0.5, "bytes": [195],
            "top_logprobs": [
                {"token": entries[0]["top_logprobs"][0]["token"], "logprob": -0.25, "bytes": entries[0]["top_logprobs"][0]["bytes"]},
                {"token": entries[0]["top_logprobs"][1]["token"], "logprob": -9999.0, "bytes": entries[0]["top_logprobs"][1]["bytes"]},
            ],
        })
    );
    assert_eq!(entries[2]["token"], "<|eot_id|>");
}

#[tokio::test]
async fn echo_scores_the_prompt() {
    let server = Setup::saying("xy").start();
    let body = r#"{"prompt":"ab","echo":true,"max_tokens":0,"logprobs":0}"#;
    let answer = settled(server.post("/v1/completions", body).await.json());
    assert_eq!(answer["id"], "cmpl");
    assert_eq!(answer["object"], "text_completion");
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["<s>", "a", "b"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    assert_eq!(choice["logprobs"]["top_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);

    let body = r#"{"prompt":"ab","echo":true,"logprobs":1,"max_tokens":2,"stream":true,"stream_options":{"include_usage":true}}"#;
    let chunks = server.post("/v1/completions", body).await.chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "abxy");
    let offsets: Vec<_> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array()).flatten().collect();
    assert_eq!(offsets, [0, 0, 1, 2, 3]);
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks.last().unwrap()["usage"]["total_tokens"], 5);
}

#[tokio::test]
async fn every_form_of_prompt() {
    let server = Setup::saying("ok").start();
    for (prompt, tokens, choices) in [
        (r#""ab""#, 3, 2),
        (r#"["ab","c"]"#, 5, 4),
        ("[65,66]", 2, 2),
        ("[[65],[66,67],[1,1]]", 5, 0),
        ("[[65],[66,67]]", 3, 4),
        (r#""""#, 1, 2),
    ] {
        let reply = server.post("/v1/completions", format!("{{\"prompt\":{prompt},\"n\":2}}")).await;
        if choices == 0 {
            // One prompt is poisoned: the whole request fails, without a word about why.
            assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR);
            let error = reply.error();
            assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &Value::Null));
            assert!(error["message"].as_str().unwrap().contains(reply.header("x-request-id").unwrap()));
            assert!(!reply.text().contains("finite"));
            continue;
        }
        let answer = reply.json();
        assert_eq!(answer["usage"]["prompt_tokens"], tokens, "{prompt}");
        let indices: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
        assert_eq!(indices, (0..choices).collect::<Vec<_>>());
        assert!(answer["choices"].as_array().unwrap().iter().all(|choice| choice["text"] == "ok"));
    }
}

#[tokio::test]
async fn an_error_in_mid_stream_is_one_event_and_the_end() {
    let server = Setup::saying("ok").start();
    let events = server.post("/v1/completions", r#"{"prompt":[1],"stream":true}"#).await.events();
    assert_eq!(events.len(), 1);
    let error: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(error["error"]["type"], "server_error");
    assert!(error["error"].as_object().unwrap().contains_key("param"));
}

#[tokio::test]
async fn limits_and_defaults_of_length() {
    let server = Setup::saying(&"a".repeat(CONTEXT)).start();
    let length = |answer: Value| answer["usage"]["completion_tokens"].as_u64().unwrap();
    assert_eq!(length(server.post("/v1/completions", r#"{"prompt":"x"}"#).await.json()), 16);
    let whole = server.post("/v1/chat/completions", format!("{HELLO}}}")).await.json();
    assert_eq!(length(whole.clone()), CONTEXT as u64 - 21);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let both = format!("{HELLO},\"max_tokens\":7,\"max_completion_tokens\":3}}");
    assert_eq!(length(server.post("/v1/chat/completions", both).await.json()), 3);
    let early = Setup::saying("ab").start();
    let body = r#"{"prompt":"x","max_tokens":5,"ignore_eos":true,"return_token_ids":true}"#;
    let answer = early.post("/v1/completions", body).await.json();
    assert_eq!(answer["choices"][0]["token_ids"].as_array().unwrap().len(), 5);
    assert_eq!(answer["choices"][0]["prompt_token_ids"].as_array().unwrap()[0], BOS);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn the_filter_reads_prompts_and_answers() {
    let mut setup = Setup::saying("the secret word");
    setup.config.content_filter = Some(rules(
        "[[rule]]\nid = \"s\"\ncategory = \"c\"\nmatch = \"literal\"\npatterns = [\"secret\"]\ndirection = \"both\"\naction = \"block\"\n",
    ));
    let server = setup.start();
    let reply = server.post("/v1/completions", r#"{"prompt":"a SECRET"}"#).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    assert_eq!(reply.error()["code"], "content_filtered");
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    let ids: Vec<u32> = reply_ids(&server, "a secret").await;
    assert_eq!(
        server.post("/v1/completions", json!({"prompt": ids}).to_string()).await.status,
        StatusCode::BAD_REQUEST
    );

    let body = r#"{"prompt":"a","max_tokens":20,"logprobs":0,"stream":true}"#;
    let reply = server.post("/v1/completions", body).await;
    assert!(!reply.text().contains("\"s\""), "no token of the match leaves: {}", reply.text());
    let chunks = reply.chunks();
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "the ");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "content_filter");
}

async fn reply_ids(server: &Fixture, text: &str) -> Vec<u32> {
    let reply = server.post("/tokenize", json!({"prompt": text}).to_string()).await;
    serde_json::from_value(reply.json()["tokens"].clone()).unwrap()
}

#[tokio::test]
async fn the_response_cache_replays_and_renames() {
    let server = Setup::saying("same").start();
    let body = r#"{"prompt":"q","temperature":0,"logprobs":2}"#;
    let first = server.post("/v1/completions", body).await.json();
    let second = server.post("/v1/completions", body).await.json();
    assert_ne!(first["id"], second["id"]);
    assert_eq!(settled(first), settled(second));
    let metrics = server.get("/metrics").await.text();
    for (name, tokens) in [("prompt", 2 * 2), ("generation", 2 * 5)] {
        let line = metrics.lines().find(|line| line.starts_with(&format!("bitnet_{name}_tokens_total"))).unwrap();
        assert!(line.ends_with(&format!(" {tokens}")), "a hit counts like any answer: {line}");
    }
    let hits = |text: String| {
        text.lines().find(|line| line.contains("lookups_total{") && line.contains("hit")).unwrap().to_owned()
    };
    assert!(hits(server.get("/metrics").await.text()).ends_with(" 1"));
    server.post("/v1/completions", r#"{"prompt":"q","temperature":0,"logprobs":2,"cache_prompt":false}"#).await;
    assert!(hits(server.get("/metrics").await.text()).ends_with(" 1"));
}

#[tokio::test]
async fn whoever_joins_has_time_of_its_own() {
    let mut setup = Setup::saying("joined");
    setup.config.request_timeout = Duration::from_secs(2);
    let server = setup.start();
    let held = server.hold.lock().await;
    let body = r#"{"prompt":"q","temperature":0}"#;
    let first = async {
        let reply = server.post("/v1/completions", body).await;
        drop(held);
        reply
    };
    let late = async {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        server.post("/v1/completions", body).await
    };
    let (first, late) = tokio::join!(first, late);
    assert_eq!((first.status, late.status), (StatusCode::INTERNAL_SERVER_ERROR, StatusCode::OK));
    assert_eq!(late.json()["choices"][0]["text"], "joined");
    let metrics = server.get("/metrics").await.text();
    assert!(metrics.contains("lookups_total{result=\"hit\"} 1"), "it was one sequence: {metrics}");
    assert!(metrics.contains("bitnet_cancel_duration_seconds_count 0"), "which nobody ended");
}

#[tokio::test]
async fn a_retry_joins_the_running_answer() {
    let server = Setup::saying("a long enough answer to be joined").start();
    let body = r#"{"prompt":"q","seed":1,"max_tokens":200}"#;
    let answers = futures_util::future::join_all((0..4).map(|_| server.post("/v1/completions", body))).await;
    let ids: std::collections::HashSet<_> = answers.iter().map(|reply| reply.json()["id"].to_string()).collect();
    assert_eq!(ids.len(), 4, "each has an id of its own");
    let answers: Vec<_> = answers.into_iter().map(|reply| settled(reply.json())).collect();
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    let metrics = server.get("/metrics").await.text();
    let steps = metrics.lines().find(|line| line.starts_with("bitnet_prefix_cache_queried_tokens_total")).unwrap();
    assert!(steps.ends_with(" 2"), "one prompt of two tokens reached the engine: {steps}");
}

#[tokio::test]
async fn a_prediction_is_measured_and_changes_nothing() {
    let server = Setup::saying("one two three four").start();
    let body = |prediction: serde_json::Value| {
        json!({"prompt": "q", "temperature": 0, "prediction": {"type": "content", "content": prediction}}).to_string()
    };
    let plain = server.post("/v1/completions", r#"{"prompt":"q","temperature":0,"max_tokens":64}"#).await.json();
    for (prediction, accepted, rejected) in [
        (json!("one two three four"), 18, 0),
        // "one tw" is foreseen, "o " finds the place again, "three f" is foreseen, and the end is not.
        (json!([{"type": "text", "text": "one twenty"}, {"type": "text", "text": "-o three f"}]), 13, 7),
        (json!("<|eot_id|>"), 0, 10),
        (json!(""), 0, 0),
    ] {
        let mut request: serde_json::Value = serde_json::from_str(&body(prediction.clone())).unwrap();
        request["max_tokens"] = json!(64);
        let answer = server.post("/v1/completions", request.to_string()).await.json();
        assert_eq!(answer["choices"], plain["choices"]);
        let details = &answer["usage"]["completion_tokens_details"];
        let counts = (details["accepted_prediction_tokens"].clone(), details["rejected_prediction_tokens"].clone());
        assert_eq!(counts, (json!(accepted), json!(rejected)), "{prediction}");
        assert_eq!(answer["usage"]["completion_tokens"], plain["usage"]["completion_tokens"]);
    }
    let image = body(json!([{"type": "image_url", "image_url": "x"}]));
    assert_eq!(server.post("/v1/completions", image).await.error()["param"], "prediction");
}
