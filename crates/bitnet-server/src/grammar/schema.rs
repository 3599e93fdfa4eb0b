//! Which JSON schemas can be enforced: every keyword that restricts values is either in the tables below or refused with its
//! place. Keywords nobody knows are annotations, as JSON Schema has it.

use serde_json::{Map, Value, json};

use super::GrammarError;

/// `schema`, found at `root` of the request, with the compiler's options; compact JSON is the only form that leaves.
///
/// # Errors
/// [`GrammarError`], naming the place.
pub(super) fn checked(schema: &Value, root: &str) -> Result<Value, GrammarError> {
    if depth(schema) > MAX_DEPTH {
        return Err(fault(root, format!("is nested more than {MAX_DEPTH} levels deep")));
    }
    if schema.to_string().len() > MAX_BYTES {
        return Err(fault(root, format!("is longer than {MAX_BYTES} bytes")));
    }
    let mut walk = Walk { root: schema, visited: Vec::new() };
    walk.schema(schema, root, true)?;
    let mut schema = match schema {
        Value::Object(object) => object.clone(),
        // `true` allows everything; a schema is needed to carry the options.
        _ => Map::new(),
    };
    // Ours in place of any the caller wrote: they can switch checks off.
    schema.insert("x-guidance".to_owned(), json!({"whitespace_flexible": false}));
    Ok(Value::Object(schema))
}

/// One pass over a schema and what it refers to.
struct Walk<'a> {
    root: &'a Value,
    /// References followed so far.
    visited: Vec<&'a str>,
}

impl<'a> Walk<'a> {
    fn schema(&mut self, schema: &'a Value, path: &str, is_root: bool) -> Result<(), GrammarError> {
        let object = match schema {
            Value::Bool(true) => return Ok(()),
            Value::Bool(false) if !is_root => return Ok(()),
            Value::Object(object) => object,
            _ => return Err(fault(path, "must be a JSON schema")),
        };
        for (keyword, value) in object {
            let path = format!("{path}.{keyword}");
            match keyword.as_str() {
                "properties" | "patternProperties" | "$defs" | "definitions" => {
                    let schemas = value.as_object().ok_or_else(|| fault(&path, "must be an object of schemas"))?;
                    for (name, schema) in schemas {
                        self.schema(schema, &format!("{path}.{name}"), false)?;
                    }
                }
                "anyOf" | "oneOf" | "allOf" | "prefixItems" => self.list(value, &path)?,
                "items" if value.is_array() => self.list(value, &path)?,
                "items" | "additionalItems" | "additionalProperties" => self.schema(value, &path, false)?,
                "$ref" => self.reference(value, &path)?,
                "type" => check_type(value, &path)?,
                "format" if value.as_str().is_some_and(|format| !FORMATS.contains(&format)) => {
                    return Err(fault(
                        &path,
                        format!("the format {value} is not supported; known are {}", FORMATS.join(", ")),
                    ));
                }
                "minProperties" => check_min_properties(object, value, &path)?,
                "$id" | "id" if !is_root => return Err(fault(&path, "is supported at the root only")),
                keyword if UNSUPPORTED.contains(&keyword) => return Err(fault(&path, "is not supported")),
                _ => {}
            }
        }
        Ok(())
    }

    fn list(&mut self, value: &'a Value, path: &str) -> Result<(), GrammarError> {
        let schemas = value.as_array().filter(|schemas| !schemas.is_empty());
        let schemas = schemas.ok_or_else(|| fault(path, "must be a list of schemas"))?;
        for (index, schema) in schemas.iter().enumerate() {
            self.schema(schema, &format!("{path}[{index}]"), false)?;
        }
        Ok(())
    }

