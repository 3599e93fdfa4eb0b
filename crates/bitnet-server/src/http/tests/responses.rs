//! `/v1/responses`: events in order, the fold equal to the stream, errors by field.

use serde_json::{Value, json};

use super::*;

impl Fixture {
    async fn respond(&self, body: Value) -> Reply {
        self.post("/v1/responses", body.to_string()).await
    }
}

/// The events of a stream, after checking names and numbers.
fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.header("content-type"), Some("text/event-stream"), "{}", reply.text());
    let mut events = Vec::new();
    for frame in reply.text().split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':')) {
        let (name, data) = frame.split_once('\n').unwrap_or_else(|| panic!("odd frame {frame}"));
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        assert_eq!(data["sequence_number"], events.len());
        events.push(data);
    }
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap().trim_start_matches("response.")).collect()
}

#[tokio::test]
async fn a_whole_answer_has_every_key_clients_read() {
    let server = Setup::saying("Hé!").start();
    for path in ["/v1/responses", "/responses"] {
        let body =
            json!({"input": "hi", "instructions": "short", "metadata": {"a": "b"}, "temperature": 0, "store": true});
        let reply = server.post(path, body.to_string()).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        let answer = reply.json();
        assert!(answer["id"].as_str().unwrap().starts_with("resp_"));
        let expected = json!({
            "object": "response", "status": "completed", "background": false, "error": null,
            "incomplete_details": null, "model": "org/model", "previous_response_id": null,
            "instructions": "short", "max_output_tokens": null, "metadata": {"a": "b"},
            "parallel_tool_calls": true, "store": false, "temperature": 0.0, "top_p": 1.0, "tools": [],
            "tool_choice": "auto", "truncation": "disabled", "text": {"format": {"type": "text"}}, "top_logprobs": 0,
        });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&answer[key], value, "{key}");
        }
        let item = &answer["output"][0];
        assert_eq!(
            (&item["type"], &item["role"], &item["status"]),
            (&json!("message"), &json!("assistant"), &json!("completed"))
        );
        assert_eq!(item["content"], json!([{"type": "output_text", "text": "Hé!", "annotations": [], "logprobs": []}]));
        let usage = &answer["usage"];
        // BOS, "system: short", "user: hi", two ends of turn, "assistant: "; four bytes and the end of turn.
        assert_eq!(
            (&usage["input_tokens"], &usage["output_tokens"], &usage["total_tokens"]),
            (&json!(35), &json!(5), &json!(40))
        );
        assert_eq!(usage["output_tokens_details"], json!({"reasoning_tokens": 0}));
        assert!(usage["input_tokens_details"]["cached_tokens"].is_u64());
    }
}

#[tokio::test]
async fn the_stream_tells_the_same_in_order() {
    let server = Setup::saying("é€!").start();
    let body = json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "temperature": 0,
        "include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let whole = server.respond(body.clone()).await.json();
    let mut streamed = body;
    streamed["stream"] = true.into();
    let events = events(&server.respond(streamed).await);
    let text_delta = "output_text.delta";
    let kinds: Vec<_> = kinds(&events);
    let (first, rest) = kinds.split_at(4);
    assert_eq!(first, ["created", "in_progress", "output_item.added", "content_part.added"]);
    let (deltas, last) = rest.split_at(rest.len() - 4);
    assert!(!deltas.is_empty() && deltas.iter().all(|kind| *kind == text_delta), "{kinds:?}");
    assert_eq!(last, ["output_text.done", "content_part.done", "output_item.done", "completed"]);
    let end = &events[events.len() - 1]["response"];
    assert_eq!(end["output"][0]["content"], whole["output"][0]["content"]);
    assert_eq!(end["usage"]["output_tokens"], whole["usage"]["output_tokens"]);
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.clone().map(|event| event["delta"].as_str().unwrap()).collect();
    assert_eq!(text, "é€!");
    let logprobs: usize = deltas.map(|event| event["logprobs"].as_array().unwrap().len()).sum();
    assert_eq!(logprobs, whole["output"][0]["content"][0]["logprobs"].as_array().unwrap().len());
    assert_eq!(logprobs, 7, "one entry a token, the end of turn included");
    let id = &events[0]["response"]["id"];
    assert!(events.iter().filter_map(|event| event.get("response")).all(|response| &response["id"] == id));
}

#[tokio::test]
async fn a_cut_answer_is_incomplete_and_a_failed_one_says_so() {
    let server = Setup::saying("long text").start();
    let whole = server.respond(json!({"input": "hi", "max_output_tokens": 3})).await.json();
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]),
        (&json!("incomplete"), &json!({"reason": "max_output_tokens"}))
    );
    assert_eq!(whole["output"][0]["status"], "incomplete");
    let cut = events(&server.respond(json!({"input": "hi", "max_output_tokens": 3, "stream": true})).await);
    assert_eq!(kinds(&cut).last(), Some(&"incomplete"));
    let failed = events(&server.respond(json!({"input": "\u{1}", "stream": true})).await);
    assert_eq!(kinds(&failed), ["created", "in_progress", "failed"]);
    assert_eq!(failed[2]["response"]["error"]["code"], "server_error");
    assert_eq!(server.respond(json!({"input": "\u{1}"})).await.status, StatusCode::INTERNAL_SERVER_ERROR);
}

