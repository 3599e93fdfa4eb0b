//! The API's description of itself: every route and nothing else, and fields that the readers know.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::openai::{
    ApplyTemplateRequest, BatchRequest, BodyError, ChatCompletionRequest, CompletionRequest, DetokenizeRequest,
    EmbeddingRequest, ResponseRequest, TokenizeRequest,
};

async fn document() -> Value {
    let mut setup = Setup::saying("x");
    setup.config.api_keys = crate::config::KeySet::parse("me:hunter2\n", "test").unwrap();
    let reply = setup.loading().get("/openapi.json").await;
    assert_eq!((reply.status, reply.header("content-type")), (StatusCode::OK, Some("application/json")));
    reply.json()
}

/// (method, path) of every route in the router's source.
fn routes() -> BTreeSet<(String, String)> {
    let source = include_str!("../mod.rs");
    let (api, rest) = source.split_once("let routes = Router::new()").expect("the router has two parts");
    let found = |text: &str, prefix: &str| -> Vec<(String, String)> {
        text.split(".route(")
            .skip(1)
            .flat_map(|call| {
                let path = call.split('"').nth(1).expect("a path").replace("{*", "{");
                let handlers = call.split_once(',').expect("a handler").1;
                let methods = ["get", "post", "delete"].into_iter();
                let statement =
                    handlers.split(['\n', ';']).find(|line| line.contains('(')).expect("a method").to_owned();
                let prefix = prefix.to_owned();
                methods
                    .filter(move |method| statement.contains(&format!("{method}(")))
                    .map(move |method| (method.to_owned(), format!("{prefix}{path}")))
            })
            .collect()
    };
    found(api, "/v1").into_iter().chain(found(rest, "")).collect()
}

#[tokio::test]
async fn every_route_is_described_and_nothing_else() {
    let document = document().await;
    let described: BTreeSet<_> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| methods.as_object().unwrap().keys().map(|method| (method.clone(), path.clone())))
        .collect();
    assert!(described.len() > 15);
    assert_eq!(described, routes());
}

#[tokio::test]
async fn described_fields_are_read() {
    let document = document().await;
    type Reader = fn(&[u8]) -> Result<(), BodyError>;
    let readers: [(&str, Value, Reader); 8] = [
        ("ChatCompletionRequest", json!({"messages": []}), |body| {
            ChatCompletionRequest::from_json(body, true).map(drop)
        }),
        ("CompletionRequest", json!({"prompt": "x"}), |body| CompletionRequest::from_json(body, true).map(drop)),
        ("TokenizeRequest", json!({"prompt": "x"}), |body| TokenizeRequest::from_json(body, true).map(drop)),
        ("DetokenizeRequest", json!({"tokens": []}), |body| DetokenizeRequest::from_json(body, true).map(drop)),
        ("ResponseRequest", json!({"input": "x"}), |body| ResponseRequest::from_json(body, true).map(drop)),
        ("EmbeddingRequest", json!({"input": "x"}), |body| EmbeddingRequest::from_json(body, true).map(drop)),
        (
            "BatchRequest",
            json!({"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"}),
            |body| BatchRequest::from_json(body, true).map(drop),
        ),
        ("ApplyTemplateRequest", json!({"messages": []}), |body| ApplyTemplateRequest::from_json(body, true).map(drop)),
    ];
    for (name, body, read) in readers {
        let fields = document["components"]["schemas"][name]["properties"].as_object().unwrap();
        for field in fields.keys() {
            let mut body = body.clone();
            if body.get(field).is_none() {
                // An odd value: the reader either names the field as wrong, or takes it; only "unknown" must not be.
                body[field] = json!({"odd": 1});
            }
            if let Err(error) = read(body.to_string().as_bytes()) {
                assert!(!error.message.contains("Unknown parameter"), "{name}: {}", error.message);
                assert_eq!(error.param.as_deref(), Some(field.as_str()), "{name}: {}", error.message);
            }
        }
    }
    let chat = document["components"]["schemas"]["ChatCompletionRequest"]["properties"].as_object().unwrap();
    for field in [
        "model messages max_tokens max_completion_tokens temperature top_p top_k min_p repetition_penalty n seed stop",
        "frequency_penalty presence_penalty logit_bias logprobs top_logprobs stream stream_options response_format tools",
        "tool_choice parallel_tool_calls prediction metadata user store service_tier ignore_eos min_tokens priority",
        "return_token_ids chat_template_kwargs continue_final_message add_generation_prompt cache_prompt guided_json",
        "guided_regex guided_grammar guided_choice structured_outputs",
    ]
    .iter()
    .flat_map(|names| names.split(' '))
    {
        assert!(chat.contains_key(field), "{field} is not described");
    }
}

#[tokio::test]
async fn ranges_and_nulls_are_true() {
    let document = document().await;
    let chat = &document["components"]["schemas"]["ChatCompletionRequest"];
    assert_eq!(chat["required"], json!(["messages"]));
    let temperature = &chat["properties"]["temperature"];
    assert_eq!((&temperature["minimum"], &temperature["maximum"]), (&json!(0.0), &json!(2.0)), "{temperature}");
    assert_eq!(temperature["type"], json!(["number", "null"]));
    let text = &document["components"]["schemas"]["CompletionRequest"];
    assert_eq!(text["required"], json!(["prompt"]));
    let answer = &document["components"]["schemas"]["ChatChoice"];
    assert_eq!(answer["required"], json!(["index", "message", "logprobs", "finish_reason"]));
}

/// Every `$ref` leads somewhere.
#[tokio::test]
async fn references_resolve() {
    fn walk(value: &Value, document: &Value) {
        match value {
            Value::Object(members) => {
                if let Some(Value::String(reference)) = members.get("$ref") {
                    assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
                }
                members.values().for_each(|value| walk(value, document));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(value, document)),
            _ => {}
        }
    }
    let document = document().await;
    walk(&document, &document);
}

#[tokio::test]
async fn the_page_is_open_and_loads_nothing_from_elsewhere() {
    let reply = Setup::saying("x").loading().get("/docs").await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(reply.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(!reply.text().contains("http://") && !reply.text().contains("https://") && !reply.text().contains("src="));
}
