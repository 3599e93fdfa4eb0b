//! Tools: what may be called, what must be, and the calls as they are told.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    fields::{BodyError, Fields},
    objects::objects_only,
    output::{NAME_RULE, is_name},
};

/// The tools of a request that may be called.
#[derive(Clone, Debug)]
pub struct ToolRequest {
    /// The functions, at least one.
    pub functions: Vec<FunctionDefinition>,
    /// The list as sent, for the chat template.
    pub listed: Value,
    /// A call must be made.
    pub required: bool,
    /// More than one call is fine.
    pub parallel: bool,
}

/// A function that may be called.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(remote = "Self")]
pub struct FunctionDefinition {
    /// Its name.
    #[schemars(regex(pattern = r"^[a-zA-Z0-9_-]{1,64}$"))]
    pub name: String,
    /// The schema of its arguments.
    pub parameters: Option<Value>,
    /// Where in the request its parameters are.
    #[serde(skip)]
    pub path: String,
}

#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    #[schemars(extend("const" = "function"))]
    kind: String,
    #[schemars(required)]
    function: Option<FunctionDefinition>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged, expecting = "none, auto, required or a function")]
enum Choice {
    Mode(#[schemars(extend("enum" = ["none", "auto", "required"]))] String),
    Function(FunctionChoice),
}

#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct FunctionChoice {
    #[serde(rename = "type")]
    kind: String,
    function: Option<Named>,
    name: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct Named {
    name: String,
}

objects_only!(FunctionDefinition, Tool, FunctionChoice, Named);

/// Most tools of a request.
const MAX_TOOLS: usize = 128;

impl ToolRequest {
    /// Takes the fields; `None`: no call can be made.
    pub(super) fn take(fields: &mut Fields) -> Result<Option<Self>, BodyError> {
        let listed = fields.take(TOOLS)?.unwrap_or_default();
        Self::read(fields, listed, "function.")
    }

    /// [`ToolRequest::take`] for `/v1/responses`, where `tools` are written without an object around the function.
    pub(super) fn take_flat(fields: &mut Fields, tools: &[Map<String, Value>]) -> Result<Option<Self>, BodyError> {
        let nested = |tool: &Map<String, Value>| {
            let mut function = tool.clone();
            match function.shift_remove("type") {
                Some(kind) if kind == "function" => json!({"type": kind, "function": function}),
                kind => json!({ "type": kind.unwrap_or_default() }),
            }
        };
        let listed = if tools.is_empty() { Value::Null } else { tools.iter().map(nested).collect() };
        Self::read(fields, listed, "")
    }

    /// `inside`: the way from a tool to its function, as written.
    fn read(fields: &mut Fields, listed: Value, inside: &str) -> Result<Option<Self>, BodyError> {
        let tools: Vec<Tool> = match &listed {
            Value::Null => Vec::new(),
            list => Deserialize::deserialize(list)
                .map_err(|error| BodyError::invalid(TOOLS, format!("Invalid value for 'tools': {error}.")))?,
        };
        let choice = fields.take::<Choice>(CHOICE)?;
        let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        if tools.len() > MAX_TOOLS {
            return Err(BodyError::invalid(TOOLS, format!("'tools' may hold at most {MAX_TOOLS} tools.")));
        }
        let mut functions = Vec::with_capacity(tools.len());
        for (index, tool) in tools.into_iter().enumerate() {
            functions.push(function(&format!("{TOOLS}[{index}]"), inside, tool, &functions)?);
        }
        let request = |functions, required| Some(Self { functions, listed, required, parallel });
        match choice {
            Some(Choice::Mode(mode)) if mode == "none" => Ok(None),
            Some(Choice::Mode(mode)) if !["auto", "required"].contains(&mode.as_str()) => {
                Err(BodyError::invalid(CHOICE, "'tool_choice' must be none, auto, required or a function."))
            }
            Some(Choice::Mode(mode)) if functions.is_empty() && mode == "auto" => Ok(None),
            None if functions.is_empty() => Ok(None),
            Some(_) if functions.is_empty() => Err(BodyError::invalid(CHOICE, "'tool_choice' needs 'tools'.")),
            None => Ok(request(functions, false)),
            Some(Choice::Mode(mode)) => Ok(request(functions, mode == "required")),
            Some(Choice::Function(
                FunctionChoice { kind, function: Some(Named { name }), .. }
                | FunctionChoice { kind, function: None, name: Some(name) },
            )) if kind == "function" => {
                functions.retain(|function| function.name == name);
                if functions.is_empty() {
                    return Err(BodyError::invalid(CHOICE, "'tool_choice' names a function that is not in 'tools'."));
                }
                Ok(request(functions, true))
            }
            Some(Choice::Function(_)) => {
                Err(BodyError::unsupported(CHOICE, "'tool_choice' supports objects of type 'function' only."))
            }
        }
    }
}

/// A tool of `/v1/responses`: its function without an object around it.
pub(super) fn flat_tool(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = FunctionDefinition::json_schema(generator);
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        fields.insert("type".to_owned(), json!({"const": "function"}));
    }
    schema.insert("required".to_owned(), json!(["type", "name"]));
    schema
}

/// The three fields [`ToolRequest::take`] reads.
impl JsonSchema for ToolRequest {
    fn schema_name() -> Cow<'static, str> {
        "ToolRequest".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let tool = generator.subschema_for::<Tool>();
        let choice = generator.subschema_for::<Option<Choice>>();
        let parallel = generator.subschema_for::<Option<bool>>();
        json_schema!({"type": "object", "properties": {
            TOOLS: {"type": ["array", "null"], "items": tool, "maxItems": MAX_TOOLS},
            CHOICE: choice,
            "parallel_tool_calls": parallel,
        }})
    }
}

fn function(
    path: &str,
    inside: &str,
    tool: Tool,
    before: &[FunctionDefinition],
) -> Result<FunctionDefinition, BodyError> {
    let invalid = |what: &str, rule: &str| BodyError::invalid(TOOLS, format!("'{path}.{what}' {rule}."));
    if tool.kind != "function" {
        return Err(BodyError::unsupported(TOOLS, format!("'{path}.type' must be 'function'.")));
    }
    let function = tool.function.ok_or_else(|| invalid("function", "is required"))?;
    if !is_name(&function.name) {
        return Err(invalid(&format!("{inside}name"), &format!("must be {NAME_RULE}")));
    }
    if before.iter().any(|other| other.name == function.name) {
        return Err(invalid(&format!("{inside}name"), "is taken by an earlier tool"));
    }
    Ok(FunctionDefinition { path: format!("{path}.{inside}parameters"), ..function })
}

/// News of one call in a stream: id, type and name once, then pieces of the arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ToolCallDelta {
    /// 0, 1, ... within the choice.
    pub index: usize,
    /// `call_...`, in the first delta of a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`, in the first delta of a call.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// What is new.
    pub function: FunctionDelta,
}

/// The function of a [`ToolCallDelta`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct FunctionDelta {
    /// Its name, in the first delta of a call: clients concatenate it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More of the arguments' JSON.
    pub arguments: String,
}

const TOOLS: &str = "tools";
const CHOICE: &str = "tool_choice";