#[tokio::test]
async fn calls_and_their_results_are_messages() {
    let server = Setup::saying("ok").start();
    let body = json!({"temperature": 0, "input": [
        {"type": "message", "role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "c"},
    ]});
    let as_response = server.respond(body).await.json();
    let chat = json!({"temperature": 0, "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "c"},
    ]});
    let as_chat = server.post("/v1/chat/completions", chat.to_string()).await.json();
    assert_eq!(as_response["usage"]["input_tokens"], as_chat["usage"]["prompt_tokens"]);
    assert_eq!(as_response["usage"]["output_tokens"], as_chat["usage"]["completion_tokens"]);
}

#[tokio::test]
async fn what_does_not_fit_is_left_out_if_asked_for() {
    let server = Setup::saying("ok").start();
    let turn = |index: usize| json!({"role": "user", "content": format!("{index}{}", "x".repeat(40))});
    let input: Vec<_> = (0..9).map(turn).collect();
    let body = |truncation: &str, input: &[Value]| json!({"instructions": "i", "input": input, "truncation": truncation, "temperature": 0});
    assert_eq!(server.respond(body("disabled", &input)).await.status, StatusCode::BAD_REQUEST);
    let cut = server.respond(body("auto", &input)).await.json();
    assert_eq!((&cut["status"], &cut["truncation"]), (&json!("completed"), &json!("auto")));
    // BOS, "system: i", four of 48 with their ends of turn, "assistant: ".
    let newest = server.respond(body("disabled", &input[5..])).await.json();
    assert_eq!(cut["usage"]["input_tokens"], newest["usage"]["input_tokens"]);
    assert_eq!(server.respond(body("disabled", &input[4..])).await.status, StatusCode::BAD_REQUEST);
    let short = server.respond(body("auto", &input[8..])).await.json();
    assert_eq!(
        short["usage"]["input_tokens"],
        server.respond(body("disabled", &input[8..])).await.json()["usage"]["input_tokens"]
    );
}

#[tokio::test]
async fn errors_name_the_field_as_written() {
    let server = Setup::saying("ok").start();
    let cases = [
        (json!({}), "input", "missing_required_parameter"),
        (json!({"input": []}), "input", "invalid_value"),
        (json!({"input": 3}), "input", "invalid_value"),
        (json!({"input": [{"role": "user"}]}), "input", "invalid_value"),
        (json!({"input": [{"role": "pirate", "content": "x"}]}), "input", "invalid_value"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input", "unsupported_parameter"),
        (json!({"input": [{"type": "computer_call"}]}), "input", "unsupported_parameter"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input", "unsupported_parameter"),
        (json!({"input": "x".repeat(400)}), "input", "context_length_exceeded"),
        (json!({"input": "x", "previous_response_id": "resp_1"}), "previous_response_id", "unsupported_parameter"),
        (json!({"input": "x", "conversation": "conv_1"}), "conversation", "unsupported_parameter"),
        (json!({"input": "x", "background": true}), "background", "unsupported_parameter"),
        (json!({"input": "x", "truncation": "some"}), "truncation", "invalid_value"),
        (json!({"input": "x".repeat(400), "truncation": "auto"}), "input", "context_length_exceeded"),
        (json!({"input": "x", "max_output_tokens": 0}), "max_output_tokens", "invalid_value"),
        (json!({"input": "x", "temperature": 3}), "temperature", "invalid_value"),
        (json!({"input": "x", "include": ["everything"]}), "include", "invalid_value"),
        (json!({"input": "x", "top_logprobs": 21}), "top_logprobs", "invalid_value"),
        (json!({"input": "x", "tools": [{"type": "web_search"}]}), "tools", "unsupported_parameter"),
        (json!({"input": "x", "tools": [{"type": "function", "name": "a b"}]}), "tools", "invalid_value"),
        (json!({"input": "x", "tool_choice": "required"}), "tool_choice", "invalid_value"),
        (json!({"input": "x", "text": {"format": {"type": "poem"}}}), "text", "invalid_value"),
        (
            json!({"input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}),
            "text",
            "unsupported_parameter",
        ),
        (json!({"input": "x", "text": 3}), "text", "invalid_value"),
        (json!({"input": "x", "response_format": {"type": "json_object"}}), "response_format", "unsupported_parameter"),
    ];
    for (body, param, code) in cases {
        let reply = server.respond(body.clone()).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{body}");
        let error = reply.error();
        assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), Some(code)), "{body}: {error}");
    }
}

#[tokio::test]
async fn every_field_of_the_api_is_known() {
    let mut setup = Setup::saying("ok");
    setup.config.strict_params = true;
    let server = setup.start();
    let body = json!({
        "model": "alias", "input": "x", "instructions": null, "max_output_tokens": 8, "temperature": 0, "top_p": 1,
        "metadata": {}, "store": false, "background": false, "previous_response_id": null, "conversation": null,
        "parallel_tool_calls": true, "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "low"},
        "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}, "service_tier": "auto", "truncation": "auto",
        "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "top_logprobs": 0, "max_tool_calls": 3,
        "stream": true, "stream_options": {"include_obfuscation": true},
    });
    let events = events(&server.respond(body).await);
    let delta = events.iter().find(|event| event["type"] == "response.output_text.delta").unwrap();
    assert!(!delta["obfuscation"].as_str().unwrap().is_empty());
    let reply = server.respond(json!({"input": "x", "mystery": 1})).await;
    assert_eq!(reply.error()["param"], "mystery");
}

#[tokio::test]
async fn nothing_is_kept() {
    let server = Setup::saying("ok").start();
    let delete = Request::delete("/v1/responses/resp_1").body(Body::empty()).unwrap();
    for reply in [server.get("/v1/responses/resp_1").await, server.send(delete).await] {
        assert_eq!(reply.status, StatusCode::NOT_FOUND);
        assert!(reply.error()["message"].as_str().unwrap().contains("resp_1"));
    }
}
