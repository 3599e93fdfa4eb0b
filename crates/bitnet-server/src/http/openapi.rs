//! `/openapi.json`, made from the wire types, and `/docs`, a page that shows it and needs no network.
//!
//! [`OPERATIONS`] names every route once more; a test holds it against the router.

use std::sync::LazyLock;

use axum::{
    body::Bytes,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::{
    openai::{
        ApplyTemplateRequest, BatchObject, BatchRequest, ChatChunk, ChatCompletion, ChatCompletionRequest, Completion,
        CompletionRequest, Deleted, DetokenizeRequest, DetokenizeResponse, EmbeddingList, EmbeddingRequest, ErrorBody,
        FileObject, ModelList, ModelObject, Page, ResponseEvent, ResponseObject, ResponseRequest, TemplateResponse,
        TokenizeRequest, TokenizeResponse,
    },
    service::{Health, ProbeReport},
};

/// One route and method.
struct Operation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    /// The body, if there is one.
    request: Option<Body>,
    answer: Answer,
    access: Access,
}

/// A schema and its name.
type Describe = fn(&mut SchemaGenerator) -> Schema;
type Body = (&'static str, Describe);

enum Answer {
    Json(Describe),
    /// One object, or with `stream` such events.
    JsonOrEvents(Describe, Describe),
    /// The same object whether all is well or not.
    Health(Describe),
    Text(&'static str),
    /// There is none: every call is refused.
    Refusal,
}

#[derive(PartialEq)]
enum Access {
    /// Needs a key where keys are set, counts against the caller's limit, and a loaded model.
    Model,
    /// Needs a key where keys are set and counts against the caller's limit.
    Keyed,
    Open,
}

pub(super) async fn document() -> Response {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(describe().to_string()));
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.clone()).into_response()
}

pub(super) async fn page() -> Response {
    const PAGE: &str = include_str!("docs.html");
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        // The page is one file and reads the document from where it came: nothing else may run or be fetched.
        (
            HeaderName::from_static("content-security-policy"),
            HeaderValue::from_static(
                "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'",
            ),
        ),
    ];
    (headers, PAGE).into_response()
}

