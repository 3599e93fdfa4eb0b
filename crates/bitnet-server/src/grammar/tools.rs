//! Tool calls as a grammar: `<tool_call>{"name":"f","arguments":{...}}</tool_call>`, the arguments by the function's schema.

use serde_json::{Value, json};

use super::{GrammarError, schema};

/// What a call starts with.
pub const CALL_START: &str = "<tool_call>";
/// What a call ends with.
pub const CALL_END: &str = "</tool_call>";

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// The schema of its arguments, an object's; `None`: it takes none.
    pub parameters: Option<Value>,
    /// Where the schema is in the request.
    pub path: String,
}

/// Which calls an output may or must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct CallRule {
    /// The functions on offer, at least one.
    pub functions: Vec<Function>,
    /// An output without a call is wrong.
    pub required: bool,
    /// More than one call is fine.
    pub parallel: bool,
    /// What an output without calls must look like; `None`: any text, which calls may follow.
    pub otherwise: Option<Value>,
}

impl CallRule {
    /// The grammar. What follows the start tag is the same in all forms, so that one reader understands them.
    pub(super) fn to_lark(&self, path: &str) -> Result<String, GrammarError> {
        let more = if self.parallel { r#"("\n"? start_tag call)*"# } else { "" };
        let mut lark = match (self.required, &self.otherwise) {
            (true, _) => format!("start: start_tag call {more}\n"),
            (false, None) => format!(
                "start: text | lead call {more}\ntext: TEXT\nlead[lazy]: TEXT \"{CALL_START}\"\nTEXT: /(.|\\n)*/\n"
            ),
            (false, Some(value)) => {
                let value = schema::checked(value, path)?;
                format!("start: answer | start_tag call {more}\nanswer: %json {value}\n")
            }
        };
        lark += &format!("start_tag: \"{CALL_START}\"\n");
        let names: Vec<_> = (0..self.functions.len()).map(|index| format!("call_{index}")).collect();
        lark += &format!("call: \"\\n\"? ({}) \"\\n\"? \"{CALL_END}\"\n", names.join(" | "));
        for (name, function) in names.iter().zip(&self.functions) {
            let arguments = arguments_schema(function)?;
            let quoted = Value::from(format!(r#""{}""#, function.name));
            lark +=
                &format!(r#"{name}: "{{\"name\":" " "? {quoted} "," " "? "\"arguments\":" " "? {name}_arguments "}}""#);
            lark += &format!("\n{name}_arguments: %json {arguments}\n");
        }
        Ok(lark)
    }
}

/// The schema of the arguments of `function`: always an object's.
fn arguments_schema(function: &Function) -> Result<Value, GrammarError> {
    let Some(parameters) = &function.parameters else {
        return schema::checked(&json!({"type": "object", "additionalProperties": false}), &function.path);
    };
    let mut parameters = parameters.clone();
    let fault = |message: &str| GrammarError { path: function.path.clone(), message: message.to_owned() };
    let object = parameters.as_object_mut().ok_or_else(|| fault("must be an object"))?;
    let kind = object.entry("type").or_insert_with(|| "object".into());
    if kind != "object" {
        return Err(fault("must be the schema of an object"));
    }
    schema::checked(&parameters, &function.path)
}