    /// References stay inside the schema; what they lead to is checked once, wherever it is.
    fn reference(&mut self, value: &'a Value, path: &str) -> Result<(), GrammarError> {
        let reference = value.as_str().ok_or_else(|| fault(path, "must be a string"))?;
        if self.visited.contains(&reference) || reference == "#" {
            return Ok(());
        }
        self.visited.push(reference);
        let pointer =
            reference.strip_prefix('#').filter(|pointer| pointer.starts_with('/') && !pointer.contains(['~', '%']));
        let pointer =
            pointer.ok_or_else(|| fault(path, "must refer to a place in this schema, as '#/$defs/name' does"))?;
        let root: &'a Value = self.root;
        let target = root.pointer(pointer).ok_or_else(|| fault(path, "refers to nothing"))?;
        self.schema(target, reference, false)
    }
}

fn check_type(value: &Value, path: &str) -> Result<(), GrammarError> {
    let known = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
    let fine = match value {
        Value::Array(names) => !names.is_empty() && names.iter().all(known),
        name => known(name),
    };
    if fine { Ok(()) } else { Err(fault(path, format!("must be one of {} or a list of them", TYPES.join(", ")))) }
}

/// A free key may be written twice, and then the object has fewer members than were written: only what required members
/// guarantee can be promised.
fn check_min_properties(schema: &Map<String, Value>, value: &Value, path: &str) -> Result<(), GrammarError> {
    let required = schema.get("required").and_then(Value::as_array).map_or(0, Vec::len) as u64;
    match value.as_u64() {
        Some(least) if least <= required.max(1) => Ok(()),
        Some(_) => Err(fault(path, "is supported up to the number of required properties")),
        None => Err(fault(path, "must be a number of properties")),
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn fault(path: &str, message: impl Into<String>) -> GrammarError {
    // A path is as long as the caller's names are; the message repeats no more than helps.
    GrammarError { path: path.chars().take(300).collect(), message: message.into() }
}

const MAX_DEPTH: usize = 64;
const MAX_BYTES: usize = 64 << 10;

const TYPES: &[&str] = &["null", "boolean", "integer", "number", "string", "array", "object"];

/// Formats the compiler has expressions for.
const FORMATS: &[&str] = &["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Keywords that restrict values in a way no mask can follow.
const UNSUPPORTED: &[&str] = &[
    "$dynamicRef",
    "$recursiveRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn path(schema: Value) -> Option<String> {
        checked(&schema, "s").err().map(|error| error.path)
    }

    #[test]
    fn what_cannot_be_enforced_is_refused_with_its_place() {
        let cases = [
            (json!({"not": {}}), "s.not"),
            (json!({"properties": {"a": {"items": {"uniqueItems": true}}}}), "s.properties.a.items.uniqueItems"),
            (json!({"anyOf": [{}, {"if": {}}]}), "s.anyOf[1].if"),
            (json!({"anyOf": []}), "s.anyOf"),
            (json!({"type": "text"}), "s.type"),
            (json!({"type": "string", "format": "idn-email"}), "s.format"),
            (json!({"$ref": "https://example.com/schema"}), "s.$ref"),
            (json!({"$ref": "#/$defs/none"}), "s.$ref"),
            (json!({"$ref": "#/x/y", "x": {"y": {"not": {}}}}), "#/x/y.not"),
            (json!({"minProperties": 2, "required": ["a"]}), "s.minProperties"),
            (json!({"properties": {"a": 3}}), "s.properties.a"),
            (json!(false), "s"),
            (json!([]), "s"),
        ];
        for (schema, place) in cases {
            assert_eq!(path(schema.clone()).as_deref(), Some(place), "{schema}");
        }
    }

    #[test]
    fn limits_hold() {
        let nested = |levels| (0..levels).fold(json!({}), |inner, _| json!({"items": inner}));
        assert_eq!(path(nested(MAX_DEPTH - 1)), None);
        assert_eq!(path(nested(MAX_DEPTH + 1)).as_deref(), Some("s"));
        assert_eq!(path(json!({"description": "x".repeat(MAX_BYTES)})).as_deref(), Some("s"));
    }

    #[test]
    fn the_caller_cannot_switch_checks_off() {
        let schema = json!({"type": "object", "x-guidance": {"lenient": true}, "nullable": true});
        assert_eq!(checked(&schema, "s").unwrap()["x-guidance"], json!({"whitespace_flexible": false}));
    }
}