/// The whole document.
fn describe() -> Value {
    // What we read and what we write differ in which fields must be there. What is read has no names of its own inside, so
    // that the names are those of answers.
    let requests = SchemaSettings::draft2020_12().with(|settings| {
        settings.meta_schema = None;
        settings.inline_subschemas = true;
    });
    let answers = SchemaSettings::draft2020_12().for_serialize().with(|settings| {
        settings.meta_schema = None;
        settings.definitions_path = "/components/schemas".into();
    });
    let (mut requests, mut answers) = (requests.into_generator(), answers.into_generator());
    let error = answers.subschema_for::<ErrorBody>();
    let (mut paths, mut schemas) = (Map::new(), Map::new());
    for operation in OPERATIONS {
        if let Some((name, schema)) = operation.request {
            schemas.insert(name.to_owned(), schema(&mut requests).into());
        }
        let methods = paths.entry(operation.path).or_insert_with(|| json!({}));
        methods[operation.method] = operation.describe(&mut answers, &error);
    }
    schemas.extend(answers.take_definitions(true));
    json!({
        "openapi": "3.2.0",
        "info": {
            "title": "bitnet",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "An OpenAI-compatible server for 1-bit language models. The routes below /v1 answer without \
                /v1 as well. A field that is null is absent; unknown fields are ignored unless the server runs with \
                --strict-params.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    })
}

impl Operation {
    fn describe(&self, answers: &mut SchemaGenerator, error: &Schema) -> Value {
        let mut operation = json!({
            "summary": self.summary,
            "operationId": format!("{}{}", self.method, self.path.replace(['/', '{', '}', '.', '-'], "_")),
            "responses": self.responses(answers, error),
            // Both: with a key, and, where the server has none, without.
            "security": if self.access == Access::Open { json!([]) } else { json!([{"key": []}, {}]) },
        });
        if let Some((name, _)) = self.request {
            let schema = json!({"$ref": format!("#/components/schemas/{name}")});
            operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        }
        let mut parameters = Vec::new();
        if self.path.contains("{id}") {
            parameters.push(json!({"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}));
        }
        for (name, schema, description) in self.queries() {
            let parameter = json!({"name": name, "in": "query", "schema": schema, "description": description});
            parameters.push(parameter);
        }
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        operation
    }

    /// Name, schema and meaning of what may stand behind the `?`.
    fn queries(&self) -> Vec<(&'static str, Value, &'static str)> {
        let text = || json!({"type": "string"});
        let page = |max: u64| {
            vec![
                ("limit", json!({"type": "integer", "minimum": 1, "maximum": max}), "Objects on a page."),
                ("after", text(), "The object before the first one."),
                ("order", json!({"enum": ["asc", "desc"]}), "By time."),
            ]
        };
        match (self.method, self.path) {
            ("get", HISTORY) => {
                let since = json!({"type": "integer", "minimum": 0, "maximum": u64::MAX});
                vec![("since", since, "Seconds since 1970; everything when absent.")]
            }
            ("get", FILES) => [page(10_000), vec![("purpose", text(), "Files for this only.")]].concat(),
            ("get", BATCHES) => page(100),
            _ => Vec::new(),
        }
    }

    fn responses(&self, answers: &mut SchemaGenerator, error: &Schema) -> Value {
        let json_of = |schema: Schema| json!({"application/json": {"schema": schema}});
        let fine = match &self.answer {
            Answer::Json(schema) | Answer::Health(schema) => json_of(schema(answers)),
            Answer::JsonOrEvents(whole, event) => {
                let mut content = json_of(whole(answers));
                let data = json!({"anyOf": [event(answers), error]});
                let data = json!({"contentMediaType": "application/json", "contentSchema": data});
                let data = json!({"type": "string", "anyOf": [{"const": "[DONE]"}, data]});
                let event = json!({"type": "object", "properties": {"data": data}, "required": ["data"]});
                content["text/event-stream"] = json!({"itemSchema": event});
                content
            }
            Answer::Text(media_type) => json!({*media_type: {"schema": {"type": "string"}}}),
            Answer::Refusal => Value::Null,
        };
        let mut responses = match self.answer {
            Answer::Refusal => json!({}),
            _ => json!({"200": {"description": "As asked.", "content": fine}}),
        };
        if matches!(self.answer, Answer::Health(_)) {
            responses["503"] = json!({"description": "Not now.", "content": fine});
        }
        for (status, description) in self.errors() {
            responses[*status] = json!({"description": description, "content": json_of(error.clone())});
        }
        responses
    }

    fn errors(&self) -> impl Iterator<Item = &(&'static str, &'static str)> {
        let with_body = self.request.is_some();
        let with_id = self.path.contains("{id}");
        let stored = self.path.starts_with(FILES) || self.path.starts_with(BATCHES);
        ERRORS.iter().filter(move |(status, _)| match *status {
            "400" => with_body || stored || self.path == HISTORY,
            "404" => with_body || with_id || stored,
            "408" | "413" | "415" => with_body,
            "500" => stored || self.access == Access::Model,
            "503" => self.access == Access::Model,
            _ => self.access != Access::Open,
        })
    }
}

const ERRORS: &[(&str, &str)] = &[
    ("400", "The request is wrong; `param` names the field."),
    ("401", "A key is missing or wrong."),
    ("404", "No such model or object."),
    ("408", "The body did not arrive in time."),
    ("413", "The body is too large."),
    ("415", "The body is not JSON, or encoded."),
    ("429", "The caller's own limit; `Retry-After` says when to come back."),
    ("500", "The server failed."),
    ("503", "The queue is full, or the server loads or drains; `Retry-After` says when to come back."),
];

const HISTORY: &str = "/stats/history";
const FILES: &str = "/v1/files";
const BATCHES: &str = "/v1/batches";
/// The one body that is a form.
const UPLOAD: &str = "FileUpload";

fn upload(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({
        "type": "object", "required": ["file", "purpose"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
    })
}

/// `T` as requests hold it: inside out, without a name.
fn body<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    T::json_schema(generator)
}

fn answer<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// `{"status": "ok"}`.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "it describes what `http::health` writes")]
struct Status {
    /// `ok`, `loading`, `draining` or `failed`.
    status: String,
}

const fn get(path: &'static str, summary: &'static str, answer: Answer, access: Access) -> Operation {
    Operation { method: "get", path, summary, request: None, answer, access }
}

const fn post(path: &'static str, summary: &'static str, request: Body, answer: Answer) -> Operation {
    Operation { method: "post", path, summary, request: Some(request), answer, access: Access::Model }
}

/// `operation` by another method.
const fn with(method: &'static str, operation: Operation) -> Operation {
    Operation { method, ..operation }
}

/// Every route, in the order of the page.
const OPERATIONS: &[Operation] = &[
    post(
        "/v1/chat/completions",
        "Answers a conversation",
        ("ChatCompletionRequest", body::<ChatCompletionRequest>),
        Answer::JsonOrEvents(answer::<ChatCompletion>, answer::<ChatChunk>),
    ),
    post(
        "/v1/completions",
        "Continues a text",
        ("CompletionRequest", body::<CompletionRequest>),
        Answer::JsonOrEvents(answer::<Completion>, answer::<Completion>),
    ),
    post(
        "/v1/responses",
        "Answers input items; keeps nothing",
        ("ResponseRequest", body::<ResponseRequest>),
        Answer::JsonOrEvents(answer::<ResponseObject>, answer::<ResponseEvent>),
    ),
    get("/v1/responses/{id}", "Always 404: nothing is kept", Answer::Refusal, Access::Keyed),
    with("delete", get("/v1/responses/{id}", "Always 404: nothing is kept", Answer::Refusal, Access::Keyed)),
    with("post", get("/v1/responses/{id}/cancel", "Always 404: nothing is kept", Answer::Refusal, Access::Keyed)),
    get("/v1/responses/{id}/input_items", "Always 404: nothing is kept", Answer::Refusal, Access::Keyed),
    post(
        "/v1/embeddings",
        "A vector for each text, by embedding models",
        ("EmbeddingRequest", body::<EmbeddingRequest>),
        Answer::Json(answer::<EmbeddingList>),
    ),
    get(FILES, "The caller's files", Answer::Json(answer::<Page<FileObject>>), Access::Keyed),
    post(FILES, "Stores a file", (UPLOAD, upload), Answer::Json(answer::<FileObject>)),
    get("/v1/files/{id}", "One file", Answer::Json(answer::<FileObject>), Access::Keyed),
    with("delete", get("/v1/files/{id}", "Deletes a file", Answer::Json(answer::<Deleted>), Access::Keyed)),
    get("/v1/files/{id}/content", "What is in a file", Answer::Text("application/octet-stream"), Access::Keyed),
    get(BATCHES, "The caller's batches", Answer::Json(answer::<Page<BatchObject>>), Access::Keyed),
    post(
        BATCHES,
        "Answers the lines of a file",
        ("BatchRequest", body::<BatchRequest>),
        Answer::Json(answer::<BatchObject>),
    ),
    get("/v1/batches/{id}", "One batch", Answer::Json(answer::<BatchObject>), Access::Keyed),
    with(
        "post",
        get("/v1/batches/{id}/cancel", "Ends a batch early", Answer::Json(answer::<BatchObject>), Access::Keyed),
    ),
    get("/v1/models", "The served models", Answer::Json(answer::<ModelList>), Access::Model),
    get("/v1/models/{id}", "One served model", Answer::Json(answer::<ModelObject>), Access::Model),
    post(
        "/tokenize",
        "A text or a conversation as token ids",
        ("TokenizeRequest", body::<TokenizeRequest>),
        Answer::Json(answer::<TokenizeResponse>),
    ),
    post(
        "/detokenize",
        "Token ids as text",
        ("DetokenizeRequest", body::<DetokenizeRequest>),
        Answer::Json(answer::<DetokenizeResponse>),
    ),
    post(
        "/apply-template",
        "A conversation as the model reads it",
        ("ApplyTemplateRequest", body::<ApplyTemplateRequest>),
        Answer::Json(answer::<TemplateResponse>),
    ),
    get("/health", "How the server is", Answer::Health(answer::<Health>), Access::Open),
    get("/health/live", "Whether a restart would help", Answer::Health(answer::<Status>), Access::Open),
    get("/livez", "As /health/live", Answer::Health(answer::<Status>), Access::Open),
    get("/health/ready", "Whether requests are taken", Answer::Health(answer::<Status>), Access::Open),
    get("/readyz", "As /health/ready", Answer::Health(answer::<Status>), Access::Open),
    get("/health/startup", "Whether the model has been loaded", Answer::Health(answer::<Status>), Access::Open),
    get("/health/generate", "Generates a token, really", Answer::Health(probe), Access::Open),
    get("/metrics", "Figures for Prometheus", Answer::Text("text/plain"), Access::Open),
    get("/stats", "The same figures as JSON", Answer::Json(answer::<Map<String, Value>>), Access::Keyed),
    get(HISTORY, "The figures of the last day", Answer::Json(answer::<Map<String, Value>>), Access::Keyed),
    get("/openapi.json", "This document", Answer::Json(answer::<Map<String, Value>>), Access::Open),
    get("/docs", "This document as a page", Answer::Text("text/html"), Access::Open),
];

/// A probe's report, or, where none could run, the phase.
fn probe(generator: &mut SchemaGenerator) -> Schema {
    let (report, status) = (generator.subschema_for::<ProbeReport>(), generator.subschema_for::<Status>());
    schemars::json_schema!({"anyOf": [report, status]})
}
