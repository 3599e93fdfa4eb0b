//! What a caller may say about the form of the output: `response_format`, and the `guided_*` extensions of other servers.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::Value;

use super::{
    fields::{BodyError, Fields},
    objects::objects_only,
};

/// What the output must look like, and where the request said so.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputFormat {
    /// The top-level field.
    pub param: &'static str,
    /// The place of a schema in the request.
    pub path: &'static str,
    /// The form.
    pub kind: OutputKind,
}

/// The forms of an output.
#[derive(Clone, Debug, PartialEq)]
pub enum OutputKind {
    /// Any JSON object.
    JsonObject,
    /// JSON by a schema.
    Schema(Value),
    /// A text that matches an expression.
    Regex(String),
    /// One of several texts.
    Choice(Vec<String>),
    /// A text of a Lark grammar.
    Grammar(String),
}

#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct ResponseFormat {
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["text", "json_object", "json_schema"]))]
    kind: String,
    json_schema: Option<NamedSchema>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct NamedSchema {
    #[schemars(regex(pattern = r"^[a-zA-Z0-9_-]{1,64}$"))]
    name: String,
    schema: Option<Value>,
    /// The schema is enforced either way.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
    #[serde(rename = "description")]
    _description: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct StructuredOutputs {
    json: Option<Value>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
}

objects_only!(ResponseFormat, NamedSchema, StructuredOutputs, TextFormat);

impl OutputFormat {
    /// Takes the fields; at most one of them may ask for anything.
    pub(super) fn take(fields: &mut Fields) -> Result<Option<Self>, BodyError> {
        let mut found: Option<Self> = None;
        let mut add = |format: Option<Self>| match (format, &found) {
            (None, _) => Ok(()),
            (format @ Some(_), None) => {
                found = format;
                Ok(())
            }
            (Some(second), Some(first)) => {
                let message = format!("'{}' cannot be combined with '{}'.", second.param, first.param);
                Err(BodyError::invalid(second.param, message))
            }
        };
        add(fields.take::<ResponseFormat>(RESPONSE_FORMAT)?.map_or(Ok(None), response_format)?)?;
        let guided = |param, kind: Option<OutputKind>| kind.map(|kind| Self { param, path: param, kind });
        add(guided("guided_json", fields.take("guided_json")?.map(parsed).map(OutputKind::Schema)))?;
        add(guided("guided_regex", fields.take("guided_regex")?.map(OutputKind::Regex)))?;
        add(guided("guided_choice", fields.take("guided_choice")?.map(OutputKind::Choice)))?;
        add(guided("guided_grammar", fields.take("guided_grammar")?.map(OutputKind::Grammar)))?;
        if let Some(outputs) = fields.take::<StructuredOutputs>(STRUCTURED)? {
            add(guided(STRUCTURED, outputs.json.map(parsed).map(OutputKind::Schema)))?;
            add(guided(STRUCTURED, outputs.regex.map(OutputKind::Regex)))?;
            add(guided(STRUCTURED, outputs.choice.map(OutputKind::Choice)))?;
            add(guided(STRUCTURED, outputs.grammar.map(OutputKind::Grammar)))?;
            add(guided(STRUCTURED, outputs.json_object.filter(|wanted| *wanted).map(|_| OutputKind::JsonObject)))?;
        }
        match &found {
            Some(Self { param, kind: OutputKind::Choice(texts), .. }) if texts.is_empty() => {
                Err(BodyError::invalid(param, format!("'{param}' must hold at least one choice.")))
            }
            _ => Ok(found),
        }
    }
}

/// The fields [`OutputFormat::take`] reads.
impl JsonSchema for OutputFormat {
    fn schema_name() -> Cow<'static, str> {
        "OutputFormat".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let form = generator.subschema_for::<Option<ResponseFormat>>();
        let outputs = generator.subschema_for::<Option<StructuredOutputs>>();
        let text = generator.subschema_for::<Option<String>>();
        json_schema!({"type": "object", "properties": {
            RESPONSE_FORMAT: form,
            "guided_json": {"type": ["object", "boolean", "string", "null"]},
            "guided_regex": text,
            "guided_choice": {"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1},
            "guided_grammar": text,
            STRUCTURED: outputs,
        }})
    }
}

/// `text.format` of `/v1/responses`: a response format without an object around the schema.
#[derive(Deserialize)]
#[serde(remote = "Self")]
struct TextFormat {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    schema: Option<Value>,
}

impl OutputFormat {
    /// Reads `format`, the value of `text.format`.
    pub(super) fn of_text(format: &Value) -> Result<Option<Self>, BodyError> {
        let invalid = |message: String| BodyError::invalid(TEXT, message);
        let format: TextFormat = Deserialize::deserialize(format)
            .map_err(|error| invalid(format!("Invalid value for 'text.format': {error}.")))?;
        let with = |path, kind| Ok(Some(Self { param: TEXT, path, kind }));
        match format.kind.as_str() {
            "text" => Ok(None),
            "json_object" => with("text.format", OutputKind::JsonObject),
            "json_schema" if !format.name.as_deref().is_some_and(is_name) => {
                Err(invalid(format!("'text.format.name' must be {NAME_RULE}.")))
            }
            "json_schema" => {
                let schema = format.schema.ok_or_else(|| invalid("'text.format.schema' is required.".to_owned()))?;
                with("text.format.schema", OutputKind::Schema(schema))
            }
            _ => Err(invalid("'text.format.type' must be text, json_object or json_schema.".to_owned())),
        }
    }
}

fn response_format(format: ResponseFormat) -> Result<Option<OutputFormat>, BodyError> {
    let with = |path, kind| Ok(Some(OutputFormat { param: RESPONSE_FORMAT, path, kind }));
    match (format.kind.as_str(), format.json_schema) {
        ("text", _) => Ok(None),
        ("json_object", _) => with(RESPONSE_FORMAT, OutputKind::JsonObject),
        ("json_schema", Some(NamedSchema { name, schema, .. })) => {
            if !is_name(&name) {
                return Err(BodyError::invalid(
                    RESPONSE_FORMAT,
                    format!("'response_format.json_schema.name' must be {NAME_RULE}."),
                ));
            }
            with("response_format.json_schema.schema", schema.map_or(OutputKind::JsonObject, OutputKind::Schema))
        }
        ("json_schema", None) => {
            Err(BodyError::invalid(RESPONSE_FORMAT, "'response_format.json_schema' is required for this type."))
        }
        _ => {
            Err(BodyError::invalid(RESPONSE_FORMAT, "'response_format.type' must be text, json_object or json_schema."))
        }
    }
}

/// Some clients send a schema as text.
fn parsed(schema: Value) -> Value {
    schema.as_str().and_then(|text| serde_json::from_str(text).ok()).unwrap_or(schema)
}

/// Whether `name` may name a function or schema.
pub(super) fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

pub(super) const NAME_RULE: &str = "1 to 64 letters, digits, '_' or '-'";
const RESPONSE_FORMAT: &str = "response_format";
const TEXT: &str = "text";
const STRUCTURED: &str = "structured_outputs";
