//! The `tojson` filter as Hugging Face's templates know it: Python's `json.dumps`, with its spaces, its key order and its
//! numbers. Models were trained on exactly this text. The engine's own filter sorts keys and escapes for HTML.

use minijinja::{Error, ErrorKind, Value, value::Kwargs};
use serde_json::Value as Json;

/// `tojson(ensure_ascii=false, indent=None, separators=None, sort_keys=false)`.
pub(super) fn tojson(value: &Value, ensure_ascii: Option<bool>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = indent.filter(|indent| !indent.is_none()).map(usize::try_from).transpose()?;
    if indent.is_some_and(|indent| indent > MAX_INDENT) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the indent is too large"));
    }
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style {
        item,
        key,
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.or(ensure_ascii).unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "tojson: the value has no JSON form").with_source(error)
    })?;
    let mut out = String::new();
    style.write(&json, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

/// How `json.dumps` was asked to write.
struct Style {
    item: String,
    key: String,
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Style {
    fn write(&self, json: &Json, depth: usize, out: &mut String) {
        match json {
            Json::Null => out.push_str("null"),
            Json::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Json::Number(number) => out.push_str(&python_number(number)),
            Json::String(text) => self.write_string(text, out),
            Json::Array(items) => self.write_items('[', ']', items.iter(), depth, out, |item, depth, out| {
                self.write(item, depth, out);
            }),
            Json::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.write_items('{', '}', entries.into_iter(), depth, out, |(key, value), depth, out| {
                    self.write_string(key, out);
                    out.push_str(&self.key);
                    self.write(value, depth, out);
                });
            }
        }
    }

    fn write_items<T>(
        &self,
        open: char,
        close: char,
        items: impl ExactSizeIterator<Item = T>,
        depth: usize,
        out: &mut String,
        write: impl Fn(T, usize, &mut String),
    ) {
        let empty = items.len() == 0;
        out.push(open);
        for (i, item) in items.enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            self.break_line(depth + 1, out);
            write(item, depth + 1, out);
        }
        if !empty {
            self.break_line(depth, out);
        }
        out.push(close);
    }

    fn break_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !matches!(c, ' '..='~')) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Rust and Python find the same shortest digits; Python's exponent begins at 1e16 and below 1e-4, with a sign and two digits.
fn python_number(number: &serde_json::Number) -> String {
    let Some(value) = number.as_f64().filter(|_| number.is_f64()) else { return number.to_string() };
    let scientific = format!("{value:e}");
    match scientific.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) if !(-4..16).contains(&exponent) && value != 0.0 => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

/// Real templates use 2 or 4.
const MAX_INDENT: usize = 16;

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context, value::Serde};
    use serde_json::json;

    use super::*;

    fn dumps(arguments: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        let value = json!({"b": [1, 2.5, true, null], "a": {}, "é<>&'": "\u{7f}\"\n", "e": []});
        environment
            .render_str(&format!("{{{{ v|tojson({arguments}) }}}}"), context!(v => Value::from(Serde(&value))))
            .unwrap()
    }

    /// Each expectation is what CPython's json.dumps prints.
    #[test]
    fn writes_what_python_writes() {
        assert_eq!(
            dumps(""),
            r#"{"b": [1, 2.5, true, null], "a": {}, "é<>&'": "\"\n", "e": []}"#.replace("\"\\\"", "\"\u{7f}\\\"")
        );
        assert_eq!(dumps("separators=(',', ':'), sort_keys=true")[..20], *r#"{"a":{},"b":[1,2.5,t"#);
        assert!(dumps("ensure_ascii=true").contains(r#""\u00e9<>&'": "\u007f\"\n""#));
        assert_eq!(dumps("indent=2")[..34], *"{\n  \"b\": [\n    1,\n    2.5,\n    tru");
        assert!(dumps("indent=4").contains("\"a\": {},\n"));
    }

    #[test]
    fn numbers_have_pythons_exponents() {
        let number = |value: f64| python_number(&serde_json::Number::from_f64(value).unwrap());
        let cases = [
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-5, "1e-05"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (-0.0, "-0.0"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
