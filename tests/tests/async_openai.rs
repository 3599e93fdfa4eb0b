//! `async-openai`, the client with the strictest types, against the real binary: what it reads has every field it demands.

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::{ApiErrorResponse, OpenAIError},
    types::{
        chat::{
            ChatCompletionMessageToolCalls, CreateChatCompletionRequest, CreateChatCompletionStreamResponse,
            FinishReason, Role,
        },
        completions::CreateCompletionRequest,
        embeddings::CreateEmbeddingRequest,
    },
};
use bitnet_tests::{golden, server::Server};
use futures_util::{StreamExt, TryStreamExt};
use serde_json::{Value, json};

const MODEL: &str = "p1_packed";

fn serve() -> (Server, Client<OpenAIConfig>) {
    let server = Server::start(&["-m", &golden::arg(MODEL)]);
    let config = OpenAIConfig::new().with_api_base(server.url("/v1")).with_api_key("unused");
    (server, Client::with_config(config))
}

/// A chat request of one message with `fields`.
fn chat(fields: Value) -> CreateChatCompletionRequest {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    serde_json::from_value(body).expect("a request of the client's types")
}

fn text(fields: Value) -> CreateCompletionRequest {
    let mut body = json!({"model": MODEL, "prompt": "Hello", "max_tokens": 12});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    serde_json::from_value(body).expect("a request of the client's types")
}

fn tools(choice: &str) -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": false});
    json!({"tools": [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}],
        "tool_choice": choice, "parallel_tool_calls": false, "seed": 2})
}

async fn streamed(client: &Client<OpenAIConfig>, fields: Value) -> Vec<CreateChatCompletionStreamResponse> {
    let stream = client.chat().create_stream(chat(fields)).await.expect("a stream");
    stream.try_collect().await.expect("every chunk is of the client's types")
}

fn refusal<T>(result: Result<T, OpenAIError>) -> ApiErrorResponse {
    match result {
        Err(OpenAIError::ApiError(error)) => error,
        Err(other) => panic!("not an error of the API: {other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

#[tokio::test]
async fn models() {
    let (_server, client) = serve();
    let models = client.models().list().await.expect("a list");
    assert_eq!(models.data.iter().map(|model| model.id.as_str()).collect::<Vec<_>>(), [MODEL]);
    assert_eq!(client.models().retrieve(MODEL).await.expect("a model").object, "model");
    assert_eq!(refusal(client.models().retrieve("none").await).api_error.code.as_deref(), Some("model_not_found"));
}

#[tokio::test]
async fn chat_whole_and_streamed() {
    let (_server, client) = serve();
    let fields = json!({"seed": 1, "n": 2, "max_tokens": 20, "logprobs": true, "top_logprobs": 3});
    let whole = client.chat().create(chat(fields.clone())).await.expect("an answer of the client's types");
    assert_eq!(whole.object, "chat.completion");
    assert_eq!(whole.choices.len(), 2);
    assert!(whole.choices.iter().all(|choice| choice.message.role == Role::Assistant));
    let entries = whole.choices[0].logprobs.as_ref().and_then(|logprobs| logprobs.content.as_ref()).expect("logprobs");
    assert!(entries.iter().all(|entry| entry.top_logprobs.len() == 3));

    let mut with_stream = fields;
    with_stream["stream_options"] = json!({"include_usage": true});
    let chunks = streamed(&client, with_stream).await;
    for choice in &whole.choices {
        let own: String = chunks
            .iter()
            .flat_map(|chunk| &chunk.choices)
            .filter(|news| news.index == choice.index)
            .filter_map(|news| news.delta.content.as_deref())
            .collect();
        assert_eq!(Some(own), choice.message.content);
    }
    let last = chunks.last().expect("chunks");
    assert!(last.choices.is_empty());
    let tokens =
        |usage: Option<&async_openai::types::chat::CompletionUsage>| usage.map(|usage| usage.completion_tokens);
    assert_eq!(tokens(last.usage.as_ref()), tokens(whole.usage.as_ref()));
}

#[tokio::test]
async fn tools_whole_and_streamed() {
    let (_server, client) = serve();
    let answer = client.chat().create(chat(tools("required"))).await.expect("an answer of the client's types");
    let choice = &answer.choices[0];
    assert_eq!(choice.finish_reason, Some(FinishReason::ToolCalls));
    let calls = choice.message.tool_calls.as_ref().expect("calls");
    let [ChatCompletionMessageToolCalls::Function(call)] = calls.as_slice() else { panic!("one function: {calls:?}") };
    assert_eq!(call.function.name, "get_weather");
    let arguments: Value = serde_json::from_str(&call.function.arguments).expect("JSON");
    assert!(["Rome", "Oslo"].iter().any(|city| arguments == json!({"city": city})));

    let chunks = streamed(&client, tools("required")).await;
    let news = chunks.iter().flat_map(|chunk| &chunk.choices).filter_map(|choice| choice.delta.tool_calls.as_ref());
    let parts = news.flatten().filter_map(|call| call.function.as_ref()?.arguments.as_deref());
    assert_eq!(parts.collect::<String>(), call.function.arguments);
}

#[tokio::test]
async fn structured_output() {
    let (_server, client) = serve();
    let schema = json!({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": false});
    let form = json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}});
    let answer = client.chat().create(chat(json!({"response_format": form}))).await.expect("an answer");
    let content = answer.choices[0].message.content.as_deref().expect("text");
    assert!([r#"{"a":1}"#, r#"{"a":2}"#].contains(&content), "{content}");
}

#[tokio::test]
async fn completions_whole_and_streamed() {
    let (_server, client) = serve();
    let fields = json!({"temperature": 0.0, "logprobs": 2, "echo": true});
    let whole = client.completions().create(text(fields.clone())).await.expect("an answer of the client's types");
    assert!(whole.choices[0].text.starts_with("Hello"));
    assert!(whole.choices[0].logprobs.is_some());
    let stream = client.completions().create_stream(text(fields)).await.expect("a stream");
    let parts: Vec<String> =
        stream.map(|chunk| chunk.expect("a chunk of the client's types").choices[0].text.clone()).collect().await;
    assert_eq!(parts.concat(), whole.choices[0].text);
    let several = client.completions().create(text(json!({"prompt": [[500, 69], [500, 83]], "n": 2}))).await;
    assert_eq!(several.expect("an answer").choices.len(), 4);
}

#[tokio::test]
async fn refusals_are_read() {
    let (_server, client) = serve();
    let error = refusal(client.chat().create(chat(json!({"temperature": 3.0}))).await);
    assert_eq!(error.status_code.as_u16(), 400);
    assert_eq!(error.api_error.param.as_deref(), Some("temperature"));
    assert_eq!(error.api_error.code.as_deref(), Some("invalid_value"));
    let error = refusal(client.chat().create(chat(json!({"model": "none"}))).await);
    assert_eq!(error.status_code.as_u16(), 404);
    // A chat model has no embeddings to give.
    let body = json!({"model": MODEL, "input": "x"});
    let request: CreateEmbeddingRequest = serde_json::from_value(body).expect("a request of the client's types");
    let error = refusal(client.embeddings().create(request).await);
    assert!(error.status_code.is_client_error());
    assert_eq!(error.api_error.r#type.as_deref(), Some("invalid_request_error"));
}
