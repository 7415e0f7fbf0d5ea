//! The `tojson` filter as transformers overrides it: Python's `json.dumps` without HTML escapes.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args},
};

/// `x | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, by position or name.
pub(super) fn tojson(value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let arguments = arguments.into_values();
    let (positional, named): (&[Value], Kwargs) = from_args(&arguments)?;
    let argument = |index: usize, name: &str| -> Result<Value, Error> {
        match positional.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(named.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let indent = indent_text(&argument(1, "indent")?)?;
    let (item, key) = separators(&argument(2, "separators")?, indent.is_some())?;
    let mut writer = Writer {
        output: String::new(),
        ascii: argument(0, "ensure_ascii")?.is_true(),
        sort_keys: argument(3, "sort_keys")?.is_true(),
        indent,
        item,
        key,
    };
    named.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(Value::from(writer.output))
}

/// Python takes a number of spaces or the text itself.
fn indent_text(value: &Value) -> Result<Option<String>, Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => Ok(None),
        ValueKind::String => Ok(value.as_str().map(str::to_string)),
        _ => Ok(Some(" ".repeat(i64::try_from(value.clone())?.clamp(0, 64) as usize))),
    }
}

fn separators(value: &Value, indented: bool) -> Result<(String, String), Error> {
    if value.is_undefined() || value.is_none() {
        let item = if indented { "," } else { ", " };
        return Ok((item.to_string(), ": ".to_string()));
    }
    match value.try_iter()?.collect::<Vec<_>>().as_slice() {
        [item, key] => Ok((item.to_string(), key.to_string())),
        others => Err(invalid(format!("tojson: separators holds {} texts and must hold two", others.len()))),
    }
}

struct Writer {
    output: String,
    ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.output.push_str("null"),
            ValueKind::Bool => self.output.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.output.push_str(&value.to_string()),
            ValueKind::Number => self.output.push_str(&float_text(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<_>>();
                self.container(['[', ']'], &items, depth, |writer, item| writer.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    pairs.push((key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    pairs.sort_by(|left, right| left.0.cmp(&right.0));
                }
                self.container(['{', '}'], &pairs, depth, |writer, (key, value)| {
                    writer.string(key);
                    writer.output.push_str(&writer.key.clone());
                    writer.value(value, depth + 1)
                })?;
            }
            other => return Err(invalid(format!("tojson: a value of kind {other} is not JSON"))),
        }
        Ok(())
    }

    fn container<T>(
        &mut self,
        brackets: [char; 2],
        items: &[T],
        depth: usize,
        write: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.output.push(brackets[0]);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.output.push_str(&self.item.clone());
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.output.push(brackets[1]);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.output.push('\n');
            self.output.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.output.push('"');
        for character in text.chars() {
            match character {
                '"' => self.output.push_str("\\\""),
                '\\' => self.output.push_str("\\\\"),
                '\n' => self.output.push_str("\\n"),
                '\r' => self.output.push_str("\\r"),
                '\t' => self.output.push_str("\\t"),
                '\u{8}' => self.output.push_str("\\b"),
                '\u{c}' => self.output.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(character),
                '\u{7f}'.. if self.ascii => self.escape(character),
                other => self.output.push(other),
            }
        }
        self.output.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            // Writing to a String cannot fail.
            let _ = write!(self.output, "\\u{unit:04x}");
        }
    }
}

/// Python turns these kinds of keys into text and refuses others.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".to_string()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_string()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(float_text(f64::try_from(key.clone())?)),
        other => Err(invalid(format!("tojson: a key of kind {other} is not JSON"))),
    }
}

/// Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn float_text(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_string();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_string();
    }
    let scientific = format!("{value:e}");
    let exponent = scientific.split_once('e').and_then(|(_, exponent)| exponent.parse::<i32>().ok()).unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let digits = scientific.split_once('e').map_or("", |(digits, _)| digits);
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{value:?}")
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(expression: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", tojson);
        environment.render_str(expression, ()).unwrap()
    }

    /// Each expected text is the output of Python's json.dumps with the same arguments.
    #[test]
    fn json_is_pythons() {
        let cases = [
            (
                r#"{{ {"b": [1, 2.0, none], "a": "é<'\"\n\u0001"} | tojson }}"#,
                r#"{"b": [1, 2.0, null], "a": "é<'\"\n\u0001"}"#,
            ),
            (r#"{{ {"b": 1, "a": true} | tojson(sort_keys=true) }}"#, r#"{"a": true, "b": 1}"#),
            (r#"{{ [1, {"a": []}] | tojson(indent=2) }}"#, "[\n  1,\n  {\n    \"a\": []\n  }\n]"),
            (r#"{{ [1, {"a": {}}] | tojson(separators=(",", ":")) }}"#, r#"[1,{"a":{}}]"#),
            (r#"{{ "é😀\u007f" | tojson(true) }}"#, r#""\u00e9\ud83d\ude00\u007f""#),
            (
                r#"{{ [1e16, 1e-5, 123456.5, 0.0001, 1e22, 100.0] | tojson }}"#,
                "[1e+16, 1e-05, 123456.5, 0.0001, 1e+22, 100.0]",
            ),
        ];
        for (expression, expected) in cases {
            assert_eq!(rendered(expression), expected, "{expression}");
        }
    }
}
