//! Methods of Python strings that templates use and that the Jinja engine lacks or does otherwise.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, from_args},
};
use minijinja_contrib::pycompat;

/// What Python strips and splits at: Unicode's white space and four separators of ASCII.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Methods called on a value: our own for strings first, then those of the compatibility crate.
pub(super) fn call_method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match method {
            "strip" | "lstrip" | "rstrip" => return strip(text, method, arguments),
            "split" | "rsplit" => return split(text, method == "rsplit", arguments),
            "splitlines" => return split_lines(text, arguments),
            "removeprefix" => return remove(text, arguments, str::strip_prefix),
            "removesuffix" => return remove(text, arguments, str::strip_suffix),
            "partition" => return partition(text, arguments),
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, method, arguments)
}

/// The `trim` filter.
pub(super) fn trim(text: &str, characters: Option<&str>) -> String {
    match characters {
        Some(characters) => text.trim_matches(|character| characters.contains(character)).to_string(),
        None => text.trim_matches(is_space).to_string(),
    }
}

fn strip(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (characters,): (Option<&str>,) = from_args(arguments)?;
    let drop = |character| characters.map_or(is_space(character), |set| set.contains(character));
    Ok(Value::from(match method {
        "lstrip" => text.trim_start_matches(drop),
        "rstrip" => text.trim_end_matches(drop),
        _ => text.trim_matches(drop),
    }))
}

fn remove<'a>(
    text: &'a str,
    arguments: &'a [Value],
    cut: fn(&'a str, &'a str) -> Option<&'a str>,
) -> Result<Value, Error> {
    let (part,): (&str,) = from_args(arguments)?;
    Ok(Value::from(cut(text, part).unwrap_or(text)))
}

fn partition(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(arguments)?;
    refuse_empty(separator)?;
    let parts = match text.split_once(separator) {
        Some((before, after)) => [before, separator, after],
        None => [text, "", ""],
    };
    Ok(parts.into_iter().collect())
}

/// `split(sep=None, maxsplit=-1)` and `rsplit`.
fn split(text: &str, from_right: bool, arguments: &[Value]) -> Result<Value, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
    let separator = argument(positional.first(), &named, "sep")?;
    let most = argument(positional.get(1), &named, "maxsplit")?;
    named.assert_all_used()?;
    let most = if most.is_undefined() { -1 } else { i64::try_from(most)? };
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator.as_str() {
        Some(separator) => {
            refuse_empty(separator)?;
            let pieces = most.saturating_add(1);
            if from_right {
                text.rsplitn(pieces, separator).collect()
            } else {
                text.splitn(pieces, separator).collect()
            }
        }
        None if separator.is_undefined() || separator.is_none() => split_at_space(text, from_right, most),
        None => return Err(Error::new(ErrorKind::InvalidOperation, "split: the separator must be a string or none")),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().collect())
}

fn argument(positional: Option<&Value>, named: &Kwargs, name: &str) -> Result<Value, Error> {
    match positional {
        Some(value) => Ok(value.clone()),
        None => Ok(named.get::<Option<Value>>(name)?.unwrap_or_default()),
    }
}

fn refuse_empty(separator: &str) -> Result<(), Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "the separator is empty and must not be"));
    }
    Ok(())
}

/// Words; the last one holds all that is left once `most` splits are made. From the right they come last first.
fn split_at_space(text: &str, from_right: bool, most: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
        if rest.is_empty() {
            return words;
        }
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(cut) = cut.filter(|_| words.len() < most) else {
            words.push(rest);
            return words;
        };
        if from_right {
            let width = rest[cut..].chars().next().map_or(0, char::len_utf8);
            words.push(&rest[cut + width..]);
            rest = &rest[..cut];
        } else {
            words.push(&rest[..cut]);
            rest = &rest[cut..];
        }
    }
}

/// `splitlines(keepends=False)`.
fn split_lines(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(arguments)?;
    let keep = argument(positional.first(), &named, "keepends")?.is_true();
    named.assert_all_used()?;
    let is_end =
        |character: char| matches!(character, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let end = &rest[at..];
        let width = if end.starts_with("\r\n") { 2 } else { end.chars().next().map_or(0, char::len_utf8) };
        lines.push(if keep { &rest[..at + width] } else { &rest[..at] });
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    Ok(lines.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(expression: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.set_unknown_method_callback(call_method);
        environment.render_str(&format!("{{{{ {expression} }}}}"), ()).unwrap()
    }

    /// Each expected text is what Python's own methods return.
    #[test]
    fn methods_are_pythons() {
        let cases = [
            ("'\\x1c a\\u00a0'.strip() ~ '.'", "a."),
            ("'xxaxx'.lstrip('x')", "axx"),
            ("' a  b c '.split() | join('/')", "a/b/c"),
            ("' a  b c '.split(none, 1) | join('/')", "a/b c "),
            ("' a b  c '.rsplit(maxsplit=1) | join('/')", " a b/c"),
            ("'a,b,c'.split(',', 1) | join('/')", "a/b,c"),
            ("'a,b,c'.rsplit(',', maxsplit=1) | join('/')", "a,b/c"),
            ("'a,,b'.split(sep=',') | length", "3"),
            ("('a</think>b'.split('</think>')|last)", "b"),
            ("'a\\r\\nb\\n\\nc'.splitlines() | join('/')", "a/b//c"),
            ("'a\\nb\\n'.splitlines(true) | length", "2"),
            ("'prefix-x'.removeprefix('prefix-') ~ 'x.y'.removesuffix('.y')", "xx"),
            ("'a=b=c'.partition('=') | join('/')", "a/=/b=c"),
            ("'Ab'.upper() ~ 'Ab'.startswith('A')", "ABTrue"),
        ];
        for (expression, expected) in cases {
            assert_eq!(rendered(expression), expected, "{expression}");
        }
    }
}
