//! A request body, read one top-level field at a time, so that every error names its field and `null` means absent
//! everywhere. Values stay raw text until somebody asks for them with a type.

use indexmap::IndexMap;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// A body that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyError {
    /// What kind of fault.
    pub kind: BodyErrorKind,
    /// The top-level field; `None` when the body as a whole is at fault.
    pub param: Option<String>,
    /// A sentence for people.
    pub message: String,
}

/// The kinds of [`BodyError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyErrorKind {
    /// Not JSON, wrong type, wrong value.
    Invalid,
    /// A required field is absent or null.
    Missing,
    /// The field asks for something this server does not do.
    Unsupported,
}

impl BodyError {
    /// `param` has a wrong type or value.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self { kind: BodyErrorKind::Invalid, param: Some(param.to_owned()), message: message.into() }
    }

    /// `param` is required.
    pub fn missing(param: &str) -> Self {
        let message = format!("Missing required parameter: '{param}'.");
        Self { kind: BodyErrorKind::Missing, param: Some(param.to_owned()), message }
    }

    /// `param` asks for something this server does not do.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { kind: BodyErrorKind::Unsupported, param: Some(param.to_owned()), message: message.into() }
    }

    fn body(message: String) -> Self {
        Self { kind: BodyErrorKind::Invalid, param: None, message }
    }
}

/// The fields of a body not yet taken.
#[derive(Debug)]
pub(super) struct Fields(IndexMap<String, Box<RawValue>>);

impl Fields {
    /// Splits `body` into its fields.
    pub(super) fn parse(body: &[u8]) -> Result<Self, BodyError> {
        let text = std::str::from_utf8(body)
            .map_err(|error| BodyError::body(format!("The request body is not valid UTF-8: {error}.")))?;
        let Members(members) = serde_json::from_str(text)
            .map_err(|error| BodyError::body(format!("The request body is not a valid JSON object: {error}.")))?;
        let mut fields = IndexMap::with_capacity(members.len());
        for (name, value) in members {
            if fields.contains_key(&name) {
                return Err(BodyError::invalid(&name, "The field appears twice in the request body."));
            }
            fields.insert(name, value);
        }
        Ok(Self(fields))
    }

    /// Takes field `name` as raw JSON text; absent and `null` are both `None`.
    pub(super) fn take_raw(&mut self, name: &str) -> Option<Box<RawValue>> {
        // Order of what is left does not matter: it is only ever listed as "unknown".
        self.0.swap_remove(name).filter(|raw| raw.get() != "null")
    }

    /// Takes field `name` as a `T`; absent and `null` are both `None`.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, BodyError> {
        self.take_raw(name).map(|raw| read(name, &raw)).transpose()
    }

    /// As [`Self::take`], for a field that is short in every request that makes sense: a long one is not even read.
    pub(super) fn take_short<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, BodyError> {
        match self.take_raw(name) {
            Some(raw) if raw.get().len() > MAX_SHORT_BYTES => {
                Err(BodyError::invalid(name, format!("'{name}' is longer than {MAX_SHORT_BYTES} bytes of JSON.")))
            }
            raw => raw.map(|raw| read(name, &raw)).transpose(),
        }
    }

    /// Reads field `name` and leaves it to be taken; absent and `null` are both `None`.
    pub(super) fn peek<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, BodyError> {
        self.0.get(name).filter(|raw| raw.get() != "null").map(|raw| read(name, raw)).transpose()
    }

    /// Takes field `name`, which must be there.
    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, BodyError> {
        self.take(name)?.ok_or_else(|| BodyError::missing(name))
    }

    /// Drops the fields that are accepted and change nothing.
    pub(super) fn accept(&mut self, names: &[&str]) {
        for name in names {
            self.0.swap_remove(*name);
        }
    }

    /// Refuses field `name` unless it is absent or its value is one of `harmless`, given as compact JSON.
    pub(super) fn refuse(&mut self, name: &str, harmless: &[&str]) -> Result<(), BodyError> {
        let Some(raw) = self.take_raw(name) else { return Ok(()) };
        let compact: String = raw.get().split_ascii_whitespace().collect();
        if harmless.contains(&compact.as_str()) {
            return Ok(());
        }
        Err(BodyError::unsupported(name, format!("'{name}' is not supported by this server.")))
    }

    /// Ends the reading: with `strict`, a field nobody took is an error.
    pub(super) fn finish(self, strict: bool) -> Result<(), BodyError> {
        match self.0.into_keys().next() {
            Some(name) if strict => Err(BodyError::unsupported(&name, format!("Unknown parameter: '{name}'."))),
            _ => Ok(()),
        }
    }
}

/// Several times what four stop strings or three hundred biases need.
const MAX_SHORT_BYTES: usize = 64 << 10;

/// Reads `raw`, the value of field `name`.
pub(super) fn read<T: DeserializeOwned>(name: &str, raw: &RawValue) -> Result<T, BodyError> {
    let mut json = serde_json::Deserializer::from_str(raw.get());
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = if path == "." { String::new() } else { separated(&path) };
        BodyError::invalid(
            name,
            format!("Invalid value for '{name}{inner}': {}.", without_position(&error.into_inner())),
        )
    })
}

/// `path` as the continuation of a field's name: `[0].content` stays, `content` gets its dot.
fn separated(path: &str) -> String {
    if path.starts_with('[') { path.to_owned() } else { format!(".{path}") }
}

/// The message without "at line 1 column 7", which would count from the start of the field.
fn without_position(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message,
    }
}

/// The members of an object in order, doubles included.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field() {
        let mut fields = Fields::parse(br#"{"a": "x", "b": null, "c": [{"d": 1}, {"d": true}]}"#).unwrap();
        let error = fields.take::<f64>("a").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("a"));
        assert_eq!(error.message, "Invalid value for 'a': invalid type: string \"x\", expected f64.");
        assert_eq!(fields.take::<f64>("b"), Ok(None));
        let error = fields.take::<Vec<IndexMap<String, u32>>>("c").unwrap_err();
        assert!(error.message.starts_with("Invalid value for 'c[1].d': "), "{}", error.message);
    }

    #[test]
    fn doubles_and_non_objects_are_refused() {
        assert_eq!(Fields::parse(br#"{"a":1,"a":2}"#).unwrap_err().param.as_deref(), Some("a"));
        for body in ["", "[]", "3", "{", "{\"a\":}", "{\"a\":1}x", "nul", "{\"a\":1,}"] {
            assert_eq!(Fields::parse(body.as_bytes()).unwrap_err().param, None, "{body}");
        }
        assert!(Fields::parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn strictness_is_about_what_nobody_took() {
        let fields = || Fields::parse(br#"{"mystery":1}"#).unwrap();
        assert_eq!(fields().finish(false), Ok(()));
        assert_eq!(fields().finish(true).unwrap_err().kind, BodyErrorKind::Unsupported);
    }
}
